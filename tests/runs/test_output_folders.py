"""Output folders: complete files, manifests and their formats, and one writer at a time."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from stages import digests, fuse, pair_flags

from core import generate_hot_residual as stage2
from core import train_hot_residual_sft as stage3
from core.errors import UserError
from core.files import LOCK, atomic_file
from core.locks import hold, outputs_held
from core.manifest import FORMAT_VERSION, MANIFEST, Manifest
from evaluation import collect_results, compare_arms


@pytest.fixture(autouse=True)
def nothing_stays_locked():
    with outputs_held():
        yield


def names(folder: Path) -> list[str]:
    """What is in a folder but its lock."""
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith(LOCK))


# Files


def test_atomic_file_leaves_the_old_one_when_writing_fails(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and names(tmp_path) == ["a"]


def test_two_writers_of_one_name_do_not_disturb_each_other(tmp_path):
    with atomic_file(tmp_path / "a") as first:
        with atomic_file(tmp_path / "a") as second:
            second.write_text("second")
        first.write_text("first")
    assert (tmp_path / "a").read_text() == "first" and names(tmp_path) == ["a"]


# Manifests


def test_a_kill_while_a_folder_begins_or_is_emptied_leaves_it_ours(tmp_path):
    folder = tmp_path / "x"
    (folder / ".tmp-transport-merge-manifest.json").mkdir(parents=True)  # killed while the first manifest was written
    Manifest.begin(folder, "plans", {"a": 1})
    (folder / "below/.tmp-transport-merge-model.safetensors").mkdir(parents=True)
    (folder / "half").write_text("x")
    Manifest.begin(folder, "plans", {"a": 1})
    assert names(folder) == ["below", "half", MANIFEST] and not names(folder / "below")
    Manifest.begin(folder, "plans", {"a": 2})
    assert names(folder) == [MANIFEST]


def test_a_folder_that_is_being_emptied_is_finished_for_nobody(tmp_path, monkeypatch):
    """When a run is killed at that moment, neither the same command nor the earlier one continues from what is left."""
    folder = tmp_path / "x"
    Manifest.begin(folder, "plans", {"a": 1}).finish()
    (folder / "plans").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            Manifest.begin(folder, "plans", {"a": 2})
    with pytest.raises(UserError, match="is not finished"):
        Manifest.read(folder, "plans")
    assert (folder / "plans").is_dir()
    assert not Manifest.begin(folder, "plans", {"a": 1}).complete and names(folder) == [MANIFEST]


def test_fingerprints_follow_contents_not_names(tmp_path):
    one = Manifest.begin(tmp_path / "x", "plans", {"target": {"id": "a/b", "weights": "1"}, "data": {"file": "t"}})
    two = Manifest.begin(tmp_path / "y", "plans", {"target": {"id": "./b", "weights": "1"}, "data": {"file": "u"}})
    three = Manifest.begin(tmp_path / "z", "plans", {"target": {"id": "a/b", "weights": "2"}, "data": {"file": "t"}})
    prints = [manifest.record["fingerprint"] for manifest in (one, two, three)]
    assert prints[0] == prints[1] != prints[2]


def test_manifest_refuses_a_folder_of_another_stage(tmp_path):
    Manifest.begin(tmp_path / "x", "plans", {"a": 1})
    with pytest.raises(UserError, match="holds the output of stage 'plans', not 'fused'"):
        Manifest.begin(tmp_path / "x", "fused", {"a": 1})
    with pytest.raises(UserError, match="is not finished; run the command of stage 'plans'"):
        Manifest.read(tmp_path / "x", "plans")


def test_an_output_inside_another_output_is_refused(tmp_path):
    """It would be removed when stage 1 runs again with other settings."""
    Manifest.begin(tmp_path / "out", "plans", {"a": 1})
    with pytest.raises(UserError, match=f"is inside {tmp_path / 'out'}, which is an output itself; give another"):
        Manifest.begin(tmp_path / "out/below/fused", "fused", {"a": 1})
    (tmp_path / MANIFEST).write_text('{"name": "of another program"}')
    Manifest.begin(tmp_path / "fused", "fused", {"a": 1})


def test_a_folder_with_a_lock_or_a_manifest_of_its_own_is_left_alone_by_the_one_around_it(tmp_path):
    out = tmp_path / "out"
    Manifest.begin(out, "plans", {"a": 1})
    kept = [out / "fused/.tmp-transport-merge-x", out / "deep/locked/.tmp-transport-merge-x"]
    for path in kept:  # half-written files of stages that are running in these folders
        path.mkdir(parents=True)
    (out / "fused" / MANIFEST).write_text("{}")
    hold(out / "deep/other")
    (out / "deep/locked/.tmp-transport-merge-lock").touch()
    (out / "deep/left.txt").write_text("of the first")
    for settings in ({"a": 1}, {"a": 2}):
        Manifest.begin(out, "plans", settings)
        assert all(path.is_dir() for path in kept)
    assert (out / "deep/other/.tmp-transport-merge-lock").is_file() and not (out / "deep/left.txt").exists()
    assert names(out) == ["deep", "fused", MANIFEST] and names(out / "deep") == ["locked", "other"]


def test_what_others_name_temporary_is_not_removed_with_our_leftovers(tmp_path):
    """Such as a user's own files, and a repository that download_assets.py is cloning."""
    (tmp_path / ".tmp-MalayMMLU").mkdir()
    (tmp_path / ".tmp-notes.txt").touch()
    (tmp_path / ".tmp-transport-merge-all.md-x").mkdir()
    hold(tmp_path)
    assert names(tmp_path) == [".tmp-MalayMMLU", ".tmp-notes.txt"]


