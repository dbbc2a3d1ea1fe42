"""The benchmark scores of one run, as the tables have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from core.files import read_json
from core.runs.command_line import RUN_FILE, load_experiment
from evaluation.collect_results import PAPER, collect_run


def benchmark_sets(run: Path) -> dict[str, dict[str, Any]]:
    """Set (the run's task, or `general`) -> its figures, as `evaluation.tables.rows.benchmark_rows` returns them."""
    kinds = [folder.name for folder in sorted((run / "benchmarks").glob("*/"))]
    if not kinds:
        return {}
    own = [kind for kind in kinds if kind != "general"]
    task = task_of(run) or (own[0] if own else run.name)
    return collect_run(task, run, read_json(PAPER))["sets"]


def task_of(run: Path) -> str | None:
    """The experiment that a run of scripts/run_train_final.sh belongs to; None for any other run."""
    return load_experiment(run / RUN_FILE).get("task") if (run / RUN_FILE).is_file() else None
