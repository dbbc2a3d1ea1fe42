"""MalayMMLU: each line of the table in docs/benchmarks.md against stock transformers, one text at a time; bad input."""

import json

import pytest
import torch
from conftest import llama, make_tokenizer, run_main, save
from malay_rows import CATEGORIES, rows, write

from core.models.checkpoints import open_checkpoint
from evaluation import run_malay_mmlu
from evaluation.benchmarks import malay_scores
from evaluation.benchmarks.malay_mmlu import LETTERS, Form, read_questions
from evaluation.benchmarks.option_scores import encode, letter_ids, option_scores


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.delenv("MALAY_REPO", raising=False)
    monkeypatch.setattr(malay_scores, "CHUNK", 8)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write(tmp_path_factory.mktemp("malay"), *rows())


def stock(folder):
    """Model and tokenizer as transformers loads them, without code of ours."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def as_the_table_says(row: dict, shots: int, policy: str, llama: bool) -> str:
    """What the model reads by the table, in the chat template of conftest.py."""
    if policy == "plain":
        return row[f"full_question_{shots}shot"] if shots else row["prompt"] + "\nJawapan:"
    if shots:
        message = row[f"full_question_{shots}shot_llama" if llama else f"full_question_{shots}shot"]
    else:
        message = f"Berikut adalah soalan aneka pilihan tentang {row['subject']}. Sila berikan jawapan sahaja.\n\n"
        message += row["prompt"] + ("" if llama else "\nJawapan:")
    after = {True: "Jawapan:" if shots else "\nJawapan:", False: ""}[llama]
    return f"<|user|>{message}<|end|><|assistant|>{after}"


def options_of(row: dict) -> list[str]:
    """The options as they stand in the file."""
    given = row["options"]
    return given if isinstance(given, list) else [line for line in given.split("\n") if line]


@torch.no_grad()
def one_by_one(folder, given: list[dict], *form, dtype=torch.float32) -> list[tuple[list[float], list[float]]]:
    """(logits of the letters, mean log-probabilities of prompt + option), each by a forward pass without batch and
    cache."""
    model, tokenizer = stock(folder)
    model.to(dtype)
    out = []
    for row in given:
        prompt, options = as_the_table_says(row, *form), options_of(row)
        letters = [tokenizer.encode(letter)[-1] for letter in LETTERS[: len(options)]]
        first = model(torch.tensor([tokenizer(prompt)["input_ids"]])).logits[0, -1][letters].tolist()
        means = []
        for option in options:
            ids = torch.tensor([tokenizer(prompt + option)["input_ids"]])
            found = model(ids).logits[0, :-1].double().log_softmax(-1).gather(1, ids[0, 1:, None])
            means.append(float(found.mean()))
        out.append((first, means))
    return out


def encoded_questions(tokenizer, questions, form: Form = Form(policy="plain")):  # noqa: B008
    return [encode(tokenizer, form.prompt(tokenizer, q), q.options, 2048) for q in questions]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["target", "source"])
def test_batches_score_as_stock_transformers_one_by_one(models, data, name, dtype):
    """Letters and full answers agree to 1e-5."""
    questions = read_questions(data / "MalayMMLU_0shot.json")
    checkpoint = open_checkpoint(str(models[name]))
    model, tokenizer = checkpoint.load_model("float32").to(dtype), checkpoint.load_tokenizer()
    encoded = encoded_questions(tokenizer, questions)
    assert {len(q.options) for q in questions} == {4, 5} and len({len(e.stem) for e in encoded}) > 10
    assert not any(e.cut for e in encoded)
    letters = letter_ids(tokenizer, LETTERS)
    expected = one_by_one(models[name], rows(), 0, "plain", False, dtype=dtype)
    alone = [option_scores(model, checkpoint.layout, [e], letters)[0] for e in encoded]
    for found in (option_scores(model, checkpoint.layout, encoded, letters), alone):
        for got, wanted in zip(found, expected, strict=True):
            for ours, theirs in zip(got, wanted, strict=True):
                assert ours == pytest.approx(theirs, abs=1e-5, rel=0)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_answers_do_not_depend_on_the_padding_side(models, data, tmp_path, side):
    questions = read_questions(data / "MalayMMLU_0shot.json")
    flags = ("--model", models["source"], "--data_dir", data, "--llama-name", "no")
    run_main(run_malay_mmlu, *flags, "--output-dir", tmp_path)
    items = json.loads((tmp_path / "malay_mmlu.json").read_text())["items"]
    model, tokenizer = stock(models["source"])
    tokenizer.padding_side = side
    texts = [as_the_table_says(row, 0, "chat", False) for row in rows()]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    mask = batch["attention_mask"]
    places = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(batch["input_ids"], attention_mask=mask, position_ids=places).logits
    last = (places * mask).argmax(1)
    letters = [tokenizer.encode(letter)[-1] for letter in LETTERS]
    for row, q, correct in zip(logits[torch.arange(len(last)), last], questions, items["first_token"], strict=True):
        assert correct == int(int(row[letters[: len(q.options)]].argmax()) == q.key)


FORMS = [
    (0, "chat", False),
    (0, "chat", True),
    (2, "chat", False),
    (2, "chat", True),
    (0, "plain", False),
    (3, "plain", False),
]


@pytest.mark.parametrize(("shots", "policy", "llama"), FORMS)
def test_the_command_asks_and_scores_as_the_table_says(models, tmp_path, monkeypatch, capsys, shots, policy, llama):
    (tmp_path / "data").mkdir()
    monkeypatch.setenv("MALAY_REPO", str(tmp_path))
    given = rows(shots=shots)
    write(tmp_path / "data", *given, shots=shots)
    run_main(
        run_malay_mmlu,
        "--model",
        models["target"],
        "--output-dir",
        tmp_path / "out",
        "--shots",
        shots,
        "--prompt",
        policy,
        "--llama-name",
        "yes" if llama else "no",
        "--tokens-per-batch",
        1500,
    )
    name = f"malay_mmlu_{shots}shot" if shots else "malay_mmlu"
    assert [path.name for path in (tmp_path / "out").iterdir()] == [f"{name}.json"]
    record = json.loads((tmp_path / "out" / f"{name}.json").read_text())
    details = record["details"]
    assert details["prompt"] == as_the_table_says(given[0], shots, policy, llama)
    assert details["prompt_policy"] == ("chat template" if policy == "chat" else "plain prompt")
    assert (details["asked_as_llama"], details["template_date"]) == (llama, "26 Jul 2024" if policy == "chat" else None)
    expected = one_by_one(models["target"], given, shots, policy, llama)
    table = capsys.readouterr().out
    assert details["prompt_policy"] in table.splitlines()[0]
    keys = [LETTERS.index(row["key"]) for row in given]
    for number, metric in enumerate(("first_token", "full_answer")):
        right = [
            float(max(range(len(scores[number])), key=scores[number].__getitem__) == key)
            for key, scores in zip(keys, expected, strict=True)
        ]
        assert record["items"][metric] == right and 0 < sum(right) < 20
        assert record["metrics"][metric]["value"] == pytest.approx(sum(right) / 20)
        groups = {c: [r for r, row in zip(right, given, strict=True) if row["category"] == c] for c in CATEGORIES}
        for category, values in groups.items():
            assert record["groups"][category][metric]["value"] == pytest.approx(sum(values) / len(values))
            line = next(line for line in table.splitlines() if line.startswith(category))
            assert f"{100 * sum(values) / len(values):.2f}" in line and " 4 " in line
        micro, mean = table.splitlines()[-2:]
        assert f"{100 * sum(right) / 20:.2f}" in micro and f"{100 * sum(right) / 20:.2f}" in mean  # equal categories
    assert record["benchmark"] == name and record["metric"] == "first_token"


def special_tokenizer(template: str):
    """A tokenizer that begins every text with a special token, as those of LLaMA do."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer(400, 1)
    begin = "<|assistant|>"
    ids = [(begin, tokenizer.convert_tokens_to_ids(begin))]
    tokenizer._tokenizer.post_processor = TemplateProcessing(single=f"{begin} $A", special_tokens=ids)
    tokenizer.bos_token, tokenizer.chat_template = begin, template
    return tokenizer


