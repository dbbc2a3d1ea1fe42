"""Where each model family keeps its projections. No other file knows families.

Adding a family is a row in FAMILIES and a test. Its decoder layers must have the modules of the table of projections
(core/fusion/projections.py) as linear layers. Whatever else they do, such as norms of q and k, sliding windows or rope,
stays the target's.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from torch import nn

from core.errors import UserError
from core.fusion.projections import PROJECTIONS, WIDTHS
from core.models.gguf_header import GgufHeader


@dataclass(frozen=True)
class Family:
    """Names of one model family.

    Attributes:
        architecture: its class in transformers.
        tower: path of the text decoder in the loaded model; its layers are `<tower>.layers.<n>`.
        head: path of the output embeddings in the loaded model.
        towers_on_disk: the paths that `tower` may have in the names of tensors on disk, in the order in which they are
            tried. They differ because transformers renames the tensors of vision-language models while loading them.
        heads_on_disk: the same for `head`.
        auto: the class of transformers that loads it.
        needs_code: whether its classes come with the model or from a package of its own.
    """

    architecture: str
    tower: str = "model"
    head: str = "lm_head"
    towers_on_disk: tuple[str, ...] = ("model",)
    heads_on_disk: tuple[str, ...] = ("lm_head",)
    auto: str = "AutoModelForCausalLM"
    needs_code: bool = False


def _vision_language(architecture: str, tower_on_disk: str, head_on_disk: str = "lm_head") -> Family:
    """A vision-language model of transformers, of which only the text decoder is fused."""
    tower = "model.language_model"
    return Family(
        architecture, tower, "lm_head", (tower, tower_on_disk), ("lm_head", head_on_disk), "AutoModelForImageTextToText"
    )


# config.model_type -> family
FAMILIES = {
    "llama": Family("LlamaForCausalLM"),
    "mistral": Family("MistralForCausalLM"),
    "qwen2": Family("Qwen2ForCausalLM"),
    "qwen3": Family("Qwen3ForCausalLM"),
    "gemma3_text": Family("Gemma3ForCausalLM"),
    "gemma3": _vision_language("Gemma3ForConditionalGeneration", "language_model.model", "language_model.lm_head"),
    "qwen2_vl": _vision_language("Qwen2VLForConditionalGeneration", "model"),
    "qwen2_5_vl": _vision_language("Qwen2_5_VLForConditionalGeneration", "model"),
    "llava": _vision_language("LlavaForConditionalGeneration", "language_model.model", "language_model.lm_head"),
    "llava_next": _vision_language(
        "LlavaNextForConditionalGeneration", "language_model.model", "language_model.lm_head"
    ),
    "llava_onevision": _vision_language(
        "LlavaOnevisionForConditionalGeneration", "language_model.model", "language_model.lm_head"
    ),
    "tinyllava": Family(
        "TinyLlavaForConditionalGeneration",
        "language_model.model",
        "language_model.lm_head",
        ("language_model.model",),
        ("language_model.lm_head",),
        needs_code=True,
    ),
}
# Model types of text decoders that have the projections: the families that are nothing else, and decoders that are only
# part of a vision-language model.
TOWERS = {name for name, family in FAMILIES.items() if family.tower == "model"} | {"qwen2_vl_text", "qwen2_5_vl_text"}
# For estimates alone, so that a new family need not be in either: the model types of which a head is hidden_size /
# num_attention_heads wide where the config does not state head_dim; and the architectures in GGUF files that have
# another name in a config.json.
EVEN_HEADS = {"llama", "mistral", "qwen2"}
GGUF_MODEL_TYPES = {"gemma3": "gemma3_text"}
# `--model_type` of stage 3 -> values of config.model_type
SEED_MODEL_TYPES = {
    "llama": ("llama",),
    "qwen2": ("qwen2",),
    "qwen2vl": ("qwen2_vl", "qwen2_5_vl"),
    "tinyllava": ("tinyllava", "llava"),
}


@dataclass(frozen=True)
class AttentionLayout:
    """Where the projections of one model are, and how many neurons each side has.

    Attributes:
        model_type: the family, as config.json spells it.
        n_layers: number of decoder layers.
        hidden: width of the residual stream.
        n_heads, n_kv_heads, head_dim: heads of the queries, heads of the keys and values, and the width of a head.
    """

    model_type: str
    n_layers: int
    hidden: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    inner_width: int

    @property
    def query_width(self) -> int:
        """Number of neurons of the queries of all heads, and of the outputs of all heads."""
        return self.n_heads * self.head_dim

    @property
    def key_width(self) -> int:
        """Number of neurons of the keys of all heads, and of the values of all heads."""
        return self.n_kv_heads * self.head_dim

    @property
    def family(self) -> Family:
        """Names of the model's family."""
        return FAMILIES[self.model_type]

    def size(self, side: str) -> int:
        """Number of neurons of a side."""
        return getattr(self, WIDTHS[side])

    def name(self, layer: int, projection: str) -> str:
        """Dotted name of one projection in the loaded model, e.g. `model.layers.3.self_attn.q_proj`."""
        return f"{self.family.tower}.{projection_in_tower(layer, projection)}"

    def linear(self, model: nn.Module, layer: int, projection: str) -> nn.Linear:
        """The nn.Linear of one projection in a loaded model of this layout. Raises UserError when it is another
        module."""
        return linear_at(model, self.name(layer, projection))

    def decoder(self, model: nn.Module) -> nn.Module:
        """The text decoder of a loaded model, without its head: it reads token ids and gives hidden states."""
        return model.get_submodule(self.family.tower)

    def tower_on_disk(self, names: Iterable[str], where: str) -> str:
        """The path of the text decoder in the names of a checkpoint's tensors.

        Args:
            names: of all tensors.
            where: the checkpoint, as the error names it.
        Raises:
            UserError: the last projection of the last layer has none of the names that the family may give it.
        """
        present = set(names)
        last = projection_in_tower(self.n_layers - 1, list(PROJECTIONS)[-1]) + ".weight"
        for tower in self.family.towers_on_disk:
            if f"{tower}.{last}" in present:
                return tower
        raise UserError(
            f"{where} has no tensor {self.family.towers_on_disk[-1]}.{last}; its config.json and weights do not "
            f"belong together"
        )


