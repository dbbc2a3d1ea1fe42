"""Helpers for tests of the stages: command lines, digests of folders, logits of stock transformers, interruptions."""

import contextlib
import hashlib
import json
from pathlib import Path

import pytest
import torch
from conftest import run_main
from huggingface_hub import ModelCard

import run_activs_and_hot as stage1
from core import generate_hot_residual as stage2
from core import train_hot_residual_sft as stage3


def pair_flags(models: dict[str, Path], target: str = "target", source: str = "source") -> list:
    return ["--target-model", models[target], "--source-model", models[source]]


def data_flags(file: Path | str) -> list:
    return ["--data-subset", "file", "--data-file", file]


def plan_flags(models: dict[str, Path], texts: Path | str, out: Path, *flags) -> list:
    """The command line of stage 1 for texts that are cut at 24 tokens; later flags win."""
    return [*pair_flags(models), *data_flags(texts), "--max-tokens", 24, "--out-dir", out, *flags]


def plan(models: dict[str, Path], texts: Path | str, out: Path, *flags) -> Path:
    run_main(stage1, *plan_flags(models, texts, out, *flags))
    return out


def fuse(plans: Path, models: dict[str, Path], out: Path, *flags, target="target", source="source") -> Path:
    run_main(stage2, "--hot_dir", plans, *pair_flags(models, target, source), "--output_dir", out, *flags)
    return out


def fuse_by_id(plans: dict[str, Path], out: Path, *flags) -> Path:
    """Stage 2 with the two models of the fixture `hub_root`, in the spelling of the seed's README."""
    pair = ["--modelA_id", "someone/small", "--modelB_id", "someone/big"]
    run_main(stage2, "--hot_dir", plans["token"], *pair, "--feature-map", "regression", "--output_dir", out, *flags)
    return out


def front_matter(folder: Path) -> dict:
    return ModelCard.load(folder / "README.md").data.to_dict()


def digests(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def logits(folder: Path) -> torch.Tensor:
    """The logits of a checkpoint that stock transformers loads, without any code of ours."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        return model.eval()(torch.arange(40).reshape(2, 20)).logits


def train(model_dir: Path, out: Path, *flags) -> Path:
    """Stage 3 on 8 rows with an update after every 2 of them."""
    few = ["--sft-samples", 8, "--gradient-accumulation", 2, "--learning-rate", "1e-2"]
    run_main(stage3, "--model_dir", model_dir, "--output_dir", out, *few, *flags)
    return out


@contextlib.contextmanager
def killed(monkeypatch, event: str, when):
    """Interrupt every training inside at the first `event` of the Trainer at which `when(state, control)` is true."""
    from transformers import Trainer, TrainerCallback

    class Kill(TrainerCallback):
        pass

    def stop(self, args, state, control, **_):
        if when(state, control):
            raise KeyboardInterrupt

    setattr(Kill, event, stop)
    original = Trainer.__init__

    def with_kill(trainer, *arguments, **options):
        original(trainer, *arguments, **options)
        trainer.add_callback(Kill())

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "__init__", with_kill)
        with pytest.raises(KeyboardInterrupt):
            yield


def run(fused: Path, out: Path, *flags) -> Path:
    """Stage 3 on 8 rows, 4 updates, with 4 rows to validate on."""
    return train(fused, out, "--validation-samples", 4, *flags)


def losses(folder: Path) -> list[float]:
    return json.loads((folder / "manifest.json").read_text())["losses"]
