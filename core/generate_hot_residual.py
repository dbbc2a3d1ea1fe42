#!/usr/bin/env python
"""Stage 2: plan directory + two models -> fused checkpoint (plain weights, residual file, report, model card)."""

from __future__ import annotations

import dataclasses
import logging
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from torch import Tensor
from tqdm.auto import tqdm

from core.errors import UserError
from core.files import read_json, write_json, write_text
from core.fusion.projections import PROJECTIONS
from core.fusion.residual import fold_bias, fold_weight
from core.fusion.residual_file import RESIDUAL_FILE, join_residuals, load_residuals, save_residuals
from core.fusion.settings import FusionSettings
from core.fusion.transport_weights import fuse_attention_only_from_hot_dir
from core.hub import push_folder
from core.locks import outputs_held
from core.manifest import Manifest, check_output_folder, provenance, would_be_emptied
from core.models.checkpoints import Checkpoint, open_pair
from core.models.folded import write_folded
from core.runs import preflight as checks
from core.runs.card import CARD, fused_card
from core.runs.command_line import Command, parse_command, save_resolved
from core.runs.licences import licence_warning
from core.runs.lineage import fused_lineage
from core.runs.plan_directory import PlanDirectory
from core.runs.process import log_to_file, run_command, setup_logging
from core.runs.rows_read import write_rows_read
from core.runs.settings import Experiment
from core.training.hot_linear import enable_hot_residual_for_model

__all__ = ["enable_hot_residual_for_model", "fuse_attention_only_from_hot_dir", "main"]

log = logging.getLogger("stage2")
STAGE = "fused"
# While the checkpoint is being made, this folder in it holds the layers that are done.
PARTS = "parts"
# Below this |W~| / |W| fusing with W~ only makes the selected part of the target's weight smaller.
DAMPING_RATIO = 1e-3
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

    def part(self, layer: int) -> Path:
        """The file of one layer's residuals until the checkpoint is complete."""
        return self.folder / PARTS / f"{layer}.safetensors"

    @property
    def parts(self) -> list[Path]:
        """The files of all layers."""
        return [self.part(layer) for layer in range(self.plans.shape[0])]


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
    lineage = fused_lineage(job.target, job.source, made_from, dataclasses.asdict(settings))
    if warning := licence_warning(lineage["models"]):
        log.warning(warning)
    if manifest.complete:
        log.info("%s is finished already", job.folder)
    else:
        write_checkpoint(job, manifest, lineage)
        log.info("%s is finished", job.folder)
    shutil.rmtree(job.folder / PARTS, ignore_errors=True)
    print(summary(manifest.record))
    ratio = max(mean["norm_ratio"] or 0.0 for mean in manifest.record["mean"].values())
    if settings.alpha > 0 and not ratio >= DAMPING_RATIO:
        log.warning(
            "|W~|/|W| is %.1e: fusion only damps the target; --feature-map regression transports real weights", ratio
        )
    push_folder(job.folder, job.experiment.output.push_to_hub)


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
    check_output_folder(folder, plans.folder, target.folder, source.folder)
    plans.check_models(target, source)
    return Job(experiment, plans, target, source, folder)


def preflight(job: Job, report: bool) -> None:
    """Check models, disk and memory from the headers of the weights; with `report` also print what would be done.

    Raises:
        UserError: something is missing or does not fit.
    """
    settings = job.experiment.fusion
    disk = checks.stage2_disk(job.target, settings)
    memory = checks.stage2_memory(job.plans, job.target, job.source, job.experiment.output.max_shard_bytes)
    problems = [
        *checks.model_problems("target", job.target),
        *checks.model_problems("source", job.source),
        *checks.disk_problems(job.folder, disk),
    ]
    if report:
        print(checks.stage2_report(job.plans, job.target, job.source, settings, memory, disk))
        problems += checks.memory_problems(memory, job.experiment.compute.device)
    checks.refuse(problems)


def manifest_inputs(job: Job) -> dict[str, Any]:
    """All that the bytes of the checkpoint depend on."""
    fusion = dataclasses.asdict(job.experiment.fusion)
    return {
        "plans": job.plans.manifest.record["fingerprint"],
        "target": job.target.identity,
        "source": job.source.identity,
        "settings": fusion,
        "writing": {name: value for name, value in job.experiment.deciding("2").items() if name not in fusion},
    }


