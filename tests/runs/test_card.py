"""Model cards, licences, pushing and the hub's refusals, through the commands; no hub is asked."""

import json
import logging
import shutil
import socket
import time
from types import SimpleNamespace

import httpx2
import huggingface_hub
import pytest
from conftest import run_main
from huggingface_hub import ModelCard
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import hf_raise_for_status

from core import generate_hot_residual as stage2
from core import hub
from core import train_hot_residual_sft as stage3
from core.errors import UserError
from core.models.checkpoints import open_checkpoint
from core.runs.card import (
    RESULTS_BEGIN,
    RESULTS_END,
    add_results,
    describe_model,
    fused_card,
    licence_text,
    read_licence,
)


@pytest.fixture(scope="module")
def root(models, tmp_path_factory):
    """A models folder: someone/small (target) and someone/big (source), without cards."""
    folder = tmp_path_factory.mktemp("root")
    shutil.copytree(models["target"], folder / "someone/small")
    shutil.copytree(models["source"], folder / "someone/big")
    return folder


@pytest.fixture
def licensed(root, monkeypatch):
    """Function (front matter of the target's card, of the source's) that writes both; None: no card."""
    monkeypatch.setenv("MODELS_ROOT", str(root))

    def write(*front_matters):
        for name, text in zip(("small", "big"), front_matters, strict=True):
            (root / "someone" / name / "README.md").unlink(missing_ok=True)
            if text is not None:
                (root / "someone" / name / "README.md").write_text(f"---\n{text}\n---\n# A model\n")

    return write


def fuse(plans, out, *flags):
    run_main(
        stage2,
        "--hot_dir",
        plans["token"],
        "--modelA_id",
        "someone/small",
        "--modelB_id",
        "someone/big",
        "--feature-map",
        "regression",
        "--output_dir",
        out,
        *flags,
    )
    return out


@pytest.fixture(scope="module")
def fused(models, plans, tmp_path_factory):
    """A fused checkpoint of local folders."""
    out = tmp_path_factory.mktemp("fused") / "out"
    run_main(stage2, "--hot_dir", plans["token"], "--feature-map", "regression", "--output_dir", out)
    return out


def front_matter(folder):
    return ModelCard.load(folder / "README.md").data.to_dict()


# Cards


