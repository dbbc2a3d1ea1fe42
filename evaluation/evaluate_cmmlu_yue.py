"""Score prediction files of Yue-MMLU as the benchmark does: accuracy per subject, category and overall.

    python evaluation/evaluate_cmmlu_yue.py --predictions_dir DIR --output_dir DIR

Reads DIR/MODEL/cmmlu-yue-SUBJECT-Nshot.json and writes
    cmmlu_yue_results.json  {model: {"0shot": {subject: {"accuracy": per cent, "n_correct", "n_samples"}}}}
    cmmlu_yue_results.csv   the same, one line per model, number of examples and subject
    cmmlu_yue_summary.json  {model: {"0shot": {"categories": {category: ...}, "overall": ...}}}, where `micro` is the
                            accuracy over questions and `macro` the mean over subjects, both in per cent
    cmmlu_yue_results.md    categories, overall and subjects as tables
    cmmlu_yue_errors.jsonl  every item that has no answer or a wrong one
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


from core.errors import UserError
from core.files import MANIFEST, write_json, write_text
from core.locks import hold, outputs_held
from core.progress import Progress
from core.runs.command_line import Parser
from core.runs.process import run_command, setup_logging
from evaluation import markdown
from evaluation.benchmarks.yue_answers import FILE_NAME, Answer, read_answers
from evaluation.benchmarks.yue_mmlu import CATEGORIES, NAMES, UNCATEGORISED, category_of

log = logging.getLogger("yue_mmlu")
# (model, number of examples) -> subject -> its answers.
Answers = dict[tuple[str, int], dict[str, list[Answer]]]
# Model -> `0shot`, `5shot` and so on -> figures.
Figures = Mapping[str, Mapping[str, Mapping[str, Any]]]


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
    answers = read_predictions(given["predictions_dir"])
    results: dict[str, dict[str, Any]] = {}
    summaries: dict[str, dict[str, Any]] = {}
    for (model, shots), subjects in answers.items():
        results.setdefault(model, {})[f"{shots}shot"] = {name: accuracy(found) for name, found in subjects.items()}
        summaries.setdefault(model, {})[f"{shots}shot"] = summary(subjects)
    hold(output)
    write_json(output / "cmmlu_yue_results.json", results)
    write_json(output / "cmmlu_yue_summary.json", summaries)
    write_text(output / "cmmlu_yue_results.csv", as_csv(results))
    write_text(output / "cmmlu_yue_errors.jsonl", errors(answers))
    overview = by_category(summaries)
    write_text(output / "cmmlu_yue_results.md", f"# Yue-MMLU, accuracy in %\n\n{overview}\n\n{by_subject(results)}\n")
    print(overview)


def read_predictions(folder: Path) -> Answers:
    """All predictions below a folder, by model, number of examples and subject.

    Files may be in MODEL/ or in predictions/MODEL/, where generate_cmmlu_predictions.py puts them.

    Raises:
        UserError: no prediction file, a damaged one, or two of one model, number of examples and subject.
    """
    found: list[tuple[str, int, str, Path]] = []
    for path in (*folder.glob("*/*.json"), *folder.glob("predictions/*/*.json")):
        if match := FILE_NAME.fullmatch(path.name):
            found.append((path.parent.name, int(match["shots"]), match["subject"], path))
        elif path.name != MANIFEST:
            log.warning("%s is not named cmmlu-yue-SUBJECT-Nshot.json: not scored", path)
    if not found:
        raise UserError(f"{folder} has no predictions; expected MODEL/cmmlu-yue-SUBJECT-Nshot.json in it")
    answers: Answers = {}
    for model, shots, subject, path in Progress(sorted(found), desc="scoring", unit="files"):
        subjects = answers.setdefault((model, shots), {})
        if subject in subjects:
            raise UserError(
                f"{path.name} of {model} exists twice, in {folder} and in its folder predictions; keep one of the two"
            )
        subjects[subject] = read_answers(path)
    for (model, shots), subjects in answers.items():
        if missing := NAMES.keys() - subjects.keys():
            log.warning("%s, %d-shot: no predictions for %s", model, shots, ", ".join(sorted(missing)))
    return answers


def accuracy(answers: Sequence[Answer]) -> dict[str, float | int]:
    """{"accuracy": per cent, rounded to two digits, "n_correct", "n_samples"}."""
    right = sum(answer.right for answer in answers)
    return {"accuracy": round(100 * right / len(answers), 2), "n_correct": right, "n_samples": len(answers)}


def summary(subjects: Mapping[str, Sequence[Answer]]) -> dict[str, Any]:
    """{"categories": {category: figures}, "overall": figures} of one model.

    Figures are `micro` (accuracy over questions) and `macro` (mean over subjects), both in per cent, and counts.
    """

    def figures(names: Sequence[str]) -> dict[str, float | int]:
        answers = [answer for name in names for answer in subjects[name]]
        found = accuracy(answers)
        shares = [100 * sum(answer.right for answer in subjects[name]) / len(subjects[name]) for name in names]
        return {
            "micro": found["accuracy"],
            "macro": round(statistics.fmean(shares), 2),
            "n_correct": found["n_correct"],
            "n_samples": found["n_samples"],
            "n_subjects": len(names),
            "n_unanswered": sum(answer.choice is None for answer in answers),
        }

    members = {
        category: [name for name in subjects if category_of(name) == category]
        for category in (*CATEGORIES, UNCATEGORISED)
    }
    return {
        "categories": {category: figures(names) for category, names in members.items() if names},
        "overall": figures(list(subjects)),
    }


def as_csv(results: Figures) -> str:
    """One line per model, number of examples and subject."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(("model", "shots", "category", "subject", "accuracy", "n_correct", "n_samples"))
    for model, by_shots in results.items():
        for shots, subjects in by_shots.items():
            for subject, found in subjects.items():
                where = (model, shots.removesuffix("shot"), category_of(subject), subject)
                writer.writerow((*where, f"{found['accuracy']:.2f}", found["n_correct"], found["n_samples"]))
    return out.getvalue()


