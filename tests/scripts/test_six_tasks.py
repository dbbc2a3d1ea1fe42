"""The paper's six tasks: their settings, and the script that runs them, three tasks here and three beside."""

import os
import shutil
import signal
import subprocess
import time

import pytest
from conftest import ROOT
from six_tasks import SETTINGS, check_task, run_tasks, script

from core.runs.command_line import load_experiment
from core.runs.settings import Experiment, all_settings

TASKS = ("medical", "thai", "finance")
SHARED = {
    "calibration_samples": 2000,
    "pooling": "text",
    "residual_form": "interpolate",
    "seed": 0,
    "top_k": 128,
    "feature_map": "coupling",
    "epochs": 1,
    "train_batch_size": 1,
    "gradient_accumulation": 8,
    "block_size": 2048,
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_are_the_papers(name):
    experiment = Experiment.of(**load_experiment(ROOT / f"scripts/experiments/{name}.yaml"))
    found = {key: experiment.value(setting) for key, setting in all_settings().items()}
    keys = ("target_model", "source_model", "alpha", "train_alpha", "learning_rate", "data_subset", "sft_samples")
    assert tuple(found[key] for key in keys) == SETTINGS[name] and found["name"] == name
    assert {key: found[key] for key in SHARED} == SHARED


@pytest.fixture(scope="module")
def whole(environment, tmp_path_factory):
    """Three tasks; the others are in test_six_tasks_script.py, so that both files run at a time."""
    return run_tasks(environment, tmp_path_factory.mktemp("whole"), TASKS)


@pytest.mark.parametrize("name", TASKS)
def test_a_task_ends_with_its_table(whole, name):
    check_task(whole, name)


def test_a_run_killed_anywhere_ends_with_the_same_tables(environment, whole, tmp_path):
    deadly = ("plans/manifest.json", "adapted/no_hot/seed0/manifest.json", "benchmarks/medical/base/task.json")
    results = tmp_path / "killed"
    for path in deadly:
        running = subprocess.Popen(
            ["bash", "scripts/run_train_final.sh"],
            cwd=ROOT,
            start_new_session=True,
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env=environment | {"TASKS": "medical", "TRANSPORT_RESULTS_ROOT": str(results)},
        )
        while not (results / "medical" / path).is_file():
            assert running.poll() is None
            time.sleep(0.05)
        os.killpg(running.pid, signal.SIGKILL)
        assert running.wait() == -signal.SIGKILL and not (results / "tables").exists()
    done = script(environment, results, TASKS="medical")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("is finished already") >= 3  # what was done before the last kill
    for name in ("medical.json", "medical.md"):
        assert (results / "tables" / name).read_bytes() == (whole / "tables" / name).read_bytes()
    shutil.rmtree(results / "medical/adapted/hot")  # what is missing is made again, and nothing else
    again = script(environment, results, TASKS="medical", STEPS="train")
    assert again.returncode == 0 and again.stderr.count("seed0 is finished already") == 1
