"""Texts by name, the split, and that datasets/ never shadows the installed package."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT, SHARED_DATA, make_tokenizer

from core.data import SHARES, Row, load_rows, sft_example
from core.runs import UserError


def write(path, records):
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf-8")
    return str(path)


@pytest.mark.parametrize("folder", [ROOT, ROOT / "core", ROOT / "scripts"])
def test_installed_datasets_is_not_shadowed(folder):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import core.data, datasets; print(datasets.__file__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    assert not done.stdout.strip().startswith(str(ROOT / "datasets")) and done.stdout.strip().endswith("__init__.py")


def test_python_reference_is_split_by_topic():
    from dataset_general_texts import python_reference

    records = python_reference()
    texts = [record["text"] for record in records]
    assert len(texts) == len(set(texts)) > 400 and min(map(len, texts)) >= 200
    topics = {record["text"]: record["group"] for record in records}
    parts = {part: load_rows("python_reference", part, 10**6, 0) for part in SHARES}
    groups = {part: {topics[row.plain] for row in rows} for part, rows in parts.items()}
    assert not groups["calibration"] & groups["held_out"] and not groups["calibration"] & groups["sft"]
    assert not groups["sft"] & groups["held_out"]
    assert sum(map(len, parts.values())) == len(texts)
    for part, least in (("calibration", 160), ("sft", 96), ("held_out", 64)):
        assert len(parts[part]) >= least  # the demo's counts


def test_python_reference_topics_that_share_a_paragraph_stay_together():
    from pydoc_data.topics import topics

    from dataset_general_texts import python_reference

    group = {record["text"]: record["group"] for record in python_reference()}
    for content in topics.values():
        found = {group[p.strip()] for p in content.split("\n\n") if p.strip() in group}
        assert len(found) <= 1


def test_split_is_seeded_and_does_not_move_with_the_counts(tmp_path):
    path = write(tmp_path / "t.jsonl", [{"text": f"text {n}"} for n in range(100)])
    few, many = (load_rows("file", "calibration", n, 0, path) for n in (10, 40))
    assert few == many[:10]
    assert load_rows("file", "calibration", 40, 1, path) != many
    parts = [set(load_rows("file", part, 100, 0, path)) for part in SHARES]
    assert [len(part) for part in parts] == [50, 30, 20] and len(set.union(*parts)) == 100


def test_duplicates_are_left_out(tmp_path):
    path = write(tmp_path / "t.jsonl", [{"text": f"text {n % 50}"} for n in range(100)])
    assert sum(len(load_rows("file", part, 100, 0, path)) for part in SHARES) == 50


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "one"}\n{"text": "  "}\n', r"row 2 has an empty text"),
        ("a.jsonl", '{"text": "one"}\n{"text": null}\n', r"row 2 has an empty text"),
        ("a.jsonl", '{"body": "one"}\n', r"columns body; expected text, or question and answer"),
        ("a.jsonl", '{"text": \n', r"a\.jsonl cannot be read"),
        ("a.pdf", "x", r"suffix '\.pdf'; expected one of \.jsonl"),
    ],
)
def test_bad_files_are_refused(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        load_rows("file", "calibration", 10, 0, str(path))


def test_missing_and_unknown_data(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_rows("file", "calibration", 10, 0, str(tmp_path / "none.jsonl"))
    with pytest.raises(UserError, match="needs --data-file"):
        load_rows("file", "calibration", 10, 0)
    with pytest.raises(UserError, match="expected one of python_reference, gsm8k, file"):
        load_rows("gsm9k", "calibration", 10, 0)


def test_gsm8k_without_a_hub_says_what_to_give(monkeypatch, tmp_path):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(UserError, match=r"gsm8k cannot be read .* --data-file"):
        load_rows("gsm8k", "calibration", 10, 0)


def test_text_rows_train_on_every_token():
    tokenizer = make_tokenizer(400, 1)
    example = sft_example(Row(((None, "model layer neuron"),)), tokenizer, 100)
    assert example["labels"] == example["input_ids"] == tokenizer("model layer neuron")["input_ids"]
    assert len(sft_example(Row(((None, "model layer neuron"),)), tokenizer, 2)["labels"]) == 2


def test_rows_with_roles_train_on_the_assistant_only():
    tokenizer = make_tokenizer(400, 1)
    row = Row((("user", "plan"), ("assistant", "weight"), ("user", "cost"), ("assistant", "matrix")))
    example = sft_example(row, tokenizer, 100)
    text = "<|user|>plan<|end|><|assistant|>weight<|end|><|user|>cost<|end|><|assistant|>matrix<|end|>"
    assert tokenizer.decode(example["input_ids"]) == text
    learned = [token for token, label in zip(example["input_ids"], example["labels"], strict=True) if label == token]
    assert tokenizer.decode(learned) == "weight<|end|>matrix<|end|>"
    assert all(label in (-100, token) for token, label in zip(example["input_ids"], example["labels"], strict=True))


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="the public data folder is not on this machine")
def test_real_files_are_read():
    gsm8k = load_rows("gsm8k", "calibration", 10, 0, str(SHARED_DATA / "text/gsm8k/train.jsonl"))
    assert gsm8k[0].has_roles and "####" in gsm8k[0].messages[1][1]
    thai = load_rows("file", "held_out", 10**6, 0, str(SHARED_DATA / "text/thai/tatoeba_tha.jsonl"))
    assert len(thai) > 100 and not thai[0].has_roles
    paragraphs = load_rows(
        "file", "sft", 5, 0, str(SHARED_DATA / "text/general_english/wikitext2_valid_paragraphs.jsonl")
    )
    assert len(paragraphs) == 5
