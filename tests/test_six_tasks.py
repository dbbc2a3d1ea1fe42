"""The paper's six tasks: their settings, and the script that runs them."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import ROOT, sentences

from core.command import load_experiment
from evaluation.tasks import STAND_INS, task_benchmarks

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


def roles(*pairs):
    return [{"role": role, "content": content} for role, content in pairs]


# Task -> a row with the columns of its data set, of a question and an answer.
COLUMNS = {
    "medical": lambda q, a: {"instruction": q, "input": "", "output": a},
    "thai": lambda q, a: {"text": a},
    "finance": lambda q, a: {"system": "cost", "user": q, "assistant": a},
    "cantonese": lambda q, a: {"instruction": q, "output": a},
    "indonesian": lambda q, a: {"messages": roles(("user", q), ("assistant", a))},
    "malay": lambda q, a: {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]},
}
# Task -> those of its benchmarks of which the generated files have items.
SCORED = {
    "medical": {"mmlu_anatomy"},
    "thai": {"mgsm_native_cot_th", "xcopa_th"},
    "finance": {"global_mmlu_full_en_business_ethics"},
    "cantonese": {"yue_mmlu"},
    "indonesian": {"xcopa_id"},
    "malay": {"global_mmlu_full_ms_anatomy", "global_mmlu_full_ms_business_ethics"},
}


@pytest.fixture(scope="module")
def environment(models, benchmark_data, tmp_path_factory):
    """The script's variables: pico models, generated rows with the columns of the real data sets, results nowhere."""
    folder = tmp_path_factory.mktemp("six")
    texts = sentences(240, 3)
    (folder / "data").mkdir()
    for name, row in COLUMNS.items():
        lines = [json.dumps(row(q, a), ensure_ascii=False) for q, a in zip(texts[::2], texts[1::2], strict=True)]
        (folder / f"data/{name}.jsonl").write_text("\n".join(lines), "utf-8")
    cleared = {name: value for name, value in os.environ.items() if not name.endswith(("_REPO", "_ROOT"))}
    return cleared | {
        "MODELS_ROOT": str(folder / "models"), "TARGET_MODEL": str(models["target"]), "LIMIT": "3",
        "SOURCE_MODEL": str(models["source"]), "WORKSPACE_ROOT": str(folder), "BENCHMARK_DATA": str(benchmark_data),
        "DATA_DIR": str(folder / "data"), "MAX_SAMPLES": "24", "SFT_SAMPLES": "8",
    }  # fmt: skip


def script(environment: dict[str, str], results: Path, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", "run_train_final.sh"], cwd=ROOT / "scripts", capture_output=True, text=True,
                          env=environment | {"TRANSPORT_RESULTS_ROOT": str(results)} | variables)  # fmt: skip


@pytest.fixture(scope="module")
def whole(environment, tmp_path_factory):
    """The results of all six tasks, as one command makes them."""
    results = tmp_path_factory.mktemp("whole")
    done = script(environment, results)
    assert done.returncode == 0, done.stderr
    return results


@pytest.mark.parametrize("name", COLUMNS)
def test_a_task_ends_with_its_table(whole, name):
    manifest = json.loads((whole / name / "fused/manifest.json").read_text())["inputs"]["settings"]
    assert (manifest["feature_map"], manifest["alpha"], manifest["top_k"]) == ("coupling", SETTINGS[name][2], 128)
    for scenario in ("hot", "no_hot"):
        used = json.loads((whole / name / f"adapted/{scenario}/seed0/manifest.json").read_text())
        assert used["status"] == "complete"
    arms = json.loads((whole / name / "results.json").read_text())["arms"]
    assert arms.keys() >= {"base", "damped", "damped_mean", "permuted", "wrong_layer", "fused", "no_hot",
                           "fused_adapted"}  # fmt: skip
    collected = json.loads((whole / f"tables/{name}.json").read_text())["runs"][name]["sets"][name]
    assert collected["rows"].keys() == SCORED[name]
    for row in collected["rows"].values():
        assert row["arms"].keys() == {"base", "fused", "no_hot", "fused_adapted"} and row["n"] >= 3
    wanted = set(task_benchmarks(name)) | set(STAND_INS["malay_mmlu"] if name == "malay" else ())
    assert collected["absent"].keys() == wanted - SCORED[name]
    table = (whole / f"tables/{name}.md").read_text()
    for row, figures in json.loads((ROOT / "evaluation/paper_results.json").read_text())[name]["rows"].items():
        found = next(line for line in table.splitlines() if line.lower().startswith(f"| {row.lower()} |"))
        assert " | ".join(f"{figure:.2f}" for figure in figures) in found
    assert "first 3 items of each file" in table and table in (whole / "tables/all.md").read_text()


