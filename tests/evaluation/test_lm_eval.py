"""Tasks of lm-evaluation-harness on generated files in the layout of the original releases, with pico models."""

import importlib.metadata
import json
import socket
import subprocess
import time

import pytest
import torch
from conftest import SHARED_DATA, run_main

from core.models.checkpoints import open_checkpoint
from evaluation import run_lm_eval
from evaluation.benchmarks import harness, harness_scores
from evaluation.benchmarks.harness import load_local
from evaluation.benchmarks.harness_model import evaluate, language_model
from evaluation.benchmarks.harness_scores import harness_version, score_tasks
from evaluation.benchmarks.local_tasks import local_tasks
from evaluation.benchmarks.row_files import json_lines
from evaluation.benchmarks.yue_mmlu import NAMES
from evaluation.evaluated_model import EvaluatedModel
from evaluation.runner import Scoring
from scripts import check_lm_eval_agreement as check
from scripts import local_hub

REAL = SHARED_DATA / "eval"


@pytest.fixture
def data(benchmark_data):
    return benchmark_data


@pytest.fixture(scope="module")
def pico(models):
    return EvaluatedModel(open_checkpoint(str(models["target"]), None, False, "cpu"), "float32")


def task_of(name, data):
    return load_local(local_tasks()[name], local_tasks()[name].find(data))


def requests(name, data, first=None):
    task = task_of(name, data)
    places = list(range(len(task.eval_docs)))[:first]
    return [arguments for item in check.requests(task, places, 0) for arguments in item[2:]]


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_tasks_are_the_harness_s_own(data, models, capsys, monkeypatch):
    """Requests, answers and scores agree with the harness's own definitions, whose rows other code reads."""
    monkeypatch.setattr(
        "lm_eval.evaluator.add_env_info", lambda results: None
    )  # it runs pip, which takes a second per task
    names = [
        "belebele_tha_Thai",
        "xcopa_th",
        "mmlu_anatomy",
        "global_mmlu_full_en_anatomy",
        "global_mmlu_full_ms_business_ethics",
        "arc_easy",
        "piqa",
        "winogrande",
        "commonsense_qa",
        "medqa_4options",
        "mgsm_native_cot_th",
    ]
    run_main(
        check,
        "--model",
        models["target"],
        "--data-dir",
        data,
        "--tasks",
        ",".join(names),
        "--items",
        4,
        "--max-gen-toks",
        4,
    )
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == names
    assert all(line.endswith("differing requests 0, answers 0, scores 0") for line in lines)


def test_a_difference_is_found(data, models, capsys, monkeypatch):
    monkeypatch.setitem(
        local_hub.HUB,
        "cais/mmlu",
        lambda *given: {
            split: rows.map(lambda row: {"choices": row["choices"][::-1]})
            for split, rows in local_hub.mmlu(*given).items()
        },
    )
    with pytest.raises(SystemExit) as stop:
        run_main(check, "--model", models["target"], "--data-dir", data, "--tasks", "mmlu_anatomy", "--requests-only")
    assert stop.value.code == 1 and "differing requests 6" in capsys.readouterr().out


@pytest.mark.skipif(not REAL.is_dir(), reason="the shared benchmark files are not here")
def test_real_files_give_the_harness_s_requests(models, capsys):
    names = "xcopa_id,mmlu_professional_accounting,global_mmlu_full_id_professional_accounting,mgsm_direct_th,piqa"
    run_main(check, "--model", models["target"], "--data-dir", REAL, "--tasks", names, "--requests-only", "--items", 40)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and all("40 items of " in line and "differing requests 0" in line for line in lines)


@pytest.mark.skipif(not REAL.is_dir(), reason="the shared benchmark files are not here")
def test_global_mmlu_has_the_option_order_of_mmlu():
    """Options that are numbers are the same in all languages, so that a wrong order would show."""

    def numbers(name):
        docs = task_of(name, REAL).eval_docs
        return [tuple("".join(filter(str.isdigit, doc[f"option_{letter}"])) for letter in "abcd") for doc in docs]

    english, malay = (numbers(f"global_mmlu_full_{language}_professional_accounting") for language in ("en", "ms"))
    telling = [(a, b) for a, b in zip(english, malay, strict=True) if len(set(a)) == 4 and sorted(a) == sorted(b)]
    assert len(telling) > 100 and all(a == b for a, b in telling)


