"""The only door to datasets/: calibration, fine-tuning and held-out rows by name, and how they are rendered."""

from __future__ import annotations

import json
import logging
import random
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from core.runs import UserError, digest_of, first_line, write_text
from core.tokens import templated

# The folder datasets/ must never shadow the installed package `datasets`: its modules are flat and found last.
_FOLDER = str(Path(__file__).resolve().parents[1] / "datasets")
if _FOLDER not in sys.path:
    sys.path.append(_FOLDER)

from dataset_general_texts import python_reference
from dataset_sources import SOURCES, read_source

log = logging.getLogger(__name__)

# Shares of the groups (topics, or single rows) by part: fixed, so that no text changes part with the counts asked for.
SHARES = {"calibration": 0.5, "training": 0.3, "held_out": 0.2}
# The training part is divided again: choices (learning rate, alpha, when to stop) are made on rows of their own.
TRAINING_SHARES = {"sft": 5 / 6, "validation": 1 / 6}
FILE_KINDS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
DATA_SUBSETS = ("python_reference", *SOURCES, "file")
# Data sets of the hub: model cards name them.
HUB_IDS = {name: source.hub_id for name, source in SOURCES.items()}
# Rows read of a data set, unless --max-samples says otherwise.
MAX_SAMPLES = 40_000
# What the log shows of the rows.
EXAMPLES, EXAMPLE_CHARACTERS = 3, 100
# How conversations spell the roles of chat templates.
ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system",
         "tool": "tool"}  # fmt: skip
EXPECTED = ("messages (or conversations), instruction [+ input] + output, [system +] user + assistant, question + "
            "answer, or text")  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One text: its messages (role, content), or a single message without a role."""

    messages: tuple[tuple[str | None, str], ...]
    # What the row belongs to (a topic, a document): rows of one group are never in two parts of the split, and groups
    # are what statistics resample. Two rows with the same messages are the same row, whatever their groups.
    group: str = field(default="", compare=False)

    @property
    def has_roles(self) -> bool:
        """Whether a chat template applies."""
        return self.messages[0][0] is not None

    @property
    def plain(self) -> str:
        """The untemplated string that both models read with token pooling."""
        return "\n".join(content for _, content in self.messages)

    def render(self, tokenizer: Any) -> tuple[str, bool]:
        """(string for this model, whether the tokenizer should add its special tokens). Raises UserError as
        `templated`."""
        if not self.has_roles or not tokenizer.chat_template:
            return self.plain, True
        return templated(tokenizer, self.chat(), self.plain, tokenize=False), False

    def chat(self) -> list[dict[str, str]]:
        """Messages as chat templates take them."""
        return [{"role": role or "user", "content": content} for role, content in self.messages]


def load_rows(
    subset: str, part: str, limit: int, split_seed: int, data_file: str | None = None, max_samples: int = MAX_SAMPLES
) -> list[Row]:
    """At most `limit` rows of one part (`calibration`, `sft`, `validation`, `held_out`) of a data set, in a seeded
    order. `max_samples` rows of the data set are read before they are divided.

    The split is by group and fixed by `split_seed`: no text and no topic is in two parts.

    Raises:
        UserError: unknown or missing subset, missing file, unknown columns, empty text, or an empty part.
    """
    rows, where = _read(subset, data_file, max_samples, split_seed)
    groups: dict[str, list[Row]] = {}
    seen: set[Row] = set()
    empty = 0
    for number, record in enumerate(rows, 1):
        row = _row(record, f"{where}, row {number}", strict=data_file is not None)
        empty += row is None
        if row is not None and row not in seen:
            seen.add(row)
            group = str(number if record.get("group") is None else record["group"])
            groups.setdefault(group, []).append(replace(row, group=group))
    if len(seen) + empty < len(rows):
        log.info("%s: %d duplicate rows left out", where, len(rows) - len(seen) - empty)
    if empty:
        log.warning("%s: %d rows without a text, or with a role that is no one's, left out", where, empty)
    names = sorted(groups)
    random.Random(split_seed).shuffle(names)
    parts = _divide(names, groups, SHARES)
    parts |= _divide(parts["training"], groups, TRAINING_SHARES)
    chosen = sorted((row for name in parts[part] for row in groups[name]), key=lambda row: row.plain)
    random.Random(f"{split_seed}-{part}").shuffle(chosen)
    if not chosen:
        less = ", or --validation-samples 0" if part == "validation" else ""
        raise UserError(f"{where} has {len(seen)} texts, none of them in the {part} part; give more texts{less}")
    kept = chosen[:limit]
    log.info("%s: %d of %d %s texts, %.0f characters on average", where, len(kept), len(chosen), part,
             sum(len(row.plain) for row in kept) / max(1, len(kept)))  # fmt: skip
    for row in kept[:EXAMPLES]:
        log.info("  e.g. %s", " ".join(row.plain.split())[:EXAMPLE_CHARACTERS])
    return kept


def export_rows(subset: str, path: Path, max_samples: int, split_seed: int) -> int:
    """Write the rows of a data set of the hub to a .jsonl, from which `load_rows` divides as from the hub; how many.

    Raises UserError as `load_rows` does.
    """
    rows, where = _read(subset, None, max_samples, split_seed)
    kept = [{**record, "group": record.get("group", str(number))} for number, record in enumerate(rows, 1)
            if _row(record, f"{where}, row {number}", strict=False) is not None]  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in kept))
    return len(kept)


def _divide(names: list[str], groups: dict[str, list[Row]], shares: dict[str, float]) -> dict[str, list[str]]:
    """Names of groups by part, so that each part has about its share of the rows."""
    total = sum(len(groups[name]) for name in names)
    parts: dict[str, list[str]] = {part: [] for part in shares}
    filled = dict.fromkeys(shares, 0)
    for name in sorted(names, key=lambda n: -len(groups[n])):  # stable: large groups first fill the shares best
        emptiest = max(shares, key=lambda part: shares[part] * total - filled[part])
        parts[emptiest].append(name)
        filled[emptiest] += len(groups[name])
    return parts


def data_identity(
    rows: list[Row], subset: str, data_file: str | None, split_seed: int, max_samples: int = MAX_SAMPLES
) -> dict[str, Any]:
    """Where the rows came from, and count and digest of the rows themselves, for a stage's manifest."""
    contents = digest_of([row.messages for row in rows])
    return {"subset": subset, "file": data_file, "split_seed": split_seed, "max_samples": max_samples,
            "rows": len(rows), "sha256": contents}  # fmt: skip


