#!/usr/bin/env python
"""Stage 2: plan directory + two models -> fused checkpoint (plain weights, residual file, report, model card)."""

from __future__ import annotations

import dataclasses
import logging
import shutil
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from torch import Tensor
from tqdm.auto import tqdm

from core.errors import UserError
from core.files import read_json, write_json, write_text
from core.fusion.projections import PROJECTIONS
from core.fusion.residual import Residual
from core.fusion.settings import FusionSettings
from core.fusion.transport_weights import fuse_attention_only_from_hot_dir
from core.hub import push_folder
from core.locks import outputs_held
from core.manifest import Manifest, check_output_folder
from core.models.checkpoints import Checkpoint, open_pair, write_folded
from core.runs import preflight as checks
from core.runs.card import CARD, fused_card, fused_lineage, licence_warning
from core.runs.command_line import parse_command, save_resolved
from core.runs.plan_directory import PlanDirectory
from core.runs.process import log_to_file, provenance, run_command, setup_logging
from core.runs.rows_read import write_rows_read
from core.runs.settings import Experiment
from core.training.hot_linear import (
    RESIDUAL_FILE,
    enable_hot_residual_for_model,
    fold_bias,
    fold_weight,
    join_residuals,
    load_residuals,
    save_residuals,
)

__all__ = ["enable_hot_residual_for_model", "fuse_attention_only_from_hot_dir", "main"]

log = logging.getLogger("stage2")
STAGE = "fused"
# Folder of finished layers while the checkpoint is being made.
PARTS = "parts"
# Below this |W~| / |W| the transported weight only damps the target.
DAMPING_RATIO = 1e-3


