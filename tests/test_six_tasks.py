"""The paper's six tasks: their settings, and the script that runs them."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import ROOT, sentences

from core.command import load_experiment

LLAMA = "unsloth/Llama-3.1-8B-Instruct"
# Target, source, fuse alpha, train alpha, learning rate, data, fine-tuning rows: the paper's table of settings.
SETTINGS = {
    "medical": ("PathFinderKR/Llama-3-1B-Medical-Instruct", LLAMA, 0.03, 0.005, 3e-7, "medical", 2000),
    "thai": ("scb10x/llama3.2-typhoon2-1b-instruct", LLAMA, 0.01, 0.01, 1e-7, "thai", 8000),
    "finance": ("unsloth/Llama-3.2-1B-Instruct", LLAMA, 0.03, 0.03, 1e-6, "finance", 2000),
    "finance_paper": ("TEL-LLM/LLaMA-3.2-1B-TEL-A-finance", "Qwen/Qwen2.5-7B", 0.03, 0.03, 1e-6, "finance", 2000),
    "cantonese": ("unsloth/Llama-3.2-1B-Instruct", "FlagAlpha/Llama3-Chinese-8B-Instruct", 0.01, 0.1, 1e-8, "cantonese",
                  2000),
    "indonesian": ("digo-prayudha/Llama-3.2-1B-Indonesian-lora", LLAMA, 0.01, 0.1, 1e-6, "indonesian", 2000),
    "malay": ("mesolitica/Malaysian-Llama-3.2-1B-Instruct", LLAMA, 0.1, 0.1, 1e-6, "malay", 2000),
}  # fmt: skip
SHARED = {"calibration_samples": 2000, "top_k": 128, "feature_map": "coupling", "epochs": 1, "train_batch_size": 1,
          "gradient_accumulation": 8, "block_size": 2048}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_are_the_papers(name):
    found = load_experiment(ROOT / f"scripts/experiments/{name}.yaml")
    keys = ("target_model", "source_model", "alpha", "train_alpha", "learning_rate", "data_subset", "sft_samples")
    assert tuple(found[key] for key in keys) == SETTINGS[name] and found["name"] == name
    assert {key: found[key] for key in SHARED} == SHARED


def settings(models: dict[str, Path], tmp_path: Path, **variables: str) -> dict[str, str]:
    """The script's environment: pico models, generated data, results in `r`."""
    environment = os.environ | {"MODELS_ROOT": str(tmp_path / "models"), "TRANSPORT_RESULTS_ROOT": str(tmp_path / "r")}
    environment |= {"TARGET_MODEL": str(models["target"]), "SOURCE_MODEL": str(models["source"])}
    environment |= {"WORKSPACE_ROOT": str(tmp_path), "BENCHMARK_DATA": str(tmp_path / "benchmarks"), "LIMIT": "10"}
    return environment | {"DATA_DIR": str(tmp_path / "data"), "MAX_SAMPLES": "24", "SFT_SAMPLES": "8", **variables}


def script(models: dict[str, Path], tmp_path: Path, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", "run_train_final.sh"], cwd=ROOT / "scripts", capture_output=True, text=True,
                          env=settings(models, tmp_path, **variables))  # fmt: skip


