"""Reading the files of benchmarks: JSON, JSON lines, CSV and TSV as rows, and checks that name the file and the row."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from core.errors import UserError

Row = dict[str, Any]
LETTERS = "ABCD"


def json_lines(path: Path) -> list[Any]:
    """The objects of a .jsonl file; blank lines are skipped. Raises UserError for a line that is not JSON."""
    found = []
    # splitlines() would also split at U+2028, which JSON allows within a text.
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise UserError(f"{path}, line {number} is not valid JSON ({error}); get the file again") from None
    return found


def table(path: Path, delimiter: str = ",") -> list[list[str]]:
    """Rows of a file without a header: CSV with quotes, or TSV, where a quote is a character like any other.

    Raises:
        UserError: the file is no such table.
    """
    lines = io.StringIO(_text(path), newline="")
    try:
        if delimiter == ",":
            return [row for row in csv.reader(lines) if row]
        return [row for row in csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_NONE) if row]
    except csv.Error as error:
        raise UserError(f"{path} is no table ({error}); get the file again") from None


def _text(path: Path) -> str:
    try:
        with open(path, encoding="utf-8", newline="") as file:  # line ends stay as they are, for the csv module
            return file.read()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error}); get the file again") from None


def convert(path: Path, rows: Iterable[Any], convert_row: Callable[[Any], Row], layout: str) -> list[Row]:
    """`convert_row` of every row of a file.

    Args:
        layout: the columns that are expected, for the message.
    Raises:
        UserError: a row of another layout, or a file without rows.
    """
    found = []
    for number, row in enumerate(rows, 1):
        try:
            found.append(convert_row(row))
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            what = f"has no {error}" if isinstance(error, KeyError) else f"does not fit ({error})"
            raise UserError(f"{path}, row {number} {what}; expected {layout}") from None
    if not found:
        raise UserError(f"{path} has no rows; expected {layout}")
    return found


def choice(letter: str, letters: str = LETTERS) -> int:
    """The position of an answer's letter among the options. Raises ValueError for any other text."""
    if len(letter) != 1 or letter not in letters:
        raise ValueError(f"the answer is {letter!r}, not one of {', '.join(letters)}")
    return letters.index(letter)


def texts(row: Row, names: Iterable[str]) -> Row:
    """Some columns of a row. Raises ValueError for one that is not a text."""
    found = {name: row[name] for name in names}
    for name, value in found.items():
        if not isinstance(value, str):
            raise ValueError(f"{name} is {value!r}, no text")
    return found


def labels(path: Path, rows: Sequence[Any], allowed: Sequence[str]) -> list[str]:
    """The labels of a file with one label per line.

    Raises:
        UserError: not as many labels as rows, or one that is not among those allowed.
    """
    found = _text(path).split()
    if len(found) != len(rows):
        raise UserError(f"{path} has {len(found)} labels for {len(rows)} rows; get both files of one release")
    if wrong := [label for label in found if label not in allowed]:
        raise UserError(f"{path} has the label {wrong[0]!r}; expected one of {', '.join(allowed)}")
    return found