def test_cards_name_models_licence_and_the_whole_experiment(plans, licensed, tmp_path, caplog):
    licensed("license: apache-2.0", "license: apache-2.0")
    with caplog.at_level(logging.WARNING):
        fused = fuse(plans, tmp_path / "fused", "--target-revision", "v1.5", "--ridge", "0.02")
    assert not [r for r in caplog.records if "licence" in r.getMessage()]
    shared = {
        "license": "apache-2.0",
        "tags": ["transport-and-merge"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
    }
    both = ["someone/small", "someone/big"]
    assert front_matter(fused) == {**shared, "base_model": both, "base_model_relation": "merge"}
    card = (fused / "README.md").read_text()
    report = json.loads((fused / "fusion_report.json").read_text())
    assert f"| {report['mean']['q']['explained_variance']:.3g} |" in card and "| v1.5 |" in card
    assert "| plans | pooling | token |" in card and "| fusion | ridge | 0.02 |" in card
    assert "of `texts.jsonl`" in card and "/texts.jsonl" not in card  # a local path is nobody's business

    for scenario, bases in (("hot", both), ("no_hot", both[:1])):
        out = tmp_path / scenario
        run_main(stage3, "--model_dir", fused, "--output_dir", out, "--sft-samples", 3, "--training_scenario", scenario)
        relation = "merge" if len(bases) > 1 else "finetune"
        assert front_matter(out) == {**shared, "base_model": bases, "base_model_relation": relation}
        card = (out / "README.md").read_text()
        losses = json.loads((out / "manifest.json").read_text())["losses"]
        assert "rows: 3 texts of `texts.jsonl`" in card and f"{losses[-1]:.4f} at the last" in card
        assert "| training | learning_rate | 1e-06 |" in card
        assert ("| fusion | ridge | 0.02 |" in card) == (scenario == "hot")


def test_local_folders_are_named_but_are_no_base_models(fused, models, monkeypatch):
    """The hub refuses a base model that is no hub id."""
    found = front_matter(fused)
    assert "base_model" not in found and found["license"] == "unknown" and found["base_model_relation"] == "merge"
    card = (fused / "README.md").read_text()
    assert "`target` and `source` are local folders" in card and str(models["target"]) not in card
    monkeypatch.chdir(models["target"].parents[1])
    described = describe_model(open_checkpoint(f"{models['target'].parent.name}/target"))  # looks like a hub id
    assert (described["hub_id"], described["name"]) == (None, "target")


def test_data_sets_of_the_hub_are_listed(fused):
    lineage = json.loads((fused / "manifest.json").read_text())["lineage"]
    means = json.loads((fused / "fusion_report.json").read_text())["mean"]
    for file, expected in ((None, ["openai/gsm8k"]), ("/mine/gsm8k.jsonl", None)):
        changed = {**lineage, "data": lineage["data"] | {"subset": "gsm8k", "file": file}}
        assert ModelCard(fused_card(changed, means, 0)).data.datasets == expected


def test_a_card_is_no_part_of_a_model_or_a_fingerprint(plans, licensed, tmp_path, caplog):
    licensed(None, None)
    before, out = open_checkpoint("someone/small").identity, fuse(plans, tmp_path / "f")
    identity = open_checkpoint(str(out)).identity
    licensed("license: mit", "license: mit")
    (out / "README.md").write_text("another")
    assert open_checkpoint("someone/small").identity == before
    assert open_checkpoint(str(out)).identity == identity
    with caplog.at_level(logging.INFO):
        fuse(plans, out)
    assert any("is finished already" in r.getMessage() for r in caplog.records)
    assert (out / "README.md").read_text() == "another"


# Licences


@pytest.mark.parametrize(
    ("target", "source", "licence", "told"),
    [
        ("license: apache-2.0", "license: mit", "other", "licences differ: target apache-2.0, source mit; check that"),
        ("license: apache-2.0", None, "other", "licences differ: target apache-2.0, source unknown; check that both"),
        (
            "license: other\nlicense_name: llama3\nlicense_link: https://x/y",
            "license: llama3.1",
            "other",
            "licences differ: target llama3, source llama3.1",
        ),
        ("license: [", "x: 1", "unknown", "licences are not stated: target unknown, source unknown"),
    ],
)
def test_licences_that_differ_or_are_unknown_are_told_once(
    plans, licensed, tmp_path, caplog, target, source, licence, told
):
    licensed(target, source)
    with caplog.at_level(logging.WARNING):
        out = fuse(plans, tmp_path / "f")
    lines = [r.getMessage() for r in caplog.records if "licence" in r.getMessage()]
    assert len(lines) == 1 and lines[0].startswith(told)
    assert front_matter(out)["license"] == licence and lines[0][1:] in (out / "README.md").read_text()


def test_a_licence_is_read_from_the_card_or_a_licence_file(tmp_path):
    assert read_licence(tmp_path) == {} and licence_text({}) == "unknown"
    (tmp_path / "LICENSE.txt").write_text("\n   LLAMA 3.1 COMMUNITY License\n\nterms")
    found = read_licence(tmp_path)
    assert found == {"license": "other", "license_name": "llama-3.1-community-license"}
    assert licence_text(found) == "llama-3.1-community-license"
    card = "---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\n---\n"
    (tmp_path / "README.md").write_text(card)
    assert read_licence(tmp_path) == {"license": "other", "license_name": "mine"}
    link = "https://huggingface.co/a/b/blob/main/LICENSE"
    assert read_licence(tmp_path, "a/b") == {"license": "other", "license_name": "mine", "license_link": link}
    (tmp_path / "README.md").write_text("---\nlicense:\n- mit\n- 3\nlicense_name: [a]\nlicense_link: 1.5\n---\n")
    assert read_licence(tmp_path) == {"license": ["mit", "3"]} and licence_text(read_licence(tmp_path)) == "mit, 3"


# Results


def test_results_take_the_place_of_earlier_ones_and_of_nothing_else(tmp_path):
    path = tmp_path / "README.md"
    add_results(tmp_path, "new\n")
    assert not path.exists()
    for foreign in (b"mine", b"mine " + RESULTS_BEGIN + b"cut"):
        path.write_bytes(foreign)
        add_results(tmp_path, "new\n")
        assert path.read_bytes() == foreign
    head, tail = b"\xff\r\n" + RESULTS_BEGIN, RESULTS_END + b"\r\n\ttail"
    path.write_bytes(head + tail)
    for section in ("one\n", "one\n", "two\n"):
        add_results(tmp_path, section)
        assert path.read_bytes() == head + section.encode() + tail


# Pushing


class Hub:
    """Stands for HfApi: records calls; `answer` is raised by create_repo."""

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
    fused = fuse(plans, tmp_path / "fused", "--push-to-hub", "mine")
    fingerprint = json.loads((fused / "manifest.json").read_text())["fingerprint"]
    # Of a killed run.
    for name in ("parts/0.safetensors", "checkpoints/checkpoint-1/a.json", ".tmp-transport-merge-a/a"):
        (fused / name).parent.mkdir(parents=True)
        (fused / name).touch()
    fuse(plans, fused)
    fuse(plans, fused, "--push-to-hub", "mine")
    assert [call[:2] for call in calls] == [("someone/mine", fused)] * 2 and calls[0] == calls[1]
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md", "hot_residual.safetensors"} < calls[0][2]
    assert not any(name.startswith(("parts", "checkpoints", ".tmp")) for name in calls[0][2])
    assert json.loads((fused / "manifest.json").read_text())["fingerprint"] == fingerprint

    for scenario, repo in (("hot", "someone/mine-adapted"), ("no_hot", "someone/mine-no-hot")):
        flags = [
            "--model_dir",
            fused,
            "--output_dir",
            tmp_path / scenario,
            "--sft-samples",
            3,
            "--training_scenario",
            scenario,
            "--push-to-hub",
            "mine",
        ]
        for _ in range(2):
            run_main(stage3, *flags)
            assert calls.pop()[:2] == (repo, tmp_path / scenario)
    assert len(calls) == 2


def test_a_failed_push_leaves_a_complete_checkpoint_and_says_so(fails, fused, plans, monkeypatch):
    flags = ["--hot_dir", plans["token"], "--feature-map", "regression", "--output_dir", fused, "--push-to-hub"]
    complete = f"the checkpoint is complete at {fused}, the same command pushes it again"
    line = fails(stage2, *flags, "me/mine")  # conftest sets HF_HUB_OFFLINE
    assert complete in line and "offline mode is enabled" in line
    assert "push_to_hub is no repository id: Repo id must" in fails(stage2, *flags, "me/mi ne")
    login = "log in with `hf auth login`"
    for answer, told in (
        (refused(403, None, 'You don\'t have the rights to create a model under the namespace "me"'), login),
        (refused(401, None, "Invalid username or password."), login),
        (ValueError("Invalid metadata in README.md.\n- base_model"), "Invalid metadata in README.md. - base_model"),
    ):
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda answer=answer: Hub([], answer))
        line = fails(stage2, *flags, "me/mine")
        assert complete in line and told in line
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


# What the hub answers when a model is asked for

GATED = (
    "Access to model someone/x is restricted and you are not in the authorized list. "
    "Visit https://huggingface.co/someone/x to ask for access."
)


@pytest.mark.parametrize(
    ("answer", "told"),
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
def test_refused_models_give_the_hubs_reason_and_the_fix(fails, plans, monkeypatch, tmp_path, answer, told):
    def refuse(*_, **__):
        raise refused(*answer)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    line = fails(
        stage2,
        "--hot_dir",
        plans["token"],
        "--modelA_id",
        "someone/x",
        "--target-revision",
        "v9",
        "--output_dir",
        tmp_path / "f",
    )
    assert told in line and "neither a folder" not in line and not (tmp_path / "f").exists()


@pytest.mark.parametrize("wrapped", [False, True])
def test_refused_files_of_a_visible_model_do_too(monkeypatch, wrapped):
    """The page of a gated model can be seen; its files are refused, by some ways behind a general error."""

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
