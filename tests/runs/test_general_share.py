"""A share of the calibration texts is general text: every stage reads the same ones, and none of them is held out."""

import json

import pytest
from conftest import run_main, sentences
from data_files import write
from stages import data_flags, fuse, pair_flags, plan, plan_flags

import run_activs_and_hot as stage1
from core import generate_hot_residual as stage2
from core.data import DataSpec, divide
from core.files import read_json
from core.fusion.residual_file import RESIDUAL_FILE, load_residuals
from core.models.checkpoints import open_checkpoint
from core.runs.rows_read import rows_read
from core.training import strengths
from evaluation import compare_arms

SHARE, SAMPLES = 0.25, 40
# Stage 2 learns strengths: 5 steps of 8 texts read each of the 40 calibration texts once.
LEARNED = (
    *("--feature-map", "regression", "--top-k", "0", "--rows", "aligned"),
    *("--alpha", "learned", "--alpha-steps", "5", "--validation-samples", "10"),
)


@pytest.fixture(scope="module")
def general(tmp_path_factory):
    return write(tmp_path_factory.mktemp("general") / "general.jsonl", [{"text": text} for text in sentences(90, 77)])


@pytest.fixture(scope="module")
def mixed(models, texts, general, tmp_path_factory):
    flags = ("--calibration-samples", SAMPLES, "--general-share", SHARE, "--general-file", general)
    return plan(models, texts, tmp_path_factory.mktemp("mixed") / "plans", *flags)


def rows_of(file, part, count):
    return divide(DataSpec("file", str(file))).rows(part, count)


def test_both_models_read_the_share_of_general_texts(mixed, texts, general):
    own, added = rows_of(texts, "calibration", 30), rows_of(general, "calibration", 10)
    data = read_json(mixed / "manifest.json")["inputs"]["data"]
    assert (data["rows"], data["general"]["rows"], data["general"]["file"]) == (30, 10, general)
    assert {row.digest for row in own + added} <= rows_read([mixed])["calibration"]
    assert read_json(mixed / "manifest.json")["rows"] == 40  # one for each text


def test_strengths_are_learned_on_all_of_them(mixed, models, general, tmp_path, monkeypatch):
    read = []
    real = strengths.StrengthSearch._backward
    monkeypatch.setattr(strengths.StrengthSearch, "_backward", lambda *given: read.extend(given[1]) or real(*given))
    out = fuse(mixed, models, tmp_path / "fused", *LEARNED)
    tokenizer = open_checkpoint(str(models["target"])).load_tokenizer()
    added = {tuple(tokenizer(row.plain)["input_ids"][:24]) for row in rows_of(general, "calibration", 10)}
    assert len(read) == 40 and len({tuple(one["input_ids"]) for one in read} & added) == 10
    assert load_residuals(out / RESIDUAL_FILE)[0]
    assert "10 texts of `general.jsonl`" in (out / "README.md").read_text("utf-8")


def test_general_texts_that_have_changed_are_refused(mixed, models, tmp_path, fails):
    """The manifest is made to name another file, as if the texts in the file had been replaced."""
    record = read_json(mixed / "manifest.json")
    changed = write(tmp_path / "changed.jsonl", [{"text": text} for text in sentences(90, 78)])
    record["inputs"]["data"]["general"]["file"] = changed
    other = tmp_path / "other"
    other.mkdir()
    for path in mixed.iterdir():
        if path.name != "manifest.json":
            (other / path.name).symlink_to(path)
    (other / "manifest.json").write_text(json.dumps(record), "utf-8")
    flags = ("--hot-dir", other, *pair_flags(models), *LEARNED, "--output-dir", tmp_path / "fused")
    assert "the calibration rows are not those that" in fails(stage2, *flags)


def test_general_texts_that_were_read_are_not_held_out(mixed, models, texts, general, tmp_path, fails):
    fuse(mixed, models, tmp_path / "fused", "--feature-map", "regression", "--alpha", "0.1", "--top-k", "0")
    flags = ["--run-dir", tmp_path, "--hot-dir", mixed, *pair_flags(models), *data_flags(texts)]
    few = ["--controls", "few", "--held-out-samples", "10"]
    run_main(compare_arms, *flags, *few, "--general-file", general)
    found = read_json(tmp_path / "results.json")
    assert found["general"]["texts"] == 10 and found["inputs"]["general"]["file"] == general
    # The same texts in groups with other names, so that some calibration texts are in the held-out part.
    held_out = [row.plain for row in rows_of(general, "calibration", 40)]
    leaked = write(tmp_path / "leaked.jsonl", [{"text": text, "group": f"g{n}"} for n, text in enumerate(held_out)])
    assert "were read by an earlier stage" in fails(compare_arms, *flags, *few, "--general-file", leaked)


def test_a_share_without_general_text_is_refused(models, texts, tmp_path, fails):
    error = fails(stage1, *plan_flags(models, texts, tmp_path / "plans", "--general-share", "0.5"))
    assert "general_share is 0.5, but no general text is given; name it with --general-subset" in error
    assert not (tmp_path / "plans").exists()