@pytest.mark.skipif(not REAL.is_dir(), reason="the shared benchmark files are not here")
def test_yue_mmlu_asks_in_the_benchmark_s_own_words():
    for subject, topic in NAMES.items():
        published = read(REAL / f"yue_benchmark_predictions/ChatGPT/cmmlu-yue-{subject}-0shot.json")["0"]
        asked = requests(f"yue_mmlu_likelihood_{subject}", REAL, 1)[0][0]
        assert topic in asked
        # As published, three subjects say that no reason is wanted four more times.
        reason = asked.partition("\n")[0][-8:-1]
        words = published["origin_prompt"][0]["prompt"].replace(reason * 5, reason)
        assert asked == words + asked[-3:] and asked[-3:-1] == "答案"


def test_xcopa_loses_a_letter_only_in_the_harness_s_own_variant(data):
    premises = [row["premise"] for row in json_lines(data / "xcopa/th/test.th.jsonl")]
    own, whole = requests("xcopa_th", data), requests("xcopa_th_whole", data)
    for number, premise in enumerate(premises):
        assert own[2 * number][0].rpartition(" ")[0] == premise[:-1]
        assert whole[2 * number][0].rpartition(" ")[0] == premise
    assert requests("xcopa_id", data) == requests("xcopa_id_whole", data)  # every premise ends in a full stop


def test_scores_are_the_harness_s_figures(data, pico, tmp_path):
    names = ["belebele_eng_Latn", "xcopa_id", "yue_mmlu_likelihood", "mgsm_direct_en", "global_mmlu_full_ms_anatomy"]
    written = score_tasks(Scoring(pico, tmp_path), names, data)
    assert list(written) == names
    lm = language_model(pico.loaded, pico.tokenizer, 512)
    for name, path in written.items():
        found = read(path)
        theirs = evaluate(lm, task_of(name, data))["metrics"]
        assert found["metrics"]
        for metric, ours in found["metrics"].items():
            key, _, rule = metric.partition(",")
            rule = rule or "none"
            assert ours["value"] == pytest.approx(theirs[f"{key},{rule}"], abs=1e-12)
            assert ours["stderr"] == pytest.approx(theirs[f"{key}_stderr,{rule}"], abs=1e-12)
        assert found["details"]["data"] == "local" and found["details"]["n_shot"] == 0
    assert list(read(written["belebele_eng_Latn"])["metrics"]) == ["acc", "acc_norm"]
    assert set(read(written["mgsm_direct_en"])["metrics"]) == {
        "exact_match,remove_whitespace",
        "exact_match,flexible-extract",
    }
    yue = read(written["yue_mmlu_likelihood"])
    assert {group: found["acc"]["n"] for group, found in yue["groups"].items()} == {"arts": 4, "security_study": 3}
    assert "left out" in yue["details"]["note"] and yue["details"]["harness_task"] == "cmmlu_arts"


def test_rows_of_the_hub_give_the_same_scores(data, pico, tmp_path, monkeypatch):
    """Without a data folder the harness's own task is used, for which the same files take the place of the hub here."""
    whole = harness.task_manager
    monkeypatch.setattr(harness, "task_manager", lambda folder="xcopa": whole(folder))
    with local_hub.hub_of(data, str(tmp_path / "cache")):
        hub = read(score_tasks(Scoring(pico, tmp_path / "hub"), ["xcopa_th"])["xcopa_th"])
    local = read(score_tasks(Scoring(pico, tmp_path / "local"), ["xcopa_th"], data)["xcopa_th"])
    assert hub["items"] == local["items"] and len(hub["items"]["ids"]) == 4
    assert (hub["details"]["data"], local["details"]["data"]) == ("hub", "local")
    assert set(local["groups"]) == {"cause", "effect"} and local["groups"] == hub["groups"]


