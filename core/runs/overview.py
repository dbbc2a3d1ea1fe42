#!/usr/bin/env python
"""Say what scripts/run_pipeline.sh will do: its stages, about how long each takes, and where results go.

It takes the flags that all stages have, and refuses the others before anything is fetched or run.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from core.errors import UserError
from core.files import read_json
from core.fusion.controls import CONTROLS, FEW
from core.fusion.settings import AUTO, LEARNED
from core.manifest import COMMANDS, OF_THE_MACHINE
from core.models.locate import missing_step
from core.progress import Progress, duration
from core.runs.command_line import (
    REPOSITORY,
    RESOLVED,
    Command,
    load_experiment,
    make_absolute,
    parse_command,
    unfinished,
)
from core.runs.cost import stage1_cost
from core.runs.cost_timing import token_seconds
from core.runs.model_size import ModelSize, read_model_size
from core.runs.next_commands import SCRIPTS
from core.runs.process import run_command, setup_logging
from core.runs.settings import Experiment, all_settings
from core.training.strengths import TEXTS_PER_STEP

MODES = {
    "dry_run": "the stages will only check their inputs",
    "before_fetch": "models that are not here are fetched after this: leave the times to a later call, and say nothing "
    "where all are here",
}
# What run_pipeline.sh trains, in its order.
SCENARIOS = ("no_hot", "distill", "hot")
# Stage, as manifests name it -> its letter in the `stages` of a setting.
LETTERS = {stage: letter for stage, script in COMMANDS.items() for letter, own in SCRIPTS.items() if script == own}
# The settings that name what a stage reads. Fingerprints have the contents in their place, which take long to read.
INPUTS = (
    *("target_model", "source_model", "source_base", "data_subset", "data_file", "split_seed", "max_rows_read"),
    *("group_column", "calibration_samples", "sft_samples", "general_share", "general_subset", "general_file"),
)
# What the estimates leave out.
NOT_ESTIMATED = "  loading and saving models, fusing, making controls, drawing (some minutes for models below 1B)"
# A backward pass takes twice as long as the forward pass before it.
TRAINING_PASSES = 3
# How many controls there are for each value of `controls`; `usual` is all but `random_source`.
CONTROL_COUNTS = {"few": len(FEW), "usual": len(CONTROLS) - 1, "all": len(CONTROLS)}
# How many strengths a search usually tries for each kind of rows.
STRENGTHS_TRIED = 4


@dataclass(frozen=True)
class Step:
    """One thing that the script does.

    Attributes:
        what: it does.
        output: where the result goes.
        seconds: a function that estimates how long it takes; None where nothing estimates that.
        finished: whether an earlier run has finished it with the same settings.
        anew: why what an earlier run has made will be made again; empty where it is kept, or nothing is there.
        begun: whether an earlier run has done a part that is kept.
    """

    what: str
    output: Path
    seconds: Callable[[ModelSize, ModelSize], float] | None = None
    finished: bool = False
    anew: str = ""
    begun: bool = False

    def note(self, pair: tuple[ModelSize, ModelSize] | None) -> tuple[str, float]:
        """(what is said of it, the seconds that it takes); 0 seconds where they are not known."""
        if self.finished:
            return "finished already", 0.0
        if pair is None:
            return self.anew, 0.0
        known = 0.0 if self.seconds is None else self.seconds(*pair)
        time = f"about {duration(known)}" if known else "not estimated"
        if self.begun:
            time = f"begun already, and goes on; at most {time}"
        return f"{self.anew}, {time}" if self.anew else time, known


def main(argv: list[str]) -> None:
    """Check the flags with the parser of every stage, and print the steps."""
    setup_logging()
    seeds = os.environ.get("SEEDS", "").split()
    if wrong := [seed for seed in seeds if not seed.isdecimal()]:
        raise UserError(f"SEEDS has {wrong[0]!r}; expected whole numbers, as in SEEDS='0 1 2'")
    commands = [parse(argv, stage) for stage in SCRIPTS]
    command = commands[0]
    said_later = "before_fetch" in command.modes and not models_not_here(command.experiment)
    if not (Progress.quiet or said_later):
        print(overview(command, [int(seed) for seed in seeds]))


def models_not_here(experiment: Experiment) -> list[str]:
    """The models of the pair that have to be fetched or converted first."""
    models = experiment.models
    pair = {models.target_model: models.target_revision, models.source_model: models.source_revision}
    return [name for name, revision in pair.items() if missing_step(name, revision) is not None]


def parse(argv: Sequence[str], stage: str) -> Command:
    """The command line as a stage reads it. Raises UserError for a flag or a value that the stage does not take."""
    try:
        return parse_command(argv, stage, __doc__ or "", {}, modes=MODES)
    except UserError as error:
        reason = str(error).partition(" (see ")[0]
        raise UserError(f"{reason} (of {SCRIPTS[stage]}; the script takes the flags that all stages have)") from None


def overview(command: Command, seeds: Sequence[int]) -> str:
    """What is done, how long it takes and where the results go."""
    experiment = command.experiment
    models, todo = experiment.models, steps(experiment, seeds or [experiment.compute.seed])
    lines = [f"{experiment.name}: {models.target_model} is improved with {models.source_model}"]
    if "dry_run" in command.modes:
        lines.append("A dry run: the stages check their inputs, no model is fetched, and none of this is made")
    pair = None
    if "before_fetch" in command.modes:
        lines.append(f"First, {' and '.join(models_not_here(experiment))} will be fetched")
        lines.append("The demo pair takes 3 GB; how long the rest takes is said after that")
    else:
        try:
            pair = (
                read_model_size(models.target_model, models.target_revision, experiment.compute),
                read_model_size(models.source_model, models.source_revision, experiment.compute),
            )
        except UserError as error:
            lines.append(f"How long it takes cannot be said: {error}")
    total, width = 0.0, max(len(step.what) for step in todo)
    for step in todo:
        note, seconds = step.note(pair)
        total += seconds
        lines.append(f"  {step.what:{width}} -> {step.output}{note and ': '}{note}")
    if any(step.finished for step in todo):
        lines.append("What is finished is kept, unless the models or the texts that it is made from have changed")
    if total:
        lines += [f"In all about {duration(total)} on this machine. Not estimated, and on top of that:", NOT_ESTIMATED]
    return "\n".join([*lines, f"Log: {experiment.run_dir / 'log.txt'}"])


def steps(experiment: Experiment, seeds: Sequence[int]) -> list[Step]:
    """All steps, in order."""
    folder, page = experiment.folder("plans"), experiment.run_dir / "report.html"
    what = "read the texts with both models and match them"
    plans = made_by_stage("plans", Step(what, folder, planning(experiment)), experiment)
    what, folder = "fuse the transported weights into the target", experiment.folder("fused")
    fused = made_by_stage("fused", Step(what, folder, searching(experiment)), experiment, plans)
    trainings = []
    for seed in seeds:
        for name in SCENARIOS:
            folder = experiment.folder(f"adapted/{name}/seed{seed}")
            step = Step(f"train {name}", folder, training(experiment, name))
            one = experiment.changed(training_scenario=name, seed=seed)
            trainings.append(made_by_stage("adapted", step, one, fused))
    losses = measuring(experiment, [plans, fused, *trainings])
    return [plans, fused, *trainings, losses, Step("draw the figures", page)]


def made_by_stage(stage: str, step: Step, experiment: Experiment, before: Step | None = None) -> Step:
    """A step with what an earlier run has left of it.

    Args:
        stage: as manifests name it.
        step: without that.
        before: the step that makes what this one is made from.
    """
    if unfinished(step.output, stage) is not None:
        return step
    if before is not None and before.anew:
        return replace(step, anew=f"made anew, as {before.output.name} is")
    if names := other_settings(step.output, LETTERS[stage], experiment):
        return replace(step, anew=f"made anew for another {', '.join(names)}")
    return replace(step, finished=True)


def other_settings(folder: Path, stage: str, experiment: Experiment) -> list[str]:
    """The settings with which a finished folder was made and that are others now; none where they cannot be read.

    Args:
        stage: its letter.
    """
    try:
        before = Experiment.of(**load_experiment(folder / RESOLVED))
    except UserError:
        return []
    made_with, wanted = (settings_of_output(one, stage) for one in (before, experiment))
    chosen = {("rows", "auto")}  # stage 2 writes down which rows the plans have, in place of auto
    return [name for name, value in wanted.items() if value != made_with[name] and (name, value) not in chosen]


def settings_of_output(experiment: Experiment, stage: str) -> dict[str, Any]:
    """The settings that decide what a stage writes, and those that name its inputs."""
    named = {name: all_settings()[name] for name in INPUTS}
    inputs = {name: experiment.value(setting) for name, setting in named.items() if stage in setting.stages}
    make_absolute(inputs, REPOSITORY)
    deciding = experiment.changed(epsilon=experiment.epsilon).deciding(stage)
    return {name: value for name, value in (deciding | inputs).items() if name not in OF_THE_MACHINE}


def measuring(experiment: Experiment, before: Sequence[Step]) -> Step:
    """The step that measures losses, which has its figures only when all arms are measured."""
    path, trainings = experiment.run_dir / "results.json", len(before) - 2
    step = Step("measure all losses on held-out texts", path, comparison(experiment, trainings))
    record = read_json(path) if path.is_file() else {}
    if not record:
        return step
    if before[1].anew or record.get("inputs", {}).get("settings") != experiment.deciding("e"):
        return replace(step, anew="measured anew")
    finished = "arms" in record and all(one.finished for one in before)
    return replace(step, finished=finished, begun=not finished)


def planning(experiment: Experiment) -> Callable[[ModelSize, ModelSize], float]:
    """The time of stage 1, as `--plan-only` estimates it."""
    return lambda target, source: stage1_cost(target, source, experiment).seconds or 0.0


def training(experiment: Experiment, scenario: str) -> Callable[[ModelSize, ModelSize], float]:
    """The time of one training: as if all rows were cut, and without loading and saving."""

    def seconds(target: ModelSize, source: ModelSize) -> float:
        settings = experiment.training
        rows = TRAINING_PASSES * (settings.sft_samples * settings.epochs) + 2 * settings.validation_samples
        of_source = settings.sft_samples * whole_token(source, experiment) if scenario == "distill" else 0.0
        return settings.block_size * (rows * whole_token(target, experiment) + of_source)

    return seconds


def searching(experiment: Experiment) -> Callable[[ModelSize, ModelSize], float] | None:
    """The time of finding the strength of one fusion, as if all texts were cut; None where the strength is given."""
    fusion = experiment.fusion
    if not fusion.finds_alpha:
        return None
    read = len(fusion.row_kinds) * STRENGTHS_TRIED * experiment.training.validation_samples
    if fusion.alpha == LEARNED:
        read += texts_learned_from(experiment)
    return lambda target, source: read * experiment.reading.max_tokens * whole_token(target, experiment)


def texts_learned_from(experiment: Experiment) -> int:
    """Forward passes of one text, in which the passes of learning strengths are counted."""
    return TRAINING_PASSES * TEXTS_PER_STEP * experiment.fusion.alpha_steps


def comparison(experiment: Experiment, trainings: int) -> Callable[[ModelSize, ModelSize], float]:
    """The time of the losses of all arms and of finding the strengths of controls: as if all texts were cut, and
    without making the controls."""

    def seconds(target: ModelSize, source: ModelSize) -> float:
        settings, controls = experiment.evaluation, CONTROL_COUNTS[experiment.evaluation.controls]
        sets = 1 if settings.general_spec(experiment.data.split_seed) is None else 2
        tokens = sets * settings.held_out_samples * experiment.reading.max_tokens
        arms, search = 2 + controls + trainings, searching(experiment)  # 2 are base and fused
        losses = tokens * (arms * whole_token(target, experiment) + whole_token(source, experiment))
        if settings.learned_arm and experiment.fusion.alpha == AUTO:
            read = texts_learned_from(experiment) * experiment.reading.max_tokens + tokens
            losses += read * whole_token(target, experiment)
        return losses + (0.0 if search is None else controls * search(target, source))

    return seconds


@functools.cache
def whole_token(model: ModelSize, experiment: Experiment) -> float:
    """Seconds of one token in a forward pass with the output layer, which stage 1 does without."""
    return token_seconds(model, experiment.compute) * model.parameters / model.layer_parameters


if __name__ == "__main__":
    run_command(main)
