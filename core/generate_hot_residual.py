#!/usr/bin/env python
"""Stage 2: plan directory + two models -> fused checkpoint (plain weights, residual file, report, model card)."""

from __future__ import annotations

import dataclasses
import logging
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from core.files import write_json, write_text
from core.fusion.feature_maps import FEATURE_MAPS
from core.fusion.residual_file import RESIDUAL_FILE, join_residuals
from core.fusion.transport_weights import fuse_attention_only_from_hot_dir
from core.hub import push_folder
from core.locks import outputs_held
from core.manifest import Manifest, check_output_folder, provenance, would_be_emptied
from core.models.checkpoints import Checkpoint, open_pair, open_source_base
from core.models.folded import write_folded
from core.runs import preflight as checks
from core.runs.card import CARD, fused_card
from core.runs.command_line import Command, parse_command, save_resolved
from core.runs.fused_layers import PARTS, FusedLayers
from core.runs.licences import licence_warning
from core.runs.lineage import fused_lineage
from core.runs.next_commands import after_fusion
from core.runs.plan_directory import PlanDirectory
from core.runs.process import end_of_stage, log_to_file, run_command, setup_logging, show
from core.runs.rows_read import recorded, write_rows_read
from core.runs.settings import Experiment
from core.runs.strength_search import StrengthRows, search_settings, strength_rows, strength_search
from core.training.hot_linear import enable_hot_residual_for_model
from core.training.strengths import Choice
from evaluation.significance import record_of_difference

__all__ = ["enable_hot_residual_for_model", "fuse_attention_only_from_hot_dir", "main"]

log = logging.getLogger("stage2")
STAGE = "fused"
# Below this |W~| / |W| fusing with W~ only makes the selected part of the target's weight smaller.
DAMPING_RATIO = 1e-3
# Below this |W~ - W| / |W| a task vector is lost in the rounding of float32.
NOTHING_RATIO = 1e-7
# The figures of the report that are averaged over layers, in the order of the printed table.
FIGURES = ("norm_ratio", "cosine", "explained_variance")


@dataclass(frozen=True)
class Job:
    """What one run of this command reads, and the folder that it writes."""

    experiment: Experiment
    plans: PlanDirectory
    target: Checkpoint
    source: Checkpoint
    folder: Path
    source_base: Checkpoint | None = None

    @property
    def layers(self) -> FusedLayers:
        """The residuals of all layers until the checkpoint is complete."""
        return FusedLayers(self.folder, self.plans.shape[0], self.experiment.fusion)

    @cached_property
    def rows(self) -> StrengthRows | None:
        """The rows on which strengths are found; None where the strength is given."""
        return strength_rows(self.experiment, self.plans) if self.experiment.fusion.finds_alpha else None


@outputs_held()
def main(argv: list[str]) -> None:
    """Parse the command line, open the inputs, fuse unless the folder is finished already, and print a summary."""
    setup_logging()
    command = parse(argv)
    dry_run = "dry_run" in command.modes
    if dry_run and (waiting := command.not_ready_yet("hot_dir", "plans", "plans")):
        print(waiting)
        return
    job = open_job(command)
    preflight(job, report=dry_run)
    if dry_run:
        if emptied := would_be_emptied(job.folder, manifest_inputs(job)):
            print(emptied)
        print("nothing is missing")
        return
    manifest = Manifest.begin(job.folder, STAGE, manifest_inputs(job))
    log_to_file(command.log_file("output_dir", "fused"))
    settings, made_from = job.experiment.fusion, job.plans.manifest.inputs
    lineage = fused_lineage(job.target, job.source, made_from, dataclasses.asdict(settings), job.source_base)
    if warning := licence_warning(lineage["models"]):
        log.warning(warning)
    finished = f"{job.folder} is finished"
    if manifest.complete:
        finished += " already"
    else:
        write_checkpoint(job, manifest, lineage)
    shutil.rmtree(job.folder / PARTS, ignore_errors=True)
    show(summary(manifest.record))
    ratio = max(mean["norm_ratio"] or 0.0 for mean in manifest.record["mean"].values())
    whole = job.source_base is None
    if settings.alpha != 0 and not ratio >= (DAMPING_RATIO if whole else NOTHING_RATIO):
        what = "|W~|/|W| is %.1e: fusion only damps" if whole else "|W~-W|/|W| is %.1e: fusion does not change"
        log.warning(what + " the target; --feature-map regression transports real weights", ratio)
    push_folder(job.folder, job.experiment.output.push_to_hub)
    end_of_stage(finished, after_fusion(command, job.folder))


