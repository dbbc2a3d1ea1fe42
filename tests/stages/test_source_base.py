"""`--source-base` through the stages: what an expert learned over its base goes into the target."""

import json
import logging
import shutil

import pytest
import torch
from conftest import llama, make_tokenizer, qwen2, run_main, save
from permuted_models import CHANNELS, NEURONS, SQUARE, permuted
from safetensors import safe_open
from safetensors.torch import load_file
from stages import data_flags, digests, front_matter, logits, pair_flags, plan_flags, run
from torch.testing import assert_close

import run_activs_and_hot as stage1
from core import generate_hot_residual as stage2
from core.fusion.residual_file import load_residuals
from core.fusion.transport_weights import Transport
from evaluation import compare_arms
from evaluation.arms import models as arm_models

FLAGS = ("--feature-map", "regression", "--alpha", "0.5", "--top-k", "0", "--projections", "all")


def tuned(model):
    """The model with small changes of all its projections, as fine-tuning makes them."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_proj.weight" in name:
                parameter.add_(0.03 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def trio(models, tmp_path_factory):
    """`target`, `source` (an expert) and `base`, from which the expert was tuned."""
    expert = save(tuned(qwen2()), make_tokenizer(500, 2), tmp_path_factory.mktemp("expert") / "expert")
    return {"target": models["target"], "source": expert, "base": models["source"]}


def with_base(trio, base="base"):
    return [*pair_flags(trio), "--source-base", trio[base]]


@pytest.fixture(scope="module")
def plans(trio, texts, tmp_path_factory):
    """Plans of the pair with the inputs of the source, for all seven projections."""
    out = tmp_path_factory.mktemp("plans") / "p"
    flags = ("--pooling", "token", "--projections", "all", "--source-base", trio["base"])
    run_main(stage1, *plan_flags(trio, texts, out, *flags))
    return out


def fuse(plans, trio, out, *flags):
    run_main(stage2, "--hot_dir", plans, *with_base(trio), "--output_dir", out, *flags)
    return out


@pytest.fixture(scope="module")
def fused(plans, trio, tmp_path_factory):
    return fuse(plans, trio, tmp_path_factory.mktemp("fused") / "fused", *FLAGS)


def test_stage_1_records_the_sources_inputs_and_names_the_base(plans, trio, models, texts, tmp_path):
    with safe_open(plans / "activations/source.safetensors", "pt") as file:
        assert {"mlp_in.0", "down_in.0", "o_in.3"} <= set(file.keys())
    inputs = json.loads((plans / "manifest.json").read_text())["inputs"]
    assert inputs["source_base"]["id"] == str(trio["base"]) and inputs["source"]["id"] == str(trio["source"])


def test_a_fused_checkpoint_is_the_target_plus_what_was_learned(fused, trio, tmp_path, capsys):
    residuals, alpha, form = load_residuals(fused / "hot_residual.safetensors")
    assert (alpha, form, len(residuals)) == (0.5, "interpolate", 21)
    before, after = (load_file(folder / "model.safetensors") for folder in (trio["target"], fused))
    one = residuals[0]
    name = f"model.layers.{one.layer}.self_attn.q_proj.weight"
    change = one.weight - one.original_weight
    assert_close(after[name] - before[name], 0.5 * change, atol=1e-6, rtol=1e-3)
    report = json.loads((fused / "fusion_report.json").read_text())["projections"][0]
    assert report["norm_ratio"] == pytest.approx(float(change.norm() / one.original_weight.norm()), rel=1e-3)
    assert 0 < report["norm_ratio"] < 0.5 and report["explained_variance"] is None
    assert not torch.equal(logits(fused), logits(trio["target"]))


def test_a_finished_fusion_is_used_again_and_another_base_is_not(fused, plans, trio, models, tmp_path, caplog):
    copy = tmp_path / "f"
    shutil.copytree(fused, copy)
    before = digests(copy)
    fuse(plans, trio, copy, *FLAGS)
    assert digests(copy) == before
    with caplog.at_level(logging.INFO):
        run_main(stage2, "--hot_dir", plans, *pair_flags(trio), "--output_dir", copy, *FLAGS)
    assert "made with other inputs (source_base)" in caplog.text
    whole = load_residuals(copy / "hot_residual.safetensors")[0][0]
    assert not torch.equal(whole.weight, load_residuals(fused / "hot_residual.safetensors")[0][0].weight)


def test_cards_licences_and_the_trained_model_name_the_base(fused, plans, trio, tmp_path, caplog):
    lineage = json.loads((fused / "manifest.json").read_text())["lineage"]
    assert list(lineage["models"]) == ["target", "source", "source_base"]
    card = (fused / "README.md").read_text()
    assert "# target fused with what expert learned over source" in card and "| source base | `source` |" in card
    assert "\\|W~ - W\\| / \\|W\\|" in card and "which it was tuned from" in card
    trained = (run(fused, tmp_path / "hot") / "README.md").read_text()
    assert "Fine-tuned from `target` fused with what expert learned over source" in trained
    assert "| source base | `source` |" in trained
    base = shutil.copytree(trio["base"], tmp_path / "base")
    (base / "README.md").write_text("---\nlicense: mit\n---\n")
    with caplog.at_level(logging.WARNING):
        out = fuse(plans, {**trio, "base": base}, tmp_path / "f", *FLAGS)
    assert "source base mit" in caplog.text and front_matter(out)["license"] == "other"


@pytest.mark.parametrize("feature_map", ["coupling", "calibrated", "procrustes"])
def test_other_maps_transport_differences_too(plans, trio, tmp_path, feature_map, caplog, capsys):
    flags = ("--feature-map", feature_map, "--alpha", "0.5", "--top-k", "6")
    with caplog.at_level(logging.WARNING):
        out = fuse(plans, trio, tmp_path / "f", *flags)
    residuals = load_residuals(out / "hot_residual.safetensors")[0]
    assert "|W~-W|/|W|" in capsys.readouterr().out and "only damps" not in caplog.text
    largest = max(float((one.weight - one.original_weight).norm()) for one in residuals)
    assert largest > 1e-3 or feature_map == "coupling"
    zero = fuse(plans, trio, tmp_path / "z", *flags, "--alpha", "0")
    before, after = (load_file(folder / "model.safetensors") for folder in (trio["target"], zero))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_attention_needs_no_other_plans_and_the_mlp_does(trio, texts, tmp_path, fails):
    without = tmp_path / "p"
    run_main(stage1, *plan_flags(trio, texts, without, "--pooling", "token", "--projections", "q,down"))
    flags = ["--hot_dir", without, *with_base(trio), "--output_dir", tmp_path / "f", "--feature-map", "regression"]
    line = fails(stage2, *flags, "--projections", "q,down")
    assert "has no inputs of the source's down, which --source-base needs; run stage 1 with --source-base" in line
    run_main(stage2, *flags, "--projections", "q")
    assert len(load_residuals(tmp_path / "f/hot_residual.safetensors")[0]) == 3


@pytest.mark.parametrize("stage", [1, 2])
def test_bases_that_cannot_be_subtracted_are_refused(stage, trio, models, texts, plans, tmp_path, fails):
    wide = save(qwen2(intermediate_size=80), make_tokenizer(500, 2), tmp_path / "wide")
    deep = save(qwen2(num_hidden_layers=5), make_tokenizer(500, 2), tmp_path / "deep")
    bases = {**trio, "wide": wide, "deep": deep, "missing": tmp_path / "missing"}

    def failure(base, *flags):
        if stage == 1:
            given = plan_flags(trio, texts, tmp_path / "o", "--pooling", "token")
        else:
            given = ["--hot_dir", plans, *pair_flags(trio), "--output_dir", tmp_path / "o"]
        line = fails([stage1, stage2][stage - 1], *given, *FLAGS[-2:], "--source-base", bases[base], *flags)
        assert not (tmp_path / "o").exists()
        return line

    same = failure("source")
    assert "is the source" in same and "itself, which has learned nothing over it" in same
    for flags in ((), ("--dry-run",)):
        line = failure("wide", *flags, *(FLAGS[:2] if stage == 2 else ()))
        assert "model.layers.0.mlp.gate_proj.weight is (80, 32), and in the source (64, 32)" in line
    assert "it is a qwen2 model of 5 layers, and the source a qwen2 model of 4 layers" in failure("deep")
    assert "it is a llama model of 3 layers" in failure("target")
    assert "missing does not exist" in failure("missing")
    if stage == 2:
        assert "residual_form additive adds a whole source" in failure("base", "--residual-form", "additive")
        assert "rows difference is of a whole source" in failure("base", "--rows", "difference", *FLAGS[:2])


def test_a_dry_run_names_the_base(plans, trio, texts, tmp_path, capsys, monkeypatch):
    run_main(stage1, *plan_flags(trio, texts, tmp_path / "o"), "--source-base", trio["base"], "--dry-run")
    assert f"source base {trio['base']}: qwen2, 4 layers" in capsys.readouterr().out
    run_main(stage2, "--hot_dir", plans, *with_base(trio), "--output_dir", tmp_path / "o", *FLAGS, "--dry-run")
    printed = capsys.readouterr().out
    assert f"source base {trio['base']}: qwen2, 4 layers" in printed and "nothing is missing" in printed
    assert not (tmp_path / "o").exists()


def test_the_comparison_has_the_base_of_the_run_and_no_self(
    fused, plans, trio, texts, tmp_path, capfd, fails, monkeypatch
):
    made = []
    monkeypatch.setattr(arm_models, "Transport", lambda *given: made.append(Transport(*given)) or made[-1])
    folder = tmp_path / "run"
    shutil.copytree(plans, folder / "plans")
    shutil.copytree(fused, folder / "fused")
    flags = ["--run-dir", folder, *pair_flags(trio), *data_flags(texts)]
    run_main(compare_arms, *flags)
    printed = capfd.readouterr().out
    results = json.loads((folder / "results.json").read_text())
    assert set(results["arms"]) == {
        "base",
        "damped",
        "damped_mean",
        "permuted",
        "wrong_layer",
        "filtered_self",
        "fused",
    }
    assert [transport.of_task_vector for transport in made] == [True]
    assert "self is left out: the target has learned nothing over itself" in printed
    run_main(compare_arms, *flags, "--source-base", trio["base"])
    assert capfd.readouterr().out == printed
    other = save(tuned(tuned(qwen2())), make_tokenizer(500, 2), tmp_path / "other")
    line = fails(compare_arms, *flags, "--source-base", other)
    assert f"was fused with the source base {trio['base']}, got {other}" in line


def test_a_permuted_expert_gives_the_target_what_it_learned(texts, tmp_path):
    """Base = the target with its neurons permuted; the expert has learned something in one projection of the last
    layer, so that its inputs are still those of the base. The change comes back, in the target's own order, and nothing
    else changes."""
    target = llama(**SQUARE)
    base, expert = permuted(target, mlp=True), permuted(target, mlp=True)
    change = 1e-3 * torch.randn(24, 48, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expert.model.layers[1].mlp.down_proj.weight.add_(change[CHANNELS][:, NEURONS])
    tokenizer = make_tokenizer(400, 1)
    trio = {
        name: save(model, tokenizer, tmp_path / name)
        for name, model in (("target", target), ("source", expert), ("base", base))
    }
    plans = tmp_path / "p"
    flags = ("--pooling", "token", "--projections", "all", "--source-base", trio["base"])
    run_main(stage1, *plan_flags(trio, texts, plans, *flags))
    for feature_map in ("regression", "procrustes"):
        out = fuse(plans, trio, tmp_path / feature_map, *FLAGS, "--feature-map", feature_map, "--ridge", "1e-7")
        for residual in load_residuals(out / "hot_residual.safetensors")[0]:
            found = residual.weight - residual.original_weight
            if (residual.layer, residual.projection) != (1, "down"):
                assert not found.any(), (residual.layer, residual.projection)
                continue
            with safe_open(plans / "activations/target.safetensors", "pt") as file:
                x = file.get_tensor("down_in.1.mean")
            expected = change - torch.outer(change @ x, x) / (x @ x)
            assert float((found - expected).norm() / expected.norm()) < 0.05
