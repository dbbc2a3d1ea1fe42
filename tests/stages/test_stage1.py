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
from stages import digests, fuse
from torch.testing import assert_close

import run_activs_and_hot as stage1
from core.data import DataSpec, load_rows
from core.files import TEMPORARY
from core.models.checkpoints import open_checkpoint
from core.runs.plan_directory import PlanDirectory, part_file, write_part
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
    run_main(
        stage1,
        "--model-a-path",
        models["source"],
        "--model-b-path",
        models["target"],
        "--data_subset",
        "file",
        "--data_file",
        texts,
        "--pooling",
        "token",
        "--max_tokens",
        24,
        "--out_dir",
        tmp_path / "p",
    )
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
    flags = [
        "--target-model",
        models["target"],
        "--source-model",
        models["source"],
        "--data-subset",
        "file",
        "--data-file",
        texts,
        "--pooling",
        "token",
        "--max-tokens",
        24,
        "--out-dir",
        folder,
    ]
    solved = []
    if lost == "layers":  # killed in the middle of a side: two of three layers are there
        solve, write = stage1.solve_layer, write_part

        def dies(*arguments):
            if len(solved) == 3:
                raise KeyboardInterrupt
            write(*arguments)

        monkeypatch.setattr(stage1, "solve_layer", lambda zx, *a: solved.append(zx.shape) or solve(zx, *a))
        monkeypatch.setattr(stage1.plan_directory, "write_part", dies)
        with pytest.raises(KeyboardInterrupt):
            run_main(stage1, *flags)
        assert [part_file(folder, "v", layer).is_file() for layer in range(3)] == [True, True, False]
        monkeypatch.setattr(stage1.plan_directory, "write_part", write)
        solved.clear()
    run_main(stage1, *flags)
    assert digests(folder) == digests(plans["token"])
    assert lost != "layers" or len(solved) == 1 + 3 * 3


def test_processes_share_the_layers_and_write_the_same_bytes(plans, models, texts, tmp_path):
    """Two processes of one thread each, and a memory budget that keeps no source layer, against one process."""
    flags = [
        "--target-model",
        models["target"],
        "--source-model",
        models["source"],
        "--data-subset",
        "file",
        "--data-file",
        texts,
        "--pooling",
        "token",
        "--max-tokens",
        "24",
        "--tokens-per-batch",
        "200",
    ]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    (tmp_path / "x.yaml").write_text("name: x")
    tight = ["--pairs-budget-mb", "1", "--activations-budget-mb", "0", "--config", str(tmp_path / "x.yaml")]
    environment["TRANSPORT_RESULTS_ROOT"] = str(tmp_path / "results")
    for name, command, more in (("one", [], []), ("two", launch, tight)):
        done = subprocess.run(
            [
                sys.executable,
                *command,
                str(ROOT / "run_activs_and_hot.py"),
                *map(str, flags),
                "--out-dir",
                str(tmp_path / name),
                *more,
            ],
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.count("Spearman") == 1
        assert done.stderr.count("45 of 45 calibration texts") == (2 if command else 1)  # both took part
    one, two = digests(tmp_path / "one"), digests(tmp_path / "two")
    assert one.pop("resolved.yaml") != two.pop("resolved.yaml") and one == two
    told = (tmp_path / "results/x/log.txt").read_text()  # of the first process: two models read, two joined
    assert told.count("are kept on disk") == 4


@pytest.mark.parametrize("pooling", ["token", "text"])
@pytest.mark.parametrize("flags", [["--activations-budget-mb", 0], ["--device-map", "disk"]])
def test_where_rows_and_weights_are_kept_does_not_change_the_bytes(plans, models, texts, tmp_path, pooling, flags):
    folder = tmp_path / "p"
    run_main(
        stage1,
        "--target-model",
        models["target"],
        "--source-model",
        models["source"],
        "--data-subset",
        "file",
        "--data-file",
        texts,
        "--pooling",
        pooling,
        "--max-tokens",
        24,
        "--out-dir",
        folder,
        *flags,
    )
    got, expected = digests(folder), digests(plans[pooling])
    assert got.pop("resolved.yaml") != expected.pop("resolved.yaml")
    if "--device-map" in flags:  # other devices round in other ways: it is part of the fingerprint
        assert got.pop("manifest.json") != expected.pop("manifest.json")
    assert got == expected


def test_a_killed_reading_of_two_processes_continues(models, texts, tmp_path, monkeypatch):
    """Both processes in this one, one after the other; the first is killed when it begins to read the source."""
    pair = {name: open_checkpoint(str(models[name])) for name in ("target", "source")}
    experiment = Experiment(
        data_subset="file", data_file=str(texts), pooling="token", max_tokens=24, tokens_per_batch=200
    )
    rows = load_rows(DataSpec("file", str(texts)), "calibration", 2000)
    readings, aside = stage1.read_both(*pair.values(), rows, experiment)
    extract, read = stage1.extract, []

    def process(folder: Path, index: int, count: int) -> list[str]:
        read.clear()
        state = SimpleNamespace(
            process_index=index, num_processes=count, is_main_process=index == 0, wait_for_everyone=lambda: None
        )
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
        "activations/source.safetensors",
        "activations/target.safetensors",
        "selection.safetensors",
    ]


