"""Score prediction files of Yue-MMLU as the benchmark does: accuracy per subject, category and overall.

    python evaluation/evaluate_cmmlu_yue.py --predictions_dir DIR --output_dir DIR

Reads DIR/MODEL/cmmlu-yue-SUBJECT-Nshot.json and writes
    cmmlu_yue_results.json  {model: {"0shot": {subject: {"accuracy": percent, "n_correct", "n_samples"}}}}
    cmmlu_yue_results.csv   the same, one line per model, number of examples and subject
    cmmlu_yue_summary.json  {model: {"0shot": {"categories": {category: ...}, "overall": ...}}}, where `micro` is the
                            accuracy over questions and `macro` the mean over subjects, both in percent
    cmmlu_yue_results.md    categories, overall and subjects as tables
    cmmlu_yue_errors.jsonl  every item without an answer or with a wrong one
"""

from __future__ import annotations

import csv
import io
import json
import logging
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tqdm.auto import tqdm

from core.errors import UserError
from core.files import MANIFEST, write_json, write_text
from core.locks import hold, outputs_held
from core.runs.command_line import Parser
from core.runs.process import run_command, setup_logging
from evaluation.benchmarks.yue_answers import FILE_NAME, Answer, read_answers
from evaluation.benchmarks.yue_mmlu import CATEGORIES, NAMES, UNCATEGORISED, category_of

log = logging.getLogger("yue_mmlu")
# (model, examples) -> subject -> items.
Answers = dict[tuple[str, int], dict[str, list[Answer]]]


@outputs_held()
def main(argv: list[str]) -> None:
    setup_logging()
    parser = Parser((__doc__ or "").splitlines()[0])
    parser.add_argument("--predictions-dir", type=Path, required=True, help="holds MODEL/cmmlu-yue-SUBJECT-Nshot.json")
    parser.add_argument("--output-dir", type=Path, required=True, help="results and tables go here")
    given = parser.parse(argv)
    output: Path = given["output_dir"]
    if output.is_file():
        raise UserError(f"output folder {output} is a file; give a folder")
    answers = read_all(given["predictions_dir"])
    results: dict[str, dict[str, Any]] = {}
    summary: dict[str, dict[str, Any]] = {}
    for (model, shots), subjects in answers.items():
        results.setdefault(model, {})[f"{shots}shot"] = {name: accuracy(items) for name, items in subjects.items()}
        summary.setdefault(model, {})[f"{shots}shot"] = summarised(subjects)
    hold(output)
    write_json(output / "cmmlu_yue_results.json", results)
    write_json(output / "cmmlu_yue_summary.json", summary)
    write_text(output / "cmmlu_yue_results.csv", as_csv(results))
    write_text(output / "cmmlu_yue_errors.jsonl", errors(answers))
    told = overview(summary)
    write_text(output / "cmmlu_yue_results.md", f"# Yue-MMLU, accuracy in %\n\n{told}\n\n{by_subject(results)}\n")
    print(told)


def read_all(folder: Path) -> Answers:
    """All predictions below a folder, by model, number of examples and subject.

    Raises:
        UserError: no prediction file, or a damaged one.
    """
    found: list[tuple[str, int, str, Path]] = []
    # `predictions` is where generate_cmmlu_predictions.py puts them in its output folder.
    for path in (*folder.glob("*/*.json"), *folder.glob("predictions/*/*.json")):
        if match := FILE_NAME.fullmatch(path.name):
            found.append((path.parent.name, int(match["shots"]), match["subject"], path))
        elif path.name != MANIFEST:
            log.warning("%s is not named cmmlu-yue-SUBJECT-Nshot.json: not scored", path)
    if not found:
        raise UserError(f"{folder} has no predictions; expected MODEL/cmmlu-yue-SUBJECT-Nshot.json in it")
    answers: Answers = {}
    for model, shots, subject, path in tqdm(sorted(found), desc="scoring", unit="file"):
        subjects = answers.setdefault((model, shots), {})
        if subject in subjects:
            raise UserError(
                f"{path.name} of {model} is there twice, in {folder} and in its folder predictions; give one of the two"
            )
        subjects[subject] = read_answers(path)
    for (model, shots), subjects in answers.items():
        if missing := NAMES.keys() - subjects.keys():
            log.warning("%s, %d-shot: no predictions for %s", model, shots, ", ".join(sorted(missing)))
    return answers


