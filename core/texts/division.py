"""A data set divided into parts: calibration, fine-tuning, validation and held-out rows."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from core.errors import UserError
from core.files import digest_of
from core.texts.near_duplicates import SIMILARITY, near_duplicates
from core.texts.rows import Row
from core.texts.split import SHARES, seeded_order, shared_values

log = logging.getLogger(__name__)

# How many rows of a data set are read, unless --max-rows-read says otherwise.
MAX_ROWS_READ = 40_000
# Setting -> its name on disk, where the first format of manifests gave it another name.
SPEC_ON_DISK = {"max_rows_read": "max_samples"}
# What to do about a part with too few rows, and about texts of several parts that are too alike.
MORE_ROWS = "take another --split-seed, more texts, or finer groups (--group-column), and run all stages again"
NAME_SHARED = "name what the texts share in a column (--group-column), and run all stages again"
# How many rows the log shows, and how many characters of each.
EXAMPLES, EXAMPLE_CHARACTERS = 3, 100


@dataclass(frozen=True)
class DataSpec:
    """Which rows are read and how they are divided: the settings in which all stages of a run have to agree.

    Attributes:
        subset: a name of `core.data.DATA_SUBSETS`.
        file: a local file or folder that is read instead.
        split_seed: seed of the split into parts.
        max_rows_read: at most so many rows are read, before they are divided.
        group_column: the column that names the group of a row. Without it the column `group` does, and where a row has
            none, its group is made of what its text shares with others.
    """

    subset: str
    file: str | None = None
    split_seed: int = 0
    max_rows_read: int = MAX_ROWS_READ
    group_column: str | None = None

    def identity(self) -> dict[str, Any]:
        """The settings under the names that they have in manifests."""
        return {SPEC_ON_DISK.get(name, name): value for name, value in asdict(self).items()}


@dataclass
class Division:
    """A data set whose rows are divided into the parts of `core.texts.split.SHARES`.

    No group is in two parts, and neither is any text.

    Attributes:
        name: the data set as messages name it.
        revision: the commit of a data set of the hub, or of the one that a file was exported from, if it is known.
        parts: all rows of each part.
        prompts: the values that so many rows share that they join none. None where a column names every group, and what
            texts share decides nothing.
    """

    spec: DataSpec
    name: str
    revision: str | None
    parts: dict[str, list[Row]]
    prompts: set[str] | None

    def marks(self, rows: Sequence[Row]) -> set[str]:
        """What a later stage needs to recognise these rows, and rows that belong to the same groups.

        These are the digests of the texts, and the passages and questions that make groups in this data set.
        """
        shared = set() if self.prompts is None else {value for row in rows for value in shared_values(row)}
        return {row.digest for row in rows} | shared - (self.prompts or set())

    def rows(self, part: str, limit: int) -> list[Row]:
        """At most `limit` rows of a part, from as many groups as possible, in a seeded order.

        Held-out rows that nearly equal a row of another part are left out.

        Raises:
            UserError: no row is left.
        """
        rows = self.parts[part]
        self.warn_if_small(part)
        if not rows:
            less = "; or give --validation-samples 0" if part == "validation" else ""
            raise UserError(f"{self._size}, none of them in the {part} part; {MORE_ROWS}{less}")
        if part == "held_out" and self._near_duplicates:
            left_out = set(self._near_duplicates)
            rows = [row for row in rows if row not in left_out]
            if not rows:
                raise UserError(
                    f"{self.name}: every held-out text is a near duplicate of another part's; {NAME_SHARED}"
                )
        kept = seeded_order(rows, part, self.spec.split_seed)[:limit]
        groups = len({row.group for row in kept})
        average = sum(len(row.plain) for row in kept) / max(1, len(kept))
        log.info(
            f"{self.name}: {len(kept)} of {len(rows)} {part} texts, of {groups} groups, {average:.0f} characters on "
            "average"
        )
        for row in kept[:EXAMPLES]:
            log.info("  e.g. %s", _beginning(row))
        return kept

    def warn_if_small(self, part: str) -> None:
        """Warn when a part has less than half of its share, or nothing: chance decides which part a group gets."""
        share = len(self.parts[part]) / max(1, sum(map(len, self.parts.values())))
        if share < SHARES[part] / 2:
            got, wanted = 100 * share, 100 * SHARES[part]
            log.warning(f"{self._size}, {got:.0f} % of them in the {part} part instead of {wanted:.0f} %; {MORE_ROWS}")

    @property
    def _size(self) -> str:
        """How many texts and groups the data set has, in words."""
        everything = [row for rows in self.parts.values() for row in rows]
        return f"{self.name} has {len(everything)} texts in {len({row.group for row in everything})} groups"

    @cached_property
    def _near_duplicates(self) -> list[Row]:
        """The held-out rows that are near duplicates of rows of other parts. A warning in the log shows some."""
        held_out = self.parts["held_out"]
        others = [row for part, rows in self.parts.items() if part != "held_out" for row in rows]
        found = near_duplicates(held_out, others)
        if found:
            log.warning(
                f"{self.name}: {len(found)} of {len(held_out)} held-out texts are near duplicates (Jaccard similarity "
                f"of at least {SIMILARITY}) of texts of other parts and are left out; to keep more, {NAME_SHARED}; e.g."
            )
        for row in found[:EXAMPLES]:
            log.warning("  %s", _beginning(row))
        return found

    @property
    def near_duplicates(self) -> dict[str, float]:
        """How many rows of the held-out part were left out, out of how many, and at which similarity."""
        held_out = len(self.parts["held_out"])
        return {"left_out": len(self._near_duplicates), "held_out": held_out, "jaccard_at_least": SIMILARITY}

    def identity(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Where rows came from, how many they are, and their digest, for the manifest of a stage."""
        contents = {"rows": len(rows), "sha256": digest_of([row.messages for row in rows])}
        return {**self.spec.identity(), "revision": self.revision, **contents}


def _beginning(row: Row) -> str:
    """The beginning of a text, in one line."""
    return " ".join(row.plain.split())[:EXAMPLE_CHARACTERS]
