"""Residual-frozen adaptation (section 4.3, Eqs. 15-18): attach, freeze, fold, and the residual's own file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from core.attention import linear_at
from core.fusion import Residual, mix
from core.runs import UserError, write_safetensors

RESIDUAL_FILE = "hot_residual.safetensors"
FREEZE_STRATEGIES = ("frozen_hot", "frozen_transport", "frozen_base", "none")


class HotResidualLinear(nn.Linear):
    """A projection with trainable base weight under its usual name and a transported residual (Eqs. 15-18).

    Computes x W_eff^T with W_eff = (1 - alpha) W + alpha W~ (`interpolate`) or W + alpha W~ (`additive`) on the
    selected rows or columns. When all are selected that is one lerp of the weight, otherwise k/n of an extra matmul.

    Parameters: weight [n, n'], bias [n] or None (the base), hot_weight [k, n'] or [n, k], hot_bias or None.
    """

    hot_index: Tensor
    hot_weight: nn.Parameter
    hot_bias: nn.Parameter | None

    def __init__(self, linear: nn.Linear, residual: Residual, alpha: float, form: str):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.hot_weight = nn.Parameter(residual.weight.to(linear.weight))
        self.hot_bias = None if residual.bias is None else nn.Parameter(residual.bias.to(linear.weight))
        self.register_buffer("hot_index", residual.index.to(linear.weight.device), persistent=False)
        self.axis, self.alpha, self.form = residual.axis, alpha, form
        self.dense = len(residual.index) == linear.weight.shape[residual.axis]

    def forward(self, x: Tensor) -> Tensor:
        """[..., n'] -> [..., n]."""
        if self.alpha == 0:
            return F.linear(x, self.weight, self.bias)
        if self.dense:
            return F.linear(x, mix(self.weight, self.hot_weight, self.alpha, self.form), self.effective_bias())
        if self.axis == 1:
            base = self.weight.index_select(1, self.hot_index) if self.form == "interpolate" else 0.0
            delta = self.hot_weight - base
            y = F.linear(x, self.weight, self.effective_bias())
            return torch.add(y, F.linear(x.index_select(-1, self.hot_index), delta), alpha=self.alpha)
        y = F.linear(x, self.weight, self.bias)
        hot = F.linear(x, self.hot_weight, self.hot_bias)
        if self.form == "interpolate" and self.hot_bias is None and self.bias is not None:
            hot = hot + self.bias[self.hot_index]  # a bias that is not fused is not damped either
        return y.index_copy(-1, self.hot_index, mix(y.index_select(-1, self.hot_index), hot, self.alpha, self.form))

    def effective_weight(self) -> Tensor:
        """W_eff [n, n']."""
        return _mix_at(self.weight, self.hot_weight, self.hot_index, self.axis, self.alpha, self.form)

    def effective_bias(self) -> Tensor | None:
        """b_eff [n]; the base bias where no bias is fused."""
        if self.bias is None or self.hot_bias is None:
            return self.bias
        if self.axis == 1:
            return mix(self.bias, self.hot_bias, self.alpha, self.form)
        return _mix_at(self.bias, self.hot_bias, self.hot_index, 0, self.alpha, self.form)


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


@torch.no_grad()
def fold_hot_residual(model: nn.Module) -> None:
    """Replace every HotResidualLinear by a plain nn.Linear that holds W_eff, in place."""
    for name, module in [(n, m) for n, m in model.named_modules() if isinstance(m, HotResidualLinear)]:
        linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
        linear.weight = nn.Parameter(module.effective_weight())
        bias = module.effective_bias()
        if bias is not None:
            linear.bias = nn.Parameter(bias.clone())
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, linear)


def set_trainable(model: nn.Module, strategy: str) -> dict[str, tuple[int, int]]:
    """Freeze by name: `frozen_hot` (= `frozen_transport`) trains the base, `frozen_base` the residual, `none` both.

    Returns:
        {"base": (trainable, frozen), "residual": (trainable, frozen)} parameter counts.
    Raises:
        ValueError: unknown strategy.
    """
    if strategy not in FREEZE_STRATEGIES:
        raise ValueError(f"freeze strategy {strategy!r}; expected one of {', '.join(FREEZE_STRATEGIES)}")
    counts = {"base": [0, 0], "residual": [0, 0]}
    for name, parameter in model.named_parameters():
        part = "residual" if name.rpartition(".")[2] in ("hot_weight", "hot_bias") else "base"
        frozen = (part == "residual") if strategy in ("frozen_hot", "frozen_transport") else (
            part == "base" and strategy == "frozen_base")  # fmt: skip
        parameter.requires_grad_(not frozen)
        counts[part][frozen] += parameter.numel()
    return {part: (trainable, frozen) for part, (trainable, frozen) in counts.items()}


def residuals_of(model: nn.Module, residuals: Iterable[Residual], name_of: Callable[[int, str], str]) -> list[Residual]:
    """The residuals with the present (trained) base and transported values of an unfolded model."""
    out = []
    for r in residuals:
        module = model.get_submodule(name_of(r.layer, r.projection))
        assert isinstance(module, HotResidualLinear)
        bias = None
        if r.original_bias is not None and module.bias is not None:
            bias = module.bias.detach() if r.axis == 1 else module.bias.detach()[module.hot_index]
        out.append(Residual(
            r.layer, r.projection, r.axis, r.index, module.hot_weight.detach(),
            None if module.hot_bias is None else module.hot_bias.detach(),
            module.weight.detach().index_select(r.axis, module.hot_index), bias))  # fmt: skip
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
        keys = sorted({tuple(name.split(".")[:2]) for name in names}, key=lambda k: (int(k[0]), "qkvo".index(k[1])))

        def read(layer: str, projection: str, field: str) -> Tensor | None:
            name = f"{layer}.{projection}.{field}"
            return file.get_tensor(name) if name in names else None

        residuals = [
            Residual(int(layer), c, int(c == "o"), *(read(layer, c, field) for field in
                     ("index", "weight", "bias", "original_weight", "original_bias")))  # type: ignore[arg-type]
            for layer, c in keys
        ]  # fmt: skip
    return residuals, settings["alpha"], settings["form"]
