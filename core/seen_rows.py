"""Which rows the stages have read: recorded beside what they made of them, so that no later stage holds one out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from core.data import DataSpec, Division, Row
from core.runs import UserError, read_json, write_json

# Part -> digests of the rows of it that this folder was made with, by its own stage or one before it.
ROWS_READ = "rows_read.json"


def write_rows_read(folder: Path, parts: Mapping[str, Sequence[Row]], before: Iterable[Path] = ()) -> None:
    """Record the rows that a stage read, and those that the folders it started from were made with."""
    digests = {part: {row.digest for row in rows} for part, rows in parts.items()}
    for part, found in rows_read(before).items():
        digests[part] = digests.get(part, set()) | found
    write_json(folder / ROWS_READ, {part: sorted(found) for part, found in digests.items()})


def rows_read(folders: Iterable[Path]) -> dict[str, set[str]]:
    """Part -> digests of all rows that these folders were made with. Raises UserError where the record is missing."""
    digests: dict[str, set[str]] = {}
    for folder in folders:
        for part, found in read_json(folder / ROWS_READ).items():
            digests.setdefault(part, set()).update(found)
    return digests


def check_held_out(division: Division, folders: Iterable[Path]) -> None:
    """Refuse (UserError) to hold out a row that was read already: the data has changed, and groups have joined.

    All rows of the part count, whether or not they are scored: rows of one group are no news to each other.
    """
    seen = rows_read(folders)
    counts = dict.fromkeys(seen, 0)
    leaked = 0
    for row in division.parts["held_out"]:
        readers = [part for part, digests in seen.items() if row.digest in digests]
        leaked += bool(readers)
        for part in readers:
            counts[part] += 1
    if leaked:
        told = ", ".join(f"{part} {count}" for part, count in counts.items() if count)
        raise UserError(
            f"{leaked} held-out rows of {division.where} were read by an earlier stage ({told}): the data has changed "
            "since; run all stages again with it, or give the data as it was"
        )


def check_same_split(made_from: Mapping[str, Any], spec: DataSpec, revision: str | None) -> None:
    """Refuse (UserError) another split of the data an earlier stage used: held-out texts would leak into training.

    Args:
        made_from: `Division.identity` of the earlier stage.
        revision: of a data set of the hub, where it is known.
    """
    if made_from["file"] is not None and spec.file is not None:
        same = Path(made_from["file"]).resolve() == Path(spec.file).resolve()
    else:
        same = (made_from["subset"], made_from["file"]) == (spec.subset, spec.file)
    if not same:
        return
    for name in ("split_seed", "max_samples", "group_column"):
        value = getattr(spec, name)
        if made_from[name] != value:
            raise UserError(
                f"{name} is {value}, but the plans were made with {made_from[name]}: held-out texts would be trained "
                f"on; use the same {name}"
            )
    if None not in (revision, made_from["revision"]) and revision != made_from["revision"]:
        raise UserError(
            f"{spec.subset} has the revision {revision}, but the plans were made with {made_from['revision']}: run all "
            "stages again"
        )
