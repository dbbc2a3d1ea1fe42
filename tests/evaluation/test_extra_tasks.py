"""Harness tasks that an experiment names beyond the paper's: scored like others, in the tables without a figure."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import llama, make_tokenizer, run_main, save
from malay_rows import rows, write

from core.errors import UserError
from core.manifest import FORMAT_VERSION
from core.models.checkpoints import open_checkpoint
from evaluation import collect_results, generate_cmmlu_predictions, run_lm_eval, run_task
from evaluation.benchmarks import harness, registry
from evaluation.benchmarks.harness_scores import score_tasks
from evaluation.evaluated_model import EvaluatedModel
from evaluation.runner import Scoring

OPTIONS = "A B C".split()


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Two tasks, a tag and a group of the user's own in the harness's YAML form, and an experiment that names them."""
    folder = tmp_path / "own"
    folder.mkdir()
    for name, count in (("extra_one", 5), ("extra_two", 3)):
        rows = [{"question": f"plan {n} of the {name}", "label": n % 3} for n in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        task = {
            "task": name,
            "tag": "extra_tag",
            "dataset_path": "json",
            "test_split": "test",
            "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}},
            "num_fewshot": 0,
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_target": "label",
            "doc_to_choice": OPTIONS,
            "metric_list": [{"metric": "acc_norm"}, {"metric": "acc"}],
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
    group = {"group": "extra_group", "task": ["extra_tag"], "aggregate_metric_list": [{"metric": "acc"}]}
    (folder / "group.yaml").write_text(yaml.safe_dump(group))
    changed = {"group": "changed_group", "task": [{"task": "extra_one", "num_fewshot": 2}]}
    (folder / "changed.yaml").write_text(yaml.safe_dump(changed))
    experiments = tmp_path / "experiments"
    shutil.copytree(registry.EXPERIMENTS, experiments)
    monkeypatch.setenv("LM_EVAL_TASKS", str(folder))
    monkeypatch.setattr(registry, "EXPERIMENTS", experiments)
    monkeypatch.setattr(collect_results, "EXPERIMENTS", experiments)
    whole = harness.task_manager  # reading all of the harness's tasks takes twenty seconds, one folder of them does not
    monkeypatch.setattr(harness, "task_manager", lambda folder="xcopa": whole(folder))
    return experiments


def names(experiments: Path, task: str, *benchmarks: str) -> None:
    """Write the experiment `task` with these benchmarks."""
    keys = yaml.safe_load((experiments / "indonesian.yaml").read_text("utf-8")) | {"name": task}
    (experiments / f"{task}.yaml").write_text(yaml.safe_dump(keys | {"benchmarks": list(benchmarks)}))


def collected(runs: Path, task: str, name: str) -> dict:
    """The benchmarks of one run in its task's table."""
    return json.loads((runs / f"tables/{task}.json").read_text())["runs"][name]["sets"][task]


def run(model, data, out, task, *flags) -> dict:
    run_main(run_task, "--model", model, "--task", task, "--output_dir", out, "--data_dir", data, *flags)
    return json.loads((out / "task.json").read_text())["benchmarks"]


def test_extra_tasks_and_groups_are_scored_and_are_in_the_table(own, models, benchmark_data, tmp_path, capsys):
    names(own, "indonesian", "xcopa_id", "extra_group", "extra_two")
    folder = tmp_path / "runs/indonesian"
    for arm, model in (("base", "target"), ("fused", "other")):
        found = run(models[model], benchmark_data, folder / f"benchmarks/indonesian/{arm}", "indonesian")
        assert {name: result["file"] for name, result in found.items()} == {
            name: f"{name}.json" for name in ("xcopa_id", "extra_group", "extra_two")
        }
    (folder / "fused").mkdir()
    (folder / "fused/manifest.json").write_text(json.dumps({"format": FORMAT_VERSION}))
    scores = folder / "benchmarks/indonesian/base"
    one, two, both = (
        json.loads((scores / f"{name}.json").read_text()) for name in ("extra_one", "extra_two", "extra_group")
    )
    assert both["items"]["acc"] == one["items"]["acc"] + two["items"]["acc"] and both["metric"] == "acc"
    assert both["items"]["ids"][4:6] == ["extra_one/4", "extra_two/0"] and both["metrics"]["acc"]["n"] == 8
    assert both["groups"]["extra_two"]["acc"] == two["metrics"]["acc"]
    run_main(collect_results, "--results-dir", tmp_path / "runs")
    rows = collected(tmp_path / "runs", "indonesian", "indonesian")
    assert {name: row["extra"] for name, row in rows["rows"].items()} == {
        "xcopa_id": False,
        "extra_group": True,
        "extra_two": True,
    }
    xcopa = rows["rows"]["xcopa_id"]["arms"]
    mean = {arm: score["value"] for arm, score in rows["mean"].items()}
    assert mean == {arm: xcopa[arm]["value"] for arm in ("base", "fused")}  # only over the paper's benchmarks
    printed = capsys.readouterr().out
    line = next(line for line in printed.splitlines() if line.startswith("| extra_group"))
    assert line.startswith("| extra_group, acc, plain prompt (acc of acc, acc_norm: none is declared) |  |  |  | ")
    assert "Not among the paper's benchmarks, and in no mean: extra_group, extra_two." in printed
    assert "| xcopa_id, acc, plain prompt |" in printed
    # Only one of the paper's benchmarks was run, so our mean is not beside the paper's.
    assert "| mean of those above |  |  |  |" in printed and "| mean | 38.43 | 39.18 | 39.30 |  |  |  |" in printed


def test_an_experiment_that_the_paper_does_not_have_counts_all_it_names(own, models, benchmark_data, tmp_path):
    """The run `my-task-regression` belongs to the experiment `my-task`, although its name also begins with `my`."""
    names(own, "my", "xcopa_id")
    names(own, "my-task", "xcopa_id", "extra_two")
    folder = tmp_path / "runs/my-task-regression"
    run(models["target"], benchmark_data, tmp_path / "runs/my-task/benchmarks/my-task/base", "my-task")
    run(models["other"], benchmark_data, folder / "benchmarks/my-task/fused", "my-task")
    (folder / "fused").mkdir()
    (folder / "fused/manifest.json").write_text(json.dumps({"format": FORMAT_VERSION}))
    run_main(collect_results, "--results-dir", tmp_path / "runs", "--tasks", "my-task")
    found = collected(tmp_path / "runs", "my-task", "my-task-regression")
    values = [row["arms"]["fused"]["value"] for row in found["rows"].values()]
    assert len(values) == 2 and found["mean"]["fused"]["value"] == pytest.approx(sum(values) / 2)
    assert collect_results.find_runs(tmp_path / "runs") == {"my-task": ["my-task-regression"]}


def test_an_unknown_name_is_an_error_before_anything_is_scored(
    own, models, benchmark_data, tmp_path, fails, monkeypatch
):
    flags = ("--model", models["target"], "--output-dir", tmp_path / "out", "--data-dir", benchmark_data)
    names(own, "malay", "malay_mmlu", "xcopa_id", "extra_typo")
    (tmp_path / "data").mkdir()
    monkeypatch.setenv(
        "MALAY_REPO", str(write(tmp_path / "data", *rows(2)).parent)
    )  # would be scored before the unknown one
    for more in ((), ("--dry-run",)):
        line = fails(run_task, *flags, "--task", "malay", *more)
        assert "extra_typo is no task of lm-evaluation-harness" in line and "$LM_EVAL_TASKS" in line
    assert not (tmp_path / "out").exists()
    names(own, "malay", "changed_group")
    line = fails(run_task, *flags, "--task", "malay")
    assert "the group changed_group changes settings of its tasks (num_fewshot)" in line


def test_a_group_of_which_one_task_cannot_be_had_has_no_score(own, models, benchmark_data, tmp_path, capsys):
    (tmp_path / "own/extra_two.jsonl").unlink()
    names(own, "malay", "extra_group", "extra_one")
    found = run(models["target"], benchmark_data, tmp_path / "out", "malay")
    assert found["extra_one"] == {"file": "extra_one.json"}
    assert found["extra_group"]["absent"].startswith("1 of its 2 tasks cannot be scored (extra_two: its data could not")
    capsys.readouterr()
    run_main(run_task, "--model", "m", "--task", "malay", "--data-dir", benchmark_data, "--dry-run")
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("scores of m -> ")
    assert shown[1:] == ["extra_one: the hub, or its cache", "extra_two: the hub, or its cache"]


def broken(folder):
    """Save a model whose logits are NaN; returns its folder."""
    model = llama()
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    return save(model, make_tokenizer(400, 1), folder)


def test_log_probabilities_and_logits_that_are_not_finite_give_no_score_of_a_harness_task(benchmark_data, tmp_path):
    scoring = Scoring(EvaluatedModel(open_checkpoint(str(broken(tmp_path / "broken")))), tmp_path / "out", limit=2)
    for task, what in (("xcopa_id", "log-probabilities that are"), ("mgsm_direct_en", "logits that are")):
        with pytest.raises(UserError, match=f"broken on {task}: {what} not finite .* float32"):
            score_tasks(scoring, [task], benchmark_data)
    assert not (tmp_path / "out").exists()


def test_logits_that_are_not_finite_give_no_answer_to_yue_mmlu(benchmark_data, tmp_path, fails):
    line = fails(
        generate_cmmlu_predictions,
        "--model",
        broken(tmp_path / "broken"),
        "--output-dir",
        tmp_path / "out",
        "--data-dir",
        benchmark_data / "yue_benchmark/Yue-MMLU",
        "--limit",
        1,
    )
    assert "broken on Yue-MMLU, arts: logits that are not finite" in line
    assert not (tmp_path / "out/yue_mmlu.json").exists()


def test_both_scores_of_yue_mmlu_fit_into_one_folder(models, benchmark_data, tmp_path):
    """The scores of answers (here to the plain prompt) and of likelihoods share neither a file nor a name."""
    plain = shutil.copytree(models["target"], tmp_path / "plain")
    (plain / "chat_template.jinja").unlink()
    flags = ("--model", plain, "--output-dir", tmp_path / "out", "--limit", 1)
    questions = benchmark_data / "yue_benchmark/Yue-MMLU"
    run_main(generate_cmmlu_predictions, *flags, "--data-dir", questions, "--prompt", "plain")
    run_main(run_lm_eval, *flags, "--data-dir", benchmark_data, "--tasks", "yue_mmlu_likelihood")
    scores = {path.name: json.loads(path.read_text()) for path in (tmp_path / "out").glob("*.json")}
    assert {name: score["benchmark"] for name, score in scores.items()} == {
        "yue_mmlu.json": "yue_mmlu",
        "yue_mmlu_likelihood.json": "yue_mmlu_likelihood",
    }
    assert all(score["details"]["prompt_policy"] == "plain prompt" for score in scores.values())