def older(folder: Path, copy: Path) -> Path:
    """A copy of an output folder that says that it has format 2."""
    shutil.copytree(folder, copy)
    manifest = json.loads((copy / MANIFEST).read_text()) | {"format": 2, "fingerprint": "of it"}
    (copy / MANIFEST).write_text(json.dumps(manifest))
    return copy


def test_an_input_of_an_older_format_names_the_command_that_makes_it_again(fails, plans, fused, models, tmp_path):
    old_plans, old_fused = older(plans["token"], tmp_path / "run/plans"), older(fused, tmp_path / "run/fused")
    pair = pair_flags(models)
    for command, flags, folder, again in (
        (stage2, ["--hot_dir", old_plans, "--output_dir", tmp_path / "f"], old_plans, "run_activs_and_hot.py"),
        (stage3, ["--model_dir", old_fused, "--output_dir", tmp_path / "a"], old_fused, "core/generate_hot_residual"),
        (compare_arms, ["--run-dir", tmp_path / "run", *pair], old_plans, "run_activs_and_hot.py"),
    ):
        error = fails(command, *flags)
        assert f"{folder} has format 2 and this version reads format {FORMAT_VERSION}" in error
        assert f"; run python {again}" in error and "makes it anew" in error
    assert names(tmp_path) == ["run"]


def test_tables_leave_out_a_run_of_an_older_format_and_say_why(tmp_path, caplog):
    run = tmp_path / "malay"
    (run / "fused").mkdir(parents=True)
    (run / "fused" / MANIFEST).write_text(json.dumps({"format": 2, "stage": "fused", "fingerprint": "f"}))
    (run / "results.json").write_text(json.dumps({"inputs": {"fused": "f"}, "arms": {}, "held_out": {}}))
    collect_results.main(["--results-dir", str(tmp_path)])
    assert "fused has format 2" in (tmp_path / "tables/malay.md").read_text()
    assert "run python core/generate_hot_residual.py again" in caplog.text


def test_an_output_of_an_older_format_is_made_again_and_the_log_says_why(fused, plans, models, tmp_path, caplog):
    out = older(fused, tmp_path / "f")
    (out / "left.txt").write_text("of the older format")
    fuse(plans["token"], models, out, "--feature-map", "regression", "--alpha", "0.3", "--top-k", "0")
    assert f"{out} has format 2 and this version writes format {FORMAT_VERSION}, in which splits and" in caplog.text
    assert digests(out) == digests(fused)


# Locks, with real second processes

