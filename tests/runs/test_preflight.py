"""`--dry-run` of stages 1 and 2, and what a run reports before it loads anything."""

import json
import shutil

import psutil
import pytest
import torch
from conftest import run_main
from safetensors.torch import load_file, save_file
from stages import fuse, pair_flags, plan_flags

import run_activs_and_hot as stage1
from core import generate_hot_residual as stage2
from core import train_hot_residual_sft as stage3
from core.models import checkpoints
from core.models.checkpoints import open_checkpoint
from core.runs.plan_directory import PlanDirectory
from core.runs.preflight import stage2_memory
from core.runs.settings import Experiment
from evaluation import compare_arms as stage4


@pytest.fixture
def no_weights(monkeypatch):
    """No model may be loaded and no tensor read."""
    monkeypatch.setattr(checkpoints.Checkpoint, "load_model", lambda *_: pytest.fail("a model was loaded"))
    monkeypatch.setattr(checkpoints.Checkpoint, "tensor", lambda *_: pytest.fail("a tensor was read"))


@pytest.fixture
def pair(models, tmp_path):
    """Copies of the pico pair that a test may damage."""
    for name in ("target", "source"):
        shutil.copytree(models[name], tmp_path / name)
    return {name: tmp_path / name for name in ("target", "source")}


def stage2_flags(pair, plans, out):
    return [*pair_flags(pair), "--hot-dir", plans["text"], "--output-dir", out]


def test_stage1_dry_run_says_what_it_would_do(no_weights, models, texts, tmp_path, capsys):
    run_main(stage1, *plan_flags(models, texts, tmp_path / "p"), "--dry-run")
    printed = capsys.readouterr().out
    assert "llama, 3 layers, hidden 24, 3 heads of 12, 1 kv heads, biases none" in printed
    assert "qwen2, 4 layers, hidden 32, 4 heads of 8, 2 kv heads, biases q k v" in printed
    assert "36 x 32" in printed and "45 texts; nothing is missing" in printed
    assert not (tmp_path / "p").exists()


def test_stage1_dry_run_warns_of_every_part_that_a_later_stage_would_find_empty(no_weights, models, tmp_path, caplog):
    lines = [json.dumps({"text": f"text {n}", "group": "a"}) for n in range(30)]  # all of them calibration
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    run_main(stage1, *plan_flags(models, tmp_path / "t.jsonl", tmp_path / "p"), "--dry-run")
    for part in ("sft", "validation", "held_out"):
        assert f"0 % of them in the {part} part instead of" in caplog.text
    assert "take another --split-seed" in caplog.text and "and run all stages again" in caplog.text


def test_stage1_dry_run_converts_nothing(no_weights, models, texts, tmp_path, monkeypatch, capsys):
    """A folder of .bin weights is reported as waiting for a conversion, with the cost that its config gives."""
    monkeypatch.setenv("MODELS_ROOT", str(tmp_path / "root"))
    source = shutil.copytree(models["source"], tmp_path / "bin")
    torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    flags = plan_flags({"target": models["target"], "source": source}, texts, tmp_path / "p")
    run_main(stage1, *flags, "--dry-run")
    printed = capsys.readouterr().out
    assert f"source {source} waits for a conversion" in printed and "36 x 32" in printed
    assert not (tmp_path / "root").exists() and not (tmp_path / "p").exists()
    checkpoints.open_checkpoint(str(source))
    run_main(stage1, *flags, "--dry-run")
    assert "nothing is missing" in capsys.readouterr().out


def test_stage1_dry_run_reports_a_damaged_tokenizer(no_weights, fails, pair, texts, tmp_path):
    (pair["source"] / "tokenizer.json").write_text("{")
    error = fails(stage1, *plan_flags(pair, texts, tmp_path / "p"), "--dry-run")
    assert "tokenizer.json cannot be read" in error and "copy it again" in error


def test_stage2_dry_run_says_what_would_be_fused(no_weights, models, plans, tmp_path, capsys):
    run_main(stage2, *stage2_flags(models, plans, tmp_path / "f"), "--top-k", 5, "--dry-run")
    printed = capsys.readouterr().out
    assert "q: 5 of 36 rows in each of 3 layers, bias not fused" in printed
    assert "o: 5 of 36 columns in each of 3 layers" in printed and "nothing is missing" in printed
    assert not (tmp_path / "f").exists()


def test_the_memory_of_a_search_for_strengths_has_the_logits_of_a_batch(models, plans):
    """Of 400 tokens, in float32: three copies for a loss, four with gradients."""
    opened, pair = PlanDirectory(plans["token"]), [open_checkpoint(str(models[role])) for role in ("target", "source")]
    for alpha, copies in ((0.1, 0), ("auto", 3), ("learned", 4)):
        less, more = (
            stage2_memory(opened, *pair, Experiment.of(alpha=alpha, feature_map="regression", tokens_per_batch=size))
            for size in (10**6, 2 * 10**6)
        )
        assert more - less == copies * 4 * 400 * 10**6


