"""Score a model on tasks of lm-evaluation-harness, on local data where there is any, otherwise on the hub's."""

from __future__ import annotations

import os
import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from core.errors import UserError
from core.files import read_json
from core.locks import hold, outputs_held
from core.runs.process import run_command, setup_logging
from evaluation.benchmarks.harness_scores import score_tasks
from evaluation.runner import Scoring, runner_flags


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
    parser.add_argument("--num-fewshot", type=int, help="solved items before each item (default: the task's number)")
    given = parser.parse(argv)
    tasks = [name.strip() for name in given["tasks"].split(",") if name.strip()]
    scoring = Scoring.from_flags(given)
    hold(scoring.output_dir)
    written = score_tasks(scoring, tasks, given["data_dir"], given["num_fewshot"])
    for name, found in written.items():
        print(f"{name}: {summary(found) if isinstance(found, Path) else f'not scored: {found}'}")
    if not any(isinstance(found, Path) for found in written.values()):
        raise UserError("no task was scored; see the reasons above")


def summary(path: Path) -> str:
    """A score file in one line: `acc 0.5120 +- 0.0224, acc_norm ... (500 items, plain prompt)`."""
    record = read_json(path)
    metrics = record["metrics"]
    values = ", ".join(f"{name} {found['value']:.4f} +- {found['stderr']:.4f}" for name, found in metrics.items())
    return f"{values} ({next(iter(metrics.values()))['n']} items, {record['details']['prompt_policy']})"


if __name__ == "__main__":
    run_command(main)
