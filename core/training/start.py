"""What training starts from (a fused checkpoint, or any model), and how its trained weights are written back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.errors import UserError
from core.fusion.residual import Residual, fold_bias, fold_weight
from core.fusion.residual_file import RESIDUAL_FILE, load_residuals, save_residuals
from core.fusion.strengths import Strength, strength_of
from core.manifest import Manifest
from core.models.checkpoints import Checkpoint, open_checkpoint
from core.models.families import SEED_MODEL_TYPES
from core.models.folded import write_folded
from core.models.settings import ModelSettings
from core.training.hot_linear import enable_hot_residual_for_model, restore_base, trained_residuals
from core.training.settings import TrainingSettings


@dataclass(frozen=True)
class Start:
    """What training starts from.

    Attributes:
        checkpoint: a fused checkpoint of stage 2, an adapted one of stage 3, or any model.
        made_by: the manifest of that stage; None for any other model.
        residuals: the transported parts and the target's own values in their place; empty for any other model.
        alpha, form: the strength, or that of each projection, and the form of the fusion.
    """

    checkpoint: Checkpoint
    made_by: dict[str, Any] | None
    residuals: list[Residual]
    alpha: Strength
    form: str

    def strengths(self, training: TrainingSettings) -> tuple[Strength, ...]:
        """The strengths alpha to train with: those to search, or else the one that is given, or else the fused one."""
        given = self.alpha if training.train_alpha is None else training.train_alpha
        return (training.hot and training.alpha_search) or (given,)

    def check(self, training: TrainingSettings) -> None:
        """Check that this start can be trained as the settings ask.

        Raises:
            UserError: another model type than the one given, a device on which the Trainer cannot train, no residual
                for `hot`, or a strength at which nothing would train.
        """
        device, folder = self.checkpoint.device, self.checkpoint.folder
        check_model_type(self.checkpoint, training.model_type)
        if device not in ("cpu", "cuda"):
            raise UserError(f"device {device}: training takes cpu or cuda; choose a GPU with CUDA_VISIBLE_DEVICES")
        if training.hot and self.made_by is None:
            raise UserError(f"{folder} has no {RESIDUAL_FILE}; give a fused checkpoint, or --training-scenario no_hot")
        if training.hot and training.freeze_strategy == "frozen_base" and 0 in self.strengths(training):
            raise UserError("alpha 0 leaves nothing to train with frozen_base; give a larger one")

    def load(self, alpha: Strength | None) -> Any:
        """The model that trains, in float32.

        Half types are for the forward and backward passes alone, because small updates of a weight would vanish in
        their rounding.

        Args:
            alpha: the strength of the residual around each fused projection (Eqs. 15-18); None for the target alone,
                without residuals. Either way the base weights are the target's own, as before the fusion.
        """
        model = self.checkpoint.load_model("float32")
        restore_base(model, self.residuals, self.checkpoint.layout.name)
        if alpha is not None:
            enable_hot_residual_for_model(model, self.residuals, self.checkpoint.layout.name, alpha, self.form)
        return model


def open_start(name: str, trust_remote_code: bool = False, device: str = "cpu") -> Start:
    """Open the model to train. Raises UserError as `open_checkpoint`, and for a fused checkpoint that is unfinished."""
    checkpoint = open_checkpoint(name, None, trust_remote_code, device)
    residual_file = checkpoint.folder / RESIDUAL_FILE
    if not residual_file.is_file():
        return Start(checkpoint, None, [], 0.0, "interpolate")
    made_by = Manifest.read(checkpoint.folder, "fused", "adapted").record
    return Start(checkpoint, made_by, *load_residuals(residual_file))


def open_teacher(start: Start, models: ModelSettings) -> Checkpoint:
    """Open the teacher of `distill`: the source that is given, or else the source of the fusion.

    Raises:
        UserError: neither is known, or the given one is not the source of the fusion. The arms that are compared must
            have the same source.
    """
    made_from = (start.made_by or {}).get("inputs", {}).get("source") or {}
    if not models.source_model and not made_from:
        raise UserError(f"{start.checkpoint.folder} does not say what the teacher is; give --source-model")
    if models.source_model:
        name, revision = models.source_model, models.source_revision
    else:
        name, revision = made_from["id"], made_from["revision"]
    source = open_checkpoint(name, revision, models.trust_remote_code, start.checkpoint.device)
    if made_from and not source.same_model(made_from):
        raise UserError(
            f"{source.folder} is not the source of {start.checkpoint.folder} ({made_from['id']}); the "
            f"comparison needs the same one: leave --source-model out"
        )
    return source


def check_model_type(checkpoint: Checkpoint, model_type: str | None) -> None:
    """Raise UserError when `--model_type` is given and is not the checkpoint's."""
    found = checkpoint.layout.model_type
    if model_type is not None and found not in SEED_MODEL_TYPES[model_type]:
        raise UserError(f"--model_type {model_type}, but {checkpoint.folder} is a {found} model; leave the flag out")