def test_stage3_dry_run_says_what_would_be_trained(no_weights, fused, texts, tmp_path, capsys):
    flags = ("--model-dir", fused, "--data-subset", "file", "--data-file", texts, "--output-dir", tmp_path / "a")
    flags += ("--sft-samples", 9, "--epochs", 2, "--gradient-accumulation", 4, "--train-alpha", 0.2, "--dry-run")
    run_main(stage3, *flags)
    printed = capsys.readouterr().out
    assert "llama, 3 layers" in printed and "hot, alpha 0.2, learning rate 1e-06, seed 0" in printed
    assert "9 rows to train on, about 5 updates" in printed and "nothing is missing" in printed
    run_main(stage3, *flags, "--training-scenario", "no_hot")
    assert "no_hot, learning rate" in capsys.readouterr().out
    assert not (tmp_path / "a").exists()


def test_a_dry_run_says_what_would_be_made_anew(models, plans, fused, texts, tmp_path, capsys):
    """And says nothing of what would be kept, or differs only in what a dry run decides in another way."""
    shutil.copytree(plans["text"], tmp_path / "p")
    fuse(plans["text"], models, tmp_path / "f")
    training = ["--model-dir", fused, "--output-dir", tmp_path / "a", "--sft-samples", 4]
    run_main(stage3, *training)
    other = {**models, "target": models["other"]}
    for stage, folder, flags, changes in (
        (stage1, "p", plan_flags(models, texts, tmp_path / "p"), {"--dtype=float32": "", "--eta=0.3": "settings"}),
        (stage1, "p", plan_flags(models, texts, tmp_path / "p"), {"--calibration-samples=20": "data"}),
        (stage1, "p", plan_flags(other, texts, tmp_path / "p"), {"--device=cpu": "target"}),
        (stage2, "f", stage2_flags(models, plans, tmp_path / "f"), {"--device=cpu": "", "--alpha=0.9": "settings"}),
        (stage3, "a", training, {"--dtype=bfloat16": "", "--sft-samples=5": "data", "--learning-rate=1": "settings"}),
    ):
        for change, difference in changes.items():
            capsys.readouterr()
            run_main(stage, *flags, change, "--dry-run")
            lines = [line for line in capsys.readouterr().out.splitlines() if "anew" in line]
            told = f"{tmp_path}/{folder} was made with other inputs ({difference}) and would be made anew"
            assert lines == ([told] if difference else [])


def test_a_dry_run_waits_for_the_stage_before(tmp_path, monkeypatch, capsys):
    """A folder of the run that is missing or not finished is no failure."""
    monkeypatch.setenv("TRANSPORT_RESULTS_ROOT", str(tmp_path))
    config = tmp_path / "x.yaml"
    config.write_text("plans_from: y")
    for stage, folder, command in (
        (stage2, "y/plans", "run_activs_and_hot.py"),
        (stage3, "x/fused", "core/generate_hot_residual.py"),
        (stage4, "y/plans", "run_activs_and_hot.py"),
    ):
        for begun in (False, True):
            if begun:
                (tmp_path / folder).mkdir(parents=True, exist_ok=True)
                (tmp_path / folder / "manifest.json").write_text('{"status": "incomplete"}')
            run_main(stage, "--config", config, "--dry-run")
            expected = f"{tmp_path}/{folder} is not finished yet; what depends on it can be checked after {command}\n"
            assert capsys.readouterr().out == expected


def damage(folder, **changes):
    """Rewrite the weights with some tensors replaced, or left out (None)."""
    tensors = load_file(folder / "model.safetensors") | {key.replace("__", "."): v for key, v in changes.items()}
    save_file({name: v for name, v in tensors.items() if v is not None}, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("stage", [1, 2])
def test_missing_and_misshapen_tensors_are_errors(stage, fails, no_weights, pair, plans, texts, tmp_path, monkeypatch):
    monkeypatch.setattr(stage2.PlanDirectory, "check_models", lambda *_: None)
    damage(pair["target"], model__layers__0__self_attn__k_proj__weight=None)
    damage(
        pair["source"],
        model__layers__1__self_attn__q_proj__weight=torch.zeros(32, 30),
        model__layers__2__self_attn__q_proj__weight=torch.zeros(32, 30),
    )
    flags = plan_flags(pair, texts, tmp_path / "o") if stage == 1 else stage2_flags(pair, plans, tmp_path / "o")
    for mode in ((), ("--dry-run",)):
        error = fails(stage1 if stage == 1 else stage2, *flags, *mode)
        assert "model.layers.0.self_attn.k_proj.weight is missing" in error
        assert "model.layers.1.self_attn.q_proj.weight is (32, 30), expected (32, 32) and 1 more" in error
        assert not (tmp_path / "o").exists()


def test_a_missing_tokenizer_is_reported(fails, no_weights, pair, texts, tmp_path):
    (pair["source"] / "tokenizer.json").unlink()
    error = fails(stage1, *plan_flags(pair, texts, tmp_path / "p"), "--dry-run")
    assert "source" in error and "has no tokenizer files; copy them beside the weights" in error


@pytest.mark.parametrize("stage", [1, 2])
def test_a_full_disk_is_reported(stage, fails, no_weights, models, plans, texts, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    flags = plan_flags(models, texts, tmp_path / "o") if stage == 1 else stage2_flags(models, plans, tmp_path / "o")
    for mode in ((), ("--dry-run",)):
        error = fails(stage1 if stage == 1 else stage2, *flags, *mode)
        assert "has 0.0 GiB free" in error and "free some space or write elsewhere" in error


def test_little_memory_stops_a_dry_run_and_warns_a_run(fails, models, plans, texts, tmp_path, monkeypatch, caplog):
    memory = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=1000))
    error = fails(stage1, *plan_flags(models, texts, tmp_path / "p"), "--dry-run")
    assert "GiB of memory are needed and 0.0 are available; try --dtype bfloat16" in error
    assert "are available" in fails(stage2, *stage2_flags(models, plans, tmp_path / "f"), "--dry-run")
    run_main(stage1, *plan_flags(models, texts, tmp_path / "p"))
    warned = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert sum("are available; try" in message for message in warned) == 1
    assert json.loads((tmp_path / "p" / "manifest.json").read_text())["status"] == "complete"


