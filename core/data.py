"""The only door to datasets/: calibration, fine-tuning, validation and held-out rows of a data set by its name."""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from core.errors import UserError, first_line
from core.files import digest_of, write_text
from core.texts.rows import Row, row_of
from core.texts.split import SHARES, SIMILARITY, group_names, near_duplicates, part_of, seeded_order, shared_values

# The folder datasets/ must never shadow the installed package `datasets`: its modules are flat and found last.
_FOLDER = str(Path(__file__).resolve().parents[1] / "datasets")
if _FOLDER not in sys.path:
    sys.path.append(_FOLDER)

from dataset_general_texts import python_reference
from dataset_sources import EPSILON, SOURCES, read_source

log = logging.getLogger(__name__)

FILE_KINDS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
DATA_SUBSETS = ("python_reference", *SOURCES, "file")
# Data sets of the hub: model cards name them.
HUB_IDS = {name: source.hub_id for name, source in SOURCES.items()}
# Rows read of a data set, unless --max-rows-read says otherwise.
MAX_ROWS_READ = 40_000
# Names of settings on disk, where they differ.
SPEC_ON_DISK = {"max_rows_read": "max_samples"}
# The column that says what a row belongs to, where no other one is named.
GROUP_COLUMN = "group"
# What to do about a part with too few rows, and about texts of several parts that are too alike.
MORE_ROWS = "take another --split-seed, more texts, or finer groups (--group-column), and run all stages again"
NAME_SHARED = "name what the texts share in a column (--group-column), and run all stages again"
# What the log shows of the rows.
EXAMPLES, EXAMPLE_CHARACTERS = 3, 100


@dataclass(frozen=True)
class DataSpec:
    """Which rows are read and how they are divided: the settings in which all stages of a run have to agree.

    Attributes:
        subset, file: a name of DATA_SUBSETS, or a local file or folder.
        split_seed: of the split into parts.
        max_rows_read: at most so many rows are read, before they are divided.
        group_column: the column that names the group of a row; None: `group`, and where a row has none, what its text
            shares with others.
    """

    subset: str
    file: str | None = None
    split_seed: int = 0
    max_rows_read: int = MAX_ROWS_READ
    group_column: str | None = None

    def identity(self) -> dict[str, Any]:
        """The settings as manifests hold them, where the limit has the name of the first format."""
        found = asdict(self)
        return {SPEC_ON_DISK.get(name, name): value for name, value in found.items()}


