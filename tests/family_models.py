"""What the tests of model families share: pico models, a fused pair, models and logits by stock transformers."""

import json
from pathlib import Path

import torch
import transformers
from conftest import family_model, make_tokenizer, run_main, save, save_tinyllava

import run_activs_and_hot as stage1
from core import generate_hot_residual as stage2
from core.models.families import FAMILIES

IDS = torch.randint(3, 400, (2, 9), generator=torch.Generator().manual_seed(0))


def make(name: str, folder: Path) -> Path:
    if name == "tinyllava":
        return save_tinyllava(folder)
    return save(family_model(name), make_tokenizer(400, 1), folder)


def fuse_pair(target: Path, source: Path, texts: Path, folder: Path, *flags: str) -> tuple[Path, Path]:
    """Plans and a fused checkpoint of 4 neurons per projection."""
    run_main(
        stage1,
        "--target-model",
        target,
        "--source-model",
        source,
        "--data-subset",
        "file",
        "--data-file",
        texts,
        "--calibration-samples",
        24,
        "--max-tokens",
        16,
        "--out-dir",
        folder / "p",
        *flags,
    )
    run_main(
        stage2,
        "--target-model",
        target,
        "--source-model",
        source,
        "--hot-dir",
        folder / "p",
        "--top-k",
        4,
        "--feature-map",
        "calibrated",
        "--alpha",
        0.5,
        "--output-dir",
        folder / "f",
    )
    return folder / "p", folder / "f"


def stock(folder: Path, trust: bool = False):
    """The model as transformers loads it, every key in its place."""
    family = FAMILIES[json.loads((folder / "config.json").read_text())["model_type"]]
    loader = getattr(transformers, family.auto)
    model, info = loader.from_pretrained(folder, output_loading_info=True, trust_remote_code=trust)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=IDS).logits