def accuracy(items: Sequence[Answer]) -> dict[str, float | int]:
    """{"accuracy": percent to the hundredth, "n_correct", "n_samples"}."""
    right = sum(item.right for item in items)
    return {"accuracy": round(100 * right / len(items), 2), "n_correct": right, "n_samples": len(items)}


def summarised(subjects: Mapping[str, Sequence[Answer]]) -> dict[str, Any]:
    """Categories and overall of one model: micro and macro accuracy in percent, and counts."""

    def over(names: Sequence[str]) -> dict[str, float | int]:
        items = [item for name in names for item in subjects[name]]
        figures = accuracy(items)
        shares = [100 * sum(item.right for item in subjects[name]) / len(subjects[name]) for name in names]
        return {
            "micro": figures["accuracy"],
            "macro": round(statistics.fmean(shares), 2),
            "n_correct": figures["n_correct"],
            "n_samples": figures["n_samples"],
            "n_subjects": len(names),
            "n_unanswered": sum(item.choice is None for item in items),
        }

    groups = {
        category: [name for name in subjects if category_of(name) == category]
        for category in (*CATEGORIES, UNCATEGORISED)
    }
    return {
        "categories": {category: over(names) for category, names in groups.items() if names},
        "overall": over(list(subjects)),
    }


def as_csv(results: Mapping[str, Mapping[str, Any]]) -> str:
    """One line per model, number of examples and subject."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(("model", "shots", "category", "subject", "accuracy", "n_correct", "n_samples"))
    for model, settings in results.items():
        for shots, subjects in settings.items():
            for subject, figures in subjects.items():
                writer.writerow(
                    (
                        model,
                        shots.removesuffix("shot"),
                        category_of(subject),
                        subject,
                        f"{figures['accuracy']:.2f}",
                        figures["n_correct"],
                        figures["n_samples"],
                    )
                )
    return out.getvalue()


def errors(answers: Answers) -> str:
    """One JSON line per item that is wrong or has no answer (`choice` null)."""
    lines = [
        {
            "model": model,
            "shots": shots,
            "subject": subject,
            "item": item.key,
            "gold": item.gold,
            "choice": item.choice,
            "rule": item.rule,
            "prediction": item.prediction,
            "prompt": item.prompt,
        }
        for (model, shots), subjects in answers.items()
        for subject, items in subjects.items()
        for item in items
        if not item.right
    ]
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table; the first row is its head, the first column its names."""
    rule = ["---", *["---:"] * (len(rows[0]) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (rows[0], rule, *rows[1:]))


def overview(summary: Mapping[str, Mapping[str, Any]]) -> str:
    """Categories and overall, a line per model and number of examples."""
    found = {(model, shots): parts for model, settings in summary.items() for shots, parts in settings.items()}
    columns = [name for name in (*CATEGORIES, UNCATEGORISED) if any(name in p["categories"] for p in found.values())]
    rows = [["model", "shots", *columns, "overall", "mean of subjects", "questions", "no answer"]]
    for (model, shots), parts in found.items():
        shown = [f"{parts['categories'][name]['micro']:.2f}" if name in parts["categories"] else "" for name in columns]
        overall = parts["overall"]
        rows.append(
            [
                model,
                shots.removesuffix("shot"),
                *shown,
                f"{overall['micro']:.2f}",
                f"{overall['macro']:.2f}",
                str(overall["n_samples"]),
                str(overall["n_unanswered"]),
            ]
        )
    return markdown(rows)


def by_subject(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Subjects, a column per model and number of examples."""
    columns = [(model, shots) for model, settings in results.items() for shots in settings]
    subjects = sorted({name for model, shots in columns for name in results[model][shots]})
    rows = [["subject", *(f"{model}, {shots.removesuffix('shot')}-shot" for model, shots in columns)]]
    for name in subjects:
        figures = [results[model][shots].get(name) for model, shots in columns]
        rows.append([name, *(f"{figure['accuracy']:.2f}" if figure else "" for figure in figures)])
    return markdown(rows)


if __name__ == "__main__":
    run_command(main)