def projection_in_tower(layer: int, projection: str) -> str:
    """Name of one projection relative to the text decoder."""
    return f"layers.{layer}.{PROJECTIONS[projection].path}"


def linear_at(model: nn.Module, name: str) -> nn.Linear:
    """The nn.Linear of that name. Raises UserError when it is something else, such as a quantised layer."""
    module = model.get_submodule(name)
    if not isinstance(module, nn.Linear):
        raise UserError(f"{name} is a {type(module).__name__}, expected nn.Linear")
    return module


def attention_layout(config: dict[str, Any], where: str) -> AttentionLayout:
    """Read the layout from the contents of a `config.json`; in a vision-language model it is that of the text decoder.

    Args:
        where: the model, as errors name it.
    Raises:
        UserError: the family is not supported, or transformers cannot read the config.
    """
    model_type = config.get("model_type") if isinstance(config, dict) else None
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        supported = ", ".join(f"{key} ({family.architecture})" for key, family in FAMILIES.items())
        raise UserError(f"{where} has the unsupported model_type {model_type!r}; supported: {supported}")
    text = _text_config(config, where)
    if model_type not in TOWERS and text.model_type not in TOWERS:
        raise UserError(
            f"{where}: the language tower is a {text.model_type} model; supported towers: {', '.join(sorted(TOWERS))}"
        )
    heads = text.num_attention_heads
    if not heads:
        raise UserError(f"{where} has num_attention_heads {heads}")
    return AttentionLayout(
        model_type=model_type,
        n_layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        n_heads=heads,
        n_kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        inner_width=text.intermediate_size,
    )


def stated_layout(config: dict[str, Any]) -> AttentionLayout | None:
    """The layout of a text model whose config states all of it; None where the defaults of transformers' class count.

    It serves for estimates, because importing transformers takes seconds. The rest of the config is not checked.
    """
    if not isinstance(config, dict) or config.get("model_type") not in TOWERS & FAMILIES.keys():
        return None
    keys = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    numbers = [config[key] if isinstance(config.get(key), int) else 0 for key in (*keys, "intermediate_size")]
    n_layers, hidden, heads, kv_heads, head_dim, inner = numbers
    if heads and not head_dim and config["model_type"] in EVEN_HEADS:
        head_dim = hidden // heads
    if not all((n_layers, hidden, heads, kv_heads, head_dim, inner)):
        return None
    return AttentionLayout(config["model_type"], n_layers, hidden, heads, kv_heads, head_dim, inner)


def gguf_config(header: GgufHeader) -> dict[str, Any]:
    """What a GGUF file states of the projections of its model, under the names of a config.json.

    Raises:
        LookupError, TypeError, ZeroDivisionError: the file does not hold a language model.
    """
    values, architecture = header.values, header.values["general.architecture"]
    heads = values[f"{architecture}.attention.head_count"]
    return {
        "model_type": GGUF_MODEL_TYPES.get(architecture, architecture),
        "num_hidden_layers": values[f"{architecture}.block_count"],
        "hidden_size": values[f"{architecture}.embedding_length"],
        "num_attention_heads": heads,
        "num_key_value_heads": values.get(f"{architecture}.attention.head_count_kv", heads),
        # The shape of a tensor begins with the dimension that the projection reads.
        "head_dim": header.shapes["blk.0.attn_q.weight"][1] // heads,
        "intermediate_size": values.get(f"{architecture}.feed_forward_length"),
    }


def _text_config(config: dict[str, Any], where: str) -> Any:
    """The text decoder's config with the defaults of its class, because published configs leave many values out."""
    from transformers import AutoConfig

    if FAMILIES[config["model_type"]].needs_code:  # the classes are not here, but the tower is one of transformers' own
        config = config.get("text_config") or {}
        if config.get("model_type") not in TOWERS & FAMILIES.keys():
            raise UserError(
                f"{where}: text_config.model_type is {config.get('model_type')!r}; supported towers: "
                f"{', '.join(sorted(TOWERS))}"
            )
    rest = {key: value for key, value in config.items() if key != "model_type"}
    try:
        return AutoConfig.for_model(config["model_type"], **rest).get_text_config()
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{where} is not a config that transformers can read: {' '.join(str(error).split())}") from None
