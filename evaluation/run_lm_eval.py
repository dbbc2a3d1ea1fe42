"""Score a model on tasks of lm-evaluation-harness: local data where it is there, else the hub's; one file per task."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tqdm.auto import tqdm

from core.errors import UserError
from core.files import digest_of, read_json
from core.locks import hold, outputs_held
from core.runs.process import run_command, setup_logging
from evaluation.benchmarks.harness import (
    description,
    harness_version,
    load_hub,
    load_local,
    local_tasks,
    members,
    plain,
    reported_metric,
)
from evaluation.benchmarks.harness_model import evaluate, item_scores, language_model, set_shots
from evaluation.benchmarks.prompts import PLAIN, POLICY_NAMES
from evaluation.scores import Evaluated, Score, data_folder, finished, finite, read_score, runner_flags, write_score

log = logging.getLogger("lm_eval_runner")


@outputs_held()
def main(argv: list[str]) -> None:
    setup_logging()
    parser = runner_flags(__doc__ or "")
    parser.add_argument("--tasks", required=True, help="names, with commas between: belebele_ind_Latn,xcopa_id")
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=os.environ.get("BENCHMARK_DATA"),
        help="benchmark files (default $BENCHMARK_DATA); a task that is not there comes from the hub",
    )
    parser.add_argument("--num-fewshot", type=int, help="solved items before each (default: the task's number)")
    given = parser.parse(argv)
    tasks = [name.strip() for name in given["tasks"].split(",") if name.strip()]
    evaluated = Evaluated.from_flags(given)
    hold(given["output_dir"])
    written = run(
        evaluated,
        tasks,
        given["output_dir"],
        given["data_dir"],
        given["limit"],
        given["tokens_per_batch"],
        given["num_fewshot"],
    )
    for name, found in written.items():
        print(f"{name}: {summary(found) if isinstance(found, Path) else f'not scored: {found}'}")
    if not any(isinstance(found, Path) for found in written.values()):
        raise UserError("no task was scored; see the reasons above")


def run(
    evaluated: Evaluated,
    tasks: Sequence[str],
    output_dir: Path,
    data_dir: Path | None = None,
    limit: int | None = None,
    tokens_per_batch: int = 4096,
    num_fewshot: int | None = None,
) -> dict[str, Path | str]:
    """Score each task and write `<output_dir>/<task>.json`; what is finished for the same inputs is not computed again.

    Args:
        tasks: tasks, groups or tags of lm-evaluation-harness, or names of benchmarks/local_tasks.yaml. A group's file
            has the items of all of its tasks, each of which also has its own.
        data_dir: folder of benchmark files; a task that it does not have is read from the hub, or its cache.
        limit: only the first N items of every task.
        tokens_per_batch: of one forward pass, padding included; no score depends on it.
        num_fewshot: solved items before each item; None for the task's own number.
    Returns:
        Task -> its file, or one line that says why there is none and what to do.
    Raises:
        UserError: unknown task, local files that are damaged or incomplete, values out of range. No model is loaded
            before all tasks are.
    """
    if num_fewshot is not None and num_fewshot < 0:
        raise UserError(f"--num-fewshot is {num_fewshot}; expected 0 or more")
    if not tasks:
        raise UserError("no tasks were given; give names with commas between, such as belebele_ind_Latn,xcopa_id")
    data_folder(data_dir)
    # The harness warns of each of its own defaults; what matters (cut prompts) is in the score's file.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    found: dict[str, Path | str] = {}
    loaded: dict[str, tuple[Any, str]] = {}
    asked = {name: members(name) for name in tasks}
    for name in dict.fromkeys(member for found_in in asked.values() for member in found_in):
        local, files = local_tasks().get(name), local_files(name, data_dir)
        if local and files:
            task, source = load_local(local, files), "local"
        elif local and local.include != name:
            task, source = absent(name, data_dir), "hub"
        else:
            task, source = load_hub(name), "hub"
        if not isinstance(task, str) and (problem := too_few_shots(task, num_fewshot)):
            task = problem
        if isinstance(task, str):
            log.warning("%s: %s", name, task)
            found[name] = task
        else:
            loaded[name] = task, source
    for name, (task, source) in tqdm(loaded.items(), desc="tasks", unit="task"):
        found[name] = score(evaluated, task, source, output_dir / f"{name}.json", limit, tokens_per_batch, num_fewshot)
    for name, parts in asked.items():
        if parts != [name]:
            found[name] = combined(name, {part: found[part] for part in parts}, output_dir / f"{name}.json")
    return {name: found[name] for name in asked}


def combined(name: str, parts: Mapping[str, Path | str], path: Path) -> Path | str:
    """Write the score of a group: all items of its tasks, by task; the path, or why there is none.

    The group's value is a mean over items, so a task counts by its size.
    """
    if lost := [f"{part}: {reason}" for part, reason in parts.items() if isinstance(reason, str)]:
        return f"{len(lost)} of its {len(parts)} tasks cannot be scored ({lost[0]})"
    scores = {part: read_score(file) for part, file in parts.items() if isinstance(file, Path)}
    reported = {part: score["metric"] for part, score in scores.items()}
    if len(set(reported.values())) > 1:
        told = ", ".join(f"{part} {metric}" for part, metric in reported.items())
        return f"its tasks are reported by different metrics ({told}); give its tasks by name"
    first = next(iter(scores.values()))
    shared = [metric for metric in first["metrics"] if all(metric in score["metrics"] for score in scores.values())]
    metrics = {metric: [value for score in scores.values() for value in score["items"][metric]] for metric in shared}
    ids = {part: score["items"]["ids"] for part, score in scores.items()}
    inputs = {
        "model": first["inputs"]["model"],
        "tasks": {part: {**score["inputs"], "model": None} for part, score in scores.items()},
    }
    details = {
        "prompt_policy": first["details"]["prompt_policy"],
        "metric_note": first["details"]["metric_note"],
        "tasks": {part: score["details"] for part, score in scores.items()},
        "note": f"mean over the items of {len(scores)} tasks",
    }
    score = Score(
        name,
        [f"{part}/{item}" for part, items in ids.items() for item in items],
        metrics,
        [part for part, items in ids.items() for _ in items],
        details,
        metric=first["metric"],
    )
    if not finished(path, inputs):
        write_score(path, score, inputs)
    return path


def local_files(name: str, data_dir: Path | None) -> dict[str, list[Path]] | None:
    """Role -> files of a task in the data folder; None where it has none of them. Raises UserError when some of them
    are missing."""
    local = local_tasks().get(name)
    return local.find(data_dir) if local and data_dir else None


def absent(name: str, data_dir: Path | None) -> str:
    """Why a task that only local files have cannot be scored."""
    pattern = next(iter(local_tasks()[name].files.values()))
    place = "no --data-dir was given" if data_dir is None else f"{data_dir} does not have it"
    return f"the harness has no such task and {place}; put {pattern} below --data-dir"


def too_few_shots(task: Any, num_fewshot: int | None) -> str | None:
    """Why a task cannot have this number of solved items; None when it can."""
    if not num_fewshot or task.config.num_fewshot == 0:
        return None
    there = len(list(task.fewshot_docs() or []))
    return (
        None
        if there >= num_fewshot
        else (f"there are {there} solved items for --num-fewshot {num_fewshot}; ask for no more than that")
    )


def score(
    evaluated: Evaluated,
    task: Any,
    source: str,
    path: Path,
    limit: int | None,
    tokens_per_batch: int,
    num_fewshot: int | None,
) -> Path | str:
    """Score one task and write its file; the path, or why its metrics are no scores of items."""
    name = task.config.task
    shots = set_shots(task, num_fewshot)
    docs = list(task.eval_docs)
    if not docs:
        return "it has no items"
    shown = list(task.fewshot_docs() or []) if shots else []
    version = harness_version()
    inputs = {
        "model": evaluated.identity,
        "task": {"name": name, "version": task.VERSION, "config": digest_of(description(task))},
        "data": digest_of(plain([docs, shown])),
        "limit": limit,
        "n_shot": shots,
        "lm_eval": version,
    }
    if finished(path, inputs):
        return path
    lm = language_model(evaluated.model, evaluated.tokenizer, tokens_per_batch)
    with finite(evaluated, name):
        places, metrics, others = item_scores(evaluate(lm, task, num_fewshot, limit))
    if not metrics:
        return f"its metrics ({', '.join(others) or 'none'}) are no means over items; use the harness's own command"
    metric, metric_note = reported_metric(name, list(metrics))
    known = local_tasks().get(name)
    groups = [str(docs[place][known.group]) for place in places] if known and known.group in docs[0] else []
    details = {
        "task": name,
        "version": task.VERSION,
        "data": source,
        "n_shot": shots,
        "harness": f"lm_eval {version}",
        "harness_task": known.include if known else name,
        "note": known.note if known and source == "local" else "",
        "other_metrics": others,
        "requests_cut_to_fit": lm.truncated,
        "metric_note": metric_note,
        "prompt_policy": POLICY_NAMES[PLAIN],
    }
    items = [str(place) for place in places]
    write_score(path, Score(name, items, metrics, groups, details, metric=metric), inputs)
    return path


def summary(path: Path) -> str:
    """`acc 0.5120 +- 0.0224, acc_norm ... (500 items, plain prompt)` of a score's file."""
    record = read_json(path)
    metrics = record["metrics"]
    told = ", ".join(f"{name} {found['value']:.4f} +- {found['stderr']:.4f}" for name, found in metrics.items())
    return f"{told} ({next(iter(metrics.values()))['n']} items, {record['details']['prompt_policy']})"


if __name__ == "__main__":
    run_command(main)
