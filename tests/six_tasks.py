"""What the tests of the six tasks share: the paper's settings, generated rows, the script, and what a task leaves."""

import json
import os
import subprocess
from pathlib import Path

from conftest import ROOT, sentences

from evaluation.benchmarks.registry import STAND_INS, task_benchmarks

LLAMA = "unsloth/Llama-3.1-8B-Instruct"
# Target, source, fuse alpha, train alpha, learning rate, data, fine-tuning rows: the paper's table of settings.
SETTINGS = {
    "medical": ("PathFinderKR/Llama-3-1B-Medical-Instruct", LLAMA, 0.03, 0.005, 3e-7, "medical", 2000),
    "thai": ("scb10x/llama3.2-typhoon2-1b-instruct", LLAMA, 0.01, 0.01, 1e-7, "thai", 8000),
    "finance": ("unsloth/Llama-3.2-1B-Instruct", LLAMA, 0.03, 0.03, 1e-6, "finance", 2000),
    "finance_paper": ("TEL-LLM/LLaMA-3.2-1B-TEL-A-finance", "Qwen/Qwen2.5-7B", 0.03, 0.03, 1e-6, "finance", 2000),
    "cantonese": (
        "unsloth/Llama-3.2-1B-Instruct",
        "FlagAlpha/Llama3-Chinese-8B-Instruct",
        0.01,
        0.1,
        1e-8,
        "cantonese",
        2000,
    ),
    "indonesian": ("digo-prayudha/Llama-3.2-1B-Indonesian-lora", LLAMA, 0.01, 0.1, 1e-6, "indonesian", 2000),
    "malay": ("mesolitica/Malaysian-Llama-3.2-1B-Instruct", LLAMA, 0.1, 0.1, 1e-6, "malay", 2000),
}


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


def make_environment(models: dict[str, Path], benchmark_data: Path, folder: Path, python: Path) -> dict[str, str]:
    """The script's variables: generated rows with the columns of the real data sets, and the pico models under the
    names of the paper's.

    Args:
        python: folder of the `python` that runs the commands.
    """
    texts = sentences(240, 3)
    (folder / "data").mkdir()
    for name, row in COLUMNS.items():
        lines = [json.dumps(row(q, a), ensure_ascii=False) for q, a in zip(texts[::2], texts[1::2], strict=True)]
        (folder / f"data/{name}.jsonl").write_text("\n".join(lines), "utf-8")
    for target, source, *_ in SETTINGS.values():
        for name, model in ((target, models["target"]), (source, models["source"])):
            (folder / "models" / name).parent.mkdir(parents=True, exist_ok=True)
            if not (folder / "models" / name).exists():
                (folder / "models" / name).symlink_to(model)
    cleared = {name: value for name, value in os.environ.items() if not name.endswith(("_REPO", "_ROOT"))}
    return cleared | {
        "PATH": f"{python}:{os.environ['PATH']}",
        "WORKSPACE_ROOT": str(folder),
        "BENCHMARK_DATA": str(benchmark_data),
        "DATA_DIR": str(folder / "data"),
        "MAX_SAMPLES": "24",
        "SFT_SAMPLES": "8",
        "LIMIT": "3",
    }


def script(
    environment: dict[str, str], results: Path, *flags: str, name: str = "run_train_final", **variables: str
) -> subprocess.CompletedProcess:
    """Run one of the scripts, from its own folder."""
    return subprocess.run(
        ["bash", f"{name}.sh", *flags],
        cwd=ROOT / "scripts",
        capture_output=True,
        text=True,
        env=environment | {"TRANSPORT_RESULTS_ROOT": str(results)} | variables,
    )


def run_tasks(environment: dict[str, str], results: Path, tasks: tuple[str, ...]) -> Path:
    """The results of some tasks, as one command makes them."""
    done = script(environment, results, TASKS=" ".join(tasks))
    assert done.returncode == 0, done.stderr
    return results


def check_task(whole: Path, name: str) -> None:
    """All that one task of a run leaves behind."""
    manifest = json.loads((whole / name / "fused/manifest.json").read_text())["inputs"]["settings"]
    assert (manifest["feature_map"], manifest["alpha"], manifest["top_k"]) == ("coupling", SETTINGS[name][2], 128)
    for scenario in ("hot", "no_hot"):
        used = json.loads((whole / name / f"adapted/{scenario}/seed0/manifest.json").read_text())
        assert used["status"] == "complete"
    arms = json.loads((whole / name / "results.json").read_text())["arms"]
    assert arms.keys() >= {
        "base",
        "damped",
        "damped_mean",
        "permuted",
        "wrong_layer",
        "fused",
        "no_hot",
        "fused_adapted",
    }
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
