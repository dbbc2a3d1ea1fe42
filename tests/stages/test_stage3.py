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

from core import train_hot_residual_sft as stage3
from core.data import DataSpec, load_rows
from core.fusion.residual_file import load_residuals
from core.models.checkpoints import open_checkpoint
from core.training.heldout import text_nll, trained_tokens
from core.training.sft import sft_example


def test_adapted_checkpoint_is_plain_and_keeps_the_residual(fused, tmp_path):
    """With the flags of the seed alone, which name no data: the rows are those of the plans' data set."""
    seed_flags = "--model_type llama --training_scenario hot --freeze_strategy frozen_transport".split()
    out = train(fused, tmp_path / "a", *seed_flags, "--epochs", 5, "--learning-rate", "1e-3")
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
    data_file = json.loads((fused / "manifest.json").read_text())["data"]["file"]
    plain = train(models["target"], tmp_path / "b", "--training-scenario", "no_hot", "--data-file", data_file)
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


# Stage 3 in a process that ends after its third update, as if it were killed.
KILLED = """
import sys, os, transformers as t; sys.path.insert(0, sys.argv.pop(1))
class Kill(t.TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        if state.global_step == 3: os._exit(9)
original = t.Trainer.__init__
def init(self, *a, **k): original(self, *a, **k); self.add_callback(Kill())
t.Trainer.__init__ = init
from core import train_hot_residual_sft as stage3
stage3.main(sys.argv[1:])
"""


def test_killed_training_resumes_to_the_same_weights(fused, tmp_path):
    whole = train(fused, tmp_path / "whole", "--save-steps", 1)
    part = tmp_path / "part"
    flags = "--sft-samples 8 --gradient-accumulation 2 --learning-rate 1e-2 --save-steps 1".split()
    command = [sys.executable, "-c", KILLED, ROOT, "--model_dir", fused, "--output_dir", part, *flags]
    killed = subprocess.run(command, capture_output=True)
    assert killed.returncode == 9 and (part / "checkpoints/trial0/checkpoint-2").is_dir()
    train(fused, part, "--save-steps", 1)
    a, b = (load_file(folder / "model.safetensors") for folder in (whole, part))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_seed_flags_and_data_order_are_the_seeds_own(fused, tmp_path):
    a, b = (train(fused, tmp_path / f"s{seed}", "--seed", seed) for seed in (0, 1))
    assert not torch.equal(logits(a), logits(b))


