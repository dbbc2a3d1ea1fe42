"""The paper's six tasks: three of them, failures, dry runs, and another pair."""

import json
import shutil
import subprocess

import pytest
import yaml
from conftest import ROOT
from six_tasks import SETTINGS, check_task, run_tasks, script

from core.runs.command_line import load_experiment
from core.runs.settings import Experiment, all_settings

TASKS = ("cantonese", "indonesian", "malay")


@pytest.fixture(scope="module")
def whole(environment, tmp_path_factory):
    """Three tasks; the others are in test_six_tasks.py, so that both files run at a time."""
    return run_tasks(environment, tmp_path_factory.mktemp("whole"), TASKS)


@pytest.mark.parametrize("name", TASKS)
def test_a_task_ends_with_its_table(whole, name):
    check_task(whole, name)


def test_a_stage_that_fails_ends_its_task_alone_and_the_same_command_finishes_it(environment, whole, tmp_path):
    """A file where stage 3 of one task has to write its second training."""
    results = shutil.copytree(whole, tmp_path / "results")
    shutil.rmtree(results / "tables")
    (results / "indonesian/results.json").unlink()
    shutil.rmtree(results / "indonesian/benchmarks")
    blocked = results / "indonesian/adapted/hot/seed0"
    shutil.rmtree(blocked)
    blocked.touch()
    variables = {"TASKS": "indonesian malay", "STEPS": "train eval"}
    broken = script(environment, results, **variables)
    assert broken.returncode == 1
    (told,) = [line for line in broken.stderr.splitlines() if line.startswith("failed: ")]
    assert told == f"failed: indonesian, train: error: output folder {blocked} is a file; give a folder (exit code 2)"
    assert not (results / "indonesian/results.json").exists() and not (results / "indonesian/benchmarks").exists()
    assert (results / "tables/malay.md").read_bytes() == (whole / "tables/malay.md").read_bytes()
    assert "| fused |" in broken.stdout and "adapted/no_hot/seed0 is finished already" in broken.stderr
    blocked.unlink()
    mended = script(environment, results, **variables)
    assert mended.returncode == 0, mended.stderr
    for name in TASKS:
        assert (results / f"tables/{name}.md").read_bytes() == (whole / f"tables/{name}.md").read_bytes()


def test_another_pair_has_a_folder_of_its_own_and_is_in_the_table(environment, models, tmp_path):
    variables = {"TASKS": "thai", "STEPS": "plans fuse eval", "FEATURE_MAP": "regression"}
    done = script(environment, tmp_path, "--target-model", str(models["other"]), **variables)
    assert done.returncode == 0, done.stderr
    pair = "thai-other-from-Llama-3.1-8B-Instruct"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "tables", f"{pair}-regression"]
    made = json.loads((tmp_path / f"{pair}-regression/fused/manifest.json").read_text())["inputs"]["settings"]
    assert (made["feature_map"], made["top_k"], made["alpha"]) == ("regression", 0, 0.1)
    (rows,) = json.loads((tmp_path / "tables/thai.json").read_text())["runs"][f"{pair}-regression"]["sets"].values()
    assert all(row["arms"].keys() == {"base", "fused"} for row in rows["rows"].values()) and rows["rows"]


def test_wrong_variables_are_told_before_anything_runs(environment, tmp_path):
    done = script(environment, tmp_path / "results", STEPS="plans tables")
    assert done.returncode == 2 and "STEPS=plans tables: " in done.stderr
    assert not done.stdout and not (tmp_path / "results").exists()
    shown = script(environment, tmp_path / "results", "--help")
    assert shown.returncode == 0 and "--tasks NAMES" in shown.stdout and "== " not in shown.stdout


def test_examples_are_experiments():
    for path in (ROOT / "scripts/experiments/examples").glob("*.yaml"):
        found = load_experiment(path)
        assert found["name"] == path.stem and found["feature_map"] == "regression" and found["pooling"] == "token"


