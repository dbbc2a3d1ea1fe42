"""Every option of stage 3 through the command, for each kind of model."""

import json

import pytest
import torch
from family_models import fuse_pair, logits, make, stock
from safetensors.torch import load_file
from stages import killed, losses, run

from core import train_hot_residual_sft as stage3
from core.data import DataSpec, load_rows
from core.models.checkpoints import open_checkpoint
from core.training.heldout import text_nll, trained_tokens
from core.training.hot_linear import HotResidualLinear
from core.training.sft import sft_example

KINDS = {"llama": "llama", "qwen2": "qwen2", "qwen2_vl": "qwen2vl", "llava": "tinyllava"}


@pytest.fixture(scope="module", params=list(KINDS))
def kind(request, models, texts, tmp_path_factory):
    """(model kind, fused checkpoint of that kind, plain training of it)."""
    folder = tmp_path_factory.mktemp(request.param)
    target = make(request.param, folder / "own")
    _, out = fuse_pair(target, models["other"], texts, folder)
    return request.param, out, run(out, folder / "plain")


def check_validation(folder):
    """The folder, as stock transformers loads it, has the validation loss that the end of training reported."""
    record = json.loads((folder / "manifest.json").read_text())
    tokenizer = open_checkpoint(str(folder)).load_tokenizer()
    rows = load_rows(DataSpec("file", record["data"]["file"]), "validation", 4)
    texts = [sft_example(row, tokenizer, 2048) for row in rows]
    nll = sum(text_nll(stock(folder).float(), texts, 64, "x")) / sum(trained_tokens(texts))
    assert nll == pytest.approx(record["final_validation"], abs=2e-4)


def test_plain_training_ends_where_it_says(kind):
    check_validation(kind[2])


def test_gradient_checkpointing_changes_nothing_but_the_passes(kind, tmp_path, monkeypatch):
    name, fused, plain = kind
    passes, forward = [], HotResidualLinear.forward
    monkeypatch.setattr(HotResidualLinear, "forward", lambda *a, **k: passes.append(1) or forward(*a, **k))
    run(fused, tmp_path / "b")
    once = len(passes)
    out = run(fused, tmp_path / "a", "--gradient-checkpointing", "--model_type", KINDS[name])
    assert losses(out) == pytest.approx(losses(plain), abs=1e-5) and len(passes) > 2.5 * once
    torch.testing.assert_close(logits(stock(out)), logits(stock(plain)), atol=1e-4, rtol=1e-4)


def test_bfloat16_passes_and_float32_weights(kind, tmp_path):
    _, fused, plain = kind
    out = run(fused, tmp_path / "a", "--dtype", "bfloat16")
    assert losses(out) != losses(plain) and losses(out) == pytest.approx(losses(plain), abs=0.1)
    assert {t.dtype for t in load_file(out / "model.safetensors").values()} == {torch.float32}


def test_lora_trains_the_text_decoder_alone(kind, tmp_path):
    _, fused, _ = kind
    out = run(fused, tmp_path / "a", "--use-lora", "--lora-rank", 2, "--lora-dropout", "0.1", "--epochs", 3)
    check_validation(out)
    before, after = (load_file(folder / "model.safetensors") for folder in (fused, out))
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    checkpoint = open_checkpoint(str(out))
    assert moved == {
        checkpoint.tensor_name(n, c) + ".weight" for n in range(checkpoint.layout.n_layers) for c in "qkvo"
    }


def test_packed_training_sees_every_token_once(kind, tmp_path):
    _, fused, plain = kind
    one = run(fused, tmp_path / "a", "--packing", "--block-size", 600)
    counts = json.loads((one / "manifest.json").read_text())["counts"]
    assert len(losses(one)) == 1 and counts["left_out"] == counts["cut"] == 0
    whole = run(fused, tmp_path / "b", "--gradient-accumulation", 8)
    assert losses(one) == pytest.approx(losses(whole), abs=1e-5)
    assert counts == json.loads((plain / "manifest.json").read_text())["counts"]


def test_sharded_save_is_the_same_model(kind, tmp_path):
    _, fused, plain = kind
    out = run(fused, tmp_path / "a", "--max-shard-size", "40KB")
    assert (out / "model.safetensors.index.json").is_file() and len(list(out.glob("model-*.safetensors"))) > 1
    assert torch.equal(logits(stock(out)), logits(stock(plain)))


def test_wrong_model_type_is_reported(kind, fails, tmp_path):
    name, fused, _ = kind
    other = "llama" if name != "llama" else "qwen2"
    message = fails(stage3, "--model_dir", fused, "--output_dir", tmp_path / "a", "--model_type", other)
    assert f"--model_type {other}, but" in message and "leave the flag out" in message


@pytest.mark.parametrize("kind", ["llama"], indirect=True)
@pytest.mark.parametrize(
    ("flags", "kill_at"),
    [
        (["--use-lora", "--lora-dropout", "0.2", "--epochs", 3], 7),
        (["--epochs", 3], 12),  # after the last update
        (["--epochs", 3], 4),  # at the end of an epoch
        (["--epochs", "1.5"], 6),
        (["--early-stop", 1, "--epochs", 6, "--learning-rate", "0.3"], "stopped"),
    ],
)
def test_killed_anywhere_the_run_ends_the_same(kind, tmp_path, monkeypatch, flags, kill_at):
    """The curve, the validations and the weights, to the bit."""
    _, fused, _ = kind
    flags = [*flags, "--save-steps", 1]
    whole = run(fused, tmp_path / "whole", *flags)

    def here(state, control):
        return state.global_step == kill_at or (kill_at == "stopped" and control.should_training_stop)

    with killed(monkeypatch, "on_save", here):
        run(fused, tmp_path / "part", *flags)
    points = list((tmp_path / "part/checkpoints/trial0").glob("checkpoint-*"))
    assert points and not (tmp_path / "part/loss_curve.json").exists()
    part = run(fused, tmp_path / "part", *flags)
    for name in ("loss_curve.json", "hot_residual.safetensors", "model.safetensors"):
        assert (whole / name).read_bytes() == (part / name).read_bytes(), name