def test_what_is_finished_is_not_computed_again(data, pico, models, tmp_path, monkeypatch):
    names = ["piqa", "winogrande", "arc_easy"]
    scored = []

    def killed(lm, task, *rest):
        scored.append(task.config.task)
        if len(scored) == 2:
            raise KeyboardInterrupt
        return evaluate(lm, task, *rest)

    monkeypatch.setattr(harness_scores, "evaluate", killed)
    with pytest.raises(KeyboardInterrupt):
        score_tasks(Scoring(pico, tmp_path), names, data)
    assert scored == ["piqa", "winogrande"] and [path.name for path in tmp_path.iterdir()] == ["piqa.json"]
    first = (tmp_path / "piqa.json").read_bytes()
    score_tasks(Scoring(pico, tmp_path, tokens_per_batch=64), names, data)  # other batches, same scores
    assert scored[2:] == ["winogrande", "arc_easy"] and (tmp_path / "piqa.json").read_bytes() == first
    # With another model, other data or another limit the score is another one.
    other = EvaluatedModel(open_checkpoint(str(models["other"]), None, False, "cpu"), "float32")
    for model, limit in ((pico, 2), (other, 2), (other, None)):
        score_tasks(Scoring(model, tmp_path, limit), ["piqa"], data)
    assert scored[4:] == ["piqa"] * 3
    labels = data / "piqa/valid-labels.lst"
    before = labels.read_text()
    try:
        labels.write_text("1\n1\n1\n0\n")
        score_tasks(Scoring(other, tmp_path), ["piqa"], data)
    finally:
        labels.write_text(before)
    assert scored[7:] == ["piqa"]


def test_solved_items_come_first(data, pico, tmp_path):
    scoring = Scoring(pico, tmp_path, limit=2)
    found = score_tasks(scoring, ["mmlu_anatomy", "global_mmlu_full_ms_anatomy"], data, num_fewshot=5)
    assert read(found["mmlu_anatomy"])["details"]["n_shot"] == 5
    assert "there are 0 solved items for --num-fewshot 5" in found["global_mmlu_full_ms_anatomy"]


