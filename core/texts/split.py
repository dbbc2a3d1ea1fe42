"""The split: which rows belong together in a group, and which part each group is in."""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from core.progress import Progress
from core.texts.rows import Row, digest_of_text, normalised

# The share of all groups that each part gets on average. The part of a group follows from the split seed and the name
# of the group alone.
SHARES = {"calibration": 0.40, "sft": 0.25, "validation": 0.15, "held_out": 0.20}
# A paragraph or line of fewer characters may be a phrase that texts share by chance.
PASSAGE_CHARACTERS = 200
# What more than this share of all rows have in common is a prompt or a template, and says nothing about what a row
# belongs to. The second number is a lower bound, so that a small file has groups too.
PROMPT_SHARE, PROMPT_ROWS = 0.02, 10


def group_names(rows: Sequence[Row], given: Sequence[str | None]) -> tuple[list[str], set[str] | None]:
    """The group of each row.

    Where every row has a given group, these are the groups. Otherwise a row is in one group with every row that has a
    question, a passage, a whole text or a given group in common with it, directly or through other rows.

    A group is named after the first given group in it, and if it has none, after the first of the shared values in
    alphabetical order, in which passages come first. So a row that is added later because it shares that passage leaves
    the name unchanged, and with the name the part. Two things can change a name when the data grows: a new row that
    joins two groups, and a value that becomes so common that it no longer joins rows. `core.runs.rows_read` then
    refuses to hold out rows that were read before.

    Args:
        given: the group that the data names for each row, or None.
    Returns:
        (name of each row's group; the values that so many rows share that they join none, or None where the given
        groups decide alone).
    """
    if None not in given:
        return [name for name in given if name is not None], None
    shared = [shared_values(row) for row in Progress(rows, desc="finding groups", unit="texts", delay=1)]
    limit = prompt_threshold(len(rows))
    prompts = {value for value, count in Counter(value for one in shared for value in one).items() if count > limit}
    values = [one - prompts | {f"text {row.digest}"} for row, one in zip(rows, shared, strict=True)]
    return _joined(values, given), prompts


def _joined(values: list[set[str]], given: Sequence[str | None]) -> list[str]:
    """The name of each row's group, where rows with a value or a given group in common are in one group."""
    from scipy.cluster.hierarchy import DisjointSet  # imports half of scipy; data with given groups does not need it

    # The pairs sort in the order in which they give their name to a group: given groups first, then values.
    keys = [
        [(True, value) for value in found] + ([] if name is None else [(False, name)])
        for found, name in zip(values, given, strict=True)
    ]
    sets: DisjointSet = DisjointSet({key for one in keys for key in one})
    for first, *others in keys:
        for key in others:
            sets.merge(first, key)
    names: dict[tuple[bool, str], str] = {}
    for members in sets.subsets():
        names |= dict.fromkeys(members, min(members)[1])
    return [names[first] for first, *_ in keys]


def shared_values(row: Row) -> set[str]:
    """What a row may have in common with other rows of its group, besides its whole text.

    These are its question (the first message of the user) and the passages in the messages of the user: each long
    paragraph, each long line, and several of them together. Answers and system prompts do not count.
    """
    contents = [content for role, content in row.messages if role in (None, "user")]
    found = set()
    if contents and row.has_roles:
        found.add(f"question {digest_of_text(normalised(contents[0]))}")
    for content in contents:
        for pieces in (re.split(r"\n\s*\n", content.strip()), content.strip().split("\n")):
            # A passage of several paragraphs or lines stands before its question or after it.
            several = (pieces, pieces[1:], pieces[:-1])
            found |= {f"passage {digest}" for digest in _passage_digests(pieces)}
            found |= {f"passages {digest}" for digest in _passage_digests([*pieces, *map("\n".join, several)])}
    return found


def _passage_digests(texts: Iterable[str]) -> set[str]:
    """Digests of the texts that are long enough to be passages, both as they are and normalised."""
    found = {normalised(text) for text in texts if len(text) >= PASSAGE_CHARACTERS}
    return {digest_of_text(text) for text in found if len(text) >= PASSAGE_CHARACTERS}


def prompt_threshold(rows: int) -> float:
    """What more than this number of `rows` rows have in common is a prompt or a template."""
    return max(PROMPT_SHARE * rows, PROMPT_ROWS)


def part_of(group: str, split_seed: int) -> str:
    """The part of a group: a number in [0, 1) is made from the seed and the name, and compared with the summed shares.

    Nothing else decides, so a group of one name never changes its part. Which rows are in the group can change when the
    data grows.
    """
    number = _number(f"{split_seed}\n{group}")
    reached = 0.0
    for part, share in SHARES.items():
        reached += share
        if number < reached:
            return part
    return part  # in floating point the shares may add up to slightly less than 1


def seeded_order(rows: Iterable[Row], part: str, split_seed: int) -> list[Row]:
    """Rows in an order whose beginning has as many groups as possible.

    First comes one row of every group, then a second row of every group that has two, and so on. Which row of a group
    comes first, and the order among groups, follow from the seed and the texts alone.
    """
    groups: dict[str, list[tuple[float, Row]]] = defaultdict(list)
    for row in rows:
        groups[row.group].append((_number(f"{split_seed}\n{part}\n{row.plain}"), row))
    ranked = []
    for members in groups.values():
        members.sort(key=lambda member: member[0])
        ranked += [(rank, number, row) for rank, (number, row) in enumerate(members)]
    return [row for _, _, row in sorted(ranked, key=lambda one: one[:2])]


def _number(text: str) -> float:
    """A number in [0, 1) that follows from the text and is uniformly distributed over texts."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
