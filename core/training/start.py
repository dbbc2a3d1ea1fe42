"""What training starts from (a fused checkpoint, or any model), and how its trained weights are written back."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.errors import UserError
from core.fusion.residual import Residual, fold_bias, fold_weight
from core.fusion.residual_file import RESIDUAL_FILE, load_residuals, save_residuals
from core.manifest import Manifest
from core.models.checkpoints import Checkpoint, open_checkpoint, write_folded
from core.models.families import SEED_MODEL_TYPES
from core.runs.settings import Experiment
from core.training.hot_linear import enable_hot_residual_for_model, restore_base, trained_residuals

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """What training starts from.

    Attributes:
        checkpoint: a fused checkpoint of stage 2, or any model.
        made_by: manifest of stage 2; None for any model.
        residuals, alpha, form: of a fused checkpoint, else empty.
    """

    checkpoint: Checkpoint
    made_by: dict[str, Any] | None
    residuals: list[Residual]
    alpha: float
    form: str

    def alphas(self, experiment: Experiment) -> tuple[float, ...]:
        """The strengths to train with: those to search, the one given, or the fused one."""
        given = self.alpha if experiment.training.train_alpha is None else experiment.training.train_alpha
        return (experiment.training.training_scenario == "hot" and experiment.training.alpha_search) or (given,)

    def load(self, hot: bool, alpha: float) -> Any:
        """The model in float32 (half types are for the passes: updates would vanish in them), unfused, and with
        `hot` the residuals at `alpha` around its projections."""
        model = self.checkpoint.load_model("float32")
        restore_base(model, self.residuals, self.checkpoint.layout.name)
        if hot:
            enable_hot_residual_for_model(model, self.residuals, self.checkpoint.layout.name, alpha, self.form)
        return model


def open_start(name: str, experiment: Experiment) -> Start:
    """The model to train. Raises UserError when it cannot be trained as asked."""
    checkpoint = open_checkpoint(name, None, experiment.models.trust_remote_code, experiment.compute.device)
    check_model_type(checkpoint, experiment.training.model_type)
    if experiment.compute.device not in ("cpu", "cuda"):
        raise UserError(
            f"device {experiment.compute.device}: training takes cpu or cuda; choose a GPU with CUDA_VISIBLE_DEVICES"
        )
    if (checkpoint.folder / RESIDUAL_FILE).is_file():
        made_by = Manifest.read(checkpoint.folder, "fused", "adapted").record
        return Start(checkpoint, made_by, *load_residuals(checkpoint.folder / RESIDUAL_FILE))
    if experiment.training.training_scenario == "hot":
        raise UserError(
            f"{checkpoint.folder} has no {RESIDUAL_FILE}; give a fused checkpoint, or --training-scenario no_hot"
        )
    return Start(checkpoint, None, [], 0.0, "interpolate")


def open_source(start: Start, experiment: Experiment) -> Checkpoint:
    """The teacher: the model given, else the source of the fusion."""
    name, revision = experiment.models.source_model, experiment.models.source_revision
    made_from = (start.made_by or {}).get("inputs", {}).get("source") or {}
    if not name and not made_from:
        raise UserError(f"{start.checkpoint.folder} does not say what the teacher is; give --source-model")
    source = open_checkpoint(
        name or made_from["id"],
        revision if name else made_from["revision"],
        experiment.models.trust_remote_code,
        experiment.compute.device,
    )
    if made_from and not source.same_model(made_from):
        raise UserError(
            f"{source.folder} is not the source of {start.checkpoint.folder} ({made_from['id']}); the "
            f"comparison needs the same one: leave --source-model out"
        )
    return source


def resolved(start: Start, experiment: Experiment) -> Experiment:
    """The experiment with what the start decides: the data of the plans where none are given, the dtype of `auto`.

    Raises:
        UserError: an alpha at which nothing would train.
    """
    if experiment.compute.dtype == "auto":
        dtypes = {"BF16": "bfloat16", "F16": "float16"} if experiment.compute.device != "cpu" else {}
        stored = [dtype for _, dtype in start.checkpoint.headers.values()]
        dtype = dtypes.get(max(set(stored), key=stored.count), "float32")
        experiment = experiment.changed(dtype=dtype)
    trains_residual_alone = (experiment.training.training_scenario, experiment.training.freeze_strategy) == (
        "hot",
        "frozen_base",
    )
    if trains_residual_alone and 0 in start.alphas(experiment):
        raise UserError("alpha 0 leaves nothing to train with frozen_base; give a larger one")
    if start.made_by is None:
        return experiment
    data = start.made_by["data"]
    if not experiment.data.data_subset and experiment.data.data_file is None:
        log.info("no data given: taking that of the plans, %s", data["file"] or data["subset"])
        experiment = experiment.changed(
            data_subset=data["subset"],
            data_file=data["file"],
            split_seed=data["split_seed"],
            max_rows_read=data["max_samples"],
            group_column=data["group_column"],
        )
    return experiment


def check_model_type(checkpoint: Checkpoint, model_type: str | None) -> None:
    """Refuse a `--model_type` that is not the checkpoint's."""
    found = checkpoint.layout.model_type
    if model_type is not None and found not in SEED_MODEL_TYPES[model_type]:
        raise UserError(f"--model_type {model_type}, but {checkpoint.folder} is a {found} model; leave the flag out")