def test_dry_run_prints_the_papers_settings_of_every_task(environment, tmp_path):
    own = {name: value for name, value in environment.items() if not name.endswith("_SAMPLES")}
    done = script(own, tmp_path / "r", DRY_RUN="1", STEPS="fuse train")
    assert done.returncode == 0 and not (tmp_path / "r").exists()
    parts = done.stdout.split("\n== ")[1:]
    assert [part.split()[0] for part in parts] == "medical thai finance cantonese indonesian malay".split()
    for part in parts:
        name, settings = part.split("\n\n")[0].split("\n", 1)
        experiment = Experiment.of(**yaml.safe_load(settings))
        shown = {key: experiment.value(setting) for key, setting in all_settings().items()}
        target, source, alpha, train_alpha, rate, data, rows = SETTINGS[name]
        wanted = {
            "target_model": target,
            "source_model": source,
            "data_subset": data,
            "feature_map": "coupling",
            "alpha": alpha,
            "train_alpha": train_alpha,
            "learning_rate": rate,
            "sft_samples": rows,
            "epochs": 1,
            "calibration_samples": 2000,
            "top_k": 128,
            "train_batch_size": 1,
            "gradient_accumulation": 8,
            "block_size": 2048,
        }
        assert {key: shown[key] for key in wanted} == wanted
        commands = [line for line in part.splitlines() if line.startswith("$ python ")]
        assert len(commands) == 3  # and nothing overrides the file
        assert all(word in "--config --training-scenario --seed" for word in " ".join(commands).split() if "--" in word)
        assert f"{tmp_path}/r/{name}/plans is not finished yet" in part
        assert part.count(f"{tmp_path}/r/{name}/fused is not finished yet") == 2


def test_dry_run_goes_on_after_what_is_missing_and_takes_paths_from_where_it_is_started(environment, tmp_path):
    (tmp_path / "mine").mkdir()
    own = environment | {
        "DRY_RUN": "1",
        "TASKS": "thai",
        "TARGET_MODEL": "no/model",
        "DATA_DIR": "mine",
        "BENCHMARK_DATA": "typo",
        "TRANSPORT_RESULTS_ROOT": "r",
    }
    done = subprocess.run(
        ["bash", str(ROOT / "scripts/run_train_final.sh")], cwd=tmp_path, capture_output=True, text=True, env=own
    )
    assert done.returncode == 1 and done.stderr.count("\nfailed: thai-model-from-Llama-3.1-8B-Instruct, ") == 2
    assert f"{tmp_path}/typo does not exist" in done.stderr
    assert "no/model is neither a folder" in done.stderr  # a model that is no path is an id
    assert done.stdout.count("\n$ python ") == 6 and f"data_file: {tmp_path}/mine/thai.jsonl" in done.stdout


def test_dry_run_prints_settings_and_commands_and_runs_nothing(environment, benchmark_data, tmp_path):
    done = script(environment, tmp_path / "r", TASKS="thai", DRY_RUN="1", NUM_GPUS="2")
    assert done.returncode == 0 and not (tmp_path / "r").exists()
    for line in ("learning_rate: 1.0e-07", "alpha: 0.01", "train_alpha: 0.01", "sft_samples: 8", "device: cuda"):
        assert f"\n{line}\n" in done.stdout
    assert "texts; nothing is missing" in done.stdout and f"{tmp_path}/r/thai/plans is not finished" in done.stdout
    commands = [line.split() for line in done.stdout.splitlines() if line.startswith("$ ")]
    launched = ["accelerate", "python", "accelerate", "accelerate", "python", "python"]
    assert [words[1] for words in commands] == launched
    assert commands[0][1:6] == ["accelerate", "launch", "--num_processes", "2", "run_activs_and_hot.py"]
    assert f"xcopa_th: {benchmark_data}/xcopa/th/test.th.jsonl, " in done.stdout
    assert "mmlu_prox_lite_th_other: the hub, or its cache\n" in done.stdout


def test_dry_run_of_what_is_finished_checks_every_stage(environment, whole):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.name != "log.txt"}
    done = script(environment, whole, TASKS="malay", DRY_RUN="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("nothing is missing") == 5 and "is not finished" not in done.stdout
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.name != "log.txt"} == before


def test_dry_run_reads_the_benchmark_files(environment, tmp_path):
    (tmp_path / "xcopa/th").mkdir(parents=True)
    (tmp_path / "xcopa/th/test.th.jsonl").write_text("{")
    variables = {"TASKS": "thai", "DRY_RUN": "1", "STEPS": "eval", "BENCHMARK_DATA": str(tmp_path)}
    done = script(environment, tmp_path / "r", **variables)
    assert done.returncode == 1 and "val.th.jsonl is missing" in done.stdout
    (tmp_path / "xcopa/th/val.th.jsonl").write_text("{")
    done = script(environment, tmp_path / "r", **variables)
    assert done.returncode == 1 and "test.th.jsonl, line 1 is not valid JSON" in done.stdout
    assert "files of xcopa_th are damaged" in done.stderr
