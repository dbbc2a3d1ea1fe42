"""What a user sees of a whole run and finds in its log: each stage names the next command, and the script its plan."""

import fcntl
import json
import os
import pty
import re
import shlex
import struct
import subprocess
import termios
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, run_main

from core.runs import overview

# Of other libraries or of the Trainer, and no word for the user.
NOISE = ("Loading weights", "{'", "Deprecat", "it/s", "[transformers]", "Generating train split", "Traceback")


@dataclass
class Shown:
    """What one command has shown: on a terminal, errors and all; elsewhere stdout and stderr."""

    command: str
    out: str
    err: str


@pytest.fixture(scope="module")
def start(models, texts, warm_python, tmp_path_factory):
    """A function that runs a command line from the repository, and the folder of the runs."""
    folder = tmp_path_factory.mktemp("shown")
    settings = {"target_model": str(models["target"]), "source_model": str(models["source"]), "data_subset": "file"}
    settings |= {"data_file": str(texts), "max_tokens": 24, "sft_samples": 4, "gradient_accumulation": 2}
    settings |= {"validation_samples": 4, "held_out_samples": 8}
    (folder / "small.yaml").write_text(yaml.safe_dump(settings))
    path = {"PATH": f"{warm_python}:{os.environ['PATH']}", "TRANSPORT_RESULTS_ROOT": str(folder / "runs")}

    def run(command: str, terminal: bool = False) -> Shown:
        ours, theirs = pty.openpty() if terminal else (None, subprocess.PIPE)
        options = {"cwd": ROOT, "env": os.environ | path, "stdout": subprocess.PIPE, "stderr": theirs}
        if terminal:
            fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
        process = subprocess.Popen(shlex.split(command), **options)
        if terminal:
            os.close(theirs)
            read: list[bytes] = []
            reader = threading.Thread(target=_read_all, args=(ours, read))
            reader.start()
        out, err = process.communicate()
        if terminal:
            reader.join()
            err = b"".join(read)
        assert process.returncode == 0, err.decode()
        return Shown(command, out.decode(), err.decode())

    run.folder = folder
    return run


def _read_all(descriptor: int, into: list[bytes]) -> None:
    """Everything that is written to a terminal, until nobody has it open any more."""
    try:
        while piece := os.read(descriptor, 65536):
            into.append(piece)
    except OSError:  # Linux says so at the end
        os.close(descriptor)


@pytest.fixture(scope="module")
def chain(start):
    """The stages, each by the command that the one before it has named; the first two on a terminal."""
    command = f"python run_activs_and_hot.py --config {start.folder / 'small.yaml'} --tokens-per-batch 512"
    done: list[Shown] = []
    while "report.py" not in command:
        done.append(start(command, terminal=len(done) < 2))
        (command,) = re.findall(r"next:\r?\n(python .*?)\r?\n", done[-1].err)
    return done


def test_every_stage_names_the_next_command_and_says_how_long_it_took(chain, start):
    called = [(shown.command.split()[1], *re.findall(r"--training-scenario (\w+)", shown.command)) for shown in chain]
    training = "core/train_hot_residual_sft.py"
    assert called == [
        ("run_activs_and_hot.py",),
        ("core/generate_hot_residual.py",),
        (training, "hot"),
        (training, "no_hot"),
        ("evaluation/compare_arms.py",),
    ]
    # What the next stage has as well is handed on, and folders are those of the experiment.
    assert all("--tokens-per-batch 512" in shown.command for shown in chain)
    assert not any("-dir" in shown.command for shown in chain)
    run = start.folder / "runs/small"
    outputs = ("plans", "fused", "adapted/hot/seed0", "adapted/no_hot/seed0", "results.json")
    for shown, made in zip(chain, outputs, strict=True):
        assert re.search(rf"{run / made} is finished, after [\d.]+ (s|min)", shown.err)


def test_no_noise_is_shown_and_a_terminal_is_left_without_bars(chain):
    for shown in chain:
        assert not [noise for noise in NOISE if noise in shown.err]
    for shown, bar in zip(chain[:2], ("plans", "fusing"), strict=True):
        assert f"\r{bar}:   0 % |" in shown.err and "so far" in shown.err
        left = [line.rpartition("\r")[2] for line in shown.err.replace("\r\n", "\n").split("\n")]
        assert not any("so far" in line for line in left)
    assert not any("so far" in shown.err or "\r" in shown.err for shown in chain[2:])


def test_the_log_file_has_everything_with_times(chain, start):
    log = (start.folder / "runs/small/log.txt").read_text()
    for shown in chain:
        assert f"command: {shown.command.removeprefix('python ')}" in log
        assert "command: " not in shown.err and not (shown.out and shown.out.splitlines()[0] in shown.err)
        messages = re.findall(r"^\d\d:\d\d:\d\d (.*?)\r?$", shown.err, re.MULTILINE)
        assert messages and all(message in log for message in messages)
        assert shown.out.strip() in log
    # Of reading the texts, before it is known that a file may be written; and nothing is said twice.
    stage1 = log[: log.index("command: core/generate_hot_residual.py")]
    assert stage1.count("command: ") == stage1.count("finding groups: 120 of 120 texts in") == 1
    assert stage1.index("command: ") < stage1.index("finding groups: ") < stage1.index("plans: 72 of 72 pairs in")
    assert "training hot: 2 of 2 updates" in log and "update 1: {'loss'" in log and "plans: 72 of 72 pairs in" in log
    dated = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} ")
    assert all(dated.match(line) for line in log.splitlines() if " of 72 pairs" in line or "update" in line)


