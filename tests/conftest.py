"""Pico models (random, 3 and 4 layers, other widths, heads and kv heads), tokenizers and texts, built here."""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from benchmark_files import write_benchmarks

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may wait for a hub
# What a user's shell has set must not decide where a test finds models or writes results.
for variable in ("WORKSPACE_ROOT", "MODELS_ROOT", "TRANSPORT_RESULTS_ROOT", "MALAY_REPO", "YUE_BENCHMARK_ROOT"):
    os.environ.pop(variable, None)

ROOT = Path(__file__).resolve().parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"
WORDS = (
    "model layer neuron target source plan weight transport merge cost matrix row column small large language of the "
    "a with in and from reads writes keeps finds moves ภาษา โมเดล ขนาด 語言 模型 naïve café 12 345 x=1 f(x) ::"
).split()
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The two longest files first: where two files run at a time, neither process waits for them at the end."""
    items.sort(key=lambda item: not item.path.name.startswith("test_six_tasks"))


def written_by_default() -> dict[str, int]:
    """Path -> time of its last change, of every file where commands write when nothing else is said."""
    paths = [path for name in ("runs", "models", "data") for path in (ROOT / name).rglob("*") if path.is_file()]
    return {str(path.relative_to(ROOT)): path.stat().st_mtime_ns for path in paths}


@pytest.fixture(scope="session", autouse=True)
def clean_checkout() -> Iterator[None]:
    """No test writes into the checkout: each of them gives its commands a temporary folder for all that they write."""
    before = written_by_default()
    yield
    written = sorted(path for path, time in written_by_default().items() if before.get(path) != time)
    assert not written, f"written into {ROOT} by a test, or by a command that ran meanwhile: {', '.join(written)}"


def sentences(count: int, seed: int, length: int = 14) -> list[str]:
    """Distinct generated texts."""
    rng = random.Random(seed)
    return [f"{n} " + " ".join(rng.choices(WORDS, k=rng.randint(length // 2, length))) for n in range(count)]


def make_tokenizer(vocab_size: int, seed: int) -> Any:
    """A byte-level BPE tokenizer trained on generated text, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(sentences(200, seed), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    fast.chat_template = TEMPLATE
    return fast


def llama(**changes: Any) -> Any:
    """A random pico LLaMA: tied embeddings, no biases, head_dim that is not hidden / heads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = dict(
        vocab_size=400,
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=12,
        tie_word_embeddings=True,
    )
    return randomized(LlamaForCausalLM(LlamaConfig(**{**settings, **changes})))


def qwen2(**changes: Any) -> Any:
    """A random pico Qwen2: q, k, v biases, untied embeddings."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    settings = dict(
        vocab_size=500,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    return randomized(Qwen2ForCausalLM(Qwen2Config(**{**settings, **changes})))


TEXT = dict(
    vocab_size=400,
    hidden_size=24,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=3,
    num_key_value_heads=1,
)
CLIP = dict(
    model_type="clip_vision_model",
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    image_size=8,
    patch_size=4,
    projection_dim=8,
)
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


def family_model(name: str) -> Any:
    """A random pico model of any supported family of transformers; head_dim is not hidden / heads where it may be."""
    import transformers as t

    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8)
    makers: dict[str, Callable[[], Any]] = {
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
        "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**TEXT, head_dim=12)),
        "qwen2": qwen2,
        "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**TEXT, head_dim=12)),
        "gemma3_text": lambda: t.Gemma3ForCausalLM(t.Gemma3TextConfig(**TEXT, head_dim=12)),
        "gemma3": lambda: t.Gemma3ForConditionalGeneration(
            t.Gemma3Config(
                text_config=dict(**TEXT, head_dim=12), vision_config=dict(**vision, patch_size=4), mm_tokens_per_image=4
            )
        ),
        "qwen2_vl": lambda: t.Qwen2VLForConditionalGeneration(
            t.Qwen2VLConfig(
                text_config=dict(**TEXT, rope_parameters=MROPE),
                vision_config=dict(depth=1, embed_dim=32, num_heads=2, hidden_size=24, patch_size=4),
            )
        ),
        "qwen2_5_vl": lambda: t.Qwen2_5_VLForConditionalGeneration(
            t.Qwen2_5_VLConfig(
                text_config=dict(**TEXT, rope_parameters=MROPE),
                vision_config=dict(
                    depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=24, patch_size=4
                ),
            )
        ),
        "llava": lambda: t.LlavaForConditionalGeneration(
            t.LlavaConfig(text_config=dict(model_type="qwen2", **TEXT), vision_config=CLIP)
        ),
        "llava_llama": lambda: t.LlavaForConditionalGeneration(
            t.LlavaConfig(text_config=dict(model_type="llama", **TEXT), vision_config=CLIP)
        ),
        "llava_next": lambda: t.LlavaNextForConditionalGeneration(
            t.LlavaNextConfig(text_config=dict(model_type="mistral", **TEXT), vision_config=CLIP)
        ),
        "llava_onevision": lambda: t.LlavaOnevisionForConditionalGeneration(
            t.LlavaOnevisionConfig(
                text_config=dict(model_type="qwen2", **TEXT),
                vision_config=dict(model_type="siglip_vision_model", **vision, patch_size=4),
            )
        ),
    }
    return randomized(makers[name]())


