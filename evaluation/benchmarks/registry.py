"""Which benchmarks belong to a task, and which models of a run are scored on them."""

from __future__ import annotations

from pathlib import Path

from core.errors import UserError
from core.runs.command_line import EXPERIMENTS, load_experiment
from core.runs.settings import Experiment, results_root
from evaluation.arms.run import TRAINED, training_folders

TASK_FILE = "task.json"
# The benchmarks of general abilities in the paper's Figure 6.
GENERAL = ("arc_easy", "commonsense_qa", "piqa", "social_iqa", "winogrande")
_MALAY_SUBJECTS = (
    "anatomy",
    "business_ethics",
    "high_school_microeconomics",
    "medical_genetics",
    "professional_accounting",
    "professional_medicine",
)
# What is run in place of a benchmark whose files are absent: benchmarks in the same language. Tables name both.
STAND_INS = {"malay_mmlu": ("belebele_zsm_Latn", *(f"global_mmlu_full_ms_{name}" for name in _MALAY_SUBJECTS))}


def task_benchmarks(task: str) -> tuple[str, ...]:
    """The benchmarks of an experiment, or of `general`, which may be none. Raises UserError when the file of the
    experiment has no list of them."""
    if task == "general":
        return GENERAL
    found = {path.stem: path for path in sorted(EXPERIMENTS.glob("*.yaml")) if "benchmarks:" in path.read_text("utf-8")}
    if task not in found:
        names = [name for name, path in found.items() if load_experiment(path)["benchmarks"]]
        raise UserError(
            f"task {task!r}; expected general or an experiment with benchmarks: {', '.join(names)}; give it a list "
            f"`benchmarks:` in {EXPERIMENTS.name}/{task}.yaml, or leave eval out of STEPS"
        )
    return load_experiment(found[task])["benchmarks"]


def models_of_run(experiment: Experiment, task: str) -> dict[str, Path]:
    """The models of a run that are scored on the benchmarks of `task`, each with the folder of its scores.

    They are the unfused target, the fused model, and every training that is there. The target's scores may be shared
    with other runs, and are then in the folder of one of these.
    """
    run = experiment.run_dir
    base = results_root() / (experiment.shared.base_from or experiment.name)
    models = {
        experiment.models.target_model: base / "benchmarks" / task / "base",
        str(run / "fused"): run / "benchmarks" / task / "fused",
    }
    for arm in TRAINED:
        for training in training_folders(run, arm):
            models[str(training)] = run / "benchmarks" / task / arm / training.name
    return models
