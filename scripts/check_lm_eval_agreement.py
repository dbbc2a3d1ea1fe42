"""Our tasks on local data against the harness's own: the same prompts, the same answers, item by item.

The harness's task is built from its own definition alone. What it asks the hub for is answered from the same local
files, read here by other code (the `datasets` library) than that of our tasks, and its model runs one request at a
time.
"""

from __future__ import annotations

import contextlib
import logging
import random
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
from tqdm.auto import tqdm

from core.errors import UserError
from core.runs.command_line import Parser
from core.runs.process import run_command, setup_logging
from evaluation.benchmarks.harness import load_local, local_tasks, task_manager
from evaluation.benchmarks.harness_model import evaluate, language_model, set_shots
from evaluation.scores import Evaluated

log = logging.getLogger("agreement")
# Ours alone: the harness has no such task to agree with.
OURS = ("xcopa_id_whole", "xcopa_th_whole", "yue_mmlu_likelihood")


def main(argv: list[str]) -> None:
    setup_logging()
    parser = Parser(__doc__ or "")
    parser.add_argument("--model", required=True, help="folder, GGUF file, id in $MODELS_ROOT, or hub id")
    parser.add_argument("--data-dir", type=Path, required=True, help="folder of benchmark files")
    parser.add_argument("--tasks", help="names, with commas between (default: all that the data folder has)")
    parser.add_argument("--items", type=int, default=50, help="of every task, drawn at random (default 50)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default 0)")
    parser.add_argument("--num-fewshot", type=int, help="solved items before each (default: the task's number)")
    parser.add_argument("--max-gen-toks", type=int, default=16, help="of tasks that generate (default 16)")
    parser.add_argument("--requests-only", action="store_true", help="compare what is asked, without the model")
    parser.add_argument("--device", default="cpu", help="torch device (default cpu)")
    given = parser.parse(argv)
    known = [name for name in local_tasks() if not name.startswith(OURS)]
    names = given["tasks"].split(",") if given["tasks"] else known
    if unknown := sorted(set(names) - set(known)):
        raise UserError(f"{', '.join(unknown)} cannot be compared; known: {', '.join(known)}")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    evaluated = Evaluated.from_flags({**given, "trust_remote_code": False, "dtype": "float32"})
    lines, differing = [], 0
    with tempfile.TemporaryDirectory() as cache:
        for name in tqdm(names, desc="tasks", unit="task"):
            files = local_tasks()[name].find(given["data_dir"])
            if files is None:
                lines.append(f"{name}: no local data")
                continue
            ours = load_local(local_tasks()[name], files)
            with hub_of(given["data_dir"], cache):
                theirs = task_manager(local_tasks()[name].folder).load(name)["tasks"][name]
            found = compare(ours, theirs, evaluated, given)
            differing += sum(found[key] for key in ("requests", "answers", "scores"))
            lines.append(
                f"{name}: {found['items']} items of {found['of']}; differing requests {found['requests']}, "
                f"answers {found['answers']}, scores {found['scores']}"
                + (" (answers not computed)" if given["requests_only"] else "")
            )
            log.info(lines[-1])
    print("\n".join(lines))
    if differing:
        raise SystemExit(1)


