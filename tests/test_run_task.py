"""All benchmarks of a task for one model, through the command: what runs in place of what is absent, resuming."""

import json
import shutil

import pytest
from conftest import run_main
from test_lm_eval import data as harness_data  # noqa: F401  a fixture
from test_malay_mmlu import rows, write

from core.command import load_experiment
from core.runs import UserError
from evaluation import run_task
from evaluation.tasks import GENERAL, STAND_INS, task_benchmarks


@pytest.fixture
def benchmarks(harness_data, tmp_path, monkeypatch):  # noqa: F811
    """A copy of the generated benchmark files, and no variable that points elsewhere."""
    for variable in ("MALAY_REPO", "YUE_BENCHMARK_ROOT", "BENCHMARK_DATA"):
        monkeypatch.delenv(variable, raising=False)
    return shutil.copytree(harness_data, tmp_path / "benchmarks")


def run(models, benchmarks, out, task, *flags):
    run_main(
        run_task, "--model", models["target"], "--task", task, "--output_dir", out, "--data_dir", benchmarks, *flags
    )
    return json.loads((out / "task.json").read_text())["benchmarks"]


def test_malay_stands_in_until_its_own_files_are_there(models, benchmarks, tmp_path, capsys, caplog):
    found = run(models, benchmarks, tmp_path / "out", "malay", "--limit", 4)
    told = capsys.readouterr().out
    assert "MalayMMLU needs a clone of its repository" in found["malay_mmlu"]["absent"]
    there = [name for name in STAND_INS["malay_mmlu"] if "file" in found[name]]
    assert there == ["global_mmlu_full_ms_anatomy", "global_mmlu_full_ms_business_ethics"]  # what was generated
    assert "put belebele/zsm_Latn.jsonl below --data-dir" in found["belebele_zsm_Latn"]["absent"]
    assert all(found[name]["stands_in_for"] == "malay_mmlu" for name in STAND_INS["malay_mmlu"])
    assert told.count("(in place of malay_mmlu)") == len(there) and "malay_mmlu        " in told
    scores = {name: (tmp_path / "out" / found[name]["file"]).read_bytes() for name in there}
    assert all(json.loads(text)["metrics"]["acc"]["n"] == 4 for text in scores.values())
    caplog.clear()
    caplog.set_level("INFO")
    run(models, benchmarks, tmp_path / "out", "malay", "--limit", 4)
    assert caplog.text.count("is finished already") == len(there)
    assert {name: (tmp_path / "out" / found[name]["file"]).read_bytes() for name in there} == scores
    (benchmarks / "malay_mmlu").mkdir()
    write(benchmarks / "malay_mmlu", *rows(8))
    assert run(models, benchmarks, tmp_path / "out", "malay") == {"malay_mmlu": {"file": "malay_mmlu.json"}}


def test_cantonese_answers_are_generated_and_scored(models, benchmarks, tmp_path, capsys):
    found = run(models, benchmarks, tmp_path / "out", "cantonese", "--limit", 2)
    assert found == {"yue_mmlu": {"file": "yue_mmlu.json"}} and "yue_mmlu" in capsys.readouterr().out
    assert json.loads((tmp_path / "out/yue_mmlu.json").read_text())["metrics"]["acc"]["n"] == 4
    assert len(list((tmp_path / "out/predictions").glob("*/cmmlu-yue-*-0shot.json"))) == 2
    found = run(models, tmp_path, tmp_path / "none", "cantonese")
    assert "YUE_BENCHMARK_ROOT" in found["yue_mmlu"]["absent"]


def test_damaged_files_are_no_absent_ones(models, benchmarks, tmp_path, fails):
    (benchmarks / "malay_mmlu").mkdir()
    write(benchmarks / "malay_mmlu", {"prompt": "p"})
    flags = ("--model", models["target"], "--output-dir", tmp_path / "out", "--data-dir", benchmarks, "--task")
    assert "lacks category, key, options" in fails(run_task, *flags, "malay")
    assert "task 'demo'; expected general or an experiment with benchmarks: cantonese, finance" in fails(
        run_task, *flags, "demo")  # fmt: skip


def test_tasks_have_the_papers_benchmarks():
    assert task_benchmarks("indonesian") == (
        "arc_id", "belebele_ind_Latn", "truthfulqa_id_mc1", "truthfulqa_id_mc2", "xcopa_id")  # fmt: skip
    assert task_benchmarks("thai") == ("mmlu_prox_lite_th_other", "mgsm_native_cot_th", "xcopa_th")
    assert task_benchmarks("finance") == task_benchmarks("finance_paper") == tuple(
        f"global_mmlu_full_en_{subject}"
        for subject in ("business_ethics", "high_school_microeconomics", "professional_accounting"))  # fmt: skip
    assert task_benchmarks("medical") == ("mmlu_anatomy", "mmlu_medical_genetics", "mmlu_professional_medicine")
    assert task_benchmarks("malay") == ("malay_mmlu",) and task_benchmarks("cantonese") == ("yue_mmlu",)
    assert task_benchmarks("general") == GENERAL == (
        "arc_easy", "commonsense_qa", "piqa", "social_iqa", "winogrande")  # fmt: skip


def test_benchmarks_are_a_list_of_names(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("benchmarks: arc_id")
    with pytest.raises(UserError, match="benchmarks is 'arc_id'; expected a list of names"):
        load_experiment(path)
    path.write_text("benchmarks: [arc_id, xcopa_id]")
    assert load_experiment(path)["benchmarks"] == ("arc_id", "xcopa_id")
