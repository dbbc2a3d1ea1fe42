"""Benchmark files in the layout of their original release, as the rows that lm-evaluation-harness gets from the hub.

Each reader takes the files of a task and returns its rows by split; `READERS` has them by the name that
local_tasks.yaml uses. The columns are those that the harness's task reads.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from core.errors import UserError
from core.files import read_json
from evaluation.benchmarks.row_files import LETTERS, Row, choice, convert, json_lines, labels, table, texts
from evaluation.benchmarks.yue_mmlu import NAMES, read_questions

# Split, or another role such as `labels` -> its files.
Files = Mapping[str, Sequence[Path]]
Splits = dict[str, list[Row]]


def by_split(files: Files, convert_row: Callable[[Row], Row], layout: str) -> Splits:
    """The rows of a task of which each split is one .jsonl file. Raises UserError as `convert` does."""
    return {split: convert(paths[0], json_lines(paths[0]), convert_row, layout) for split, paths in files.items()}


def belebele(files: Files) -> Splits:
    """Belebele: a passage, a question and four answers."""
    names = ("flores_passage", "question", "mc_answer1", "mc_answer2", "mc_answer3", "mc_answer4")

    def convert_row(row: Row) -> Row:
        choice(row["correct_answer_num"], "1234")
        return texts(row, (*names, "correct_answer_num"))

    return by_split(files, convert_row, f'{", ".join(names)} and correct_answer_num ("1" to "4")')


def xcopa(files: Files) -> Splits:
    """XCOPA: a premise, and which of two sentences is its cause or its effect."""
    names = ("premise", "choice1", "choice2", "question")

    def convert_row(row: Row) -> Row:
        if row["label"] not in (0, 1) or row["question"] not in ("cause", "effect"):
            raise ValueError(f"label {row['label']!r}, question {row['question']!r}")
        return {**texts(row, names), "label": row["label"]}

    return by_split(files, convert_row, f"{', '.join(names)}, label, with label 0 or 1 and question cause or effect")


def xcopa_whole(files: Files) -> Splits:
    """Rows of `xcopa` whose premises end in punctuation.

    The harness drops the last character of every premise, which is meant for its full stop; a premise without one gets
    one, so that it loses no letter.
    """

    def whole(premise: str) -> str:
        premise = premise.strip()
        return premise if premise.endswith((".", "?", "!")) else premise + "."

    return {split: [{**row, "premise": whole(row["premise"])} for row in rows] for split, rows in xcopa(files).items()}


def mmlu(files: Files) -> Splits:
    """MMLU: one CSV file per split of one subject."""

    def convert_row(row: list[str]) -> Row:
        question, *choices, letter = row
        if len(choices) != 4:
            raise ValueError(f"{len(row)} columns")
        return {"question": question, "choices": choices, "answer": choice(letter)}

    layout = "question, four options, answer letter, without header"
    splits = {split: convert(paths[0], table(paths[0]), convert_row, layout) for split, paths in files.items()}
    subject = {split: paths[0].stem.removesuffix(f"_{split}") for split, paths in files.items()}
    return {split: [{**row, "subject": subject[split]} for row in rows] for split, rows in splits.items()}


def global_mmlu_english(files: Files) -> Splits:
    """MMLU's rows with the columns of Global-MMLU."""
    return {
        split: [_global_row(row["subject"], row["question"], row["choices"], row["answer"]) for row in rows]
        for split, rows in mmlu(files).items()
    }


def global_mmlu(files: Files) -> Splits:
    """Global-MMLU from SEA-HELM's copy, which moved the right option of every item to another letter.

    The right option is put back where MMLU has it, and the hub's copy of Global-MMLU; the others keep their order.
    """
    answers = [row["answer"] for row in mmlu({"test": files["english"]})["test"]]

    def convert_row(row: Row) -> Row:
        prompt = row["prompts"][0]
        options = [prompt[f"option_{letter}"] for letter in "abcd"]
        subject, split, number = row["metadata"]["sample_id"].split("/")
        if split != "test" or not 0 <= int(number) < len(answers):
            raise ValueError(f"sample_id {row['metadata']['sample_id']!r} is not in {files['english'][0]}")
        right = options.pop(choice(row["label"]))
        options.insert(answers[int(number)], right)
        return _global_row(subject, prompt["question"], options, answers[int(number)])

    layout = "label, metadata.sample_id, prompts[0] with question and option_a to option_d"
    return by_split({"test": files["test"]}, convert_row, layout)


