"""What the tests of the stages share: their command lines, digests of folders, logits by stock transformers."""

import hashlib
from pathlib import Path

import torch
from conftest import run_main

from core import generate_hot_residual as stage2
from core import train_hot_residual_sft as stage3


def fuse(plans: Path, models: dict[str, Path], out: Path, *flags, target="target", source="source") -> Path:
    run_main(stage2, "--hot_dir", plans, "--modelA_id", models[target], "--modelB_id", models[source],
             "--output_dir", out, *flags)  # fmt: skip
    return out


def digests(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in sorted(folder.rglob("*")) if p.is_file()}  # fmt: skip


def logits(folder: Path, caplog=None) -> torch.Tensor:
    """Stock transformers, no code of ours."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        return model.eval()(torch.arange(40).reshape(2, 20)).logits


def train(model_dir: Path, out: Path, *flags) -> Path:
    run_main(stage3, "--model_dir", model_dir, "--output_dir", out, "--sft-samples", 8, "--gradient-accumulation", 2,
             "--learning-rate", "1e-2", *flags)  # fmt: skip
    return out
