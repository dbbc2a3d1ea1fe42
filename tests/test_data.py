"""Texts by name, the split, and that datasets/ never shadows the installed package."""

import json
import subprocess
import sys
from itertools import combinations

import pytest
from conftest import ROOT, SHARED_DATA

from core.data import check_same_split, data_identity, load_rows
from core.runs import UserError

PARTS = ("calibration", "sft", "validation", "held_out")


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
    parts = {part: load_rows("python_reference", part, 10**6, 0) for part in PARTS}
    groups = {part: {topics[row.plain] for row in rows} for part, rows in parts.items()}
    assert all(not groups[a] & groups[b] for a, b in combinations(PARTS, 2))
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
    parts = [set(load_rows("file", part, 100, 0, path)) for part in PARTS]
    assert [len(part) for part in parts] == [50, 25, 5, 20] and len(set.union(*parts)) == 100
    few = write(tmp_path / "few.jsonl", [{"text": f"text {n}", "group": n % 3} for n in range(30)])
    with pytest.raises(UserError, match=r"none of them in the validation part; .* --validation-samples 0"):
        load_rows("file", "validation", 1, 0, few)


def test_duplicates_are_left_out(tmp_path):
    path = write(tmp_path / "t.jsonl", [{"text": f"text {n % 50}"} for n in range(100)])
    assert sum(len(load_rows("file", part, 100, 0, path)) for part in PARTS) == 50


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


def test_another_split_of_the_same_file_is_refused_whatever_its_spelling(tmp_path, monkeypatch):
    path = write(tmp_path / "t.jsonl", [{"text": f"text {n}"} for n in range(100)])
    made_from = data_identity(load_rows("file", "calibration", 10, 0, path), "file", path, 0)
    monkeypatch.chdir(tmp_path)
    check_same_split(made_from, "", "t.jsonl", 0)
    check_same_split(made_from, "", None, 1)
    with pytest.raises(UserError, match="split_seed is 1, but the plans were made with 0"):
        check_same_split(made_from, "", "t.jsonl", 1)
