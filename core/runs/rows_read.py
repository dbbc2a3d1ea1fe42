"""Which rows the stages have read: recorded beside what they made of them, so that no later stage holds one out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from core.data import SPEC_ON_DISK, DataSpec, Division
from core.errors import UserError
from core.files import read_json, write_json
from core.models.checkpoints import Checkpoint
from core.texts.split import shared_values

# Part -> marks (`Division.marks`) of the rows of it that this folder was made with, by its own stage or one before it.
ROWS_READ = "rows_read.json"


def write_rows_read(folder: Path, parts: Mapping[str, Iterable[str]], before: Iterable[Path] = ()) -> None:
    """Record the marks of the rows that a stage read, and those that the folders it started from were made with."""
    marks = {part: set(found) for part, found in parts.items()}
    for part, found in rows_read(before).items():
        marks[part] = marks.get(part, set()) | found
    write_json(folder / ROWS_READ, {part: sorted(found) for part, found in marks.items()})


def rows_read(folders: Iterable[Path]) -> dict[str, set[str]]:
    """Part -> marks of all rows that these folders were made with. Raises UserError where the record is missing."""
    marks: dict[str, set[str]] = {}
    for folder in folders:
        for part, found in read_json(folder / ROWS_READ).items():
            marks.setdefault(part, set()).update(found)
    return marks


def recorded(*checkpoints: Checkpoint | None) -> list[Path]:
    """The folders of those models that a stage of ours made from rows: a target, source or start may be one."""
    return [model.folder for model in checkpoints if model is not None and (model.folder / ROWS_READ).is_file()]


def check_held_out(division: Division, folders: Iterable[Path]) -> None:
    """Refuse (UserError) to hold out a row that was read already, or that shares a passage or a question with one that
    was. Both happen when the data has changed since: groups have joined, or have fallen apart because too many rows now
    share what had joined them.

    All rows of the held-out part are checked, not only those that are scored, because rows of one group are alike.
    """
    seen = rows_read(folders)
    counts = dict.fromkeys(seen, 0)
    leaked = 0
    for row in division.parts["held_out"]:
        marks = shared_values(row) | {row.digest}
        readers = [part for part, found in seen.items() if marks & found]
        leaked += bool(readers)
        for part in readers:
            counts[part] += 1
    if leaked:
        told = ", ".join(f"{part} {count}" for part, count in counts.items() if count)
        raise UserError(
            f"{leaked} held-out rows of {division.where} were read by an earlier stage ({told}), or share a passage or "
            "a question with rows that were: the data has changed since; run all stages again with it, or give the "
            "data as it was"
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
    for name in ("split_seed", "max_rows_read", "group_column"):
        value, before = getattr(spec, name), made_from[SPEC_ON_DISK.get(name, name)]
        if value != before:
            raise UserError(
                f"{name} is {value}, but the plans were made with {before}: held-out texts would be trained "
                f"on; use the same {name}, or run all stages again"
            )
    if None not in (revision, made_from["revision"]) and revision != made_from["revision"]:
        raise UserError(
            f"{spec.file or spec.subset} has the revision {revision}, but the plans were made with "
            f"{made_from['revision']}: run all stages again"
        )
