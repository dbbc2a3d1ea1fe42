"""Score files: the metric that is declared, files of earlier versions, and how the tables read them."""

import json

import pytest
from conftest import run_main

from core.errors import UserError
from core.manifest import FORMAT_VERSION
from core.runs.command_line import load_experiment
from evaluation import collect_results
from evaluation.benchmarks.harness import HUB_TASKS, reported_metric
from evaluation.benchmarks.local_tasks import local_tasks
from evaluation.benchmarks.registry import EXPERIMENTS, GENERAL, STAND_INS, task_benchmarks
from evaluation.scores import Score, finished, read_score, write_score

INPUTS = {"model": {"weights": "w", "dtype": "auto"}, "data": "d"}


def score_of(items: list[float], **details) -> Score:
    """A score with two metrics: the second is the declared one, the first gives every item the opposite score."""
    opposite = [1.0 - item for item in items]
    return Score(
        "b", [str(n) for n in range(len(items))], {"acc_norm": opposite, "acc": items}, (), details, metric="acc"
    )


def arm(folder, name, items, **details):
    """Write the score of one benchmark into an arm's folder, as run_task.py does."""
    write_score(folder / f"{name}.json", score_of(items, **details), INPUTS)
    record = {"task": "t", "model": "m", "limit": None, "benchmarks": {name: {"file": f"{name}.json"}}}
    (folder / "task.json").write_text(json.dumps(record))


def write_run(run, task, name="arc_id", **details):
    """Write a run whose base has one of four items right, and whose fused model has three."""
    for which, items in (("base", [0.0, 0.0, 0.0, 1.0]), ("fused", [1.0, 1.0, 0.0, 1.0])):
        arm(run / f"benchmarks/{task}/{which}", name, items, **details)
    (run / "fused").mkdir()
    (run / "fused/manifest.json").write_text(json.dumps({"format": FORMAT_VERSION}))


def test_tables_report_the_declared_metric_wherever_the_file_lists_it(tmp_path):
    write_run(tmp_path / "indonesian", "indonesian")
    run_main(collect_results, "--results-dir", tmp_path)
    found = json.loads((tmp_path / "tables/indonesian.json").read_text())
    row = found["runs"]["indonesian"]["sets"]["indonesian"]["rows"]["arc_id"]
    assert row["metric"] == "acc" and [row["arms"][arm]["value"] for arm in ("base", "fused")] == [25.0, 75.0]


def test_every_benchmark_of_an_experiment_declares_its_metric():
    tasks = [path.stem for path in EXPERIMENTS.glob("*.yaml") if load_experiment(path).get("benchmarks")]
    assert len(tasks) >= 6
    names = {name for task in tasks for name in task_benchmarks(task)} | {*GENERAL, *STAND_INS["malay_mmlu"]}
    for name in names - {"malay_mmlu", "yue_mmlu"}:
        declared = HUB_TASKS[name][1] if name in HUB_TASKS else local_tasks()[name].metric
        assert reported_metric(name, ["other", declared]) == (declared, "")
    assert reported_metric("arc_id", ["acc_norm", "acc"]) == ("acc", "")
    with pytest.raises(UserError, match="piqa is to be reported by acc, but this version of"):
        reported_metric("piqa", ["acc_norm"])


def test_an_extra_task_reports_its_only_metric_or_acc_and_says_so():
    assert reported_metric("extra", ["f1"]) == ("f1", "")
    assert reported_metric("extra", ["acc_norm", "acc"]) == ("acc", "acc of acc_norm, acc: none is declared")
    with pytest.raises(UserError, match="extra has the metrics em,strict, em,loose, and none is declared"):
        reported_metric("extra", ["em,strict", "em,loose"])


def test_scores_of_an_earlier_version_are_made_again_and_in_no_table(tmp_path):
    path = tmp_path / "b.json"
    write_score(path, score_of([1.0, 0.0]), INPUTS)
    record = json.loads(path.read_text())
    assert finished(path, INPUTS) and read_score(path)["format"] == FORMAT_VERSION
    path.write_text(json.dumps({key: value for key, value in record.items() if key not in ("format", "metric")}))
    assert not finished(path, INPUTS)
    with pytest.raises(UserError, match=r"has format None, expected .* run the benchmark again"):
        read_score(path)