@outputs_held()
def main(argv: list[str]) -> None:
    setup_logging()
    command = parse_command(
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
    if "dry_run" in command.modes and (waiting := command.waits_for("hot_dir", "plans", "plans")):
        print(waiting)
        return
    folder = command.path("output_dir", "fused")
    plans = PlanDirectory(command.path("hot_dir", "plans"), command.experiment.compute.device)
    made_from = plans.manifest.inputs
    experiment = command.experiment.changed(
        target_model=command.experiment.models.target_model or made_from["target"]["id"],
        source_model=command.experiment.models.source_model or made_from["source"]["id"],
    )
    settings = experiment.fusion
    target, source = open_pair(experiment.models, experiment.compute.device)
    check_output_folder(folder, plans.folder, target.folder, source.folder)
    plans.check_models(target, source)
    preflight(plans, target, source, folder, experiment, "dry_run" in command.modes)
    if "dry_run" in command.modes:
        print("nothing is missing")
        return
    fusion = dataclasses.asdict(settings)
    inputs = {
        "plans": plans.manifest.record["fingerprint"],
        "target": target.identity,
        "source": source.identity,
        "settings": fusion,
        "writing": {name: value for name, value in experiment.deciding("2").items() if name not in fusion},
    }
    manifest = Manifest.begin(folder, STAGE, inputs)
    log_to_file(command.log_file("output_dir", "fused"))
    lineage = fused_lineage(target, source, made_from, fusion)
    if warning := licence_warning(lineage["models"]):
        log.warning(warning)
    if manifest.complete:
        log.info("%s is finished already", folder)
    else:
        save_resolved(experiment, "2", folder)
        lines = transport_layers(folder / PARTS, plans, target, source, settings)
        parts = [part_file(folder / PARTS, layer) for layer in range(plans.shape[0])]
        join_residuals(parts, folder / RESIDUAL_FILE)
        write_folded(target, folder, fold_from(parts, target, settings), experiment.output.max_shard_bytes)
        means, dropped = by_projection(lines), sum(line["bias"] == "dropped" for line in lines)
        used = sum(len(line["source_layers"]) for line in lines) / len(lines)
        write_json(
            folder / "fusion_report.json",
            {
                "settings": fusion,
                "mean": means,
                "dropped_biases": dropped,
                "projections": lines,
            },
        )
        write_text(folder / CARD, fused_card(lineage, means, dropped))
        write_rows_read(folder, {}, [plans.folder])
        manifest.finish(
            mean=means,
            dropped_biases=dropped,
            source_layers_used=used,
            source_layers=plans.shape[1],
            data=made_from["data"],
            lineage=lineage,
            **provenance(),
        )
        log.info("%s is finished", folder)
    shutil.rmtree(folder / PARTS, ignore_errors=True)
    print(summary(manifest.record))
    ratio = max(mean["norm_ratio"] or 0.0 for mean in manifest.record["mean"].values())
    if settings.alpha > 0 and not ratio >= DAMPING_RATIO:
        log.warning(
            "|W~|/|W| is %.1e: fusion only damps the target; --feature-map regression transports real weights", ratio
        )
    push_folder(folder, experiment.output.push_to_hub)


def preflight(
    plans: PlanDirectory, target: Checkpoint, source: Checkpoint, folder: Path, experiment: Experiment, report: bool
) -> None:
    """Check models, disk and memory from headers; print what would be done when `report`. Raises UserError."""
    settings = experiment.fusion
    disk = checks.stage2_disk(target, settings)
    memory = checks.stage2_memory(plans, target, source, experiment.output.max_shard_bytes)
    problems = [
        *checks.model_problems("target", target),
        *checks.model_problems("source", source),
        *checks.disk_problems(folder, disk),
    ]
    if report:
        print(checks.stage2_report(plans, target, source, settings, memory, disk))
        problems += checks.memory_problems(memory, experiment.compute.device)
    checks.refuse(problems)


def transport_layers(
    folder: Path, plans: PlanDirectory, target: Checkpoint, source: Checkpoint, settings: FusionSettings
) -> list[dict[str, Any]]:
    """Transported residuals of all target layers, one file per layer in `folder`, and the lines of the report.

    Layers whose file is there already (of a killed run) are not computed again.
    """
    folder.mkdir(exist_ok=True)
    n_layers = plans.shape[0]
    missing = [layer for layer in range(n_layers) if not part_file(folder, layer).is_file()]
    fused = fuse_attention_only_from_hot_dir(plans, target, source, settings, missing)
    layer: list[tuple[Residual, dict[str, Any]]] = []
    try:
        for one in tqdm(fused, total=len(missing) * len(PROJECTIONS), desc="fusing", unit="projection"):
            layer.append(one)
            if len(layer) == len(PROJECTIONS):
                residuals, lines = zip(*layer, strict=True)
                path = part_file(folder, residuals[0].layer)
                write_json(path.with_suffix(".json"), {"lines": lines})
                save_residuals(path, residuals, settings.alpha, settings.residual_form)  # last: the layer is done
                layer = []
    except ValueError as error:
        raise UserError(str(error)) from None
    return [line for n in range(n_layers) for line in read_json(part_file(folder, n).with_suffix(".json"))["lines"]]


def part_file(folder: Path, layer: int) -> Path:
    """File of one layer's residuals, until the checkpoint is complete."""
    return folder / f"{layer}.safetensors"


def fold_from(parts: list[Path], target: Checkpoint, settings: FusionSettings) -> Callable[[str, Tensor], Tensor]:
    """Function (tensor name, tensor) -> folded tensor; tensors that are not fused pass unchanged. Residuals are read
    one layer at a time."""
    places = {
        target.tensor_name(layer, projection): (layer, place)
        for layer in range(len(parts))
        for place, projection in enumerate(PROJECTIONS)
    }
    of_layer = lru_cache(1)(lambda layer: load_residuals(parts[layer])[0])

    def fold(name: str, tensor: Tensor) -> Tensor:
        module, _, kind = name.rpartition(".")
        if module not in places or kind not in ("weight", "bias"):
            return tensor
        layer, place = places[module]
        fold_one = fold_weight if kind == "weight" else fold_bias
        return fold_one(tensor, of_layer(layer)[place], settings.alpha, settings.residual_form)

    return fold


def by_projection(lines: list[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Means over layers per projection of the report's figures; None where no layer has one."""
    means: dict[str, dict[str, float | None]] = {}
    for projection in PROJECTIONS:
        means[projection] = {}
        for key in ("norm_ratio", "cosine", "explained_variance"):
            values = [x[key] for x in lines if x["projection"] == projection and x[key] is not None]
            means[projection][key] = sum(values) / len(values) if values else None
    return means


def summary(record: dict[str, Any]) -> str:
    """The table that ends stage 2."""
    lines = ["projection   |W~|/|W|     cosine   share of output variance explained on rows kept aside"]
    for projection, mean in record["mean"].items():
        figures = ["-" if mean[key] is None else f"{mean[key]:.3g}" for key in mean]
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