def _global_row(subject: str, question: str, options: Sequence[str], answer: int) -> Row:
    named = {f"option_{letter}": option for letter, option in zip("abcd", options, strict=True)}
    return {"subject": subject, "question": question, **named, "answer": LETTERS[answer]}


def _question_with_choices(row: Row) -> Row:
    """The columns that ARC and CommonsenseQA share. Raises ValueError when the answer is not among the options."""
    question = row["question"]
    choices = {key: [option[key] for option in question["choices"]] for key in ("text", "label")}
    if row["answerKey"] not in choices["label"]:
        raise ValueError(f"the answer {row['answerKey']!r} is not among {choices['label']}")
    return {"id": row["id"], "question": question["stem"], "choices": choices, "answerKey": row["answerKey"]}


def arc(files: Files) -> Splits:
    """ARC: questions with three to five options, lettered or numbered."""
    layout = "id, question.stem, question.choices of text and label, answerKey"
    return by_split(files, _question_with_choices, layout)


def commonsense_qa(files: Files) -> Splits:
    """CommonsenseQA: questions with the options A to E."""

    def convert_row(row: Row) -> Row:
        found = _question_with_choices(row)
        if found["choices"]["label"] != list("ABCDE"):
            raise ValueError(f"options {found['choices']['label']}")
        return found

    layout = "id, question.stem, five question.choices of text and label A to E, answerKey"
    return by_split(files, convert_row, layout)


def piqa(files: Files) -> Splits:
    """PIQA: a goal and two ways to reach it; the right one stands in a file of labels."""
    path = files["validation"][0]
    names = ("goal", "sol1", "sol2")
    rows = convert(path, json_lines(path), lambda row: texts(row, names), ", ".join(names))
    answers = labels(files["labels"][0], rows, ("0", "1"))
    return {"validation": [{**row, "label": int(label)} for row, label in zip(rows, answers, strict=True)]}


def winogrande(files: Files) -> Splits:
    """WinoGrande: a sentence with a gap and two words for it; the right one stands in a file of labels."""
    path = files["validation"][0]
    names = ("sentence", "option1", "option2")

    def convert_row(row: Row) -> Row:
        row["sentence"].index("_")  # a ValueError where there is no gap
        return texts(row, names)

    rows = convert(path, json_lines(path), convert_row, f"{', '.join(names)}, with _ for the gap")
    answers = labels(files["labels"][0], rows, ("1", "2"))
    return {"validation": [{**row, "answer": label} for row, label in zip(rows, answers, strict=True)]}


def medqa(files: Files) -> Splits:
    """MedQA with four options."""

    def convert_row(row: Row) -> Row:
        if sorted(row["options"]) != list(LETTERS):
            raise ValueError(f"options {', '.join(row['options'])}")
        endings = {f"ending{number}": row["options"][letter] for number, letter in enumerate(LETTERS)}
        question = texts(row, ["question"])["question"]
        return {"sent1": question, "sent2": "", **endings, "label": choice(row["answer_idx"])}

    return by_split(files, convert_row, "question, options A to D, answer_idx")


def mgsm(files: Files) -> Splits:
    """MGSM: questions whose answer is a number.

    Items have the number alone. The eight exemplars, which come from a file of all languages, have a worked answer that
    ends in its number.
    """
    path, exemplars = files["test"][0], files["train"][0]

    def item(row: list[str]) -> Row:
        question, number = row
        return {"question": question, "answer": None, "answer_number": int(number.replace(",", ""))}

    def exemplar(row: Row) -> Row:
        return {"question": row["q"], "answer": row["a"], "answer_number": int(re.findall(r"-?\d+", row["a"])[-1])}

    language = path.stem.removeprefix("mgsm_")
    by_language = read_json(exemplars)
    if not isinstance(by_language, dict) or not isinstance(by_language.get(language), dict):
        raise UserError(f"{exemplars} has no exemplars of {language!r}; expected language -> number -> q, a")
    return {
        "test": convert(path, table(path, "\t"), item, "question, tab, integer, without header"),
        "train": convert(exemplars, by_language[language].values(), exemplar, "language -> number -> q, a"),
    }


def yue_mmlu(files: Files) -> Splits:
    """Yue-MMLU with the columns of CMMLU, the subject, and the subject's name in the prompt."""
    return {
        "test": [
            {
                "Question": question.text,
                **dict(zip(LETTERS, question.options, strict=True)),
                "Answer": question.answer,
                "subject": path.stem,
                "topic": NAMES.get(path.stem, path.stem),
            }
            for path in files["test"]
            for question in read_questions(path).values()
        ]
    }


READERS: dict[str, Callable[[Files], Splits]] = {
    reader.__name__: reader
    for reader in (
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
