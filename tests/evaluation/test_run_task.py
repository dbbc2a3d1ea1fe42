"""All benchmarks of a task for one model, through the command: stand-ins for absent benchmarks, resuming, dry runs."""

import json
import os
import shutil

import pytest
from conftest import run_main
from malay_rows import rows, write
from safetensors.torch import load_file, save_file

from core.errors import UserError
from core.files import LOCK, digest_of
from core.models.checkpoints import open_checkpoint
from core.runs.command_line import load_experiment
from evaluation import run_task
from evaluation.benchmarks.registry import GENERAL, STAND_INS, task_benchmarks
from evaluation.evaluated_model import EvaluatedModel
from evaluation.runner import Scoring


@pytest.fixture
def benchmarks(benchmark_data, tmp_path, monkeypatch):
    """A copy of the generated benchmark files; no environment variable points to others."""
    for variable in ("MALAY_REPO", "YUE_BENCHMARK_ROOT", "BENCHMARK_DATA"):
        monkeypatch.delenv(variable, raising=False)
    return shutil.copytree(benchmark_data, tmp_path / "benchmarks")


def run(models, benchmarks, out, task, *flags):
    run_main(
        run_task, "--model", models["target"], "--task", task, "--output_dir", out, "--data_dir", benchmarks, *flags
    )
    return json.loads((out / "task.json").read_text())["benchmarks"]


def test_others_stand_in_for_malay_mmlu_until_its_files_are_present(models, benchmarks, tmp_path, capsys, caplog):
    found = run(models, benchmarks, tmp_path / "out", "malay", "--limit", 4)
    printed = capsys.readouterr().out
    assert "MalayMMLU needs a clone of its repository" in found["malay_mmlu"]["absent"]
    scored = [name for name in STAND_INS["malay_mmlu"] if "file" in found[name]]
    assert scored == ["global_mmlu_full_ms_anatomy", "global_mmlu_full_ms_business_ethics"]  # only these have files
    assert "put belebele/zsm_Latn.jsonl below BENCHMARK_DATA" in found["belebele_zsm_Latn"]["absent"]
    assert all(found[name]["stands_in_for"] == "malay_mmlu" for name in STAND_INS["malay_mmlu"])
    assert printed.count("(in place of malay_mmlu)") == len(scored) and "malay_mmlu        " in printed
    scores = {name: (tmp_path / "out" / found[name]["file"]).read_bytes() for name in scored}
    assert all(json.loads(text)["metrics"]["acc"]["n"] == 4 for text in scores.values())
    caplog.clear()
    caplog.set_level("INFO")
    run(models, benchmarks, tmp_path / "out", "malay", "--limit", 4)
    assert caplog.text.count("is finished already") == len(scored)
    assert {name: (tmp_path / "out" / found[name]["file"]).read_bytes() for name in scored} == scores
    (benchmarks / "malay_mmlu").mkdir()
    write(benchmarks / "malay_mmlu", *rows(8))
    assert run(models, benchmarks, tmp_path / "out", "malay") == {"malay_mmlu": {"file": "malay_mmlu.json"}}


def test_cantonese_answers_are_generated_and_scored(models, benchmarks, tmp_path, capsys):
    found = run(models, benchmarks, tmp_path / "out", "cantonese", "--limit", 2)
    assert found == {"yue_mmlu": {"file": "yue_mmlu.json"}} and "yue_mmlu" in capsys.readouterr().out
    assert json.loads((tmp_path / "out/yue_mmlu.json").read_text())["metrics"]["acc"]["n"] == 4
    assert len(list((tmp_path / "out/predictions").glob("*/cmmlu-yue-*-0shot.json"))) == 2


def test_nothing_scored_is_a_failure(models, benchmarks, tmp_path, fails):
    flags = ("--model", models["target"], "--task", "cantonese", "--output-dir", tmp_path / "none")
    assert "no benchmark of cantonese was scored" in fails(run_task, *flags, "--data-dir", tmp_path)
    found = json.loads((tmp_path / "none/task.json").read_text())["benchmarks"]
    assert found.keys() == {"yue_mmlu"} and "YUE_BENCHMARK_ROOT" in found["yue_mmlu"]["absent"]


