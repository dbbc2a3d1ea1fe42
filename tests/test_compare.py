"""The comparison: likelihoods against the model's own loss, the statistics, and the whole command."""

import json
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import run_main
from safetensors.torch import load_file, save_file

import run_activs_and_hot as stage1
from core import generate_hot_residual as stage2
from core import train_hot_residual_sft as stage3
from core.card import RESULTS_BEGIN, RESULTS_END
from core.checkpoints import open_checkpoint
from core.controls import CONTROLS, control_residual
from core.data import Row
from core.hot_residual import load_residuals
from core.runs import Manifest, UserError
from evaluation import compare_arms
from evaluation.verdict import statistics, table


def test_text_nll_is_the_models_own_loss_whatever_the_batch(models):
    model = open_checkpoint(str(models["source"])).load_model("float32")
    examples = [{"input_ids": list(range(n)), "labels": [-100] * skip + list(range(skip, n))}
                for n, skip in ((9, 0), (4, 2), (15, 7), (2, 0))]  # fmt: skip
    expected = []
    for example in examples:
        ids, labels = torch.tensor([example["input_ids"]]), torch.tensor([example["labels"]])
        counted = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            expected.append(float(model(ids, labels=labels).loss) * counted)
    for tokens_per_batch in (1, 30, 60):
        assert compare_arms.text_nll(model, examples, tokens_per_batch, "test") == pytest.approx(expected, abs=1e-3)


# Every row of the table, and every model that is scored.
ARMS = ("base", *CONTROLS, "fused", *compare_arms.TRAINED)
SCORED = [*ARMS[: -len(compare_arms.TRAINED)], *(f"{arm}/seed{n}" for arm in compare_arms.TRAINED for n in (0, 1))]


def made_up(seed: int = 0) -> tuple[dict[str, list[float]], list[int]]:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(20, 40, 50)
    base = 3.0 * tokens
    shift = {arm: 0.1 * n for n, arm in enumerate(ARMS)} | {"base": 0.0, "fused": -0.05}
    noise = {arm: 0.0 if arm == "base" else rng.normal(0, 0.02, 50) for arm in ARMS}
    return {arm: (base + (shift[arm] + noise[arm]) * tokens).tolist() for arm in ARMS}, tokens.tolist()


def counts(tokens: list[int], groups: list[int], **more) -> dict:
    return {"texts": len(tokens), "tokens": sum(tokens), "groups": len(set(groups)), **more}


def test_statistics_weigh_tokens_and_pair_texts():
    per_text, tokens = made_up()
    arms = statistics(per_text, tokens, range(50))
    fused = arms["fused"]
    assert arms["base"]["nll"] == pytest.approx(3.0) and arms["base"]["diff"] == 0.0
    assert fused["diff"] == pytest.approx((sum(per_text["fused"]) - sum(per_text["base"])) / sum(tokens))
    assert fused["ppl"] == pytest.approx(np.exp(fused["nll"])) and fused["n"] == 50
    # The ratio estimator's standard error, by its usual linearisation.
    residual = np.asarray(per_text["fused"]) - np.asarray(per_text["base"]) - fused["diff"] * np.asarray(tokens)
    error = float(np.sqrt((residual**2).sum()) / sum(tokens))
    low, high = fused["ci95"]
    assert (high - low) / 2 == pytest.approx(2.01 * error, rel=0.05) and low < fused["diff"] < high
    assert arms["self"]["fused_minus_arm"]["diff"] == pytest.approx(fused["nll"] - arms["self"]["nll"])
    gap = arms["fused_adapted"]["nll"] - arms["no_hot"]["nll"]
    assert arms["fused_adapted"]["minus_no_hot"]["diff"] == pytest.approx(gap)
    assert arms["fused"]["better"] == sum(a < b for a, b in zip(per_text["fused"], per_text["base"], strict=True))


def test_texts_of_one_group_count_as_one():
    """Every text five times over says nothing new: where copies share a group the interval stays as it was."""
    per_text, tokens = made_up()
    once = statistics(per_text, tokens, range(50))["fused"]
    copied, more = {arm: sums * 5 for arm, sums in per_text.items()}, tokens * 5
    grouped = statistics(copied, more, [*range(50)] * 5)["fused"]
    assert grouped["ci95"] == pytest.approx(once["ci95"]) and (grouped["n"], grouped["groups"]) == (250, 50)
    alone = statistics(copied, more, range(250))["fused"]
    assert alone["ci95"][1] - alone["ci95"][0] < 0.5 * (once["ci95"][1] - once["ci95"][0])


