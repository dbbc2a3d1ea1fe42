"""Rows that a stage read are known to the later ones, which refuse to hold them out."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import run_main, sentences
from stages import fuse, train
from test_data import write

import run_activs_and_hot as stage1
from core import train_hot_residual_sft as stage3
from core.data import DataSpec, Row, divide
from core.runs import UserError
from core.seen_rows import ROWS_READ, check_held_out, check_same_split, rows_read, write_rows_read
from evaluation import compare_arms

LONG = "A passage that is long enough to be told apart from a phrase that texts share by chance. " * 3


@pytest.fixture(scope="module")
def run(models, tmp_path_factory):
    """Plans, fused model and two trainings of the pico pair on a file of texts with two passages to be joined later."""
    folder = tmp_path_factory.mktemp("seen")
    data = write(folder / "texts.jsonl", [{"text": f"{text}\n{text} {LONG}"} for text in sentences(150, 11)])
    pair = ["--target-model", models["target"], "--source-model", models["source"]]
    given = ["--data-subset", "file", "--data-file", data]
    run_main(stage1, *pair, *given, "--max-tokens", 24, "--out-dir", folder / "run/plans")
    fuse(folder / "run/plans", models, folder / "run/fused", "--feature-map", "regression", "--top-k", 7)
    for scenario in ("hot", "no_hot"):
        train(folder / "run/fused", folder / f"run/adapted/{scenario}/seed0", "--training-scenario", scenario)
    return folder / "run", Path(data), pair


def joined(data: Path, folder: Path, *readers: str) -> Path:
    """The file with one row more, which shares a passage with a held-out row and with the rows that `readers` read, so
    that their groups become one, and that one is held out."""
    records = [json.loads(line) for line in data.read_text("utf-8").splitlines()]
    parts = divide(DataSpec("file", str(data))).parts
    held_out = sorted(parts["held_out"], key=lambda row: row.group)
    for one in held_out:  # the name of the joined group is the smaller one
        others = [row for part in readers for row in parts[part] if row.group > one.group]
        if len(others) >= 3:
            break
    text = "\n".join(row.plain.split("\n")[1] for row in (one, *others[:3]))
    (folder / "grown").mkdir()
    return Path(write(folder / "grown" / data.name, [*records, {"text": text}]))


def test_every_folder_records_the_rows_it_was_made_with(run):
    folder, data, _ = run
    parts = divide(DataSpec("file", str(data))).parts
    expected = {part: {row.digest for row in rows} for part, rows in parts.items()}
    plans, fused = (rows_read([folder / name]) for name in ("plans", "fused"))
    assert plans == fused == {"calibration": expected["calibration"]}
    for scenario in ("hot", "no_hot"):
        adapted = rows_read([folder / f"adapted/{scenario}/seed0"])
        assert adapted["calibration"] == plans["calibration"] and adapted["validation"] == expected["validation"]
        assert len(adapted["sft"]) == 8 and adapted["sft"] < expected["sft"]


def test_held_out_rows_that_a_stage_read_are_refused_by_count(run, fails, tmp_path):
    """One row more in the file joins groups of two parts; without the record of the rows nothing would tell."""
    folder, data, pair = run
    out = tmp_path / "adapted"
    for part in ("calibration", "validation"):
        (tmp_path / part).mkdir()
        grown = joined(data, tmp_path / part, part)
        told = f"3 held-out rows of {grown} were read by an earlier stage ({part} 3): the data has changed since"
        given = ["--data-subset", "file", "--data-file", grown]
        assert told in fails(compare_arms, "--run-dir", folder, *pair, *given)
        assert not (folder / "results.json").exists()
        assert told in fails(compare_arms, "--run-dir", folder, *pair, *given[:-1], data, "--general-file", grown)
        if part == "calibration":
            assert told in fails(stage3, "--model_dir", folder / "fused", "--output_dir", out, *given)
            assert not out.exists()


def test_a_row_more_that_joins_nothing_changes_nothing(run, tmp_path, capsys):
    folder, data, pair = run
    shutil.copytree(folder, tmp_path / "run")
    grown = tmp_path / data.name
    grown.write_text(data.read_text("utf-8") + json.dumps({"text": "one text more"}) + "\n", "utf-8")
    run_main(compare_arms, "--run-dir", tmp_path / "run", *pair, "--data-subset", "file", "--data-file", grown)
    results = json.loads((tmp_path / "run/results.json").read_text())
    rows = divide(DataSpec("file", str(grown))).parts["held_out"]
    assert results["near_duplicates"] == {"left_out": 0, "held_out": len(rows), "jaccard_at_least": 0.8}


def test_only_a_row_that_was_read_counts_whatever_its_case_and_system_prompt(tmp_path):
    def row(text, system=None):
        first = () if system is None else (("system", system),)
        return Row((*first, ("user", text), ("assistant", "a")), "g")

    write_rows_read(tmp_path, {"sft": [row("Read before")]})
    assert json.loads((tmp_path / ROWS_READ).read_text()) == {"sft": [row("read  BEFORE", "be brief").digest]}
    division = divide(DataSpec("file", write(tmp_path / "t.jsonl", [{"text": "x"}])))
    division.parts["held_out"] = [row("unread"), row("never read")]
    check_held_out(division, [tmp_path])
    division.parts["held_out"] += [row("READ before", "be brief")]
    with pytest.raises(UserError, match=r"1 held-out rows of .* \(sft 1\)"):
        check_held_out(division, [tmp_path])
    with pytest.raises(UserError, match=rf"{ROWS_READ} does not exist"):
        check_held_out(division, [tmp_path / "nothing"])


def test_another_split_of_the_same_data_is_refused_whatever_its_spelling(tmp_path, monkeypatch):
    path = write(tmp_path / "t.jsonl", [{"text": f"text {n}", "doc": n} for n in range(100)])
    made_from = divide(DataSpec("file", path)).identity([])
    monkeypatch.chdir(tmp_path)
    check_same_split(made_from, DataSpec("", "t.jsonl"), None)
    check_same_split(made_from, DataSpec("gsm8k", None, 1), None)
    for changed, told in (
        (DataSpec("", "t.jsonl", 1), "split_seed is 1, but the plans were made with 0"),
        (DataSpec("", "t.jsonl", 0, 200), "max_samples is 200, but the plans were made with 40000"),
        (DataSpec("", "t.jsonl", group_column="doc"), "group_column is doc, but the plans were made with None"),
    ):
        with pytest.raises(UserError, match=told):
            check_same_split(made_from, changed, None)
    hub = {**made_from, "subset": "medical", "file": None, "revision": "a" * 40}
    for same in (None, "a" * 40):
        check_same_split(hub, DataSpec("medical"), same)
    with pytest.raises(
        UserError, match=f"medical has the revision {'b' * 40}, but the plans were made with {'a' * 40}"
    ):
        check_same_split(hub, DataSpec("medical"), "b" * 40)
