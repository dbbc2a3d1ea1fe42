"""Stage 2 through its command line on pico models."""

import json
import logging
import shutil

import pytest
import torch
from conftest import llama, make_tokenizer, save
from permuted_models import SQUARE, permuted
from safetensors.torch import load_file
from stages import digests, fuse, logits, plan
from torch.testing import assert_close

from core import generate_hot_residual as stage2
from core.errors import UserError
from core.fusion.projections import ATTENTION, PROJECTIONS
from core.fusion.residual_file import load_residuals
from core.fusion.settings import FusionSettings
from core.fusion.transport_weights import Transport
from core.models.checkpoints import open_checkpoint
from core.runs import fused_layers
from core.runs.plan_directory import PlanDirectory
from core.training.hot_linear import enable_hot_residual_for_model, restore_base


def test_fused_checkpoint_is_plain_and_loads_in_stock_transformers(fused, models):
    before, after = (load_file(folder / "model.safetensors") for folder in (models["target"], fused))
    assert before.keys() == after.keys()
    for name in before:
        changed = not torch.equal(before[name], after[name])
        assert changed == any(f".{PROJECTIONS[projection].path}." in name for projection in ATTENTION), name
    assert {
        "config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "generation_config.json",
        "README.md",
        "hot_residual.safetensors",
        "fusion_report.json",
        "resolved.yaml",
    } <= set(digests(fused))
    assert not torch.equal(logits(fused), logits(models["target"]))
    report = json.loads((fused / "fusion_report.json").read_text())
    assert report["dropped_biases"] == 9 and len(report["projections"]) == 3 * len(ATTENTION)
    assert "base_model" in (fused / "README.md").read_text()


def test_the_targets_terms_go_with_the_fused_weights(plans, models, tmp_path):
    target = shutil.copytree(models["target"], tmp_path / "target")
    for name in ("LICENSE", "NOTICE.txt", "USE_POLICY.md"):
        (target / name).write_text(f"terms: {name}")
    (target / "secret.env").write_text("not a model file")
    out = fuse(plans["text"], {**models, "target": target}, tmp_path / "f", "--top-k", "5")
    assert all((out / name).read_text() == f"terms: {name}" for name in ("LICENSE", "NOTICE.txt", "USE_POLICY.md"))
    assert not (out / "secret.env").exists()


def test_the_evaluation_harness_loads_it_and_scores_as_stock_transformers(fused):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    harness = HFLM(pretrained=str(fused), device="cpu", dtype="float32", batch_size=2)
    pairs = [("The river", " keeps the lamp"), ("A", " b")]
    requests = [Instance("loglikelihood", {}, pair, n) for n, pair in enumerate(pairs)]
    scores = [score for score, _ in harness.loglikelihood(requests, disable_tqdm=True)]
    checkpoint = open_checkpoint(str(fused))
    tokenizer, model = checkpoint.load_tokenizer(), checkpoint.load_model("float32")
    for (context, continuation), score in zip(pairs, scores, strict=True):
        ids = tokenizer(context + continuation, return_tensors="pt")["input_ids"]
        begin = len(tokenizer(context)["input_ids"])
        with torch.no_grad():
            logp = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[begin - 1 :]
        assert score == pytest.approx(float(logp.sum()), abs=1e-4)


@pytest.mark.parametrize("form", ["interpolate", "additive"])
@pytest.mark.parametrize("top_k", ["0", "5"])
def test_unfolded_model_gives_the_logits_of_the_folded_one(plans, models, tmp_path, form, top_k):
    out = fuse(
        plans["token"],
        models,
        tmp_path / "f",
        "--feature-map",
        "calibrated",
        "--alpha",
        "0.2",
        "--top-k",
        top_k,
        "--residual-form",
        form,
    )
    folded = logits(out)
    residuals, alpha, stored_form = load_residuals(out / "hot_residual.safetensors")
    assert (alpha, stored_form) == (0.2, form)
    checkpoint = open_checkpoint(str(out))
    model = checkpoint.load_model("float32")
    restore_base(model, residuals, checkpoint.layout.name)
    assert all(
        torch.equal(value, model.state_dict()[name])
        for name, value in load_file(models["target"] / "model.safetensors").items()
    )
    enable_hot_residual_for_model(model, residuals, checkpoint.layout.name, alpha, form)
    with torch.no_grad():
        unfolded = model(torch.arange(40).reshape(2, 20)).logits
    assert float((unfolded - folded).abs().max()) <= 1e-5 * float(folded.abs().max())


