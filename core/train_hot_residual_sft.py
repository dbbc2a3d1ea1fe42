#!/usr/bin/env python
"""Stage 3: fused checkpoint + fine-tuning rows -> adapted checkpoint, with the transported part frozen."""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mode
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from core.data import Division, Row, divide
from core.files import MANIFEST, read_json, write_text
from core.fusion.strengths import in_words
from core.hub import push_folder
from core.locks import outputs_held
from core.manifest import Manifest, check_output_folder, provenance, would_be_emptied
from core.models.checkpoints import Checkpoint
from core.runs import preflight as checks
from core.runs.card import CARD, adapted_card
from core.runs.command_line import Command, parse_command, save_resolved
from core.runs.lineage import adapted_lineage
from core.runs.next_commands import after_training
from core.runs.process import end_of_stage, log_to_file, process_state, run_command, setup_logging
from core.runs.rows_read import check_held_out, check_same_split, recorded, with_data_of, write_rows_read
from core.runs.settings import Experiment
from core.training.curve import save_curve
from core.training.recipe import Recipe, TrainingData
from core.training.search import CHECKPOINTS, SearchResult, search, write_results
from core.training.sft import sft_examples
from core.training.start import Start, open_start, open_teacher, save_folded
from core.training.teaching import TARGETS, Taught, learn_from

log = logging.getLogger("stage3")
STAGE, UNTRAINED = "adapted", "untrained"


@outputs_held()
def main(argv: list[str]) -> None:
    """Read the flags, open what they name, train, and write the adapted checkpoint."""
    setup_logging()
    command, output_default = parse(argv)
    dry_run = "dry_run" in command.modes
    if dry_run and (waiting := command.not_ready_yet("model_dir", "fused", "fused")):
        print(waiting)
        return
    job = open_job(command, output_default)
    rows = read_rows(job)
    if dry_run:
        if emptied := would_be_emptied(job.folder, job.inputs(rows)):
            print(emptied)
        strengths, counts = job.start.strengths(job.experiment.training), (len(rows.sft), len(rows.validation))
        print(checks.stage3_report(job.start.checkpoint, job.folder, job.experiment, strengths, counts))
        return
    if job.process.is_main_process:
        Manifest.begin(job.folder, STAGE, job.inputs(rows))
    job.process.wait_for_everyone()
    manifest = Manifest(job.folder, read_json(job.folder / MANIFEST))
    log_to_file(command.log_file("output_dir", output_default) if job.process.is_main_process else None)
    if job.experiment.training.save_untrained_folded and job.process.is_main_process:
        save_untrained(job)
    finished = f"{job.folder} is finished"
    if manifest.complete:
        finished += " already"
    else:
        if job.process.is_main_process:
            save_resolved(job.experiment, "3", job.folder)
        prepared = prepare(job, rows)
        result = search(job.start, prepared.data, job.recipe, job.folder, job.process)
        if job.process.is_main_process:
            finish(job, manifest, rows, prepared, result)
    if job.process.is_main_process:
        for of_training in (CHECKPOINTS, TARGETS):
            shutil.rmtree(job.folder / of_training, ignore_errors=True)
        push_folder(job.folder, repository(job.experiment))
        end_of_stage(finished, after_training(command, job.folder, command.path("model_dir", "fused")))


def parse(argv: list[str]) -> tuple[Command, str]:
    """The command line, and where the adapted checkpoint is in the run directory when no flag says where to put it."""
    command = parse_command(
        argv,
        "3",
        __doc__ or "",
        {
            "model_dir": "fused checkpoint of stage 2, or any model for no_hot and distill (default runs/<name>/fused)",
            "output_dir": "adapted checkpoint to write (default runs/<name>/adapted/<scenario>/seed<seed>)",
        },
        {"alpha": "train_alpha"},
        {"dry_run": "check everything that can be checked without training, print it, and stop"},
    )
    experiment = command.experiment
    return command, f"adapted/{experiment.training.training_scenario}/seed{experiment.compute.seed}"


