"""Residual-frozen adaptation (section 4.3, Eqs. 15-18): attach, freeze, fold, and the residual's own file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from core.errors import UserError
from core.files import write_safetensors
from core.fusion.projections import PROJECTIONS
from core.fusion.residual import Residual, mix
from core.models.families import linear_at
from core.training.settings import FREEZE_STRATEGIES

RESIDUAL_FILE = "hot_residual.safetensors"
# Tokens times k over n from which making W_eff twice costs less than k/n of two matmuls: elsewhere, on a CPU.
FOLD_FROM = (1024, 24)


class HotResidualLinear(nn.Linear):
    """A projection with trainable base weight under its usual name and a transported residual (Eqs. 15-18).

    Computes x W_eff^T with W_eff = (1 - alpha) W + alpha W~ (`interpolate`) or W + alpha W~ (`additive`) on the
    selected rows or columns, in the cheaper of two ways: beside the base, k/n of an extra matmul, or through W_eff,
    which is made anew for each pass and never kept.

    Parameters: weight [n, n'], bias [n] or None (the base), hot_weight [k, n'] or [n, k], hot_bias or None.
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
        kept = 1 - alpha if form == "interpolate" else 1.0  # what is left of the base where the residual is
        self.register_buffer("hot_index", index, persistent=False)
        ones = torch.ones(size, device=index.device, dtype=linear.weight.dtype)
        self.register_buffer("base_scale", ones.index_fill(0, index, kept), persistent=False)

    def forward(self, x: Tensor, plain: bool = False) -> Tensor:
        """[..., n'] -> [..., n]; `plain`: by the base alone."""
        if plain or self.alpha == 0:
            return F.linear(x, self.weight, self.bias)
        tokens = x.numel() // self.in_features
        if self.dense or tokens * len(self.hot_index) >= FOLD_FROM[x.device.type == "cpu"] * len(self.base_scale):
            if torch.is_autocast_enabled(x.device.type):
                x = x.to(torch.get_autocast_dtype(x.device.type))
            return _ThroughEffectiveWeight.apply(x, self.weight, self.effective_bias(), self.hot_weight, self)
        return self.beside(x, lambda z: F.linear(z, self.weight, self.bias))

    def beside(self, x: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
        """The projection around any linear `base`, [..., n'] -> [..., n], that stands for W x + b.

        Rows: base(x) is scaled where the residual is, and alpha W~ x added. Columns: the same on the input's side.
        """
        b = self.bias if self.form == "interpolate" else None
        if self.axis == 0:
            # A bias that is not fused is not damped either.
            bias = self.hot_bias if self.hot_bias is not None or b is None else b[self.hot_index]
            y, hot = base(x), F.linear(x, self.hot_weight, bias)
            y = (y * self.base_scale).to(y.dtype)  # the scale is not rounded to a half type: it may be 0.995
            return y.index_add(-1, self.hot_index, hot.to(y.dtype), alpha=self.alpha)
        bias = self.hot_bias if self.hot_bias is None or b is None else self.hot_bias - b
        y = base((x * self.base_scale).to(x.dtype))
        return torch.add(y, F.linear(x.index_select(-1, self.hot_index), self.hot_weight, bias), alpha=self.alpha)

    def effective_weight(self) -> Tensor:
        """W_eff [n, n']."""
        if self.dense:
            return mix(self.weight, self.hot_weight, self.alpha, self.form)
        kept = self.weight * (self.base_scale[:, None] if self.axis == 0 else self.base_scale)  # one pass, no gather
        return kept.to(self.weight.dtype).index_add_(self.axis, self.hot_index, self.hot_weight, alpha=self.alpha)

    def effective_bias(self) -> Tensor | None:
        """b_eff [n]; the base bias where no bias is fused."""
        if self.bias is None or self.hot_bias is None:
            return self.bias
        if self.axis == 1:
            return mix(self.bias, self.hot_bias, self.alpha, self.form)
        return _mix_at(self.bias, self.hot_bias, self.hot_index, 0, self.alpha, self.form)


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
        layer, axis, index = ctx.layer, ctx.layer.axis, ctx.layer.hot_index
        wants_x, wants_weight, wants_bias, wants_hot, _ = ctx.needs_input_grad
        flat_grad, flat_x = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        d_x = d_weight = d_bias = d_hot = None
        if wants_x:
            d_x = grad @ layer.effective_weight().to(x.dtype)
        if wants_bias:
            d_bias = flat_grad.sum(0).to(weight.dtype)
        if wants_weight:
            rows, columns = flat_grad, flat_x
            if layer.form == "interpolate" and axis == 0:
                rows = (rows * layer.base_scale).to(rows.dtype)
            elif layer.form == "interpolate":
                columns = (columns * layer.base_scale).to(columns.dtype)
            d_weight = (rows.T @ columns).to(weight.dtype)
        if wants_hot:
            rows, columns = (flat_grad[:, index], flat_x) if axis == 0 else (flat_grad, flat_x[:, index])
            d_hot = (rows.T @ columns).to(hot.dtype) * layer.alpha
        return d_x, d_weight, d_bias, d_hot, None


def _mix_at(base: Tensor, hot: Tensor, index: Tensor, axis: int, alpha: float, form: str) -> Tensor:
    """`base` with `mix` applied at the selected rows or columns only; everything else bit-identical."""
    mixed = mix(base.index_select(axis, index).to(hot.dtype), hot, alpha, form)
    return base.index_copy(axis, index, mixed.to(base.dtype))


def fold_weight(weight: Tensor, residual: Residual, alpha: float, form: str) -> Tensor:
    """W_eff of a target weight [n, n'] in its own dtype (arithmetic in float32); unselected entries bit-identical."""
    return _mix_at(weight, residual.weight, residual.index, residual.axis, alpha, form)


def fold_bias(bias: Tensor, residual: Residual, alpha: float, form: str) -> Tensor:
    """b_eff of a target bias [n]: the selected rows for q, k, v, all of it for o."""
    if residual.bias is None:
        return bias
    index = residual.index if residual.axis == 0 else torch.arange(len(bias), device=bias.device)
    return _mix_at(bias, residual.bias, index, 0, alpha, form)


def enable_hot_residual_for_model(
    model: nn.Module, residuals: Iterable[Residual], name_of: Callable[[int, str], str], alpha: float, form: str
) -> list[str]:
    """Replace each fused projection of `model` by a HotResidualLinear around the same base parameters.

    Args:
        model: holds the *base* (unfused) weights; see `restore_base`.
        name_of: (layer, projection) -> module name, e.g. `AttentionLayout.name`.
        alpha, form: of the fusion.
    Returns:
        The names of the replaced modules.
    """
    names = []
    for residual in residuals:
        name = name_of(residual.layer, residual.projection)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, HotResidualLinear(linear_at(model, name), residual, alpha, form))
        names.append(name)
    return names


