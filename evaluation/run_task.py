"""Benchmarks: one model, or all models of a run, on those of a task or on the paper's general abilities."""

from __future__ import annotations

import logging
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from core.errors import UserError
from core.files import write_json
from core.locks import hold, outputs_held
from core.runs.process import end_of_stage, log_to_file, run_command, setup_logging, show
from core.runs.settings import Experiment, results_root
from evaluation.benchmarks.harness import members
from evaluation.benchmarks.harness_scores import score_tasks
from evaluation.benchmarks.local_rows import READERS
from evaluation.benchmarks.local_tasks import local_files, local_tasks, why_not_in_hub
from evaluation.benchmarks.own import OWN
from evaluation.benchmarks.prompts import PromptSettings, prompt_flags
from evaluation.benchmarks.registry import STAND_INS, TASK_FILE, models_of_run, task_benchmarks
from evaluation.runner import Scoring, data_folder, runner_flags
from evaluation.scores import read_score

log = logging.getLogger("run_task")
ABSENT, DAMAGED = "absent", "damaged"


def main(argv: list[str]) -> None:
    setup_logging()
    default = "runs/benchmarks/TASK/MODEL, MODEL the path with - for /; with --config in the folder of the run"
    parser = runner_flags(__doc__ or "", default, needs_model=False)
    parser.add_argument(
        "--config", type=Path, help="experiment file of a run; without --model, all models of the run are scored"
    )
    parser.add_argument(
        "--task", help="an experiment with benchmarks (malay, thai, ...), or general; default that of --config"
    )
    parser.add_argument(
        "--benchmark-data",
        "--data-dir",
        type=Path,
        default=os.environ.get("BENCHMARK_DATA"),
        help="local copies of the harness's data (default $BENCHMARK_DATA; what is not there comes from the hub)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="say where the items are, and read those that are here; opens no model, writes nothing",
    )
    prompt_flags(parser, llama_name=True)
    given, experiment = parser.parse_with_config(argv)
    task, models = what_to_score(given, experiment)
    own = experiment.scoring.benchmarks if experiment and not given["task"] else ()
    names, data_dir = own or task_benchmarks(task), data_folder(given["benchmark_data"])
    if not names:
        print(f"{task} has an empty list of benchmarks; nothing is scored")
        return
    for name in names:  # a name that nothing knows is refused before hours of scoring
        if name not in OWN:
            members(name)
    benchmarks = find_benchmarks(names, data_dir)
    if given["dry_run"]:
        print("\n".join(f"scores of {model} -> {folder}" for model, folder in models.items()))
        dry_run(task, benchmarks, data_dir)
        return
    log_to_file(None if experiment is None else experiment.run_dir / "log.txt")
    for model, folder in models.items():
        revision = experiment.models.target_revision if experiment and model == experiment.models.target_model else None
        one = {"task": task, "model": model, "revision": revision, "output_dir": folder}
        score_model({**given, **one}, benchmarks, data_dir)
    following = None if experiment is None else shlex.join(["python", "evaluation/collect_results.py", "--tasks", task])
    end_of_stage(f"{task} is scored, in {', '.join(map(str, models.values()))}", following)


def what_to_score(given: Mapping[str, Any], experiment: Experiment | None) -> tuple[str, dict[str, Path]]:
    """The task, and the models to score, each with the folder of its scores.

    Args:
        given: the flags.
        experiment: that of `--config`.
    Raises:
        UserError: the flags name no task, or no model.
    """
    task = given["task"] or (experiment and (experiment.shared.task or experiment.name))
    if not task:
        raise UserError("--task is missing (or give --config FILE.yaml)")
    if given["model"]:
        default = results_root() / "benchmarks" / task / given["model"].strip("/").replace("/", "-")
        return task, {given["model"]: given["output_dir"] or default}
    if experiment is None:
        raise UserError("--model is missing (or give --config FILE.yaml, the experiment file of a run)")
    if given["output_dir"]:
        raise UserError("--output-dir is the folder of one model; give --model as well, or leave it out")
    return task, models_of_run(experiment, task)


@outputs_held()
def score_model(given: Mapping[str, Any], benchmarks: Mapping[str, Benchmark], data_dir: Path | None) -> None:
    """Score one model, record what was scored in its folder, and print the table. The folder is locked until then.

    Raises:
        UserError: no benchmark could be scored.
    """
    scoring = Scoring.from_flags(given)
    hold(scoring.output_dir)
    prompts = PromptSettings(given["prompt"], given["llama_name"])
    results = score_benchmarks(scoring, benchmarks, data_dir, prompts)
    names = {name: given[name] for name in ("task", "model")}
    scoring.output_dir.mkdir(parents=True, exist_ok=True)
    write_json(scoring.output_dir / TASK_FILE, {**names, "limit": scoring.limit, "benchmarks": results})
    show(table(scoring.output_dir, results))
    if not any("file" in result for result in results.values()):
        raise UserError(f"no benchmark of {given['task']} was scored; the reasons are above")


