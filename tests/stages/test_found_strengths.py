"""Strengths that stage 2 finds: what it writes, and what stages 3 and 4 make of them."""

import json
import shutil

import pytest
import torch
from conftest import run_main
from safetensors.torch import load_file
from stages import data_flags, fuse, logits, pair_flags, train

from core import generate_hot_residual as stage2
from core.data import DataSpec, divide
from core.fusion.residual_file import load_residuals
from core.fusion.strengths import strength_of
from core.models.checkpoints import open_checkpoint
from core.training import strengths
from core.training.heldout import text_nll, trained_tokens
from core.training.hot_linear import fold_in_place
from core.training.sft import sft_example
from core.training.start import open_start
from core.training.strengths import Tried
from evaluation import compare_arms
from evaluation.pages.facts import settings_table
from evaluation.pages.run_files import RunFiles


def take_the_largest(patch):
    patch.setattr(strengths, "helps", lambda gain: True)
    total = property(lambda one: -1.0 if isinstance(one.alpha, dict) else -one.alpha * len(one.candidate))
    patch.setattr(Tried, "total", total)


@pytest.fixture(scope="module")
def found(plans, models, tmp_path_factory):
    """A checkpoint whose strengths stage 2 found. Nothing helps these random models, so the largest strength is taken
    for the best, and anchored rows for better than aligned ones."""
    folder = tmp_path_factory.mktemp("found")
    flags = ["--feature-map", "regression", "--top-k", 0, "--validation-samples", 16]
    with pytest.MonkeyPatch.context() as patch:
        take_the_largest(patch)
        return {
            alpha: fuse(plans["token"], models, folder / alpha / "fused", *flags, "--alpha", alpha, *more)
            for alpha, more in (("auto", ()), ("learned", ("--alpha-steps", 7, "--free-alpha")))
        }


@pytest.mark.parametrize("alpha", ["auto", "learned"])
def test_stage_2_writes_what_it_found(found, plans, models, tmp_path, alpha):
    folder = found[alpha]
    manifest, report = (json.loads((folder / name).read_text()) for name in ("manifest.json", "fusion_report.json"))
    residuals, strength, _ = load_residuals(folder / "hot_residual.safetensors")
    assert strength == manifest["strength"]["alpha"] == report["strength"]["alpha"]
    assert manifest["strength"]["sentence"] in (folder / "README.md").read_text()
    assert isinstance(strength, dict) == (alpha == "learned")
    weights, before = (load_file(one / "model.safetensors") for one in (folder, models["target"]))
    for residual in residuals:
        name = f"model.layers.{residual.layer}.self_attn.{residual.projection}_proj.weight"
        expected = torch.lerp(before[name], residual.weight, strength_of(strength, residual))
        assert torch.equal(weights[name], expected)
    assert manifest["strength"]["rows"] == "anchored"
    flags = ["--feature-map", "regression", "--top-k", 0, "--rows", "anchored", "--alpha", 0.2]
    anchored = fuse(plans["token"], models, tmp_path / "anchored", *flags)
    expected = load_residuals(anchored / "hot_residual.safetensors")[0]
    assert all(torch.equal(one.weight, other.weight) for one, other in zip(residuals, expected, strict=True))
    if alpha == "auto":
        assert (folder / "model.safetensors").read_bytes() == (anchored / "model.safetensors").read_bytes()
    assert json.loads((folder / "rows_read.json").read_text())["validation"]
    assert not (folder / "parts").exists()


def test_training_from_learned_strengths_keeps_them(found, tmp_path, caplog):
    start = open_start(str(found["learned"]))
    with torch.no_grad():  # what trains is the fused model
        unfolded = start.load(start.alpha)(torch.arange(40).reshape(2, 20)).logits
    assert torch.allclose(unfolded, logits(found["learned"]), atol=1e-5)
    assert not torch.allclose(unfolded, logits(found["auto"]), atol=1e-3)
    out = train(found["learned"], tmp_path / "a", "--learning-rate", "1e-12")
    old, new = (load_residuals(folder / "hot_residual.safetensors") for folder in (found["learned"], out))
    assert old[1] == new[1] and torch.allclose(logits(found["learned"]), logits(out), atol=1e-5)
    searched = train(found["learned"], tmp_path / "s", "--lr-search", "1e-12,1e-11")
    assert "| training | chosen alpha | one for each of 12 projections, from " in (searched / "README.md").read_text()
    assert "takes the place of" not in caplog.text
    other = train(found["learned"], tmp_path / "b", "--train-alpha", 0.5)
    assert "alpha 0.5 takes the place of the strength that stage 2 found (one for each of 12" in caplog.text
    assert load_residuals(other / "hot_residual.safetensors")[1] == 0.5