def test_seeds_are_averaged_per_text_and_told_apart():
    per_text, tokens = made_up()
    groups = list(range(50))
    single = statistics(per_text, tokens, groups)
    rng = np.random.default_rng(5)
    moved = rng.normal(0, 0.5, 50)
    seeds = {"no_hot": (0.0, 0.2), "fused_adapted": (-0.1, 0.1)}
    split = {arm: sums for arm, sums in per_text.items() if arm not in seeds}
    for arm, shifts in seeds.items():
        for n, (shift, sign) in enumerate(zip(shifts, (1, -1), strict=True)):
            split[f"{arm}/seed{n}"] = (np.asarray(per_text[arm]) + sign * moved + shift * np.asarray(tokens)).tolist()
    found = statistics(split, tokens, groups)
    assert list(found) == [*[arm for arm in per_text if arm not in seeds], *seeds]
    for arm, shift in (("no_hot", 0.1), ("fused_adapted", 0.0)):
        assert found[arm]["nll"] == pytest.approx(single[arm]["nll"] + shift)
    gap = found["fused_adapted"]["minus_no_hot"]
    assert gap["diff"] == pytest.approx(single["fused_adapted"]["minus_no_hot"]["diff"] - 0.1)
    assert list(gap["seeds"]) == ["seed0", "seed1"]
    assert np.mean(list(gap["seeds"].values())) == pytest.approx(gap["diff"])
    for n, name in enumerate(gap["seeds"]):  # each seed against the same seed
        a, b = (np.sum(split[f"{arm}/{name}"]) for arm in ("fused_adapted", "no_hot"))
        assert gap["seeds"][name] == pytest.approx((a - b) / sum(tokens)), n
    wide, narrow = (r["no_hot"]["ci95"] for r in (found, single))
    assert wide[1] - wide[0] > 2 * (narrow[1] - narrow[0])  # its seeds differ by more than the texts
    same, single_gap = (r["fused_adapted"]["minus_no_hot"]["ci95"] for r in (found, single))
    assert same[1] - same[0] == pytest.approx(single_gap[1] - single_gap[0])  # as much in every seed
    told = table(found, counts(tokens, groups))
    assert f"; by seed {gap['seeds']['seed0']:+.4f}, {gap['seeds']['seed1']:+.4f}." in told
    assert "one seed" not in told
    alone = {arm: sums for arm, sums in split.items() if not arm.endswith("seed1")}
    assert "Each training has one seed" in table(statistics(alone, tokens, groups), counts(tokens, groups))


def test_verdict_is_honest():
    per_text, tokens = made_up()
    groups = list(range(50))

    def verdict(per_text, groups=groups):
        return table(statistics(per_text, tokens, groups), counts(tokens, groups))

    assert "Transfer: " in verdict(per_text) and "rough" not in verdict(per_text)
    assert "No transfer shown: fused is not reliably better than self." in verdict(
        {**per_text, "self": per_text["fused"]}
    )
    assert "rest on 10 groups only and are rough" in verdict(per_text, [n % 10 for n in groups])
    told = verdict(per_text, [0] * 50)
    assert "no interval can be given" in told and "[no interval]" in told and "No transfer shown" in told


def test_a_loss_that_is_not_a_number_is_no_success():
    """Neither where losses are measured nor, should one get through, in the sentence."""
    with pytest.raises(UserError, match="fused: the loss of 2 of 4 general texts is not finite, first that of text 2"):
        compare_arms.check_finite([1.0, float("nan"), 2.0, float("inf")], "fused", "general")
    per_text, tokens = made_up()
    arms = statistics(per_text, tokens, range(50))
    arms["self"]["fused_minus_arm"]["ci95"] = [float("nan")] * 2
    assert "No transfer shown: fused is not reliably better than self." in table(arms, counts(tokens, range(50)))
    per_text["fused"][3] = float("nan")
    with pytest.raises(ValueError, match="finite"):
        statistics(per_text, tokens, range(50))


@pytest.fixture(scope="module")
def run(models, texts, tmp_path_factory):
    """All stages on the pico pair, into a run directory."""
    folder = tmp_path_factory.mktemp("run")
    data = ["--data-subset", "file", "--data-file", texts]
    run_main(stage1, "--target-model", models["target"], "--source-model", models["source"], *data,
             "--pooling", "token", "--out-dir", folder / "plans")  # fmt: skip
    run_main(stage2, "--hot_dir", folder / "plans", "--output_dir", folder / "fused", "--feature-map", "regression",
             "--top-k", 7)  # fmt: skip
    for scenario in ("hot", "no_hot", "distill"):
        for seed in (0, 1):
            run_main(stage3, "--model_dir", folder / "fused", "--output_dir", folder / "adapted" / scenario /
                     f"seed{seed}", "--sft-samples", 8, "--training-scenario", scenario, "--seed", seed,
                     "--gradient-accumulation", 2, "--learning-rate", "1e-3")  # fmt: skip
    return folder, ["--run-dir", folder, "--target-model", models["target"], "--source-model", models["source"], *data,
                    "--general-file", texts]  # fmt: skip