def parse(argv: Sequence[str]) -> Command:
    """The command line of stage 2."""
    return parse_command(
        argv,
        "2",
        __doc__ or "",
        {
            "hot_dir": "plan directory of stage 1 (default runs/<name>/plans)",
            "output_dir": "fused checkpoint to write (default runs/<name>/fused)",
        },
        {"modelA_id": "target_model", "modelB_id": "source_model"},
        {"dry_run": "check everything that can be checked without reading weights, print it, and stop"},
    )


def open_job(command: Command) -> Job:
    """Open the plans and the two models, which are by default those that the plans were made from.

    Raises:
        UserError: an input cannot be read, the models are not those of the plans, or the output folder is another's.
    """
    folder = command.path("output_dir", "fused")
    plans = PlanDirectory(command.path("hot_dir", "plans"), command.experiment.compute.device)
    made_from = plans.manifest.inputs
    experiment = command.experiment.changed(
        target_model=command.experiment.models.target_model or made_from["target"]["id"],
        source_model=command.experiment.models.source_model or made_from["source"]["id"],
    )
    target, source = open_pair(experiment.models, experiment.compute.device)
    base = open_source_base(experiment.models, source, experiment.fusion.fused)
    models = [model.folder for model in (target, source, base) if model is not None]
    check_output_folder(folder, plans.folder, *models)
    plans.check_models(target, source)
    experiment.fusion.check_feature_map()
    plans.check_projections(experiment.fusion.fused)
    experiment = experiment.changed(rows=plans.rows_of(experiment.fusion))
    if base is not None and not FEATURE_MAPS[experiment.fusion.feature_map].reads_feature_plans:
        plans.check_source_inputs(experiment.fusion.fused)
    return Job(experiment, plans, target, source, folder, base)


def preflight(job: Job, report: bool) -> None:
    """Check models, disk and memory from the headers of the weights; with `report` also print what would be done.

    Raises:
        UserError: something is missing or does not fit.
    """
    settings = job.experiment.fusion
    disk = checks.stage2_disk(job.target, settings)
    memory = checks.stage2_memory(job.plans, job.target, job.source, job.experiment)
    problems = [
        *checks.model_problems("target", job.target, settings.fused),
        *checks.model_problems("source", job.source, settings.fused),
        *checks.disk_problems(job.folder, disk),
    ]
    if job.source_base is not None:
        memory += checks.task_vector_memory(job.source, settings.fused)
        problems += checks.model_problems("source base", job.source_base, settings.fused)
        if report:
            print(checks.describe("source base", job.source_base))
    if report:
        print(checks.stage2_report(job.plans, job.target, job.source, settings, memory, disk))
        problems += checks.memory_problems(memory, job.experiment.compute.device)
    checks.refuse(problems)


def manifest_inputs(job: Job) -> dict[str, Any]:
    """All that the bytes of the checkpoint depend on; settings that change nothing are None."""
    deciding, fusion = job.experiment.deciding("2"), dataclasses.asdict(job.experiment.fusion)
    found = {} if job.rows is None else {"strength_rows": job.rows.identity()}
    base = {} if job.source_base is None else {"source_base": job.source_base.identity}
    return {
        **found,
        "plans": job.plans.manifest.record["fingerprint"],
        "target": job.target.identity,
        "source": job.source.identity,
        **base,
        "settings": {name: deciding[name] for name in fusion},
        "writing": {name: value for name, value in deciding.items() if name not in fusion},
    }


