"""Uploads of checkpoints and the hub's refusals, through the commands. No hub is asked."""

import json
import socket
import time
from types import SimpleNamespace

import httpx2
import huggingface_hub
import pytest
from conftest import run_main
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import hf_raise_for_status
from stages import fuse_by_id

from core import generate_hot_residual as stage2
from core import hub
from core import train_hot_residual_sft as stage3
from core.errors import UserError
from core.models.checkpoints import open_checkpoint


@pytest.fixture(scope="module")
def fused(models, plans, tmp_path_factory):
    """A fused checkpoint that was made of local folders."""
    out = tmp_path_factory.mktemp("fused") / "out"
    run_main(stage2, "--hot_dir", plans["token"], "--feature-map", "regression", "--output_dir", out)
    return out


class Hub:
    """Takes the place of HfApi and records the uploads; create_repo raises `answer` if there is one."""

    def __init__(self, calls, answer=None):
        self.calls, self.answer = calls, answer

    def model_info(self, repo_id, timeout):
        raise refused(401, "RepoNotFound", "Invalid username or password.", repo_id)

    def create_repo(self, repo_id, private, exist_ok):
        assert private and exist_ok
        if self.answer is not None:
            raise self.answer
        return SimpleNamespace(repo_id=f"someone/{repo_id}")

    def upload_folder(self, repo_id, folder_path, ignore_patterns, commit_message):
        kept = huggingface_hub.utils.filter_repo_objects(
            [str(path.relative_to(folder_path)) for path in folder_path.rglob("*") if path.is_file()],
            ignore_patterns=ignore_patterns,
        )
        self.calls.append((repo_id, folder_path, set(kept)))


def refused(status, code, message, name="someone/x"):
    """The error that the installed library makes of the hub's answer."""
    headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
    request = httpx2.Request("GET", f"https://huggingface.co/api/models/{name}")
    with pytest.raises(huggingface_hub.errors.HfHubHTTPError) as caught:
        hf_raise_for_status(httpx2.Response(status, headers=headers, request=request))
    return caught.value


def test_push_uploads_the_finished_folder_and_again_when_asked_again(plans, licensed, tmp_path, monkeypatch):
    licensed(None, None)
    calls = []
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: Hub(calls))
    fused = fuse_by_id(plans, tmp_path / "fused", "--push-to-hub", "mine")
    fingerprint = json.loads((fused / "manifest.json").read_text())["fingerprint"]
    # Files that a killed run leaves behind.
    for name in ("parts/0.safetensors", "checkpoints/checkpoint-1/a.json", ".tmp-transport-merge-a/a"):
        (fused / name).parent.mkdir(parents=True)
        (fused / name).touch()
    fuse_by_id(plans, fused)
    fuse_by_id(plans, fused, "--push-to-hub", "mine")
    assert [call[:2] for call in calls] == [("someone/mine", fused)] * 2 and calls[0] == calls[1]
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md", "hot_residual.safetensors"} < calls[0][2]
    assert not any(name.startswith(("parts", "checkpoints", ".tmp")) for name in calls[0][2])
    assert json.loads((fused / "manifest.json").read_text())["fingerprint"] == fingerprint

    for scenario, repo in (("hot", "someone/mine-adapted"), ("no_hot", "someone/mine-no-hot")):
        out = tmp_path / scenario
        flags = ["--sft-samples", 3, "--training_scenario", scenario, "--push-to-hub", "mine"]
        for _ in range(2):
            run_main(stage3, "--model_dir", fused, "--output_dir", out, *flags)
            assert calls.pop()[:2] == (repo, out)
    assert len(calls) == 2


