"""The answers of a model to Yue-MMLU: batches, chat templates, files in the benchmark's format, resuming."""

import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import qwen2, run_main, save
from family_models import family_model

from core.errors import UserError
from core.models.checkpoints import open_checkpoint
from evaluation import evaluate_cmmlu_yue as evaluate
from evaluation import generate_cmmlu_predictions as predict
from evaluation.benchmarks import generation, yue_predictions
from evaluation.benchmarks.generation import (
    NOTHING,
    Decoding,
    answers,
    common_beginning,
    continuations,
    own_settings,
    rendered,
)
from evaluation.evaluated_model import EvaluatedModel


def question_files(folder, count=6):
    """Write the questions of two subjects, whose texts have different lengths; returns the folder."""
    folder.mkdir(parents=True)
    for subject in ("arts", "logical"):
        rows = [
            {
                "question": f"{subject} {n} " + "model layer 語言 " * (n * 3 % 7),
                "A": "一",
                "B": f"cost {n}",
                "C": "三",
                "D": "四",
                "answer": "ABCD"[n % 4],
                "no": str(n),
            }
            for n in range(count)
        ]
        (folder / f"{subject}.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return folder


@pytest.fixture
def data(tmp_path):
    return question_files(tmp_path / "data")


def evaluated_of(folder) -> EvaluatedModel:
    return EvaluatedModel(open_checkpoint(str(folder)))


@pytest.mark.parametrize("which", ["target", "source"])
def test_a_batch_gives_the_tokens_of_one_at_a_time(models, which):
    """Even for a model that comes with sampling and a repetition penalty, which would count the padding."""
    evaluated = evaluated_of(models[which])
    model, tokenizer = evaluated.loaded, evaluated.tokenizer
    shipped = model.generation_config
    shipped.update(do_sample=True, temperature=0.5, top_k=3, repetition_penalty=1.7)
    ids = [tokenizer(rendered(tokenizer, "weight 語言 " * n), add_special_tokens=False)["input_ids"] for n in (1, 9, 4)]
    with own_settings(model, tokenizer, Decoding(max_new_tokens=12)):
        together = continuations(model, ids)
        assert together == [continuations(model, [one])[0] for one in ids]
    assert model.generation_config is shipped
    greedy = list(ids[2])  # by definition, one token after the other
    for _ in range(12):
        greedy.append(int(model(torch.tensor([greedy])).logits[0, -1].argmax()))
        if greedy[-1] == tokenizer.eos_token_id:
            greedy.pop()
            break
    assert together[2] == greedy[len(ids[2]) :] and len({tuple(new) for new in together}) == 3


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "gemma3_text"])
def test_a_common_beginning_read_once_changes_no_token(family):
    model = family_model(family).eval()
    model.generation_config.update(max_new_tokens=6, pad_token_id=0, eos_token_id=[1], do_sample=False)
    prompts = [[5, 6, 7, 8, *rest] for rest in ([9, 4, 3], [3], [20, 21, 22, 23, 24])]
    shared = common_beginning(model, prompts, 6)
    assert shared.tokens == 4
    alone = [continuations(model, [prompt])[0] for prompt in prompts]
    for _ in range(2):  # every batch uses what was read
        assert continuations(model, prompts, shared) == alone
    assert common_beginning(model, [*prompts, [5, 6]], 6).tokens == 1  # each prompt keeps a token of its own
    assert common_beginning(model, [[2, 3], [4, 5]], 6) is common_beginning(model, prompts[:1], 6) is NOTHING
    window = getattr(model.config, "sliding_window", None)  # padding would take up positions in it
    assert (common_beginning(model, prompts, window or 6) is NOTHING) == (family in ("mistral", "gemma3_text"))
    assert len(set(map(tuple, alone))) == 3


def test_vision_language_models_count_positions_themselves():
    assert common_beginning(family_model("qwen2_vl"), [[5, 6, 7], [5, 6, 8]], 2) is NOTHING


def test_answers_stop_at_any_end_of_text():
    settings = SimpleNamespace(eos_token_id=[7, 9], pad_token_id=0)
    out = torch.tensor([[0, 1, 5, 7, 5], [2, 3, 9, 0, 0], [2, 3, 5, 5, 5]])
    model = SimpleNamespace(generation_config=settings, device="cpu", generate=lambda **_: out)
    assert continuations(model, [[1], [2, 3], [2, 3]]) == [[5], [], [5, 5, 5]]


