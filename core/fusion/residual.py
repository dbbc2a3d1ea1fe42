"""What fusing does to one projection: the selected neurons, W~ on them, and how W~ is mixed with the weight."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from core.fusion.projections import PROJECTIONS, ROWS

RESIDUAL_FORMS = ("interpolate", "additive")


@dataclass(frozen=True)
class Residual:
    """The transported part of one projection: W~ on the selected rows, or columns, of the target's weight W [n, n'].

    Attributes:
        layer, projection: which of the target's projections it belongs to.
        index: [k] the selected rows or columns, ascending.
        weight: W~ on them, [k, n'] or [n, k], float32.
        bias: b~ on `bias_index`; None where the bias is not fused.
        original_weight, original_bias: the target's own values where W~ and b~ take part.
    """

    layer: int
    projection: str
    index: Tensor
    weight: Tensor
    bias: Tensor | None
    original_weight: Tensor
    original_bias: Tensor | None

    @property
    def name(self) -> str:
        """`LAYER.PROJECTION`, by which files and strengths name it."""
        return f"{self.layer}.{self.projection}"

    @property
    def axis(self) -> int:
        """Whether ROWS or COLUMNS of the weight are selected."""
        return PROJECTIONS[self.projection].axis

    @property
    def bias_index(self) -> Tensor:
        """The entries of the bias that are fused: those of the selected rows. Where columns are selected these are all
        entries, because every output reads the selected inputs."""
        return self.index if self.axis == ROWS else torch.arange(len(self.weight), device=self.index.device)

    def to(self, device: str | torch.device) -> Residual:
        """The same residual with its tensors on `device`."""
        tensors: dict[str, Any] = {name: x.to(device) for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **tensors)


def select(strongest: Tensor, top_k: int) -> Tensor:
    """The `top_k` strongest neurons in ascending order (section 4.2); all of them for 0 or top_k >= n."""
    k = len(strongest) if top_k == 0 else min(top_k, len(strongest))
    return strongest[:k].sort().values


def mix(base: Tensor, transported: Tensor, alpha: float, form: str) -> Tensor:
    """W_eff on the selection: (1 - alpha) W + alpha W~ (`interpolate`, Eqs. 14 and 22) or W + alpha W~ (`additive`,
    Eqs. 15, 16 and 18). With alpha 0 it is a copy of `base`, bit for bit."""
    if alpha == 0:
        return base.clone()
    if form == "interpolate":
        return torch.lerp(base, transported, alpha)
    return torch.add(base, transported, alpha=alpha)


def mix_at(base: Tensor, transported: Tensor, index: Tensor, axis: int, alpha: float, form: str) -> Tensor:
    """`base` with `mix` applied to the rows or columns in `index`, computed in the dtype of `transported`; everything
    else is bit-identical."""
    mixed = mix(base.index_select(axis, index).to(transported.dtype), transported, alpha, form)
    return base.index_copy(axis, index, mixed.to(base.dtype))


def fold_weight(weight: Tensor, residual: Residual, alpha: float, form: str) -> Tensor:
    """W_eff of a target weight [n, n'] in its own dtype, computed in float32."""
    return mix_at(weight, residual.weight, residual.index, residual.axis, alpha, form)


def fold_bias(bias: Tensor, residual: Residual, alpha: float, form: str) -> Tensor:
    """b_eff of a target bias [n]; the bias itself where none is fused."""
    if residual.bias is None:
        return bias
    return mix_at(bias, residual.bias, residual.bias_index, ROWS, alpha, form)


def check_finite(residual: Residual) -> None:
    """Raise ValueError for NaN or infinite values: a model is damaged, or W~ is beyond what float32 holds."""
    values = {
        "target's weight": residual.original_weight,
        "target's bias": residual.original_bias,
        "transported weight": residual.weight,
        "transported bias": residual.bias,
    }
    for what, value in values.items():
        if value is not None and not torch.isfinite(value).all():
            raise ValueError(
                f"layer {residual.layer}, projection {residual.projection}: the {what} has NaN or infinite entries; "
                "check the weights of both models, or raise --ridge"
            )