def test_command_writes_results_and_reuses_finished_arms(run, monkeypatch, capsys):
    folder, flags = run
    run_main(compare_arms, *flags)
    table = capsys.readouterr().out
    results = json.loads((folder / "results.json").read_text())
    assert list(results["arms"]) == list(ARMS) and list(results["per_text"]) == SCORED
    assert {"nll", "ppl", "n", "diff", "ci95"} <= set(results["arms"]["fused"])
    assert all(arm in table for arm in ARMS)
    assert results["arms_general"] == results["arms"] and "On general text" in table  # the same file here
    assert len({round(arm["nll"], 7) for arm in results["arms"].values()}) == len(ARMS)

    results["per_text"].pop("wrong_layer")  # as after a kill: the other arms are not computed again
    (folder / "results.json").write_text(json.dumps(results))
    evaluated = []
    original = compare_arms.text_nll
    monkeypatch.setattr(compare_arms, "text_nll", lambda *a: evaluated.append(a[3]) or original(*a))
    run_main(compare_arms, *flags)
    assert evaluated == ["wrong_layer, held_out", "wrong_layer, general"] and capsys.readouterr().out == table
    evaluated.clear()
    results = json.loads((folder / "results.json").read_text())
    results["made_from"]["no_hot/seed1"] = "another training"
    (folder / "results.json").write_text(json.dumps(results))
    run_main(compare_arms, *flags)
    assert evaluated == ["no_hot/seed1, held_out", "no_hot/seed1, general"] and capsys.readouterr().out == table


def test_results_go_into_the_cards_once_and_change_nothing_else(run, capsys):
    folder, flags = run
    trained = {f"{arm}/seed{n}": f"{place}/seed{n}" for arm, place in compare_arms.TRAINED.items() for n in (0, 1)}
    cards = {arm: folder / place / "README.md" for arm, place in {"fused": "fused", **trained}.items()}
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
    """base evaluated after the controls equals base evaluated first."""
    folder, flags = run
    command = compare_arms.parse_command([str(f) for f in flags], "e", "", {"run_dir": ""})
    target, source = compare_arms.open_pair(command.experiment)
    plans = compare_arms.PlanDirectory(folder / "plans")
    settings = compare_arms.FusionSettings("regression", top_k=7)
    examples = [{"input_ids": list(range(12)), "labels": list(range(12))}]
    arms, places = ["base", "damped", "permuted", "wrong_layer", "base"], {"fused": folder / "fused"}
    sets = {"held_out": compare_arms.TextSet(examples, ["a"], 0, False)}
    got = list(compare_arms.evaluate_arms(arms, places, plans, target, source, settings, sets,
                                          command.experiment))  # fmt: skip
    assert got[0][1] == got[-1][1] != got[1][1]


@pytest.mark.parametrize(
    ("arm", "changed", "refused"),
    [
        ("hot/seed0", {}, False),
        ("no_hot/seed0", {"freeze_strategy": None}, False),  # it has no residual to freeze
        ("hot/seed1", {"freeze_strategy": "none"}, True),
        ("no_hot/seed0", {"epochs": 3.0}, True),
    ],
)
def test_trainings_differ_in_what_their_scenario_has_alone(tmp_path, arm, changed, refused):
    def training(place):
        settings = {"training_scenario": place.split("/")[0], "freeze_strategy": "frozen_hot", "epochs": 1.0}
        settings |= {"seed": place[-1]} | (changed if place == arm else {})
        return Manifest(tmp_path, {"inputs": {"made_by": "f", "data": 1, "validation": 2, "settings": settings}})

    arms = {"fused_adapted": ("hot/seed0", "hot/seed1"), "no_hot": ("no_hot/seed0",)}
    adapted = {name: {tmp_path / place: training(place) for place in places} for name, places in arms.items()}
    fused = Manifest(tmp_path, {"fingerprint": "f", "inputs": {"plans": "p"}})
    plans = SimpleNamespace(manifest=Manifest(tmp_path, {"fingerprint": "p"}))
    with pytest.raises(UserError, match="had other settings") if refused else nullcontext():
        compare_arms.check_chain(tmp_path, plans, fused, adapted)


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
    told = fails(compare_arms, *flags[2:], "--run-dir", copy)
    assert "no_hot/seed1 is not an output of stage 'adapted'" in told
    for scenario in ("hot", "distill"):
        shutil.rmtree(copy / "adapted" / scenario / "seed1")
    shutil.rmtree(copy / "adapted/distill")
    run_main(compare_arms, *flags[2:], "--run-dir", copy)
    assert "distill" not in json.loads((copy / "results.json").read_text())["arms"]


