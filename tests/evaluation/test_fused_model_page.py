"""docs/fused_model.md: its command lines and code are run with a pico model, and a GGUF file gives the model back."""

import importlib.util
import os
import re
import subprocess

import pytest
import torch
from conftest import ROOT
from gguf_files import write_gguf

from core.models.checkpoints import open_checkpoint

PAGE = (ROOT / "docs/fused_model.md").read_text("utf-8")
NOT_RUN = " (not run here)"
# The sections whose code is run; a new one must be added here, or say that it is not run.
RUN = ("On the command line", "In transformers", "In lm-evaluation-harness", "Back from a GGUF file")
# What the page calls its files.
FILES = {"json": "questions.jsonl", "yaml": "tasks/questions.yaml"}


def sections():
    """Heading -> (language, code) of each fenced block below it."""
    parts = re.split(r"^## (.+)$", PAGE, flags=re.MULTILINE)[1:]
    fences = [re.findall(r"^```(\w+)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE) for text in parts[1::2]]
    return {heading: found for heading, found in zip(parts[::2], fences, strict=True) if found}


@pytest.fixture(scope="module")
def place(reported, warm_python, tmp_path_factory):
    """A working folder in which the run `runs/demo` is a pico run, and `fused.gguf` its fused model as a GGUF file."""
    folder = tmp_path_factory.mktemp("place")
    for name, target in {"runs/demo": reported, "evaluation": ROOT / "evaluation"}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to(target)
    fused = open_checkpoint(str(reported / "fused"))
    write_gguf(folder / "fused.gguf", fused.load_model("float32"), fused.load_tokenizer())
    (folder / "bin").mkdir()
    main = importlib.util.find_spec("lm_eval.__main__").origin
    (folder / "bin/lm_eval").write_text(f'#!/bin/sh\nexec python {main} "$@"\n')
    (folder / "bin/lm_eval").chmod(0o755)
    return folder


@pytest.fixture
def shell(place, warm_python):
    """A function that runs one command line in the working folder -> what it printed."""

    def run(line, typed=""):
        path = f"{place}/bin:{warm_python}:{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "MODELS_ROOT": str(place / "models"), "HF_HOME": str(place / "hub")}
        options = {"cwd": place, "env": environment, "capture_output": True, "text": True, "timeout": 300}
        done = subprocess.run(["bash", "-c", line], input=typed, **options)
        assert done.returncode == 0, f"{line}\n{done.stderr[-2000:]}"
        return done.stdout

    return run


def lines_of(heading):
    return [line for language, code in sections()[heading] if language == "bash" for line in code.splitlines()]


def test_every_section_is_run_or_says_that_it_is_not():
    assert [heading for heading in sections() if not heading.endswith(NOT_RUN)] == list(RUN)


def test_questions_on_the_command_line(shell):
    one, two, conversation = lines_of(RUN[0])
    answer = shell(one).strip()
    assert answer and shell(two).count("runs/demo/") == 2
    # The conversation is given the same question, whose answer it cuts at fewer tokens.
    question = re.search(r'"(.+)"', one)[1]
    shown = shell(conversation, typed=question + "\n").removeprefix("> ").removesuffix("\n> ").strip()
    assert shown and answer.startswith(shown.rstrip("�"))


def test_the_pipeline_of_transformers(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    ((language, code),) = sections()[RUN[1]]
    assert language == "python"
    exec(code, {})
    assert capsys.readouterr().out.strip()


def test_a_task_of_ones_own_in_the_harness(place, shell):
    for language, code in sections()[RUN[2]]:
        if language in FILES:
            (place / FILES[language]).parent.mkdir(exist_ok=True)
            (place / FILES[language]).write_text(code)
            assert f"`{FILES[language]}`" in PAGE
    (line,) = lines_of(RUN[2])
    assert re.search(r"\|questions *\|.*\|acc *\|.*\| *[01]\|", shell(line))


def test_a_gguf_file_gives_the_same_logits_and_answer(place, shell, monkeypatch):
    monkeypatch.setenv("MODELS_ROOT", str(place / "models"))
    ids = torch.arange(60).reshape(2, 30)
    logits = [
        open_checkpoint(str(place / name)).load_model("float32")(ids).logits.detach()
        for name in ("runs/demo/fused", "fused.gguf")
    ]
    torch.testing.assert_close(logits[1], logits[0])
    (line,) = lines_of(RUN[3])
    assert shell(line) == shell(line.replace("fused.gguf", "runs/demo/fused"))