def save_tinyllava(folder: Path) -> Path:
    """A pico TinyLLaVA: a Qwen2 tower and a connector in tensors, its classes as code beside them."""
    from safetensors.torch import save_file
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tower = randomized(Qwen2ForCausalLM(Qwen2Config(**TEXT)))
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


def randomized(model: Any) -> Any:
    """Weights large enough that attention is not uniform, norms and biases away from 1 and 0; deterministic."""
    generator = torch.Generator().manual_seed(model.config.get_text_config().hidden_size)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = 0.3 if parameter.ndim == 2 else 0.1
            parameter.copy_(noise * scale + (1.0 if name.endswith("norm.weight") else 0.0))
    return model.float()


def save(model: Any, tokenizer: Any, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of the pico models: `target` (LLaMA), `source` (Qwen2), `other` (a LLaMA of the same shape)."""
    folder = tmp_path_factory.mktemp("models")
    small, large = make_tokenizer(400, 1), make_tokenizer(500, 2)
    other = llama()
    with torch.no_grad():
        other.model.layers[0].self_attn.q_proj.weight.add_(0.1)
    return {
        "target": save(llama(), small, folder / "target"),
        "source": save(qwen2(), large, folder / "source"),
        "other": save(other, small, folder / "other"),
    }


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .jsonl of 120 generated texts."""
    path = tmp_path_factory.mktemp("data") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in sentences(120, 3)), "utf-8")
    return path


@pytest.fixture(scope="session")
def benchmark_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few items of every benchmark, in the layout of its release; not to be changed."""
    return write_benchmarks(tmp_path_factory.mktemp("benchmarks"))


@pytest.fixture(scope="session")
def warm_python() -> Iterator[Path]:
    """A folder with a `python` for scripts that does not import torch, transformers and lm-eval at every command."""
    from warm_python import start_server, write_stand_in

    with tempfile.TemporaryDirectory() as folder:  # a socket's path may have 107 characters
        server = start_server(Path(folder) / "socket")
        write_stand_in(Path(folder) / "bin", Path(folder) / "socket")
        yield Path(folder) / "bin"
        server.kill()
        server.wait()


@pytest.fixture(scope="session")
def environment(
    models: dict[str, Path], benchmark_data: Path, warm_python: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """The variables with which `run_train_final.sh` runs on the pico models and on generated rows."""
    from six_tasks import make_environment

    return make_environment(models, benchmark_data, tmp_path_factory.mktemp("six"), warm_python)


def run_main(module: ModuleType, *arguments: Any) -> None:
    """Call a command's main in this process."""
    module.main([str(argument) for argument in arguments])


@pytest.fixture
def fails(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must end with exit code 2 and one line on stderr; returns that line."""
    from core.runs.process import run_command

    def run(module: ModuleType, *arguments: Any) -> str:
        monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            run_command(module.main)
        assert stop.value.code == 2
        lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
        assert len(lines) == 1
        return lines[0]

    return run


@pytest.fixture(scope="session")
def plans(models: dict[str, Path], texts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Plan directories of the pico pair with `token` and `text` pooling."""
    import run_activs_and_hot as stage1

    folders = {}
    for pooling in ("token", "text"):
        folders[pooling] = tmp_path_factory.mktemp("plans") / pooling
        run_main(
            stage1,
            "--target-model",
            models["target"],
            "--source-model",
            models["source"],
            "--data-subset",
            "file",
            "--data-file",
            texts,
            "--pooling",
            pooling,
            "--max-tokens",
            24,
            "--out-dir",
            folders[pooling],
        )
    return folders


@pytest.fixture(scope="session")
def fused(models: dict[str, Path], plans: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fused checkpoint of the pico pair (token rows, regression, dense)."""
    from stages import fuse

    return fuse(
        plans["token"],
        models,
        tmp_path_factory.mktemp("fused") / "out",
        "--feature-map",
        "regression",
        "--alpha",
        "0.3",
        "--top-k",
        "0",
    )
