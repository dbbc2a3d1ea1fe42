"""The split: which rows belong together, which part each group has, and which rows are too alike to be held out."""

from __future__ import annotations

import hashlib
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
from tqdm.auto import tqdm

from core.texts.rows import Row, digest_of_text, normalised

# What share of all groups each part gets, on average: a group's part follows from the split seed and its name alone.
SHARES = {"calibration": 0.40, "sft": 0.25, "validation": 0.15, "held_out": 0.20}
# A shorter passage may be a phrase that texts share by chance.
PASSAGE_CHARACTERS = 200
# What more rows than this share is a prompt or a template and says nothing about what a row belongs to: a share of all
# rows, but never fewer than the second number, so that a small file has groups too.
SHARED_BY, SHARED_BY_AT_LEAST = 0.02, 10
# Rows whose sets of word sequences have at least this Jaccard similarity are near duplicates.
SIMILARITY = 0.8
SHINGLE_WORDS = 5
PERMUTATIONS = 128
# (bands, rows of a band) of the MinHash index: it misses a pair of similarity 0.8 once in 20,000 times.
BANDS = (25, 5)
# A word; in scripts that put no space between words (Thai, Lao, Burmese, Khmer, Chinese, Japanese), a character.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")


def group_names(rows: Sequence[Row], given: Sequence[str | None]) -> tuple[list[str], set[str] | None]:
    """The group of each row; and what too many rows have in common for it to join them, or None where the groups given
    decide.

    Where every row has a given group, these are the groups. Otherwise a row is in one group with every row that has a
    question, a passage, a whole text or a given group in common with it, directly or through other rows.

    A group is named after the first given group in it, else after the first of these values in alphabetical order,
    where passages come first. A row that is added later because it shares that passage leaves the name, and so the
    part, as it was. Two things can change a name when the data grows: a row that joins two groups, and a value that
    becomes so common that it no longer joins rows. `core.runs.rows_read` then refuses to hold out what was read before.
    """
    if None not in given:
        return [name for name in given if name is not None], None
    found = [shared_values(row) for row in tqdm(rows, desc="finding groups", unit="text", delay=1)]
    too_many = _too_many(len(rows))
    prompts = {value for value, count in Counter(value for one in found for value in one).items() if count > too_many}
    values = [one - prompts | {f"text {row.digest}"} for row, one in zip(rows, found, strict=True)]
    return _joined(values, given), prompts