@pytest.fixture
def data(tmp_path):
    """Rows with the columns of the real data sets."""
    folder = tmp_path / "data"
    folder.mkdir()
    texts = sentences(240, 3)
    makers = {
        "thai": lambda q, a: {"text": a},
        "medical": lambda q, a: {"instruction": q, "input": "", "output": a},
        "indonesian": lambda q, a: {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]},
    }
    for name, make in makers.items():
        rows = [json.dumps(make(q, a), ensure_ascii=False) for q, a in zip(texts[::2], texts[1::2], strict=True)]
        (folder / f"{name}.jsonl").write_text("\n".join(rows), "utf-8")
    items = [{"premise": texts[n], "choice1": texts[n + 1], "choice2": texts[n + 2], "label": n % 2, "idx": n,
              "question": ("cause", "effect")[n // 2 % 2], "changed": False} for n in range(20)]  # fmt: skip
    for part in ("test", "val"):
        path = tmp_path / f"benchmarks/xcopa/id/{part}.id.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(json.dumps(item, ensure_ascii=False) for item in items), "utf-8")
    return folder


def test_tasks_run_and_a_failed_one_does_not_stop_the_others(models, data, tmp_path):
    done = script(models, tmp_path, TASKS="malay nothing indonesian")
    assert done.returncode == 1
    assert "failed: malay (exit code 2" in done.stderr and "failed: nothing (exit code 2" in done.stderr
    assert "malay.jsonl does not exist" in done.stderr
    arms = json.loads((tmp_path / "r/indonesian/results.json").read_text())["arms"]
    assert {"base", "fused", "no_hot", "fused_adapted"} <= arms.keys()
    fused = json.loads((tmp_path / "r/indonesian/fused/manifest.json").read_text())["inputs"]["settings"]
    assert fused["feature_map"] == "coupling" and fused["alpha"] == SETTINGS["indonesian"][2]
    collected = json.loads((tmp_path / "r/tables/indonesian.json").read_text())["runs"]["indonesian"]
    scores = collected["sets"]["indonesian"]["rows"]["xcopa_id"]
    assert set(scores["arms"]) == {"base", "fused", "no_hot", "fused_adapted"} and scores["n"] == 10
    assert {"arc_id", "belebele_ind_Latn", "truthfulqa_id_mc1"} <= collected["sets"]["indonesian"]["absent"].keys()
    table = (tmp_path / "r/tables/indonesian.md").read_text()
    assert "| mean | 38.43 | 39.18 | 39.30 | " in table and "first 10 items of each file" in table
    shutil.rmtree(tmp_path / "r/indonesian/adapted/hot")
    again = script(models, tmp_path, TASKS="indonesian", STEPS="train")
    assert again.returncode == 0 and again.stderr.count("seed0 is finished already") == 1
    ours = script(models, tmp_path, TASKS="thai", FEATURE_MAP="regression", STEPS="plans fuse")
    assert ours.returncode == 0
    made = json.loads((tmp_path / "r/thai-regression/fused/manifest.json").read_text())["inputs"]["settings"]
    assert (made["feature_map"], made["top_k"]) == ("regression", 0)


def test_a_killed_run_ends_with_the_same_tables(models, data, tmp_path):
    for subject in ("anatomy", "medical_genetics", "professional_medicine"):
        for split in ("test", "dev"):
            path = tmp_path / f"benchmarks/mmlu/{split}/{subject}_{split}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(f"which plan {n},one,two,three,four,{'ABCD'[n % 4]}\n" for n in range(8)))
    tables = []
    for name, deadly in (("whole", None), ("killed", "medical/adapted/no_hot/seed0/manifest.json")):
        results = tmp_path / name
        if deadly:
            running = subprocess.Popen(
                ["bash", "scripts/run_train_final.sh"], cwd=ROOT, start_new_session=True, stderr=subprocess.DEVNULL,
                env=settings(models, tmp_path, TASKS="medical", TRANSPORT_RESULTS_ROOT=str(results)),
            )  # fmt: skip
            while not (results / deadly).is_file():
                assert running.poll() is None
                time.sleep(0.05)
            os.killpg(running.pid, signal.SIGKILL)
            assert running.wait() == -signal.SIGKILL and not (results / "tables").exists()
        done = script(models, tmp_path, TASKS="medical", TRANSPORT_RESULTS_ROOT=str(results))
        assert done.returncode == 0, done.stderr
        tables.append({path.name: path.read_bytes() for path in (results / "tables").iterdir()})
    assert tables[0] == tables[1] and tables[0].keys() == {"medical.json", "medical.md", "all.md"}


def test_variants_are_started_by_one_variable(models, data, tmp_path):
    done = script(models, tmp_path, TASKS="thai", VARIANT="alpha", DRY_RUN="1", STEPS="fuse")
    listed = (ROOT / "scripts/experiments/variants.txt").read_text()
    suffixes = [line.split()[1] for line in listed.splitlines() if line.startswith("alpha ")]
    assert done.returncode == 0 and len(suffixes) == 7
    for suffix in suffixes:
        value = suffix.removeprefix("-alpha")
        assert f"--alpha {value} --hot-dir {tmp_path}/r/thai{suffix}/plans" in done.stdout


def test_examples_are_experiments():
    for path in (ROOT / "scripts/experiments/examples").glob("*.yaml"):
        found = load_experiment(path)
        assert found["name"] == path.stem and found["feature_map"] == "regression" and found["pooling"] == "token"


def test_dry_run_prints_settings_and_commands_and_runs_nothing(models, data, tmp_path):
    done = script(models, tmp_path, TASKS="thai", DRY_RUN="1")
    assert done.returncode == 0 and not (tmp_path / "r").exists()
    for line in ("learning_rate: 1.0e-7", "alpha: 0.01", "train_alpha: 0.01", "sft_samples: 8000"):
        assert f"    {line}\n" in done.stdout
    assert done.stdout.count("train_hot_residual_sft.py") == 2 and "texts; nothing is missing" in done.stdout
    assert "--target-model" in done.stdout and str(tmp_path / "r/thai/plans") in done.stdout


def test_the_script_is_short():
    text = (ROOT / "scripts/run_train_final.sh").read_text()
    assert len(text.splitlines()) < 120 and "set -euo pipefail" in text