def test_a_run_killed_anywhere_ends_with_the_same_tables(environment, whole, tmp_path):
    deadly = ("plans/manifest.json", "adapted/no_hot/seed0/manifest.json", "benchmarks/medical/base/task.json")
    results = tmp_path / "killed"
    for path in deadly:
        running = subprocess.Popen(
            ["bash", "scripts/run_train_final.sh"], cwd=ROOT, start_new_session=True, stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, env=environment | {"TASKS": "medical", "TRANSPORT_RESULTS_ROOT": str(results)},
        )  # fmt: skip
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


def test_a_failed_task_does_not_stop_the_others(environment, tmp_path):
    """Nor hide their tables."""
    done = script(environment, tmp_path, TASKS="nothing thai", STEPS="plans fuse eval", FEATURE_MAP="regression")
    assert done.returncode == 1 and done.stderr.count("failed: ") == 1
    assert "failed: nothing (exit code 2" in done.stderr
    assert "there is no scripts/experiments/nothing.yaml" in done.stderr
    assert "| fused |" in (tmp_path / "tables/thai.md").read_text()
    lost = script(environment, tmp_path, TASKS="thai", STEPS="plans", DATA_DIR=str(tmp_path / "tables"))
    assert lost.returncode == 1 and "thai.jsonl does not exist" in lost.stderr
    made = json.loads((tmp_path / "thai-regression/fused/manifest.json").read_text())["inputs"]["settings"]
    assert (made["feature_map"], made["top_k"], made["alpha"]) == ("regression", 0, 0.1)


def test_wrong_variables_are_told_before_anything_runs(environment, tmp_path):
    for variables, told in (({"STEPS": "plans tables"}, "STEPS is tables; expected one of: plans fuse train eval"),
                            ({"FEATURE_MAP": "ot"}, "FEATURE_MAP is ot; expected one of: coupling"),
                            ({"NUM_GPUS": "two"}, "NUM_GPUS is two; expected a number"),
                            ({"VARIANT": "size"}, "VARIANT is size; expected one of: source_size"),
                            ({"LM_EVAL_REPO": str(tmp_path)}, "is no clone of lm-evaluation-harness")):  # fmt: skip
        done = script(environment, tmp_path / "results", **variables)
        assert done.returncode == 2 and told in done.stderr and not (tmp_path / "results").exists()


def test_variants_are_started_by_one_variable(environment, tmp_path):
    done = script(environment, tmp_path, TASKS="thai", VARIANT="alpha", DRY_RUN="1", STEPS="fuse")
    listed = (ROOT / "scripts/experiments/variants.txt").read_text()
    suffixes = [line.split()[1] for line in listed.splitlines() if line.startswith("alpha ")]
    assert done.returncode == 0 and len(suffixes) == 7
    for suffix in suffixes:
        value = suffix.removeprefix("-alpha")  # all on the same plans
        assert f"--alpha {value} --hot-dir {tmp_path}/thai/plans --output-dir {tmp_path}/thai{suffix}/" in done.stdout


def test_examples_are_experiments():
    for path in (ROOT / "scripts/experiments/examples").glob("*.yaml"):
        found = load_experiment(path)
        assert found["name"] == path.stem and found["feature_map"] == "regression" and found["pooling"] == "token"


