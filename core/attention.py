"""Where each model family keeps its attention projections. The only file that knows families.

Adding a family is a row in FAMILIES plus a test.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from core.fusion import PROJECTIONS
from core.runs import UserError

# Six distinct sides: q, k and v read the same input.
SIDES = (*PROJECTIONS, "attn_in", "o_in")


@dataclass(frozen=True)
class Family:
    """Names of one model family. `layers` is the path of the decoder layers, in the model and on disk alike."""

    architecture: str
    layers: str = "model.layers"
    attention: str = "self_attn"
    projection: str = "{}_proj"


# config.model_type -> family
FAMILIES = {
    "llama": Family("LlamaForCausalLM"),
    "qwen2": Family("Qwen2ForCausalLM"),
}
# `--model_type` of step 3 -> config.model_type
SEED_MODEL_TYPES = {"llama": "llama", "qwen2": "qwen2", "qwen2vl": "qwen2_vl", "tinyllava": "tinyllava"}


@dataclass(frozen=True)
class AttentionLayout:
    """Attention shapes of one model: where its projections are and how many neurons each side has."""

    model_type: str
    n_layers: int
    hidden: int
    n_heads: int
    n_kv_heads: int
    head_dim: int

    def size(self, side: str) -> int:
        """Number of neurons of `side`."""
        if side == "attn_in" or side == "o":
            return self.hidden
        return (self.n_kv_heads if side in "kv" else self.n_heads) * self.head_dim

    def name(self, layer: int, projection: str) -> str:
        """Dotted name of one projection, e.g. `model.layers.3.self_attn.q_proj` (add `.weight` for the tensor)."""
        family = FAMILIES[self.model_type]
        return f"{family.layers}.{layer}.{family.attention}.{family.projection.format(projection)}"

    def linear(self, model: nn.Module, layer: int, projection: str) -> nn.Linear:
        """The nn.Linear of one projection inside a loaded model (of `config`'s architecture)."""
        return linear_at(model, self.name(layer, projection))


def linear_at(model: nn.Module, name: str) -> nn.Linear:
    """The nn.Linear of that name; UserError when it is something else (a quantised or patched layer)."""
    module = model.get_submodule(name)
    if not isinstance(module, nn.Linear):
        raise UserError(f"{name} is a {type(module).__name__}, expected nn.Linear")
    return module


def attention_layout(config: dict[str, Any], where: str) -> AttentionLayout:
    """Read the attention shapes from a model's `config.json`.

    Raises UserError for an unsupported family (naming `where` and what is supported).
    """
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        supported = ", ".join(f"{key} ({family.architecture})" for key, family in FAMILIES.items())
        raise UserError(f"{where} has the unsupported model_type {model_type!r}; supported: {supported}")
    heads = config["num_attention_heads"]
    return AttentionLayout(
        model_type=model_type,
        n_layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        n_heads=heads,
        n_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
    )
