"""Which rows the stages have read, recorded in their output folders, so that no later stage holds such a row out."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from core.data import SPEC_ON_DISK, DataSpec, Division
from core.errors import UserError
from core.files import read_json, write_json
from core.models.checkpoints import Checkpoint
from core.runs.settings import Experiment
from core.texts.split import shared_values

log = logging.getLogger(__name__)

# A file of an output folder: part -> marks (`Division.marks`) of the rows of this part that were read by the stage that
# made the folder, or by a stage that made one of its inputs.
ROWS_READ = "rows_read.json"


def write_rows_read(folder: Path, parts: Mapping[str, Iterable[str]], inputs: Iterable[Path] = ()) -> None:
    """Record in `folder` which rows its stage read, and which rows its inputs were made with.

    Args:
        parts: part -> marks of the rows that the stage itself read.
        inputs: folders of the stage's inputs that have such a record, too.
    """
    marks = {part: set(found) for part, found in parts.items()}
    for part, found in rows_read(inputs).items():
        marks[part] = marks.get(part, set()) | found
    write_json(folder / ROWS_READ, {part: sorted(found) for part, found in marks.items()})


def rows_read(folders: Iterable[Path]) -> dict[str, set[str]]:
    """Part -> marks of all rows that these folders were made with. Raises UserError where a record is missing."""
    marks: dict[str, set[str]] = {}
    for folder in folders:
        for part, found in read_json(folder / ROWS_READ).items():
            marks.setdefault(part, set()).update(found)
    return marks


def recorded(*checkpoints: Checkpoint | None) -> list[Path]:
    """The folders of those models that have a record of rows read, because a stage of ours made them."""
    return [model.folder for model in checkpoints if model is not None and (model.folder / ROWS_READ).is_file()]


def check_held_out(division: Division, folders: Iterable[Path]) -> None:
    """Refuse to hold out a row that was read before, or that shares a passage or a question with a row that was.

    Both happen when the data has changed since the earlier stage: groups have joined, or have fallen apart because so
    many rows now share what had joined them that it counts as a prompt. All rows of the held-out part are checked, not
    only those that will be scored, because rows of one group are alike.

    Raises:
        UserError: there is such a row; the message counts them by the part in which they were read.
    """
    read = rows_read(folders)
    counts = dict.fromkeys(read, 0)
    leaked = 0
    for row in division.parts["held_out"]:
        marks = shared_values(row) | {row.digest}
        read_in = [part for part, found in read.items() if marks & found]
        leaked += bool(read_in)
        for part in read_in:
            counts[part] += 1
    if leaked:
        by_part = ", ".join(f"{part} {count}" for part, count in counts.items() if count)
        raise UserError(
            f"{leaked} held-out rows of {division.name} were read by an earlier stage ({by_part}), or share a passage "
            "or a question with rows that were: the data has changed since; run all stages again with it, or give the "
            "data as it was"
        )


def with_data_of(experiment: Experiment, made_from: Mapping[str, Any]) -> Experiment:
    """The experiment with the data of an earlier stage where it names none itself.

    Args:
        made_from: `Division.identity` of the rows that the earlier stage read.
    """
    if experiment.data.data_subset or experiment.data.data_file is not None:
        return experiment
    log.info("no data given: taking that of the plans, %s", made_from["file"] or made_from["subset"])
    return experiment.changed(
        data_subset=made_from["subset"],
        data_file=made_from["file"],
        split_seed=made_from["split_seed"],
        max_rows_read=made_from["max_samples"],
        group_column=made_from["group_column"],
    )


def check_same_split(made_from: Mapping[str, Any], spec: DataSpec, revision: str | None) -> None:
    """Refuse to divide the data of an earlier stage in another way, because held-out texts would be trained on.

    Args:
        made_from: `Division.identity` of the rows that the earlier stage read.
        revision: revision of the data set on the hub, if it is known.
    Raises:
        UserError: the data is the same, but the split seed, the limit on rows, the group column or the revision is not.
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