def test_batches_and_single_requests_agree(data, pico):
    """Log-probabilities in float32 agree to 1e-5: the harness's batches of 1 and of 8, and ours by tokens."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    assert pico.loaded.dtype == torch.float32
    asked = [arguments for name in ("belebele_eng_Latn", "piqa", "xcopa_th") for arguments in requests(name, data)]
    instances = [Instance("loglikelihood", {}, arguments, 0, ("", 0, 1)) for arguments in asked]
    models = [HFLM(pretrained=pico.loaded, tokenizer=pico.tokenizer, batch_size=size) for size in (1, 8)]
    models += [language_model(pico.loaded, pico.tokenizer, tokens) for tokens in (1, 700)]
    single, *others = ([value for value, _ in model.loglikelihood(instances, True)] for model in models)
    assert len(set(single)) > len(single) / 2
    for found in others:
        torch.testing.assert_close(torch.tensor(found), torch.tensor(single), rtol=0, atol=1e-5)


def test_no_batch_is_larger_than_asked(data, pico, monkeypatch):
    lm = language_model(pico.loaded, pico.tokenizer, 300)
    sizes = []
    call = lm._model_call
    monkeypatch.setattr(lm, "_model_call", lambda inputs, **rest: sizes.append(inputs.shape) or call(inputs, **rest))
    evaluate(lm, task_of("arc_easy", data))
    assert any(rows > 1 for rows, _ in sizes)
    assert all(rows == 1 or rows * length <= 300 for rows, length in sizes)


def test_bad_input_is_one_line(data, models, tmp_path, fails, monkeypatch):
    whole = harness.task_manager
    monkeypatch.setattr(harness, "task_manager", lambda folder="mmlu/default": whole(folder))

    def line(tasks, folder=data, *flags):
        return fails(
            run_lm_eval,
            "--model",
            models["target"],
            "--output_dir",
            tmp_path / "out",
            "--tasks",
            tasks,
            "--data_dir",
            folder,
            *flags,
        )

    assert "no_such_task is no task of lm-evaluation-harness" in line("piqa,no_such_task")
    assert f"data folder {tmp_path / 'none'} does not exist" in line("piqa", tmp_path / "none")
    assert "limit is 0; expected at least 1" in line("piqa", data, "--limit", 0)
    assert "no tasks were given" in line(",")
    # One of two files is missing, a row has another layout, labels are of another release.
    folder = tmp_path / "eval"
    for name in ("piqa/valid.jsonl", "belebele/eng_Latn.jsonl", "mmlu/test/anatomy_test.csv"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_bytes((data / name).read_bytes())
    assert f"{folder / 'piqa/valid-labels.lst'} is missing, which piqa needs" in line("piqa", folder)
    (folder / "piqa/valid-labels.lst").write_text("0\n1\n")
    assert "has 2 labels for 4 rows" in line("piqa", folder)
    (folder / "belebele/eng_Latn.jsonl").write_text('{"question": "?"}\n')
    assert "eng_Latn.jsonl, row 1 has no 'correct_answer_num'; expected" in line("belebele_eng_Latn", folder)
    row = json.loads((data / "belebele/eng_Latn.jsonl").read_text(encoding="utf-8").splitlines()[0])
    (folder / "belebele/eng_Latn.jsonl").write_text(json.dumps({**row, "question": None}))
    assert "row 1 does not fit (question is None, no text)" in line("belebele_eng_Latn", folder)
    (folder / "belebele/eng_Latn.jsonl").write_text("{\n")
    assert "eng_Latn.jsonl, line 1 is not valid JSON" in line("belebele_eng_Latn", folder)
    (folder / "mmlu/dev").mkdir()
    (folder / "mmlu/dev/anatomy_dev.csv").write_text("q,a,b,c,d,E\n")
    assert "anatomy_dev.csv, row 1 does not fit (the answer is 'E'" in line("mmlu_anatomy", folder)
    # The files are absent, and the hub does not have the task either.
    assert "no task was scored" in line("yue_mmlu_likelihood", folder)
    assert not (tmp_path / "out").exists()


def test_unreachable_hub_gives_up_in_seconds(pico, tmp_path, monkeypatch):
    """The address accepts connections and never answers, which takes longest to notice."""
    import datasets
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(harness, "HUB_TIMEOUT_S", 1)
    whole = harness.task_manager
    monkeypatch.setattr(harness, "task_manager", lambda folder="xcopa": whole(folder))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        before = time.monotonic()
        found = score_tasks(Scoring(pico, tmp_path), ["xcopa_th", "xcopa_et", "xcopa_th_whole"])
        assert time.monotonic() - before < 10
    assert "could not be had" in found["xcopa_et"] and "\n" not in found["xcopa_et"]
    assert "put xcopa/th/test.th.jsonl below BENCHMARK_DATA" in found["xcopa_th"]
    assert "the harness has no such task and BENCHMARK_DATA is not set" in found["xcopa_th_whole"]
    assert not constants.HF_HUB_OFFLINE and not datasets.config.HF_HUB_OFFLINE and not list(tmp_path.iterdir())


def test_a_checkout_of_the_harness_is_known_by_its_commit(tmp_path, monkeypatch):
    import lm_eval

    version = harness_version.__wrapped__
    assert version() == importlib.metadata.version("lm_eval")
    (tmp_path / "lm_eval").mkdir()
    (tmp_path / "lm_eval/__init__.py").write_text("")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@x"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"], ["tag", "-a", "v1", "-m", "x"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setattr(lm_eval, "__file__", str(tmp_path / "lm_eval/__init__.py"))
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert version() == f"commit {commit}"
    (tmp_path / "lm_eval/__init__.py").write_text("changed = True")
    dirty = version()
    (tmp_path / "lm_eval/__init__.py").write_text("changed = again")
    assert dirty.startswith(f"commit {commit}, changes ") and version() not in (dirty, f"commit {commit}")
