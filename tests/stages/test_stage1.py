"""Stage 1 through its command line on pico models: LLaMA target, Qwen2 source, other depths and widths."""

import json
import logging
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, run_main
from safetensors.torch import load_file
from stages import data_flags, digests, fuse, pair_flags, plan, plan_flags
from torch.testing import assert_close

import run_activs_and_hot as stage1
from core.data import DataSpec, load_rows
from core.files import TEMPORARY
from core.models.checkpoints import open_checkpoint
from core.runs import plan_solver, row_recorder
from core.runs.plan_directory import PlanDirectory
from core.runs.plan_files import layer_file, write_activations
from core.runs.settings import Experiment


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
        X, Y = (
            load_file(plans[pooling] / "activations" / f"{model}.safetensors")[f"{side}.1"].double().numpy()
            for model in ("target", "source")
        )
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
    """Also with the spelling of the flags in the seed's README."""
    pair = ["--model-a-path", models["source"], "--model-b-path", models["target"]]
    data = ["--data_subset", "file", "--data_file", texts]
    run_main(stage1, *pair, *data, "--pooling", "token", "--max_tokens", 24, "--out_dir", tmp_path / "p")
    assert digests(tmp_path / "p") == digests(plans["token"])
    for name in ("a", "b"):
        fuse(tmp_path / "p", models, tmp_path / name)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


