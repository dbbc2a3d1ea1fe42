"""What fusing does to one projection: the selected neurons, W~ on them, and how the two weights are mixed."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

RESIDUAL_FORMS = ("interpolate", "additive")


@dataclass(frozen=True)
class Residual:
    """The transported part of one projection: W~ on the selected rows or columns.

    Attributes:
        layer, projection: which target projection.
        axis: 0 when rows are selected (q, k, v), 1 when columns are (o).
        index: [k] selected rows or columns, ascending.
        weight: W~ on them, [k, n'] or [n, k], float32.
        bias: b~, [k] (rows) or [n] (columns); None where the bias is not fused.
        original_weight, original_bias: the target's own values at the same places.
    """

    layer: int
    projection: str
    axis: int
    index: Tensor
    weight: Tensor
    bias: Tensor | None
    original_weight: Tensor
    original_bias: Tensor | None

    def to(self, device: str) -> Residual:
        """The same residual with its tensors on `device`."""
        return replace(
            self,
            index=self.index.to(device),
            weight=self.weight.to(device),
            bias=None if self.bias is None else self.bias.to(device),
            original_weight=self.original_weight.to(device),
            original_bias=None if self.original_bias is None else self.original_bias.to(device),
        )


def select(strongest: Tensor, top_k: int) -> Tensor:
    """The `top_k` strongest neurons in ascending order (section 4.2); all of them for 0 or top_k >= n."""
    k = len(strongest) if top_k == 0 else min(top_k, len(strongest))
    return strongest[:k].sort().values


def mix(base: Tensor, transported: Tensor, alpha: float, form: str) -> Tensor:
    """W_eff on selected neurons: (1 - alpha) W + alpha W~ (`interpolate`, Eqs. 14, 22) or W + alpha W~
    (`additive`, Eqs. 15, 16, 18). alpha 0 returns `base` bit for bit."""
    if alpha == 0:
        return base.clone()
    if form == "interpolate":
        return torch.lerp(base, transported, alpha)
    return torch.add(base, transported, alpha=alpha)


def check_finite(residual: Residual) -> None:
    """Raises ValueError for weights that are no numbers: of a damaged model, or beyond float32."""
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
