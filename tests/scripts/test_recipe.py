"""The bash of the main script and its variants, with a `python` that only says how it was called."""

import os
import signal
import subprocess
import time

import pytest
from conftest import ROOT

# Writes what resolve.py would for two tasks; every other command ends as the file with its task's name says.
STUB = """#!/usr/bin/env bash
case $1 in
-) exit 0 ;; # the check of the packages
core/runs/resolve.py)
  echo "resolved ${*:6} TASKS=$TASKS"
  [[ -z ${REFUSED:-} ]] || { echo "error: refused" >&2 && exit 2; }
  mkdir -p "$5/one" "$5/two" && touch "$5/one/experiment.yaml" "$5/two/experiment.yaml"
  cat > "$5/settings.sh" << END
CONFIGS=($5/one/experiment.yaml $5/two/experiment.yaml)
TASKS=(one two)
STEPS=(plans fuse train eval tables)
SEEDS=(0 1)
LAUNCH=(python)
DRY_RUN=()
export TRANSPORT_RESULTS_ROOT=runs
END
  ;;
*) [[ "$*" != *"${BREAKS:-nothing}"* ]] || eval "$HOW" ;;
esac
"""


@pytest.fixture
def recipe(tmp_path):
    """Start a script with the stub as its `python`."""
    (tmp_path / "python").write_text(STUB)
    (tmp_path / "python").chmod(0o755)

    def start(*flags, name="run_train_final", **variables):
        environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "TASKS": "", **variables}
        return subprocess.Popen(
            ["bash", str(ROOT / f"scripts/{name}.sh"), *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,
        )

    return start


def commands(output):
    return [line.split()[2] for line in output.splitlines() if line.startswith("$ python")]


STAGES = [
    "run_activs_and_hot.py",
    "core/generate_hot_residual.py",
    *["core/train_hot_residual_sft.py"] * 4,
    "evaluation/compare_arms.py",
    "evaluation/run_task.py",
]
TABLES, REPORT = "evaluation/collect_results.py", "evaluation/report.py"


def test_every_task_is_one_command_per_stage_and_the_tables_come_last(recipe):
    output, errors = (running := recipe("--alpha", "0.1")).communicate()
    assert running.returncode == 0 and not errors
    assert commands(output) == [*STAGES, *STAGES, TABLES, REPORT] and "resolved --alpha 0.1" in output
    assert output.count("--training-scenario no_hot --seed 1") == output.count("--training-scenario hot --seed 1") == 2
    assert f"{TABLES} --tasks one two" in output and output.rstrip().endswith(f"{REPORT} runs")


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("printf 'a bar\\rerror: no such rows\\nbye' >&2; exit 2", "error: no such rows (exit code 2)"),
        ("printf 'Traceback\\nValueError: what\\n' >&2; exit 1", "ValueError: what (exit code 1)"),
        ("printf '1 of 3\\r2 of 3' >&2; kill -9 $$", "2 of 3 (exit code 137)"),
    ],
)
def test_the_end_lists_what_failed_and_why(recipe, how, reason):
    running = recipe(BREAKS="/one/experiment.yaml --training-scenario hot --seed 0", HOW=how)
    output, errors = running.communicate()
    assert running.returncode == 1
    assert commands(output) == [*STAGES[:4], *STAGES, TABLES, REPORT]
    assert [line for line in errors.splitlines() if "failed: " in line] == [f"failed: one, train: {reason}"]


def test_what_was_set_wrongly_ends_the_script(recipe):
    output, errors = (running := recipe(REFUSED="1")).communicate()
    assert running.returncode == 2 and not commands(output) and errors == "error: refused\n"


@pytest.mark.parametrize("code", [130, 1])  # torchrun ends with 1
def test_ctrl_c_ends_everything(recipe, tmp_path, code):
    how = f"trap 'exit {code}' INT; touch {tmp_path}/begun; for _ in {{1..100}}; do sleep 0.05; done"
    running = recipe(BREAKS="run_activs", HOW=how)
    while not (tmp_path / "begun").exists():
        assert running.poll() is None
        time.sleep(0.02)
    os.killpg(running.pid, signal.SIGINT)
    output, _ = running.communicate()
    assert running.returncode == -signal.SIGINT and commands(output) == STAGES[:1]


@pytest.mark.parametrize(
    ("variant", "flag"), [("source_size", "--source-model"), ("source_family", "--source-model"), ("alpha", "--alpha")]
)
def test_the_variable_variant_calls_the_script_of_the_variant(recipe, variant, flag):
    output, _ = (running := recipe("--limit", "5", VARIANT=variant)).communicate()
    called = [line for line in output.splitlines() if line.startswith("resolved ")]
    assert running.returncode == 0 and len(called) >= 3
    assert all(line.startswith(f"resolved {flag} ") and line.endswith(" --limit 5 TASKS=malay") for line in called)


@pytest.mark.parametrize(
    ("name", "flag", "count"),
    [("table7", "--source-model", 3), ("figure4", "--source-model", 3), ("figure5", "--alpha", 7)],
)
def test_a_variant_runs_the_script_for_each_value_and_goes_on_after_a_failure(recipe, name, flag, count):
    running = recipe("--limit", "5", name=name, BREAKS="/one/", HOW="exit 1")
    output, errors = running.communicate()
    called = [line for line in output.splitlines() if line.startswith("resolved ")]
    values = [line.split()[2] for line in called]
    assert called == [f"resolved {flag} {value} --limit 5 TASKS=malay" for value in values]
    assert running.returncode == 1 and len(set(values)) == count
    assert errors.splitlines()[-1] == f"failed: {' '.join(values)} (see above)"