def compare(ours: Any, theirs: Any, evaluated: Evaluated, given: Mapping[str, Any]) -> dict[str, int]:
    """How many of the drawn items differ in their requests, in the answer chosen, in a score."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    total = len(ours.eval_docs)
    if len(theirs.eval_docs) != total:
        raise UserError(f"{ours.config.task}: {total} items here, {len(theirs.eval_docs)} in the harness's own task")
    drawn = sorted(random.Random(given["seed"]).sample(range(total), min(given["items"], total)))
    for task in (ours, theirs):
        if task.config.generation_kwargs:
            task.set_config("generation_kwargs", {"max_gen_toks": given["max_gen_toks"]}, update=True)
    if given["requests_only"]:
        asked = [requests(task, drawn, given["num_fewshot"]) for task in (ours, theirs)]
        return {
            "items": len(drawn),
            "of": total,
            "answers": 0,
            "scores": 0,
            "requests": sum(a != b for a, b in zip(*asked, strict=True)),
        }
    lm = language_model(evaluated.model, evaluated.tokenizer, 4096)
    a = evaluate(lm, ours, given["num_fewshot"], samples=drawn)["samples"]
    name = theirs.config.task
    results = lm_eval.simple_evaluate(
        model=HFLM(pretrained=evaluated.model, tokenizer=evaluated.tokenizer, batch_size=1),
        tasks=[theirs],
        num_fewshot=given["num_fewshot"],
        task_manager=task_manager(local_tasks()[name].folder),
        samples={name: drawn},
    )
    assert results is not None
    b = results["samples"][name]
    counts = {"requests": set(), "answers": set(), "scores": set()}  # type: dict[str, set[int]]
    for left, right in zip(a, b, strict=True):
        assert (left["doc_id"], left["filter"]) == (right["doc_id"], right["filter"])
        differs = {
            "requests": left["arguments"] != right["arguments"],
            "answers": answer(left) != answer(right),
            "scores": any(left[metric] != right[metric] for metric in {*left["metrics"], *right["metrics"]}),
        }
        for key, different in differs.items():
            if different:
                counts[key].add(left["doc_id"])
    return {"items": len(drawn), "of": total, **{key: len(found) for key, found in counts.items()}}


def requests(task: Any, places: list[int], num_fewshot: int | None) -> list[Any]:
    """What the task asks the model and the answer it expects, per item."""
    set_shots(task, num_fewshot)
    task.build_all_requests(samples=places)
    asked: dict[int, list[Any]] = {}
    for instance in task.instances:
        # The place of the right one is the text where the options stand in the contexts (WinoGrande).
        first = [task.doc_to_text(instance.doc), task.doc_to_target(instance.doc)]
        asked.setdefault(instance.doc_id, first).append(instance.args)
    return list(asked.values())


def answer(sample: Mapping[str, Any]) -> Any:
    """The option with the highest likelihood, or the text that was generated."""
    first = sample["resps"][0][0]
    return first if isinstance(first, str) else int(np.argmax([response[0][0] for response in sample["resps"]]))


@contextlib.contextmanager
def hub_of(data_dir: Path, cache: str) -> Iterator[None]:
    """Inside, what the harness loads from the hub comes from local files."""

    def load_dataset(path: str, name: str | None = None, **_: Any) -> Any:
        return HUB[path](Local(data_dir, cache), name)

    with mock.patch("lm_eval.api.task.datasets.load_dataset", load_dataset):
        yield


class Local:
    """Local files through the readers of the `datasets` library."""

    def __init__(self, folder: Path, cache: str):
        self.folder, self.cache = folder, cache

    def json(self, path: str) -> Any:
        from datasets.load import load_dataset  # not the one that `hub_of` replaces

        return load_dataset("json", data_files=str(self.folder / path), cache_dir=self.cache, split="train")

    def csv(self, path: str, names: str, **options: Any) -> Any:
        """Every column as text; an option `None` or `NA` of a question is no missing value."""
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
        return (self.folder / path).read_text(encoding="utf-8").split()

    def mmlu(self, subject: str, split: str) -> Any:
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
    """All subjects in one split, as on the hub; the other languages have no solved items here."""
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
    """`one` of every row in place of its question."""
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
            **{f"ending{place}": ending for place, ending in enumerate(endings)},
        }

    found = files.json("medqa/phrases_no_exclude_test.jsonl").map(one)
    return {"test": found, "validation": found, "train": found}


def mgsm(files: Local, language: str) -> dict[str, Any]:
    import json

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


if __name__ == "__main__":
    run_command(main)