HOLDER = """
import sys, time
from pathlib import Path
from core.locks import hold, outputs_held
folder = Path(sys.argv[1])
with outputs_held():
    hold(folder)
    (folder / ".tmp-transport-merge-all.md-x").mkdir()
    print("held", flush=True)
    sys.stdin.readline()
    (folder / "of the holder").touch()
"""


def started(code: str, *arguments: object) -> subprocess.Popen:
    """Start a second process that runs `code`, and return when it has printed `held`."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout.readline() == "held\n", process.stderr.read()
    return process


def test_a_lock_names_its_holder_and_dies_with_it(tmp_path):
    folder = tmp_path / "x/y"
    holder = started(HOLDER, folder)
    with pytest.raises(UserError) as refused:
        hold(folder)
    host = os.uname().nodename
    assert f"{folder} is being written by process {holder.pid} on host {host} (command -c " in str(refused.value)
    assert "wait for it or give another output folder" in str(refused.value)
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    assert (folder / ".tmp-transport-merge-lock").is_file() and (folder / ".tmp-transport-merge-all.md-x").is_dir()
    with outputs_held():
        hold(folder)  # the lock file that is left over stops nobody
        hold(folder)
        assert not (folder / ".tmp-transport-merge-all.md-x").exists()
    assert not (tmp_path / "x/y").exists() or not list(folder.iterdir())


def test_a_folder_that_got_no_file_is_not_left_behind(tmp_path):
    with outputs_held():
        hold(tmp_path / "x/y")
    assert not list(tmp_path.iterdir())


def test_writers_of_the_tables_wait_for_each_other(tmp_path, caplog, monkeypatch):
    tables, run = tmp_path / "tables", tmp_path / "malay/fused"
    run.mkdir(parents=True)
    (run / MANIFEST).write_text(json.dumps({"format": FORMAT_VERSION}))
    holder = started(HOLDER, tables)
    caplog.set_level("INFO")

    def goes_on(*_):  # this process has logged that it waits, so the other one may end
        assert not (tables / "all.md").exists()
        holder.stdin.write("\n")
        holder.stdin.flush()

    monkeypatch.setattr("core.locks.log.info", goes_on)
    collect_results.main(["--results-dir", str(tmp_path)])
    assert holder.wait() == 0 and names(tables) == ["all.md", "malay.json", "malay.md", "of the holder"]


STAGE = """
import sys
from core import generate_hot_residual as stage2
from core.runs.fused_layers import FusedLayers
transport = FusedLayers.transport
def waits(*arguments):
    print("held", flush=True)
    sys.stdin.readline()
    return transport(*arguments)
FusedLayers.transport = waits
stage2.main(sys.argv[1:])
"""


def test_the_same_command_started_twice_is_refused_and_the_first_ends_with_the_right_bytes(
    fails, fused, plans, models, tmp_path
):
    out = tmp_path / "f"
    fusion = ["--feature-map", "regression", "--alpha", "0.3", "--top-k", "0"]
    flags = [*pair_flags(models), "--hot_dir", plans["token"], "--output_dir", out, *fusion]
    first = started(STAGE, *flags)
    (out / ".tmp-transport-merge-half-written").mkdir()  # of the first process; the second must leave it alone
    error = fails(stage2, *flags)
    assert f"{out} is being written by process {first.pid} on host" in error
    # Other settings do not empty the folder.
    assert f"{out} is being written by" in fails(stage2, *flags, "--ridge", "0.1")
    assert (out / ".tmp-transport-merge-half-written").is_dir()
    (out / ".tmp-transport-merge-half-written").rmdir()
    _, error = first.communicate("\n")
    assert first.returncode == 0, error
    assert digests(out) == digests(fused)


def test_training_and_cards_leave_a_folder_alone_that_another_process_writes(fused, tmp_path, fails):
    out = shutil.copytree(fused, tmp_path / "a")
    holder = started(HOLDER, out)
    assert "is being written by" in fails(stage3, "--model_dir", fused, "--output_dir", out, "--sft-samples", 8)
    with pytest.raises(UserError, match="is being written by"):
        compare_arms.add_results(out, "table")
    holder.communicate("\n")
