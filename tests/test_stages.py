"""The stages through their command lines on pico models: LLaMA target, Qwen2 source, other depths and widths."""

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, llama, make_tokenizer, run_main, save, sentences
from safetensors.torch import load_file
from torch.testing import assert_close

import run_activs_and_hot as stage1
from core import generate_hot_residual as stage2
from core import train_hot_residual_sft as stage3
from core.checkpoints import open_checkpoint
from core.data import load_rows
from core.experiment import Experiment
from core.fusion import FusionSettings, Transport
from core.hot_residual import enable_hot_residual_for_model, load_residuals, restore_base
from core.plans import PlanDirectory, part_file, write_activations, write_part
from core.runs import TEMPORARY, UserError


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


@pytest.fixture(scope="module")
def fused(models, plans, tmp_path_factory):
    return fuse(plans["token"], models, tmp_path_factory.mktemp("fused") / "out", "--feature-map", "regression",
                "--alpha", "0.3", "--top-k", "0")  # fmt: skip


# Stage 1


@pytest.mark.parametrize("pooling", ["token", "text"])
def test_plan_directory_holds_potentials_and_never_dense_plans(plans, pooling):
    folder = plans[pooling]
    directory = PlanDirectory(folder)
    assert directory.shape == (3, 4)
    sizes = {"q": (36, 32), "k": (12, 16), "v": (12, 16), "o": (24, 32), "attn_in": (24, 32), "o_in": (36, 32)}
    for side, (n, m) in sizes.items():
        stored = load_file(folder / "plans" / f"{side}.safetensors")
        assert stored["f"].shape == (3, 4, n) and stored["g"].shape == (3, 4, m) and stored["f"].dtype == torch.float64
        assert stored["P"].shape == (3, 4)
        assert_close(stored["P"].sum(1), torch.full((3,), 1 / 3, dtype=torch.float64), atol=1e-9, rtol=0)
        assert all(tensor.numel() <= 12 * max(n, m) for tensor in stored.values())
    rows = directory.manifest.record["rows"]
    stored = load_file(folder / "activations" / "target.safetensors")
    assert stored["q.0"].shape == (rows, 36)
    assert stored["q.0"].dtype == (torch.float16 if pooling == "token" else torch.float32)


@pytest.mark.parametrize("pooling", ["token", "text"])
def test_stored_potentials_have_exact_marginals_and_equal_pot(plans, pooling):
    import numpy as np
    import ot

    directory = PlanDirectory(plans[pooling])
    for side in ("q", "v", "o_in"):
        X, Y = (load_file(plans[pooling] / "activations" / f"{model}.safetensors")[f"{side}.1"].double().numpy()
                for model in ("target", "source"))  # fmt: skip
        n, m = X.shape[1], Y.shape[1]
        C = 1 - np.corrcoef(X.T, Y.T)[:n, n:]
        result = directory.feature_result(side, 1, 1)
        Q = torch.exp((result.f[:, None] + result.g - torch.from_numpy(C)) / 0.1).numpy()
        assert np.abs(Q.sum(1) - 1 / n).sum() <= 5e-6 and np.abs(Q.sum(0) - 1 / m).sum() <= 5e-6
        expected = ot.sinkhorn(np.full(n, 1 / n), np.full(m, 1 / m), C, 0.1, "sinkhorn_log", 20000, 1e-12)
        assert np.abs(Q - expected).sum() / 2 <= 1e-5
        assert_close(result.plan().double(), torch.from_numpy(Q), atol=1e-8, rtol=1e-4)


def test_selection_is_ordered_by_mean_absolute_activation(plans):
    directory = PlanDirectory(plans["text"])
    rows = load_file(plans["text"] / "activations" / "target.safetensors")["o_in.2"]
    strength = rows.abs().mean(0)
    assert directory.strongest("o_in", 2).tolist() == strength.argsort(descending=True).tolist()