def write_checkpoint(job: Job, manifest: Manifest, lineage: dict[str, Any]) -> None:
    """Fuse, and write every file of the checkpoint; the manifest that says that it is complete comes last."""
    settings, folder = job.experiment.fusion, job.folder
    save_resolved(job.experiment, "2", folder)
    lines = transport_layers(job)
    join_residuals(job.parts, folder / RESIDUAL_FILE)
    write_folded(job.target, folder, fold_from(job.parts, job.target, settings), job.experiment.output.max_shard_bytes)
    means, dropped = means_by_projection(lines), sum(line["bias"] == "dropped" for line in lines)
    write_json(
        folder / "fusion_report.json",
        {
            "settings": dataclasses.asdict(settings),
            "mean": means,
            "dropped_biases": dropped,
            "projections": lines,
        },
    )
    write_text(folder / CARD, fused_card(lineage, means, dropped))
    write_rows_read(folder, {}, [job.plans.folder])
    manifest.finish(
        mean=means,
        dropped_biases=dropped,
        source_layers_used=sum(len(line["source_layers"]) for line in lines) / len(lines),
        source_layers=job.plans.shape[1],
        data=job.plans.manifest.inputs["data"],
        lineage=lineage,
        **provenance(),
    )


def transport_layers(job: Job) -> list[dict[str, Any]]:
    """Write the residuals of every target layer to a file of its own and return the lines of the report.

    Layers that a killed run finished are not computed again.

    Raises:
        UserError: a layer has no corresponding source layer, or a weight is not finite.
    """
    (job.folder / PARTS).mkdir(exist_ok=True)
    settings = job.experiment.fusion
    missing = [layer for layer, path in enumerate(job.parts) if not path.is_file()]
    fused = fuse_attention_only_from_hot_dir(job.plans, job.target, job.source, settings, missing)
    found = tqdm(fused, total=len(missing) * len(PROJECTIONS), desc="fusing", unit="projection")
    try:
        for layer, of_layer in groupby(found, key=lambda one: one[0].layer):
            residuals, lines = zip(*of_layer, strict=True)
            write_json(job.part(layer).with_suffix(".json"), {"lines": lines})
            # The residuals are written last: a layer with this file is done.
            save_residuals(job.part(layer), residuals, settings.alpha, settings.residual_form)
    except ValueError as error:
        raise UserError(str(error)) from None
    return [line for path in job.parts for line in read_json(path.with_suffix(".json"))["lines"]]


def fold_from(parts: Sequence[Path], target: Checkpoint, settings: FusionSettings) -> Callable[[str, Tensor], Tensor]:
    """Function (tensor name, tensor) -> folded tensor, which reads the residuals of one layer at a time. Tensors that
    are not fused pass through it unchanged."""
    fused = {
        target.tensor_name(layer, projection): (layer, projection)
        for layer in range(len(parts))
        for projection in PROJECTIONS
    }
    of_layer = lru_cache(1)(lambda layer: {one.projection: one for one in load_residuals(parts[layer])[0]})

    def fold(name: str, tensor: Tensor) -> Tensor:
        module, _, kind = name.rpartition(".")
        if module not in fused or kind not in ("weight", "bias"):
            return tensor
        layer, projection = fused[module]
        fold_one = fold_weight if kind == "weight" else fold_bias
        return fold_one(tensor, of_layer(layer)[projection], settings.alpha, settings.residual_form)

    return fold


def means_by_projection(lines: Sequence[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Projection -> figure of the report -> its mean over layers; None where no layer has it."""
    means: dict[str, dict[str, float | None]] = {}
    for projection in PROJECTIONS:
        means[projection] = {}
        for key in FIGURES:
            values = [x[key] for x in lines if x["projection"] == projection and x[key] is not None]
            means[projection][key] = sum(values) / len(values) if values else None
    return means


def summary(record: dict[str, Any]) -> str:
    """The table that stage 2 ends with, from the finished manifest."""
    lines = ["projection   |W~|/|W|     cosine   share of output variance explained on rows kept aside"]
    for projection, mean in record["mean"].items():
        figures = ["-" if mean[key] is None else f"{mean[key]:.3g}" for key in FIGURES]
        lines.append(f"{projection:10} {figures[0]:>10} {figures[1]:>10} {figures[2]:>10}")
    if record["dropped_biases"]:
        lines.append(f"{record['dropped_biases']} source biases dropped: the target has none there")
    lines.append(
        f"source layers in a transported weight: {record['source_layers_used']:.1f} of "
        f"{record['source_layers']} on average (--p-topk)"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