def test_what_a_killed_reading_left_is_removed(plans, models, texts, tmp_path):
    folder = tmp_path / "p"
    shutil.copytree(plans["text"], folder)
    for name in ("rows", "offload"):
        (folder / f"{TEMPORARY}{name}-abc").mkdir()
        (folder / f"{TEMPORARY}{name}-abc" / "0").write_bytes(b"left")
    run_main(
        stage1,
        "--target-model",
        models["target"],
        "--source-model",
        models["source"],
        "--data-subset",
        "file",
        "--data-file",
        texts,
        "--max-tokens",
        24,
        "--out-dir",
        folder,
    )
    assert digests(folder) == digests(plans["text"])


def test_a_finished_run_is_reused_and_a_changed_setting_runs_again(plans, models, texts, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "p"
    shutil.copytree(plans["text"], folder)
    flags = [
        "--target-model",
        models["target"],
        "--source-model",
        models["source"],
        "--data-subset",
        "file",
        "--data-file",
        texts,
        "--max-tokens",
        24,
        "--out-dir",
        folder,
    ]
    with monkeypatch.context() as patch:
        patch.setattr(stage1, "extract", lambda *_: pytest.fail("it is finished"))
        run_main(stage1, *flags)
    assert "Spearman" in capsys.readouterr().out
    run_main(stage1, *flags, "--epsilon", "0.2")
    assert digests(folder)["plans/q.safetensors"] != digests(plans["text"])["plans/q.safetensors"]


def test_plans_that_do_not_converge_are_told_once(models, texts, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        run_main(
            stage1,
            "--target-model",
            models["target"],
            "--source-model",
            models["source"],
            "--data-subset",
            "file",
            "--data-file",
            texts,
            "--sinkhorn-iters",
            1,
            "--out-dir",
            tmp_path / "p",
        )
    told = [r.getMessage() for r in caplog.records if "did not reach" in r.getMessage()]
    assert len(told) == 1 and "attn_in" in told[0] and "--sinkhorn-iters" in told[0]
    assert not load_file(tmp_path / "p/plans/q.safetensors")["converged"].all()


@pytest.mark.parametrize(("budget", "most", "reads"), [(1, 1, 3 * 9), (8, 8, 8)])
def test_the_pairs_budget_bounds_the_rows_in_memory(tmp_path, monkeypatch, budget, most, reads):
    """2 MB of source rows: all of them within the budget and read once, or one layer at a time (and the layer of the
    same depth once more, for the share of the largest entries)."""
    generator = torch.Generator().manual_seed(0)
    for model, layers, size in (("target", 3, 12), ("source", 8, 64)):
        rows = {("q", k): torch.randn(1000, size, generator=generator) for k in range(layers)}
        stage1.plan_directory.write_activations(tmp_path, model, rows, torch.zeros(1000, dtype=torch.bool), half=False)
    alive, read = [], []

    def standardize(X, model, layer):
        made = standardize_layer(X, model, layer)
        if model == "source":
            read.append(layer)
            alive[:] = [ref for ref in alive if ref() is not None] + [weakref.ref(made)]
            assert len(alive) <= most
        return made

    standardize_layer = stage1.standardize_layer
    monkeypatch.setattr(stage1, "standardize_layer", standardize)
    state, bar = SimpleNamespace(process_index=0, num_processes=1), SimpleNamespace(update=lambda count: None)
    stage1.solve_side(tmp_path, "q", (3, 8), Experiment.of(pairs_budget_mb=budget), state, bar)
    assert len(read) == reads and len(list((tmp_path / "plans/parts").iterdir())) == 3