def _joined(values: list[set[str]], given: Sequence[str | None]) -> list[str]:
    """The name of each row's group: rows that have a value or a given group in common are in one."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    rows = len(values)
    numbers: dict[tuple[str, str], int] = {}
    pairs = []
    for number, (found, name) in enumerate(zip(values, given, strict=True)):
        keys = [("", value) for value in sorted(found)] + ([] if name is None else [("given", name)])
        pairs += [(number, numbers.setdefault(key, len(numbers))) for key in keys]
    # Rows and values are the nodes of one graph, with an edge from each row to each of its values.
    size = rows + len(numbers)
    ends = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    graph = coo_array((np.ones(len(ends)), (ends[:, 0], rows + ends[:, 1])), shape=(size, size))
    components = connected_components(graph, directed=False)[1]
    # The smallest of each component, given groups before values.
    names: dict[int, tuple[bool, str]] = {}
    for component, found, name in zip(components.tolist(), values, given, strict=False):
        smallest = (name is None, name or min(found))
        names[component] = min(names.get(component, smallest), smallest)
    return [names[component][1] for component in components.tolist()[:rows]]


def shared_values(row: Row) -> set[str]:
    """What a row may share with others of its group besides its whole text: its question (the first thing that the
    user says), and the passages of what the user says: each paragraph or line, and several of them. Answers and system
    prompts do not count."""
    asked = [content for role, content in row.messages if role in (None, "user")]
    found = set()
    if asked and row.has_roles:
        found.add(f"question {digest_of_text(normalised(asked[0]))}")
    for content in asked:
        for pieces in (re.split(r"\n\s*\n", content.strip()), content.strip().split("\n")):
            # A passage of several paragraphs or lines stands before its question or after it.
            several = (pieces, pieces[1:], pieces[:-1])
            found |= {f"passage {digest}" for digest in _long(pieces)}
            found |= {f"passages {digest}" for digest in _long([*pieces, *map("\n".join, several)])}
    return found


def _long(texts: Iterable[str]) -> set[str]:
    """Digests of the texts that are long enough to be passages."""
    found = {normalised(text) for text in texts if len(text) >= PASSAGE_CHARACTERS}
    return {digest_of_text(text) for text in found if len(text) >= PASSAGE_CHARACTERS}


def _too_many(rows: int) -> float:
    """Values that more rows than this share join nothing."""
    return max(SHARED_BY * rows, SHARED_BY_AT_LEAST)


def part_of(group: str, split_seed: int) -> str:
    """The part of a group: a number in [0, 1) made from the seed and the name, compared with the cumulative shares.

    Nothing else has a say in it, so a group never changes its part; which rows are in it can change when data grows.
    """
    number = _number(f"{split_seed}\n{group}")
    reached = 0.0
    for part, share in SHARES.items():
        reached += share
        if number < reached:
            return part
    return part  # the shares add up to 1 only as far as floating point goes


def seeded_order(rows: Iterable[Row], part: str, split_seed: int) -> list[Row]:
    """Rows in an order whose beginning has as many groups as possible: one row of every group, then a second one of
    every group that has two, and so on; which, and in what order, follows from the seed and the texts alone."""
    groups: dict[str, list[tuple[float, Row]]] = defaultdict(list)
    for row in rows:
        groups[row.group].append((_number(f"{split_seed}\n{part}\n{row.plain}"), row))
    ranked = []
    for members in groups.values():
        members.sort(key=lambda member: member[0])
        ranked += [(rank, number, row) for rank, (number, row) in enumerate(members)]
    return [row for _, _, row in sorted(ranked, key=lambda one: one[:2])]


def _number(text: str) -> float:
    """A number in [0, 1) that looks random and follows from the text."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def near_duplicates(held_out: Sequence[Row], others: Sequence[Row]) -> list[Row]:
    """The held-out rows of which a row of another part has nearly the same text: Jaccard similarity of the sets of
    five words in a row of at least SIMILARITY, without the sequences that a template puts into many rows.

    MinHash finds the pairs that may be alike, the sets themselves decide.
    """
    from datasketch import MinHash, MinHashLSH

    ours, theirs = _shingles(held_out, others)
    options = {"num_perm": PERMUTATIONS, "hashfunc": int}
    index = MinHashLSH(num_perm=PERMUTATIONS, params=BANDS)
    for number, sketch in enumerate(MinHash.generator(ours, **options)):
        if len(ours[number]):
            index.insert(number, sketch)
    found: set[int] = set()
    sketches = zip(theirs, MinHash.generator(theirs, **options), strict=True)
    for shingles, sketch in tqdm(sketches, "finding near duplicates", len(theirs), unit="text", delay=1):
        if len(shingles):
            candidates = set(index.query(sketch)) - found
            found |= {number for number in candidates if _jaccard(ours[number], shingles) >= SIMILARITY}
    return [held_out[number] for number in sorted(found)]


def _shingles(*parts: Sequence[Row]) -> list[list[np.ndarray]]:
    """Of each row the sorted hashes of its sequences of words, but those that a template puts into many rows."""
    hashes = [[_hashes(row.own_text) for row in rows] for rows in parts]
    every = [found for rows in hashes for found in rows]
    values, counts = np.unique(np.concatenate([np.empty(0, np.uint32), *every]), return_counts=True)
    common = values[counts > _too_many(len(every))]
    return [[np.setdiff1d(found, common, assume_unique=True) for found in rows] for rows in hashes]


def _hashes(text: str) -> np.ndarray:
    """Sorted hashes of all sequences of SHINGLE_WORDS words; of a shorter text, of all its words."""
    words = WORD.findall(normalised(text))
    ends = range(min(SHINGLE_WORDS, len(words)), len(words) + 1) if words else ()
    sequences = {" ".join(words[max(0, end - SHINGLE_WORDS) : end]) for end in ends}
    return np.array(sorted({zlib.crc32(sequence.encode()) for sequence in sequences}), dtype=np.uint32)


def _jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """|a and b| / |a or b| of two sorted sets."""
    both = len(np.intersect1d(a, b, assume_unique=True))
    return both / (len(a) + len(b) - both)