@torch.no_grad()
def restore_base(model: nn.Module, residuals: Iterable[Residual], name_of: Callable[[int, str], str]) -> None:
    """Undo the folding of a fused checkpoint in place: write the target's own rows and columns back, bit for bit."""
    for residual in residuals:
        linear = linear_at(model, name_of(residual.layer, residual.projection))
        weight, bias, index = linear.weight, linear.bias, residual.index.to(linear.weight.device)
        weight.index_copy_(residual.axis, index, residual.original_weight.to(weight))
        if residual.original_bias is not None and bias is not None:
            if residual.axis == 1:
                bias.copy_(residual.original_bias)
            else:
                bias.index_copy_(0, index, residual.original_bias.to(bias))


def set_trainable(model: nn.Module, strategy: str, lora: bool = False) -> dict[str, tuple[int, int]]:
    """Freeze by name: `frozen_hot` (= `frozen_transport`) trains the base, `frozen_base` the residual, `none` both;
    with `lora`, adapters train in place of the base.

    Returns:
        {"base", "residual", "adapters": (trainable, frozen)} parameter counts.
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


def residuals_in(
    state: Mapping[str, Tensor], residuals: Iterable[Residual], name_of: Callable[[int, str], str]
) -> list[Residual]:
    """The residuals with the base and transported values of an unfolded model's state dict (trained, or not yet), which
    is on the device of the residuals."""
    out = []
    for r in residuals:
        name = name_of(r.layer, r.projection)
        base = state[f"{name}.weight"].detach()
        bias = None
        if r.original_bias is not None:
            bias = state[f"{name}.bias"].detach()
            bias = bias if r.axis == 1 else bias[r.index]
        hot, hot_bias = state[f"{name}.hot_weight"].detach(), state.get(f"{name}.hot_bias")
        original = base.index_select(r.axis, r.index)
        out.append(
            replace(
                r,
                weight=hot,
                bias=None if hot_bias is None else hot_bias.detach(),
                original_weight=original,
                original_bias=bias,
            )
        )
    return out


def save_residuals(path: Path, residuals: Iterable[Residual], alpha: float, form: str) -> None:
    """Write the residual file: per projection index, W~, the target's original values; alpha and form beside them."""
    tensors: dict[str, Tensor] = {}
    for r in residuals:
        key = f"{r.layer}.{r.projection}"
        tensors |= {f"{key}.index": r.index, f"{key}.weight": r.weight, f"{key}.original_weight": r.original_weight}
        if r.bias is not None:
            tensors[f"{key}.bias"] = r.bias
        if r.original_bias is not None:
            tensors[f"{key}.original_bias"] = r.original_bias
    write_safetensors(path, tensors, {"settings": json.dumps({"alpha": alpha, "form": form})})


def join_residuals(parts: Sequence[Path], path: Path) -> None:
    """Join residual files of different layers into one; their tensors stay mapped from the parts, not in memory."""
    tensors: dict[str, Tensor] = {}
    for part in parts:
        with safe_open(part, "pt") as file:
            metadata = file.metadata()
            tensors |= {name: file.get_tensor(name) for name in file.offset_keys()}
    write_safetensors(path, tensors, metadata)


def load_residuals(path: Path) -> tuple[list[Residual], float, str]:
    """Read (residuals, alpha, form) from a residual file; UserError when it is missing."""
    if not path.is_file():
        raise UserError(f"{path} does not exist; give a folder that core/generate_hot_residual.py wrote")
    with safe_open(path, "pt") as file:
        settings = json.loads(file.metadata()["settings"])
        names = set(file.keys())
        keys = sorted(
            {tuple(name.split(".")[:2]) for name in names}, key=lambda k: (int(k[0]), list(PROJECTIONS).index(k[1]))
        )

        def read(layer: str, projection: str, field: str) -> Tensor | None:
            name = f"{layer}.{projection}.{field}"
            return file.get_tensor(name) if name in names else None

        residuals = [
            Residual(
                int(layer),
                c,
                PROJECTIONS[c].axis,
                file.get_tensor(f"{layer}.{c}.index"),
                file.get_tensor(f"{layer}.{c}.weight"),
                read(layer, c, "bias"),
                file.get_tensor(f"{layer}.{c}.original_weight"),
                read(layer, c, "original_bias"),
            )
            for layer, c in keys
        ]
    return residuals, settings["alpha"], settings["form"]
