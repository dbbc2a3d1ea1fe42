"""Controls: residuals that share everything with the fused one but the correspondence between the models.

A gain counts as transfer only when it beats all of them on the same held-out texts. A control is a function of the
fused residual, the transport that made it and a generator for shuffles; it keeps the selection and replaces W~. Adding
one is a function and a row in `CONTROLS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Generator

from core.errors import UserError
from core.fusion.residual import Residual
from core.fusion.transport_weights import Transport, transport_into


def damped(fused: Residual, transport: Transport, generator: Generator) -> Residual:
    """W~ = 0: all that happens is that the selected part of the target's weight becomes smaller."""
    bias = None if fused.bias is None else torch.zeros_like(fused.bias)
    return replace(fused, weight=torch.zeros_like(fused.weight), bias=bias)


def damped_mean(fused: Residual, transport: Transport, generator: Generator) -> Residual:
    """W~ = y_bar x_bar^T / |x_bar|^2: only the target's mean output is kept. A bias, where there is one, takes it."""
    return transport.keep_mean(damped(fused, transport, generator))


def permuted(fused: Residual, transport: Transport, generator: Generator) -> Residual:
    """W~ - W with its rows and columns shuffled: a change of the same norm between neurons that do not correspond.
    Where W~ is added to W, it is the change itself.

    The shuffle also loses the mean output that some feature maps keep. `damped_mean` and `self_regressed` keep it and
    show how much of a gain is due to it.
    """
    rows = torch.randperm(fused.weight.shape[0], generator=generator)
    columns = torch.randperm(fused.weight.shape[1], generator=generator)
    if transport.adds:
        return replace(
            fused, weight=fused.weight[rows][:, columns], bias=None if fused.bias is None else fused.bias[rows]
        )
    weight = fused.original_weight + (fused.weight - fused.original_weight)[rows][:, columns]
    bias = fused.bias
    if bias is not None and fused.original_bias is not None:
        bias = fused.original_bias + (bias - fused.original_bias)[rows]
    return replace(fused, weight=weight, bias=bias)


def wrong_layer(fused: Residual, transport: Transport, generator: Generator) -> Residual:
    """W~ of target layer (l + L/2) mod L. A feature map that keeps the mean output keeps it again at layer l.

    Raises:
        UserError: the target has one layer, so that this would be the fused residual itself.
    """
    n_layers = transport.plans.shape[0]
    if n_layers == 1:
        raise UserError("wrong_layer: the target has one layer, and W~ of another layer does not exist")
    (wrong,) = transport_into([fused], transport, (fused.layer + n_layers // 2) % n_layers)
    return wrong


def self_regressed(fused: Residual, transport: Transport, generator: Generator) -> Residual:
    """W~ regressed from the target's own inputs to its own outputs, which smooths W without any source. The mean output
    is kept. With a task vector it is W: the target differs from itself by nothing."""
    return transport.regress_own(fused)


def filtered_self(fused: Residual, transport: Transport, generator: Generator) -> Residual:
    """`self_regressed` on outputs that were first given the spectrum which transport gives the source's outputs, in
    their own principal components. A gain that this control shares is denoising, not knowledge of the source.

    Raises:
        UserError: the feature map has no responses whose spectrum could be taken.
    """
    return transport.regress_own(fused, filtered=True)


def random_source(fused: Residual, transport: Transport, generator: Generator) -> Residual:
    """W~ once more, from a transport that reads a source of the same architecture with fresh weights. What it gains is
    what any network of this shape would give.

    Args:
        transport: not the one that made `fused`, but one on the rows of such a source; layers are matched as for
            `fused`, by the plans of the real source.
    """
    (found,) = transport_into([fused], transport, fused.layer)
    return found


CONTROLS: dict[str, Callable[[Residual, Transport, Generator], Residual]] = {
    "damped": damped,
    "damped_mean": damped_mean,
    "permuted": permuted,
    "wrong_layer": wrong_layer,
    "self": self_regressed,
    "filtered_self": filtered_self,
    "random_source": random_source,
}
# Those that have come closest to a fusion with learned strengths where we measured it.
FEW = ("permuted", "self", "filtered_self")
# The controls that are made from the fused W~ itself. The others are made from the selection and the transport alone.
SHUFFLED = {"permuted"}