def errors(answers: Answers) -> str:
    """One JSON line per item whose answer is wrong or missing (`choice` is null)."""
    lines = [
        {
            "model": model,
            "shots": shots,
            "subject": subject,
            "item": answer.key,
            "gold": answer.gold,
            "choice": answer.choice,
            "rule": answer.rule,
            "prediction": answer.prediction,
            "prompt": answer.prompt,
        }
        for (model, shots), subjects in answers.items()
        for subject, found in subjects.items()
        for answer in found
        if not answer.right
    ]
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def by_category(summaries: Figures) -> str:
    """A table of categories and overall, with a line per model and number of examples."""
    lines = [(model, shots, found) for model, by_shots in summaries.items() for shots, found in by_shots.items()]
    columns = [name for name in (*CATEGORIES, UNCATEGORISED) if any(name in found["categories"] for *_, found in lines)]
    rows = [["model", "shots", *columns, "overall", "mean of subjects", "questions", "no answer"]]
    for model, shots, found in lines:
        categories, overall = found["categories"], found["overall"]
        cells = [f"{categories[name]['micro']:.2f}" if name in categories else "" for name in columns]
        cells += [f"{overall[mean]:.2f}" for mean in ("micro", "macro")]
        cells += [str(overall[count]) for count in ("n_samples", "n_unanswered")]
        rows.append([model, shots.removesuffix("shot"), *cells])
    return "\n".join(markdown.table(rows, numbers="---:"))


def by_subject(results: Figures) -> str:
    """A table of subjects, with a column per model and number of examples."""
    columns = [(model, shots) for model, by_shots in results.items() for shots in by_shots]
    subjects = sorted({name for model, shots in columns for name in results[model][shots]})
    rows = [["subject", *(f"{model}, {shots.removesuffix('shot')}-shot" for model, shots in columns)]]
    for name in subjects:
        found = [results[model][shots].get(name) for model, shots in columns]
        rows.append([name, *(f"{figures['accuracy']:.2f}" if figures else "" for figures in found)])
    return "\n".join(markdown.table(rows, numbers="---:"))


if __name__ == "__main__":
    run_command(main)
