"""The rows on which W~ is regressed: aligned ones, and anchors where the source has nothing to say.

Two tokenizers end at the same character at some positions of a text only. There the source's output, mapped to the
target's neurons, is the response that W~ is to give for the target's input. At the other positions the source says
nothing, and a regression that never sees them changes what the target does there. An anchor is such a position, with
the target's own output as the response.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from core.fusion.ridge import Ridge

KINDS = ("aligned", "anchored", "difference")


@dataclass(frozen=True)
class Anchors:
    """Inputs x and outputs y of one projection of the target at positions without a partner.

    Attributes:
        x, y: [U, n'] and [U, n], relative to the means over the aligned rows.
        weight: how many positions of the texts one anchor stands for, when an aligned row stands for one; so that
            aligned and other positions count in their natural proportion, however many of each were recorded.
    """

    x: Tensor
    y: Tensor
    weight: float


def regress(X: Tensor, Z: Tensor, ridge: float, anchors: Anchors) -> Tensor:
    """The weight [k, n'] that gives the responses Z [T, k] for the inputs X [T, n'], and the anchors' own for theirs.

    Args:
        X, Z: the aligned rows, relative to the means over them.
        ridge: lambda of the regression.
        anchors: the other rows. All rows together are centred again, each with its weight.
    """
    scale = torch.cat([X.new_ones(len(X)), X.new_full((len(anchors.x),), anchors.weight)])[:, None]
    X, Z = torch.cat([X, anchors.x]), torch.cat([Z, anchors.y])
    X, Z = (rows - (scale * rows).sum(0) / scale.sum() for rows in (X, Z))
    root = scale.sqrt()
    return Ridge(root * X, ridge).map(root * Z)