def test_a_failed_push_leaves_a_complete_checkpoint_and_says_so(fails, fused, plans, monkeypatch):
    flags = ["--hot_dir", plans["token"], "--feature-map", "regression", "--output_dir", fused, "--push-to-hub"]
    complete = f"the checkpoint is complete at {fused}, the same command pushes it again"
    line = fails(stage2, *flags, "me/mine")  # conftest sets HF_HUB_OFFLINE
    assert complete in line and "offline mode is enabled" in line
    assert "push_to_hub is no repository id: Repo id must" in fails(stage2, *flags, "me/mi ne")
    login = "log in with `hf auth login`"
    for answer, reason in (
        (refused(403, None, 'You don\'t have the rights to create a model under the namespace "me"'), login),
        (refused(401, None, "Invalid username or password."), login),
        (ValueError("Invalid metadata in README.md.\n- base_model"), "Invalid metadata in README.md. - base_model"),
    ):
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda answer=answer: Hub([], answer))
        line = fails(stage2, *flags, "me/mine")
        assert complete in line and reason in line
        assert str(getattr(answer, "server_message", "Invalid")).rstrip(".") in line


def test_push_gives_up_where_the_hub_does_not_answer(tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(hub, "HUB_TIMEOUT_S", 0.3)
        start = time.monotonic()
        with pytest.raises(UserError, match=r"cannot push to me/mine \(timed out\)"):
            hub.push_folder(tmp_path, "me/mine")
    assert time.monotonic() - start < 5


GATED = (
    "Access to model someone/x is restricted and you are not in the authorized list. "
    "Visit https://huggingface.co/someone/x to ask for access."
)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ((403, "GatedRepo", GATED), "is gated (Access to model someone/x is restricted and you are not in the "),
        ((403, "GatedRepo", GATED), "accept its terms at https://huggingface.co/someone/x, then log in with `hf auth"),
        ((404, "RepoNotFound", "Repository not found"), "the hub has no model someone/x, or it is private (Repository"),
        ((401, None, "Invalid username or password."), "or it is private (Invalid username or password); check the id"),
        ((404, "RevisionNotFound", "Invalid rev id: v9"), "has no revision v9 (Invalid rev id: v9); give a branch,"),
        ((401, None, "Invalid credentials in Authorization header"), "refuses model someone/x (Invalid credentials"),
        ((403, None, "Your token may not read this"), "(Your token may not read this); log in with `hf auth login`"),
        ((403, None, "Access to this resource is disabled."), "does not give model someone/x (Access to this resource"),
        ((503, None, "Maintenance"), "does not give model someone/x (Maintenance); try again later"),
    ],
)
def test_refused_models_give_the_hubs_reason_and_the_fix(fails, plans, monkeypatch, tmp_path, answer, expected):
    def refuse(*_, **__):
        raise refused(*answer)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    flags = ["--modelA_id", "someone/x", "--target-revision", "v9", "--output_dir", tmp_path / "f"]
    line = fails(stage2, "--hot_dir", plans["token"], *flags)
    assert expected in line and "neither a folder" not in line and not (tmp_path / "f").exists()


@pytest.mark.parametrize("wrapped", [False, True])
def test_refused_files_of_a_visible_model_do_too(monkeypatch, wrapped):
    """The page of a gated model can be seen, but its files are refused; some downloads wrap the refusal in an error of
    their own."""

    def download(*_, local_files_only=False, **__):
        if local_files_only:
            raise LocalEntryNotFoundError("not in the cache")
        if wrapped:
            raise LocalEntryNotFoundError("Please check your connection") from refused(403, "GatedRepo", GATED)
        raise refused(403, "GatedRepo", GATED)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(UserError, match="model someone/x is gated"):
        open_checkpoint("someone/x")


def test_cards_are_downloaded_but_a_cached_model_without_one_is_complete(models, monkeypatch):
    asked = []

    def download(*_, allow_patterns, local_files_only=False, **__):
        asked.append((local_files_only, allow_patterns))
        if local_files_only and len(asked) == 1:
            raise LocalEntryNotFoundError("not in the cache")
        return models["target"]

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    for _ in range(2):
        open_checkpoint("someone/x")
    assert [local for local, _ in asked] == [True, False, True]
    assert ["README.md" in patterns for _, patterns in asked] == [False, True, False]
