"""Benchmarks: one model, or all models of a run, on those of a task or on the paper's general abilities."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from core.errors import UserError
from core.files import write_json
from core.locks import hold, outputs_held
from core.runs.process import run_command, setup_logging
from core.runs.settings import Experiment, results_root
from evaluation import generate_cmmlu_predictions, run_lm_eval, run_malay_mmlu
from evaluation.benchmarks.generation import Decoding
from evaluation.benchmarks.harness import local_tasks, members
from evaluation.benchmarks.local_rows import READERS
from evaluation.benchmarks.malay_mmlu import data_file, read_questions
from evaluation.benchmarks.prompts import Asking, asking_flags
from evaluation.benchmarks.registry import STAND_INS, TASK_FILE, models_of_run, task_benchmarks
from evaluation.benchmarks.yue_mmlu import question_folder
from evaluation.scores import Evaluated, data_folder, read_score, runner_flags

log = logging.getLogger("run_task")
ABSENT, DAMAGED = "absent", "damaged"


@outputs_held()
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
    asking_flags(parser, llama_name=True)
    given, experiment = parser.parse_with_config(argv)
    task, models = what_to_score(given, experiment)
    own = experiment.scoring.benchmarks if experiment and not given["task"] else ()
    benchmarks, data_dir = own or task_benchmarks(task), data_folder(given["benchmark_data"])
    for name in benchmarks:  # a name that nothing knows is told before hours of scoring
        if name not in FILES:
            members(name)
    if given["dry_run"]:
        dry_run(task, benchmarks, data_dir, models)
        return
    for model, folder in models.items():
        score_model({**given, "task": task, "model": model}, benchmarks, folder)


def what_to_score(given: dict[str, Any], experiment: Experiment | None) -> tuple[str, dict[str, Path]]:
    """The task, and model -> folder of its scores.

    Raises:
        UserError: neither a model nor the experiment of a run was given, or no task.
    """
    task = given["task"] or (experiment and (experiment.shared.task or experiment.name))
    if not task:
        raise UserError("--task is missing (or give --config FILE.yaml)")
    if given["model"]:
        name = given["model"].strip("/").replace("/", "-")
        return task, {given["model"]: given["output_dir"] or results_root() / "benchmarks" / task / name}
    if experiment is None:
        raise UserError("--model is missing (or give --config FILE.yaml, the experiment file of a run)")
    return task, models_of_run(experiment, task)


def dry_run(task: str, benchmarks: tuple[str, ...], data_dir: Path | None, models: dict[str, Path]) -> None:
    """Print what would be scored and where its items come from.

    Raises:
        UserError: files are damaged, or no benchmark can be scored.
    """
    found = places(benchmarks, data_dir)
    print("\n".join(f"{name}: {where}" for name, where in found.items()))
    print("\n".join(f"scores of {model} -> {folder}" for model, folder in models.items()))
    if damaged := [name for name, where in found.items() if where.startswith(DAMAGED)]:
        raise UserError(f"the files of {', '.join(damaged)} are damaged, see above")
    if all(where.startswith(ABSENT) for where in found.values()):
        raise UserError(f"no benchmark of {task} can be scored; the reasons are above")


def score_model(given: dict[str, Any], benchmarks: tuple[str, ...], folder: Path) -> None:
    """Score one model, write what was scored to `folder`, and print the table.

    Raises:
        UserError: no benchmark could be scored.
    """
    evaluated = Evaluated.from_flags(given)
    hold(folder)
    asking = Asking(given["prompt"], given["llama_name"])
    numbers = (given["limit"], given["tokens_per_batch"])
    found = run_benchmarks(evaluated, benchmarks, folder, data_folder(given["benchmark_data"]), *numbers, asking)
    folder.mkdir(parents=True, exist_ok=True)
    record = {"task": given["task"], "model": given["model"], "limit": given["limit"], "benchmarks": found}
    write_json(folder / TASK_FILE, record)
    print(table(folder, found))
    if not any("file" in result for result in found.values()):
        raise UserError(f"no benchmark of {given['task']} was scored; the reasons are above")


def places(benchmarks: tuple[str, ...], data_dir: Path | None) -> dict[str, str]:
    """Benchmark -> where its items come from, or why it is absent or damaged: files that are here are read."""
    told: dict[str, str] = {}
    pending = list(benchmarks)
    while pending:
        name = pending.pop(0)
        if name not in FILES and (parts := members(name)) != [name]:
            pending = [*parts, *pending]
            continue
        if name in FILES:
            try:
                folder = FILES[name](data_dir)
            except UserError as error:
                told[name] = f"{ABSENT}: {error}"
                pending = [*STAND_INS.get(name, ()), *pending]
                continue
        try:
            if name in FILES:
                READERS_OF[name](folder)
                told[name] = str(folder)
            elif files := run_lm_eval.local_files(name, data_dir):
                READERS[local_tasks()[name].rows](files)
                told[name] = ", ".join(str(path) for paths in files.values() for path in paths[:1])
            elif (local := local_tasks().get(name)) and local.include != name:
                told[name] = f"{ABSENT}: {run_lm_eval.absent(name, data_dir)}"
            else:
                told[name] = "the hub, or its cache"
        except UserError as error:
            told[name] = f"{DAMAGED}: {error}"
    return told


def malay_files(data_dir: Path | None) -> Path:
    """Folder of the MalayMMLU files. Raises UserError when they are not there."""
    return data_file(local_copy(data_dir, "malay_mmlu"), 0).parent


def yue_files(data_dir: Path | None) -> Path:
    """Folder of the Yue-MMLU files. Raises UserError when they are not there."""
    return question_folder(local_copy(data_dir, "yue_benchmark/Yue-MMLU"))


def local_copy(data_dir: Path | None, name: str) -> Path | None:
    """A folder below --data-dir; None, where there is none: the benchmark's own repository."""
    return data_dir / name if data_dir is not None and (data_dir / name).is_dir() else None


