"""Pico models (random, 3 and 4 layers, other widths, heads and kv heads), tokenizers and texts, built here."""

from __future__ import annotations

import json
import os
import random
import shutil
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


# The widths and depth of a pico text model.
PICO = dict(
    vocab_size=400,
    hidden_size=24,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=3,
    num_key_value_heads=1,
)


def llama(**changes: Any) -> Any:
    """A random pico LLaMA: tied embeddings, no biases, head_dim that is not hidden / heads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {**PICO, "head_dim": 12, "tie_word_embeddings": True}
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
def hub_root(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder with someone/small (the target) and someone/big (the source), both without cards."""
    folder = tmp_path_factory.mktemp("root")
    shutil.copytree(models["target"], folder / "someone/small")
    shutil.copytree(models["source"], folder / "someone/big")
    return folder


@pytest.fixture
def licensed(hub_root: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A function (front matter of the card of someone/small, of someone/big) that writes both cards; None: no card."""
    monkeypatch.setenv("MODELS_ROOT", str(hub_root))

    def write(*front_matters: str | None) -> None:
        for name, text in zip(("small", "big"), front_matters, strict=True):
            card = hub_root / "someone" / name / "README.md"
            card.unlink(missing_ok=True)
            if text is not None:
                card.write_text(f"---\n{text}\n---\n# A model\n")

    return write


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
    from stages import plan

    folder = tmp_path_factory.mktemp("plans")
    return {pooling: plan(models, texts, folder / pooling, "--pooling", pooling) for pooling in ("token", "text")}


@pytest.fixture(scope="session")
def fused(models: dict[str, Path], plans: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fused checkpoint of the pico pair (token rows, regression, dense)."""
    from stages import fuse

    flags = ("--feature-map", "regression", "--alpha", "0.3", "--top-k", "0")
    return fuse(plans["token"], models, tmp_path_factory.mktemp("fused") / "out", *flags)


@pytest.fixture(scope="session")
def reported(models: dict[str, Path], texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with one seed, whose strongest neurons are fused, and its report; not to be changed."""
    from stages import data_flags, fuse, pair_flags, plan, train

    from evaluation import compare_arms, report

    folder = tmp_path_factory.mktemp("runs") / "small"
    plans = plan(models, texts, folder / "plans", "--pooling", "token")
    fused = fuse(plans, models, folder / "fused", "--feature-map", "regression", "--top-k", 7)
    for scenario in ("hot", "no_hot"):
        out = folder / "adapted" / scenario / "seed0"
        train(fused, out, "--validation-samples", 4, "--training-scenario", scenario)
    run_main(compare_arms, "--run-dir", folder, *pair_flags(models), *data_flags(texts))
    run_main(report, folder)
    return folder
