"""The rows of a data set, by its name, read and divided. This is the only module that imports from datasets/."""

from __future__ import annotations

import json
import logging
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from core.errors import UserError, first_line
from core.files import write_text
from core.texts.division import MAX_ROWS_READ, SPEC_ON_DISK, DataSpec, Division
from core.texts.rows import Row, row_of
from core.texts.split import SHARES, group_names, part_of

# The folder datasets/ must never shadow the installed package `datasets`. So it is no package, its modules are imported
# by their own names, and Python looks into it last.
_FOLDER = str(Path(__file__).resolve().parents[1] / "datasets")
if _FOLDER not in sys.path:
    sys.path.append(_FOLDER)

from dataset_general_texts import benchmark_prose, python_reference
from dataset_sources import EPSILON, SOURCES, read_source

__all__ = [
    "DATA_SUBSETS",
    "HUB_IDS",
    "MAX_ROWS_READ",
    "SPEC_ON_DISK",
    "DataSpec",
    "Division",
    "Row",
    "divide",
    "epsilon_of",
    "export_rows",
    "load_rows",
]

log = logging.getLogger(__name__)

FILE_KINDS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
# The data sets that need no network.
INSTALLED = {"python_reference": python_reference, "benchmark_prose": benchmark_prose}
DATA_SUBSETS = (*INSTALLED, *SOURCES, "file")
# The ids of those data sets that are on the hub, for model cards.
HUB_IDS = {name: source.hub_id for name, source in SOURCES.items()}
# The column that names the group of a row, unless --group-column names another one.
GROUP_COLUMN = "group"


def divide(spec: DataSpec) -> Division:
    """Read a data set and divide its rows into parts.

    Raises:
        UserError: unknown or missing subset, missing file, unknown columns, or an empty text in a file.
    """
    read = _read_rows(spec)
    parts: dict[str, list[Row]] = {part: [] for part in SHARES}
    for _, row in read.rows:
        parts[part_of(row.group, spec.split_seed)].append(row)
    return Division(spec, read.name, read.revision, parts, read.prompts)


def load_rows(spec: DataSpec, part: str, limit: int) -> list[Row]:
    """At most `limit` rows of one part, as `Division.rows`."""
    return divide(spec).rows(part, limit)


