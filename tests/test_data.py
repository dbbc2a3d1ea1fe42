"""Texts by name, the split, and that datasets/ never shadows the installed package."""

import json
import os
import subprocess
import sys
from itertools import combinations

import pytest
from conftest import ROOT, SHARED_DATA

from core.data import SOURCES, check_same_split, data_identity, load_rows
from core.runs import UserError

PARTS = ("calibration", "sft", "validation", "held_out")


def write(path, records):
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf-8")
    return str(path)


SHOWN = "import core.data, datasets; print(datasets.__file__)"


@pytest.mark.parametrize(("folder", "how"), [
    (ROOT, "-c"), (ROOT / "scripts", "-c"), (ROOT, "-m"), (ROOT / "core", "-m"), (ROOT / "scripts", "script"),
])  # fmt: skip
def test_installed_datasets_is_not_shadowed(folder, how, tmp_path):
    """From the root and other folders; as code, as a module (`python -m`), as a script."""
    (tmp_path / "shows.py").write_text(SHOWN)
    arguments = {"-c": ["-c", SHOWN], "-m": ["-m", "shows"], "script": [str(tmp_path / "shows.py")]}[how]
    done = subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True, check=True,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(tmp_path)))})  # fmt: skip
    assert not done.stdout.strip().startswith(str(ROOT / "datasets")) and done.stdout.strip().endswith("__init__.py")


def test_installed_datasets_is_not_shadowed_under_pytest():
    import datasets

    assert str(ROOT / "datasets") in sys.path  # core.data is imported
    assert not datasets.__file__.startswith(str(ROOT / "datasets")) and datasets.Dataset


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
        ("a.jsonl", '{"body": "one"}\n', r"columns body; expected messages \(or conversations\), instruction"),
        ("a.jsonl", '{"text": \n', r"a\.jsonl cannot be read"),
        ("a.pdf", "x", r"suffix \.pdf; expected one of \.jsonl"),
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
    with pytest.raises(UserError, match="expected one of python_reference, medical, finance"):
        load_rows("gsm9k", "calibration", 10, 0)


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_without_a_hub_every_source_says_what_to_do(name, monkeypatch, tmp_path):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(UserError, match=rf"{name} \({SOURCES[name].hub_id}\) cannot be read: .*hf auth login.*"
                       r"--data-file"):  # fmt: skip
        load_rows(name, "calibration", 10, 0)


ROLES = [
    ({"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"},
                   {"role": "assistant", "content": "a"}]}, (("system", "s"), ("user", "q"), ("assistant", "a"))),
    ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
     (("user", "q"), ("assistant", "a"))),
    ({"instruction": "q", "input": "i", "output": "a", "text": "all of it"}, (("user", "q\n\ni"), ("assistant", "a"))),
    ({"instruction": "q", "input": "", "output": "a"}, (("user", "q"), ("assistant", "a"))),
    ({"instruction": "q", "output": "a", "system": "s"}, (("system", "s"), ("user", "q"), ("assistant", "a"))),
    ({"system": "", "user": "q", "assistant": "a"}, (("user", "q"), ("assistant", "a"))),
    ({"question": "q", "answer": "a"}, (("user", "q"), ("assistant", "a"))),
    ({"text": "t", "label": "x"}, ((None, "t"),)),
]  # fmt: skip


@pytest.mark.parametrize(("record", "messages"), ROLES)
def test_columns_become_messages(tmp_path, record, messages):
    path = write(tmp_path / "r.jsonl", [record])
    assert load_rows("file", "calibration", 10, 0, path)[0].messages == messages


def test_unknown_roles_are_refused_in_a_file_and_left_out_of_a_hub_data_set(tmp_path, monkeypatch):
    odd = {"messages": [{"role": "narrator", "content": "x"}]}
    path = write(tmp_path / "r.jsonl", [odd])
    with pytest.raises(UserError, match="row 1 has the role 'narrator'; expected one of human"):
        load_rows("file", "calibration", 10, 0, path)
    fake_hub(monkeypatch, [odd, *({"messages": [{"role": "user", "content": f"x {n}"}]} for n in range(20))])
    assert sum(len(load_rows("indonesian", part, 99, 0)) for part in PARTS) == 20