def test_searches_are_told(run, tmp_path, capsys):
    """An arm that chose among more trials had more chances."""
    folder, flags = run
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    path = copy / "adapted/hot/seed1/manifest.json"
    manifest = json.loads(path.read_text())
    manifest["trials"] *= 3
    path.write_text(json.dumps(manifest))
    run_main(compare_arms, *flags[2:], "--run-dir", copy)
    assert "chosen on validation rows: no_hot 1, distill 1, fused_adapted 3." in capsys.readouterr().out


def test_texts_without_a_token_to_score_are_told(fails, run):
    assert "no token with loss within 1 tokens; raise --max-tokens" in fails(compare_arms, *run[1], "--max-tokens", 1)


def test_texts_without_a_token_to_score_are_left_out_and_counted(models):
    tokenizer = open_checkpoint(str(models["target"])).load_tokenizer()
    rows = [Row(((None, "model layer neuron"),), "a"), Row(((None, "x"),), "b"), Row(((None, "plan weight"),), "a")]
    texts = compare_arms.text_set("held_out", rows, tokenizer, 100)
    tokens = [len(tokenizer(row.plain)["input_ids"]) - 1 for row in rows]
    assert tokens[1] == 0 and texts.tokens == [tokens[0], tokens[2]]
    assert texts.counts() == {"texts": 2, "tokens": sum(tokens), "groups": 1, "left_out": 1, "end_of_turn": False}
    answers = [Row((("user", "plan"), ("assistant", "weight")), "a")]
    assert compare_arms.text_set("held_out", answers, tokenizer, 100).end_of_turn
    per_text, tokens = made_up()
    told = table(statistics(per_text, tokens, range(50)), counts(tokens, range(50), left_out=3, end_of_turn=True))
    assert "3 more texts have no token to score and are left out." in told
    assert "include the token that ends an answer" in told
    cut = [Row((("user", "plan"), ("assistant", "weight " * 50)), "a")]
    assert not compare_arms.text_set("held_out", cut, tokenizer, 12).end_of_turn  # the end is beyond the cut


def test_general_text_says_what_its_intervals_rest_on():
    per_text, tokens = made_up()
    arms, few = statistics(per_text, tokens, range(50)), statistics(per_text, tokens, [n % 3 for n in range(50)])
    told = table(arms, counts(tokens, range(50)), few, counts(tokens, range(3), left_out=2))
    assert "On general text (50 texts of 3 groups, base 3.0000)" in told
    assert "General text: The intervals rest on 3 groups only and are rough." in told
    assert "General text: 2 more texts have no token to score" in told


def test_a_loss_beyond_any_perplexity_is_told():
    per_text, tokens = made_up()
    per_text["permuted"] = [900.0 * count for count in tokens]
    told = table(statistics(per_text, tokens, range(50)), counts(tokens, range(50)))
    assert "permuted       900.0000      inf" in told


def test_a_model_with_a_nan_weight_is_refused(fails, run, tmp_path):
    folder, flags = run
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    results = json.loads((copy / "results.json").read_text())
    results["per_text"].pop("fused", None)
    (copy / "results.json").write_text(json.dumps(results))
    weights = load_file(copy / "fused/model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, copy / "fused/model.safetensors", {"format": "pt"})
    told = fails(compare_arms, *flags[2:], "--run-dir", copy)
    assert "fused: the loss of" in told and "held_out texts is not finite" in told


def test_the_wrong_layer_of_a_single_layer_is_refused_by_name(run, models):
    folder, _ = run
    plans = compare_arms.PlanDirectory(folder / "plans")
    plans.shape = (1, plans.shape[1])
    residual = load_residuals(folder / "fused/hot_residual.safetensors")[0][0]
    with pytest.raises(UserError, match="wrong_layer: the target has one layer"):
        control_residual("wrong_layer", residual, plans, None, torch.Generator())
    assert list(compare_arms.impossible_controls(1)) == ["wrong_layer"] and not compare_arms.impossible_controls(2)
    per_text, tokens = made_up()
    del per_text["wrong_layer"]
    absent = compare_arms.impossible_controls(1)
    told = table(statistics(per_text, tokens, range(50)), counts(tokens, range(50), absent=absent))
    assert "wrong_layer is left out: the target has one layer" in told
    assert "than every control that was measured (without wrong_layer)" in told


def test_missing_stage_is_named(fails, run, tmp_path):
    _, flags = run
    assert "run that stage first" in fails(compare_arms, *flags[2:], "--run-dir", tmp_path)
