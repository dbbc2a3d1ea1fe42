"""MalayMMLU: its questions as they stand in the files, the prompts, and which name of a model counts."""

import json
import shutil

import pytest
import torch
from conftest import llama, make_tokenizer
from malay_rows import rows

from core.errors import UserError
from core.models.checkpoints import open_checkpoint
from core.texts.tokens import DATE_STRING
from evaluation.benchmarks.malay_mmlu import is_llama, read_options, read_questions, target_name
from evaluation.benchmarks.option_scores import encode, option_scores
from evaluation.benchmarks.prompts import PromptSettings, rendered
from evaluation.evaluated_model import EvaluatedModel


@pytest.mark.parametrize("variable", ["date_string", "strftime_now('%d %b %Y')"])
def test_templates_with_a_date_get_the_same_one_every_day(variable):
    tokenizer = make_tokenizer(400, 1)
    tokenizer.chat_template = "{{ " + variable + " }}: {{ messages[0]['content'] }}"
    assert rendered(tokenizer, "x") == f"{DATE_STRING}: x" == "26 Jul 2024: x"
    today = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False, date_string="today")
    assert not today.startswith(DATE_STRING)


def test_a_template_that_refuses_is_an_error_with_the_text():
    tokenizer = make_tokenizer(400, 1)
    tokenizer.chat_template = "{{ raise_exception('no such role') }}"
    with pytest.raises(UserError, match="text that begins 'soalan': no such role"):
        rendered(tokenizer, "soalan")


def test_the_name_that_counts_is_the_whole_one_or_the_target_s(models, tmp_path):
    def counts(folder, **settings):
        return is_llama(PromptSettings(**settings), EvaluatedModel(open_checkpoint(str(folder))))

    for name, expected in (("my-LLaMA-org/small", True), ("other/small", False)):
        folder = shutil.copytree(models["target"], tmp_path / "a" / name)
        assert counts(folder)[0] == expected and f"by the name {folder}" in counts(folder)[1]
        assert counts(folder, policy="plain")[0] is False
    assert counts(folder, llama_name="yes") == (True, "--llama-name yes")
    # For a checkpoint of ours the name of its target counts, for a training that of the model it began with.
    fused, trained = tmp_path / "llama/fused", shutil.copytree(folder, tmp_path / "llama/adapted")
    shutil.copytree(folder, fused)
    (fused / "manifest.json").write_text(json.dumps({"inputs": {"target": {"id": "org/Small"}}}))
    assert counts(fused) == (False, "by the name org/Small")
    lineage = {"models": {"target": {"name": "LLAMA-1B"}}}
    for start, made_by, expected in ((str(fused), "f", "org/Small"), ("gone", "f", "LLAMA-1B"), ("a/b", None, "a/b")):
        record = {"inputs": {"model": {"id": start}, "made_by": made_by}, "lineage": lineage}
        (trained / "manifest.json").write_text(json.dumps(record))
        assert target_name(trained) == expected


def test_a_real_manifest_names_the_target(fused, models):
    assert target_name(fused) == str(models["target"])


def test_options_stay_as_they_stand_in_the_file():
    plain, lettered = ("satu", "dua", "tiga"), ("A. satu", "B) dua", "(C) tiga")
    for options in (plain, lettered):
        for given in (list(options), "\n".join(options), "\n\n".join(options) + "\n", "\r\n".join(options)):
            assert read_options(given, "row") == options
    assert read_options("A. satu\nlagi\nB. C. dua", "row") == ("A. satu\nlagi", "B. C. dua")
    assert read_options("A. satu\nD. Ali\nB. dua", "row") == ("A. satu\nD. Ali", "B. dua")
    assert read_options(["A. Samad Said", "C. Achebe"], "row") == ("A. Samad Said", "C. Achebe")
    assert read_options("A.\nB. dua", "row") == ("A.", "B. dua")


def test_texts_may_hold_separators_that_json_allows(tmp_path):
    """JSON allows U+2028 and U+0085 within a text, so only a line feed ends a line of JSON."""
    given = rows(3)
    given[0] |= {"prompt": "so\u2028alan\x85 satu", "options": "A. sa\u2028tu\nB. du\x0ba\x85", "key": "B"}
    path = tmp_path / "MalayMMLU_0shot.json"
    for text in (
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in given),
        json.dumps(given, ensure_ascii=False),
    ):
        path.write_text(text, encoding="utf-8")
        questions = read_questions(path)
        assert [q.text for q in questions] == [row["prompt"] for row in given]
        assert questions[0].options == ("A. sa\u2028tu", "B. du\x0ba\x85")


def test_prompt_and_option_are_joined_without_a_separator_and_tokenised_as_one(models):
    """Even where a token spans their border: each text is encoded as the tokenizer encodes it as a whole."""
    tokenizer = open_checkpoint(str(models["target"])).load_tokenizer()
    prompt, answers = "the model ", ("model cost", "cost")
    wholes = [tokenizer(text)["input_ids"] for text in (prompt, *(prompt + answer for answer in answers))]
    assert any(whole[: len(wholes[0])] != wholes[0] for whole in wholes)
    found = encode(tokenizer, prompt, answers, 100)
    assert [found.stem + tail for tail in found.tails] == wholes and found.tails[0]
    model, layout = llama().eval(), open_checkpoint(str(models["target"])).layout
    with torch.no_grad():
        logits = model(torch.tensor([wholes[0]])).logits[0, -1]
        assert option_scores(model, layout, [found], [5, 9])[0][0] == pytest.approx(logits[[5, 9]].tolist(), abs=1e-5)
