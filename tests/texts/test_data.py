"""Reading data: the folder datasets/ and the package of that name, the Python reference, files and their columns."""

import difflib
import inspect
import os
import subprocess
import sys
from collections import Counter
from itertools import combinations

import pytest
from conftest import ROOT, SHARED_DATA
from data_files import ROLES, all_rows, fake_hub, write

from core.data import DataSpec, divide, load_rows
from core.errors import UserError

SHOWN = "import core.data, datasets; print(datasets.__file__)"


@pytest.mark.parametrize(
    ("folder", "how"),
    [
        (ROOT, "-c"),
        (ROOT / "scripts", "-c"),
        (ROOT, "-m"),
        (ROOT / "core", "-m"),
        (ROOT / "scripts", "script"),
    ],
)
def test_installed_datasets_is_not_shadowed(folder, how, tmp_path):
    """From the root and other folders; as code, as a module (`python -m`), as a script."""
    (tmp_path / "shows.py").write_text(SHOWN)
    arguments = {"-c": ["-c", SHOWN], "-m": ["-m", "shows"], "script": [str(tmp_path / "shows.py")]}[how]
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(tmp_path)))},
    )
    assert not done.stdout.strip().startswith(str(ROOT / "datasets")) and done.stdout.strip().endswith("__init__.py")


def test_installed_datasets_is_not_shadowed_under_pytest():
    import datasets

    assert str(ROOT / "datasets") in sys.path  # core.data is imported
    assert not datasets.__file__.startswith(str(ROOT / "datasets")) and datasets.Dataset


@pytest.fixture(scope="module")
def reference():
    return divide(DataSpec("python_reference"))


def test_python_reference_is_split_by_topic_and_module(reference):
    parts = reference.parts
    groups = {part: {row.group for row in rows} for part, rows in parts.items()}
    assert all(not groups[a] & groups[b] for a, b in combinations(parts, 2))
    everything = [row.plain for rows in parts.values() for row in rows]
    assert len(everything) == len(set(everything)) > 1500 and min(map(len, everything)) >= 200
    kinds = Counter(name.split()[0] for found in groups.values() for name in found)
    assert kinds["topic"] > 40 and kinds["module"] > 100
    for part, wanted, least in (
        ("calibration", 160, 40),
        ("sft", 96, 30),
        ("validation", 32, 20),
        ("held_out", 64, 25),
    ):
        rows = reference.rows(part, wanted)  # the demo's counts
        assert len(rows) == wanted and len({row.group for row in rows}) >= least


def test_python_reference_texts_that_share_a_paragraph_stay_together(reference):
    from pydoc_data.topics import topics

    group = {row.plain: row.group for rows in reference.parts.values() for row in rows}
    for content in topics.values():
        found = {group[p.strip()] for p in content.split("\n\n") if p.strip() in group}
        assert len(found) <= 1
    paragraphs = [p.strip() for p in inspect.getdoc(difflib.SequenceMatcher).split("\n\n")]
    assert {group[p] for p in paragraphs if p in group} == {"module difflib"}


def test_prose_about_benchmarks_has_enough_groups_and_no_lists_or_addresses():
    for seed in range(3):
        parts = divide(DataSpec("benchmark_prose", split_seed=seed)).parts
        assert len({row.group for row in parts["held_out"]}) >= 20  # so that intervals on it are not rough
    texts = [row.plain for rows in parts.values() for row in rows]
    assert len(texts) > 120 and min(map(len, texts)) >= 200
    assert not any(mark in text for text in texts for mark in ("http:", "https:", "\n- ", "|", "@inproceedings"))


def test_a_python_without_lm_eval_says_so(monkeypatch):
    import dataset_general_texts

    monkeypatch.setattr(dataset_general_texts, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="benchmark_prose: this Python has no lm_eval"):
        divide(DataSpec("benchmark_prose"))


