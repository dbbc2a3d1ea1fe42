"""The weights that train: which they are, whether they are finite, and the file that a resume point has of them."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from core.errors import UserError


class Diverged(UserError):
    """A loss or a weight has become NaN or infinite: training has lost the weights from there on."""


def trained_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that training changes, by their names in the loaded model."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def check_finite(model: nn.Module) -> None:
    """Check the weights after the last update, of which no loss was computed any more.

    Raises:
        Diverged: a trained weight is NaN or infinite.
    """
    for name, parameter in trained_parameters(model).items():
        if not torch.isfinite(parameter).all():
            raise Diverged(
                f"{name} has NaN or infinite weights after the last update; lower the learning rate, or train in "
                "float32 or bfloat16"
            )


def save_trained(model: nn.Module, path: Path) -> None:
    """Write the `trained_parameters` of a model."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in trained_parameters(model).items()}, str(path))


def load_trained(model: nn.Module, path: Path) -> None:
    """Read what `save_trained` wrote back into a model, in place.

    Raises:
        UserError: the file has the parameters of another model, or of another choice of what trains.
    """
    saved, wanted = load_file(path), trained_parameters(model)
    if saved.keys() != wanted.keys():
        odd = sorted(saved.keys() ^ wanted.keys())[0]
        raise UserError(f"{path} does not belong to this model ({odd}); remove its folder and train again")
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(saved[name])