def write_checkpoint(job: Job, manifest: Manifest, lineage: dict[str, Any]) -> None:
    """Fuse, and write every file of the checkpoint; the manifest that says that it is complete comes last."""
    settings, folder, layers = job.experiment.fusion, job.folder, job.layers
    save_resolved(job.experiment, "2", folder)
    layers.transport(job.plans, job.target, job.source, job.source_base)
    choice = find_strength(job)
    rows = settings.row_kinds[0] if choice is None else choice.candidate
    alpha = float(settings.alpha) if choice is None else choice.alpha
    join_residuals(layers.paths(rows), folder / RESIDUAL_FILE, alpha, settings.residual_form)
    fold = layers.fold_from(rows, job.target, alpha)
    write_folded(job.target, folder, fold, job.experiment.output.max_shard_bytes)
    lines, strength = layers.report(rows), None if choice is None else choice.record()
    means, dropped = means_by_projection(lines), sum(line["bias"] == "dropped" for line in lines)
    write_json(
        folder / "fusion_report.json",
        {
            "settings": dataclasses.asdict(settings),
            "strength": strength,
            "mean": means,
            "dropped_biases": dropped,
            "projections": lines,
        },
    )
    write_text(folder / CARD, fused_card(lineage, means, dropped, choice.sentence("Fusion") if choice else None))
    made_with = [job.plans.folder, *recorded(job.source_base)]
    write_rows_read(folder, {} if job.rows is None else job.rows.marks(), made_with)
    manifest.finish(
        strength=strength,
        mean=means,
        dropped_biases=dropped,
        source_layers_used=sum(len(line["source_layers"]) for line in lines) / len(lines),
        source_layers=job.plans.shape[1],
        data=job.plans.manifest.inputs["data"],
        lineage=lineage,
        **provenance(),
    )


def find_strength(job: Job) -> Choice | None:
    """Choose or learn the strength as the settings ask, with the target in memory; None where they give it."""
    if job.rows is None:
        return None
    model = job.target.load_model(job.experiment.compute.dtype)
    search = strength_search(job.rows, job.target, model, job.experiment, record_of_difference)
    candidates = {rows: partial(job.layers.residuals, rows) for rows in job.experiment.fusion.row_kinds}
    choice = search.find("fused", candidates, search_settings(job.experiment))
    log.info(choice.sentence(f"{job.source.name} for {job.target.name}"))
    return choice


def means_by_projection(lines: Sequence[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Projection -> figure of the report -> its mean over layers; None where no layer has it."""
    means: dict[str, dict[str, float | None]] = {}
    for projection in dict.fromkeys(line["projection"] for line in lines):
        means[projection] = {}
        for key in FIGURES:
            values = [x[key] for x in lines if x["projection"] == projection and x[key] is not None]
            means[projection][key] = sum(values) / len(values) if values else None
    return means


def summary(record: dict[str, Any]) -> str:
    """The table that stage 2 ends with, from the finished manifest."""
    ratio = "|W~-W|/|W|" if "source_base" in record["lineage"]["models"] else "  |W~|/|W|"
    lines = [f"projection {ratio}     cosine   share of output variance explained on rows kept aside"]
    for projection, mean in record["mean"].items():
        figures = ["-" if mean[key] is None else f"{mean[key]:.3g}" for key in FIGURES]
        lines.append(f"{projection:10} {figures[0]:>10} {figures[1]:>10} {figures[2]:>10}")
    if record["dropped_biases"]:
        lines.append(f"{record['dropped_biases']} source biases dropped: the target has none there")
    if record["strength"] is not None:
        lines.append(record["strength"]["sentence"])
    lines.append(
        f"source layers in a transported weight: {record['source_layers_used']:.1f} of "
        f"{record['source_layers']} on average (--p-topk)"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
