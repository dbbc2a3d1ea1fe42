"""Stage 3 through its command line on pico models."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from stages import logits, train
from torch.testing import assert_close

from core.hot_residual import load_residuals


def test_adapted_checkpoint_is_plain_and_keeps_the_residual(fused, tmp_path):
    """The seed's flags alone: the data are those of the plans."""
    out = train(fused, tmp_path / "a", "--model_type", "llama", "--training_scenario", "hot", "--freeze_strategy",
                "frozen_transport", "--epochs", 5, "--learning-rate", "1e-3")  # fmt: skip
    assert not torch.equal(logits(out), logits(fused))
    before, after = (load_file(folder / "model.safetensors") for folder in (fused, out))
    assert before.keys() == after.keys() and not (out / "checkpoints").exists()
    trained = json.loads((out / "manifest.json").read_text())
    losses = trained["losses"]
    assert trained["status"] == "complete" and len(losses) == 20 and sum(losses[-4:]) < sum(losses[:4])
    old, new = (load_residuals(folder / "hot_residual.safetensors") for folder in (fused, out))
    for a, b in zip(old[0], new[0], strict=True):
        assert torch.equal(a.weight, b.weight) and torch.equal(a.index, b.index)
        assert not torch.equal(a.original_weight, b.original_weight)
        name = f"model.layers.{b.layer}.self_attn.{b.projection}_proj.weight"
        assert torch.equal(after[name], torch.lerp(b.original_weight, b.weight, 0.3))


def test_no_hot_trains_the_unfused_target(fused, models, tmp_path):
    from_fused = train(fused, tmp_path / "a", "--training-scenario", "no_hot")
    plain = train(models["target"], tmp_path / "b", "--training-scenario", "no_hot", "--data-file",
                  json.loads((fused / "manifest.json").read_text())["data"]["file"])  # fmt: skip
    assert torch.equal(logits(from_fused), logits(plain))
    assert not (from_fused / "hot_residual.safetensors").exists()


@pytest.mark.parametrize(
    ("strategy", "base_moves", "residual_moves"), [("frozen_base", False, True), ("none", True, True)]
)
def test_freeze_strategies_train_what_they_say(fused, tmp_path, strategy, base_moves, residual_moves):
    out = train(fused, tmp_path / "a", "--freeze-strategy", strategy)
    old, new = (load_residuals(folder / "hot_residual.safetensors")[0] for folder in (fused, out))
    assert torch.equal(old[0].original_weight, new[0].original_weight) != base_moves
    assert torch.equal(old[0].weight, new[0].weight) != residual_moves
    mlp = "model.layers.0.mlp.up_proj.weight"
    same = torch.equal(*(load_file(folder / "model.safetensors")[mlp] for folder in (fused, out)))
    assert same != base_moves


def test_alpha_zero_hot_equals_no_hot(fused, tmp_path):
    hot = train(fused, tmp_path / "a", "--alpha", "0")
    no_hot = train(fused, tmp_path / "b", "--training-scenario", "no_hot")
    assert_close(logits(hot), logits(no_hot), atol=1e-5, rtol=1e-5)


def test_killed_training_resumes_to_the_same_weights(fused, tmp_path):
    whole = train(fused, tmp_path / "whole", "--save-steps", 1)
    part = tmp_path / "part"
    command = [sys.executable, "-c", (
        "import sys, os, transformers as t; sys.path.insert(0, sys.argv.pop(1))\n"
        "class Kill(t.TrainerCallback):\n"
        "    def on_step_end(self, args, state, control, **_):\n"
        "        if state.global_step == 3: os._exit(9)\n"
        "original = t.Trainer.__init__\n"
        "def init(self, *a, **k): original(self, *a, **k); self.add_callback(Kill())\n"
        "t.Trainer.__init__ = init\n"
        "from core import train_hot_residual_sft as stage3\n"
        "stage3.main(sys.argv[1:])")]  # fmt: skip
    flags = ["--model_dir", fused, "--output_dir", part, "--sft-samples", 8, "--gradient-accumulation", 2,
             "--learning-rate", "1e-2", "--save-steps", 1]  # fmt: skip
    killed = subprocess.run([*command, ROOT, *map(str, flags)], capture_output=True)
    assert killed.returncode == 9 and (part / "checkpoints" / "checkpoint-2").is_dir()
    train(fused, part, "--save-steps", 1)
    a, b = (load_file(folder / "model.safetensors") for folder in (whole, part))
    assert all(torch.equal(a[name], b[name]) for name in a)
