"""The control `random_source`: rows of a model with fresh weights in place of the source's, everything else equal."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import run_main
from stages import data_flags, fuse, pair_flags
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM

from core.data import DataSpec, load_rows
from core.fusion.controls import CONTROLS
from core.fusion.residual_file import load_residuals
from core.fusion.settings import FusionSettings
from core.fusion.transport_weights import Transport
from core.models.checkpoints import open_checkpoint
from core.models.reading import read_aligned, read_texts
from core.runs.plan_directory import PlanDirectory
from core.runs.settings import Experiment
from evaluation import compare_arms
from evaluation.arms.random_source import SEED, random_source_plans


def open_random(models, plans, texts, folder):
    run = SimpleNamespace(plans=PlanDirectory(plans), folder=folder)
    target, source = (open_checkpoint(str(models[name])) for name in ("target", "source"))
    experiment = Experiment.of(data_subset="file", data_file=str(texts))
    return random_source_plans(run, target, source, experiment)


def rows_of_fresh_model(models, texts, pooling) -> torch.Tensor:
    """Outputs of v in layer 2 of a stock model with fresh weights, text by text, on the texts of stage 1."""
    tokenizers = [open_checkpoint(str(models[name])).load_tokenizer() for name in ("target", "source")]
    rows = load_rows(DataSpec("file", str(texts)), "calibration", 2000)
    reading = (
        read_aligned(rows, *tokenizers, 24, 4096, 0)[1] if pooling == "token" else read_texts(rows, tokenizers[1], 24)
    )
    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(models["source"]), dtype=torch.float32).eval()
    kept = []
    model.model.layers[2].self_attn.v_proj.register_forward_hook(lambda _m, _a, output: kept.append(output[0]))
    with torch.no_grad():
        for number, ids in enumerate(reading.ids):
            model(torch.tensor([ids]))
            kept[-1] = kept[-1].mean(0, True) if reading.picks is None else kept[-1][reading.picks[number]]
    return torch.cat(kept)


@pytest.mark.parametrize("pooling", ["token", "text"])
def test_its_rows_are_those_of_a_fresh_model_on_the_texts_of_stage_1(models, plans, texts, tmp_path, pooling):
    real = PlanDirectory(plans[pooling])
    before = torch.get_rng_state()
    with open_random(models, plans[pooling], texts, tmp_path) as (fresh, source):
        x, W = (fresh.rows("source", "attn_in", 2, "fit"), source.weight(2, "v"))
        assert_close(x @ W.T, fresh.rows("source", "v", 2, "fit"), atol=2e-3, rtol=2e-3)  # its weights, too
        assert torch.equal(torch.get_rng_state(), before)
        found = torch.cat([fresh.rows("source", "v", 2, part) for part in ("fit", "aside")])
        assert torch.equal(fresh.layer_plan("v"), real.layer_plan("v"))
        assert torch.equal(fresh.rows("target", "v", 2, "fit"), real.rows("target", "v", 2, "fit"))
        assert not torch.allclose(fresh.rows("source", "v", 2, "fit"), real.rows("source", "v", 2, "fit"), atol=1e-2)
        expected = rows_of_fresh_model(models, texts, pooling)
        aside = fresh._read("target", "kept_aside")
        parts = [expected[~aside], expected[aside]]
        assert_close(found, torch.cat([part - part.mean(0) for part in parts]), atol=2e-3, rtol=2e-3)
    assert not list(tmp_path.iterdir())  # its rows do not stay


def test_its_weight_is_regressed_on_its_rows_alone(models, plans, texts, fused, tmp_path):
    residual = next(one for one in load_residuals(fused / "hot_residual.safetensors")[0] if one.projection == "v")
    settings = FusionSettings("regression")
    control = CONTROLS["random_source"]
    with open_random(models, plans["token"], texts, tmp_path) as (fresh, source):
        made = control(residual, Transport(fresh, source, settings), torch.Generator())
        m = int(fresh.layer_plan("v")[residual.layer].argmax())
        Y, y = (fresh.rows("source", "v", m, "fit"), fresh.rows("target", "v", residual.layer, "fit"))
        x = fresh.rows("target", "attn_in", residual.layer, "fit")

    def ridge(R, S):
        R, S = R.double(), S.double()
        gram = R.T @ R
        return torch.linalg.solve(gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram)), R.T @ S).T

    W = ridge(x, Y.double() @ ridge(Y, y).T).float()[residual.index]
    mean = PlanDirectory(plans["token"]).mean("target", "attn_in", residual.layer)
    W = W + torch.outer((residual.original_weight - W) @ mean, mean / (mean @ mean))
    assert_close(made.weight, W, atol=1e-3, rtol=1e-2)
    assert not torch.allclose(made.weight, residual.weight, atol=1e-2)


def test_the_command_measures_it_when_asked(models, plans, texts, tmp_path, fails):
    fuse(plans["token"], models, tmp_path / "fused", "--feature-map", "regression", "--alpha", "0.3", "--top-k", "0")
    flags = ["--run-dir", tmp_path, "--hot-dir", plans["token"], *pair_flags(models), *data_flags(texts)]
    run_main(compare_arms, *flags)
    usual = json.loads((tmp_path / "results.json").read_text())
    assert "random_source" not in usual["arms"] and "random_source" in usual["held_out"]["absent"]
    run_main(compare_arms, *flags, "--controls", "all")
    found = json.loads((tmp_path / "results.json").read_text())
    assert set(found["arms"]) - set(usual["arms"]) == {"random_source"}
    assert found["per_text"]["fused"] == usual["per_text"]["fused"] and not found["held_out"]["absent"]
    assert found["arms"]["random_source"]["nll"] != found["arms"]["fused"]["nll"]

    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("".join(texts.read_text("utf-8").splitlines(True)[:100]), "utf-8")
    (tmp_path / "results.json").unlink()
    error = fails(compare_arms, *flags, "--data-file", fewer, "--controls", "all")
    assert "random_source: the calibration texts are no longer those of" in error