def test_a_mistyped_folder_is_an_error_and_leaves_nothing_behind(models, tmp_path, fails):
    flags = ("--model", models["target"], "--output-dir", tmp_path / "none", "--data-dir", tmp_path / "typo")
    for task in ("malay", "cantonese", "general"):
        assert "typo does not exist" in fails(run_task, *flags, "--task", task)
    assert "tokens_per_batch is 0" in fails(run_task, *flags[:-2], "--task", "malay", "--tokens-per-batch", 0)
    assert not (tmp_path / "none").exists()


def test_what_an_answer_depends_on_is_in_the_identity(models, tmp_path):
    folder = shutil.copytree(models["target"], tmp_path / "m")

    def identity():
        return EvaluatedModel(open_checkpoint(str(folder))).identity

    seen = [identity()]
    (folder / "generation_config.json").write_text('{"eos_token_id": 3}')
    seen.append(identity())
    weights = load_file(folder / "model.safetensors")  # overwritten under the same name
    save_file({name: tensor + 1e-3 for name, tensor in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    seen.append(identity())
    (folder / "manifest.json").write_text('{"fingerprint": "of ours"}')
    seen.append(identity())
    assert len({digest_of(one) for one in seen}) == 4
    for path in folder.iterdir():
        os.utime(path, ns=(1, 1))  # as a copy of the files has
    assert identity() == seen[-1]


def test_dry_run_says_where_the_items_are(benchmarks, tmp_path, capsys):
    flags = ("--model", "nowhere", "--output-dir", tmp_path / "none", "--data-dir", benchmarks, "--dry-run", "--task")
    run_main(run_task, *flags, "malay")
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == f"scores of nowhere -> {tmp_path}/none"
    assert lines[0].startswith("malay_mmlu: absent: ") and lines[1].startswith("belebele_zsm_Latn: ")
    assert f"global_mmlu_full_ms_anatomy: {benchmarks}/global_mmlu/ms/global_mmlu_anatomy_ms_test.jsonl, " in lines[2]
    run_main(run_task, *flags, "cantonese")
    assert capsys.readouterr().out.splitlines()[1:] == [f"yue_mmlu: {benchmarks}/yue_benchmark/Yue-MMLU"]
    (benchmarks / "yue_benchmark/Yue-MMLU/arts.json").write_text("[{}]")
    with pytest.raises(UserError, match="the files of yue_mmlu are damaged"):
        run_main(run_task, *flags, "cantonese")
    (benchmarks / "xcopa/th/val.th.jsonl").write_text("{")
    (benchmarks / "mgsm/exemplars_th_en.json").unlink()
    with pytest.raises(UserError, match="the files of mgsm_native_cot_th, xcopa_th are damaged"):
        run_main(run_task, *flags, "thai")
    with pytest.raises(UserError, match="no benchmark of cantonese can be scored"):
        run_main(run_task, *flags[:4], "--data-dir", tmp_path, "--dry-run", "--task", "cantonese")
    printed = capsys.readouterr().out
    assert "damaged: " in printed and "arts.json, item 0: expected strings" in printed
    assert "val.th.jsonl, line 1 is not valid JSON" in printed and "exemplars_th_en.json is missing" in printed
    assert not (tmp_path / "none").exists()


def test_damaged_files_are_an_error_and_not_absent(models, benchmarks, tmp_path, fails):
    (benchmarks / "malay_mmlu").mkdir()
    write(benchmarks / "malay_mmlu", {"prompt": "p"})
    flags = ("--model", models["target"], "--output-dir", tmp_path / "out", "--data-dir", benchmarks, "--task")
    assert "lacks category, key, options" in fails(run_task, *flags, "malay")
    assert "task 'demo'; expected general or an experiment with benchmarks: cantonese, finance" in fails(
        run_task, *flags, "demo"
    )


def test_an_empty_list_of_benchmarks_is_nothing_to_score(models, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("evaluation.benchmarks.registry.EXPERIMENTS", tmp_path)
    (tmp_path / "mine.yaml").write_text(f"{{target_model: {models['target']}, benchmarks: []}}")
    run_main(run_task, "--config", tmp_path / "mine.yaml")
    assert capsys.readouterr().out == "mine has an empty list of benchmarks; nothing is scored\n"


def test_tasks_have_the_papers_benchmarks():
    assert task_benchmarks("indonesian") == (
        "arc_id",
        "belebele_ind_Latn",
        "truthfulqa_id_mc1",
        "truthfulqa_id_mc2",
        "xcopa_id",
    )
    assert task_benchmarks("thai") == ("mmlu_prox_lite_th_other", "mgsm_native_cot_th", "xcopa_th")
    assert (
        task_benchmarks("finance")
        == task_benchmarks("finance_paper")
        == tuple(
            f"global_mmlu_full_en_{subject}"
            for subject in ("business_ethics", "high_school_microeconomics", "professional_accounting")
        )
    )
    assert task_benchmarks("medical") == ("mmlu_anatomy", "mmlu_medical_genetics", "mmlu_professional_medicine")
    assert task_benchmarks("malay") == ("malay_mmlu",) and task_benchmarks("cantonese") == ("yue_mmlu",)
    assert task_benchmarks("general") == GENERAL == ("arc_easy", "commonsense_qa", "piqa", "social_iqa", "winogrande")


def test_benchmarks_are_a_list_of_names(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("benchmarks: arc_id")
    with pytest.raises(UserError, match="benchmarks is 'arc_id'; expected a list of names"):
        load_experiment(path)
    path.write_text("benchmarks: [arc_id, xcopa_id]")
    assert load_experiment(path)["benchmarks"] == ("arc_id", "xcopa_id")


@pytest.fixture
def run_of_two(models, benchmarks, tmp_path, monkeypatch):
    """The experiment file of a run whose target and fused model are there, with one item per benchmark file."""
    monkeypatch.setenv("TRANSPORT_RESULTS_ROOT", str(tmp_path / "results"))
    shutil.copytree(models["other"], tmp_path / "results/two/fused")
    path = tmp_path / "two.yaml"
    path.write_text(
        f"target_model: {models['target']}\ntarget_revision: abc\nlimit: 1\nbenchmarks: [xcopa_id]\n"
        f"benchmark_data: {benchmarks}\n"
    )
    return path


def test_the_models_of_a_run_are_scored_one_after_the_other_and_let_go(run_of_two, models, tmp_path, monkeypatch):
    """The folder of a model that was scored is free for others while the next one is scored; a base at its revision."""
    scored, from_flags = [], Scoring.from_flags.__func__

    def record(cls, given):
        for folder in scored:
            assert not (folder / LOCK).exists()
        scored.append(given["output_dir"])
        assert given["revision"] == ("abc" if given["model"] == str(models["target"]) else None)
        return from_flags(cls, {**given, "revision": None})

    monkeypatch.setattr(Scoring, "from_flags", classmethod(record))
    run_main(run_task, "--config", run_of_two)
    assert scored == [tmp_path / f"results/two/benchmarks/two/{arm}" for arm in ("base", "fused")]
    assert all(json.loads((folder / "task.json").read_text())["limit"] == 1 for folder in scored)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("prompt: foo", "prompt is 'foo'; expected one of chat, plain"),
        ("dtype: weird", "dtype is 'weird'; expected one of auto, float32"),
        ("llama_name: bar", "llama_name is 'bar'; expected one of yes, no, auto"),
        ("limit: 0", "limit is 0; expected at least 1"),
    ],
)
def test_wrong_values_in_the_file_of_a_run_are_refused(run_of_two, fails, line, message):
    run_of_two.write_text(run_of_two.read_text().replace("limit: 1\n", "") + line)
    assert message in fails(run_task, "--config", run_of_two, "--dry-run")


def test_an_output_folder_is_of_one_model(run_of_two, tmp_path, fails):
    line = fails(run_task, "--config", run_of_two, "--output-dir", tmp_path / "x")
    assert "--output-dir is the folder of one model" in line and not (tmp_path / "x").exists()
