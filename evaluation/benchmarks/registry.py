"""Which benchmarks belong to a task."""

from __future__ import annotations

from pathlib import Path

from core.errors import UserError
from core.runs.command_line import load_experiment

EXPERIMENTS = Path(__file__).resolve().parents[2] / "scripts" / "experiments"
TASK_FILE = "task.json"
# The paper's Figure 6.
GENERAL = ("arc_easy", "commonsense_qa", "piqa", "social_iqa", "winogrande")
_MALAY_SUBJECTS = (
    "anatomy",
    "business_ethics",
    "high_school_microeconomics",
    "medical_genetics",
    "professional_accounting",
    "professional_medicine",
)
# What runs where a benchmark's own files are not there: the same language, and the table says so.
STAND_INS = {"malay_mmlu": ("belebele_zsm_Latn", *(f"global_mmlu_full_ms_{name}" for name in _MALAY_SUBJECTS))}


def task_benchmarks(task: str) -> tuple[str, ...]:
    """The benchmarks of an experiment, or of `general`. Raises UserError when it has none."""
    if task == "general":
        return GENERAL
    path = EXPERIMENTS / f"{task}.yaml"
    names = sorted(file.stem for file in EXPERIMENTS.glob("*.yaml") if "benchmarks:" in file.read_text("utf-8"))
    if task not in names:
        raise UserError(f"task {task!r}; expected general or an experiment with benchmarks: {', '.join(names)}")
    return load_experiment(path)["benchmarks"]
