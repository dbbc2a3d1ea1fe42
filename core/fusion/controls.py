"""Controls: residuals that share everything with the fused one but the correspondence it claims.

A gain counts as transfer only when it beats them on the same held-out texts.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from core.errors import UserError
from core.fusion.residual import Residual
from core.fusion.transport_weights import Plans, Transport, keep_mean, transport_into

CONTROLS = ("damped", "damped_mean", "permuted", "wrong_layer", "self")


def control_residual(
    control: str, fused: Residual, plans: Plans, transport: Transport, generator: torch.Generator
) -> Residual:
    """The residual of one control for the projection of `fused`: same selection, same alpha and form.

    - `damped`: W~ = 0.
    - `damped_mean`: only the target's mean output is kept, W~ = y_bar x_bar^T / |x_bar|^2 (a bias takes it instead).
    - `permuted`: W~ - W with rows and columns shuffled: same norm, no correspondence. The shuffle also loses the mean
      output that `regression` keeps; `damped_mean` and `self`, which keep it, are there for that part of a gain.
    - `wrong_layer`: W~ of target layer (l + L/2) mod L; with `regression` the mean is kept again at l.
    - `self`: W~ regressed from the target's own inputs to its own outputs: smoothing without a source.

    Raises:
        ValueError: unknown control.
        UserError: `wrong_layer` of a target with one layer: it would be the fused model itself.
    """
    layer, projection = fused.layer, fused.projection
    if control in ("damped", "damped_mean"):
        zero = replace(
            fused,
            weight=torch.zeros_like(fused.weight),
            bias=None if fused.bias is None else torch.zeros_like(fused.bias),
        )
        return zero if control == "damped" else keep_mean(zero, plans)
    if control == "permuted":
        rows = torch.randperm(fused.weight.shape[0], generator=generator)
        columns = torch.randperm(fused.weight.shape[1], generator=generator)
        weight = fused.original_weight + (fused.weight - fused.original_weight)[rows][:, columns]
        bias = fused.bias
        if bias is not None and fused.original_bias is not None:
            bias = fused.original_bias + (bias - fused.original_bias)[rows]
        return replace(fused, weight=weight, bias=bias)
    if control == "wrong_layer":
        n_layers = plans.shape[0]
        if n_layers == 1:
            raise UserError("wrong_layer: the target has one layer, and W~ of another layer does not exist")
        (wrong,) = transport_into([fused], transport, (layer + n_layers // 2) % n_layers)
        return wrong
    if control == "self":
        weight = transport.self_map(layer, projection).index_select(fused.axis, fused.index)
        return keep_mean(replace(fused, weight=weight, bias=None), plans)
    raise ValueError(f"control {control!r}; expected one of {', '.join(CONTROLS)}")
