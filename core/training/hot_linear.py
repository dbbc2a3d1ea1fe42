"""Residual-frozen adaptation (section 4.3, Eqs. 15-18): the projection that holds a residual, attached and frozen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.fusion.projections import COLUMNS, ROWS
from core.fusion.residual import Residual, fold_bias, fold_weight, mix, mix_at
from core.fusion.strengths import Strength, strength_of
from core.models.families import linear_at
from core.training.settings import FREEZE_STRATEGIES

# A forward pass goes through W_eff when its tokens * k / n reach this number. To make W_eff, which the backward pass
# does again, then costs less than k / n of an extra matmul in each of the two passes.
FOLD_FROM = {"cpu": 24, "accelerator": 1024}


class HotResidualLinear(nn.Linear):
    """A projection whose trainable base weight keeps its usual name, with a transported residual (Eqs. 15-18).

    It computes x W_eff^T, where on the selected rows or columns W_eff = (1 - alpha) W + alpha W~ (`interpolate`) or
    W + alpha W~ (`additive`), in the cheaper of two ways: the residual's part is added to the base's, which costs k / n
    of an extra matmul, or W_eff is made, which is done anew for each pass and never kept.

    Parameters: weight [n, n'] and bias [n] or None, which are the base; hot_weight [k, n'] or [n, k] and hot_bias [k],
    [n] or None, which are the residual.
    """

    hot_index: Tensor
    base_scale: Tensor
    hot_weight: nn.Parameter
    hot_bias: nn.Parameter | None

    def __init__(self, linear: nn.Linear, residual: Residual, alpha: float, form: str):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.hot_weight = nn.Parameter(residual.weight.to(linear.weight))
        self.hot_bias = None if residual.bias is None else nn.Parameter(residual.bias.to(linear.weight))
        self.axis, self.alpha, self.form = residual.axis, alpha, form
        index, size = residual.index.to(linear.weight.device), linear.weight.shape[residual.axis]
        self.dense = len(index) == size
        kept = 1 - alpha if form == "interpolate" else 1.0  # what is left of the base on the selection
        self.register_buffer("hot_index", index, persistent=False)
        ones = torch.ones(size, device=index.device, dtype=linear.weight.dtype)
        self.register_buffer("base_scale", ones.index_fill(0, index, kept), persistent=False)

    def forward(self, x: Tensor, plain: bool = False) -> Tensor:
        """[..., n'] -> [..., n]; with `plain` by the base alone."""
        if plain or self.alpha == 0:
            return F.linear(x, self.weight, self.bias)
        tokens = x.numel() // self.in_features
        fold_from = FOLD_FROM["cpu" if x.device.type == "cpu" else "accelerator"]
        if self.dense or tokens * len(self.hot_index) >= fold_from * len(self.base_scale):
            if torch.is_autocast_enabled(x.device.type):
                x = x.to(torch.get_autocast_dtype(x.device.type))
            return _ThroughEffectiveWeight.apply(x, self.weight, self.effective_bias(), self.hot_weight, self)
        return self.forward_with_base(x, lambda z: F.linear(z, self.weight, self.bias))

    def forward_with_base(self, x: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
        """The projection with any linear `base`, [..., n'] -> [..., n], in place of W x + b.

        Where rows are selected, the selected outputs of the base are scaled and alpha W~ x is added to them. Where
        columns are selected, the selected inputs are scaled before the base reads them.
        """
        b = self.bias if self.form == "interpolate" else None
        if self.axis == ROWS:
            # A bias that is not fused must not be damped either, so its damped part is added back.
            bias = self.hot_bias if self.hot_bias is not None or b is None else b[self.hot_index]
            y, hot = base(x), F.linear(x, self.hot_weight, bias)
            y = (y * self.base_scale).to(y.dtype)  # the scale itself is not rounded to a half type: it may be 0.995
            return y.index_add(-1, self.hot_index, hot.to(y.dtype), alpha=self.alpha)
        bias = self.hot_bias if self.hot_bias is None or b is None else self.hot_bias - b
        y = base((x * self.base_scale).to(x.dtype))
        return torch.add(y, F.linear(x.index_select(-1, self.hot_index), self.hot_weight, bias), alpha=self.alpha)

    def effective_weight(self) -> Tensor:
        """W_eff [n, n']."""
        if self.dense:
            return mix(self.weight, self.hot_weight, self.alpha, self.form)
        # Scaling all of W is one pass over it; picking the selection out and putting it back would be three.
        kept = self.weight * (self.base_scale[:, None] if self.axis == ROWS else self.base_scale)
        return kept.to(self.weight.dtype).index_add_(self.axis, self.hot_index, self.hot_weight, alpha=self.alpha)

    def effective_bias(self) -> Tensor | None:
        """b_eff [n]; the base's bias where no bias is fused."""
        if self.bias is None or self.hot_bias is None:
            return self.bias
        if self.axis == COLUMNS:
            return mix(self.bias, self.hot_bias, self.alpha, self.form)
        return mix_at(self.bias, self.hot_bias, self.hot_index, ROWS, self.alpha, self.form)


class _ThroughEffectiveWeight(torch.autograd.Function):
    """x W_eff^T + b_eff. The backward pass makes W_eff again, so that no copy of the weights outlives a pass."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, hot: Tensor, layer: HotResidualLinear
    ) -> Tensor:
        ctx.save_for_backward(x, weight, hot)
        ctx.layer = layer
        return F.linear(x, layer.effective_weight().to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, hot = ctx.saved_tensors
        layer, index = ctx.layer, ctx.layer.hot_index
        wants_x, wants_weight, wants_bias, wants_hot, _ = ctx.needs_input_grad
        flat_grad, flat_x = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        d_x = d_weight = d_bias = d_hot = None
        if wants_x:
            d_x = grad @ layer.effective_weight().to(x.dtype)
        if wants_bias:
            d_bias = flat_grad.sum(0).to(weight.dtype)
        if wants_weight:
            rows, columns = flat_grad, flat_x
            if layer.form == "interpolate" and layer.axis == ROWS:
                rows = (rows * layer.base_scale).to(rows.dtype)
            elif layer.form == "interpolate":
                columns = (columns * layer.base_scale).to(columns.dtype)
            d_weight = (rows.T @ columns).to(weight.dtype)  # [n, tokens] @ [tokens, n'] -> [n, n']
        if wants_hot:
            rows, columns = (flat_grad[:, index], flat_x) if layer.axis == ROWS else (flat_grad, flat_x[:, index])
            d_hot = (rows.T @ columns).to(hot.dtype) * layer.alpha  # [k, n'] or [n, k]
        return d_x, d_weight, d_bias, d_hot, None


def enable_hot_residual_for_model(
    model: nn.Module, residuals: Iterable[Residual], name_of: Callable[[int, str], str], alpha: Strength, form: str
) -> list[str]:
    """Replace each fused projection of `model` by a HotResidualLinear around the same base parameters.

    Args:
        model: holds the base (unfused) weights; `restore_base` makes them from fused ones.
        name_of: (layer, projection) -> module name, for example `AttentionLayout.name`.
        alpha, form: those of the fusion.
    Returns:
        The names of the replaced modules.
    """
    names = []
    for residual in residuals:
        name = name_of(residual.layer, residual.projection)
        parent, _, child = name.rpartition(".")
        layer = HotResidualLinear(linear_at(model, name), residual, strength_of(alpha, residual), form)
        setattr(model.get_submodule(parent), child, layer)
        names.append(name)
    return names


@torch.no_grad()
def fold_in_place(
    model: nn.Module, residuals: Iterable[Residual], name_of: Callable[[int, str], str], alpha: Strength, form: str
) -> None:
    """Write W_eff and b_eff of fused projections into the weights of a loaded target; `restore_base` undoes it."""
    for residual in residuals:
        linear, strength = linear_at(model, name_of(residual.layer, residual.projection)), strength_of(alpha, residual)
        residual = residual.to(linear.weight.device)
        linear.weight.copy_(fold_weight(linear.weight, residual, strength, form))
        if linear.bias is not None:
            linear.bias.copy_(fold_bias(linear.bias, residual, strength, form))


@torch.no_grad()
def restore_base(model: nn.Module, residuals: Iterable[Residual], name_of: Callable[[int, str], str]) -> None:
    """Undo the folding of a fused checkpoint in place: the target's own values are written back, bit for bit."""
    for residual in residuals:
        linear = linear_at(model, name_of(residual.layer, residual.projection))
        weight, bias, device = linear.weight, linear.bias, linear.weight.device
        weight.index_copy_(residual.axis, residual.index.to(device), residual.original_weight.to(weight))
        if residual.original_bias is not None and bias is not None:
            bias.index_copy_(0, residual.bias_index.to(device), residual.original_bias.to(bias))


def set_trainable(model: nn.Module, strategy: str, lora: bool = False) -> dict[str, tuple[int, int]]:
    """Freeze parameters by name: `frozen_hot` (= `frozen_transport`) trains the base, `frozen_base` the residual and
    `none` both. With `lora`, adapters train in place of the base.

    Returns:
        {"base", "residual", "adapters": (trainable, frozen)} numbers of parameters.
    Raises:
        ValueError: unknown strategy.
    """
    if strategy not in FREEZE_STRATEGIES:
        raise ValueError(f"freeze strategy {strategy!r}; expected one of {', '.join(FREEZE_STRATEGIES)}")
    counts = {"base": [0, 0], "residual": [0, 0], "adapters": [0, 0]}
    trains = {
        "base": strategy != "frozen_base" and not lora,
        "residual": strategy in ("frozen_base", "none"),
        "adapters": lora,
    }
    for name, parameter in model.named_parameters():
        residual = name.rpartition(".")[2] in ("hot_weight", "hot_bias")
        part = "residual" if residual else "adapters" if ".lora_" in name else "base"
        parameter.requires_grad_(trains[part])
        counts[part][not trains[part]] += parameter.numel()
    return {part: (trainable, frozen) for part, (trainable, frozen) in counts.items()}


def trained_residuals(
    state: Mapping[str, Tensor], residuals: Iterable[Residual], name_of: Callable[[int, str], str]
) -> list[Residual]:
    """The residuals with the values that the base and they themselves have now.

    Args:
        state: state dict of a model with HotResidualLinear layers, on the device of the residuals.
        name_of: (layer, projection) -> module name.
    """
    out = []
    for residual in residuals:
        name = name_of(residual.layer, residual.projection)
        current: dict[str, Any] = {
            "weight": state[f"{name}.hot_weight"].detach(),
            "original_weight": state[f"{name}.weight"].detach().index_select(residual.axis, residual.index),
        }
        if f"{name}.hot_bias" in state:
            current["bias"] = state[f"{name}.hot_bias"].detach()
        if residual.original_bias is not None:
            current["original_bias"] = state[f"{name}.bias"].detach()[residual.bias_index]
        out.append(replace(residual, **current))
    return out
