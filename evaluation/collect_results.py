"""Put the scores of all runs into one table per task, in the layout of the paper's Tables 1-6, beside its figures."""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import yaml

from core.errors import UserError
from core.files import MANIFEST, read_json, write_json, write_text
from core.fusion.strengths import Strength, mean_strength
from core.locks import hold, outputs_held
from core.runs.command_line import RESOLVED, RUN_FILE, Parser, load_experiment
from core.runs.process import end_of_stage, run_command, setup_logging
from core.runs.settings import results_root
from evaluation.arms.run import RESULTS, training_folders
from evaluation.benchmarks.registry import EXPERIMENTS
from evaluation.tables.arm_scores import arm_scores
from evaluation.tables.current import check_losses, check_scores, manifest_of
from evaluation.tables.layout import task_tables
from evaluation.tables.rows import ARMS, benchmark_rows

log = logging.getLogger("collect")
PAPER = Path(__file__).with_name("paper_results.json")
# What the heading of a run says of its settings.
SHOWN_SETTINGS = ("target_model", "source_model", "feature_map", "alpha", "top_k")


@outputs_held()
def main(argv: list[str]) -> None:
    setup_logging()
    parser = Parser(__doc__ or "")
    parser.add_argument(
        "--results-dir",
        type=Path,
        default=results_root(),
        help="holds the runs (default $TRANSPORT_RESULTS_ROOT, or runs)",
    )
    parser.add_argument("--tasks", nargs="+", help="print only these (default: every task that has a run)")
    parser.add_argument("--output-dir", type=Path, help="default RESULTS_DIR/tables")
    given = parser.parse(argv)
    results, wanted = given["results_dir"], given["tasks"]
    runs = find_runs(results)
    printed = [task for task in wanted or runs if task in runs]
    # A task that failed must not hide the tables of the others.
    if missing := [task for task in wanted or () if task not in runs]:
        log.warning("%s has no run of %s", results, ", ".join(missing))
    if not printed:
        raise UserError(f"{results} has no run of {', '.join(missing)}; run scripts/run_train_final.sh")
    folder = given["output_dir"] or results / "tables"
    hold(folder, wait=True)
    # All tasks are written, whichever are printed, so that all.md has no section of an earlier state.
    tables = {}
    for task, names in runs.items():
        collected = collect(task, {name: results / name for name in names})
        write_json(folder / f"{task}.json", collected)
        tables[task] = task_tables(collected)
        write_text(folder / f"{task}.md", tables[task])
    write_text(folder / "all.md", "\n".join(tables.values()))
    print("\n".join(tables[task] for task in printed))
    end_of_stage(f"{folder} is written", shlex.join(["python", "evaluation/report.py", str(results)]))


def find_runs(results: Path) -> dict[str, list[str]]:
    """Task -> the names of its run folders, such as `malay` and `malay-regression`.

    A run is named like its task, possibly with a dash and more after it. The name of a task may have dashes itself, so
    the longest task that fits is the run's. A folder without a fused model only holds scores of the base.

    Raises:
        UserError: there is no run of any task.
    """
    tasks = [file.stem for file in sorted(EXPERIMENTS.glob("*.yaml"))]
    runs: dict[str, list[str]] = {}
    for run in sorted(results.glob("*/")):
        task = max((task for task in tasks if f"{run.name}-".startswith(f"{task}-")), key=len, default=None)
        if (run / "fused" / MANIFEST).is_file() and task is not None:
            runs.setdefault(task, []).append(run.name)
    if not runs:
        raise UserError(f"{results} has no run of any task; run scripts/run_train_final.sh")
    return runs


def collect(task: str, runs: Mapping[str, Path]) -> dict[str, Any]:
    """All figures of one task.

    Args:
        runs: name -> folder of each run of the task.
    Returns:
        {"task", "paper": its entry in paper_results.json, "runs": {name: as `collect_run` returns it}}.
    """
    paper = read_json(PAPER)
    found = {name: collect_run(task, folder, paper) for name, folder in runs.items()}
    return {"task": task, "paper": paper.get(_paper_task(task), {}), "runs": found}


def collect_run(task: str, run: Path, paper: Mapping[str, Any]) -> dict[str, Any]:
    """All figures of one run of a task.

    Where something of the run cannot be used, the log and the entry say why, and everything else is collected: what has
    to be made or scored again must not hide the rest.

    Args:
        run: its folder.
        paper: contents of paper_results.json.
    Returns:
        {"sets": {task or `general`: as `benchmark_rows` returns it}, "models": as `settings_of` returns it, "held_out":
        {"texts", "arms"} of results.json, or {"absent": why}}.
    """
    found: dict[str, Any] = {"sets": {}}
    try:
        found["models"] = settings_of(run)
    except UserError as error:
        log.warning("%s: %s", run.name, error)
        return found | {"models": None, "held_out": {"absent": str(error)}}
    for kind in (task, "general"):
        try:
            arms = {arm: scores for arm in ARMS if (scores := arm_scores(run, base_run(run, task), kind, arm))}
            check_scores(run, arms)
            if set(arms) - {"base"}:
                found["sets"][kind] = benchmark_rows(arms, paper.get(_paper_task(kind), {}))
        except UserError as error:
            log.warning("%s, %s: %s", run.name, kind, error)
            found["sets"][kind] = {"rows": {}, "mean": {}, "normalised": {}, "absent": {"all": str(error)}}
    if (run / RESULTS).is_file():
        try:
            record = read_json(run / RESULTS)
            check_losses(run, record)
            found["held_out"] = {"texts": record["held_out"], "arms": record["arms"]}
        except UserError as error:
            log.warning("%s: %s", run.name, error)
            found["held_out"] = {"absent": str(error)}
    return found


def base_run(run: Path, task: str) -> Path:
    """The folder of the run that has the scores of the base: the one that the experiment file of `run` names. Without
    such a name it is `run` itself where it has some, and else the run of the task's own pair."""
    settings = load_experiment(run / RUN_FILE) if (run / RUN_FILE).is_file() else {}
    default = run.name if any(run.glob("benchmarks/*/base")) else task
    return run.with_name(settings.get("base_from") or default)


def _paper_task(task: str) -> str:
    """The key of a task in paper_results.json: `finance_paper` is the paper's own pair for the task finance."""
    return task.removesuffix("_paper")


def settings_of(run: Path) -> dict[str, Any]:
    """Models, feature map, alpha and k of a run, and `train_alpha`, the strengths in its trainings with a residual.

    Raises:
        UserError: a training is of an earlier format.
    """
    path = run / "fused" / RESOLVED
    used = yaml.safe_load(path.read_text("utf-8")) if path.is_file() else {}
    trainings = [manifest_of(folder) for folder in training_folders(run, "fused_adapted")]
    alphas: list[Strength] = []
    for training in trainings:
        alpha = training.get("chosen", {}).get("alpha")
        if alpha is not None and alpha not in alphas:
            alphas.append(alpha)
    return {**{name: used.get(name) for name in SHOWN_SETTINGS}, "train_alpha": sorted(alphas, key=mean_strength)}


if __name__ == "__main__":
    run_command(main)
