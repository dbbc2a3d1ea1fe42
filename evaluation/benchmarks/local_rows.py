"""Benchmark files in the layout of their original release, as the rows that lm-evaluation-harness gets from the hub."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from core.errors import UserError
from evaluation.benchmarks.yue_mmlu import NAMES, read_questions

Row = dict[str, Any]
# Split (or another role: labels, english) -> its files.
Files = Mapping[str, Sequence[Path]]
LETTERS = "ABCD"


def json_lines(path: Path) -> list[Any]:
    """Objects of a .jsonl file; blank lines are none."""
    found = []
    # Not splitlines(): a text may hold U+2028, which JSON leaves as it is.
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise UserError(f"{path}, line {number} is not valid JSON ({error}); get the file again") from None
    return found


def json_value(path: Path) -> Any:
    """What a .json file holds."""
    try:
        return json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON ({error}); get the file again") from None


def table(path: Path, delimiter: str = ",") -> list[list[str]]:
    """Rows of a file without header: CSV with quotes, or TSV, where a quote is a character like any other."""
    lines = io.StringIO(_text(path), newline="")
    try:
        if delimiter == ",":
            return [row for row in csv.reader(lines) if row]
        return [row for row in csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_NONE) if row]
    except csv.Error as error:
        raise UserError(f"{path} is no table ({error}); get the file again") from None


def _text(path: Path) -> str:
    try:
        with open(path, encoding="utf-8", newline="") as handle:
            return handle.read()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error}); get the file again") from None


def convert(path: Path, rows: Iterable[Any], one: Callable[[Any], Row], layout: str) -> list[Row]:
    """`one` of every row. Raises UserError for a row that is not of this layout, and for a file without rows."""
    found = []
    for number, row in enumerate(rows, 1):
        try:
            found.append(one(row))
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            what = f"has no {error}" if isinstance(error, KeyError) else f"does not fit ({error})"
            raise UserError(f"{path}, row {number} {what}; expected {layout}") from None
    if not found:
        raise UserError(f"{path} has no rows; expected {layout}")
    return found


def choice(letter: str, letters: str = LETTERS) -> int:
    """Place of an answer's letter. Raises ValueError for another text."""
    if len(letter) != 1 or letter not in letters:
        raise ValueError(f"the answer is {letter!r}, not one of {', '.join(letters)}")
    return letters.index(letter)


def texts(row: Row, names: Iterable[str]) -> Row:
    """These columns of a row. Raises ValueError for one that is no text."""
    found = {name: row[name] for name in names}
    for name, value in found.items():
        if not isinstance(value, str):
            raise ValueError(f"{name} is {value!r}, no text")
    return found


def labels(path: Path, rows: Sequence[Any], allowed: str) -> list[str]:
    """One label a line, as many as there are rows."""
    found = _text(path).split()
    if len(found) != len(rows):
        raise UserError(f"{path} has {len(found)} labels for {len(rows)} rows; get both files of one release")
    if wrong := [label for label in found if label not in allowed.split()]:
        raise UserError(f"{path} has the label {wrong[0]!r}; expected one of {', '.join(allowed.split())}")
    return found


def by_split(files: Files, one: Callable[[Any], Row], layout: str) -> dict[str, list[Row]]:
    """Splits of which each is one .jsonl file."""
    return {split: convert(paths[0], json_lines(paths[0]), one, layout) for split, paths in files.items()}


def belebele(files: Files) -> dict[str, list[Row]]:
    names = ("flores_passage", "question", "mc_answer1", "mc_answer2", "mc_answer3", "mc_answer4")

    def one(row: Row) -> Row:
        choice(row["correct_answer_num"], "1234")
        return texts(row, (*names, "correct_answer_num"))

    return by_split(files, one, f'{", ".join(names)} and correct_answer_num ("1" to "4")')


def xcopa(files: Files) -> dict[str, list[Row]]:
    names = ("premise", "choice1", "choice2", "question")

    def one(row: Row) -> Row:
        if row["label"] not in (0, 1) or row["question"] not in ("cause", "effect"):
            raise ValueError(f"label {row['label']!r}, question {row['question']!r}")
        return {**texts(row, names), "label": row["label"]}

    return by_split(files, one, f"{', '.join(names)}, label, with label 0 or 1 and question cause or effect")


def xcopa_whole(files: Files) -> dict[str, list[Row]]:
    """Rows of `xcopa`; a premise that ends in no punctuation gets a full stop: the harness takes one character off."""

    def whole(premise: str) -> str:
        premise = premise.strip()
        return premise if premise.endswith((".", "?", "!")) else premise + "."

    return {split: [{**row, "premise": whole(row["premise"])} for row in rows] for split, rows in xcopa(files).items()}


def mmlu(files: Files) -> dict[str, list[Row]]:
    def one(row: list[str]) -> Row:
        question, *choices, letter = row
        if len(choices) != 4:
            raise ValueError(f"{len(row)} columns")
        return {"question": question, "choices": choices, "answer": choice(letter)}

    layout = "question, four options, answer letter, without header"
    splits = {split: convert(paths[0], table(paths[0]), one, layout) for split, paths in files.items()}
    subject = {split: paths[0].stem.removesuffix(f"_{split}") for split, paths in files.items()}
    return {split: [{**row, "subject": subject[split]} for row in rows] for split, rows in splits.items()}


def global_mmlu_english(files: Files) -> dict[str, list[Row]]:
    """MMLU's rows with the columns of Global-MMLU."""
    return {
        split: [_global_row(row["subject"], row["question"], row["choices"], row["answer"]) for row in rows]
        for split, rows in mmlu(files).items()
    }


