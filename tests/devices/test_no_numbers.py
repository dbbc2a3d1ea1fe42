"""NaN and infinite values: refused where they enter, and never chosen, converged or better."""

import json
import math
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from stages import fuse, train

import run_activs_and_hot as stage1
from core import generate_hot_residual as stage2
from core import train_hot_residual_sft as stage3
from core.hot_transport import reconstruction_fit
from core.runs.settings import all_settings
from core.training import search, trainer


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_settings_that_are_no_numbers_are_refused(value, fails, tmp_path):
    """Also those of an experiment file, which can hold .nan and .inf."""
    settings = [setting for setting in all_settings().values() if float in (setting.kind, setting.entry)]
    assert len(settings) > 15
    for setting in settings:
        given = [value] if setting.kind is tuple else value
        path = tmp_path / "e.yaml"
        path.write_text(yaml.safe_dump({setting.name: given}))
        assert f"{setting.name} is" in fails(stage1, "--config", path)
    path.write_text(yaml.safe_dump({"max_tokens": value}))
    assert "max_tokens is" in fails(stage1, "--config", path)


@pytest.mark.parametrize("broken", ["first", "second", "both"])
def test_a_loss_that_is_no_number_is_never_the_best(broken, models, texts, fails, tmp_path, monkeypatch):
    """Whichever trial has it."""
    once, done = search.train_once, []

    def train_once(*arguments):
        weights, curve = once(*arguments)
        done.append(curve)
        if broken in (("first", "second")[len(done) - 1], "both"):
            curve = curve | {"final_validation": math.nan}
        return weights, curve

    monkeypatch.setattr(search, "train_once", train_once)
    flags = ("--training-scenario", "no_hot", "--data-subset", "file", "--data-file", texts, "--lr-search", "1e-3,1e-2")
    if broken == "both":
        place = ("--model_dir", models["target"], "--output_dir", tmp_path / "a", "--sft-samples", 8)
        assert "every trial diverged; the first: the validation loss is nan" in fails(stage3, *place, *flags)
    else:
        out = train(models["target"], tmp_path / "a", *flags)
        assert json.loads((out / "results.json").read_text())["chosen"] == (broken == "first")


def test_weights_that_are_lost_in_the_last_update_are_told(models, texts, fails, tmp_path, monkeypatch):
    """The loss of an update is that before it, so that the last one tells nothing of the weights that are written."""
    from torch.optim import AdamW

    step = AdamW.step

    def lose(optimizer, *arguments, **rest):
        step(optimizer, *arguments, **rest)
        with torch.no_grad():
            optimizer.param_groups[0]["params"][0].view(-1)[3] = math.nan

    monkeypatch.setattr(AdamW, "step", lose)
    place = ("--model_dir", models["target"], "--output_dir", tmp_path / "a", "--training-scenario", "no_hot")
    data = ("--data-subset", "file", "--data-file", texts, "--sft-samples", 8, "--validation-samples", 0)
    told = fails(stage3, *place, *data, "--gradient-accumulation", 8)
    assert "has NaN or infinite weights after the last update; lower the learning rate" in told


def test_the_trainers_losses_must_be_numbers():
    for name in ("loss", "eval_loss"):
        for value in (math.nan, math.inf):
            with pytest.raises(trainer.Diverged, match=f"the {name} is {value}"):
                trainer.ExactTrainer.log(SimpleTrainer(), {name: value})


class SimpleTrainer:
    class state:
        global_step = 3


@pytest.mark.parametrize("model", ["target", "source"])
def test_a_model_with_weights_that_are_no_numbers_is_not_fused(model, models, plans, fails, tmp_path, monkeypatch):
    damaged = tmp_path / "damaged"
    shutil.copytree(models[model], damaged)
    tensors = load_file(damaged / "model.safetensors")
    for layer in range(3):
        tensors[f"model.layers.{layer}.self_attn.v_proj.weight"][0, :] = math.nan
    save_file(tensors, damaged / "model.safetensors", {"format": "pt"})
    monkeypatch.setattr(stage2.PlanDirectory, "check_models", lambda *_: None)
    pair = {**models, model: damaged}
    flags = ("--hot_dir", plans["text"], "--output_dir", tmp_path / "f", "--top-k", 0)
    told = fails(stage2, *flags, "--modelA_id", pair["target"], "--modelB_id", pair["source"])
    assert "layer 0, projection v: the" in told and "has NaN or infinite entries" in told


def test_the_ratio_of_norms_warns_where_there_is_none(plans, models, tmp_path, monkeypatch, caplog):
    """A ratio that is no number is no sign of transport."""
    nothing = dict.fromkeys(("norm_ratio", "cosine", "explained_variance"), math.nan)
    monkeypatch.setattr(stage2, "means_by_projection", lambda lines: dict.fromkeys("qkvo", nothing))
    fuse(plans["text"], models, tmp_path / "f", "--feature-map", "regression")
    assert "fusion only damps the target" in caplog.text


def test_a_layer_of_constant_neurons_has_nothing_to_explain():
    P = torch.full((2, 2), 0.25, dtype=torch.float64)
    zero, one = torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    fits = reconstruction_fit(P, torch.stack([zero, one]), torch.ones(2, 2, 2).double(), torch.tensor([0.0, 2.0]))
    for fit in fits:
        assert torch.isfinite(fit).all() and fit[1] != 0
    assert fits[1][0] == 0