def test_the_first_special_token_comes_twice_where_the_template_has_it(tmp_path, data):
    template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    model = save(llama(), special_tokenizer(template), tmp_path / "m")
    flags = ("--model", model, "--data-dir", data, "--llama-name", "no")
    for policy, twice in (("chat", True), ("plain", False)):
        run_main(run_malay_mmlu, *flags, "--output-dir", tmp_path / policy, "--prompt", policy)
        details = json.loads((tmp_path / policy / "malay_mmlu.json").read_text())["details"]
        assert details["begins_with_two_special_tokens"] == twice
        tokenizer = open_checkpoint(str(model)).load_tokenizer()
        ids = encode(tokenizer, details["prompt"], ("A. x", "B. y"), 2048).stem
        assert (ids[0], ids[1] == ids[0]) == (tokenizer.bos_token_id, twice)


def test_a_letter_is_the_last_token_of_its_text_with_special_tokens(tmp_path, data, fails):
    from tokenizers.processors import TemplateProcessing

    tokenizer = special_tokenizer("x")
    assert letter_ids(tokenizer, "AB") == [tokenizer.convert_tokens_to_ids(letter) for letter in "AB"]
    end = [("<|end|>", tokenizer.convert_tokens_to_ids("<|end|>"))]
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="$A <|end|>", special_tokens=end)
    model = save(llama(), tokenizer, tmp_path / "m")
    line = fails(
        run_malay_mmlu, "--model", model, "--output-dir", tmp_path / "out", "--data-dir", data, "--prompt", "plain"
    )
    assert "expected different ones, so it cannot be scored by letter" in line


