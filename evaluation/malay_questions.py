"""The files of MalayMMLU (https://github.com/UMxYTL-AI-Labs/MalayMMLU) as questions."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.runs import UserError

LETTERS = "ABCDE"
SHOTS = (0, 1, 2, 3)
REPOSITORY = "MALAY_REPO"
# An option that begins with its letter: "A. text", "A) text", "(A) text", "A: text".
LETTERED = re.compile(r"\s*\(?([A-E])\s*[.):]\s*(.*)", re.DOTALL)


@dataclass(frozen=True)
class Question:
    """One row.

    Attributes:
        prompt: what the model reads, options (and examples) included.
        options: 2 to 5 answers, without their letters; all of them differ from "".
        key: place of the right one among them.
        category: as the file spells it.
    """

    prompt: str
    options: tuple[str, ...]
    key: int
    category: str


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
        raise UserError(f"{what}; MalayMMLU needs a clone of its repository in {REPOSITORY}, or the folder of its "
                        f"files in --data_dir (without it, the malay task runs belebele_zsm_Latn and Global-MMLU ms "
                        f"in its place)")  # fmt: skip
    return path


def read_questions(path: Path, shots: int, limit: int | None = None) -> list[Question]:
    """The first `limit` questions (None: all) of a file: a JSON array, or JSON lines.

    The prompt is in the column `full_question_<shots>shot`; without examples, `prompt` serves where that is missing.
    Raises UserError for a file that is neither, has no rows, or has a row that is not a question.
    """
    rows = _rows(path)[:limit]
    if not rows:
        raise UserError(f"{path} has no rows; expected the questions of MalayMMLU")
    return [_question(row, shots, f"{path}, row {number}") for number, row in enumerate(rows, 1)]


def _rows(path: Path) -> list[Any]:
    try:
        text = path.read_text(encoding="utf-8")
        try:
            whole = json.loads(text)
        except json.JSONDecodeError:
            return [json.loads(line) for line in text.splitlines() if line.strip()]
    except ValueError as error:
        raise UserError(f"{path} is neither a JSON array nor JSON lines ({error}); download it again") from None
    return whole if isinstance(whole, list) else [whole]


def _question(row: Any, shots: int, where: str) -> Question:
    if not isinstance(row, Mapping):
        raise UserError(f"{where} is a {type(row).__name__}; expected an object with the columns of MalayMMLU")
    columns = [f"full_question_{shots}shot", *(["prompt"] if shots == 0 else [])]
    column = next((name for name in columns if name in row), columns[-1])
    missing = [name for name in (column, "category", "key", "options") if name not in row]
    if missing:
        raise UserError(f"{where} lacks {', '.join(missing)} (it has {', '.join(row)}); expected the columns of "
                        f"MalayMMLU_{shots}shot.json")  # fmt: skip
    prompt, key = row[column], str(row["key"]).strip().upper()
    if not isinstance(prompt, str) or not prompt.strip():
        raise UserError(f"{where}: {column} is {prompt!r}; expected the text of the question")
    options = read_options(row["options"], where)
    letters = LETTERS[: len(options)]
    if len(key) != 1 or key not in letters:
        raise UserError(f"{where}: key is {row['key']!r}, but its {len(options)} options are {letters[0]} to "
                        f"{letters[-1]}; correct the row")  # fmt: skip
    return Question(prompt, options, letters.index(key), str(row["category"]))


def read_options(given: Any, where: str) -> tuple[str, ...]:
    """The answers of a row: a list of strings, or a string with one option per line.

    Letters before the answers are removed where all options have theirs, in order (an answer may itself begin with
    "C. "). In a string whose options have letters, a line without one continues the option before it. An option that
    is nothing but its letter (the answer was a picture) keeps it. Raises UserError for anything else, or when there
    are not 2 to 5 options.
    """
    if isinstance(given, str):
        lines = [line for line in given.splitlines() if line.strip()]
        options = _joined(lines) or lines
    elif isinstance(given, list) and all(isinstance(option, str) for option in given):
        options = given
    else:
        raise UserError(f"{where}: options is {given!r}; expected a list of texts, or a text with an option per line")
    if not 2 <= len(options) <= len(LETTERS):
        raise UserError(f"{where} has {len(options)} options; expected 2 to {len(LETTERS)}")
    found = [LETTERED.fullmatch(option) for option in options]
    lettered = [match[2] for match, letter in zip(found, LETTERS, strict=False) if match and match[1] == letter]
    texts = [text.strip() for text in (lettered if len(lettered) == len(options) else options)]
    return tuple(text or letter for text, letter in zip(texts, LETTERS, strict=False))


def _joined(lines: list[str]) -> list[str]:
    """Lines -> options, each from the line with the next letter on; none when the first line is not an "A."."""
    options: list[str] = []
    for line in lines:
        match = LETTERED.fullmatch(line)
        if match and LETTERS.find(match[1]) == len(options):
            options.append(line)
        elif options:
            options[-1] += f"\n{line}"
        else:
            return []
    return options