def test_files_may_mix_columns_and_odd_turns_are_told(tmp_path):
    records = []
    for n in range(20):
        records += [{"text": f"t{n}", "group": None}, {"instruction": f"q{n}", "output": "a", "system": " "},
                    {"conversations": [{"from": "human", "value": f"c{n}"}]}]  # fmt: skip
    path = write(tmp_path / "m.jsonl", records)
    found = [row.messages for part in PARTS for row in load_rows("file", part, 99, 0, path)]
    expected = {((None, f"t{n}"),) for n in range(20)} | {(("user", f"c{n}"),) for n in range(20)}
    assert set(found) == expected | {(("user", f"q{n}"), ("assistant", "a")) for n in range(20)} and len(found) == 60
    assert len(load_rows("file", "calibration", 99, 0, path)) == 30  # no group is no group in common
    path = write(tmp_path / "s.jsonl", [{"conversations": ["hi", "there"]}])
    with pytest.raises(UserError, match="row 1 has the columns conversations; expected messages"):
        load_rows("file", "calibration", 10, 0, path)


def texts_of(path, parts=PARTS):
    return {row.plain for part in parts for row in load_rows("file", part, 1000, 0, str(path))}


def test_folders_and_saved_data_sets_are_read(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    records = [{"text": f"text {n}"} for n in range(40)]
    expected = {record["text"] for record in records}
    data = datasets.Dataset.from_list(records)
    data.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(tmp_path / "both")
    datasets.DatasetDict({"dev": data}).save_to_disk(tmp_path / "dev")
    (tmp_path / "files").mkdir()
    write(tmp_path / "files/a.jsonl", records[:20])
    write(tmp_path / "files/b.jsonl", records[20:])
    assert texts_of(tmp_path / "saved") == texts_of(tmp_path / "both") == texts_of(tmp_path / "files") == expected
    with pytest.raises(UserError, match="has the splits dev; give the folder of one of them"):
        texts_of(tmp_path / "dev")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no such file; expected one of"):
        texts_of(tmp_path / "empty")


def test_at_most_so_many_rows_are_read_in_a_seeded_order(tmp_path, caplog):
    caplog.set_level("INFO")
    path = write(tmp_path / "t.jsonl", [{"text": f"text {n}"} for n in range(400)])
    seeds = [{row.plain for part in PARTS for row in load_rows("file", part, 400, seed, path, 100)} for seed in (0, 1)]
    assert [len(found) for found in seeds] == [100, 100] and seeds[0] != seeds[1]
    assert "characters on average" in caplog.text and caplog.text.count("  e.g. text ") == 8 * 3
    made_from = data_identity([], "file", path, 0, 100)
    with pytest.raises(UserError, match="max_samples is 200, but the plans were made with 100"):
        check_same_split(made_from, "file", path, 0, 200)


def fake_hub(monkeypatch, records):
    """`datasets.load_dataset` with a data set of these records; returns what was asked for."""
    import datasets

    asked = []

    real = datasets.load_dataset

    def load(hub_id, config=None, split=None, streaming=False, **local):
        if local:
            return real(hub_id, split=split, **local)
        asked.append((hub_id, config, split, streaming))
        data = datasets.Dataset.from_list(records)
        return data.to_iterable_dataset() if streaming else data

    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_every_source_reads_its_own_schema(name, monkeypatch, caplog):
    schemas = {"medical": ROLES[2][0], "finance": ROLES[5][0], "cantonese": ROLES[4][0], "indonesian": ROLES[0][0],
               "malay": ROLES[0][0], "gsm8k": ROLES[6][0], "alpaca": ROLES[2][0]}  # fmt: skip
    record = schemas.get(name, {"text": "t"})
    asked = fake_hub(monkeypatch, [json.loads(json.dumps(record).replace('"a"', f'"a {n}"').replace('"t"', f'"t {n}"'))
                                   for n in range(60)])  # fmt: skip
    parts = [load_rows(name, part, 100, 0, None, 40) for part in PARTS]
    assert [len(part) for part in parts] == [20, 10, 2, 8]
    source = SOURCES[name]
    assert set(asked) == {(source.hub_id, source.config, source.split, source.streaming)}
    assert parts[0][0].has_roles == ("text" not in record or len(record) > 2)


def test_wikitext_has_no_headings_and_hub_rows_without_text_are_left_out(monkeypatch, caplog):
    caplog.set_level("INFO")
    fake_hub(monkeypatch, [{"text": t} for t in (" = Heading = ", "", *(f" line {n} " for n in range(20)))])
    assert {row.plain for part in PARTS for row in load_rows("wikitext", part, 99, 0)} == {
        f"line {n}" for n in range(20)
    }
    fake_hub(monkeypatch, [{"question": "q", "answer": f"a {n}" if n else " "} for n in range(21)])
    assert sum(len(load_rows("gsm8k", part, 99, 0)) for part in PARTS) == 20
    assert "1 rows without a text" in caplog.text


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
