"""What to run after a stage, as a command line that can be copied."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from core.manifest import COMMANDS
from core.runs.command_line import Command, flag
from core.runs.settings import all_settings

# The commands of the stages, by the letters of a setting's `stages`.
SCRIPTS = {
    "1": COMMANDS["plans"],
    "2": COMMANDS["fused"],
    "3": COMMANDS["adapted"],
    "e": "evaluation/compare_arms.py",
}


def after_plans(command: Command, plans: Path) -> str:
    """Stage 2, with the plans of stage 1."""
    return _stage(command, "2", {"hot_dir": plans, "output_dir": plans.with_name("fused")})


def after_fusion(command: Command, fused: Path) -> str:
    """Stage 3, with the checkpoint of stage 2."""
    adapted = fused.with_name("adapted") / f"hot/seed{command.experiment.compute.seed}"
    return _stage(command, "3", {"model_dir": fused, "output_dir": adapted}, training_scenario="hot")


def after_training(command: Command, adapted: Path, model: Path) -> str | None:
    """After one training the one with or without the residual of the same seed, if the run lacks it; else stage 4.

    Args:
        adapted: the folder of stage 3.
        model: what it was trained from.
    Returns:
        None where the folder is not where the folders of a run are.
    """
    scenario, trainings = adapted.parent.name, adapted.parent.parent
    if (trainings.name, scenario) != ("adapted", command.experiment.training.training_scenario):
        return None
    for other in ("hot", "no_hot"):
        folder = trainings / other / adapted.name
        if not folder.is_dir():
            folders = {"model_dir": model, "output_dir": folder}
            return _stage(command, "3", folders, training_scenario=other)
    return _stage(command, "e", {"run_dir": trainings.parent})


def _stage(command: Command, stage: str, folders: dict[str, Path], **more: Any) -> str:
    """The command line of another stage, with the flags of this one that the other has too.

    Args:
        stage: its letter.
        folders: flag -> folder, which is left out where the experiment file alone says where things are.
        more: further settings.
    """
    known = {name: value for name, value in command.given.items() if stage in all_settings()[name].stages}
    if any(command.paths.values()) or not command.from_config:
        known |= folders
    return shlex.join(["python", SCRIPTS[stage], *command.file_flags, *_flags(known | more)])


def _flags(values: dict[str, Any]) -> list[str]:
    """Settings and folders as they are written on a command line."""
    words = []
    for name, value in values.items():
        if isinstance(value, bool):
            words.append(flag(name if value else f"no_{name}"))
        else:
            words += [flag(name), ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    return words
