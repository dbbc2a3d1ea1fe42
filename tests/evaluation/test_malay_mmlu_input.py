"""MalayMMLU's command on files and models that it cannot use: each is refused by name."""

import pytest
from conftest import llama, make_tokenizer, save
from malay_rows import rows, write

from evaluation import run_malay_mmlu


@pytest.fixture(autouse=True)
def no_clone(monkeypatch):
    monkeypatch.delenv("MALAY_REPO", raising=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write(tmp_path_factory.mktemp("malay"), *rows())


def change(row: dict, **values) -> dict:
    return {**row, **values}


BAD_ROWS = {
    "lacks category, options, subject": lambda row: {"prompt": "soalan", "key": "A"},
    "category is ' '; expected": lambda row: change(row, category=" "),
    "of which one is empty": lambda row: change(row, options=["A. x", " "]),
    "key is 'E', but its 4 options are A to D": lambda row: change(row, key="E"),
    "has 6 options; expected 2 to 5": lambda row: change(row, options=list("uvwxyz")),
    "options is 3; expected a list of texts": lambda row: change(row, options=3),
    "prompt is '  '; expected the text of the question": lambda row: change(row, prompt="  "),
    "is a str; expected an object": lambda row: "soalan",
}


@pytest.mark.parametrize("message", BAD_ROWS)
def test_bad_rows_are_named(models, tmp_path, fails, message):
    good = rows(1)[0]
    write(tmp_path, good, BAD_ROWS[message](good))
    line = fails(run_malay_mmlu, "--model", models["target"], "--output-dir", tmp_path / "out", "--data-dir", tmp_path)
    assert message in line and "MalayMMLU_0shot.json, row 2" in line and not (tmp_path / "out").exists()


def test_bad_input_is_an_error(models, data, tmp_path, fails, monkeypatch):
    def error(*flags, model=models["target"]):
        return fails(run_malay_mmlu, "--model", model, "--output-dir", tmp_path / "out", *flags)

    advice = "of BENCHMARK_DATA, or in --data-dir of evaluation/run_malay_mmlu.py (without them, the malay task runs "
    advice += "belebele_zsm_Latn and Global-MMLU ms in its place)"
    assert "MALAY_REPO is not set" in (line := error()) and advice in line
    monkeypatch.setenv("MALAY_REPO", str(tmp_path))
    assert f"{tmp_path / 'data' / 'MalayMMLU_1shot.json'} does not exist" in (line := error("--shots", 1))
    assert advice in line and "in MALAY_REPO" in line
    assert "--shots is 4; MalayMMLU has 0, 1, 2 or 3" in error("--shots", 4, "--data-dir", data)
    assert "limit is 0; expected at least 1" in error("--limit", 0, "--data-dir", data)
    few = write(tmp_path, *rows(2), shots=3)  # the columns of three examples are missing
    assert "lacks full_question_3shot" in error("--shots", 3, "--data-dir", few)
    assert "lacks full_question_3shot_llama" in error("--shots", 3, "--data-dir", few, "--llama-name", "yes")
    write(tmp_path)
    assert "has no rows" in error("--data-dir", tmp_path)
    (tmp_path / "MalayMMLU_0shot.json").write_text("<html>")
    assert "is neither a JSON array nor JSON lines" in error("--data-dir", tmp_path)
    tokenizer = make_tokenizer(400, 1)
    tokenizer.chat_template = None
    plain = save(llama(), tokenizer, tmp_path / "plain")
    assert "plain has no chat template" in (line := error("--data-dir", data, model=plain))
    assert line.endswith("or give --prompt plain")
    tiny = save(llama(max_position_embeddings=4), make_tokenizer(400, 1), tmp_path / "tiny")
    assert "tokens, but the model has 4 positions" in error("--data-dir", data, model=tiny)