@dataclass(frozen=True)
class Job:
    """One call of this command: what it was asked to do, what it has opened, and where it writes.

    Attributes:
        experiment: the settings, with those that the start decides filled in.
        start: what training starts from.
        source: the teacher of `distill`; None in the other scenarios.
        folder: of the adapted checkpoint.
        process: this process among those of `accelerate launch` (accelerate's PartialState).
    """

    experiment: Experiment
    start: Start
    source: Checkpoint | None
    folder: Path
    process: Any

    @property
    def recipe(self) -> Recipe:
        """How training goes."""
        experiment = self.experiment
        training, adapters = experiment.training, experiment.adapters
        return Recipe(experiment.name, training, adapters, experiment.compute, experiment.distill)

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that changes the result, for the fingerprint and the card."""
        return {**self.experiment.deciding("3"), "processes": self.process.num_processes}

    @property
    def made_by(self) -> str | None:
        """The fingerprint of the fused checkpoint; None for any other model."""
        return None if self.start.made_by is None else self.start.made_by["fingerprint"]

    def inputs(self, rows: RowsRead) -> dict[str, Any]:
        """What the manifest says the adapted checkpoint was made from."""
        return {
            "model": self.start.checkpoint.identity,
            "made_by": self.made_by,
            "source": None if self.source is None else self.source.identity,
            "data": rows.division.identity(rows.sft),
            "validation": rows.division.identity(rows.validation),
            "settings": self.settings,
        }


@dataclass(frozen=True)
class RowsRead:
    """A divided data set, and the rows of it that this stage reads."""

    division: Division
    sft: list[Row]
    validation: list[Row]


@dataclass(frozen=True)
class Prepared:
    """The rows as training reads them.

    Attributes:
        data: token ids and labels, and the teacher of distillation by tokens.
        counts: of rows and tokens, as `sft_examples` gives them.
        method: how a teacher takes part, in words; None without one.
    """

    data: TrainingData
    counts: dict[str, int]
    method: str | None


def open_job(command: Command, output_default: str) -> Job:
    """Open the start and the teacher, and check what can be checked before any row is read. Raises UserError."""
    experiment, folder = command.experiment, command.path("output_dir", output_default)
    model = str(command.path("model_dir", "fused"))
    start = open_start(model, experiment.models.trust_remote_code, experiment.compute.device)
    start.check(experiment.training)
    if experiment.training.hot and (start.made_by or {}).get("strength") is not None:
        given = start.strengths(experiment.training)
        if given != (start.alpha,):
            others, found = ", ".join(map(in_words, given)), in_words(start.alpha)
            log.warning("alpha %s takes the place of the strength that stage 2 found (%s)", others, found)
    check_output_folder(folder, start.checkpoint.folder)
    distills = experiment.training.training_scenario == "distill"
    source = open_teacher(start, experiment.models) if distills else None
    process = process_state(experiment.compute.device)
    return Job(resolved(experiment, start), start, source, folder, process)


def resolved(experiment: Experiment, start: Start) -> Experiment:
    """The experiment with what the start decides: the dtype for `auto`, and the data of the plans if none is given."""
    compute = experiment.compute
    if compute.dtype == "auto":
        half_types = {"BF16": "bfloat16", "F16": "float16"} if compute.device != "cpu" else {}
        most_common = mode(dtype for _, dtype in start.checkpoint.headers.values())
        experiment = experiment.changed(dtype=half_types.get(most_common, "float32"))
    return experiment if start.made_by is None else with_data_of(experiment, start.made_by["data"])


def read_rows(job: Job) -> RowsRead:
    """The fine-tuning and the validation rows.

    Raises:
        UserError: the data is divided in another way than for the plans, or a held-out row of it was read by an earlier
            stage.
    """
    division = divide(job.experiment.data.spec)
    start, training = job.start, job.experiment.training
    made_with = recorded(start.checkpoint, job.source)
    if start.made_by is not None:
        check_same_split(start.made_by["data"], division.spec, division.revision)
        if start.checkpoint.folder not in made_with:
            made_with.append(start.checkpoint.folder)  # its record of rows is missing, and reading it says so
    check_held_out(division, made_with)
    sft = division.rows("sft", training.sft_samples)
    validation = division.rows("validation", training.validation_samples) if training.validation_samples else []
    return RowsRead(division, sft, validation)


def prepare(job: Job, rows: RowsRead) -> Prepared:
    """Tokenize the rows, after the source of `distill` has taught."""
    tokenizer = job.start.checkpoint.load_tokenizer()
    block_size = job.experiment.training.block_size
    taught = Taught(rows.sft)
    if job.source is not None:
        taught = learn_from(job.source, rows.sft, tokenizer, job.recipe, job.folder, job.process)
    examples, counts = sft_examples(taught.rows, tokenizer, block_size, taught.numbers)
    validation = sft_examples(rows.validation, tokenizer, block_size)[0] if rows.validation else []
    return Prepared(TrainingData(examples, validation, taught.teacher), counts, taught.method)


def finish(job: Job, manifest: Manifest, rows: RowsRead, prepared: Prepared, result: SearchResult) -> None:
    """Write the adapted checkpoint of the chosen trial, its curve and its card, and mark it complete."""
    start, folder, hot = job.start, job.folder, job.experiment.training.hot
    trial, outcome = result.trials[result.chosen], result.outcomes[result.chosen]
    curve, data = trial.curve(), rows.division.identity(rows.sft)
    save_folded(start, folder, trial.weights(), trial.alpha, job.experiment.output.max_shard_bytes)
    save_curve(folder, curve)
    settings = job.settings
    if len(result.trials) > 1:
        alpha = outcome["alpha"]
        shown = in_words(alpha) if isinstance(alpha, Mapping) else alpha
        settings |= {"chosen alpha": shown, "chosen learning rate": outcome["learning_rate"]}
        write_results(folder, result.outcomes, chosen=result.chosen)
    marks = {"sft": rows.division.marks(rows.sft), "validation": rows.division.marks(rows.validation)}
    write_rows_read(folder, marks, recorded(start.checkpoint, job.source))
    lineage = adapted_lineage(start.checkpoint, (start.made_by or {}).get("lineage"), hot, settings, job.source)
    write_text(folder / CARD, adapted_card(lineage, data, curve, prepared.counts, prepared.method))
    losses = [point["loss"] for point in curve["train"]]
    validation = [point["loss"] for point in curve["validation"]]
    manifest.finish(
        data=data,
        losses=losses,
        validation=validation,
        final_validation=curve["final_validation"],
        counts=prepared.counts,
        distillation=prepared.method,
        trials=result.outcomes,
        chosen=outcome,
        lineage=lineage,
        **provenance(),
    )
    log.info("training loss %.4f at first, %.4f at last", losses[0], losses[-1])
    if validation:
        log.info("validation loss %.4f before, %.4f after", validation[0], curve["final_validation"])


def save_untrained(job: Job) -> None:
    """Write what training starts from, folded, beside the adapted checkpoint: the ablation without training."""
    start, hot, output = job.start, job.experiment.training.hot, job.experiment.output
    alpha = start.strengths(job.experiment.training)[0]
    folder = job.folder.with_name(f"{job.folder.name}-{UNTRAINED}")
    inputs = {"model": start.checkpoint.identity, "made_by": job.made_by, "hot": hot, "alpha": alpha}
    manifest = Manifest.begin(folder, UNTRAINED, {**inputs, "max_shard_size": output.max_shard_size})
    if not manifest.complete:
        applied = alpha if hot else None
        state = {name: value.to("cpu") for name, value in start.load(applied).state_dict().items()}
        save_folded(start, folder, state, applied, output.max_shard_bytes)
        write_rows_read(folder, {}, recorded(start.checkpoint))
        manifest.finish(**provenance())
    log.info("%s holds what training starts from", folder)


def repository(experiment: Experiment) -> str | None:
    """The hub repository of this checkpoint. Stage 2 has pushed the fused one to `push_to_hub` itself."""
    suffix = {"hot": "adapted", "no_hot": "no-hot", "distill": "distilled"}[experiment.training.training_scenario]
    return experiment.output.push_to_hub and f"{experiment.output.push_to_hub}-{suffix}"


if __name__ == "__main__":
    run_command(main)
