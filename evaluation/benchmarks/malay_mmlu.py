"""MalayMMLU (https://github.com/UMxYTL-AI-Labs/MalayMMLU): its files, and the prompts that it makes of them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.errors import UserError
from core.files import MANIFEST, read_json
from evaluation.benchmarks.prompts import CHAT, PromptSettings, rendered
from evaluation.evaluated_model import EvaluatedModel

LETTERS = "ABCDE"
SHOTS = (0, 1, 2, 3)
REPOSITORY = "MALAY_REPO"
# An option that begins with its letter: "A. text", "A) text", "(A) text", "A: text".
LETTERED = re.compile(r"\s*\(?([A-E])\s*[.):]")


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        text: the column that is asked, as it stands in the file.
        subject: as the file spells it.
        options: 2 to 5 answers as they stand in the file, with their letters.
        key: position of the right answer among them.
        category: as the file spells it.
    """

    text: str
    subject: str
    options: tuple[str, ...]
    key: int
    category: str


@dataclass(frozen=True)
class Form:
    """How the benchmark's own evaluation puts a question; the table in docs/benchmarks.md shows every form.

    Attributes:
        shots: solved examples in the prompt, 0 to 3.
        policy: `chat` or `plain`.
        llama: whether the model counts as one whose name contains "llama", which matters to `chat` alone.
    """

    shots: int = 0
    policy: str = CHAT
    llama: bool = False

    @property
    def column(self) -> str:
        """The column of the file that is asked."""
        if not self.shots:
            return "prompt"
        return f"full_question_{self.shots}shot" + ("_llama" if self.llama and self.policy == CHAT else "")

    def prompt(self, tokenizer: Any, question: Question) -> str:
        """The whole text that the model reads. Raises UserError as `rendered` does."""
        begin = "Jawapan:" if self.shots else "\nJawapan:"
        if self.policy != CHAT:
            return question.text if self.shots else question.text + begin
        message = question.text
        if not self.shots:
            head = f"Berikut adalah soalan aneka pilihan tentang {question.subject}. Sila berikan jawapan sahaja."
            message = f"{head}\n\n{question.text}" + ("" if self.llama else begin)
        return rendered(tokenizer, message) + (begin if self.llama else "")


def is_llama(settings: PromptSettings, model: EvaluatedModel) -> tuple[bool, str]:
    """(whether the model counts as one whose name contains "llama" in any case, why)."""
    if settings.policy != CHAT:
        return False, "a plain prompt is the same for every name"
    if settings.llama_name != "auto":
        return settings.llama_name == "yes", f"--llama-name {settings.llama_name}"
    name = target_name(model.checkpoint.folder) or model.checkpoint.name
    return "llama" in name.lower(), f"by the name {name}"


def target_name(folder: Path) -> str | None:
    """The target of a fused or adapted checkpoint of ours, as it was given to stage 2; None for any other folder.

    A training records what it began with: if that was a fused checkpoint, its manifest names the target, or the
    training's own lineage does where the fused checkpoint is gone.
    """
    record = read_json(folder / MANIFEST) if (folder / MANIFEST).is_file() else {}
    inputs = record.get("inputs", {})
    if "target" in inputs:
        return inputs["target"]["id"]
    if "model" not in inputs:
        return None
    start = inputs["model"]["id"]
    if inputs.get("made_by") is None:  # the training began with a model that is not ours
        return start
    return target_name(Path(start)) or record.get("lineage", {}).get("models", {}).get("target", {}).get("name")


def data_file(data_dir: Path | None, shots: int) -> Path:
    """`MalayMMLU_<shots>shot.json` in `data_dir`, or in the folder `data` of $MALAY_REPO where that is None.

    Raises:
        UserError: the benchmark does not have this number of shots, or there is no such file.
    """
    if shots not in SHOTS:
        raise UserError(f"--shots is {shots}; MalayMMLU has 0, 1, 2 or 3")
    repository = os.environ.get(REPOSITORY)
    if data_dir is None and repository:
        data_dir = Path(repository).expanduser() / "data"
    path = (data_dir or Path()) / f"MalayMMLU_{shots}shot.json"
    if data_dir is None or not path.is_file():
        what = f"{REPOSITORY} is not set" if data_dir is None else f"{path} does not exist"
        raise UserError(
            f"{what}; MalayMMLU needs a clone of its repository in {REPOSITORY}, or its files in the folder malay_mmlu "
            "of BENCHMARK_DATA, or in --data-dir of evaluation/run_malay_mmlu.py (without them, the malay task runs "
            "belebele_zsm_Latn and Global-MMLU ms in its place)"
        )
    return path


