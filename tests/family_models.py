"""Pico models of every supported family, a fused pair of them, and what stock transformers makes of the result."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from conftest import PICO, llama, make_tokenizer, qwen2, randomized, save
from safetensors.torch import save_file
from stages import fuse, plan

from core.models.families import FAMILIES

IDS = torch.randint(3, 400, (2, 9), generator=torch.Generator().manual_seed(0))
VISION = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8)
CLIP = dict(model_type="clip_vision_model", **VISION, patch_size=4, projection_dim=8)
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
TINYLLAVA_CODE = {
    "configuration.py": """
from transformers import PretrainedConfig, Qwen2Config

class TinyLlavaConfig(PretrainedConfig):
    model_type = "tinyllava"

    def __init__(self, text_config=None, **rest):
        self.text_config = Qwen2Config(**{k: v for k, v in (text_config or {}).items() if k != "model_type"})
        super().__init__(**rest)
""",
    "modeling.py": """
import torch
from transformers import PreTrainedModel, Qwen2ForCausalLM
from .configuration import TinyLlavaConfig

class TinyLlavaForConditionalGeneration(PreTrainedModel):
    config_class = TinyLlavaConfig

    def __init__(self, config):
        super().__init__(config)
        self.language_model = Qwen2ForCausalLM(config.text_config)
        self.connector = torch.nn.Linear(4, 4)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, labels=None, **rest):
        return self.language_model(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **rest)
""",
}
# Name -> function that builds a model of the family; head_dim is not hidden / heads where it may be.
MAKERS: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "llama31": lambda: llama(
        head_dim=8,
        max_position_embeddings=256,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**PICO, head_dim=12)),
    "qwen2": qwen2,
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**PICO, head_dim=12)),
    "gemma3_text": lambda: transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**PICO, head_dim=12)),
    "gemma3": lambda: transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(
            text_config=dict(**PICO, head_dim=12), vision_config=dict(**VISION, patch_size=4), mm_tokens_per_image=4
        )
    ),
    "qwen2_vl": lambda: transformers.Qwen2VLForConditionalGeneration(
        transformers.Qwen2VLConfig(
            text_config=dict(**PICO, rope_parameters=MROPE),
            vision_config=dict(depth=1, embed_dim=32, num_heads=2, hidden_size=24, patch_size=4),
        )
    ),
    "qwen2_5_vl": lambda: transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(
            text_config=dict(**PICO, rope_parameters=MROPE),
            vision_config=dict(
                depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=24, patch_size=4
            ),
        )
    ),
    "llava": lambda: transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(text_config=dict(model_type="qwen2", **PICO), vision_config=CLIP)
    ),
    "llava_llama": lambda: transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(text_config=dict(model_type="llama", **PICO), vision_config=CLIP)
    ),
    "llava_next": lambda: transformers.LlavaNextForConditionalGeneration(
        transformers.LlavaNextConfig(text_config=dict(model_type="mistral", **PICO), vision_config=CLIP)
    ),
    "llava_onevision": lambda: transformers.LlavaOnevisionForConditionalGeneration(
        transformers.LlavaOnevisionConfig(
            text_config=dict(model_type="qwen2", **PICO),
            vision_config=dict(model_type="siglip_vision_model", **VISION, patch_size=4),
        )
    ),
}


def family_model(name: str) -> Any:
    """A random pico model of a family of MAKERS."""
    return randomized(MAKERS[name]())


def save_tinyllava(folder: Path) -> Path:
    """A pico TinyLLaVA: the tensors of a Qwen2 tower and of a connector, and its classes as code in the same folder."""
    tower = randomized(transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**PICO)))
    folder.mkdir()
    tensors = {f"language_model.{name}": value.contiguous() for name, value in tower.state_dict().items()}
    save_file(
        {**tensors, "connector.weight": torch.eye(4), "connector.bias": torch.ones(4)},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    config = {
        "model_type": "tinyllava",
        "architectures": ["TinyLlavaForConditionalGeneration"],
        "text_config": tower.config.to_dict(),
        "auto_map": {
            "AutoConfig": "configuration.TinyLlavaConfig",
            "AutoModelForCausalLM": "modeling.TinyLlavaForConditionalGeneration",
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    for name, code in TINYLLAVA_CODE.items():
        (folder / name).write_text(code)
    make_tokenizer(400, 1).save_pretrained(folder)
    return folder


def make(name: str, folder: Path) -> Path:
    if name == "tinyllava":
        return save_tinyllava(folder)
    return save(family_model(name), make_tokenizer(400, 1), folder)


def fuse_pair(target: Path, source: Path, texts: Path, folder: Path, *flags: str) -> tuple[Path, Path]:
    """Plans from 24 texts, and a fused checkpoint with 4 neurons per projection; `flags` are for stage 1."""
    models = {"target": target, "source": source}
    plans = plan(models, texts, folder / "p", "--calibration-samples", 24, "--max-tokens", 16, *flags)
    fused = ("--top-k", 4, "--feature-map", "calibrated", "--alpha", 0.5)
    return plans, fuse(plans, models, folder / "f", *fused)


def stock(folder: Path, trust: bool = False):
    """The model as stock transformers loads it, with no key missing or left over."""
    family = FAMILIES[json.loads((folder / "config.json").read_text())["model_type"]]
    loader = getattr(transformers, family.auto)
    model, info = loader.from_pretrained(folder, output_loading_info=True, trust_remote_code=trust)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=IDS).logits
