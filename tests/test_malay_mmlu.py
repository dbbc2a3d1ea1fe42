"""MalayMMLU: log-probabilities against stock transformers one by one, its files, the command, and bad input."""

import json
import random

import pytest
import torch
from conftest import llama, make_tokenizer, run_main, save, sentences

from core.checkpoints import open_checkpoint
from evaluation import run_malay_mmlu
from evaluation.malay_questions import LETTERS, read_options, read_questions
from evaluation.option_scores import encode, letter_ids, option_scores

CATEGORIES = ("Humanities", "Language", "Others", "STEM", "Social science")


def rows(count: int = 20, shots: int = 0) -> list[dict]:
    """Rows of the benchmark's schema: 4 and 5 options, as a list and as lines, with and without letters."""
    rng = random.Random(shots)
    out = []
    for n, question in enumerate(sentences(count, 5)):
        texts = [answer.partition(" ")[2] for answer in sentences(4 + n % 2, n, 2 + n % 7)]
        lettered = [f"{letter}. {text}" for letter, text in zip(LETTERS, texts, strict=False)]
        prompt = question * (1 + n % 4) + "\n" + "\n".join(lettered) + "\nJawapan:" + "\n" * (n % 3 == 0)
        key = rng.choice(LETTERS[: len(texts)])
        row = {"prompt": prompt, "subject": "any", "category": CATEGORIES[n % 5], "key": key,
               "options": (texts, lettered, "\n".join(lettered), "\n\n".join(texts))[n % 4]}  # fmt: skip
        if shots:
            row[f"full_question_{shots}shot"] = "contoh Jawapan: A\n\n" * shots + prompt
        out.append(row)
    return out


def write(folder, *given: dict, shots: int = 0):
    (folder / f"MalayMMLU_{shots}shot.json").write_text(json.dumps(given, ensure_ascii=False), "utf-8")
    return folder


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.delenv("MALAY_REPO", raising=False)
    monkeypatch.setattr(run_malay_mmlu, "CHUNK", 8)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write(tmp_path_factory.mktemp("malay"), *rows())


