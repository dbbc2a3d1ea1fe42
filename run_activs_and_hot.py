#!/usr/bin/env python
"""Stage 1: two models + texts -> plan directory (activations, feature plans Q, layer plans P, selection)."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.data import Row, divide
from core.errors import UserError
from core.files import MANIFEST, read_json
from core.locks import outputs_held
from core.manifest import Manifest, check_output_folder, provenance, would_be_emptied
from core.models.checkpoints import Checkpoint, open_pair, open_source_base
from core.models.locate import missing_step
from core.models.reading import Reading, Unaligned, is_aside, read_aligned, read_texts
from core.runs import preflight as checks
from core.runs.calibration import Calibration, calibration_texts
from core.runs.command_line import Command, parse_command, save_resolved
from core.runs.cost import stage1_cost
from core.runs.cost_table import estimate
from core.runs.model_size import checkpoint_size
from core.runs.next_commands import after_plans
from core.runs.plan_files import STAGE
from core.runs.plan_solver import make_plans
from core.runs.process import end_of_stage, log_to_file, process_state, run_command, setup_logging, show
from core.runs.row_recorder import RowRecorder
from core.runs.rows_read import recorded, write_rows_read
from core.runs.settings import MIN_TEXTS, Experiment
from core.texts.division import Division

log = logging.getLogger("stage1")


@dataclass(frozen=True)
class Job:
    """What one run of this command reads, and the folder that it writes."""

    experiment: Experiment
    target: Checkpoint
    source: Checkpoint
    folder: Path
    source_base: Checkpoint | None = None

    @property
    def pair(self) -> dict[str, Checkpoint]:
        """Role -> model."""
        return {"target": self.target, "source": self.source}

    @property
    def models(self) -> dict[str, Checkpoint]:
        """Role -> model, with the model that the source was tuned from where there is one."""
        return self.pair if self.source_base is None else {**self.pair, "source_base": self.source_base}

    def inputs(self, data: dict[str, Any]) -> dict[str, Any]:
        """What the manifest says the plans were made from; `data`: `Calibration.identity`."""
        identities = {role: model.identity for role, model in self.models.items()}
        return {**identities, "data": data, "settings": self.experiment.deciding("1")}


@dataclass(frozen=True)
class Readings:
    """What the two models read.

    Attributes:
        aside: [T] bool, the rows that are kept out of regressions.
        unaligned: the target's positions without a partner; None with text pooling.
    """

    target: Reading
    source: Reading
    aside: Tensor
    unaligned: Unaligned | None = None


@outputs_held()
def main(argv: list[str]) -> None:
    """Parse the command line, open the models, make the plans unless the folder is finished, and print a summary."""
    setup_logging()
    command = parse(argv)
    # The settings in the manifest hold the epsilon that is used, also where it is the default of the data set.
    experiment = command.experiment.changed(epsilon=command.experiment.epsilon)
    if "plan_only" in command.modes:
        print(estimate(experiment))
        return
    dry_run = "dry_run" in command.modes
    if dry_run and (missing := models_not_here(experiment)):
        print(estimate(experiment, timed=False))
        print(f"{'; '.join(missing)}: its tensors, tokenizer and the disk are checked after that")
        return
    target, source = open_pair(experiment.models, experiment.compute.device)
    base = open_source_base(experiment.models, source, experiment.fusion.fused)
    job = Job(experiment, target, source, command.path("out_dir", "plans"), base)
    check_output_folder(job.folder, *(model.folder for model in job.models.values()))
    preflight(job, report=dry_run)
    division = divide(experiment.data.spec)
    calibration = calibration_rows(division, experiment)
    if dry_run:
        for model in job.pair.values():
            model.check_tokenizer()
        if emptied := would_be_emptied(job.folder, job.inputs(calibration.identity())):
            print(emptied)
        print(f"{len(calibration.rows)} texts; nothing is missing")
        return
    # Reading comes before the manifest is begun, so that texts that cannot be read leave no folder behind.
    readings = read_both(target, source, calibration.rows, experiment)
    state = process_state(experiment.compute.device)
    manifest = begin(job, job.inputs(calibration.identity()), state)
    log_to_file(command.log_file("out_dir", "plans") if state.is_main_process else None)
    finished = f"{job.folder} is finished"
    if manifest.complete:
        finished += " already"
    else:
        if state.is_main_process:
            save_resolved(experiment, "1", job.folder)
            write_rows_read(job.folder, {"calibration": calibration.marks()}, recorded(*job.models.values()))
        write_plan_directory(job, manifest, readings, state)
    if state.is_main_process:
        show(summary(manifest.record))
        end_of_stage(finished, after_plans(command, job.folder))


def parse(argv: Sequence[str]) -> Command:
    """The command line of stage 1."""
    return parse_command(
        argv,
        "1",
        __doc__ or "",
        {"out_dir": "plan directory to write (default runs/<name>/plans)"},
        {"model_a_path": "source_model", "model_b_path": "target_model"},
        {
            "plan_only": "print what this would cost, from the two configs alone, and stop",
            "dry_run": "check everything that can be checked without loading a model, print it, and stop",
        },
    )


def models_not_here(experiment: Experiment) -> list[str]:
    """The models of which only the config can be read now, each with what has to be done first."""
    models = experiment.models
    pair = {
        "target": (models.target_model, models.target_revision),
        "source": (models.source_model, models.source_revision),
        "source base": (models.source_base, models.source_base_revision),
    }
    steps = {role: (name, missing_step(name, revision)) for role, (name, revision) in pair.items() if name}
    return [f"{role} {name} waits for {step}" for role, (name, step) in steps.items() if step]


def preflight(job: Job, report: bool) -> None:
    """Check models, disk and memory from configs and headers; with `report` also print them.

    The memory that is needed is an estimate, so too little of it stops a dry run but only warns before a real one.

    Raises:
        UserError: something is missing or does not fit.
    """
    compute = job.experiment.compute
    sizes = checkpoint_size(job.target, compute), checkpoint_size(job.source, compute)
    cost = stage1_cost(*sizes, job.experiment, timed=False)
    if report:
        print(checks.stage1_report(job.target, job.source, cost))
        if job.source_base is not None:
            print(checks.describe("source base", job.source_base))
    fused = job.experiment.fusion.fused
    problems = [problem for role, model in job.models.items() for problem in checks.model_problems(role, model, fused)]
    problems += checks.disk_problems(job.folder, cost.disk)
    too_little_memory = checks.memory_problems(cost.memory, compute.device)
    if report:
        problems += too_little_memory
    else:
        for problem in too_little_memory:
            log.warning(problem)
    checks.refuse(problems)


def calibration_rows(division: Division, experiment: Experiment) -> Calibration:
    """The texts that both models read. Raises UserError when they are too few for plans."""
    # Parts that later stages need are reported now: with another split, this stage would have to run again.
    for part in ("sft", "validation", "held_out"):
        division.warn_if_small(part)
    found = calibration_texts(division, experiment)
    if len(found.rows) < MIN_TEXTS:
        raise UserError(f"{len(found.rows)} calibration texts; plans need at least {MIN_TEXTS} texts: give more data")
    return found


def read_both(target: Checkpoint, source: Checkpoint, rows: list[Row], experiment: Experiment) -> Readings:
    """What each model reads of the texts."""
    tokenizers = target.load_tokenizer(), source.load_tokenizer()
    reading = experiment.reading
    if reading.pooling == "token":
        seed = experiment.compute.seed
        return Readings(*read_aligned(rows, *tokenizers, reading.max_tokens, reading.max_rows, seed))
    to_target, to_source = (read_texts(rows, tokenizer, reading.max_tokens) for tokenizer in tokenizers)
    return Readings(to_target, to_source, torch.tensor([is_aside(number) for number in range(len(rows))]))


def begin(job: Job, inputs: dict[str, Any], state: Any) -> Manifest:
    """The manifest of the plan directory, which the first process of a launch begins and all read."""
    if state.is_main_process:
        Manifest.begin(job.folder, STAGE, inputs)
    state.wait_for_everyone()
    return Manifest(job.folder, read_json(job.folder / MANIFEST))


def write_plan_directory(job: Job, manifest: Manifest, readings: Readings, state: Any) -> None:
    """Record the activations of both models, solve the plans, and mark the directory complete.

    What an earlier run has finished is not done again.
    """
    recorder = RowRecorder(job.folder, job.experiment, state)
    recorder.record("target", job.target, readings.target, readings.aside)
    recorder.record("source", job.source, readings.source, readings.aside)
    unaligned = readings.unaligned
    if unaligned is not None and unaligned.reading.n_rows:
        none_aside = torch.zeros(unaligned.reading.n_rows, dtype=torch.bool)
        recorder.record("unaligned", job.target, unaligned.reading, none_aside)
    state.wait_for_everyone()
    shape = (job.target.layout.n_layers, job.source.layout.n_layers)
    make_plans(job.folder, manifest, shape, job.experiment, state)
    if state.is_main_process:
        # A run that was killed while it cleaned up may have left these.
        shutil.rmtree(job.folder / "plans" / "parts", ignore_errors=True)
        for role in (*job.pair, "unaligned"):
            recorder.remove_shares(role)
        found = {} if unaligned is None else {"unaligned": unaligned.record()}
        shapes = {role: vars(model.layout) for role, model in job.pair.items()}
        manifest.finish(shapes=shapes, rows=readings.target.n_rows, **found, **provenance())


def summary(record: dict[str, Any]) -> str:
    """The table that ends stage 1, from the record of the manifest (see `core.runs.plan_solver.side_record`)."""
    lines = [
        f"{record['rows']} rows per layer and side{share_aligned(record)}",
        f"{'':8}{'iterations':>14}{'marginal':>10}{'Spearman of layer':>19}"
        f"{'R^2 of X from Y':>20}{'correlation':>20}{'mass in':>9}",
        f"{'side':8}{'(median, max)':>14}{'error':>10}{'match and depth':>19}"
        f"{'(plans permuted)':>20}{'(plans permuted)':>20}{'largest':>9}",
    ]
    for side, r in record["sides"].items():
        rank = "one layer" if r["depth_spearman"] is None else f"{r['depth_spearman']:.3f}"
        fits = "".join(f"{r[key]['plans']:11.3f} ({r[key]['permuted']:6.3f})" for key in ("r2", "correlation"))
        lines.append(
            f"{side:8}{r['iterations_median']:8} {r['iterations_max']:5}{r['error_max']:10.1e}{rank:>19}"
            f"{fits}{r['top_mass']:9.3f}"
        )
    return "\n".join(lines)


def share_aligned(record: dict[str, Any]) -> str:
    """Which share of the target's positions has a partner in the source's tokens; nothing with text pooling."""
    if "unaligned" not in record:
        return ""
    alone, aligned = record["unaligned"]["positions"], record["unaligned"]["aligned"]
    return f"; {100 * aligned / (alone + aligned):.0f} % of the target's positions are aligned with the source's"


if __name__ == "__main__":
    run_command(main)
