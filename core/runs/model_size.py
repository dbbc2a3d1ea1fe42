"""How many parameters a model has, inside and outside its decoder layers, without reading a weight."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from core.models.checkpoints import Checkpoint, open_config
from core.models.families import FAMILIES, AttentionLayout
from core.models.gguf_header import read_gguf_header
from core.models.locate import has_safetensors
from core.models.settings import ComputeSettings


@dataclass(frozen=True)
class ModelSize:
    """The size of one model.

    Attributes:
        name: the model as the user named it.
        layout: the shapes of its attention.
        layer_parameters: how many numbers its decoder layers hold; a forward pass multiplies each of them once per
            token.
        other_parameters: how many numbers all its other tensors hold, such as embeddings and a vision tower.
        parameter_bytes: bytes of one number in the dtype in which stage 1 loads the model.
    """

    name: str
    layout: AttentionLayout
    layer_parameters: int
    other_parameters: int
    parameter_bytes: int

    @property
    def parameters(self) -> int:
        """All numbers."""
        return self.layer_parameters + self.other_parameters


def read_model_size(name: str, revision: str | None, compute: ComputeSettings) -> ModelSize:
    """The size of a model of which nothing but the config has to exist on this machine.

    Where its weights are here, the headers of their files state the shapes, which takes no time. Otherwise the model is
    built on torch's meta device, without memory for its weights.

    Raises:
        UserError: as `open_config`.
    """
    config, layout, path = open_config(name, revision)
    if path.suffix == ".gguf":
        with open(path, "rb") as handle:
            return _size(name, layout, _counts(read_gguf_header(handle).shapes), "blk.", compute)
    if has_safetensors(path.parent):
        checkpoint = Checkpoint(name, path.parent, revision, config, layout, device=compute.device)
        if all(file.is_file() for file in set(checkpoint.files.values())):
            return checkpoint_size(checkpoint, compute)
    return _size(name, layout, _meta_counts(config, layout), f"{layout.family.tower}.layers.", compute)


def checkpoint_size(checkpoint: Checkpoint, compute: ComputeSettings) -> ModelSize:
    """The size of an opened checkpoint, from the headers of its files."""
    shapes = {name: shape for name, (shape, _) in checkpoint.headers.items()}
    return _size(checkpoint.name, checkpoint.layout, _counts(shapes), f"{checkpoint.tower}.layers.", compute)


def _counts(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    return {name: math.prod(shape) for name, shape in shapes.items()}


def _meta_counts(config: dict[str, Any], layout: AttentionLayout) -> dict[str, int]:
    """Parameter -> how many numbers it holds, of the model that transformers builds from a config."""
    import transformers  # building a model imports all of its modelling code, which takes seconds

    family = layout.family
    if family.needs_code:  # transformers does not have its classes; its text decoder is what counts
        config, family = config["text_config"], FAMILIES[config["text_config"]["model_type"]]
    rest = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device("meta"):
        loader = getattr(transformers, family.auto)
        model = loader.from_config(transformers.AutoConfig.for_model(config["model_type"], **rest))
    return {name: parameter.numel() for name, parameter in model.named_parameters()}


def _size(
    name: str, layout: AttentionLayout, counts: Mapping[str, int], layers: str, compute: ComputeSettings
) -> ModelSize:
    """Add up the counts; the names of the tensors of the decoder layers begin with `layers`."""
    in_layers = sum(count for tensor, count in counts.items() if tensor.startswith(layers))
    float32 = compute.dtype == "float32" or (compute.dtype == "auto" and compute.device == "cpu")
    return ModelSize(name, layout, in_layers, sum(counts.values()) - in_layers, 4 if float32 else 2)