def test_a_python_without_its_sources_is_an_error(monkeypatch, tmp_path):
    import dataset_general_texts

    monkeypatch.setattr(dataset_general_texts.sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(UserError, match="no source files of the standard library in "):
        divide(DataSpec("python_reference"))


def test_duplicates_are_left_out(tmp_path):
    path = write(tmp_path / "t.jsonl", [{"text": f"text {n % 50}"} for n in range(100)])
    assert len(all_rows("file", path)) == 50


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
        divide(DataSpec("file", str(path)))


def test_missing_and_unknown_data(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        divide(DataSpec("file", str(tmp_path / "none.jsonl")))
    with pytest.raises(UserError, match="needs --data-file"):
        divide(DataSpec("file"))
    with pytest.raises(UserError, match="expected one of python_reference, benchmark_prose, medical"):
        divide(DataSpec("gsm9k"))


@pytest.mark.parametrize(("record", "messages"), ROLES)
def test_columns_become_messages(tmp_path, record, messages):
    path = write(tmp_path / "r.jsonl", [record])
    assert [row.messages for row in all_rows("file", path)] == [messages]


def test_unknown_roles_are_refused_in_a_file_and_left_out_of_a_hub_data_set(tmp_path, monkeypatch):
    odd = {"messages": [{"role": "narrator", "content": "x"}]}
    path = write(tmp_path / "r.jsonl", [odd])
    with pytest.raises(UserError, match="row 1 has the role 'narrator'; expected one of human"):
        divide(DataSpec("file", path))
    fake_hub(monkeypatch, [odd, *({"messages": [{"role": "user", "content": f"x {n}"}]} for n in range(20))])
    assert len(all_rows("indonesian")) == 20


def test_files_may_mix_columns_and_unknown_turns_are_an_error(tmp_path):
    records = []
    for n in range(20):
        records += [
            {"text": f"t{n}", "group": None},
            {"instruction": f"q{n}", "output": "a", "system": " "},
            {"conversations": [{"from": "human", "value": f"c{n}"}]},
        ]
    path = write(tmp_path / "m.jsonl", records)
    rows = all_rows("file", path)
    found = [row.messages for row in rows]
    expected = {((None, f"t{n}"),) for n in range(20)} | {(("user", f"c{n}"),) for n in range(20)}
    assert set(found) == expected | {(("user", f"q{n}"), ("assistant", "a")) for n in range(20)} and len(found) == 60
    assert len({row.group for row in rows}) == 60  # an empty group is not a group that rows have in common
    path = write(tmp_path / "s.jsonl", [{"conversations": ["hi", "there"]}])
    with pytest.raises(UserError, match="row 1 has the columns conversations; expected messages"):
        divide(DataSpec("file", path))


def texts_of(path):
    return {row.plain for row in all_rows("file", str(path))}


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
    seeds = [{row.plain for row in all_rows("file", path, seed, 100)} for seed in (0, 1)]
    assert [len(found) for found in seeds] == [100, 100] and seeds[0] != seeds[1]
    assert len(load_rows(DataSpec("file", path), "sft", 20)) == 20
    assert "20 of " in caplog.text and "characters on average" in caplog.text and caplog.text.count("  e.g. text ") == 3


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="the public data folder is not on this machine")
def test_real_files_are_read():
    gsm8k = load_rows(DataSpec("gsm8k", str(SHARED_DATA / "text/gsm8k/test.jsonl")), "calibration", 10)
    assert gsm8k[0].has_roles and "####" in gsm8k[0].messages[1][1]
    thai = load_rows(DataSpec("file", str(SHARED_DATA / "text/thai/tatoeba_tha.jsonl")), "held_out", 10**6)
    assert len(thai) > 80 and not thai[0].has_roles


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="the public data folder is not on this machine")
def test_no_passage_of_tatqa_is_in_two_parts():
    """Many questions are asked about each passage, and no column says which rows share a passage."""
    division = divide(DataSpec("file", str(SHARED_DATA / "text/finance/tatqa.jsonl")))
    passages = {
        part: {row.messages[0][1].partition("\n\n")[2] for row in rows} for part, rows in division.parts.items()
    }
    assert all(not passages[a] & passages[b] for a, b in combinations(passages, 2))
    assert len(set().union(*passages.values())) > 300
    assert len({row.group for row in division.rows("held_out", 64)}) == 64