def test_too_few_texts_and_missing_data_are_reported(fails, no_weights, models, texts, tmp_path):
    few = tmp_path / "few.jsonl"
    few.write_text("".join(texts.read_text("utf-8").splitlines(keepends=True)[:20]), "utf-8")
    error = fails(stage1, *plan_flags(models, few, tmp_path / "p"), "--dry-run")
    assert "8 calibration texts; plans need at least 16 texts" in error
    assert "does not exist" in fails(stage1, *plan_flags(models, tmp_path / "no.jsonl", tmp_path / "p"), "--dry-run")


@pytest.mark.parametrize("how", ["dtype", "config"])
def test_quantised_weights_are_refused(how, fails, no_weights, pair, texts, tmp_path):
    """Their tensors have the right shapes, but hold codes instead of weights."""
    if how == "dtype":
        damage(pair["source"], model__layers__1__self_attn__q_proj__weight=torch.ones(32, 32, dtype=torch.int8))
    else:
        config = json.loads((pair["source"] / "config.json").read_text())
        (pair["source"] / "config.json").write_text(
            json.dumps(config | {"quantization_config": {"quant_method": "fp8"}})
        )
    error = fails(stage1, *plan_flags(pair, texts, tmp_path / "p"))
    assert "is quantised" in error and "give the unquantised checkpoint" in error


def test_damaged_indexes_and_configs_are_reported(fails, pair, texts, tmp_path):
    flags = plan_flags(pair, texts, tmp_path / "p")
    (pair["source"] / "model.safetensors.index.json").write_text("{}")
    assert "index.json has no weight_map" in fails(stage1, *flags)
    (pair["source"] / "config.json").write_text("[]")
    assert "unsupported model_type None" in fails(stage1, *flags)


def test_tokenizers_of_other_files_pass(models, pair, texts, tmp_path, capsys):
    """Any files from which the tokenizer can be loaded will do; there is no list of file names."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(pair["source"])
    model = json.loads((pair["source"] / "tokenizer.json").read_text())["model"]
    (pair["source"] / "tokenizer.json").unlink()
    (pair["source"] / "vocab.json").write_text(json.dumps(model["vocab"]), "utf-8")
    (pair["source"] / "merges.txt").write_text("\n".join(" ".join(pair_) for pair_ in model["merges"]), "utf-8")
    config = json.loads((pair["source"] / "tokenizer_config.json").read_text())
    (pair["source"] / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "Qwen2Tokenizer"}))
    assert len(tokenizer) > 300
    run_main(stage1, *plan_flags(pair, texts, tmp_path / "p"), "--dry-run")
    assert "nothing is missing" in capsys.readouterr().out


def test_stage4_dry_run_waits_for_every_training_that_it_would_compare(tmp_path):
    """Also for one that has not begun, where the other arm has a training of this seed."""

    def finish(folder):
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text('{"status": "complete"}')

    run, plans = tmp_path / "run", tmp_path / "plans"
    for folder in (plans, run / "fused"):
        assert str(folder) in stage4.what_is_unfinished(run, plans)
        finish(folder)
    assert stage4.what_is_unfinished(run, plans) is None  # nothing was trained
    finish(run / "adapted/no_hot/seed0")
    told = f"{run}/adapted/hot/seed0 is not finished yet; what depends on it can be checked after core/train_hot"
    assert stage4.what_is_unfinished(run, plans).startswith(told)
    finish(run / "adapted/hot/seed0")
    assert stage4.what_is_unfinished(run, plans) is None
