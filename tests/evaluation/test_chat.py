"""Asking a model on the command line: answers against stock transformers, columns, and bad input."""

import json
import os
import shutil
import subprocess
import unicodedata

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file

from evaluation import chat


def expected(folder, *turns, tokens=8):
    """The greedy answer of stock transformers to the turns of a conversation, or to plain text without a template."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    if tokenizer.chat_template:
        roles = ["user", "assistant"] * len(turns)
        messages = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    else:
        ids = tokenizer(turns[-1], return_tensors="pt")["input_ids"]
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.fixture
def ask(warm_python):
    """A function that runs the command: (its flags, what is typed) -> what it printed."""

    def run(*flags, typed=""):
        environment = {**os.environ, "PATH": f"{warm_python}:{os.environ['PATH']}", "COLUMNS": "61"}
        command = ["python", ROOT / "evaluation/chat.py", *flags, "--max-new-tokens", "8"]
        done = subprocess.run(command, input=typed, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture
def plain(models, tmp_path):
    """The target without its chat template."""
    folder = shutil.copytree(models["target"], tmp_path / "plain")
    (folder / "chat_template.jinja").unlink()
    return folder


def test_an_answer_is_that_of_transformers_in_the_chat_template(ask, models):
    assert ask(models["target"], "cost matrix").strip() == expected(models["target"], "cost matrix").strip()


def test_an_answer_appears_while_it_is_made(models, capsys, monkeypatch):
    """Every token goes to the streamer of transformers when it is made, and its words are printed then."""
    from transformers import AutoTokenizer, TextStreamer

    ids, printed = [], []

    class Recorder(TextStreamer):
        def put(self, value):
            super().put(value)
            ids.append(value.flatten())
            printed.append(capsys.readouterr().out)

    monkeypatch.setattr("transformers.TextStreamer", Recorder)
    chat.main([str(models["target"]), "cost matrix", "--max-new-tokens", "8"])
    prompt, *answer = ids
    told = expected(models["target"], "cost matrix")
    assert len(prompt) > 1 and len(answer) == 8 and not printed[0]
    assert AutoTokenizer.from_pretrained(models["target"]).decode(torch.cat(answer)) == told
    before_the_end = "".join(printed)
    assert before_the_end and told.startswith(before_the_end)
    assert told.removeprefix(before_the_end).strip() == capsys.readouterr().out.strip()


def test_answers_beside_each_other_are_not_streamed(models, capsys, monkeypatch):
    monkeypatch.setattr("transformers.TextStreamer.put", lambda *_: pytest.fail("an answer is streamed"))
    chat.main([str(models["target"]), "cost", "--compare", str(models["source"]), "--max-new-tokens", "8"])
    assert "│" in capsys.readouterr().out


def test_a_model_without_a_template_continues_plain_text(ask, plain):
    told = expected(plain, "the plan of a model")
    assert ask(plain, "the plan of a model").strip() == told.strip()
    assert told != expected(plain, "the plan of a model", tokens=4)  # it is long enough to tell two apart


def test_a_conversation_repeats_what_was_said(ask, models):
    first = expected(models["source"], "plan")
    second = expected(models["source"], "plan", first, "cost")
    assert ask(models["source"], typed="plan\n\ncost\n") == f"> {first}\n> > {second}\n> "
    assert second != expected(models["source"], "cost")


def columns_of(printed):
    """The texts of the two columns below the head, without spaces."""
    rows = [line.split("│") for line in printed.splitlines() if line.startswith("│")]
    return tuple("".join("".join(row[column].split()) for row in rows) for column in (1, 2))


def cells(line):
    """How many cells of a terminal a line takes."""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in line)


def test_two_answers_stand_beside_each_other(ask, models):
    printed = ask(models["target"], "cost matrix", "--compare", models["source"])
    told = [expected(models[name], "cost matrix") for name in ("target", "source")]
    assert columns_of(printed) == tuple("".join(text.split()) for text in told)


def test_columns_fit_the_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "61")
    answers = ["語言模型" * 20 + " [bold]x[/bold]", "word " * 30 + "w" * 80]
    chat.show_beside(["a/long/name" * 9, "[b]"], answers)
    printed = capsys.readouterr().out
    assert {cells(line) for line in printed.splitlines()} <= {60, 61}
    assert columns_of(printed) == tuple("".join(text.split()) for text in answers) and "[b]" in printed


def test_bad_input_is_refused(fails, models, fused, plans, tmp_path):
    def ask(folder, *flags):
        return fails(chat, folder, "cost", *flags)

    assert f"model {tmp_path}/none does not exist" in ask(tmp_path / "none")
    assert "is not a model folder: it has no config.json" in ask(tmp_path)
    assert "holds the output of stage 'plans'" in ask(plans["token"])
    assert "does not exist" in ask(models["target"], "--compare", tmp_path / "none")
    assert "max_new_tokens 0" in ask(models["target"], "--max-new-tokens", 0)
    assert "is not available here" in ask(models["target"], "--device", "cuda:99")
    assert f"the argument after {models['target']} is empty" in fails(chat, models["target"], "")
    assert "the first argument is empty" in fails(chat, "", "cost")
    assert "argument --device: it is empty" in fails(chat, models["target"], "--device", "")
    unfinished = shutil.copytree(fused, tmp_path / "fused")
    record = json.loads((unfinished / "manifest.json").read_text())
    (unfinished / "manifest.json").write_text(json.dumps({**record, "status": "incomplete"}))
    assert f"{unfinished} is not finished" in ask(unfinished)


def test_a_manifest_of_another_program_is_no_reason_to_refuse(models, tmp_path, capsys):
    folder = shutil.copytree(models["target"], tmp_path / "model")
    (folder / "manifest.json").write_text('{"name": "an app"}')
    chat.main([str(folder), "cost", "--max-new-tokens", "8"])
    assert capsys.readouterr().out.strip() == expected(folder, "cost").strip()


def test_logits_that_are_not_finite_are_refused(fails, models, tmp_path):
    folder = shutil.copytree(models["target"], tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert "not finite" in fails(chat, folder, "cost")
