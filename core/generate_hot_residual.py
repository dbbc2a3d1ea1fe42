#!/usr/bin/env python
"""Stage 2: plan directory + two models -> fused checkpoint (plain weights, residual file, report, model card)."""

from __future__ import annotations

import dataclasses
import logging
import sys
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tqdm.auto import tqdm

from core.checkpoints import write_folded
from core.experiment import open_pair, parse_command, save_resolved
from core.fusion import PROJECTIONS, Residual, fuse_attention_only_from_hot_dir
from core.hot_residual import (
    RESIDUAL_FILE,
    enable_hot_residual_for_model,
    fold_bias,
    fold_weight,
    save_residuals,
)
from core.plans import PlanDirectory
from core.runs import (
    Manifest,
    UserError,
    check_output_folder,
    log_to_file,
    provenance,
    run_command,
    setup_logging,
    write_json,
    write_text,
)

__all__ = ["enable_hot_residual_for_model", "fuse_attention_only_from_hot_dir", "main"]

log = logging.getLogger("stage2")
STAGE = "fused"
# Below this |W~| / |W| the transported weight only damps the target.
DAMPING_RATIO = 1e-3


def main(argv: list[str]) -> None:
    setup_logging()
    command = parse_command(
        argv, "2", __doc__ or "",
        {"hot_dir": "plan directory of stage 1 (default runs/<name>/plans)",
         "output_dir": "fused checkpoint to write (default runs/<name>/fused)"},
        {"modelA_id": "target_model", "modelB_id": "source_model"},
    )  # fmt: skip
    folder = command.path("output_dir", "fused")
    plans = PlanDirectory(command.path("hot_dir", "plans"), command.experiment.device)
    made_from = plans.manifest.inputs
    experiment = dataclasses.replace(
        command.experiment,
        target_model=command.experiment.target_model or made_from["target"]["id"],
        source_model=command.experiment.source_model or made_from["source"]["id"],
    )
    settings = experiment.fusion_settings()
    target, source = open_pair(experiment)
    check_output_folder(folder, plans.folder, target.folder, source.folder)
    plans.check_models(target, source)
    manifest = Manifest.begin(folder, STAGE, {
        "plans": plans.manifest.record["fingerprint"], "target": target.identity, "source": source.identity,
        "settings": dataclasses.asdict(settings),
    })  # fmt: skip
    log_to_file(command.log_file)
    if manifest.complete:
        log.info("%s is finished already", folder)
    else:
        save_resolved(experiment, "2", folder)
        fused = fuse_attention_only_from_hot_dir(plans, target, source, settings)
        total = plans.shape[0] * len(PROJECTIONS)
        try:
            residuals, lines = zip(*tqdm(fused, total=total, desc="fusing", unit="projection"), strict=True)
        except ValueError as error:
            raise UserError(str(error)) from None
        save_residuals(folder / RESIDUAL_FILE, residuals, settings.alpha, settings.residual_form)
        write_folded(target, folder, fold_into(residuals, target.layout.name, settings.alpha, settings.residual_form))
        means, dropped = by_projection(lines), sum(line["bias"] == "dropped" for line in lines)
        write_json(folder / "fusion_report.json", {
            "settings": dataclasses.asdict(settings), "mean": means,
            "dropped_biases": dropped, "projections": lines,
        })  # fmt: skip
        write_text(folder / "README.md", model_card(target.name, source.name, settings, means))
        manifest.finish(mean=means, dropped_biases=dropped, data=made_from["data"], **provenance())
        log.info("%s is finished", folder)
    print(summary(manifest.record))
    ratio = max(mean["norm_ratio"] or 0.0 for mean in manifest.record["mean"].values())
    if ratio < DAMPING_RATIO and settings.alpha > 0:
        log.warning("|W~|/|W| is %.1e: fusion only damps the target; --feature-map regression transports real weights",
                    ratio)  # fmt: skip


def fold_into(residuals: tuple[Residual, ...], name_of: Any, alpha: float, form: str) -> Any:
    """Function (tensor name, tensor) -> folded tensor; tensors that are not fused pass unchanged."""
    by_name = {name_of(r.layer, r.projection): r for r in residuals}

    def fold(name: str, tensor: Any) -> Any:
        module, _, kind = name.rpartition(".")
        residual = by_name.get(module)
        if residual is None:
            return tensor
        return (fold_weight if kind == "weight" else fold_bias)(tensor, residual, alpha, form)

    return fold


def by_projection(lines: tuple[dict[str, Any], ...]) -> dict[str, dict[str, float | None]]:
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
    return "\n".join(lines)


def model_card(target: str, source: str, settings: Any, means: dict[str, dict[str, float | None]]) -> str:
    """README.md of the fused checkpoint."""
    table = "\n".join(
        f"| {projection} | " + " | ".join("-" if value is None else f"{value:.3g}" for value in mean.values()) + " |"
        for projection, mean in means.items()
    )
    options = "\n".join(f"- {name}: {value}" for name, value in dataclasses.asdict(settings).items())
    return f"""---
base_model:
- {target}
- {source}
tags:
- transport-and-merge
---
# {target} fused with {source}

The attention weights of `{target}` (target) with those of `{source}` (source) transported into its coordinates by
optimal transport (arXiv 2602.05495) and mixed in. Embeddings, norms and MLPs are the target's. The weights are plain:
`AutoModelForCausalLM.from_pretrained` loads them. `{RESIDUAL_FILE}` holds the transported part for adaptation.

{options}

| projection | \\|W~\\| / \\|W\\| | cosine | explained variance |
| --- | --- | --- | --- |
{table}
"""


if __name__ == "__main__":
    run_command(main)