def test_mean_and_deviation_are_those_of_the_activations(plans):
    directory = PlanDirectory(plans["text"])
    rows = load_file(plans["text"] / "activations" / "source.safetensors")["k.3"]
    assert_close(directory.mean("source", "k", 3), rows.mean(0))
    assert_close(directory.std("source", "k", 3), rows.std(0))
    fit, aside = (directory.rows("source", "k", 3, part) for part in ("fit", "aside"))
    assert len(fit) + len(aside) == len(rows) and len(aside) == len(rows) // 8
    assert_close(aside, rows[7::8] - rows[7::8].mean(0))


def test_plans_explain_more_than_shuffled_ones_on_every_side(plans):
    """What the summary prints; the two pico models read the same texts, and each text moves both."""
    for pooling in ("token", "text"):
        for side, record in PlanDirectory(plans[pooling]).manifest.record["sides"].items():
            assert record["r2"]["plans"] > record["r2"]["permuted"], side
            assert record["correlation"]["plans"] > record["correlation"]["permuted"], side
            assert 0 < record["top_mass"] <= 1
    printed = stage1.summary(PlanDirectory(plans["text"]).manifest.record)
    assert len(printed.splitlines()) == 3 + 6 and "R^2" in printed


def test_two_runs_write_the_same_bytes(plans, models, texts, tmp_path):
    run_main(stage1, "--model-a-path", models["source"], "--model-b-path", models["target"], "--data_subset", "file",
             "--data_file", texts, "--pooling", "token", "--max_tokens", 24, "--out_dir", tmp_path / "p")  # fmt: skip
    assert digests(tmp_path / "p") == digests(plans["token"])
    for name in ("a", "b"):
        fuse(tmp_path / "p", models, tmp_path / name)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


