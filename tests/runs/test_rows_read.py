"""Later stages know which rows an earlier stage read, and refuse to hold them out."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import run_main, sentences
from data_files import write
from stages import data_flags, fuse, pair_flags, train

import run_activs_and_hot as stage1
from core import train_hot_residual_sft as stage3
from core.data import DataSpec, Row, divide
from core.errors import UserError
from core.runs.rows_read import ROWS_READ, check_held_out, check_same_split, rows_read, write_rows_read
from evaluation import compare_arms

LONG = "A passage that is long enough to be told apart from a phrase that texts share by chance. " * 3


@pytest.fixture(scope="module")
def run(models, tmp_path_factory):
    """Plans, a fused model and two trainings of the pico pair on a file of texts, each with a passage of its own."""
    folder = tmp_path_factory.mktemp("seen")
    data = write(folder / "texts.jsonl", [{"text": f"{text}\n{text} {LONG}"} for text in sentences(150, 11)])
    pair = pair_flags(models)
    given = data_flags(data)
    run_main(stage1, *pair, *given, "--max-tokens", 24, "--out-dir", folder / "run/plans")
    fuse(folder / "run/plans", models, folder / "run/fused", "--feature-map", "regression", "--top-k", 7)
    for scenario in ("hot", "no_hot"):
        train(folder / "run/fused", folder / f"run/adapted/{scenario}/seed0", "--training-scenario", scenario)
    return folder / "run", Path(data), pair


def joined(data: Path, folder: Path, *readers: str) -> Path:
    """The file with one more row, which shares a passage with a held-out row and with rows of the parts `readers`.

    It joins their groups to one, and that group is held out.
    """
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
    expected = {part: divide(DataSpec("file", str(data))).marks(rows) for part, rows in parts.items()}
    plans, fused = (rows_read([folder / name]) for name in ("plans", "fused"))
    assert plans == fused == {"calibration": expected["calibration"]}
    for scenario in ("hot", "no_hot"):
        adapted = rows_read([folder / f"adapted/{scenario}/seed0"])
        assert adapted["calibration"] == plans["calibration"] and adapted["validation"] == expected["validation"]
        assert len({row.digest for row in parts["sft"]} & adapted["sft"]) == 8 and adapted["sft"] < expected["sft"]


def test_held_out_rows_that_a_stage_read_are_refused_by_count(run, fails, tmp_path):
    """One more row in the file joins groups of two parts. Only the record of the rows that were read shows it."""
    folder, data, pair = run
    out = tmp_path / "adapted"
    for part in ("calibration", "validation"):
        (tmp_path / part).mkdir()
        grown = joined(data, tmp_path / part, part)
        # The fourth of them is the new row, which shares passages with the three that were read.
        error = f"4 held-out rows of {grown} were read by an earlier stage ({part} 4), or share"
        given = data_flags(grown)
        assert error in fails(compare_arms, "--run-dir", folder, *pair, *given)
        assert not (folder / "results.json").exists()
        assert error in fails(compare_arms, "--run-dir", folder, *pair, *given[:-1], data, "--general-file", grown)
        if part == "calibration":
            assert error in fails(stage3, "--model_dir", folder / "fused", "--output_dir", out, *given)
            assert not out.exists()


def test_a_row_more_that_joins_nothing_changes_nothing(run, tmp_path, capsys):
    folder, data, pair = run
    shutil.copytree(folder, tmp_path / "run")
    grown = tmp_path / data.name
    grown.write_text(data.read_text("utf-8") + json.dumps({"text": "one text more"}) + "\n", "utf-8")
    general = write(tmp_path / "general.jsonl", [{"text": text} for text in sentences(60, 12)])
    given = [*data_flags(grown), "--general-file", general]
    run_main(compare_arms, "--run-dir", tmp_path / "run", *pair, *given)
    results = json.loads((tmp_path / "run/results.json").read_text())
    for name, path in (("held_out", str(grown)), ("general", general)):
        rows = divide(DataSpec("file", path)).parts["held_out"]
        assert results["near_duplicates"][name] == {"left_out": 0, "held_out": len(rows), "jaccard_at_least": 0.8}


def test_only_a_row_that_was_read_counts_whatever_its_case_and_system_prompt(tmp_path):
    def row(text, system=None):
        first = () if system is None else (("system", system),)
        return Row((*first, ("user", text), ("assistant", "a")), "g")

    division = divide(DataSpec("file", write(tmp_path / "t.jsonl", [{"text": "x"}])))
    write_rows_read(tmp_path, {"sft": division.marks([row("Read before")])})
    assert row("read  BEFORE", "be brief").digest in json.loads((tmp_path / ROWS_READ).read_text())["sft"]
    division.parts["held_out"] = [row("unread"), row("never read")]
    check_held_out(division, [tmp_path])
    division.parts["held_out"] += [row("READ before", "be brief")]
    with pytest.raises(UserError, match=r"1 held-out rows of .* \(sft 1\)"):
        check_held_out(division, [tmp_path])
    with pytest.raises(UserError, match=rf"{ROWS_READ} does not exist"):
        check_held_out(division, [tmp_path / "nothing"])


@pytest.mark.parametrize("asked", [12, 25])
def test_rows_of_a_passage_that_was_read_are_refused_when_its_group_falls_apart(tmp_path, asked):
    """A passage with ten questions makes a group. With more questions, among so few rows, it counts as a prompt."""
    records = [{"instruction": f"Question {n}?", "input": LONG, "output": "a"} for n in range(10)]
    before = divide(DataSpec("file", write(tmp_path / "few.jsonl", records)))
    (rows,) = filter(None, before.parts.values())
    write_rows_read(tmp_path, {"calibration": before.marks(rows)})
    more = [{**records[0], "instruction": f"Another question {n}?"} for n in range(asked)]
    after = divide(DataSpec("file", write(tmp_path / "many.jsonl", records + more)))
    assert len({row.group for found in after.parts.values() for row in found}) == 10 + asked
    after.parts["held_out"] = [row for row in after.parts["held_out"] if row not in rows]
    count = len(after.parts["held_out"])
    with pytest.raises(UserError, match=rf"{count} held-out rows .* \(calibration {count}\), or share a passage"):
        check_held_out(after, [tmp_path])
    # A passage that counted as a prompt when it was read is no mark. Where a column names the groups, no passage is.
    write_rows_read(tmp_path, {"calibration": after.marks(after.parts["calibration"])})
    check_held_out(after, [tmp_path])
    named = [{**record, "group": str(n)} for n, record in enumerate(records + more)]
    apart = divide(DataSpec("file", write(tmp_path / "named.jsonl", named)))
    write_rows_read(tmp_path, {"calibration": apart.marks(apart.parts["calibration"])})
    check_held_out(apart, [tmp_path])


def test_what_a_target_or_start_of_ours_was_made_with_is_recorded_and_refused(run, models, fails, tmp_path):
    """Also of a checkpoint without a residual, for which nothing else says that it was trained on rows of this data."""
    folder, data, pair = run
    trained = folder / "adapted/no_hot/seed0"
    given = data_flags(data)
    run_main(stage1, "--target-model", trained, *pair[2:], *given, "--max-tokens", 24, "--out-dir", tmp_path / "plans")
    assert rows_read([tmp_path / "plans"]) == rows_read([trained])
    train(trained, tmp_path / "again", *given, "--training-scenario", "no_hot", "--save-untrained-folded")
    assert rows_read([tmp_path / "again"]) == rows_read([trained]) == rows_read([tmp_path / "again-untrained"])
    other = ["--split-seed", 1, "--output_dir", tmp_path / "other"]
    error = fails(stage3, "--model_dir", trained, *given, *other, "--training-scenario", "no_hot")
    assert "were read by an earlier stage (" in error and not (tmp_path / "other").exists()


def test_another_split_of_the_same_data_is_refused_whatever_its_spelling(tmp_path, monkeypatch):
    path = write(tmp_path / "t.jsonl", [{"text": f"text {n}", "doc": n} for n in range(100)])
    made_from = divide(DataSpec("file", path)).identity([])
    monkeypatch.chdir(tmp_path)
    check_same_split(made_from, DataSpec("", "t.jsonl"), None)
    check_same_split(made_from, DataSpec("gsm8k", None, 1), None)
    for changed, error in (
        (DataSpec("", "t.jsonl", 1), "split_seed is 1, but the plans were made with 0"),
        (DataSpec("", "t.jsonl", 0, 200), "max_rows_read is 200, but the plans were made with 40000"),
        (DataSpec("", "t.jsonl", group_column="doc"), "group_column is doc, but the plans were made with None"),
    ):
        with pytest.raises(UserError, match=error):
            check_same_split(made_from, changed, None)
    hub = {**made_from, "subset": "medical", "file": None, "revision": "a" * 40}
    for same in (None, "a" * 40):
        check_same_split(hub, DataSpec("medical"), same)
    with pytest.raises(
        UserError, match=f"medical has the revision {'b' * 40}, but the plans were made with {'a' * 40}"
    ):
        check_same_split(hub, DataSpec("medical"), "b" * 40)