# Benchmarks with a runner of their own -> where their files are; all others are lm-evaluation-harness's.
FILES = {"malay_mmlu": malay_files, "yue_mmlu": yue_files}
READERS_OF: dict[str, Callable[[Path], Any]] = {
    "malay_mmlu": lambda folder: read_questions(data_file(folder, 0)),
    "yue_mmlu": lambda folder: generate_cmmlu_predictions.questions(folder, None, 0),
}


def run_benchmarks(
    evaluated: Evaluated,
    benchmarks: tuple[str, ...],
    folder: Path,
    data_dir: Path | None,
    limit: int | None,
    tokens_per_batch: int,
    asking: Asking,
) -> dict[str, dict[str, Any]]:
    """Benchmark -> {"file"} in `folder`, or {"absent": why}; a stand-in also has {"stands_in_for"}."""
    found: dict[str, dict[str, Any]] = {}
    harness: list[str] = []
    for name in benchmarks:
        if name not in FILES:
            harness.append(name)
            found[name] = {}
            continue
        try:
            files = FILES[name](data_dir)
        except UserError as error:  # the files are not there; what is wrong with files that are is not caught
            log.warning("%s: %s", name, error)
            found[name] = {"absent": str(error)}
            harness += STAND_INS.get(name, ())
            found |= {stand_in: {"stands_in_for": name} for stand_in in STAND_INS.get(name, ())}
            continue
        if name == "malay_mmlu":
            path = run_malay_mmlu.run(evaluated, files, folder, limit, 0, tokens_per_batch, asking)
        else:
            decoding = Decoding(tokens_per_batch=tokens_per_batch, prompt=asking.policy)
            path = generate_cmmlu_predictions.run(evaluated, files, folder, limit, decoding=decoding)
        found[name] = {"file": path.name}
    done = run_lm_eval.run(evaluated, harness, folder, data_dir, limit, tokens_per_batch) if harness else {}
    for name in harness:
        result = done[name]
        found[name] |= {"absent": result} if isinstance(result, str) else {"file": result.name}
    return found


def table(folder: Path, found: dict[str, dict[str, Any]]) -> str:
    """One line per benchmark and metric."""
    lines = [f"{'benchmark':45} {'metric':>12} {'value':>8} {'stderr':>7} {'n':>6}"]
    for name, result in found.items():
        if "absent" in result:
            lines.append(f"{name:45} absent: {result['absent']}")
            continue
        score = read_score(folder / result["file"])
        note = f"  (in place of {result['stands_in_for']})" if "stands_in_for" in result else ""
        for metric, value in score["metrics"].items():
            told = f"{score['details']['prompt_policy']}{note}" if metric == score["metric"] else "(not in tables)"
            figures = f"{100 * value['value']:8.2f} {100 * value['stderr']:7.2f} {value['n']:6}"
            lines.append(f"{name:45} {metric:>12} {figures}  {told}")
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