@pytest.mark.parametrize("lost", ["everything", "source", "sides", "layers"])
def test_a_killed_run_continues_to_the_same_bytes(plans, models, texts, tmp_path, monkeypatch, lost):
    folder = tmp_path / "p"
    shutil.copytree(plans["token"], folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    for key in ("shapes", "rows", "versions", "commit"):
        manifest.pop(key)
    manifest["status"] = "incomplete"
    kept = {"everything": [], "source": [], "sides": ["q", "k"], "layers": ["q", "k"]}[lost]
    manifest["sides"] = {side: manifest["sides"][side] for side in kept}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    for path in (folder / "plans").iterdir():
        if path.stem not in kept:
            path.unlink()
    if lost in ("everything", "source"):
        (folder / "activations" / "source.safetensors").unlink()
    if lost == "everything":
        shutil.rmtree(folder / "activations")
        (folder / "selection.safetensors").unlink()
    elif lost != "source":
        monkeypatch.setattr(stage1, "extract", lambda *_: pytest.fail("activations are there already"))
    flags = ["--target-model", models["target"], "--source-model", models["source"], "--data-subset", "file",
             "--data-file", texts, "--pooling", "token", "--max-tokens", 24, "--out-dir", folder]  # fmt: skip
    solved = []
    if lost == "layers":  # killed in the middle of a side: two of three layers are there
        solve, write = stage1.solve_layer, write_part

        def dies(*arguments):
            if len(solved) == 3:
                raise KeyboardInterrupt
            write(*arguments)

        monkeypatch.setattr(stage1, "solve_layer", lambda zx, *a: solved.append(zx.shape) or solve(zx, *a))
        monkeypatch.setattr(stage1.plans, "write_part", dies)
        with pytest.raises(KeyboardInterrupt):
            run_main(stage1, *flags)
        assert [part_file(folder, "v", layer).is_file() for layer in range(3)] == [True, True, False]
        monkeypatch.setattr(stage1.plans, "write_part", write)
        solved.clear()
    run_main(stage1, *flags)
    assert digests(folder) == digests(plans["token"])
    assert lost != "layers" or len(solved) == 1 + 3 * 3


def test_processes_share_the_layers_and_write_the_same_bytes(plans, models, texts, tmp_path):
    """Two processes of one thread each, and a memory budget that keeps no source layer, against one process."""
    flags = ["--target-model", models["target"], "--source-model", models["source"], "--data-subset", "file",
             "--data-file", texts, "--pooling", "token", "--max-tokens", "24", "--tokens-per-batch", "200"]  # fmt: skip
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1",
              "--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    tight = ["--pairs-budget-mb", "1", "--activations-budget-mb", "0"]
    for name, command, more in (("one", [], []), ("two", launch, tight)):
        done = subprocess.run([sys.executable, *command, str(ROOT / "run_activs_and_hot.py"), *map(str, flags),
                               "--out-dir", str(tmp_path / name), *more],
                              env=environment, capture_output=True, text=True)  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.count("Spearman") == 1
    one, two = digests(tmp_path / "one"), digests(tmp_path / "two")
    assert one.pop("resolved.yaml") != two.pop("resolved.yaml") and one == two


@pytest.mark.parametrize("pooling", ["token", "text"])
@pytest.mark.parametrize("flags", [["--activations-budget-mb", 0], ["--device-map", "disk"]])
def test_where_rows_and_weights_are_kept_does_not_change_the_bytes(plans, models, texts, tmp_path, pooling, flags):
    folder = tmp_path / "p"
    run_main(stage1, "--target-model", models["target"], "--source-model", models["source"], "--data-subset", "file",
             "--data-file", texts, "--pooling", pooling, "--max-tokens", 24, "--out-dir", folder, *flags)  # fmt: skip
    got, expected = digests(folder), digests(plans[pooling])
    assert got.pop("resolved.yaml") != expected.pop("resolved.yaml") and got == expected


def test_a_killed_reading_of_two_processes_continues(models, texts, tmp_path, monkeypatch):
    """Both processes in this one, one after the other; the first is killed when it begins to read the source."""
    pair = {name: open_checkpoint(str(models[name])) for name in ("target", "source")}
    experiment = Experiment(data_subset="file", data_file=str(texts), pooling="token", max_tokens=24,
                            tokens_per_batch=200)  # fmt: skip
    rows = load_rows("file", "calibration", 2000, 0, str(texts))
    readings, aside = stage1.read_both(*pair.values(), rows, experiment)
    extract, read = stage1.extract, []

    def process(folder: Path, index: int, count: int) -> list[str]:
        read.clear()
        state = SimpleNamespace(process_index=index, num_processes=count, is_main_process=index == 0,
                                wait_for_everyone=lambda: None)  # fmt: skip
        stage1.record_activations(folder, pair, readings, aside, experiment, state)
        return list(read)

    def record(*arguments):
        read.append(arguments[4])
        return extract(*arguments)

    def dies(*arguments):
        if arguments[4].startswith("source"):
            raise KeyboardInterrupt
        return extract(*arguments)

    monkeypatch.setattr(stage1, "extract", record)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    both = ["target activations", "source activations"]
    assert process(tmp_path / "one", 0, 1) == both and process(tmp_path / "two", 1, 2) == both
    with monkeypatch.context() as patch:
        patch.setattr(stage1, "extract", dies)
        with pytest.raises(KeyboardInterrupt):
            process(tmp_path / "two", 0, 2)
    assert process(tmp_path / "two", 1, 2) == []
    assert process(tmp_path / "two", 0, 2) == both[1:]
    assert digests(tmp_path / "two") == digests(tmp_path / "one")
    assert sorted(digests(tmp_path / "one")) == [
        "activations/source.safetensors", "activations/target.safetensors", "selection.safetensors"]  # fmt: skip


def test_what_a_killed_reading_left_is_removed(plans, models, texts, tmp_path):
    folder = tmp_path / "p"
    shutil.copytree(plans["text"], folder)
    for name in ("rows", "offload"):
        (folder / f"{TEMPORARY}{name}-abc").mkdir()
        (folder / f"{TEMPORARY}{name}-abc" / "0").write_bytes(b"left")
    run_main(stage1, "--target-model", models["target"], "--source-model", models["source"], "--data-subset", "file",
             "--data-file", texts, "--max-tokens", 24, "--out-dir", folder)  # fmt: skip
    assert digests(folder) == digests(plans["text"])


def test_a_finished_run_is_reused_and_a_changed_setting_runs_again(plans, models, texts, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "p"
    shutil.copytree(plans["text"], folder)
    flags = ["--target-model", models["target"], "--source-model", models["source"], "--data-subset", "file",
             "--data-file", texts, "--max-tokens", 24, "--out-dir", folder]  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(stage1, "extract", lambda *_: pytest.fail("it is finished"))
        run_main(stage1, *flags)
    assert "Spearman" in capsys.readouterr().out
    run_main(stage1, *flags, "--epsilon", "0.2")
    assert digests(folder)["plans/q.safetensors"] != digests(plans["text"])["plans/q.safetensors"]


def test_plans_that_do_not_converge_are_told_once(models, texts, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        run_main(stage1, "--target-model", models["target"], "--source-model", models["source"],
                 "--data-subset", "file", "--data-file", texts, "--sinkhorn-iters", 1,
                 "--out-dir", tmp_path / "p")  # fmt: skip
    told = [r.getMessage() for r in caplog.records if "did not reach" in r.getMessage()]
    assert len(told) == 1 and "attn_in" in told[0] and "--sinkhorn-iters" in told[0]
    assert not load_file(tmp_path / "p/plans/q.safetensors")["converged"].all()


# Stage 2


def test_fused_checkpoint_is_plain_and_loads_in_stock_transformers(fused, models):
    before, after = (load_file(folder / "model.safetensors") for folder in (models["target"], fused))
    assert before.keys() == after.keys()
    for name in before:
        changed = not torch.equal(before[name], after[name])
        assert changed == (".self_attn." in name), name
    assert {"config.json", "tokenizer.json", "chat_template.jinja", "generation_config.json", "README.md",
            "hot_residual.safetensors", "fusion_report.json", "resolved.yaml"} <= set(digests(fused))  # fmt: skip
    assert not torch.equal(logits(fused), logits(models["target"]))
    report = json.loads((fused / "fusion_report.json").read_text())
    assert report["dropped_biases"] == 9 and len(report["projections"]) == 12
    assert "base_model" in (fused / "README.md").read_text()


@pytest.mark.parametrize("form", ["interpolate", "additive"])
@pytest.mark.parametrize("top_k", ["0", "5"])
def test_unfolded_model_gives_the_logits_of_the_folded_one(plans, models, tmp_path, form, top_k):
    out = fuse(plans["token"], models, tmp_path / "f", "--feature-map", "calibrated", "--alpha", "0.2",
               "--top-k", top_k, "--residual-form", form)  # fmt: skip
    folded = logits(out)
    residuals, alpha, stored_form = load_residuals(out / "hot_residual.safetensors")
    assert (alpha, stored_form) == (0.2, form)
    checkpoint = open_checkpoint(str(out))
    model = checkpoint.load_model("float32")
    restore_base(model, residuals, checkpoint.layout.name)
    assert all(torch.equal(value, model.state_dict()[name])
               for name, value in load_file(models["target"] / "model.safetensors").items())  # fmt: skip
    enable_hot_residual_for_model(model, residuals, checkpoint.layout.name, alpha, form)
    with torch.no_grad():
        unfolded = model(torch.arange(40).reshape(2, 20)).logits
    assert float((unfolded - folded).abs().max()) <= 1e-5 * float(folded.abs().max())


def test_unselected_rows_and_columns_are_bit_identical(plans, models, tmp_path):
    out = fuse(plans["token"], models, tmp_path / "f", "--feature-map", "regression", "--alpha", "0.5", "--top-k", "5")
    before, after = (load_file(folder / "model.safetensors") for folder in (models["target"], out))
    directory = PlanDirectory(plans["token"])
    for layer in range(3):
        for c in "qkvo":
            name = f"model.layers.{layer}.self_attn.{c}_proj.weight"
            changed = (before[name] != after[name]).any(1 if c != "o" else 0).nonzero().flatten()
            strongest = directory.strongest("o_in" if c == "o" else c, layer)[:5]
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
    run_main(stage1, "--target-model", models["source"], "--source-model", models["target"], "--data-subset", "file",
             "--data-file", texts, "--pooling", "token", "--out-dir", tmp_path / "p")  # fmt: skip
    for feature_map, bias_moves in (("barycentric", False), ("regression", True)):
        out = fuse(tmp_path / "p", models, tmp_path / feature_map, "--feature-map", feature_map, "--top-k", "0",
                   target="source", source="target")  # fmt: skip
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
    run_main(stage1, "--target-model", folder, "--source-model", models["source"], "--data-subset", "file",
             "--data-file", texts, "--max-tokens", 24, "--out-dir", tmp_path / "p")  # fmt: skip
    out = fuse(tmp_path / "p", {**models, "target": folder}, tmp_path / "f", "--top-k", "4", "--max-shard-size", "16KB")
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
    fused_layers = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(fused_layers) == 3 * 4 and all("_proj.weight" in name for name in fused_layers)
    whole = fuse(tmp_path / "p", {**models, "target": folder}, tmp_path / "g", "--top-k", "4")
    assert [path.name for path in whole.glob("model*")] == ["model.safetensors"]
    assert torch.equal(logits(out), logits(whole))


def test_corollary_4_2_a_permuted_source_gives_the_target_back(texts, tmp_path):
    """Source = target with hidden channels and heads permuted: W~ = W, so the fused model is the target at any alpha.

    The maps are square here, so In and Out can be swapped: that must fail.
    """
    target = llama(head_dim=8, num_key_value_heads=3, hidden_size=24, num_hidden_layers=2)
    channels, heads = torch.randperm(24, generator=torch.Generator().manual_seed(5)), torch.tensor([2, 0, 1])
    neurons = (heads[:, None] * 8 + torch.arange(8)).flatten()
    source = llama(head_dim=8, num_key_value_heads=3, hidden_size=24, num_hidden_layers=2)
    state = {}
    for name, value in target.state_dict().items():
        if name.endswith("o_proj.weight"):
            value = value[channels][:, neurons]
        elif "self_attn" in name:
            value = value[neurons][:, channels]
        elif name.endswith("down_proj.weight") or value.ndim == 1:
            value = value[channels]
        else:
            value = value[:, channels]
        state[name] = value
    source.load_state_dict(state)
    tokenizer = make_tokenizer(400, 1)
    models = {"target": save(target, tokenizer, tmp_path / "t"), "source": save(source, tokenizer, tmp_path / "s")}
    assert_close(logits(models["source"]), logits(models["target"]), atol=1e-4, rtol=1e-4)
    run_main(stage1, "--target-model", models["target"], "--source-model", models["source"], "--data-subset", "file",
             "--data-file", texts, "--pooling", "token", "--out-dir", tmp_path / "p")  # fmt: skip
    assert PlanDirectory(tmp_path / "p").layer_plan("q").argmax(1).tolist() == [0, 1]
    out = fuse(tmp_path / "p", models, tmp_path / "f", "--feature-map", "regression", "--alpha", "1", "--top-k", "0",
               "--ridge", "1e-6")  # fmt: skip
    settings = FusionSettings("regression", ridge=1e-6)
    transport = Transport(PlanDirectory(tmp_path / "p"), open_checkpoint(str(models["source"])), settings)
    for residual in load_residuals(out / "hot_residual.safetensors")[0]:
        W, layer, c = residual.original_weight, residual.layer, residual.projection
        assert float((W - residual.weight).norm() / W.norm()) <= 1e-3, (layer, c)
        Out, In = transport._maps(layer, layer, c, residual.index)
        swapped = In @ transport.source.weight(layer, c) @ Out
        assert float((W - swapped).norm() / W.norm()) > 0.5, (layer, c)
    assert_close(logits(out), logits(models["target"]), atol=2e-2, rtol=2e-2)


# Stage 3


def train(model_dir: Path, out: Path, *flags) -> Path:
    run_main(stage3, "--model_dir", model_dir, "--output_dir", out, "--sft-samples", 8, "--gradient-accumulation", 2,
             "--learning-rate", "1e-2", *flags)  # fmt: skip
    return out


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


# Bad input: one line, exit code 2, nothing left behind


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"--target-model": "/no/such/model"}, "model /no/such/model does not exist"),
        ({"--target-model": "nobody/nothing"}, "neither a folder, nor in models, nor to be had from the hub"),
        ({"--target-model": "EMPTY"}, "not a model folder: it has no config.json"),
        ({"--source-model": "BERT"}, "unsupported model_type 'bert'; supported: llama (LlamaForCausalLM), mistral"),
        ({"--source-model": "CONFIG"}, "has no model.safetensors"),
        ({"--data-file": "FEW"}, "plans need at least 16 texts"),
        ({"--data-file": "BLANK"}, "row 21 has an empty text"),
        ({"--calibration-samples": "15"}, "plans need at least 16 texts"),
        ({"--epsilon": "-1"}, "epsilon is -1.0; expected a positive number"),
        ({"--config": "YAML"}, "unknown key 'learning'"),
        ({"--out-dir": "OTHERS"}, "is not empty and was not made by this tool"),
        ({"--nonsense": "1"}, "unrecognized arguments: --nonsense"),
    ],
)
def test_stage1_bad_input(fails, models, texts, tmp_path, flags, message):
    for name in ("empty", "bert", "config", "others"):
        (tmp_path / name).mkdir()
    (tmp_path / "bert/config.json").write_text('{"model_type": "bert"}')
    shutil.copy(models["source"] / "config.json", tmp_path / "config")
    (tmp_path / "others/thesis.txt").write_text("mine")
    few = sentences(20, 0)
    (tmp_path / "few.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in few))
    (tmp_path / "blank.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in [*few, " "]))
    (tmp_path / "bad.yaml").write_text("learning: fast")
    places = {"EMPTY": "empty", "BERT": "bert", "CONFIG": "config", "OTHERS": "others", "FEW": "few.jsonl",
              "BLANK": "blank.jsonl", "YAML": "bad.yaml"}  # fmt: skip
    given = {"--target-model": models["target"], "--source-model": models["source"], "--data-subset": "file",
             "--data-file": texts, "--out-dir": tmp_path / "out"}  # fmt: skip
    given |= {flag: tmp_path / places[value] if value in places else value for flag, value in flags.items()}
    assert message in fails(stage1, *(part for pair in given.items() for part in pair))
    assert not (tmp_path / "out").exists() and len(list((tmp_path / "others").iterdir())) == 1


def test_stage2_bad_input(fails, models, plans, tmp_path):
    def failure(*flags, target="target", source="source", hot_dir=plans["token"]):
        given = ["--hot_dir", hot_dir, "--modelA_id", models[target], "--modelB_id", models[source],
                 "--output_dir", tmp_path / "out", *flags]  # fmt: skip
        line = fails(stage2, *given)
        assert not (tmp_path / "out").exists()
        return line

    assert "target and source are swapped" in failure(target="source", source="target")
    assert "the plans belong to other models" in failure(target="other")
    assert "alpha is 2.0; expected a number from 0 to 1" in failure("--alpha", "2")
    assert "run that stage first" in failure(hot_dir=tmp_path)
    half = tmp_path / "half"
    shutil.copytree(plans["token"], half)
    manifest = json.loads((half / "manifest.json").read_text()) | {"status": "incomplete"}
    (half / "manifest.json").write_text(json.dumps(manifest))
    assert "is not finished" in failure(hot_dir=half)
    (half / "manifest.json").write_text("{")
    assert "is not valid JSON" in failure(hot_dir=half)


def test_stage3_bad_input(fails, fused, models, plans, tmp_path):
    out = tmp_path / "out"
    assert "--model_type qwen2, but" in fails(
        stage3, "--model_dir", fused, "--output_dir", out, "--model_type", "qwen2"
    )
    assert "hot_residual.safetensors" in fails(stage3, "--model_dir", models["target"], "--output_dir", out)
    assert "invalid choice: 'mamba'" in fails(
        stage3, "--model_dir", fused, "--output_dir", out, "--model_type", "mamba"
    )
    assert "--output_dir is missing" in fails(stage3, "--model_dir", fused)
    assert "holds the output of stage 'plans'" in fails(stage3, "--model_dir", fused, "--output_dir", plans["text"])
    assert "leaves nothing to train" in fails(stage3, "--model_dir", fused, "--output_dir", out, "--alpha", 0,
                                              "--freeze-strategy", "frozen_base")  # fmt: skip
    assert not out.exists()


def test_an_output_folder_is_never_an_input(fails, fused, models, plans, tmp_path):
    """Writing there would empty it first."""
    trained = train(fused, tmp_path / "a")
    before = digests(trained)
    assert "holds the input" in fails(stage3, "--model_dir", trained, "--output_dir", trained)
    again = ["--target-model", trained, "--source-model", models["source"], "--data-subset", "python_reference"]
    assert "holds the input" in fails(stage1, *again, "--out-dir", trained)
    assert "holds the input" in fails(stage2, "--hot_dir", plans["token"], "--modelA_id", models["target"],
                                      "--modelB_id", models["source"], "--output_dir", plans["token"])  # fmt: skip
    assert digests(trained) == before


def test_another_split_of_the_same_data_is_refused(fails, fused, texts, tmp_path):
    line = fails(stage3, "--model_dir", fused, "--output_dir", tmp_path / "a", "--data-subset", "file",
                 "--data-file", texts, "--split-seed", 1)  # fmt: skip
    assert "split_seed is 1, but the plans were made with 0" in line


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
    (out / ".tmp-model.safetensors").mkdir()
    fuse(plans["token"], models, out, "--feature-map", "regression", "--alpha", "0.3", "--top-k", "0")
    assert digests(out) == digests(fused)


def test_fusion_killed_between_layers_goes_on_with_the_missing_ones(fused, plans, models, tmp_path, monkeypatch):
    flags = ["--feature-map", "regression", "--alpha", "0.3", "--top-k", "0"]
    save_one, done = stage2.save_residuals, []

    def dies(path, residuals, *arguments):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(residuals[0].layer)
        save_one(path, residuals, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(stage2, "save_residuals", dies)
        with pytest.raises(KeyboardInterrupt):
            fuse(plans["token"], models, tmp_path / "f", *flags)
    monkeypatch.setattr(stage2, "save_residuals", lambda *a: done.append(a[1][0].layer) or save_one(*a))
    assert digests(fuse(plans["token"], models, tmp_path / "f", *flags)) == digests(fused)
    assert done == [0, 1, 2]


def test_constant_neurons_have_no_deviation(tmp_path):
    rows = torch.full((4096, 3), 0.1)
    rows[:, 1] = torch.randn(4096)
    write_activations(tmp_path, "target", {("q", 0): rows.clone()}, torch.zeros(4096, dtype=torch.bool), half=True)
    stored = load_file(tmp_path / "activations/target.safetensors")
    assert stored["q.0.std"][0] == stored["q.0.std"][2] == 0 and stored["q.0"].dtype == torch.float16
    assert_close(stored["q.0"].float() + stored["q.0.mean"], rows, atol=2e-3, rtol=0)


def test_nan_activations_are_named(models, texts, tmp_path):
    broken = llama()
    with torch.no_grad():
        broken.model.layers[1].self_attn.k_proj.weight[0, 0] = float("nan")
    folder = save(broken, make_tokenizer(400, 1), tmp_path / "broken")
    with pytest.raises(UserError, match="target layer 1, side k: activations contain NaN"):
        run_main(stage1, "--target-model", folder, "--source-model", models["source"], "--data-subset", "file",
                 "--data-file", texts, "--out-dir", tmp_path / "p")  # fmt: skip


@pytest.mark.parametrize(
    ("command", "folder"),
    [
        (["run_activs_and_hot.py"], ROOT),
        (["core/generate_hot_residual.py"], ROOT),
        (["-m", "core.generate_hot_residual"], ROOT),
        (["generate_hot_residual.py"], ROOT / "core"),
        (["train_hot_residual_sft.py"], ROOT / "core"),
        (["evaluation/compare_arms.py"], ROOT),
    ],
)
def test_every_way_to_start_a_command(command, folder):
    done = subprocess.run([sys.executable, *command, "--alpha", "x" if "generate" in command[-1] else "0.1", "--nope"],
                          cwd=folder, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 2 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
