"""The only door to datasets/: calibration, fine-tuning and held-out rows by name, and how they are rendered."""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.runs import UserError, digest_of

# The folder datasets/ must never shadow the installed package `datasets`: its modules are flat and found last.
_FOLDER = str(Path(__file__).resolve().parents[1] / "datasets")
if _FOLDER not in sys.path:
    sys.path.append(_FOLDER)

from dataset_general_texts import python_reference
from dataset_gsm8k import HUB_ID as GSM8K_HUB_ID
from dataset_gsm8k import gsm8k

log = logging.getLogger(__name__)

# Shares of the groups (topics, or single rows) by part: fixed, so that no text changes part with the counts asked for.
SHARES = {"calibration": 0.5, "training": 0.3, "held_out": 0.2}
# The training part is divided again: choices (learning rate, alpha, when to stop) are made on rows of their own.
TRAINING_SHARES = {"sft": 5 / 6, "validation": 1 / 6}
FILE_KINDS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
DATA_SUBSETS: dict[str, Callable[[], list[dict[str, Any]]] | None] = {
    "python_reference": python_reference,
    "gsm8k": gsm8k,
    "file": None,
}
# Subsets that are data sets of the hub; model cards name them.
HUB_IDS = {"gsm8k": GSM8K_HUB_ID}


@dataclass(frozen=True)
class Row:
    """One text: its messages (role, content), or a single message without a role."""

    messages: tuple[tuple[str | None, str], ...]

    @property
    def has_roles(self) -> bool:
        """Whether a chat template applies."""
        return self.messages[0][0] is not None

    @property
    def plain(self) -> str:
        """The untemplated string that both models read with token pooling."""
        return "\n".join(content for _, content in self.messages)

    def render(self, tokenizer: Any) -> tuple[str, bool]:
        """(string for this model, whether the tokenizer should add its special tokens)."""
        if not self.has_roles or not tokenizer.chat_template:
            return self.plain, True
        return tokenizer.apply_chat_template(self.chat(), tokenize=False), False

    def chat(self) -> list[dict[str, str]]:
        """Messages as chat templates take them."""
        return [{"role": role or "user", "content": content} for role, content in self.messages]


def load_rows(subset: str, part: str, limit: int, split_seed: int, data_file: str | None = None) -> list[Row]:
    """At most `limit` rows of one part (`calibration`, `sft`, `validation`, `held_out`) of a data set, in a seeded
    order.

    The split is by group and fixed by `split_seed`: no text and no topic is in two parts.

    Raises:
        UserError: unknown or missing subset, missing file, unknown columns, empty text, or an empty part.
    """
    rows, where = _read(subset, data_file)
    groups: dict[str, list[Row]] = {}
    seen: set[Row] = set()
    for number, record in enumerate(rows, 1):
        row = _row(record, f"{where}, row {number}")
        if row not in seen:
            seen.add(row)
            groups.setdefault(str(record.get("group", number)), []).append(row)
    if len(seen) < len(rows):
        log.info("%s: %d duplicate rows left out", where, len(rows) - len(seen))
    names = sorted(groups)
    random.Random(split_seed).shuffle(names)
    parts = _divide(names, groups, SHARES)
    parts |= _divide(parts["training"], groups, TRAINING_SHARES)
    chosen = sorted((row for name in parts[part] for row in groups[name]), key=lambda row: row.plain)
    random.Random(f"{split_seed}-{part}").shuffle(chosen)
    if not chosen:
        less = ", or --validation-samples 0" if part == "validation" else ""
        raise UserError(f"{where} has {len(seen)} texts, none of them in the {part} part; give more texts{less}")
    log.info("%s: %d of %d %s texts", where, min(limit, len(chosen)), len(chosen), part)
    return chosen[:limit]


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


def data_identity(rows: list[Row], subset: str, data_file: str | None, split_seed: int) -> dict[str, Any]:
    """Where the rows came from, and count and digest of the rows themselves, for a stage's manifest."""
    contents = digest_of([row.messages for row in rows])
    return {"subset": subset, "file": data_file, "split_seed": split_seed, "rows": len(rows), "sha256": contents}


def check_same_split(made_from: dict[str, Any], subset: str, data_file: str | None, split_seed: int) -> None:
    """Refuse (UserError) another split of the data an earlier stage used: held-out texts would leak into training.

    Args:
        made_from: `data_identity` of the earlier stage.
    """
    if made_from["file"] is not None and data_file is not None:
        same = Path(made_from["file"]).resolve() == Path(data_file).resolve()
    else:
        same = (made_from["subset"], made_from["file"]) == (subset, data_file)
    if same and made_from["split_seed"] != split_seed:
        raise UserError(
            f"split_seed is {split_seed}, but the plans were made with {made_from['split_seed']}: held-out texts "
            "would be trained on; use the same split_seed"
        )


def _read(subset: str, data_file: str | None) -> tuple[list[dict[str, Any]], str]:
    """Raw records and where they came from."""
    if data_file is not None:
        return _read_file(Path(data_file)), data_file
    if subset not in DATA_SUBSETS:
        raise UserError(f"data subset {subset!r}; expected one of {', '.join(DATA_SUBSETS)} (--data-subset)")
    loader = DATA_SUBSETS[subset]
    if loader is None:
        raise UserError("--data-subset file needs --data-file")
    try:
        return loader(), subset
    except ModuleNotFoundError as error:
        raise UserError(f"{subset}: this Python has no {error.name}; install your system's full Python") from None
    except (OSError, ValueError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{subset} cannot be read ({reason}); give a local copy with --data-file") from None


def _read_file(path: Path) -> list[dict[str, Any]]:
    import datasets

    if not path.is_file():
        raise UserError(f"data file {path} does not exist")
    if path.suffix not in FILE_KINDS:
        raise UserError(f"data file {path} has the suffix {path.suffix!r}; expected one of {', '.join(FILE_KINDS)}")
    try:
        return list(datasets.load_dataset(FILE_KINDS[path.suffix], data_files=str(path), split="train"))
    except (datasets.exceptions.DatasetGenerationError, ValueError, OSError) as error:
        cause = str(error.__cause__ or error).splitlines()[0]
        raise UserError(f"data file {path} cannot be read: {cause}") from None


def _row(record: dict[str, Any], where: str) -> Row:
    messages: tuple[tuple[str | None, str], ...]
    if "text" in record:
        messages = ((None, record["text"]),)
    elif "question" in record and "answer" in record:
        messages = (("user", record["question"]), ("assistant", record["answer"]))
    else:
        raise UserError(f"{where} has the columns {', '.join(record)}; expected text, or question and answer")
    if any(not isinstance(content, str) or not content.strip() for _, content in messages):
        raise UserError(f"{where} has an empty text; remove it or fill it in")
    return Row(messages)