def save_folded(
    start: Start, folder: Path, state: dict[str, Tensor], hot: bool, alpha: float, max_shard_bytes: int
) -> None:
    """Fold the unfolded model's weights and write exactly the tensors, names and dtypes the start has.

    Args:
        state: all weights of the unfolded model, by its own names, on the CPU.
        hot: with the residuals, whose file is written as well.
    Raises:
        UserError: what was trained and what is written do not have the same names; nothing is written.
    """
    layout = start.checkpoint.layout
    sources = trained_sources(start.checkpoint, state, hot)
    residuals = trained_residuals(state, start.residuals, layout.name) if hot else []
    if hot:
        save_residuals(folder / RESIDUAL_FILE, residuals, alpha, start.form)
    at = {layout.name(residual.layer, residual.projection): residual for residual in residuals}

    def folded(name: str, tensor: Tensor) -> Tensor:
        found = sources.get(name)
        value, (module, _, kind) = tensor if found is None else state[found], (found or name).rpartition(".")
        if module in at and kind in ("weight", "bias"):
            value = (fold_weight if kind == "weight" else fold_bias)(value, at[module], alpha, start.form)
        # A copy: tied weights that are stored twice would share memory, which safetensors refuses.
        return value.detach().to(tensor.dtype, copy=True)

    write_folded(start.checkpoint, folder, folded, max_shard_bytes)


def trained_sources(checkpoint: Checkpoint, state: Mapping[str, Tensor], hot: bool) -> dict[str, str]:
    """Tensor of the checkpoint -> the trained weight it is written from.

    Tensors that training on text cannot change are not among them: parts outside the text decoder and its head (a
    vision tower), and buffers that old checkpoints store although no model has them as weights (the frequencies of
    rope). Where input and output embeddings are tied, either side may hold only one of the two, which then stands for
    both.

    Raises:
        UserError: a weight that was trained has no tensor, or a tensor that should have been trained no weight.
    """
    family = checkpoint.layout.family
    head, embeddings = f"{family.head}.weight", f"{family.tower}.embed_tokens.weight"
    inside = (f"{family.tower}.", f"{family.head}.")
    residual = (".hot_weight", ".hot_bias") if hot else ()
    partner = {head: embeddings, embeddings: head}
    found: dict[str, str] = {}
    missing = []
    for name in checkpoint.sizes:
        wanted = checkpoint.name_in_model(name)
        if wanted in state:
            found[name] = wanted
        elif partner.get(wanted) in state and is_tied(checkpoint):
            found[name] = partner[wanted]
        elif wanted.startswith(inside) and not wanted.endswith("rotary_emb.inv_freq"):
            missing.append(name)
    written = set(found.values())
    for name, value in state.items():
        if not name.startswith(inside) or name in written or (residual and name.endswith(residual)):
            continue
        tied = partner.get(name)
        if tied not in written or not torch.equal(value, state[tied]):
            missing.append(name)
    if missing:
        raise UserError(
            f"{', '.join(missing[:3])} ({len(missing)} in all) cannot be written: the names of the trained "
            f"weights are not those of {checkpoint.folder}; train from a copy that transformers' "
            "save_pretrained wrote"
        )
    return found


def is_tied(checkpoint: Checkpoint) -> bool:
    """Whether output and input embeddings of a checkpoint are one weight, stored once or twice."""
    family = checkpoint.layout.family
    either = (f"{family.head}.weight", f"{family.tower}.embed_tokens.weight")
    stored = [checkpoint.tensor(name) for name in checkpoint.sizes if checkpoint.name_in_model(name) in either]
    return len(stored) < 2 or torch.equal(*stored)