def test_draws_depend_on_the_seed(models):
    evaluated = evaluated_of(models["target"])
    prompts = ["cost matrix", "transport"]
    first, again, other = (answers(evaluated, prompts, Decoding(8, 1.0, seed)) for seed in (1, 1, 2))
    assert first == again != other


def test_templates_that_only_show_lists_of_parts(models):
    tokenizer = evaluated_of(models["target"]).tokenizer
    loop = "{% for p in m['content'] %}{% if p['type'] == 'text' %}{{ p['text'] }}{% endif %}{% endfor %}"
    tokenizer.chat_template = "{% for m in messages %}<|user|>" + loop + "{% endfor %}<|assistant|>"
    assert rendered(tokenizer, "cost") == "<|user|>cost<|assistant|>"
    tokenizer.chat_template = "<|assistant|>"
    with pytest.raises(UserError, match="leaves out"):
        rendered(tokenizer, "cost")


def flags(models, data, out, *more):
    return (
        "--model",
        models["target"],
        "--data_dir",
        data,
        "--output_dir",
        out,
        "--name",
        "m",
        "--max_new_tokens",
        4,
        *more,
    )


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.glob("predictions/m/*.json")}


def test_predictions_scores_and_resuming(models, data, tmp_path, monkeypatch, caplog):
    out, killed = tmp_path / "out", tmp_path / "killed"
    run_main(predict, *flags(models, data, out, "--shots", 2))
    score = json.loads((out / "yue_mmlu.json").read_text())
    assert score["metrics"]["acc"]["n"] == 12 and score["items"]["ids"][:2] == ["arts/0", "arts/1"]
    assert set(score["groups"]) == {"humanities", "others"} and score["details"]["shots"] == 2
    items = json.loads(contents(out)["cmmlu-yue-arts-2shot.json"])
    assert list(items) == [str(n) for n in range(6)]
    shown = items["3"]["origin_prompt"][0]["prompt"]
    assert items["3"].keys() == {"origin_prompt", "prediction", "gold"} and items["3"]["gold"] == "D"
    assert shown.count("arts 3 ") == 1 and shown.index("arts 1 ") < shown.index("arts 2 ") < shown.index("arts 3 ")
    assert shown.count("回應：") == 2 and shown.endswith("答案：")

    run_main(evaluate, "--predictions_dir", out / "predictions", "--output_dir", tmp_path / "scored")
    scored = json.loads((tmp_path / "scored/cmmlu_yue_summary.json").read_text())["m"]["2shot"]["overall"]
    assert scored["micro"] == round(100 * score["metrics"]["acc"]["value"], 2)

    calls = []

    def counted(evaluated, prompts, *rest):
        calls.append(len(prompts))
        if len(calls) == 2 and not contents(killed).keys() >= {"cmmlu-yue-logical-2shot.json"}:
            raise KeyboardInterrupt
        return answers(evaluated, prompts, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(yue_predictions, "answers", counted)
        with pytest.raises(KeyboardInterrupt):
            run_main(predict, *flags(models, data, killed, "--shots", 2))
        assert contents(killed).keys() == {"cmmlu-yue-arts-2shot.json", "manifest.json"}
        run_main(predict, *flags(models, data, killed, "--shots", 2))
        assert calls == [6, 6, 6] and contents(killed) == contents(out)  # the first subject was not asked again
        (killed / "yue_mmlu.json").unlink()
        run_main(predict, *flags(models, data, killed, "--shots", 2))
        assert len(calls) == 3  # all are finished: no model is asked
        # A file that was damaged, and one whose questions changed, are made again; the others stay.
        (killed / "predictions/m/cmmlu-yue-logical-2shot.json").write_text("{}")
        rows = json.loads((data / "arts.json").read_text())
        (data / "arts.json").write_text(json.dumps([{**rows[0], "answer": "C"}, *rows[1:]]))
        (killed / "yue_mmlu.json").unlink()
        run_main(predict, *flags(models, data, killed, "--shots", 2))
        assert calls[3:] == [6, 6]
        assert contents(killed)["cmmlu-yue-logical-2shot.json"] == contents(out)["cmmlu-yue-logical-2shot.json"]
        assert json.loads(contents(killed)["cmmlu-yue-arts-2shot.json"])["0"]["gold"] == "C"
        assert "items/s" in caplog.text


def test_predictions_that_are_asked_for_elsewhere_are_written(models, data, tmp_path, fails):
    out, other = tmp_path / "out", tmp_path / "other"
    run_main(predict, *flags(models, data, out))
    before = (out / "yue_mmlu.json").read_bytes()
    run_main(predict, *flags(models, data, out), "--predictions_dir", other)
    written = {path.name: path.read_bytes() for path in (other / "m").glob("cmmlu*.json")}
    assert written and written.items() <= contents(out).items()
    assert (out / "yue_mmlu.json").read_bytes() == before  # the score was finished already
    shutil.rmtree(out / "predictions")
    run_main(predict, *flags(models, data, out)[:-4], "--max_new_tokens", 4)  # the score is finished
    assert not (out / "predictions").exists()
    shutil.copytree(other, out / "predictions")
    # evaluate_cmmlu_yue.py finds them in the output folder as well as in a folder of predictions.
    for folder in (out, other):
        run_main(evaluate, "--predictions_dir", folder, "--output_dir", tmp_path / f"scored-{folder.name}")
    assert len({(tmp_path / f"scored-{name}/cmmlu_yue_results.json").read_bytes() for name in ("out", "other")}) == 1
    shutil.copytree(other / "m", out / "m")
    assert "of m exists twice" in fails(evaluate, "--predictions_dir", out, "--output_dir", tmp_path / "s")


def test_limit_asks_fewer_with_examples_of_the_whole_file(models, data, tmp_path):
    run_main(predict, *flags(models, data, tmp_path / "out", "--shots", 5, "--limit", 1))
    items = json.loads(contents(tmp_path / "out")["cmmlu-yue-logical-5shot.json"])
    assert list(items) == ["0"] and items["0"]["origin_prompt"][0]["prompt"].count("樣例：") == 5


def test_predictions_of_others_are_not_overwritten(models, data, tmp_path, fails):
    path = tmp_path / "out/predictions/m/cmmlu-yue-logical-0shot.json"
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    assert "was not made by this tool" in fails(predict, *flags(models, data, tmp_path / "out"))
    assert path.read_text() == "{}" and not (tmp_path / "out/yue_mmlu.json").exists()


def test_bad_input_of_the_generation(models, data, tmp_path, fails, monkeypatch):
    monkeypatch.delenv("YUE_BENCHMARK_ROOT", raising=False)
    out = tmp_path / "out"
    base = ("--model", models["target"], "--output_dir", out)
    error = fails(predict, *base)
    assert "$YUE_BENCHMARK_ROOT" in error and "--data-dir" in error
    monkeypatch.setenv("YUE_BENCHMARK_ROOT", str(tmp_path / "clone"))
    error = fails(predict, *base)
    assert "$YUE_BENCHMARK_ROOT" in error and os.path.join("clone", "data", "latest_data", "Yue-MMLU") in error
    assert "--shots" in fails(predict, *flags(models, data, out, "--shots", 6))
    assert "limit is 0; expected at least 1" in fails(predict, *flags(models, data, out, "--limit", 0))
    assert "temperature" in fails(predict, *flags(models, data, out, "--temperature", -1))
    assert "max_new_tokens" in fails(predict, *flags(models, data, out)[:-1], 0)
    plain = save(qwen2(), evaluated_of(models["source"]).tokenizer, tmp_path / "plain")
    (plain / "chat_template.jinja").unlink()
    assert "no chat template" in fails(predict, *flags({"target": plain}, data, out))
    for row, error in (({"question": "x"}, "item 1: expected strings"), ({"answer": "E"}, "item 1: the answer is 'E'")):
        rows = json.loads((data / "arts.json").read_text())[:1]
        (data / "arts.json").write_text(json.dumps([rows[0], {**rows[0], **row} if "answer" in row else row]))
        assert error in fails(predict, *flags(models, data, out))
    (data / "arts.json").write_text(json.dumps(rows))
    assert "give fewer --shots" in fails(predict, *flags(models, data, out, "--shots", 1))
    assert not out.exists()


def test_the_log_says_how_many_prompts_are_too_long(models, caplog, monkeypatch):
    evaluated = evaluated_of(models["target"])
    monkeypatch.setattr(evaluated.loaded.config, "max_position_embeddings", 10)
    monkeypatch.setattr(generation, "continuations", lambda model, batch, shared: [[5]] * len(batch))
    answers(evaluated, ["cost", "cost " * 30], Decoding(2))
    assert "1 of 2 prompts" in caplog.text
