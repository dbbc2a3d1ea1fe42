"""The search over strengths and learning rates: which trial is kept, and what a kill or a divergence leaves."""

import json
from types import SimpleNamespace

import pytest
import torch
from stages import digests, logits, train

from core import train_hot_residual_sft as stage3
from core.fusion.residual_file import load_residuals
from core.models.checkpoints import open_checkpoint
from core.models.folded import write_folded
from core.runs.settings import Experiment
from core.training import search
from core.training.recipe import Recipe
from core.training.start import open_start


def test_search_keeps_every_trial_and_chooses_on_validation_rows(fused, models, tmp_path):
    out = train(fused, tmp_path / "a", "--alpha-search", "0.1,0.5", "--lr-search", "1e-3,5e-2")
    found = json.loads((out / "results.json").read_text())
    assert [(t["alpha"], t["learning_rate"]) for t in found["trials"]] == [
        (0.1, 0.001),
        (0.1, 0.05),
        (0.5, 0.001),
        (0.5, 0.05),
    ]
    best = min(found["trials"], key=lambda trial: trial["validation"])
    assert found["trials"][found["chosen"]] == best and len({t["validation"] for t in found["trials"]}) == 4
    alone = train(fused, tmp_path / "b", "--alpha", best["alpha"], "--learning-rate", best["learning_rate"])
    assert torch.equal(logits(out), logits(alone))
    assert load_residuals(out / "hot_residual.safetensors")[1] == best["alpha"]
    assert f"| training | chosen alpha | {best['alpha']} |" in (out / "README.md").read_text()
    # What is fused into this checkpoint gets its weights, and none of the files that describe it.
    (tmp_path / "copy").mkdir()
    write_folded(open_checkpoint(str(out)), tmp_path / "copy", lambda _, tensor: tensor, 10**9)
    assert digests(tmp_path / "copy").keys() == digests(models["target"]).keys()


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [(0.3, False), (0.0, True), (lambda name: 0.3, False), (lambda name: float("v" in name), True)],
)
def test_a_strength_of_zero_leaves_its_residual_unused(fused, tmp_path, monkeypatch, alpha, expected):
    """The parallel wrapper has to know that there are weights without a gradient."""
    start, experiment, seen = open_start(str(fused)), Experiment(), []
    given = {one.name: alpha(one.name) for one in start.residuals} if callable(alpha) else alpha
    trained = SimpleNamespace(all_weights=dict), {}
    monkeypatch.setattr("core.training.trainer.train", lambda *arguments: seen.append(arguments[-1]) or trained)
    recipe = Recipe("x", experiment.training, experiment.adapters, experiment.compute, experiment.distill)
    search.train_once(start, None, recipe, search.Trial(given, 1e-5, tmp_path))
    assert seen == [expected]


def test_killed_search_goes_on_with_the_other_trials(fused, tmp_path, monkeypatch):
    whole = train(fused, tmp_path / "whole", "--lr-search", "1e-3,1e-1,1e-2")
    once, calls = search.train_once, []

    def dies(start, data, recipe, trial):
        calls.append(trial.learning_rate)
        if calls == [1e-3, 1e-1, 1e-2]:
            raise KeyboardInterrupt
        return once(start, data, recipe, trial)

    monkeypatch.setattr(search, "train_once", dies)
    with pytest.raises(KeyboardInterrupt):
        train(fused, tmp_path / "part", "--lr-search", "1e-3,1e-1,1e-2")
    part = train(fused, tmp_path / "part", "--lr-search", "1e-3,1e-1,1e-2")
    assert calls == [1e-3, 1e-1, 1e-2, 1e-2]
    results = [json.loads((folder / "results.json").read_text()) for folder in (whole, part)]
    assert results[0] == results[1] and torch.equal(logits(whole), logits(part))
    curves = [(folder / "loss_curve.json").read_text() for folder in (whole, part)]
    assert curves[0] == curves[1]


def test_search_is_the_same_alone_and_survives_a_rate_that_diverges(fused, tmp_path, fails):
    """Adapters are drawn from the seed for every trial; a non-finite loss ends its own trial only."""
    lora = ["--use-lora", "--lora-rank", 2]
    out = train(fused, tmp_path / "a", *lora, "--lr-search", "1e38,1e-3", "--max-grad-norm", 0)
    found = json.loads((out / "results.json").read_text())
    assert [trial["validation"] is None for trial in found["trials"]] == [True, False]
    assert "lower the learning rate" in found["trials"][0]["diverged"]
    rate = found["trials"][found["chosen"]]["learning_rate"]
    assert found["chosen"] == 1 and rate == 1e-3
    alone = train(fused, tmp_path / "b", *lora, "--learning-rate", rate, "--max-grad-norm", 0)
    assert torch.equal(logits(out), logits(alone))
    flags = "--lr-search 1e38,1e37 --max-grad-norm 0 --gradient-accumulation 1 --sft-samples 8".split()
    message = fails(stage3, "--model_dir", fused, "--output_dir", tmp_path / "c", *flags)
    assert "every trial diverged; the first: " in message