def check_same_split(
    made_from: dict[str, Any], subset: str, data_file: str | None, split_seed: int, max_samples: int = MAX_SAMPLES
) -> None:
    """Refuse (UserError) another split of the data an earlier stage used: held-out texts would leak into training.

    Args:
        made_from: `data_identity` of the earlier stage.
    """
    if made_from["file"] is not None and data_file is not None:
        same = Path(made_from["file"]).resolve() == Path(data_file).resolve()
    else:
        same = (made_from["subset"], made_from["file"]) == (subset, data_file)
    for name, value in (("split_seed", split_seed), ("max_samples", max_samples)):
        if same and made_from[name] != value:
            raise UserError(f"{name} is {value}, but the plans were made with {made_from[name]}: held-out texts would "
                            f"be trained on; use the same {name}")  # fmt: skip


def _read(subset: str, data_file: str | None, limit: int, seed: int) -> tuple[list[dict[str, Any]], str]:
    """Raw records and where they came from."""
    if data_file is not None:
        return _read_local(Path(data_file), limit, seed), data_file
    if subset == "file":
        raise UserError("--data-subset file needs --data-file")
    if subset not in DATA_SUBSETS:
        raise UserError(f"data subset {subset!r}; expected one of {', '.join(DATA_SUBSETS)} (--data-subset)")
    from datasets.exceptions import DatasetsError

    try:
        return (python_reference() if subset == "python_reference" else read_source(subset, limit, seed)), subset
    except ModuleNotFoundError as error:
        raise UserError(f"{subset}: this Python has no {error.name}; install your system's full Python") from None
    except (OSError, ValueError, DatasetsError) as error:
        name = f"{subset} ({HUB_IDS.get(subset, 'this Python')})"
        raise UserError(f"{name} cannot be read: {first_line(error)}; log in with `hf auth login` if it is gated, or "
                        f"give a local copy with --data-file") from None  # fmt: skip


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
            data = datasets.load_dataset(FILE_KINDS[kinds.pop()], data_files=[str(file) for file in files],
                                         split="train")  # fmt: skip
    except (datasets.exceptions.DatasetGenerationError, ValueError, OSError) as error:
        raise UserError(f"data file {path} cannot be read: {first_line(error.__cause__ or error)}") from None
    return list(data if len(data) <= limit else data.shuffle(seed=seed).select(range(limit)))


def _row(record: dict[str, Any], where: str, strict: bool) -> Row | None:
    """The messages of a record; None for one without a text, or with an unknown role, where that is no error (not
    `strict`: a data set of the hub, which nobody here can mend)."""
    there = {column: value for column, value in record.items() if value is not None}  # files that mix columns
    messages = _messages(there) or _messages(record)
    if messages is None:
        raise UserError(f"{where} has the columns {', '.join(record)}; expected {EXPECTED}")
    roles = [role for role, _ in messages if role is not None and role not in ROLES]
    # Many data sets have an empty system prompt in every row.
    kept = [(ROLES.get(role or "", role), content) for role, content in messages
            if role != "system" or (isinstance(content, str) and content.strip())]  # fmt: skip
    empty = not kept or any(not isinstance(content, str) or not content.strip() for _, content in kept)
    if strict and roles:
        raise UserError(f"{where} has the role {roles[0]!r}; expected one of {', '.join(ROLES)}")
    if strict and empty:
        raise UserError(f"{where} has an empty text; remove it or fill it in")
    return None if roles or empty else Row(tuple(kept))


def _messages(record: dict[str, Any]) -> list[tuple[str | None, Any]] | None:
    """(role, content) of each message, by the first set of role columns that the record has; None: none of them."""
    system: list[tuple[str | None, Any]] = [("system", record.get("system"))]
    for column in ("messages", "conversations"):
        turns = record.get(column)
        if isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns):
            return [(str(turn.get("role") or turn.get("from")), turn.get("content") or turn.get("value"))
                    for turn in turns]  # fmt: skip
    if "instruction" in record and "output" in record:
        parts = (record["instruction"], record.get("input"))
        asked = "\n\n".join(part for part in parts if isinstance(part, str) and part.strip())
        return [*system, ("user", asked), ("assistant", record["output"])]
    for ask, answer in (("user", "assistant"), ("question", "answer")):
        if ask in record and answer in record:
            return [*system, ("user", record[ask]), ("assistant", record[answer])]
    return [(None, record["text"])] if "text" in record else None
