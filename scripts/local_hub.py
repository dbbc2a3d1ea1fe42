"""A stand-in for the hub: what lm-evaluation-harness loads from it comes from local files.

The files are read by the `datasets` library where that is possible, not by the readers of `evaluation.benchmarks`, so
that an error of those shows as a difference (`scripts/check_lm_eval_agreement.py`).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock


@contextlib.contextmanager
def hub_of(data_dir: Path, cache: str) -> Iterator[None]:
    """Inside, what the harness loads from the hub comes from local files.

    Args:
        data_dir: folder of benchmark files.
        cache: folder in which the `datasets` library may keep what it read.
    """

    def load_dataset(path: str, name: str | None = None, **_: Any) -> Any:
        return HUB[path](Local(data_dir, cache), name)

    with mock.patch("lm_eval.api.task.datasets.load_dataset", load_dataset):
        yield


class Local:
    """Local files, read by the `datasets` library."""

    def __init__(self, folder: Path, cache: str):
        self.folder, self.cache = folder, cache

    def json(self, path: str) -> Any:
        """The rows of a .jsonl file."""
        from datasets.load import load_dataset  # not the one that `hub_of` replaces

        return load_dataset("json", data_files=str(self.folder / path), cache_dir=self.cache, split="train")

    def csv(self, path: str, names: str, **options: Any) -> Any:
        """The rows of a file without a header, every column as text: the option `None` or `NA` of a question is no
        missing value."""
        from datasets import Features, Value
        from datasets.load import load_dataset

        columns = names.split()
        return load_dataset(
            "csv",
            data_files=str(self.folder / path),
            cache_dir=self.cache,
            split="train",
            header=None,
            names=columns,
            features=Features({name: Value("string") for name in columns}),
            keep_default_na=False,
            **options,
        )

    def lines(self, path: str) -> list[str]:
        """The lines of a file of labels."""
        return (self.folder / path).read_text(encoding="utf-8").split()

    def mmlu(self, subject: str, split: str) -> Any:
        """One split of a subject of MMLU."""
        return self.csv(f"mmlu/{split}/{subject}_{split}.csv", "question A B C D letter")


def belebele(files: Local, language: str) -> dict[str, Any]:
    return {"test": files.json(f"belebele/{language}.jsonl")}


def xcopa(files: Local, language: str) -> dict[str, Any]:
    return {
        split: files.json(f"xcopa/{language}/{short}.{language}.jsonl")
        for split, short in (("test", "test"), ("validation", "val"))
    }


def mmlu(files: Local, subject: str) -> dict[str, Any]:
    def one(row: dict[str, str]) -> dict[str, Any]:
        return {"choices": [row["A"], row["B"], row["C"], row["D"]], "answer": ord(row["letter"]) - ord("A")}

    return {split: files.mmlu(subject, split).map(one) for split in ("test", "dev")}


def global_mmlu(files: Local, language: str) -> dict[str, Any]:
    """All subjects in one split, as on the hub; languages other than English have no solved items here."""
    from datasets import Dataset, concatenate_datasets

    if language == "en":
        subjects = sorted(path.stem.removesuffix("_test") for path in (files.folder / "mmlu/test").glob("*.csv"))
        renamed = {"A": "option_a", "B": "option_b", "C": "option_c", "D": "option_d", "letter": "answer"}
        parts = {
            split: [
                files.mmlu(subject, split).rename_columns(renamed).map(lambda _, s=subject: {"subject": s})
                for subject in subjects
            ]
            for split in ("test", "dev")
        }
        return {split: concatenate_datasets(part) for split, part in parts.items()}
    rows = []
    for path in sorted((files.folder / "global_mmlu" / language).glob("*_test.jsonl")):
        copies = files.json(str(path.relative_to(files.folder)))
        subject = copies[0]["metadata"]["subject"]
        letters = files.mmlu(subject, "test")["letter"]
        for copied in copies:
            prompt, right = copied["prompts"][0], copied["label"].lower()
            true = letters[int(copied["metadata"]["sample_id"].rpartition("/")[2])]
            wrong = iter([prompt[f"option_{letter}"] for letter in "abcd" if letter != right])
            options = {
                f"option_{letter}": prompt[f"option_{right}"] if letter == true.lower() else next(wrong)
                for letter in "abcd"
            }
            rows.append({"question": prompt["question"], "subject": subject, "answer": true, **options})
    found = Dataset.from_list(rows)
    return {"test": found, "dev": found.filter(lambda _: False)}


def arc(files: Local, name: str) -> dict[str, Any]:
    def one(row: dict[str, Any]) -> dict[str, Any]:
        options = row["question"]["choices"]
        return {
            "question": row["question"]["stem"],
            "choices": {key: [option[key] for option in options] for key in ("text", "label")},
        }

    splits = {
        split: files.json(f"arc_easy/{name}-{file}.jsonl") for split, file in (("test", "Test"), ("validation", "Dev"))
    }
    found = {split: flat(rows, one) for split, rows in splits.items()}
    return {**found, "train": found["validation"]}


def commonsense_qa(files: Local, _: str | None) -> dict[str, Any]:
    def one(row: dict[str, Any]) -> dict[str, Any]:
        options = sorted(row["question"]["choices"], key=lambda option: option["label"])
        return {
            "question": row["question"]["stem"],
            "question_concept": row["question"]["question_concept"],
            "choices": {
                "label": [option["label"] for option in options],
                "text": [option["text"] for option in options],
            },
        }

    found = flat(files.json("commonsense_qa/dev_rand_split.jsonl"), one)
    return {"validation": found, "train": found}


def flat(rows: Any, one: Any) -> Any:
    """Rows in which the columns that `one` returns take the place of the question."""
    from datasets import Dataset

    return Dataset.from_list([{**row, **one(row)} for row in rows])


def piqa(files: Local, _: str | None) -> dict[str, Any]:
    labels = [int(label) for label in files.lines("piqa/valid-labels.lst")]
    found = files.json("piqa/valid.jsonl").add_column("label", labels)
    return {"validation": found, "train": found}


def winogrande(files: Local, _: str) -> dict[str, Any]:
    found = files.json("winogrande/dev.jsonl").map(lambda row: {"answer": str(row["answer"])})
    assert list(found["answer"]) == files.lines("winogrande/dev-labels.lst")
    return {"validation": found, "train": found}


def medqa(files: Local, _: str | None) -> dict[str, Any]:
    def one(row: dict[str, Any]) -> dict[str, Any]:
        endings = [row["options"][letter] for letter in "ABCD"]
        return {
            "sent1": row["question"],
            "sent2": "",
            "label": endings.index(row["answer"]),
            **{f"ending{number}": ending for number, ending in enumerate(endings)},
        }

    found = files.json("medqa/phrases_no_exclude_test.jsonl").map(one)
    return {"test": found, "validation": found, "train": found}


def mgsm(files: Local, language: str) -> dict[str, Any]:
    from datasets import Dataset

    rows = files.csv(f"mgsm/mgsm_{language}.tsv", "question number", delimiter="\t", quoting=3)
    items = [
        {"question": row["question"], "answer": None, "answer_number": int(row["number"].replace(",", ""))}
        for row in rows
    ]
    shots = json.loads((files.folder / "mgsm/exemplars_th_en.json").read_text(encoding="utf-8"))[language]
    train = [
        {
            "question": shots[str(n)]["q"],
            "answer": shots[str(n)]["a"],
            "answer_number": int(shots[str(n)]["a"].rstrip(".").split()[-1]),
        }
        for n in range(1, 9)
    ]
    return {"test": Dataset.from_list(items), "train": Dataset.from_list(train)}


# Id on the hub -> its splits from local files, given these and the data set's configuration.
HUB: dict[str, Any] = {
    "facebook/belebele": belebele,
    "cambridgeltl/xcopa": xcopa,
    "cais/mmlu": mmlu,
    "CohereForAI/Global-MMLU": global_mmlu,
    "allenai/ai2_arc": arc,
    "tau/commonsense_qa": commonsense_qa,
    "baber/piqa": piqa,
    "allenai/winogrande": winogrande,
    "GBaker/MedQA-USMLE-4-options-hf": medqa,
    "juletxara/mgsm": mgsm,
}