@dataclass(frozen=True)
class Benchmark:
    """One benchmark of a task.

    Attributes:
        folder: of the files of one that has rules of its own; None for a task of lm-evaluation-harness.
        absent: why there are no such files; None where there are, and for the harness's tasks.
        stands_in_for: the absent benchmark in whose place it is scored.
    """

    folder: Path | None = None
    absent: str | None = None
    stands_in_for: str | None = None


def find_benchmarks(names: Sequence[str], data_dir: Path | None) -> dict[str, Benchmark]:
    """Name -> benchmark, in the order of the tables; what stands in for an absent benchmark comes right after it.

    Only missing files make a benchmark absent. Damaged files are an error when they are read.
    """
    found: dict[str, Benchmark] = {}
    for name in names:
        if name not in OWN:
            found[name] = Benchmark()
            continue
        try:
            found[name] = Benchmark(OWN[name].folder(data_dir))
        except UserError as error:
            found[name] = Benchmark(absent=str(error))
            found |= {stand_in: Benchmark(stands_in_for=name) for stand_in in STAND_INS.get(name, ())}
    return found


def dry_run(task: str, benchmarks: Mapping[str, Benchmark], data_dir: Path | None) -> None:
    """Print where the items of each benchmark come from, and read those that are here.

    Raises:
        UserError: files are damaged, or no benchmark can be scored.
    """
    sources: dict[str, str] = {}
    for name, benchmark in benchmarks.items():
        for part in [name] if name in OWN else members(name):
            try:
                sources[part] = source_of(part, benchmark, data_dir)
            except UserError as error:
                sources[part] = f"{DAMAGED}: {error}"
    print("\n".join(f"{name}: {source}" for name, source in sources.items()))
    if damaged := [name for name, source in sources.items() if source.startswith(DAMAGED)]:
        raise UserError(f"the files of {', '.join(damaged)} are damaged, see above")
    if all(source.startswith(ABSENT) for source in sources.values()):
        raise UserError(f"no benchmark of {task} can be scored; the reasons are above")


def source_of(name: str, benchmark: Benchmark, data_dir: Path | None) -> str:
    """Where the items of a benchmark come from, or why it is absent. Raises UserError for files that are damaged."""
    if benchmark.absent is not None:
        return f"{ABSENT}: {benchmark.absent}"
    if benchmark.folder is not None:
        OWN[name].read(benchmark.folder)
        return str(benchmark.folder)
    if files := local_files(name, data_dir):
        READERS[local_tasks()[name].rows](files)
        return ", ".join(str(path) for paths in files.values() for path in paths[:1])
    reason = why_not_in_hub(name, data_dir)
    return f"{ABSENT}: {reason}" if reason else "the hub, or its cache"


def score_benchmarks(
    scoring: Scoring, benchmarks: Mapping[str, Benchmark], data_dir: Path | None, prompts: PromptSettings
) -> dict[str, dict[str, Any]]:
    """Score a model on all benchmarks of a task.

    Returns:
        benchmark -> {"file": name in the output folder}, or {"absent": why}; a stand-in also has {"stands_in_for"}.
    """
    results: dict[str, dict[str, Any]] = {}
    for name, benchmark in benchmarks.items():
        results[name] = {"stands_in_for": benchmark.stands_in_for} if benchmark.stands_in_for else {}
        if benchmark.absent is not None:
            log.warning("%s: %s", name, benchmark.absent)
            results[name]["absent"] = benchmark.absent
        elif benchmark.folder is not None:
            results[name]["file"] = OWN[name].score(scoring, benchmark.folder, prompts).name
    harness = [name for name in benchmarks if name not in OWN]
    scored = score_tasks(scoring, harness, data_dir) if harness else {}
    for name, found in scored.items():
        results[name] |= {"absent": found} if isinstance(found, str) else {"file": found.name}
    return results


def table(folder: Path, results: Mapping[str, Mapping[str, Any]]) -> str:
    """One line per benchmark and metric.

    Args:
        folder: of the score files.
        results: of `score_benchmarks`.
    """
    lines = [f"{'benchmark':45} {'metric':>12} {'value':>8} {'stderr':>7} {'n':>6}"]
    for name, result in results.items():
        if "absent" in result:
            lines.append(f"{name:45} absent: {result['absent']}")
            continue
        score = read_score(folder / result["file"])
        stand_in = f"  (in place of {result['stands_in_for']})" if "stands_in_for" in result else ""
        for metric, value in score["metrics"].items():
            reported = f"{score['details']['prompt_policy']}{stand_in}"
            note = reported if metric == score["metric"] else "(not in tables)"
            figures = f"{100 * value['value']:8.2f} {100 * value['stderr']:7.2f} {value['n']:6}"
            lines.append(f"{name:45} {metric:>12} {figures}  {note}")
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