def interrupted(plans: Path, folder: Path, sides: list[str]) -> Path:
    """A copy of a plan directory as a run leaves it that was killed when these sides were complete."""
    shutil.copytree(plans, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    for key in ("shapes", "rows", "unaligned", "versions", "commit"):
        manifest.pop(key)
    manifest["status"] = "incomplete"
    manifest["sides"] = {side: manifest["sides"][side] for side in sides}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    for path in (folder / "plans").iterdir():
        if path.stem not in sides:
            path.unlink()
    return folder


@pytest.mark.parametrize("lost", ["everything", "source"])
def test_a_run_that_was_killed_while_it_read_continues_to_the_same_bytes(plans, models, texts, tmp_path, lost):
    folder = interrupted(plans["token"], tmp_path / "p", [])
    (folder / "activations" / "source.safetensors").unlink()
    if lost == "everything":
        shutil.rmtree(folder / "activations")
        (folder / "selection.safetensors").unlink()
    plan(models, texts, folder, "--pooling", "token")
    assert digests(folder) == digests(plans["token"])


@pytest.mark.parametrize("in_a_side", [False, True])
def test_a_run_that_was_killed_while_it_solved_continues_to_the_same_bytes(
    plans, models, texts, tmp_path, monkeypatch, in_a_side
):
    """Between two sides, or in the middle of one, when two of its three layers are on disk."""
    folder = interrupted(plans["token"], tmp_path / "p", ["q", "k"])
    monkeypatch.setattr(row_recorder, "extract", lambda *_: pytest.fail("the activations are on disk"))
    solve, write, solved = plan_solver.solve_layer, plan_solver.write_layer, []
    monkeypatch.setattr(plan_solver, "solve_layer", lambda zx, *a: solved.append(zx.shape) or solve(zx, *a))

    def write_two(*arguments):
        if len(solved) == 3:
            raise KeyboardInterrupt
        write(*arguments)

    if in_a_side:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(plan_solver, "write_layer", write_two)
            plan(models, texts, folder, "--pooling", "token")
        assert [layer_file(folder, "v", layer).is_file() for layer in range(3)] == [True, True, False]
        solved.clear()
    plan(models, texts, folder, "--pooling", "token")
    assert digests(folder) == digests(plans["token"])
    assert len(solved) == 4 * 3 - (2 if in_a_side else 0)


def test_processes_share_the_layers_and_write_the_same_bytes(models, texts, tmp_path):
    """Two processes of one thread each, and a memory budget that keeps no source layer, against one process."""
    (tmp_path / "x.yaml").write_text("name: x")
    tight = ["--pairs-budget-mb", "1", "--activations-budget-mb", "0", "--config", tmp_path / "x.yaml"]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    environment["TRANSPORT_RESULTS_ROOT"] = str(tmp_path / "results")
    shared = ["--pooling", "token", "--tokens-per-batch", "200"]
    for name, launcher, more in (("one", [], []), ("two", launch, tight)):
        flags = plan_flags(models, texts, tmp_path / name, *shared, *more)
        command = [sys.executable, *launcher, ROOT / "run_activs_and_hot.py", *flags]
        done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.count("Spearman") == 1
        assert done.stderr.count("45 of 45 calibration texts") == (2 if launcher else 1)  # both processes took part
    one, two = digests(tmp_path / "one"), digests(tmp_path / "two")
    assert one.pop("resolved.yaml") != two.pop("resolved.yaml") and one == two
    log = (tmp_path / "results/x/log.txt").read_text()  # of the first process, which reads three times and joins three
    assert log.count("are kept on disk") == 6


@pytest.mark.parametrize("pooling", ["token", "text"])
@pytest.mark.parametrize("flags", [["--activations-budget-mb", 0], ["--device-map", "disk"]])
def test_where_rows_and_weights_are_kept_does_not_change_the_bytes(plans, models, texts, tmp_path, pooling, flags):
    folder = plan(models, texts, tmp_path / "p", "--pooling", pooling, *flags)
    got, expected = digests(folder), digests(plans[pooling])
    assert got.pop("resolved.yaml") != expected.pop("resolved.yaml")
    if "--device-map" in flags:  # other devices round in other ways, so it is part of the fingerprint
        assert got.pop("manifest.json") != expected.pop("manifest.json")
    assert got == expected


def test_a_killed_reading_of_two_processes_continues(models, texts, tmp_path, monkeypatch):
    """Both processes in this one, one after the other; the first is killed when it begins to read the source."""
    target, source = (open_checkpoint(str(models[name])) for name in ("target", "source"))
    experiment = Experiment.of(pooling="token", max_tokens=24, tokens_per_batch=200)
    rows = load_rows(DataSpec("file", str(texts)), "calibration", 2000)
    readings = stage1.read_both(target, source, rows, experiment)
    extract, read = row_recorder.extract, []

    def process(folder: Path, index: int, count: int) -> list[str]:
        """What the process `index` of `count` reads."""
        read.clear()
        state = SimpleNamespace(
            process_index=index, num_processes=count, is_main_process=index == 0, wait_for_everyone=lambda: None
        )
        recorder = row_recorder.RowRecorder(folder, experiment, state)
        recorder.record("target", target, readings.target, readings.aside)
        recorder.record("source", source, readings.source, readings.aside)
        return list(read)

    def record(*arguments):
        read.append(arguments[4])
        return extract(*arguments)

    def killed(*arguments):
        if arguments[4].startswith("source"):
            raise KeyboardInterrupt
        return extract(*arguments)

    monkeypatch.setattr(row_recorder, "extract", record)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    both = ["target activations", "source activations"]
    assert process(tmp_path / "one", 0, 1) == both and process(tmp_path / "two", 1, 2) == both
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(row_recorder, "extract", killed)
        process(tmp_path / "two", 0, 2)
    assert process(tmp_path / "two", 1, 2) == []
    assert process(tmp_path / "two", 0, 2) == both[1:]
    assert digests(tmp_path / "two") == digests(tmp_path / "one")
    assert sorted(digests(tmp_path / "one")) == [
        "activations/source.safetensors",
        "activations/target.safetensors",
        "selection.safetensors",
    ]


def test_what_a_killed_reading_left_is_removed(plans, models, texts, tmp_path):
    folder = shutil.copytree(plans["text"], tmp_path / "p")
    for name in ("rows", "offload"):
        (folder / f"{TEMPORARY}{name}-abc").mkdir()
        (folder / f"{TEMPORARY}{name}-abc" / "0").write_bytes(b"left")
    plan(models, texts, folder)
    assert digests(folder) == digests(plans["text"])


def test_a_finished_run_is_reused_and_a_changed_setting_runs_again(plans, models, texts, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(plans["text"], tmp_path / "p")
    with monkeypatch.context() as patch:
        patch.setattr(row_recorder, "extract", lambda *_: pytest.fail("it is finished"))
        plan(models, texts, folder)
    assert "Spearman" in capsys.readouterr().out
    plan(models, texts, folder, "--epsilon", "0.2")
    assert digests(folder)["plans/q.safetensors"] != digests(plans["text"])["plans/q.safetensors"]


def test_plans_that_do_not_converge_are_reported_once(models, texts, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        flags = [*pair_flags(models), *data_flags(texts), "--out-dir", tmp_path / "p"]
        run_main(stage1, *flags, "--sinkhorn-iters", 1)
    warnings = [r.getMessage() for r in caplog.records if "did not reach" in r.getMessage()]
    assert len(warnings) == 1 and "attn_in" in warnings[0] and "--sinkhorn-iters" in warnings[0]
    assert not load_file(tmp_path / "p/plans/q.safetensors")["converged"].all()


@pytest.mark.parametrize(("budget", "most", "reads"), [(1, 1, 3 * 9), (8, 8, 8)])
def test_the_pairs_budget_bounds_the_rows_in_memory(tmp_path, monkeypatch, budget, most, reads):
    """There are 2 MB of source rows. Within the budget they are all in memory and read once; otherwise one layer at a
    time is, and the layer of the same depth is read once more, to measure the largest entries."""
    generator = torch.Generator().manual_seed(0)
    for model, layers, size in (("target", 3, 12), ("source", 8, 64)):
        rows = {("q", k): torch.randn(1000, size, generator=generator) for k in range(layers)}
        write_activations(tmp_path, model, rows, torch.zeros(1000, dtype=torch.bool), half=False)
    alive, read = [], []
    standardize_layer = plan_solver.standardize_layer

    def standardize(X, model, layer):
        made = standardize_layer(X, model, layer)
        if model == "source":
            read.append(layer)
            alive[:] = [ref for ref in alive if ref() is not None] + [weakref.ref(made)]
            assert len(alive) <= most
        return made

    monkeypatch.setattr(plan_solver, "standardize_layer", standardize)
    solver = plan_solver.SideSolver(tmp_path, "q", (3, 8), Experiment.of(pairs_budget_mb=budget))
    for layer in range(3):
        solver.solve(layer, lambda: None)
    assert len(read) == reads and all(layer_file(tmp_path, "q", layer).is_file() for layer in range(3))