def test_unselected_rows_and_columns_are_bit_identical(plans, models, tmp_path):
    out = fuse(plans["token"], models, tmp_path / "f", "--feature-map", "regression", "--alpha", "0.5", "--top-k", "5")
    before, after = (load_file(folder / "model.safetensors") for folder in (models["target"], out))
    directory = PlanDirectory(plans["token"])
    for layer in range(3):
        for projection in map(PROJECTIONS.get, ATTENTION):
            name = f"model.layers.{layer}.{projection.path}.weight"
            changed = (before[name] != after[name]).any(1 - projection.axis).nonzero().flatten()
            strongest = directory.strongest(projection.selected_side, layer)[:5]
            assert changed.tolist() == sorted(strongest.tolist())


@pytest.mark.parametrize("feature_map", ["coupling", "regression"])
def test_alpha_zero_is_the_target_bit_for_bit(plans, models, tmp_path, feature_map):
    out = fuse(plans["token"], models, tmp_path / "f", "--feature-map", feature_map, "--alpha", "0")
    before, after = (load_file(folder / "model.safetensors") for folder in (models["target"], out))
    assert all(torch.equal(before[name].view(torch.int32), after[name].view(torch.int32)) for name in before)


def test_coupling_only_damps_and_says_so(plans, models, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        out = fuse(plans["text"], models, tmp_path / "f", "--alpha", "0.1", "--top-k", "0")
    told = [r.getMessage() for r in caplog.records if "only damps" in r.getMessage()]
    assert len(told) == 1 and "--feature-map regression" in told[0]
    name = "model.layers.0.self_attn.q_proj.weight"
    before, after = (load_file(folder / "model.safetensors")[name] for folder in (models["target"], out))
    assert_close(after, 0.9 * before, atol=1e-3, rtol=1e-3)


def test_biases_fuse_where_both_models_have_them(models, texts, tmp_path):
    """The same pair the other way round: the Qwen2 target has q, k, v biases, the LLaMA source none."""
    plans = plan({"target": models["source"], "source": models["target"]}, texts, tmp_path / "p", "--pooling", "token")
    for feature_map, bias_moves in (("barycentric", False), ("regression", True)):
        out = fuse(
            plans,
            models,
            tmp_path / feature_map,
            "--feature-map",
            feature_map,
            "--top-k",
            "0",
            target="source",
            source="target",
        )
        before, after = (load_file(folder / "model.safetensors") for folder in (models["source"], out))
        name = "model.layers.1.self_attn.k_proj.bias"
        assert torch.equal(before[name], after[name]) != bias_moves
        logits(out)


def test_sharded_half_precision_target_keeps_names_and_dtype(plans, models, texts, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(models["target"], dtype=torch.bfloat16)
    folder = save(model, make_tokenizer(400, 1), tmp_path / "sharded", max_shard_size="20KB")
    shards = sorted(p.name for p in folder.glob("*.safetensors"))
    assert len(shards) > 2
    models = {**models, "target": folder}
    plans = plan(models, texts, tmp_path / "p", "--max-tokens", 24)
    out = fuse(plans, models, tmp_path / "f", "--top-k", "4", "--max-shard-size", "16KB")
    before = {name: tensor for shard in shards for name, tensor in load_file(folder / shard).items()}
    after = {}
    for path in sorted(out.glob("model-*.safetensors")):
        shard = load_file(path)
        assert sum(tensor.nbytes for tensor in shard.values()) <= 16000 or len(shard) == 1
        after |= shard
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == before.keys() == after.keys() and len(set(index["weight_map"].values())) > 3
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in before.values())
    assert all(tensor.dtype == torch.bfloat16 for tensor in after.values())
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(changed) == 3 * len(ATTENTION) and all("_proj.weight" in name for name in changed)
    whole = fuse(plans, models, tmp_path / "g", "--top-k", "4")
    assert [path.name for path in whole.glob("model*")] == ["model.safetensors"]
    assert torch.equal(logits(out), logits(whole))


def test_corollary_4_2_a_permuted_source_gives_the_target_back(texts, tmp_path):
    """Source = target with hidden channels and heads permuted: W~ = W, so the fused model is the target at any alpha.

    The maps are square here, so In and Out can be swapped: that must fail.
    """
    target = llama(**SQUARE)
    source = permuted(target)
    tokenizer = make_tokenizer(400, 1)
    models = {"target": save(target, tokenizer, tmp_path / "t"), "source": save(source, tokenizer, tmp_path / "s")}
    assert_close(logits(models["source"]), logits(models["target"]), atol=1e-4, rtol=1e-4)
    plans = PlanDirectory(plan(models, texts, tmp_path / "p", "--pooling", "token"))
    assert plans.layer_plan("q").argmax(1).tolist() == [0, 1]
    flags = ("--feature-map", "regression", "--alpha", "1", "--top-k", "0", "--ridge", "1e-6")
    out = fuse(plans.folder, models, tmp_path / "f", *flags)
    settings = FusionSettings("regression", ridge=1e-6)
    transport = Transport(plans, open_checkpoint(str(models["source"])), settings)
    for residual in load_residuals(out / "hot_residual.safetensors")[0]:
        W, layer, c = residual.original_weight, residual.layer, residual.projection
        assert float((W - residual.weight).norm() / W.norm()) <= 1e-3, (layer, c)
        side = PROJECTIONS[c].input_side
        Out, In = (
            transport.feature_map.out_map(c, layer, layer, None),
            transport.feature_map.in_map(side, layer, layer, None),
        )
        swapped = In @ transport.source.weight(layer, c) @ Out
        assert float((W - swapped).norm() / W.norm()) > 0.5, (layer, c)
    assert_close(logits(out), logits(models["target"]), atol=2e-2, rtol=2e-2)


def test_corollary_4_2_holds_through_the_mlp(texts, tmp_path):
    """The same with the neurons of the MLP permuted as well, and all seven projections fused."""
    target = llama(**SQUARE)
    source = permuted(target, mlp=True)
    tokenizer = make_tokenizer(400, 1)
    models = {"target": save(target, tokenizer, tmp_path / "t"), "source": save(source, tokenizer, tmp_path / "s")}
    assert_close(logits(models["source"]), logits(models["target"]), atol=1e-4, rtol=1e-4)
    plans = plan(models, texts, tmp_path / "p", "--pooling", "token", "--projections", "all")
    flags = ("--feature-map", "regression", "--alpha", "1", "--top-k", "0", "--ridge", "1e-6", "--projections", "all")
    out = fuse(plans, models, tmp_path / "f", *flags)
    residuals = load_residuals(out / "hot_residual.safetensors")[0]
    assert [one.projection for one in residuals] == [*PROJECTIONS] * 2
    for residual in residuals:
        W = residual.original_weight
        assert float((W - residual.weight).norm() / W.norm()) <= 2e-3, (residual.layer, residual.projection)
    assert_close(logits(out), logits(models["target"]), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("rows", ["anchored", "difference"])
def test_some_projections_and_other_rows_through_the_stages(models, texts, tmp_path, rows, fails):
    plans = plan(models, texts, tmp_path / "p", "--pooling", "token", "--projections", "v,down")
    record = json.loads((plans / "manifest.json").read_text())
    assert sorted(record["sides"]) == ["attn_in", "down", "mlp_in", "v"]
    assert record["unaligned"]["positions"] > 0 and record["unaligned"]["aligned"] > 0
    flags = ("--feature-map", "regression", "--alpha", "0.5", "--top-k", "4", "--rows", rows, "--projections", "v,down")
    out = fuse(plans, models, tmp_path / "f", *flags)
    residuals = load_residuals(out / "hot_residual.safetensors")[0]
    assert [(one.projection, one.axis) for one in residuals] == [("v", 0), ("down", 1)] * 3
    before, after = (load_file(folder / "model.safetensors") for folder in (models["target"], out))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {
        f"model.layers.{n}.{place}.weight" for n in range(3) for place in ("self_attn.v_proj", "mlp.down_proj")
    }
    aligned = fuse(plans, models, tmp_path / "a", *flags[:-4], "--projections", "v,down")
    assert not torch.equal(load_residuals(aligned / "hot_residual.safetensors")[0][0].weight, residuals[0].weight)
    pair = ("--hot_dir", plans, "--target-model", models["target"], "--source-model", models["source"])
    line = fails(stage2, *pair, "--output_dir", tmp_path / "x", "--feature-map", "regression", "--projections", "all")
    assert "has no activations of q, k, o, gate, up" in line and "--projections" in line
    line = fails(stage2, *pair, "--output_dir", tmp_path / "x", "--projections", "v,down")
    assert "projections down have no feature plans, which coupling reads" in line


def test_settings_that_change_nothing_leave_a_finished_folder_alone(fused, plans, models, tmp_path):
    out = tmp_path / "f"
    shutil.copytree(fused, out)
    flags = ["--feature-map", "regression", "--alpha", "0.3", "--top-k", "0"]
    fuse(plans["token"], models, out, *flags, "--rows", "aligned", "--alpha-steps", 3, "--free-alpha")
    assert digests(out) == digests(fused)


@pytest.mark.parametrize("pooling", ["text", "token"])
def test_plans_without_unaligned_rows_have_aligned_rows_alone(plans, models, tmp_path, pooling, fails):
    other, flags = tmp_path / "p", ["--feature-map", "regression", "--alpha", "auto", "--validation-samples", 4]
    shutil.copytree(plans[pooling], other)
    if pooling == "token":
        manifest = json.loads((other / "manifest.json").read_text())
        manifest["unaligned"]["positions"] = 0
        (other / "manifest.json").write_text(json.dumps(manifest))
        (other / "activations/unaligned.safetensors").unlink()
    out = fuse(other, models, tmp_path / "f", *flags)
    tried = json.loads((out / "fusion_report.json").read_text())["strength"]["tried"]
    assert tried and {one["candidate"] for one in tried} == {"aligned"}
    if pooling == "text":
        for rows in ("anchored", "difference"):
            line = fails(stage2, "--hot-dir", other, "--output-dir", tmp_path / "x", *flags, "--rows", rows)
            assert f"no rows for --rows {rows}" in line and "--pooling token" in line


def test_plans_of_before_have_the_four_attention_projections(plans, tmp_path):
    other = tmp_path / "p"
    shutil.copytree(plans["text"], other)
    manifest = json.loads((other / "manifest.json").read_text())
    del manifest["inputs"]["settings"]["projections"]
    (other / "manifest.json").write_text(json.dumps(manifest))
    PlanDirectory(other).check_projections(["q", "o"])
    with pytest.raises(UserError, match="has no activations of gate"):
        PlanDirectory(other).check_projections(["q", "gate"])


def test_a_killed_fusion_ends_with_the_same_bytes(fused, plans, models, tmp_path):
    out = tmp_path / "f"
    shutil.copytree(fused, out)
    manifest = json.loads((out / "manifest.json").read_text()) | {"status": "incomplete"}
    for key in (
        "mean",
        "dropped_biases",
        "source_layers_used",
        "source_layers",
        "data",
        "lineage",
        "versions",
        "commit",
    ):
        manifest.pop(key)
    (out / "manifest.json").write_text(json.dumps(manifest))
    (out / "model.safetensors").unlink()
    (out / ".tmp-transport-merge-model.safetensors").mkdir()
    fuse(plans["token"], models, out, "--feature-map", "regression", "--alpha", "0.3", "--top-k", "0")
    assert digests(out) == digests(fused)


def test_fusion_killed_between_layers_goes_on_with_the_missing_ones(fused, plans, models, tmp_path, monkeypatch):
    flags = ["--feature-map", "regression", "--alpha", "0.3", "--top-k", "0"]
    save_one, done = fused_layers.save_residuals, []

    def dies(path, residuals, *arguments):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(residuals[0].layer)
        save_one(path, residuals, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(fused_layers, "save_residuals", dies)
        with pytest.raises(KeyboardInterrupt):
            fuse(plans["token"], models, tmp_path / "f", *flags)
    monkeypatch.setattr(fused_layers, "save_residuals", lambda *a: done.append(a[1][0].layer) or save_one(*a))
    assert digests(fuse(plans["token"], models, tmp_path / "f", *flags)) == digests(fused)
    assert done == [0, 1, 2]
