"""When a chat template or tokenizer refuses a text, the error names the model and the text, wherever it happens."""

import json
import shutil

import pytest
from conftest import make_tokenizer

import run_activs_and_hot as stage1
from core import train_hot_residual_sft as stage3
from core.data import Row
from core.errors import UserError
from core.models.reading import read_aligned
from evaluation import generate_cmmlu_predictions as predict
from evaluation.benchmarks.generation import rendered

REFUSES = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ m['content'] }}{% endfor %}"
)
BROKEN = "{% for m in messages %}{{ m['content'] }}"
ASKS_TOO_MUCH = "{% for m in messages %}{{ m['content'] + 1 }}{% endfor %}"
SAYS = {REFUSES: "System role not supported", BROKEN: "TemplateSyntaxError", ASKS_TOO_MUCH: "TypeError"}


@pytest.fixture
def chats(tmp_path):
    """Conversations with a system prompt."""
    path = tmp_path / "chats.jsonl"
    rows = [{"system": "be kind", "question": f"question {n}", "answer": f"answer {n}"} for n in range(80)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def with_template(folder, template, copy):
    shutil.copytree(folder, copy)
    (copy / "chat_template.jinja").write_text(template)
    return copy


@pytest.mark.parametrize("template", SAYS)
def test_a_template_that_refuses_a_row_is_an_error(template, fails, models, chats, tmp_path):
    refusing = with_template(models["source"], template, tmp_path / "refusing")
    data = ("--data-subset", "file", "--data-file", chats)
    stage1_flags = ("--target-model", models["target"], "--source-model", refusing, "--out-dir", tmp_path / "p")
    distill = ("--model_dir", models["target"], "--source-model", refusing, "--output_dir", tmp_path / "d")
    errors = [
        fails(stage1, *stage1_flags, *data),
        fails(stage3, "--model_dir", refusing, *data, "--training-scenario", "no_hot", "--output_dir", tmp_path / "a"),
        fails(stage3, *distill, *data, "--training-scenario", "distill", "--distill-by", "answers"),
    ]
    for line in errors:
        assert f"the chat template of {refusing} does not take the text that begins 'question" in line
        assert SAYS[template] in line and "leave it out" in line


def test_a_template_that_refuses_a_question_is_an_error(fails, models, tmp_path):
    refusing = with_template(models["source"], "{{ raise_exception('not today') }}", tmp_path / "refusing")
    question = {"question": "who", **dict.fromkeys("ABCD", "a word"), "answer": "A", "no": "1"}
    (tmp_path / "arts.json").write_text(json.dumps([question]))
    error = fails(predict, "--model", refusing, "--output-dir", tmp_path / "m", "--data-dir", tmp_path)
    assert f"the chat template of {refusing} does not take the text that begins" in error and "not today" in error


def test_a_template_that_takes_parts_alone_is_given_parts():
    """The first attempt, with a string, fails in such a template."""
    tokenizer = make_tokenizer(400, 1)
    tokenizer.chat_template = "{% for m in messages %}{{ (m['content'] | first)['text'] + '!' }}{% endfor %}"
    assert rendered(tokenizer, "plan") == "plan!"
    tokenizer.chat_template = "{{ raise_exception('never') }}"
    with pytest.raises(UserError, match="the text that begins 'plan': never"):
        rendered(tokenizer, "plan")


def test_half_a_surrogate_pair_is_an_error(models):
    fast = make_tokenizer(400, 1)
    with pytest.raises(UserError, match=r"cannot encode the text that begins 'model \\ud800 layer': TypeError"):
        read_aligned([Row(((None, "model \ud800 layer"),))], fast, fast, 20, 20, 0)


def test_a_tokenizer_without_offsets_is_an_error(fails, models, texts, tmp_path, monkeypatch):
    from transformers import AutoTokenizer, ByT5Tokenizer

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: ByT5Tokenizer())
    flags = ("--target-model", models["target"], "--source-model", models["source"], "--data-file", texts)
    error = fails(stage1, *flags, "--data-subset", "file", "--pooling", "token", "--out-dir", tmp_path / "p")
    assert f"{models['target']} has a slow tokenizer; character offsets need a fast one" in error
    with pytest.raises(UserError, match="the tokenizer of ByT5Tokenizer gives no character offsets"):
        read_aligned([Row(((None, "abc"),))], ByT5Tokenizer(), make_tokenizer(400, 1), 20, 20, 0)
