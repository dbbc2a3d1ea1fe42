"""Everything a task needs, fetched for offline use: against stand-ins for the hub and for git."""

import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import run_main
from data_files import fake_hub

from core.data import DataSpec, divide
from scripts import download_assets


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub and a git that have everything; what was asked of them."""
    import huggingface_hub

    asked = fake_hub(monkeypatch, [{"text": f" text {n} "} for n in range(40)] + [{"text": ""}])
    sizes = [SimpleNamespace(size=2**30, file_size=2**30, will_download=True)]
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *a, **k: None)
    monkeypatch.setattr(
        huggingface_hub.HfApi, "dataset_info", lambda *a, **k: SimpleNamespace(siblings=sizes, sha="e" * 40)
    )
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: sizes)
    monkeypatch.setattr(download_assets, "model_folder", lambda name, *_, **__: asked.append(name))

    def clone(command, **_):
        asked.append(command[-2])
        (tmp_path / "space").mkdir(exist_ok=True)
        Path(command[-1]).mkdir()
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", clone)
    monkeypatch.delenv("MALAY_REPO", raising=False)
    return asked


def test_a_task_is_fetched_once_and_its_rows_divide_as_the_hubs(hub, tmp_path, caplog):
    flags = ("--data-dir", tmp_path / "data", "--workspace", tmp_path / "space")
    caplog.set_level("INFO")
    run_main(download_assets, "--task", "thai", "malay", "--sizes", *flags)
    assert not hub and "8.00 GiB to fetch" in caplog.text  # three models and five data sets, 1 GiB each
    run_main(download_assets, "--task", "thai", "malay", *flags)
    names = [each if isinstance(each, str) else each[0] for each in hub]
    assert names.count("unsloth/Llama-3.1-8B-Instruct") == 1  # both tasks' source
    assert {
        "scb10x/llama3.2-typhoon2-1b-instruct",
        "li-lab/MMLU-ProX-Lite",
        "juletxara/mgsm",
        "facebook/belebele",
        "https://github.com/UMxYTL-AI-Labs/MalayMMLU",
    } <= set(names)
    kept = (tmp_path / "data/thai.jsonl").read_bytes()
    local, there = (divide(DataSpec(*data)) for data in (("file", str(tmp_path / "data/thai.jsonl")), ("thai",)))
    assert local.parts == there.parts and sum(map(len, local.parts.values())) == 40
    assert local.revision == there.revision == "e" * 40
    groups = [{row: row.group for rows in found.parts.values() for row in rows} for found in (local, there)]
    assert groups[0] == groups[1]
    hub.clear()
    run_main(download_assets, "--task", "thai", "malay", *flags)
    asked = [each[0] for each in hub if not isinstance(each, str)]
    assert "ChavyvAkvar/fineweb-2-1M-Sample-Thai" not in asked and not any("github" in str(each) for each in hub)
    assert (tmp_path / "data/thai.jsonl").read_bytes() == kept


def test_the_end_says_what_could_not_be_fetched(hub, tmp_path, fails, monkeypatch):
    def refused(name, *_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(download_assets, "model_folder", refused)
    told = fails(download_assets, "--task", "thai", "--data-dir", tmp_path / "data")
    assert "could not be fetched; the same command tries them again" in told and (tmp_path / "data/thai.jsonl").exists()
    assert "task 'klingon'; expected general or an experiment with benchmarks: cantonese, finance" in fails(
        download_assets, "--task", "klingon"
    )