def test_curve_and_card_describe_the_run(fused, tmp_path):
    flags = "--eval-steps 2 --warmup 2 --weight-decay 0.1 --lr-scheduler cosine --validation-samples 3".split()
    out = train(fused, tmp_path / "a", *flags)
    curve = json.loads((out / "loss_curve.json").read_text())
    assert [point["update"] for point in curve["train"]] == [1, 2, 3, 4]
    assert [point["update"] for point in curve["validation"]] == [0, 2, 4]
    rates = [point["learning_rate"] for point in curve["train"]]
    assert rates[0] == 0.0 and rates[1] == pytest.approx(0.005) and rates[2] == pytest.approx(0.01)
    assert rates[3] == pytest.approx(0.005)  # half way down the cosine
    assert (out / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
    card = (out / "README.md").read_text()
    assert "validation loss: " in card and "8 texts" in card and "| training | lr_scheduler | cosine |" in card
    assert "131 tokens, 123 of them with loss" in card
    trained = json.loads((out / "manifest.json").read_text())
    start = open_checkpoint(str(fused))
    texts = load_rows(DataSpec("file", trained["data"]["file"]), "validation", 3)
    examples = [sft_example(row, start.load_tokenizer(), 2048) for row in texts]
    for n, folder in ((0, fused), (-1, out)):
        model = open_checkpoint(str(folder)).load_model("float32")
        nll = sum(text_nll(model, examples, 64, "x")) / sum(trained_tokens(examples))
        assert trained["validation"][n] == pytest.approx(nll, abs=1e-5)


@pytest.mark.parametrize(("flags", "updates"), [([], [0, 4, 8]), (["--packing", "--block-size", 80], [0, 1, 2])])
def test_validation_is_once_per_epoch_unless_asked_otherwise(fused, tmp_path, flags, updates):
    out = train(fused, tmp_path / "a", "--epochs", 2, *flags)
    curve = json.loads((out / "loss_curve.json").read_text())
    assert [point["update"] for point in curve["validation"]] == updates
    assert curve["final_validation"] == curve["validation"][-1]["loss"]


def test_early_stop_takes_the_best_validation(fused, tmp_path):
    out = train(fused, tmp_path / "a", "--early-stop", 2, "--save-steps", 1, "--epochs", 4, "--learning-rate", "0.3")
    curve = json.loads((out / "loss_curve.json").read_text())
    losses = [point["loss"] for point in curve["validation"]]
    assert len(losses) < 17 and len(curve["train"]) == len(losses) - 1
    best = min(losses[1:])
    assert losses.index(best) == len(losses) - 3 and curve["final_validation"] == best
    start = open_checkpoint(str(out))
    data = DataSpec("file", json.loads((out / "manifest.json").read_text())["data"]["file"])
    texts = load_rows(data, "validation", 32)
    examples = [sft_example(row, start.load_tokenizer(), 2048) for row in texts]
    nll = sum(text_nll(start.load_model("float32"), examples, 64, "x")) / sum(trained_tokens(examples))
    assert nll == pytest.approx(best, abs=1e-5)


def test_untrained_folded_can_be_asked_for_later(fused, tmp_path):
    train(fused, tmp_path / "a")
    train(fused, tmp_path / "a", "--save-untrained-folded")
    assert torch.equal(logits(tmp_path / "a-untrained"), logits(fused))


def test_tensorboard_files_outlive_the_resume_points(fused, tmp_path):
    pytest.importorskip("tensorboard")
    out = train(fused, tmp_path / "a", "--report-to", "tensorboard")
    assert list((out / "logs").rglob("events.*"))


def test_untrained_folded_is_the_fused_start_at_the_train_alpha(fused, models, tmp_path):
    train(fused, tmp_path / "a", "--save-untrained-folded")
    assert torch.equal(logits(tmp_path / "a-untrained"), logits(fused))
    train(fused, tmp_path / "b", "--save-untrained-folded", "--alpha", "0")
    assert torch.equal(logits(tmp_path / "b-untrained"), logits(models["target"]))
    train(fused, tmp_path / "c", "--save-untrained-folded", "--training-scenario", "no_hot")
    assert torch.equal(logits(tmp_path / "c-untrained"), logits(models["target"]))


def test_a_non_finite_loss_is_reported(fused, fails, tmp_path):
    flags = "--sft-samples 8 --learning-rate 1e38 --max-grad-norm 0 --gradient-accumulation 1".split()
    message = fails(stage3, "--model_dir", fused, "--output_dir", tmp_path / "a", *flags)
    assert "lower the learning rate" in message and "at update" in message


def test_a_logging_service_that_is_not_installed_is_reported(fused, fails, tmp_path):
    message = fails(stage3, "--model_dir", fused, "--output_dir", tmp_path / "a", "--report-to", "trackio,nothing")
    assert "training cannot begin" in message


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--warmup", "2", "--lr-scheduler", "constant"], "take constant_with_warmup"),
        (["--eval-steps", "2", "--validation-samples", "0"], "give --validation-samples"),
        (["--save-untrained-folded", "--alpha-search", "0.1,0.2"], "leave alpha_search out"),
        (["--freeze-strategy", "frozen_base", "--alpha-search", "0.1,0"], "alpha 0 leaves nothing to train"),
        (["--warmup", "1.5"], "warmup is 1.5; expected a share below 1, or a whole number"),
        (["--weight-decay", "-1"], "weight_decay is -1.0; expected 0 or more"),
        (["--alpha-search", "0.1,2"], "alpha_search is 2.0; expected a number from 0 to 1"),
        (["--lr-search", "0"], "lr_search is 0.0; expected a positive number"),
        (["--lr-search", "a"], "invalid"),
        (["--early-stop", "1", "--validation-samples", "0"], "choose on validation rows; give --validation-samples"),
        (["--early-stop", "1", "--eval-steps", "7"], "leave eval_steps out"),
        (["--alpha-search", "0.1", "--alpha", "0.1"], "exclude each other"),
        (["--use-lora", "--freeze-strategy", "frozen_base"], "leave out one of the two"),
        (["--use-lora", "--lora-targets", "w_proj"], "the model has no layer w_proj; it has down_proj"),
        (["--training-scenario", "distill", "--source-model", "TARGET"], "is not the source of"),
    ],
)
def test_bad_training_settings_are_reported(fused, models, fails, tmp_path, flags, message):
    flags = [models["target"] if flag == "TARGET" else flag for flag in flags]
    assert message in fails(stage3, "--model_dir", fused, "--output_dir", tmp_path / "a", *flags)