def read_questions(path: Path, column: str = "prompt", limit: int | None = None) -> list[Question]:
    """The questions of a file, which is a JSON array or JSON lines.

    Args:
        column: the column that is asked (`Form.column`).
        limit: only the first so many; None for all.
    Raises:
        UserError: the file is neither, has no rows, or has a row that is not a question.
    """
    rows = _rows(path)[:limit]
    if not rows:
        raise UserError(f"{path} has no rows; expected the questions of MalayMMLU")
    return [_question(row, column, f"{path}, row {number}") for number, row in enumerate(rows, 1)]


def _rows(path: Path) -> list[Any]:
    try:
        text = path.read_text(encoding="utf-8")
        try:
            whole = json.loads(text)
        except json.JSONDecodeError:
            # splitlines() would also split at U+2028, which JSON allows within a text.
            return [json.loads(line) for line in text.split("\n") if line.strip()]
    except ValueError as error:
        raise UserError(f"{path} is neither a JSON array nor JSON lines ({error}); download it again") from None
    return whole if isinstance(whole, list) else [whole]


def _question(row: Any, column: str, where: str) -> Question:
    if not isinstance(row, Mapping):
        raise UserError(f"{where} is a {type(row).__name__}; expected an object with the columns of MalayMMLU")
    missing = [name for name in (column, "category", "key", "options", "subject") if name not in row]
    if missing:
        has = ", ".join(row)
        raise UserError(f"{where} lacks {', '.join(missing)} (it has {has}); expected the columns of MalayMMLU")
    for name in (column, "category", "subject"):
        if not isinstance(row[name], str) or not row[name].strip():
            raise UserError(f"{where}: {name} is {row[name]!r}; expected the text of the question's {name}")
    options, key = read_options(row["options"], where), str(row["key"]).strip().upper()
    letters = LETTERS[: len(options)]
    if len(key) != 1 or key not in letters:
        raise UserError(
            f"{where}: key is {row['key']!r}, but its {len(options)} options are {letters[0]} to {letters[-1]}; "
            "correct the row"
        )
    return Question(row[column], row["subject"], options, letters.index(key), row["category"])


def read_options(given: Any, where: str) -> tuple[str, ...]:
    """The answers of a row as they stand in the file: a list of texts, or one text with an option per line.

    Where the options of a text begin with letters, a line without the next letter continues the option before it.

    Args:
        where: file and row, for the message.
    Raises:
        UserError: neither a list nor a text, an empty option, or not 2 to 5 options.
    """
    if isinstance(given, str):
        lines = [line for line in given.replace("\r\n", "\n").split("\n") if line.strip()]
        options = _lettered_options(lines) or lines
    elif isinstance(given, list) and all(isinstance(option, str) for option in given):
        options = given
    else:
        raise UserError(f"{where}: options is {given!r}; expected a list of texts, or a text with an option per line")
    if not all(option.strip() for option in options):
        raise UserError(f"{where}: options is {given!r}, of which one is empty; correct the row")
    if not 2 <= len(options) <= len(LETTERS):
        raise UserError(f"{where} has {len(options)} options; expected 2 to {len(LETTERS)}")
    return tuple(options)


def _lettered_options(lines: list[str]) -> list[str]:
    """Lines -> options, each of which begins at the line with the next letter; empty when the first is no "A."."""
    options: list[str] = []
    for line in lines:
        match = LETTERED.match(line)
        if match and LETTERS.find(match[1]) == len(options):
            options.append(line)
        elif options:
            options[-1] += f"\n{line}"
        else:
            return []
    return options