def stock(folder):
    """Model and tokenizer as transformers load them, no code of ours."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def one_by_one(folder, questions, chat=False, dtype=torch.float32) -> list[tuple[list[float], list[float]]]:
    """(log-probabilities of the letters, of the full answers): one plain forward per option, no batch, no cache."""
    model, tokenizer = stock(folder)
    model.to(dtype)
    out = []
    for question in questions:
        prompt = question.prompt
        if chat:
            prompt = f"<|user|>{prompt}<|end|><|assistant|>"
        start = tokenizer(prompt)["input_ids"]
        letters = [tokenizer.encode(letter)[-1] for letter in LETTERS[: len(question.options)]]
        first = model(torch.tensor([start])).logits[0, -1].log_softmax(-1)[letters].tolist()
        full = []
        for option in question.options:
            answer = tokenizer(option if chat or prompt[-1] == "\n" else " " + option)["input_ids"]
            ids = torch.tensor([start + answer])
            found = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[len(start) - 1 :]
            full.append(float(found.double().sum()))
        out.append((first, full))
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["target", "source"])
def test_batches_score_as_stock_transformers_one_by_one(models, data, name, dtype):
    """To 1e-5: letters and full answers; full answers in float32 per token, as its rounding adds up over a long one."""
    questions = read_questions(data / "MalayMMLU_0shot.json", 0)
    checkpoint = open_checkpoint(str(models[name]))
    model, tokenizer = checkpoint.load_model("float32").to(dtype), checkpoint.load_tokenizer()
    encoded = [encode(tokenizer, q.prompt, q.options, False, 2048) for q in questions]
    assert {len(q.options) for q in questions} == {4, 5} and len({len(e.prompt) for e in encoded}) > 10
    assert not any(e.cut for e in encoded)
    letters = letter_ids(tokenizer, LETTERS)
    expected = one_by_one(models[name], questions, dtype=dtype)
    alone = [option_scores(model, checkpoint.layout, [e], letters)[0] for e in encoded]
    for found in (option_scores(model, checkpoint.layout, encoded, letters), alone):
        for e, got, wanted in zip(encoded, found, expected, strict=True):
            assert got[0] == pytest.approx(wanted[0], abs=1e-5, rel=0)
            for total, right, answer in zip(got[1], wanted[1], e.answers, strict=True):
                parts = len(answer) if dtype == torch.float32 else 1
                assert total / parts == pytest.approx(right / parts, abs=1e-5, rel=0)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_answers_do_not_depend_on_the_padding_side(models, data, tmp_path, side):
    questions = read_questions(data / "MalayMMLU_0shot.json", 0)
    run_main(run_malay_mmlu, "--model", models["source"], "--output-dir", tmp_path, "--data_dir", data)
    items = json.loads((tmp_path / "malay_mmlu.json").read_text())["items"]
    model, tokenizer = stock(models["source"])
    tokenizer.padding_side = side
    batch = tokenizer([q.prompt for q in questions], padding=True, return_tensors="pt")
    mask = batch["attention_mask"]
    places = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(batch["input_ids"], attention_mask=mask, position_ids=places).logits
    last = (places * mask).argmax(1)
    letters = [tokenizer.encode(letter)[-1] for letter in LETTERS]
    for row, q, correct in zip(logits[torch.arange(len(last)), last], questions, items["first_token"], strict=True):
        assert correct == int(int(row[letters[: len(q.options)]].argmax()) == q.key)


@pytest.mark.parametrize(("flags", "shots"), [((), 0), (("--shots", 2), 2), (("--chat-template",), 0)])
def test_command_writes_every_answer_and_a_table(models, tmp_path, monkeypatch, capsys, flags, shots):
    (tmp_path / "data").mkdir()
    monkeypatch.setenv("MALAY_REPO", str(tmp_path))
    data = write(tmp_path / "data", *rows(shots=shots), shots=shots)
    run_main(run_malay_mmlu, "--model", models["target"], "--output-dir", tmp_path / "out", *flags,
             "--tokens-per-batch", 1500)  # fmt: skip
    name = "malay_mmlu_2shot" if shots else "malay_mmlu"
    assert [path.name for path in (tmp_path / "out").iterdir()] == [f"{name}.json"]
    record = json.loads((tmp_path / "out" / f"{name}.json").read_text())
    questions = read_questions(data / f"MalayMMLU_{shots}shot.json", shots)
    assert all(q.prompt.startswith("contoh Jawapan: A\n\n" * shots) for q in questions)
    expected = one_by_one(models["target"], questions, "--chat-template" in flags)
    table = capsys.readouterr().out
    for number, metric in enumerate(("first_token", "full_answer")):
        right = [float(max(range(len(q.options)), key=scores[number].__getitem__) == q.key)
                 for q, scores in zip(questions, expected, strict=True)]  # fmt: skip
        assert record["items"][metric] == right and 0 < sum(right) < 20
        assert record["metrics"][metric]["value"] == pytest.approx(sum(right) / 20)
        groups = {c: [r for r, q in zip(right, questions, strict=True) if q.category == c] for c in CATEGORIES}
        for category, values in groups.items():
            assert record["groups"][category][metric]["value"] == pytest.approx(sum(values) / len(values))
            line = next(line for line in table.splitlines() if line.startswith(category))
            assert f"{100 * sum(values) / len(values):.2f}" in line and " 4 " in line
        micro, mean = table.splitlines()[-2:]
        assert f"{100 * sum(right) / 20:.2f}" in micro and f"{100 * sum(right) / 20:.2f}" in mean  # equal categories
    assert record["benchmark"] == name and list(record["metrics"]) == ["first_token", "full_answer"]


def test_mean_of_categories_weighs_them_equally():
    def found(*values):
        return {metric: {"value": value, "n": 3} for metric, value in zip(run_malay_mmlu.METRICS, values, strict=True)}

    record = {"benchmark": "malay_mmlu", "groups": {"a": found(0.5, 1.0), "b": found(1.0, 0.0)},
              "metrics": found(0.6, 0.9)}  # fmt: skip
    micro, mean = run_malay_mmlu.table(record).splitlines()[-2:]
    assert micro.split()[-2:] == ["60.00", "90.00"] and mean.split()[-2:] == ["75.00", "50.00"]


def test_a_killed_run_continues_to_the_same_bytes(models, data, tmp_path, monkeypatch, caplog):
    flags = ("--model", models["source"], "--data-dir", data, "--tokens-per-batch", 2000)
    run_main(run_malay_mmlu, *flags, "--output-dir", tmp_path / "whole")
    expected = (tmp_path / "whole" / "malay_mmlu.json").read_bytes()
    seen: list[int] = []

    def counted(model, layout, batch, letters):
        if sum(seen) >= 16 and kill:
            raise KeyboardInterrupt
        seen.append(len(batch))
        return option_scores(model, layout, batch, letters)

    monkeypatch.setattr(run_malay_mmlu, "option_scores", counted)
    kill = True
    with pytest.raises(KeyboardInterrupt):
        run_main(run_malay_mmlu, *flags, "--output-dir", tmp_path / "killed")
    assert [path.name for path in (tmp_path / "killed").iterdir()] == ["malay_mmlu.partial.json"]
    kill = False
    seen.clear()
    run_main(run_malay_mmlu, *flags, "--output-dir", tmp_path / "killed")
    assert sum(seen) == 4 and "continuing after 16 of 20" in caplog.text
    assert [path.name for path in (tmp_path / "killed").iterdir()] == ["malay_mmlu.json"]
    assert (tmp_path / "killed" / "malay_mmlu.json").read_bytes() == expected
    run_main(run_malay_mmlu, *flags, "--output-dir", tmp_path / "killed")
    assert sum(seen) == 4 and "is finished already" in caplog.text
    run_main(run_malay_mmlu, *flags, "--output-dir", tmp_path / "killed", "--limit", 5)
    assert sum(seen) == 9
    record = json.loads((tmp_path / "killed" / "malay_mmlu.json").read_text())
    assert record["items"]["ids"] == ["1", "2", "3", "4", "5"]


def test_what_other_inputs_left_behind_is_not_continued(models, data, tmp_path):
    foreign = {"fingerprint": "other", "chunks": [{"first_token": [1] * 8, "full_answer": [1] * 8, "cut": 8}] * 3}
    (tmp_path / "malay_mmlu.partial.json").write_text(json.dumps(foreign))
    run_main(run_malay_mmlu, "--model", models["target"], "--output-dir", tmp_path, "--data-dir", data)
    record = json.loads((tmp_path / "malay_mmlu.json").read_text())
    assert len(record["items"]["ids"]) == 20 and record["details"]["cut_prompts"] == 0


def test_options_are_read_in_every_style():
    plain = ("satu", "dua", "tiga")
    for given in (list(plain), ["A. satu", "B) dua", "(C) tiga"], "A. satu\nB. dua\nC. tiga\n", "satu\n\ndua\ntiga"):
        assert read_options(given, "row") == plain
    assert read_options("A. satu\nlagi\nB. C. dua", "row") == ("satu\nlagi", "C. dua")
    assert read_options("A. satu\nD. Ali\nB. dua", "row") == ("satu\nD. Ali", "dua")
    assert read_options(["A. Samad Said", "C. Achebe"], "row") == ("A. Samad Said", "C. Achebe")
    assert read_options("A.\nB. dua", "row") == ("A", "dua")


def test_rows_may_be_lines_and_the_zero_shot_column_comes_first(tmp_path):
    given = rows(3)
    given[1]["full_question_0shot"] = "soalan"
    path = tmp_path / "MalayMMLU_0shot.json"
    path.write_text("".join(json.dumps(row) + "\n" for row in given))
    assert [q.prompt for q in read_questions(path, 0)] == [given[0]["prompt"], "soalan", given[2]["prompt"]]


def test_an_answer_that_merges_with_the_prompt_is_read_on_its_own(models):
    tokenizer = open_checkpoint(str(models["target"])).load_tokenizer()
    answers, prompt = ("model cost", "cost"), tokenizer("the model ")["input_ids"]
    whole = tokenizer("the model " + answers[0])["input_ids"]
    assert whole[: len(prompt)] != prompt and len(whole) > len(prompt)
    found = encode(tokenizer, "the model ", answers, False, 100)
    assert found.prompt == prompt
    assert found.answers == [tokenizer(text)["input_ids"] for text in answers]


def test_prompts_longer_than_the_model_lose_their_beginning(tmp_path, data, caplog):
    model = save(llama(max_position_embeddings=96), make_tokenizer(400, 1), tmp_path / "short")
    run_main(run_malay_mmlu, "--model", model, "--output-dir", tmp_path / "out", "--data-dir", data)
    cut = json.loads((tmp_path / "out" / "malay_mmlu.json").read_text())["details"]["cut_prompts"]
    assert 0 < cut < 20 and f"{cut} of 20 prompts are longer" in caplog.text
    tokenizer = open_checkpoint(str(model)).load_tokenizer()
    prompt, answer = tokenizer("the model moves the cost")["input_ids"], tokenizer(" layer target")["input_ids"]
    found = encode(tokenizer, "the model moves the cost", ("layer target", "layer"), False, len(answer) + 3)
    assert found.prompt == prompt[-3:] and found.answers[0] == answer and found.cut


def change(row: dict, **values) -> dict:
    return {**row, **values}


BAD_ROWS = {
    "lacks category, options": lambda row: {"prompt": "soalan", "key": "A"},
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


def test_bad_input_is_told(models, data, tmp_path, fails, monkeypatch):
    def told(*flags, model=models["target"]):
        return fails(run_malay_mmlu, "--model", model, "--output-dir", tmp_path / "out", *flags)

    advice = "--data_dir (without it, the malay task runs belebele_zsm_Latn and Global-MMLU ms in its place)"
    assert "MALAY_REPO is not set" in (line := told()) and advice in line
    monkeypatch.setenv("MALAY_REPO", str(tmp_path))
    assert f"{tmp_path / 'data' / 'MalayMMLU_1shot.json'} does not exist" in (line := told("--shots", 1))
    assert advice in line and "in MALAY_REPO" in line
    assert "--shots is 4; MalayMMLU has 0, 1, 2 or 3" in told("--shots", 4, "--data-dir", data)
    assert "limit is 0; expected at least 1" in told("--limit", 0, "--data-dir", data)
    few = write(tmp_path, *rows(2), shots=3)
    assert "lacks full_question_3shot" in told("--shots", 3, "--data-dir", few)
    write(tmp_path)
    assert "has no rows" in told("--data-dir", tmp_path)
    (tmp_path / "MalayMMLU_0shot.json").write_text("<html>")
    assert "is neither a JSON array nor JSON lines" in told("--data-dir", tmp_path)
    tokenizer = make_tokenizer(400, 1)
    tokenizer.chat_template = None
    plain = save(llama(), tokenizer, tmp_path / "plain")
    assert "plain has no chat template; leave out --chat-template" in told("--chat-template", "--data-dir", data,
                                                                           model=plain)  # fmt: skip
    tiny = save(llama(max_position_embeddings=4), make_tokenizer(400, 1), tmp_path / "tiny")
    assert "tokens, but the model has 4 positions" in told("--data-dir", data, model=tiny)