def test_dry_run_prints_the_papers_settings_of_every_task(environment, tmp_path):
    own = {name: value for name, value in environment.items() if not name.endswith(("_MODEL", "_SAMPLES"))}
    done = script(own, tmp_path / "r", DRY_RUN="1", STEPS="fuse train")
    assert done.returncode == 0 and not (tmp_path / "r").exists()
    parts = done.stdout.split("== ")[1:]
    assert [part.partition(":")[0] for part in parts] == "medical thai finance cantonese indonesian malay".split()
    for part in parts:
        name, _, rest = part.partition(":")
        shown = dict(line.strip().split(": ", 1) for line in rest.splitlines() if re.match(r"    \w+: ", line))
        target, source, alpha, train_alpha, rate, data, rows = SETTINGS[name]
        for key, value in {"target_model": target, "source_model": source, "data_subset": data,
                           "feature_map": "coupling"}.items():  # fmt: skip
            assert shown[key] == value
        numbers = {"alpha": alpha, "train_alpha": train_alpha, "learning_rate": rate, "sft_samples": rows, "epochs": 1,
                   "calibration_samples": 2000, "top_k": 128, "train_batch_size": 1, "gradient_accumulation": 8,
                   "block_size": 2048}  # fmt: skip
        assert {key: float(shown[key]) for key in numbers} == numbers
        commands = [line for line in rest.splitlines() if line.startswith("  python ")]
        assert len(commands) == 3 and "--feature-map coupling" in commands[0]
        for word in ("--alpha", "--train-alpha", "--sft-samples", "--target-model"):  # nothing overrides the file
            assert word not in "".join(commands)


def test_dry_run_goes_on_after_what_is_missing_and_takes_paths_from_where_it_is_started(environment, tmp_path):
    (tmp_path / "mine").mkdir()
    own = environment | {"DRY_RUN": "1", "TASKS": "thai", "TARGET_MODEL": "no/model", "DATA_DIR": "mine",
                         "BENCHMARK_DATA": "typo", "TRANSPORT_RESULTS_ROOT": "r"}  # fmt: skip
    done = subprocess.run(["bash", str(ROOT / "scripts/run_train_final.sh")], cwd=tmp_path, capture_output=True,
                          text=True, env=own)  # fmt: skip
    assert done.returncode == 1 and f"{tmp_path}/typo does not exist" in done.stderr
    assert "no/model is neither a folder" in done.stderr  # a model that is no path is an id
    assert done.stdout.count("\n  python ") == 10 and f"--data-file {tmp_path}/mine/thai.jsonl" in done.stdout


def test_dry_run_prints_settings_and_commands_and_runs_nothing(environment, benchmark_data, tmp_path):
    done = script(environment, tmp_path / "r", TASKS="thai", DRY_RUN="1", NUM_GPUS="2")
    assert done.returncode == 0 and not (tmp_path / "r").exists()
    for line in ("learning_rate: 1.0e-7", "alpha: 0.01", "train_alpha: 0.01", "sft_samples: 8000"):
        assert f"    {line}\n" in done.stdout
    assert done.stdout.count("train_hot_residual_sft.py") == 2 and "texts; nothing is missing" in done.stdout
    assert "--target-model" in done.stdout and str(tmp_path / "r/thai/plans") in done.stdout
    launched = [line.split()[:5] for line in done.stdout.splitlines() if line.endswith("--device cuda")]
    assert [words[0] for words in launched] == ["accelerate", "python", "accelerate", "accelerate", *["python"] * 5]
    assert launched[0] == ["accelerate", "launch", "--num_processes", "2", "run_activs_and_hot.py"]
    assert f"xcopa_th: {benchmark_data}/xcopa/th/test.th.jsonl, " in done.stdout
    assert "mmlu_prox_lite_th_other: the hub, or its cache\n" in done.stdout


def test_dry_run_reads_the_benchmark_files(environment, tmp_path):
    (tmp_path / "xcopa/th").mkdir(parents=True)
    (tmp_path / "xcopa/th/test.th.jsonl").write_text("{")
    done = script(environment, tmp_path / "r", TASKS="thai", DRY_RUN="1", STEPS="eval", BENCHMARK_DATA=str(tmp_path))
    assert done.returncode == 1 and "val.th.jsonl is missing" in done.stdout
    (tmp_path / "xcopa/th/val.th.jsonl").write_text("{")
    done = script(environment, tmp_path / "r", TASKS="thai", DRY_RUN="1", STEPS="eval", BENCHMARK_DATA=str(tmp_path))
    assert done.returncode == 1 and "test.th.jsonl, line 1 is not valid JSON" in done.stdout
    assert "files of xcopa_th are damaged" in done.stderr


def test_the_script_is_short():
    text = (ROOT / "scripts/run_train_final.sh").read_text()
    assert len(text.splitlines()) < 120 and "set -euo pipefail" in text