@dataclass
class Division:
    """A data set whose rows are divided into the parts of `core.texts.split.SHARES`: no group, no text is in two parts.

    Attributes:
        where: the data set as messages name it.
        revision: commit of a data set of the hub, or of the one that a file was exported from, where it is known.
        parts: all rows of each part.
        prompts: what so many rows share that it joins none of them; None where a column names every group, so that
            what texts share decides nothing.
    """

    spec: DataSpec
    where: str
    revision: str | None
    parts: dict[str, list[Row]]
    prompts: set[str] | None

    def marks(self, rows: Sequence[Row]) -> set[str]:
        """By what a later stage knows rows that were read, and rows that belong with them: the digests of the texts,
        and the passages and questions that make groups here."""
        shared = set() if self.prompts is None else {value for row in rows for value in shared_values(row)}
        return {row.digest for row in rows} | shared - (self.prompts or set())

    def rows(self, part: str, limit: int) -> list[Row]:
        """At most `limit` rows of a part, of as many groups as possible, in a seeded order.

        Held-out rows that nearly equal a row of another part are left out.

        Raises:
            UserError: no row is left.
        """
        rows = self.parts[part]
        self.tell_share(part)
        if not rows:
            less = "; or give --validation-samples 0" if part == "validation" else ""
            raise UserError(f"{self._there}, none of them in the {part} part; {MORE_ROWS}{less}")
        if part == "held_out" and self._alike:
            alike = set(self._alike)
            rows = [row for row in rows if row not in alike]
            if not rows:
                raise UserError(
                    f"{self.where}: every held-out text is a near duplicate of another part's; {NAME_SHARED}"
                )
        kept = seeded_order(rows, part, self.spec.split_seed)[:limit]
        groups = len({row.group for row in kept})
        average = sum(len(row.plain) for row in kept) / max(1, len(kept))
        log.info(
            f"{self.where}: {len(kept)} of {len(rows)} {part} texts, of {groups} groups, {average:.0f} characters on "
            "average"
        )
        for row in kept[:EXAMPLES]:
            log.info("  e.g. %s", _shown(row))
        return kept

    def tell_share(self, part: str) -> None:
        """Groups get their part by chance. Warn of a part that came out small or empty, whether or not it is read."""
        share = len(self.parts[part]) / max(1, sum(map(len, self.parts.values())))
        if share < SHARES[part] / 2:
            got, wanted = 100 * share, 100 * SHARES[part]
            log.warning(f"{self._there}, {got:.0f} % of them in the {part} part instead of {wanted:.0f} %; {MORE_ROWS}")

    @property
    def _there(self) -> str:
        """How many texts and groups there are."""
        everything = [row for members in self.parts.values() for row in members]
        return f"{self.where} has {len(everything)} texts in {len({row.group for row in everything})} groups"

    @cached_property
    def _alike(self) -> list[Row]:
        """Held-out rows that are near duplicates of rows of other parts; told in the log."""
        held_out = self.parts["held_out"]
        others = [row for part, rows in self.parts.items() if part != "held_out" for row in rows]
        found = near_duplicates(held_out, others)
        if found:
            log.warning(
                f"{self.where}: {len(found)} of {len(held_out)} held-out texts are near duplicates (Jaccard similarity "
                f"of at least {SIMILARITY}) of texts of other parts and are left out; to keep more, {NAME_SHARED}; e.g."
            )
        for row in found[:EXAMPLES]:
            log.warning("  %s", _shown(row))
        return found

    @property
    def near_duplicates(self) -> dict[str, float]:
        """How many rows of the held-out part were left out, of how many, and what counts as nearly equal."""
        held_out = len(self.parts["held_out"])
        return {"left_out": len(self._alike), "held_out": held_out, "jaccard_at_least": SIMILARITY}

    def identity(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Where rows came from, and their count and digest, for a stage's manifest."""
        contents = {"rows": len(rows), "sha256": digest_of([row.messages for row in rows])}
        return {**self.spec.identity(), "revision": self.revision, **contents}


def divide(spec: DataSpec) -> Division:
    """Read a data set and divide it.

    Raises:
        UserError: unknown or missing subset, missing file, unknown columns, or an empty text.
    """
    read = _read_rows(spec)
    parts: dict[str, list[Row]] = {part: [] for part in SHARES}
    for _, row in read.rows:
        parts[part_of(row.group, spec.split_seed)].append(row)
    return Division(spec, read.where, read.revision, parts, read.prompts)


def load_rows(spec: DataSpec, part: str, limit: int) -> list[Row]:
    """`Division.rows` of one part alone."""
    return divide(spec).rows(part, limit)


def export_rows(spec: DataSpec, path: Path) -> int:
    """Write the rows of a data set of the hub to a .jsonl, with the groups they have here, so that the file is divided
    as the data set is, and beside it the revision, which stages that read the file record; how many.

    Raises UserError as `divide` does.
    """
    read = _read_rows(spec)
    lines = [{**record, GROUP_COLUMN: row.group} for record, row in read.rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    if read.revision is not None:
        write_text(_revision_file(path), read.revision + "\n")
    write_text(path, "".join(json.dumps(line, ensure_ascii=False, default=str) + "\n" for line in lines))
    return len(lines)


class Records(NamedTuple):
    """Records with their rows in groups, duplicates out, and what `Division` says of them."""

    rows: list[tuple[dict[str, Any], Row]]
    where: str
    revision: str | None
    prompts: set[str] | None


def _revision_file(path: Path) -> Path:
    """What `export_rows` writes beside a file: the revision of the data set of which it has the rows."""
    return path.with_name(path.name + ".revision")


def _read_rows(spec: DataSpec) -> Records:
    records, where, revision = _read(spec)
    column = spec.group_column or GROUP_COLUMN
    if spec.group_column and not any(spec.group_column in record for record in records):
        there = ", ".join(records[0]) if records else "no rows"
        raise UserError(f"{where} has no column {spec.group_column!r} (--group-column); it has {there}")
    found: dict[Row, dict[str, Any]] = {}
    empty = 0
    for number, record in enumerate(records, 1):
        row = row_of(record, f"{where}, row {number}", strict=spec.file is not None)
        empty += row is None
        if row is not None:
            # Of equal rows the one whose group has the smallest name stays, in whatever order they come.
            found[row] = min(found.get(row, record), record, key=lambda one: _rank(_given_group(one, column)))
    if len(found) + empty < len(records):
        log.info("%s: %d duplicate rows left out", where, len(records) - len(found) - empty)
    if empty:
        log.warning("%s: %d rows without a text, or with a role that is no one's, left out", where, empty)
    given = [_given_group(record, column) for record in found.values()]
    names, prompts = group_names(list(found), given)
    named = sum(name is not None for name in given)
    how = f", {named} of the rows named by the column {column}" if named else ""
    log.info("%s: %d groups of %d rows%s", where, len(set(names)), len(names), how)
    if named < len(names) and (named or spec.group_column):
        log.warning(
            f"{where}: {len(names) - named} of {len(names)} rows have no group in the column {column}, so all rows, "
            "those with a group too, are joined by what their texts share; fill in the column if it shall decide alone"
        )
    pairs = zip(found.items(), names, strict=True)
    rows = [(record, replace(row, group=name)) for (row, record), name in pairs]
    return Records(rows, where, revision, prompts)


def _rank(group: str | None) -> tuple[bool, str]:
    """Given groups in the order of their names, then none."""
    return group is None, group or ""


def _given_group(record: dict[str, Any], column: str) -> str | None:
    """The group that a record names; None where the cell is empty.

    One empty cell makes floats of a column of whole numbers in a CSV: 1.0 is the group 1.
    """
    value = record.get(column)
    if isinstance(value, float):
        value = None if math.isnan(value) else int(value) if value.is_integer() else value
    return None if value is None or not str(value).strip() else str(value)


def _shown(row: Row) -> str:
    """The beginning of a text, in one line."""
    return " ".join(row.plain.split())[:EXAMPLE_CHARACTERS]


def _read(spec: DataSpec) -> tuple[list[dict[str, Any]], str, str | None]:
    """Raw records, where they came from, and the revision of a data set of the hub."""
    subset = spec.subset
    if spec.file is not None:
        records = _read_local(Path(spec.file), spec.max_rows_read, spec.split_seed)
        beside = _revision_file(Path(spec.file))
        return records, spec.file, beside.read_text("utf-8").strip() if beside.is_file() else None
    if subset == "file":
        raise UserError("--data-subset file needs --data-file")
    if subset not in DATA_SUBSETS:
        raise UserError(f"data subset {subset!r}; expected one of {', '.join(DATA_SUBSETS)} (--data-subset)")
    from datasets.exceptions import DatasetsError

    try:
        if subset == "python_reference":
            return python_reference(), subset, None
        records, revision = read_source(subset, spec.max_rows_read, spec.split_seed)
        return records, subset, revision
    except ModuleNotFoundError as error:
        raise UserError(f"{subset}: this Python has no {error.name}; install your system's full Python") from None
    except (OSError, ValueError, DatasetsError) as error:
        name = f"{subset} ({HUB_IDS.get(subset, 'this Python')})"
        raise UserError(
            f"{name} cannot be read: {first_line(error)}; log in with `hf auth login` if it is gated, or give a local "
            "copy with --data-file"
        ) from None


def _read_local(path: Path, limit: int, seed: int) -> list[dict[str, Any]]:
    """Records of a file, a folder of files of one kind, or a folder that `save_to_disk` wrote."""
    import datasets

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


def epsilon_of(subset: str) -> float:
    """The paper's entropic regularisation of Q for a data set."""
    return SOURCES[subset].epsilon if subset in SOURCES else EPSILON
