"""The paper's six tasks: three of them, failures, dry runs and variables of the script."""

import json
import re
import subprocess

import pytest
from conftest import ROOT
from six_tasks import SETTINGS, check_task, run_tasks, script

from core.runs.command_line import load_experiment

TASKS = ("cantonese", "indonesian", "malay")


@pytest.fixture(scope="module")
def whole(environment, tmp_path_factory):
    """Three tasks; the others are in test_six_tasks.py."""
    return run_tasks(environment, tmp_path_factory.mktemp("whole"), TASKS)


@pytest.mark.parametrize("name", TASKS)
def test_a_task_ends_with_its_table(whole, name):
    check_task(whole, name)


def test_a_failed_task_does_not_stop_the_others(environment, tmp_path):
    """Nor hide their tables."""
    done = script(environment, tmp_path, TASKS="nothing thai", STEPS="plans fuse eval", FEATURE_MAP="regression")
    assert done.returncode == 1 and done.stderr.count("failed: ") == 1
    assert "failed: nothing (exit code 2" in done.stderr
    assert "there is no scripts/experiments/nothing.yaml" in done.stderr
    assert "| fused |" in (tmp_path / "tables/thai.md").read_text()
    lost = script(environment, tmp_path, TASKS="thai", STEPS="plans", DATA_DIR=str(tmp_path / "tables"))
    assert lost.returncode == 1 and "thai.jsonl does not exist" in lost.stderr
    made = json.loads((tmp_path / "thai-regression/fused/manifest.json").read_text())["inputs"]["settings"]
    assert (made["feature_map"], made["top_k"], made["alpha"]) == ("regression", 0, 0.1)


def test_wrong_variables_are_told_before_anything_runs(environment, tmp_path):
    for variables, told in (
        ({"STEPS": "plans tables"}, "STEPS is tables; expected one of: plans fuse train eval"),
        ({"FEATURE_MAP": "ot"}, "FEATURE_MAP is ot; expected one of: coupling"),
        ({"NUM_GPUS": "two"}, "NUM_GPUS is two; expected a number"),
        ({"VARIANT": "size"}, "VARIANT is size; expected one of: source_size"),
        ({"LM_EVAL_REPO": str(tmp_path)}, "is no clone of lm-evaluation-harness"),
    ):
        done = script(environment, tmp_path / "results", **variables)
        assert done.returncode == 2 and told in done.stderr and not (tmp_path / "results").exists()


def test_variants_are_started_by_one_variable(environment, tmp_path):
    done = script(environment, tmp_path, TASKS="thai", VARIANT="alpha", DRY_RUN="1", STEPS="fuse")
    listed = (ROOT / "scripts/experiments/variants.txt").read_text()
    suffixes = [line.split()[1] for line in listed.splitlines() if line.startswith("alpha ")]
    assert done.returncode == 0 and len(suffixes) == 7
    for suffix in suffixes:
        value = suffix.removeprefix("-alpha")  # all on the same plans
        assert f"--alpha {value} --hot-dir {tmp_path}/thai/plans --output-dir {tmp_path}/thai{suffix}/" in done.stdout


def test_examples_are_experiments():
    for path in (ROOT / "scripts/experiments/examples").glob("*.yaml"):
        found = load_experiment(path)
        assert found["name"] == path.stem and found["feature_map"] == "regression" and found["pooling"] == "token"


def test_dry_run_prints_the_papers_settings_of_every_task(environment, tmp_path):
    own = {name: value for name, value in environment.items() if not name.endswith(("_MODEL", "_SAMPLES"))}
    done = script(own, tmp_path / "r", DRY_RUN="1", STEPS="fuse train")
    assert done.returncode == 0 and not (tmp_path / "r").exists()
    parts = done.stdout.split("== ")[1:]
    assert [part.partition(":")[0] for part in parts] == "medical thai finance cantonese indonesian malay".split()
    for part in parts:
        name, _, rest = part.partition(":")
        shown = dict(line.strip().split(": ", 1) for line in rest.splitlines() if re.match(r"    \w+: ", line))
        target, source, alpha, train_alpha, rate, data, rows = SETTINGS[name]
        for key, value in {
            "target_model": target,
            "source_model": source,
            "data_subset": data,
            "feature_map": "coupling",
        }.items():
            assert shown[key] == value
        numbers = {
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
        assert {key: float(shown[key]) for key in numbers} == numbers
        commands = [line for line in rest.splitlines() if line.startswith("  python ")]
        assert len(commands) == 3 and "--feature-map coupling" in commands[0]
        for word in ("--alpha", "--train-alpha", "--sft-samples", "--target-model"):  # nothing overrides the file
            assert word not in "".join(commands)


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
    assert done.returncode == 1 and f"{tmp_path}/typo does not exist" in done.stderr
    assert "no/model is neither a folder" in done.stderr  # a model that is no path is an id
    assert done.stdout.count("\n  python ") == 10 and f"--data-file {tmp_path}/mine/thai.jsonl" in done.stdout


def test_dry_run_prints_settings_and_commands_and_runs_nothing(environment, benchmark_data, tmp_path):
    done = script(environment, tmp_path / "r", TASKS="thai", DRY_RUN="1", NUM_GPUS="2")
    assert done.returncode == 0 and not (tmp_path / "r").exists()
    for line in ("learning_rate: 1.0e-7", "alpha: 0.01", "train_alpha: 0.01", "sft_samples: 8000"):
        assert f"    {line}\n" in done.stdout
    assert done.stdout.count("train_hot_residual_sft.py") == 2 and "texts; nothing is missing" in done.stdout
    assert "--target-model" in done.stdout and str(tmp_path / "r/thai/plans") in done.stdout
    launched = [line.split()[:5] for line in done.stdout.splitlines() if line.endswith("--device cuda")]
    assert [words[0] for words in launched] == ["accelerate", "python", "accelerate", "accelerate", *["python"] * 5]
    assert launched[0] == ["accelerate", "launch", "--num_processes", "2", "run_activs_and_hot.py"]
    assert f"xcopa_th: {benchmark_data}/xcopa/th/test.th.jsonl, " in done.stdout
    assert "mmlu_prox_lite_th_other: the hub, or its cache\n" in done.stdout


def test_dry_run_reads_the_benchmark_files(environment, tmp_path):
    (tmp_path / "xcopa/th").mkdir(parents=True)
    (tmp_path / "xcopa/th/test.th.jsonl").write_text("{")
    done = script(environment, tmp_path / "r", TASKS="thai", DRY_RUN="1", STEPS="eval", BENCHMARK_DATA=str(tmp_path))
    assert done.returncode == 1 and "val.th.jsonl is missing" in done.stdout
    (tmp_path / "xcopa/th/val.th.jsonl").write_text("{")
    done = script(environment, tmp_path / "r", TASKS="thai", DRY_RUN="1", STEPS="eval", BENCHMARK_DATA=str(tmp_path))
    assert done.returncode == 1 and "test.th.jsonl, line 1 is not valid JSON" in done.stdout
    assert "files of xcopa_th are damaged" in done.stderr


def test_the_script_is_short():
    text = (ROOT / "scripts/run_train_final.sh").read_text()
    assert len(text.splitlines()) < 120 and "set -euo pipefail" in text