def test_quiet_shows_results_and_warnings_and_verbose_all_that_the_log_has(chain, start):
    quiet = start(f"{chain[1].command} -q")
    assert quiet.out == chain[1].out
    assert {line.split(" ", 1)[1].split(":")[0] for line in quiet.err.splitlines()} == {
        "licences are not stated",
        "|W~|/|W| is 1.7e-04",
    }
    verbose = start(f"{chain[0].command} --verbose")
    assert verbose.out == chain[0].out and "finding groups: 120 of 120 texts in" in verbose.err
    assert "finding groups:   0 %" not in verbose.err and "finding groups: 120" not in chain[0].err
    assert f"{start.folder / 'runs/small/plans'} is finished already, after" in verbose.err


@pytest.fixture
def told(chain, start, monkeypatch, capsys):
    """A function of settings: (path below the run -> what the overview says of it, all that the overview says)."""
    monkeypatch.setenv("TRANSPORT_RESULTS_ROOT", str(start.folder / "runs"))
    run, config = start.folder / "runs/small", start.folder / "other.yaml"

    def tell(**settings):
        before = yaml.safe_load((start.folder / "small.yaml").read_text())
        config.write_text(yaml.safe_dump(before | {"name": "small", "tokens_per_batch": 512} | settings))
        run_main(overview, "--config", config)
        shown = capsys.readouterr().out
        notes = re.findall(r"^  .*? -> (\S+?)(?:: (.*))?$", shown, re.MULTILINE)
        return {str(Path(path).relative_to(run)): note for path, note in notes}, shown

    return tell


TRAININGS = [f"adapted/{scenario}/seed0" for scenario in ("no_hot", "distill", "hot")]
OUTPUTS = ["plans", "fused", *TRAININGS, "results.json", "report.html"]
DONE, TIME = "finished already", re.compile(r"about [\d.]+ s")


def test_the_script_says_what_it_will_do_and_what_is_finished(chain, start):
    config, run = start.folder / "small.yaml", start.folder / "runs/small"
    shown = start(f"bash scripts/run_pipeline.sh --config {config} --tokens-per-batch 512 --dry-run").out
    paths = re.findall(r"^  .*? -> (\S+?)(?:: .*)?$", shown, re.MULTILINE)
    assert [Path(path) for path in paths] == [run / output for output in OUTPUTS]
    assert f"Log: {run / 'log.txt'}" in shown and "A dry run" in shown


def test_what_is_finished_is_named_and_the_rest_estimated(told, start):
    notes, shown = told()
    assert [path for path, note in notes.items() if note == DONE] == ["plans", "fused", TRAININGS[0], TRAININGS[2]]
    assert TIME.fullmatch(notes[TRAININGS[1]])
    # The distillation is an arm that the losses lack.
    assert notes["results.json"].startswith("begun already, and goes on; at most about ")
    (start.folder / "runs/small/report.html").touch()
    assert told()[0]["report.html"] == notes["report.html"] == "not estimated"  # it is drawn in any case
    assert re.search(r"^In all about [\d.]+ s on this machine\. .*\n  loading and saving", shown, re.MULTILINE)
    assert "is kept, unless" in shown


def test_half_measured_losses_are_not_finished(told, start, monkeypatch):
    monkeypatch.setattr(overview, "SCENARIOS", ("no_hot", "hot"))
    assert told()[0]["results.json"] == DONE
    path = start.folder / "runs/small/results.json"
    whole = path.read_text()
    try:
        record = json.loads(whole)
        path.write_text(json.dumps({key: value for key, value in record.items() if key != "arms"}))
        assert told()[0]["results.json"].startswith("begun already")
        path.write_text(json.dumps(record | {"inputs": record["inputs"] | {"settings": {}}}))
        assert told()[0]["results.json"].startswith("measured anew, about ")
    finally:
        path.write_text(whole)


@pytest.mark.parametrize(
    ("settings", "kept", "why"),
    [
        ({"max_tokens": 20}, [], "made anew for another max_tokens, about "),
        ({"calibration_samples": 20}, [], "made anew for another calibration_samples, about "),
        ({"alpha": 0.3}, ["plans"], "made anew for another alpha, not estimated"),
        ({"rows": "anchored", "feature_map": "regression"}, ["plans"], "made anew for another feature_map, rows, "),
        ({"learning_rate": 0.3}, ["plans", "fused"], "made anew for another learning_rate, about "),
    ],
)
def test_what_other_settings_make_anew_is_not_called_finished(told, settings, kept, why):
    notes, shown = told(**settings)
    assert [path for path, note in notes.items() if note == DONE] == kept
    assert notes[OUTPUTS[len(kept)]].startswith(why) and "In all about" in shown
    # What is made from it is made anew as well.
    if "fused" not in kept:
        assert notes[TRAININGS[0]].startswith("made anew, as fused is, about ")
        assert notes["results.json"].startswith("measured anew, about ")
