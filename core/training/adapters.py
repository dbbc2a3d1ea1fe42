"""LoRA (peft) around projections with a transported residual: trained beside the base, merged into it."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from core.errors import UserError
from core.training.hot_linear import HotResidualLinear


class HotLoraLinear(LoraLinear):
    """A HotResidualLinear whose base is W + B A: the residual is mixed with the adapted base, so that merging the
    adapter into W gives the same function."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[..., n'] -> [..., n]."""
        adapted = super().forward
        return self.get_base_layer().forward_with_base(x, lambda z: adapted(z, *args, plain=True, **kwargs))


def add_lora(model: Any, tower: str, rank: int, alpha: float, dropout: float, targets: str) -> int:
    """Put LoRA adapters on the linear layers of the text decoder, in place; everything else is frozen.

    Args:
        tower: path of the text decoder.
        targets: names of layers, separated by commas, or `all-linear`.
    Returns:
        Number of adapted layers.
    Raises:
        UserError: a target that the decoder does not have.
    """
    linear = [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name.startswith(tower + ".")
    ]
    found = {name.rpartition(".")[2] for name in linear}
    wanted = found if targets == "all-linear" else {target.strip() for target in targets.split(",")}
    if missing := sorted(wanted - found):
        raise UserError(f"lora_targets: the model has no layer {', '.join(missing)}; it has {', '.join(sorted(found))}")
    chosen = [name for name in linear if name.rpartition(".")[2] in wanted]
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=chosen)
    config._register_custom_module({HotResidualLinear: HotLoraLinear})  # peft's way to support a layer of one's own
    inject_adapter_in_model(config, model)
    return len(chosen)


def merge_lora(model: nn.Module) -> None:
    """Merge every adapter into its base weight and put the plain (or hot) layer back, in place."""
    for name, module in [(n, m) for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)]:
        module.merge()
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module.get_base_layer())