def test_controls_find_their_strengths_in_the_same_way(found, plans, models, texts, capsys, monkeypatch):
    take_the_largest(monkeypatch)
    run = found["learned"].parent
    flags = ["--run-dir", run, "--hot-dir", plans["token"], *pair_flags(models), *data_flags(texts), "--max-tokens", 24]
    run_main(compare_arms, *flags)
    results = json.loads((run / "results.json").read_text())
    of_controls, losses = results["strengths"], results["per_text"]
    assert of_controls.keys() >= {"permuted", "self", "damped_mean"}
    assert all(isinstance(one["alpha"], dict) for one in of_controls.values())
    assert all(losses[control] != losses["base"] for control in of_controls)
    told = capsys.readouterr().out
    assert "Strengths of the controls were found in the same way, on the validation rows" in told
    sentence = json.loads((run / "fused/manifest.json").read_text())["strength"]["sentence"]
    assert f"\n{sentence}.\n" in told
    run_main(compare_arms, *flags, "--controls", "few", "--dtype", "bfloat16")  # losses are, strengths are as fused
    again = json.loads((run / "results.json").read_text())["strengths"]
    assert again == {control: of_controls[control] for control in again} and again.keys() >= {"permuted", "self"}


def test_learned_strengths_can_be_an_arm_beside_a_chosen_one(found, plans, models, texts, capsys, monkeypatch):
    """Without a checkpoint: what was fused, with strengths that stage 4 learns as stage 2 would."""
    take_the_largest(monkeypatch)
    run = found["auto"].parent
    flags = ["--run-dir", run, "--hot-dir", plans["token"], *pair_flags(models), *data_flags(texts), "--max-tokens", 24]
    run_main(compare_arms, *flags, "--controls", "few", "--learned-arm")
    results = json.loads((run / "results.json").read_text())
    arm = results["strengths"]["fused_learned"]
    residuals, chosen, form = load_residuals(found["auto"] / "hot_residual.safetensors")
    assert arm["alpha"].keys() == {one.name for one in residuals} and chosen == 0.2
    target = open_checkpoint(str(models["target"]))
    model, tokenizer = target.load_model("float32"), target.load_tokenizer()
    fold_in_place(model, residuals, target.layout.name, arm["alpha"], form)
    rows = divide(DataSpec("file", str(texts))).rows("held_out", 64)
    examples = [one for row in rows if trained_tokens([one := sft_example(row, tokenizer, 24)]) != [0]]
    assert results["per_text"]["fused_learned"]["held_out"] == pytest.approx(
        text_nll(model, examples, 64, "x"), rel=1e-4
    )
    assert list(results["arms"])[-2:] == ["fused_learned", "fused"]
    assert "fused_learned has learned strengths (" in capsys.readouterr().out
    settings = {name: value for name, value, _ in settings_table(RunFiles.read(run))}
    assert (settings["controls"], settings["learned_arm"]) == ("few", "True")  # what the verdict rests on
    run_main(compare_arms, *flags, "--controls", "few")
    assert "fused_learned" not in json.loads((run / "results.json").read_text())["arms"]


def test_strengths_are_not_found_on_rows_that_the_plans_were_not_made_from(plans, texts, tmp_path, fails):
    """Calibration rows that are others by now could be validation rows of before, and the other way round."""
    flags = ["--output-dir", tmp_path / "f", "--feature-map", "regression", "--alpha", "auto"]
    changed = tmp_path / "changed.jsonl"
    changed.write_text("".join(sorted(texts.read_text("utf-8").splitlines(True))[10:]), "utf-8")
    line = fails(stage2, "--hot-dir", plans["token"], *data_flags(changed), *flags)
    assert "the calibration rows are not those" in line and "run stage 1 again" in line
    other = tmp_path / "plans"
    shutil.copytree(plans["token"], other)
    division = divide(DataSpec("file", str(texts)))
    read = json.loads((other / "rows_read.json").read_text())
    read["calibration"] += [row.digest for row in division.parts["validation"][:2]]
    (other / "rows_read.json").write_text(json.dumps(read))
    line = fails(stage2, "--hot-dir", other, *flags, "--validation-samples", 16)
    assert "validation rows" in line and "were calibration rows of" in line and "run all stages again" in line


def test_validation_rows_are_needed(plans, models, tmp_path, fails):
    flags = ["--hot-dir", plans["token"], "--output-dir", tmp_path / "f", "--feature-map", "regression"]
    assert "give --validation-samples" in fails(stage2, *flags, "--alpha", "auto", "--validation-samples", 0)
    assert "rows difference adds" in fails(stage2, *flags, "--rows", "difference", "--residual-form", "additive")
    assert "expected a number from 0 to 1, or auto, or learned" in fails(stage2, *flags, "--alpha", "2")
    assert "expected float or auto or learned" in fails(stage2, *flags, "--alpha", "most")
