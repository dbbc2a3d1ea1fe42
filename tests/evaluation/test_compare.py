"""The command that compares arms, on a run in which all stages have finished."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import run_main
from safetensors.torch import load_file, save_file
from stages import data_flags, fuse, pair_flags, train

import run_activs_and_hot as stage1
from core.errors import UserError
from core.fusion.controls import CONTROLS
from core.fusion.residual_file import load_residuals
from core.models.checkpoints import open_checkpoint, open_pair
from core.runs.card import RESULTS_BEGIN, RESULTS_END
from core.runs.plan_directory import PlanDirectory
from core.training.heldout import text_nll, token_losses
from evaluation import compare_arms
from evaluation.arms import models as arm_models
from evaluation.arms import samples
from evaluation.arms.models import Arms
from evaluation.arms.run import TRAINED, Run
from evaluation.arms.spans import ByteSpans
from evaluation.arms.texts import TextSet
from evaluation.evaluated_model import NotFiniteError

# The rows of the table, and the models that are measured: each training has two seeds.
ARMS = ("base", *(control for control in CONTROLS if control != "random_source"), "fused", *TRAINED)
MEASURED = [*ARMS[: -len(TRAINED)], *(f"{arm}/seed{n}" for arm in TRAINED for n in (0, 1))]


@pytest.fixture(scope="module")
def run(models, texts, tmp_path_factory):
    """A run directory in which all stages have finished for the pico pair, and the flags of stage 4 for it."""
    folder, flags = tmp_path_factory.mktemp("run"), [*pair_flags(models), *data_flags(texts)]
    run_main(stage1, *flags, "--pooling", "token", "--out-dir", folder / "plans")
    fused = fuse(folder / "plans", models, folder / "fused", "--feature-map", "regression", "--top-k", 7)
    for scenario in ("hot", "no_hot", "distill"):
        for seed in (0, 1):
            out = folder / "adapted" / scenario / f"seed{seed}"
            train(fused, out, "--training-scenario", scenario, "--seed", seed, "--learning-rate", "1e-3")
    return folder, ["--run-dir", folder, *flags, "--general-file", texts]


def test_command_writes_results_and_reuses_finished_arms(run, monkeypatch, capsys):
    folder, flags = run
    run_main(compare_arms, *flags)
    table = capsys.readouterr().out
    results = json.loads((folder / "results.json").read_text())
    assert list(results["arms"]) == list(ARMS) and list(results["per_text"]) == MEASURED
    assert {"nll", "ppl", "n", "diff", "ci95"} <= set(results["arms"]["fused"])
    assert all(arm in table for arm in ARMS)
    assert results["arms_general"] == results["arms"] and "On general text" in table  # the same file here
    assert len({round(arm["nll"], 7) for arm in results["arms"].values()}) == len(ARMS)
    assert list(results["per_text_bytes"]) == [*MEASURED, "source"]
    bits = results["held_out"]["bits_per_byte"]
    assert list(bits["arms"]) == [*ARMS, "source"] and results["general"]["bits_per_byte"] == bits
    assert f"{bits['arms']['source']['bits_per_byte']:.4f}" in next(
        line for line in table.splitlines() if line.startswith("source ")
    )
    assert f"In bits per byte (of {bits['bytes']} bytes of {bits['texts']} texts" in table
    assert "random_source is left out: it takes minutes, with --controls all." in table

    for arm in ("wrong_layer", "source"):  # as after a kill: the other arms are not measured again
        results["per_text_bytes"].pop(arm)
    (folder / "results.json").write_text(json.dumps(results))
    measured = []
    for name, measure in {"text_nll": text_nll, "token_losses": token_losses}.items():
        monkeypatch.setattr(arm_models, name, lambda *a, measure=measure: measured.append(a[3]) or measure(*a))
    run_main(compare_arms, *flags)
    again = [f"{arm}, {name}" for arm in ("wrong_layer", "source") for name in ("held_out", "general")]
    assert measured == again and capsys.readouterr().out == table
    measured.clear()
    results.pop("per_text_bytes")  # a file of an earlier version: all arms are measured again
    (folder / "results.json").write_text(json.dumps(results))
    run_main(compare_arms, *flags)
    assert len(measured) == 2 * len([*MEASURED, "source"]) and capsys.readouterr().out == table
    measured.clear()
    results = json.loads((folder / "results.json").read_text())
    results["made_from"]["no_hot/seed1"] = "another training"
    (folder / "results.json").write_text(json.dumps(results))
    run_main(compare_arms, *flags)
    assert measured == ["no_hot/seed1, held_out", "no_hot/seed1, general"] and capsys.readouterr().out == table


def test_results_go_into_the_cards_once_and_change_nothing_else(run, capsys):
    folder, flags = run
    trained = {f"{arm}/seed{n}": f"{subfolder}/seed{n}" for arm, subfolder in TRAINED.items() for n in (0, 1)}
    cards = {arm: folder / path / "README.md" for arm, path in {"fused": "fused", **trained}.items()}
    empty = {}
    for arm, card in cards.items():
        head, _, rest = card.read_bytes().partition(RESULTS_BEGIN)
        empty[arm] = head + RESULTS_BEGIN, RESULTS_END + rest.partition(RESULTS_END)[2]
    identity = open_checkpoint(str(folder / "fused")).identity
    path = folder / "results.json"
    tables = []
    for changed in (False, True):  # another table, from other likelihoods
        results = json.loads(path.read_text())
        if changed:
            results["per_text"]["fused"]["held_out"][0] += 1.0
        path.write_text(json.dumps(results))
        capsys.readouterr()
        run_main(compare_arms, *flags)
        tables.append(capsys.readouterr().out)
        for arm, card in cards.items():
            head, tail = empty[arm]
            text = card.read_bytes()
            assert text.startswith(head) and text.endswith(tail)
            section = text[len(head) : -len(tail)].decode()
            assert section.count(tables[-1]) == 1 and f"is the arm `{arm}`" in section
    assert tables[0] != tables[1] and tables[0] not in cards["fused"].read_text()
    assert open_checkpoint(str(folder / "fused")).identity == identity
    results["per_text"].pop("fused")  # measured again by the next command
    path.write_text(json.dumps(results))


def test_controls_leave_no_trace_in_the_loaded_target(run, models):
    """The losses of base are the same before and after those of the controls."""
    folder, flags = run
    command = compare_arms.parse_command([str(f) for f in flags], "e", "", {"run_dir": ""})
    arms = Arms(
        Run.open(folder, PlanDirectory(folder / "plans")),
        *open_pair(command.experiment.models, "cpu"),
        command.experiment,
    )
    examples = [{"input_ids": list(range(12)), "labels": list(range(12))}]
    sets = {"held_out": TextSet(examples, ["a"], 0, False, ByteSpans([0], False, [[]], []))}
    losses = [found for _, found in arms.losses(["base", "damped", "permuted", "wrong_layer", "base"], sets)]
    assert losses[0] == losses[-1] != losses[1]


def test_stages_that_do_not_belong_together_are_refused(fails, run, tmp_path):
    folder, flags = run
    for part, key, message in (
        ("fused", "plans", "was made from other plans"),
        ("adapted/hot/seed1", "made_by", "was made from another fused checkpoint"),
        ("adapted/no_hot/seed0", "data", "had other settings or data"),
    ):
        copy = tmp_path / part
        shutil.copytree(folder, copy)
        path = copy / part / "manifest.json"
        manifest = json.loads(path.read_text())
        manifest["inputs"][key] = "another"
        path.write_text(json.dumps(manifest))
        assert message in fails(compare_arms, *flags[2:], "--run-dir", copy)
    assert "split_seed is 3" in fails(compare_arms, *flags, "--split-seed", 3)


def test_a_seed_that_an_arm_lacks_is_named(fails, run, tmp_path):
    """Arms are compared over the same seeds; distillation may be missing altogether."""
    folder, flags = run
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    shutil.rmtree(copy / "adapted/no_hot/seed1")
    error = fails(compare_arms, *flags[2:], "--run-dir", copy)
    assert "no_hot/seed1 is not an output of stage 'adapted'" in error
    for scenario in ("hot", "distill"):
        shutil.rmtree(copy / "adapted" / scenario / "seed1")
    shutil.rmtree(copy / "adapted/distill")
    run_main(compare_arms, *flags[2:], "--run-dir", copy)
    assert "distill" not in json.loads((copy / "results.json").read_text())["arms"]


def test_the_table_says_which_arms_were_chosen_among_several_trials(run, tmp_path, capsys):
    """An arm that was chosen among more trials had more chances."""
    folder, flags = run
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    path = copy / "adapted/hot/seed1/manifest.json"
    manifest = json.loads(path.read_text())
    manifest["trials"] *= 3
    path.write_text(json.dumps(manifest))
    run_main(compare_arms, *flags[2:], "--run-dir", copy)
    assert "chosen on validation rows: no_hot 1, distill 1, fused_adapted 3." in capsys.readouterr().out


def test_no_text_with_a_token_to_score_is_an_error(fails, run):
    assert "no token with loss within 1 tokens; raise --max-tokens" in fails(compare_arms, *run[1], "--max-tokens", 1)


def test_a_model_with_a_nan_weight_is_refused(fails, run, tmp_path):
    folder, flags = run
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    (copy / "results.json").unlink(missing_ok=True)
    weights = load_file(copy / "fused/model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, copy / "fused/model.safetensors", {"format": "pt"})
    error = fails(compare_arms, *flags[2:], "--run-dir", copy)
    assert "fused: the loss of" in error and "held_out texts is not finite" in error


@pytest.mark.parametrize("how", ["memory", "nan"])
def test_a_source_that_cannot_be_measured_takes_no_table_away(run, tmp_path, monkeypatch, caplog, capsys, how):
    folder, flags = run
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    (copy / "results.json").unlink(missing_ok=True)
    finished = []

    def broken(model, examples, *_):
        finished.append("arms" in json.loads((copy / "results.json").read_text()))  # kept when the process is killed
        if how == "memory":
            raise torch.OutOfMemoryError("no memory left")
        return [float("nan")] * len(examples)

    monkeypatch.setattr(arm_models, "text_nll", broken)
    run_main(compare_arms, *flags[2:], "--run-dir", copy)
    table = capsys.readouterr().out
    assert finished == [True] and "source is left out of bits per byte" in caplog.text
    assert "bits/byte" in table and "the source was not measured, so no share of a gap is given" in table
    assert list(json.loads((copy / "results.json").read_text())["held_out"]["bits_per_byte"]["arms"]) == list(ARMS)


def test_a_model_that_gives_no_sample_is_left_out(run, tmp_path, monkeypatch, caplog, capsys):
    folder, flags = run
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    (copy / "samples.json").unlink(missing_ok=True)
    usual = samples.answers

    def answers(model, *rest):
        if "source" in str(model.checkpoint.folder):
            raise NotFiniteError("logits that are not finite")
        return usual(model, *rest)

    monkeypatch.setattr(samples, "answers", answers)
    run_main(compare_arms, *flags[2:], "--run-dir", copy)
    assert "source has no text samples: " in caplog.text and "fused minus arm" in capsys.readouterr().out
    assert list(json.loads((copy / "samples.json").read_text())["texts"]) == ["base", "fused", "fused_adapted"]


def test_the_wrong_layer_of_a_single_layer_is_refused_by_name(run):
    folder, _ = run
    plans = PlanDirectory(folder / "plans")
    plans.shape = (1, plans.shape[1])
    residual = load_residuals(folder / "fused/hot_residual.safetensors")[0][0]
    with pytest.raises(UserError, match="wrong_layer: the target has one layer"):
        CONTROLS["wrong_layer"](residual, SimpleNamespace(plans=plans), torch.Generator())


def test_missing_stage_is_named(fails, run, tmp_path):
    _, flags = run
    assert "run that stage first" in fails(compare_arms, *flags[2:], "--run-dir", tmp_path)
