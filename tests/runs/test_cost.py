"""`--plan-only`: what stage 1 costs, from two configs alone."""

import dataclasses
import re
import shutil

import pytest
from conftest import run_main

import run_activs_and_hot as stage1
from core.runs import cost
from core.runs.settings import Experiment


@pytest.fixture
def configs(models, tmp_path):
    """Folders that hold a config.json and nothing else."""
    for name in ("target", "source"):
        (tmp_path / name).mkdir()
        shutil.copy(models[name] / "config.json", tmp_path / name)
    return tmp_path


def test_plan_only_counts_what_stage_1_will_write(configs, plans, capsys):
    run_main(
        stage1,
        "--target-model",
        configs / "target",
        "--source-model",
        configs / "source" / "config.json",
        "--plan-only",
        "--pooling",
        "token",
        "--max-rows",
        1000,
        "--max-tokens",
        24,
    )
    printed = capsys.readouterr().out
    assert re.search(r"q +36 x 32 +12 ", printed) and re.search(r"v +12 x 16 +12 ", printed)
    assert re.search(r"plans +72 ", printed)
    target, source = (cost.read_model(str(configs / name), None, "auto", "cpu") for name in ("target", "source"))
    rows = stage1.plan_directory.PlanDirectory(plans["token"]).manifest.record["rows"]
    experiment = Experiment.of(pooling="token", max_rows=rows)
    estimate = cost.stage1_cost(target, source, experiment)
    written = sum(path.stat().st_size for path in plans["token"].rglob("*.safetensors"))
    assert estimate.rows == rows
    assert written / 1.5 <= estimate.disk <= written * 1.5
    side = estimate.sides[0]
    assert side.flops == 12 * (2 * 36 * 32 * rows + 4 * 36 * 32 * estimate.iterations)
    assert estimate.seconds == estimate.reading_seconds + sum(side.seconds for side in estimate.sides) > 0


def test_rows_beyond_the_budget_take_no_memory(configs, monkeypatch):
    monkeypatch.setattr(cost, "CALIBRATION_S", 0.1)
    target, source = (cost.read_model(str(configs / name), None, "auto", "cpu") for name in ("target", "source"))
    rows = 4 * 4000 * 4 * (2 * 16 + 4 * 32)  # of the source: 4000 rows, 4 layers, sides k, v and the four others
    memory = [
        cost.stage1_cost(
            target, source, Experiment.of(calibration_samples=4000, activations_budget_mb=budget, pairs_budget_mb=1)
        ).memory
        for budget in (rows // 2**20 + 1, 0)
    ]
    assert memory[1] < memory[0] - rows / 2


def test_parameters_are_those_of_the_model(configs):
    from conftest import llama

    model = llama()
    read = cost.read_model(str(configs / "target"), None, "auto", "cpu")
    assert read.layer_parameters + read.other_parameters == sum(p.numel() for p in model.parameters())
    assert read.other_parameters == 400 * 24 + 24  # tied embeddings and the last norm
    assert read.weight_bytes == 4 and cost.read_model(read.name, None, "bfloat16", "cpu").weight_bytes == 2


def test_paper_mode_and_epsilon_decide_the_iterations(configs):
    target, source = (cost.read_model(str(configs / name), None, "auto", "cpu") for name in ("target", "source"))

    def iterations(**changes):
        return cost.stage1_cost(target, source, Experiment.of(**changes)).iterations

    assert iterations(sinkhorn_mode="paper", sinkhorn_iters=200) == 200
    assert iterations(epsilon=0.03) > iterations(epsilon=0.1) == iterations(epsilon=0.5) == 10


@pytest.mark.parametrize("name", ["llama-3.2-1b", "llama-3.1-8b", "llama-3.1-70b"])
def test_shipped_configs_have_the_published_sizes(name):
    from conftest import ROOT

    read = cost.read_model(str(ROOT / "scripts" / "configs" / f"{name}.json"), None, "auto", "cpu")
    published = {"llama-3.2-1b": 1.236e9, "llama-3.1-8b": 8.030e9, "llama-3.1-70b": 70.554e9}[name]
    assert read.layer_parameters + read.other_parameters == pytest.approx(published, rel=1e-3)


def test_missing_config_is_told(fails, configs):
    (configs / "source" / "config.json").unlink()
    flags = ["--target-model", configs / "target", "--plan-only"]
    assert "config.json does not exist" in fails(stage1, *flags, "--source-model", configs / "source")
    assert "no model given" in fails(stage1, *flags)


def test_two_equal_models_are_two_models(configs):
    """Fusing a fine-tuned model into its base: both are read and both write rows."""
    target = cost.read_model(str(configs / "target"), None, "auto", "cpu")
    other = dataclasses.replace(target, name="other")
    again, different = (cost.stage1_cost(target, source, Experiment(), timed=False) for source in (target, other))
    assert again == different
    assert again.disk > 2 * cost.row_bytes(target.layout, again.rows)


def test_memory_of_the_plans_follows_the_budget():
    def memory(M, budget, device="cpu"):
        experiment = Experiment.of(pairs_budget_mb=budget, device=device)
        return cost.plans_memory(1024, 2048, 2000, M, experiment) / 2**20

    rows = 4 * 2000 * 2048 / 2**20  # of one source layer
    assert memory(20, 1) - memory(10, 1) < 5  # potentials alone
    assert memory(20, 8192) - memory(10, 8192) == pytest.approx(10 * rows, rel=0.1)
    assert memory(20, 8192) - memory(20, 1) == pytest.approx(20 * rows)
    for budget in (500, 1000):  # an accelerator fills what the rows leave of the budget with pairs
        assert budget < memory(1000, budget, "cuda") - 260 < budget + 300


def test_a_short_run_has_no_negative_time(configs):
    target, source = (cost.read_model(str(configs / name), None, "auto", "cpu") for name in ("target", "source"))
    short = cost.stage1_cost(target, source, Experiment.of(sinkhorn_mode="paper", sinkhorn_iters=1))
    assert all(side.seconds > 0 for side in short.sides)
    assert cost.stage1_cost(target, source, Experiment.of(sinkhorn_iters=3), timed=False).iterations == 3


def test_what_was_not_estimated_is_said_once(configs, models, texts, tmp_path, capsys):
    """A dry run estimates no time; with --plan-only every line has one."""
    printed = {}
    alone = {name: configs / name for name in ("target", "source")}
    for mode, pair in (("--dry-run", models), ("--plan-only", alone)):
        flags = ("--target-model", pair["target"], "--source-model", pair["source"], "--out-dir", tmp_path / "p")
        run_main(stage1, *flags, "--data-subset", "file", "--data-file", texts, mode)
        printed[mode] = capsys.readouterr().out
        assert "not asked" not in printed[mode] and "peak memory" in printed[mode]
    assert printed["--dry-run"].count("the time was not estimated; --plan-only does it") == 1
    assert not re.search(r"^(q|plans|reading) .*(s|min|h)$", printed["--dry-run"], re.M)
    assert len(re.findall(r"^(?:q|plans|reading) .* (?:s|min|h)$", printed["--plan-only"], re.M)) == 3
    assert "on this machine" in printed["--plan-only"] and "not estimated" not in printed["--plan-only"]