def save_folded(
    start: Start, folder: Path, state: Mapping[str, Tensor], alpha: Strength | None, max_shard_bytes: int
) -> None:
    """Fold the weights of the unfolded model, and write exactly the tensors, names and dtypes that the start has.

    Args:
        state: all weights of the model that `Start.load` gave, by its own names, on the CPU.
        alpha: as in `Start.load`. With residuals their file is written too.
        max_shard_bytes: the largest file of weights.
    Raises:
        UserError: the names of what was trained and of what is to be written do not fit; nothing is written.
    """
    layout = start.checkpoint.layout
    sources = trained_sources(start.checkpoint, state, alpha is not None)
    residuals = []
    if alpha is not None:
        residuals = trained_residuals(state, start.residuals, layout.name)
        save_residuals(folder / RESIDUAL_FILE, residuals, alpha, start.form)
    by_module = {layout.name(residual.layer, residual.projection): residual for residual in residuals}

    def folded(name: str, tensor: Tensor) -> Tensor:
        trained = sources.get(name)
        value = tensor if trained is None else state[trained]
        module, _, kind = (trained or name).rpartition(".")
        if alpha is not None and module in by_module and kind in ("weight", "bias"):
            fold = fold_weight if kind == "weight" else fold_bias
            residual = by_module[module]
            value = fold(value, residual, strength_of(alpha, residual), start.form)
        # A copy, because tied weights that are stored twice would share memory, which safetensors refuses.
        return value.detach().to(tensor.dtype, copy=True)

    write_folded(start.checkpoint, folder, folded, max_shard_bytes)


def trained_sources(checkpoint: Checkpoint, state: Mapping[str, Tensor], hot: bool) -> dict[str, str]:
    """For every tensor of the checkpoint that training changes, the name of the weight from which it is written.

    Training on text cannot change everything. Left out are the parts outside the text decoder and its head (a vision
    tower), and the frequencies of rotary embeddings, which old checkpoints store although no model has them as weights.
    Where input and output embeddings are tied, the checkpoint or the model may hold only one of the two, which then
    stands for both.

    Args:
        state: as in `save_folded`.
        hot: whether the residuals are among the weights; they have a file of their own.
    Raises:
        UserError: a trained weight has no tensor, or a tensor that should have been trained has no weight.
    """
    family = checkpoint.layout.family
    head, embeddings = f"{family.head}.weight", f"{family.tower}.embed_tokens.weight"
    partner = {head: embeddings, embeddings: head}
    inside = (f"{family.tower}.", f"{family.head}.")
    sources: dict[str, str] = {}
    unmatched = []
    for name in checkpoint.sizes:
        wanted = checkpoint.name_in_model(name)
        if wanted in state:
            sources[name] = wanted
        elif partner.get(wanted) in state and is_tied(checkpoint):
            sources[name] = partner[wanted]
        elif wanted.startswith(inside) and not wanted.endswith("rotary_emb.inv_freq"):
            unmatched.append(name)
    written = set(sources.values())
    for name, value in state.items():
        of_residual = hot and name.endswith((".hot_weight", ".hot_bias"))
        if not name.startswith(inside) or name in written or of_residual:
            continue
        tied = partner.get(name)
        if tied not in written or not torch.equal(value, state[tied]):
            unmatched.append(name)
    if unmatched:
        raise UserError(
            f"{', '.join(unmatched[:3])} ({len(unmatched)} in all) cannot be written: the names of the trained "
            f"weights are not those of {checkpoint.folder}; train from a copy that transformers' "
            "save_pretrained wrote"
        )
    return sources


def is_tied(checkpoint: Checkpoint) -> bool:
    """Whether the input and the output embeddings of a checkpoint are one weight, which may be stored once or twice."""
    family = checkpoint.layout.family
    either = (f"{family.head}.weight", f"{family.tower}.embed_tokens.weight")
    stored = [checkpoint.tensor(name) for name in checkpoint.sizes if checkpoint.name_in_model(name) in either]
    return len(stored) < 2 or torch.equal(*stored)