def test_equal_scores_take_the_first_option(models, data, tmp_path, monkeypatch):
    monkeypatch.setattr(
        malay_scores,
        "option_scores",
        lambda model, layout, batch, letters: [([1.0] * 4, [0.0, 2.0, 2.0])] * len(batch),
    )
    run_main(run_malay_mmlu, "--model", models["target"], "--output-dir", tmp_path, "--data-dir", data)
    items = json.loads((tmp_path / "malay_mmlu.json").read_text())["items"]
    assert items["first_token"] == [float(row["key"] == "A") for row in rows()]
    assert items["full_answer"] == [float(row["key"] == "B") for row in rows()]


def test_logits_that_are_not_finite_give_no_answer(data, tmp_path, fails):
    model = llama()
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    broken = save(model, make_tokenizer(400, 1), tmp_path / "broken")
    line = fails(run_malay_mmlu, "--model", broken, "--output-dir", tmp_path / "out", "--data-dir", data)
    assert f"{broken} on malay_mmlu: log-probabilities that are not finite" in line and "in question" in line
    assert not (tmp_path / "out/malay_mmlu.json").exists()


def test_mean_of_categories_weighs_them_equally():
    def found(*values):
        return {metric: {"value": value, "n": 3} for metric, value in zip(run_malay_mmlu.METRICS, values, strict=True)}

    record = {
        "benchmark": "malay_mmlu",
        "groups": {"a": found(0.5, 1.0), "b": found(1.0, 0.0)},
        "metrics": found(0.6, 0.9),
        "details": {"prompt_policy": "plain prompt"},
    }
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

    monkeypatch.setattr(malay_scores, "option_scores", counted)
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
    (tmp_path / "killed/malay_mmlu.partial.json").write_text("{}")  # as after a kill between the score and its removal
    run_main(run_malay_mmlu, *flags, "--output-dir", tmp_path / "killed")
    assert sum(seen) == 4 and "is finished already" in caplog.text
    assert [path.name for path in (tmp_path / "killed").iterdir()] == ["malay_mmlu.json"]
    run_main(run_malay_mmlu, *flags, "--output-dir", tmp_path / "killed", "--limit", 5)
    assert sum(seen) == 9
    record = json.loads((tmp_path / "killed" / "malay_mmlu.json").read_text())
    assert record["items"]["ids"] == ["1", "2", "3", "4", "5"]


def test_a_partial_file_of_other_inputs_is_not_continued(models, data, tmp_path):
    foreign = {"fingerprint": "other", "chunks": [{"first_token": [1] * 8, "full_answer": [1] * 8, "cut": 8}] * 3}
    (tmp_path / "malay_mmlu.partial.json").write_text(json.dumps(foreign))
    run_main(run_malay_mmlu, "--model", models["target"], "--output-dir", tmp_path, "--data-dir", data)
    record = json.loads((tmp_path / "malay_mmlu.json").read_text())
    assert len(record["items"]["ids"]) == 20 and record["details"]["cut_prompts"] == 0


def test_prompts_longer_than_the_model_lose_their_beginning(tmp_path, data, caplog):
    model = save(llama(max_position_embeddings=200), make_tokenizer(400, 1), tmp_path / "short")
    run_main(run_malay_mmlu, "--model", model, "--output-dir", tmp_path / "out", "--data-dir", data)
    cut = json.loads((tmp_path / "out" / "malay_mmlu.json").read_text())["details"]["cut_prompts"]
    assert 0 < cut < 20 and f"{cut} of 20 prompts are longer" in caplog.text
    tokenizer = open_checkpoint(str(model)).load_tokenizer()
    prompt, answer = tokenizer("the model moves the cost")["input_ids"], tokenizer(" layer target")["input_ids"]
    found = encode(tokenizer, "the model moves the cost", (" layer target", " x"), len(answer) + 3)
    assert found.stem == prompt[-3:] and found.tails[1] == answer and found.cut


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

    advice = "--data_dir (without it, the malay task runs belebele_zsm_Latn and Global-MMLU ms in its place)"
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
