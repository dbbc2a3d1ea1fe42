#!/usr/bin/env python
"""Say what scripts/run_pipeline.sh will do: its stages, about how long each takes, and where results go.

It takes the flags that all stages have, and refuses the others before anything is fetched or run.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from core.errors import UserError
from core.fusion.controls import CONTROLS, FEW
from core.fusion.settings import LEARNED
from core.progress import Progress, duration
from core.runs.command_line import Command, parse_command, unfinished
from core.runs.cost import stage1_cost
from core.runs.cost_timing import token_seconds
from core.runs.model_size import ModelSize, read_model_size
from core.runs.next_commands import SCRIPTS
from core.runs.process import run_command, setup_logging
from core.runs.settings import Experiment
from core.training.strengths import TEXTS_PER_STEP

MODES = {
    "dry_run": "the stages will only check their inputs",
    "flags_only": "check the flags, and say nothing",
}
# What run_pipeline.sh trains, in its order.
SCENARIOS = ("no_hot", "distill", "hot")
# A backward pass takes twice as long as the forward pass before it.
TRAINING_PASSES = 3
# How many controls there are for each value of `controls`.
CONTROL_COUNTS = {"few": len(FEW), "usual": len(CONTROLS) - 1, "all": len(CONTROLS)}
# How many strengths a search usually tries for each kind of rows.
STRENGTHS_TRIED = 4


@dataclass(frozen=True)
class Step:
    """One thing that the script does.

    Attributes:
        what: it does.
        output: where the result goes.
        finished: whether an earlier run has finished it.
        seconds: a function that estimates how long it takes; None where nothing estimates that.
    """

    what: str
    output: Path
    finished: bool
    seconds: Callable[[ModelSize, ModelSize], float] | None = None


def main(argv: list[str]) -> None:
    """Check the flags with the parser of every stage, and print the steps."""
    setup_logging()
    seeds = os.environ.get("SEEDS", "").split()
    if wrong := [seed for seed in seeds if not seed.isdecimal()]:
        raise UserError(f"SEEDS has {wrong[0]!r}; expected whole numbers, as in SEEDS='0 1 2'")
    commands = [parse(argv, stage) for stage in SCRIPTS]
    if not (Progress.quiet or "flags_only" in commands[0].modes):
        print(overview(commands[0], [int(seed) for seed in seeds]))


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
        lines.append("A dry run: the stages check their inputs, and none of this is made")
    try:
        pair = (
            read_model_size(models.target_model, models.target_revision, experiment.compute),
            read_model_size(models.source_model, models.source_revision, experiment.compute),
        )
    except UserError as error:
        pair = None
        lines.append(f"How long it takes cannot be said: {error}")
    total, width = 0.0, max(len(step.what) for step in todo)
    for step in todo:
        note = "finished already, and kept unless what it is made from has changed" if step.finished else ""
        if step.seconds is not None and pair is not None and not step.finished:
            seconds = step.seconds(*pair)
            total += seconds
            note = f"about {duration(seconds)}"
        lines.append(f"  {step.what:{width}} -> {step.output}{note and ': '}{note}")
    if total:
        lines.append(f"In all about {duration(total)} on this machine; what has no time usually takes minutes")
    return "\n".join([*lines, f"Log: {experiment.run_dir / 'log.txt'}"])


def steps(experiment: Experiment, seeds: Sequence[int]) -> list[Step]:
    """All steps, in order."""
    run, plans, fused = experiment.run_dir, experiment.folder("plans"), experiment.folder("fused")
    trainings = [(run / "adapted" / scenario / f"seed{seed}", scenario) for seed in seeds for scenario in SCENARIOS]
    results, page = run / "results.json", run / "report.html"
    measured = comparison(experiment, len(trainings))
    return [
        Step("read the texts with both models and match them", plans, _is(plans, "plans"), planning(experiment)),
        Step("fuse the transported weights into the target", fused, _is(fused, "fused"), searching(experiment)),
        *(Step(f"train {name}", to, _is(to, "adapted"), training(experiment, name)) for to, name in trainings),
        Step("measure all losses on held-out texts", results, results.is_file(), measured),
        Step("draw the figures", page, page.is_file()),
    ]


def _is(folder: Path, stage: str) -> bool:
    """Whether a stage has finished its folder."""
    return unfinished(folder, stage) is None


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
        read += TRAINING_PASSES * TEXTS_PER_STEP * fusion.alpha_steps
    return lambda target, source: read * experiment.reading.max_tokens * whole_token(target, experiment)


def comparison(experiment: Experiment, trainings: int) -> Callable[[ModelSize, ModelSize], float]:
    """The time of the losses of all arms and of finding the strengths of controls: as if all texts were cut, and
    without making the controls."""

    def seconds(target: ModelSize, source: ModelSize) -> float:
        settings, controls = experiment.evaluation, CONTROL_COUNTS[experiment.evaluation.controls]
        sets = 1 if settings.general_spec(experiment.data.split_seed) is None else 2
        tokens = sets * settings.held_out_samples * experiment.reading.max_tokens
        arms, search = 2 + controls + trainings, searching(experiment)  # 2 are base and fused
        losses = tokens * (arms * whole_token(target, experiment) + whole_token(source, experiment))
        return losses + (0.0 if search is None else controls * search(target, source))

    return seconds


@functools.cache
def whole_token(model: ModelSize, experiment: Experiment) -> float:
    """Seconds of one token in a forward pass with the output layer, which stage 1 does without."""
    return token_seconds(model, experiment.compute) * model.parameters / model.layer_parameters


if __name__ == "__main__":
    run_command(main)
