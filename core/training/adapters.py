"""LoRA (peft) around projections with a transported residual: trained in place of the base, and merged into it."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from core.errors import UserError
from core.training.hot_linear import HotResidualLinear
from core.training.settings import AdapterSettings


class HotLoraLinear(LoraLinear):
    """A HotResidualLinear whose base is W + s B A, with an adapter B [n, r] and A [r, n'] that trains.

    The scale s is lora_alpha / lora_rank. The residual is mixed with the adapted base (Eqs. 15-18), so that merging the
    adapter into W gives the same function.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[..., n'] -> [..., n]."""
        adapted = super().forward
        return self.get_base_layer().forward_with_base(x, lambda z: adapted(z, *args, plain=True, **kwargs))


def add_lora(model: Any, tower: str, settings: AdapterSettings) -> int:
    """Put LoRA adapters on linear layers of the text decoder, in place, and freeze everything else.

    Args:
        tower: path of the text decoder in the model.
        settings: `lora_targets` names the layers, separated by commas, or is `all-linear`.
    Returns:
        The number of adapted layers.
    Raises:
        UserError: the decoder has no layer of one of these names.
    """
    linear = [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name.startswith(tower + ".")
    ]
    found = {name.rpartition(".")[2] for name in linear}
    targets = settings.lora_targets
    wanted = found if targets == "all-linear" else {target.strip() for target in targets.split(",")}
    if missing := sorted(wanted - found):
        raise UserError(f"lora_targets: the model has no layer {', '.join(missing)}; it has {', '.join(sorted(found))}")
    chosen = [name for name in linear if name.rpartition(".")[2] in wanted]
    config = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=chosen,
    )
    # peft offers no public way to say which adapter a layer of our own gets.
    config._register_custom_module({HotResidualLinear: HotLoraLinear})
    inject_adapter_in_model(config, model)
    return len(chosen)


def merge_lora(model: nn.Module) -> None:
    """Merge every adapter into its base weight, W <- W + s B A, and put the base layer back, in place."""
    for name, module in [(n, m) for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)]:
        module.merge()
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module.get_base_layer())
