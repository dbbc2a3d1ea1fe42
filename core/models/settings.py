"""Settings of the two models, and of the device, dtype and batches with which they are computed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from core.errors import UserError
from core.options import AT_LEAST_ONE, NOT_NEGATIVE, option


@dataclass(frozen=True)
class ModelSettings:
    """Models: the pair, by folder or by name."""

    target_model: str = option(
        "", "12e", "small model that is improved: folder, id in $MODELS_ROOT, or hub id", changes=""
    )
    source_model: str = option(
        "", "123e", "model that gives knowledge: folder, id in $MODELS_ROOT, or hub id", changes=""
    )
    source_base: str | None = option(
        None,
        "12e",
        "model that the source was tuned from; what is transported is then what the source learned over it",
        changes="",
    )
    target_revision: str | None = option(None, "12e", "hub revision of the target", changes="")
    source_revision: str | None = option(None, "123e", "hub revision of the source", changes="")
    source_base_revision: str | None = option(None, "12e", "hub revision of the source's base", changes="")
    trust_remote_code: bool = option(False, "123e", "allow code that comes with a model", changes="")


@dataclass(frozen=True)
class ComputeSettings:
    """Computing: where, how precisely, and from which seed."""

    device: str = option("cpu", "123e", "torch device, e.g. cpu or cuda:0")
    dtype: str = option(
        "auto",
        "123e",
        "compute dtype; auto: float32 on a CPU, else the model's own",
        ("auto", "float32", "bfloat16", "float16"),
        only_with="a model that runs",
    )
    seed: int = option(
        0,
        "123e",
        "seed of the row sample, of learned strengths, of training and of the permuted control",
        range=NOT_NEGATIVE,
        only_with="something drawn",
    )
    tokens_per_batch: int = option(
        4096,
        "123e",
        "tokens per forward pass, padding included; a longer text goes alone",
        range=AT_LEAST_ONE,
        only_with="a model that runs",
    )


def check_device(name: str) -> None:
    """Raise UserError for a device that this machine does not have."""
    try:
        device = torch.device(name)
        present = 1 if device.type == "cpu" else torch.get_device_module(device).device_count()
        usable = (device.index or 0) < present
    except RuntimeError:
        usable = False
    if not usable:
        raise UserError(f"device {name!r} is not available here; use cpu, or cuda on a machine with a GPU")