def global_mmlu(files: Files) -> dict[str, list[Row]]:
    """SEA-HELM's copy, which moved the right option of every item, in the option order of MMLU (and of the hub)."""
    answers = [row["answer"] for row in mmlu({"test": files["english"]})["test"]]

    def one(row: Row) -> Row:
        prompt = row["prompts"][0]
        options = [prompt[f"option_{letter}"] for letter in "abcd"]
        subject, split, number = row["metadata"]["sample_id"].split("/")
        if split != "test" or not 0 <= int(number) < len(answers):
            raise ValueError(f"sample_id {row['metadata']['sample_id']!r} is not in {files['english'][0]}")
        right = options.pop(choice(row["label"]))
        options.insert(answers[int(number)], right)
        return _global_row(subject, prompt["question"], options, answers[int(number)])

    return by_split(
        {"test": files["test"]}, one, "label, metadata.sample_id, prompts[0] with question and option_a to option_d"
    )


def _global_row(subject: str, question: str, options: Sequence[str], answer: int) -> Row:
    named = {f"option_{letter}": option for letter, option in zip("abcd", options, strict=True)}
    return {"subject": subject, "question": question, **named, "answer": LETTERS[answer]}


def _choices(row: Row) -> dict[str, list[str]]:
    options = row["question"]["choices"]
    found = {key: [option[key] for option in options] for key in ("text", "label")}
    if row["answerKey"] not in found["label"]:
        raise ValueError(f"the answer {row['answerKey']!r} is not among {found['label']}")
    return found


def arc(files: Files) -> dict[str, list[Row]]:
    def one(row: Row) -> Row:
        return {
            "id": row["id"],
            "question": row["question"]["stem"],
            "choices": _choices(row),
            "answerKey": row["answerKey"],
        }

    return by_split(files, one, "id, question.stem, question.choices of text and label, answerKey")


def commonsense_qa(files: Files) -> dict[str, list[Row]]:
    def one(row: Row) -> Row:
        choices = _choices(row)
        if choices["label"] != list("ABCDE"):
            raise ValueError(f"options {choices['label']}")
        return {"id": row["id"], "question": row["question"]["stem"], "choices": choices, "answerKey": row["answerKey"]}

    return by_split(files, one, "id, question.stem, five question.choices of text and label A to E, answerKey")


def piqa(files: Files) -> dict[str, list[Row]]:
    path = files["validation"][0]
    names = ("goal", "sol1", "sol2")
    rows = convert(path, json_lines(path), lambda row: texts(row, names), ", ".join(names))
    answers = labels(files["labels"][0], rows, "0 1")
    return {"validation": [{**row, "label": int(label)} for row, label in zip(rows, answers, strict=True)]}


def winogrande(files: Files) -> dict[str, list[Row]]:
    path = files["validation"][0]
    names = ("sentence", "option1", "option2")

    def one(row: Row) -> Row:
        row["sentence"].index("_")
        return texts(row, names)

    rows = convert(path, json_lines(path), one, f"{', '.join(names)}, with _ for the gap")
    answers = labels(files["labels"][0], rows, "1 2")
    return {"validation": [{**row, "answer": label} for row, label in zip(rows, answers, strict=True)]}


def medqa(files: Files) -> dict[str, list[Row]]:
    def one(row: Row) -> Row:
        if sorted(row["options"]) != list(LETTERS):
            raise ValueError(f"options {', '.join(row['options'])}")
        endings = {f"ending{place}": row["options"][letter] for place, letter in enumerate(LETTERS)}
        return {
            "sent1": texts(row, ["question"])["question"],
            "sent2": "",
            **endings,
            "label": choice(row["answer_idx"]),
        }

    return by_split(files, one, "question, options A to D, answer_idx")


def mgsm(files: Files) -> dict[str, list[Row]]:
    """Items have a number and no worked answer; the eight exemplars have a worked answer, which ends in its number."""
    path, exemplars = files["test"][0], files["train"][0]

    def item(row: list[str]) -> Row:
        question, number = row
        return {"question": question, "answer": None, "answer_number": int(number.replace(",", ""))}

    def exemplar(row: Row) -> Row:
        return {"question": row["q"], "answer": row["a"], "answer_number": int(re.findall(r"-?\d+", row["a"])[-1])}

    language = path.stem.removeprefix("mgsm_")
    shots = json_value(exemplars)
    if not isinstance(shots, dict) or not isinstance(shots.get(language), dict):
        raise UserError(f"{exemplars} has no exemplars of {language!r}; expected language -> number -> q, a")
    return {
        "test": convert(path, table(path, "\t"), item, "question, tab, integer, without header"),
        "train": convert(exemplars, shots[language].values(), exemplar, "language -> number -> q, a"),
    }


def yue_mmlu(files: Files) -> dict[str, list[Row]]:
    """CMMLU's columns, and the subject."""
    return {
        "test": [
            {
                "Question": one.text,
                **dict(zip(LETTERS, one.options, strict=True)),
                "Answer": one.answer,
                "subject": path.stem,
                "topic": NAMES.get(path.stem, path.stem),
            }
            for path in files["test"]
            for one in read_questions(path).values()
        ]
    }


READERS: dict[str, Callable[[Files], dict[str, list[Row]]]] = {
    one.__name__: one
    for one in (
        arc,
        belebele,
        commonsense_qa,
        global_mmlu,
        global_mmlu_english,
        medqa,
        mgsm,
        mmlu,
        piqa,
        winogrande,
        xcopa,
        xcopa_whole,
        yue_mmlu,
    )
}