def export_rows(spec: DataSpec, path: Path) -> int:
    """Write the rows of a data set of the hub to a .jsonl file, and return how many they are.

    Each row is written with the group that it has here, so that the file is divided in the same way as the data set.
    The revision of the data set is written to a second file next to it, from which later stages read it.

    Raises:
        UserError: as `divide`.
    """
    read = _read_rows(spec)
    lines = [{**record, GROUP_COLUMN: row.group} for record, row in read.rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    if read.revision is not None:
        write_text(_revision_file(path), read.revision + "\n")
    write_text(path, "".join(json.dumps(line, ensure_ascii=False, default=str) + "\n" for line in lines))
    return len(lines)


def epsilon_of(subset: str) -> float:
    """The paper's entropic regularisation of Q for a data set."""
    return SOURCES[subset].epsilon if subset in SOURCES else EPSILON


@dataclass(frozen=True)
class _Rows:
    """The rows of a data set in their groups, each with the record that it was made of, without duplicates.

    The other attributes are those of `Division`.
    """

    rows: list[tuple[dict[str, Any], Row]]
    name: str
    revision: str | None
    prompts: set[str] | None


def _read_rows(spec: DataSpec) -> _Rows:
    records, name, revision = _read_records(spec)
    column = spec.group_column or GROUP_COLUMN
    if spec.group_column and not any(spec.group_column in record for record in records):
        columns = ", ".join(records[0]) if records else "no rows"
        raise UserError(f"{name} has no column {spec.group_column!r} (--group-column); it has {columns}")
    record_of: dict[Row, dict[str, Any]] = {}
    unusable = 0
    for number, record in enumerate(records, 1):
        row = row_of(record, f"{name}, row {number}", strict=spec.file is not None)
        if row is None:
            unusable += 1
        else:
            # Of equal rows the one whose group sorts first is kept, so that their order in the data does not matter.
            record_of[row] = min(record_of.get(row, record), record, key=lambda one: _group_rank(one, column))
    if len(record_of) + unusable < len(records):
        log.info("%s: %d duplicate rows left out", name, len(records) - len(record_of) - unusable)
    if unusable:
        log.warning("%s: %d rows without a text, or with an unknown role, left out", name, unusable)
    given = [_given_group(record, column) for record in record_of.values()]
    groups, prompts = group_names(list(record_of), given)
    _log_groups(name, groups, given, spec)
    pairs = zip(record_of.items(), groups, strict=True)
    return _Rows([(record, replace(row, group=group)) for (row, record), group in pairs], name, revision, prompts)


def _log_groups(name: str, groups: list[str], given: list[str | None], spec: DataSpec) -> None:
    """Log how many groups there are, and warn when a column names the groups of only some of the rows."""
    column, named = spec.group_column or GROUP_COLUMN, sum(group is not None for group in given)
    how = f", {named} of the rows named by the column {column}" if named else ""
    log.info("%s: %d groups of %d rows%s", name, len(set(groups)), len(groups), how)
    if named < len(groups) and (named or spec.group_column):
        log.warning(
            f"{name}: {len(groups) - named} of {len(groups)} rows have no group in the column {column}, so all rows, "
            "those with a group too, are joined by what their texts share; fill in the column if it shall decide alone"
        )


def _group_rank(record: dict[str, Any], column: str) -> tuple[bool, str]:
    """Sort key of records: by the name of the given group, and those without one last."""
    group = _given_group(record, column)
    return group is None, group or ""


def _given_group(record: dict[str, Any], column: str) -> str | None:
    """The group that a record names, or None where the cell is empty.

    A CSV column of whole numbers is read as floats when one of its cells is empty, so 1.0 is the group 1.
    """
    value = record.get(column)
    if isinstance(value, float):
        value = None if math.isnan(value) else int(value) if value.is_integer() else value
    return None if value is None or not str(value).strip() else str(value)


def _read_records(spec: DataSpec) -> tuple[list[dict[str, Any]], str, str | None]:
    """(records, name of the data set in messages, its revision on the hub if it is known)."""
    if spec.file is not None:
        records = _read_local(Path(spec.file), spec.max_rows_read, spec.split_seed)
        revision = _revision_file(Path(spec.file))
        return records, spec.file, revision.read_text("utf-8").strip() if revision.is_file() else None
    if spec.subset == "file":
        raise UserError("--data-subset file needs --data-file")
    if spec.subset not in DATA_SUBSETS:
        raise UserError(f"data subset {spec.subset!r}; expected one of {', '.join(DATA_SUBSETS)} (--data-subset)")
    if spec.subset in INSTALLED:
        try:
            return INSTALLED[spec.subset](), spec.subset, None
        except ModuleNotFoundError as error:
            raise UserError(
                f"{spec.subset}: this Python has no {error.name}; install your system's full Python, and the packages "
                "of requirements.txt"
            ) from None
    records, revision_read = _read_hub(spec)
    return records, spec.subset, revision_read


def _revision_file(path: Path) -> Path:
    """The file next to exported rows that holds the revision of the data set (`export_rows`)."""
    return path.with_name(path.name + ".revision")


def _read_hub(spec: DataSpec) -> tuple[list[dict[str, Any]], str | None]:
    """(records of a data set of the hub, its revision if it is known)."""
    from datasets.exceptions import DatasetsError  # imports pandas and pyarrow, which take a second

    try:
        return read_source(spec.subset, spec.max_rows_read, spec.split_seed)
    except (OSError, ValueError, DatasetsError) as error:
        raise UserError(
            f"{spec.subset} ({HUB_IDS[spec.subset]}) cannot be read: {first_line(error)}; log in with `hf auth login` "
            "if it is gated, or give a local copy with --data-file"
        ) from None


def _read_local(path: Path, limit: int, seed: int) -> list[dict[str, Any]]:
    """Records of a file, of a folder of files of one kind, or of a folder that `save_to_disk` wrote."""
    import datasets  # imports pandas and pyarrow, which take a second

    datasets.disable_progress_bars()  # which would be others than ours

    if not path.exists():
        raise UserError(f"data file {path} does not exist")
    try:
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            data = datasets.load_from_disk(str(path))
            if isinstance(data, datasets.DatasetDict):
                if "train" not in data:
                    raise UserError(f"{path} has the splits {', '.join(data)}; give the folder of one of them")
                data = data["train"]
        else:
            files = sorted(p for p in path.rglob("*") if p.suffix in FILE_KINDS) if path.is_dir() else [path]
            kinds = {file.suffix for file in files}
            if len(kinds) != 1 or not kinds <= FILE_KINDS.keys():
                found = ", ".join(sorted(kinds)) or "no such file"
                raise UserError(f"data file {path} has the suffix {found}; expected one of {', '.join(FILE_KINDS)}")
            names = [str(file) for file in files]
            data = datasets.load_dataset(FILE_KINDS[kinds.pop()], data_files=names, split="train")
    except (datasets.exceptions.DatasetGenerationError, ValueError, OSError) as error:
        raise UserError(f"data file {path} cannot be read: {first_line(error.__cause__ or error)}") from None
    return list(data if len(data) <= limit else data.shuffle(seed=seed).select(range(limit)))
