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
from evaluation.benchmarks.prompts import CHAT, rendered

LETTERS = "ABCDE"
SHOTS = (0, 1, 2, 3)
REPOSITORY = "MALAY_REPO"
# An option that begins with its letter: "A. text", "A) text", "(A) text", "A: text".
LETTERED = re.compile(r"\s*\(?([A-E])\s*[.):]")


@dataclass(frozen=True)
class Question:
    """One row.

    Attributes:
        text: the column that is asked, as it stands in the file.
        subject: as the file spells it.
        options: 2 to 5 answers as they stand in the file, with their letters.
        key: place of the right one among them.
        category: as the file spells it.
    """

    text: str
    subject: str
    options: tuple[str, ...]
    key: int
    category: str


@dataclass(frozen=True)
class Form:
    """How the benchmark's own evaluation puts a question (docs/benchmarks.md has the table).

    Attributes:
        shots: examples in the prompt, 0 to 3.
        policy: `chat` or `plain`.
        llama: whether the model counts as one whose name contains "llama"; of no meaning to `plain`.
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
        """The whole text that the model reads. Raises UserError as `rendered`."""
        begin = "Jawapan:" if self.shots else "\nJawapan:"
        if self.policy != CHAT:
            return question.text if self.shots else question.text + begin
        message = question.text
        if not self.shots:
            head = f"Berikut adalah soalan aneka pilihan tentang {question.subject}. Sila berikan jawapan sahaja."
            message = f"{head}\n\n{question.text}" + ("" if self.llama else begin)
        return rendered(tokenizer, message) + (begin if self.llama else "")


def data_file(data_dir: Path | None, shots: int) -> Path:
    """`MalayMMLU_<shots>shot.json` in `data_dir`, or in the folder `data` of $MALAY_REPO where that is None.

    Raises UserError for a number of shots that the benchmark does not have, and where there is no such file.
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
            f"{what}; MalayMMLU needs a clone of its repository in {REPOSITORY}, or the folder of its files in "
            "--data_dir (without it, the malay task runs belebele_zsm_Latn and Global-MMLU ms in its place)"
        )
    return path


def read_questions(path: Path, column: str = "prompt", limit: int | None = None) -> list[Question]:
    """The first `limit` questions (None: all) of a file: a JSON array, or JSON lines.

    Args:
        column: what is asked, `Form.column`.
    Raises:
        UserError: a file that is neither, has no rows, or has a row that is not a question.
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
            # Not splitlines(): a text may hold U+2028, which JSON leaves as it is.
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
    """The answers of a row as they stand there: a list of strings, or a string with one option per line.

    In a string whose options have letters, a line without the next one continues the option before it. Raises UserError
    for anything else, or when there are not 2 to 5 options.
    """
    if isinstance(given, str):
        lines = [line for line in given.replace("\r\n", "\n").split("\n") if line.strip()]
        options = _joined(lines) or lines
    elif isinstance(given, list) and all(isinstance(option, str) for option in given):
        options = given
    else:
        raise UserError(f"{where}: options is {given!r}; expected a list of texts, or a text with an option per line")
    if not all(option.strip() for option in options):
        raise UserError(f"{where}: options is {given!r}, of which one is empty; correct the row")
    if not 2 <= len(options) <= len(LETTERS):
        raise UserError(f"{where} has {len(options)} options; expected 2 to {len(LETTERS)}")
    return tuple(options)


def _joined(lines: list[str]) -> list[str]:
    """Lines -> options, each from the line with the next letter on; none when the first line is not an "A."."""
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
