"""The bash of the main script and its variants, with a `python` that only says how it was called."""

import os
import signal
import subprocess
import time

import pytest
from conftest import ROOT, run_main

from core.errors import UserError
from core.runs import overview
from evaluation import report

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
SEEDS=(${SEEDS-0 1})
LAUNCH=(python)
VERBOSITY=(${VERBOSITY:-})
DRY_RUN=(${DRY_RUN:-})
export TRANSPORT_RESULTS_ROOT=runs
END
  ;;
*)
  [[ -z ${CALLS:-} ]] || echo "$*" >> "$CALLS"
  [[ "$*" != *"${BREAKS:-nothing}"* ]] || eval "$HOW"
  ;;
esac
"""


@pytest.fixture
def recipe(tmp_path):
    """Start a script with the stub as its `python`."""
    (tmp_path / "python").write_text(STUB)
    (tmp_path / "python").chmod(0o755)

    def start(*flags, name="run_train_final", cwd=None, **variables):
        environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "TASKS": "", **variables}
        return subprocess.Popen(
            ["bash", str(ROOT / f"scripts/{name}.sh"), *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=cwd,
            start_new_session=True,
            # A shell that starts the tests in the background has them ignore SIGINT, and no child could then catch it.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
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


@pytest.mark.parametrize("seeds", ["", "3 4"])
def test_both_scripts_train_with_the_seed_of_the_experiment_where_no_others_are_asked_for(recipe, tmp_path, seeds):
    for name in ("run_train_final", "run_pipeline"):
        calls = tmp_path / name
        running = recipe(name=name, SEEDS=seeds, CALLS=str(calls))
        running.communicate()
        trainings = [line for line in calls.read_text().splitlines() if "--training-scenario hot" in line]
        wanted = [f" --seed {seed}" for seed in seeds.split()] or [""]
        found = [line.partition("--training-scenario hot")[2] for line in trainings]
        assert running.returncode == 0 and found == wanted * (2 if name == "run_train_final" else 1)


def test_a_dry_run_says_that_its_files_of_settings_are_not_written(recipe):
    output, _ = recipe(DRY_RUN="--dry-run").communicate()
    assert "experiment.yaml of the commands below is not written" in output
    assert "is not written" not in recipe().communicate()[0]


@pytest.mark.parametrize("flags", [("--config", "my.yaml"), ("--config=my.yaml",)])
def test_the_pipeline_can_be_started_from_any_folder(recipe, tmp_path, flags):
    running = recipe("--quick", *flags, name="run_pipeline", cwd=tmp_path, CALLS=str(tmp_path / "calls"))
    assert running.wait() == 0
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 8 and all(f" --quick --config {tmp_path}/my.yaml" in line for line in calls)


def test_every_command_of_the_pipeline_takes_a_dry_run(recipe, tmp_path, capsys):
    running = recipe(
        "--config", "my.yaml", "--dry-run", name="run_pipeline", cwd=tmp_path, CALLS=str(tmp_path / "calls")
    )
    assert running.wait() == 0
    (tmp_path / "my.yaml").write_text(f"name: none\ntarget_model: {tmp_path}/none\n")
    calls = [line.split() for line in (tmp_path / "calls").read_text().splitlines()]
    assert len(calls) == 8 and calls[-1][0] == REPORT and all("--dry-run" in call for call in calls)
    run_main(report, *calls[-1][1:])
    assert "does not exist yet" in capsys.readouterr().out


def test_a_wrong_flag_is_found_before_anything_is_fetched(recipe, tmp_path):
    running = recipe("--bogus", name="run_pipeline", CALLS=str(tmp_path / "calls"), BREAKS="overview", HOW="exit 2")
    assert running.wait() == 2
    (call,) = (tmp_path / "calls").read_text().splitlines()
    assert call == "core/runs/overview.py --config scripts/experiments/demo.yaml --bogus --before-fetch"
    with pytest.raises(UserError, match="unrecognized arguments: --bogus"):
        run_main(overview, *call.split()[1:])


DEMO = ("--config", "scripts/experiments/demo.yaml")


def test_the_demo_is_described_before_its_models_are_fetched(recipe, tmp_path, capsys, monkeypatch):
    assert recipe(name="run_pipeline", CALLS=str(tmp_path / "calls")).wait() == 0
    before, fetched, after = [line.split() for line in (tmp_path / "calls").read_text().splitlines()[:3]]
    assert before == [*after, "--before-fetch"] and fetched == ["scripts/fetch_demo_models.py"]
    assert after == ["core/runs/overview.py", *DEMO]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(overview, "missing_step", lambda name, revision: "a download")
    run_main(overview, *before[1:])
    shown = capsys.readouterr().out
    assert "First, HuggingFaceTB/SmolLM2-135M-Instruct and Qwen/Qwen2.5-Coder-0.5B-Instruct will be fetched" in shown
    assert "-> runs/demo/plans\n" in shown and "about" not in shown  # without times, which need the models
    monkeypatch.setattr(overview, "missing_step", lambda name, revision: None)
    run_main(overview, *before[1:])
    assert not capsys.readouterr().out


def test_a_dry_run_of_the_demo_fetches_nothing(recipe, tmp_path):
    assert recipe("--dry-run", name="run_pipeline", CALLS=str(tmp_path / "calls")).wait() == 0
    calls = [line.split() for line in (tmp_path / "calls").read_text().splitlines()]
    assert len(calls) == 8 and "scripts/fetch_demo_models.py" not in {call[0] for call in calls}
    assert calls[0] == ["core/runs/overview.py", *DEMO, "--dry-run"]


def test_what_the_screen_shows_is_said_to_every_command(recipe, tmp_path):
    told = {"CALLS": str(tmp_path / "calls"), "BREAKS": "--config", "HOW": "[[ $RUN_BY_SCRIPT == yes ]]"}
    assert recipe("-q", name="run_pipeline", **told).wait() == 0
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 10 and all(" -q" in line for line in calls)
    output, _ = (running := recipe(VERBOSITY="--quiet", BREAKS="--config", HOW=told["HOW"])).communicate()
    assert running.returncode == 0
    assert all(line.endswith(" --quiet") for line in output.splitlines() if line.startswith("$ "))


def test_the_help_of_the_pipeline_fetches_nothing(recipe, tmp_path):
    output, _ = (running := recipe("--help", name="run_pipeline", CALLS=str(tmp_path / "calls"))).communicate()
    assert running.returncode == 0 and output.startswith("One experiment, all stages: bash scripts/run_pipeline.sh [")
    assert not (tmp_path / "calls").exists()


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


LLAMAS = [f"unsloth/Llama-{name}-Instruct" for name in ("3.2-3B", "3.1-8B", "3.1-70B")]
FAMILIES = [LLAMAS[1], "Qwen/Qwen2.5-7B-Instruct", "mistralai/Mistral-7B-Instruct-v0.3"]
STRENGTHS = ["0.005", "0.01", "0.03", "0.05", "0.1", "0.15", "0.2"]


@pytest.mark.parametrize(
    ("variant", "flag", "values"),
    [
        ("source_size", "--source-model", LLAMAS),
        ("source_family", "--source-model", FAMILIES),
        ("alpha", "--alpha", STRENGTHS),
    ],
)
def test_the_variable_variant_calls_the_script_of_the_variant(recipe, variant, flag, values):
    output, _ = (running := recipe("--limit", "5", VARIANT=variant)).communicate()
    called = [line for line in output.splitlines() if line.startswith("resolved ")]
    assert running.returncode == 0
    assert called == [f"resolved {flag} {value} --limit 5 TASKS=malay" for value in values]


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
