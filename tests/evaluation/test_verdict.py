"""The statistics of arms on made-up losses, and what the table says of them."""

import numpy as np
import pytest
from made_up_losses import counts, made_up

from core.errors import UserError
from evaluation.arms.models import check_losses
from evaluation.arms.verdict import absent_notes, seed_notes, statistics, strength_notes, table, trial_notes


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
    """Five copies of every text add no information: where the copies share a group, the interval does not change."""
    per_text, tokens = made_up()
    once = statistics(per_text, tokens, range(50))["fused"]
    copied, more = {arm: sums * 5 for arm, sums in per_text.items()}, tokens * 5
    grouped = statistics(copied, more, [*range(50)] * 5)["fused"]
    assert grouped["ci95"] == pytest.approx(once["ci95"]) and (grouped["n"], grouped["groups"]) == (250, 50)
    alone = statistics(copied, more, range(250))["fused"]
    assert alone["ci95"][1] - alone["ci95"][0] < 0.5 * (once["ci95"][1] - once["ci95"][0])


def test_seeds_are_averaged_per_text_and_listed_one_by_one():
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
    text = table(found, counts(tokens, groups))
    assert f"; by seed {gap['seeds']['seed0']:+.4f}, {gap['seeds']['seed1']:+.4f}." in text
    assert "one seed" not in text
    alone = {arm: sums for arm, sums in split.items() if not arm.endswith("seed1")}
    assert "Each training has one seed" in table(statistics(alone, tokens, groups), counts(tokens, groups))
    some = {"no_hot": {"seeds": {"0": 1}}, "distill": {"seeds": {"0": 1}}, "fused_adapted": {"seeds": {"0": 1, "1": 2}}}
    assert seed_notes(some) == [
        "no_hot, distill have one seed each: what is said of them after fine-tuning speaks of this seed alone."
    ]


def test_verdict_is_honest():
    per_text, tokens = made_up()
    groups = list(range(50))

    def verdict(per_text, groups=groups):
        return table(statistics(per_text, tokens, groups), counts(tokens, groups))

    assert "Transfer: " in verdict(per_text) and "rough" not in verdict(per_text)
    assert "No transfer shown: fused is not reliably better than self." in verdict(
        {**per_text, "self": per_text["fused"]}
    )
    assert "rest on only 10 groups and are rough" in verdict(per_text, [n % 10 for n in groups])
    text = verdict(per_text, [0] * 50)
    assert "no interval can be given" in text and "[no interval]" in text and "No transfer shown" in text


def test_a_gain_that_filtered_self_shares_is_called_denoising():
    per_text, tokens = made_up()
    arms = statistics({**per_text, "filtered_self": per_text["fused"]}, tokens, range(50))
    text = table(arms, counts(tokens, range(50)))
    assert "not reliably better than filtered_self. filtered_self shares its gain (fused minus filtered_self = " in text
    assert "that is denoising" in text
    without_gain = {**per_text, "filtered_self": per_text["base"], "fused": per_text["base"]}
    assert "denoising" not in table(statistics(without_gain, tokens, range(50)), counts(tokens, range(50)))
    assert "denoising" not in table(statistics(per_text, tokens, range(50)), counts(tokens, range(50)))


def test_filtered_self_that_is_not_better_than_base_itself_is_no_denoising():
    """Too noisy to tell from fused, and to tell from base: then nothing is said of where the gain comes from."""
    per_text, tokens = made_up()
    noise = np.random.default_rng(1).normal(0, 1, 50) * np.asarray(tokens)
    arms = statistics({**per_text, "filtered_self": (per_text["base"] + noise).tolist()}, tokens, range(50))
    text = table(arms, counts(tokens, range(50)))
    assert "No transfer shown: fused is not reliably better than filtered_self." in text and "denoising" not in text


def test_a_loss_that_is_not_a_number_is_no_success():
    """It is refused where losses are measured, and should one get through, the sentence claims no success."""
    with pytest.raises(UserError, match="fused: the loss of 2 of 4 general texts is not finite, first that of text 2"):
        check_losses([1.0, float("nan"), 2.0, float("inf")], "fused", "general")
    per_text, tokens = made_up()
    arms = statistics(per_text, tokens, range(50))
    arms["self"]["fused_minus_arm"]["ci95"] = [float("nan")] * 2
    assert "No transfer shown: fused is not reliably better than self." in table(arms, counts(tokens, range(50)))
    per_text["fused"][3] = float("nan")
    with pytest.raises(ValueError, match="finite"):
        statistics(per_text, tokens, range(50))


def test_the_strength_that_was_found_is_said_below_the_table():
    per_text, tokens = made_up()
    arms = statistics(per_text, tokens, range(50))
    arms["fused"]["strength"] = {"alpha": 0.1, "sentence": "Fusion: strength 0.1"}
    text = table(arms, counts(tokens, range(50)))
    assert "\nFusion: strength 0.1.\n" in text and "Transfer: " in text
    arms = statistics({**per_text, "fused": per_text["base"]}, tokens, range(50))
    arms["fused"]["strength"] = {"alpha": 0.0, "sentence": "Fusion does not reliably help"}
    text = table(arms, counts(tokens, range(50)))
    assert "No transfer shown. The strength is 0: fused is the base.\nFusion does not reliably help.\n" in text
    assert "not reliably better" not in text
    assert "found in the same way, on the validation rows (" in strength_notes({"self": {"alpha": 0.1}})[0]


def test_general_text_says_what_its_intervals_rest_on():
    per_text, tokens = made_up()
    arms, few = statistics(per_text, tokens, range(50)), statistics(per_text, tokens, [n % 3 for n in range(50)])
    text = table(arms, counts(tokens, range(50)), few, counts(tokens, range(3), left_out=2))
    assert "On general text (50 texts of 3 groups, base 3.0000)" in text
    assert "General text: The intervals rest on only 3 groups and are rough." in text
    assert "General text: 2 more texts have no token to score" in text


def test_a_loss_beyond_any_perplexity_is_shown_as_infinite():
    per_text, tokens = made_up()
    per_text["permuted"] = [900.0 * count for count in tokens]
    text = table(statistics(per_text, tokens, range(50)), counts(tokens, range(50)))
    assert "permuted       900.0000      inf" in text


def test_the_table_says_what_was_left_out_and_what_losses_include():
    per_text, tokens = made_up()
    text = table(statistics(per_text, tokens, range(50)), counts(tokens, range(50), left_out=3, end_of_turn=True))
    assert "3 more texts have no token to score and are left out." in text
    assert "include the token that ends an answer" in text
    del per_text["wrong_layer"]
    absent = {"wrong_layer": "the target has one layer"}
    text = table(statistics(per_text, tokens, range(50)), counts(tokens, range(50), absent=absent))
    assert "wrong_layer is left out: the target has one layer" in text
    assert "than every control that was measured (without wrong_layer)" in text


def test_arms_that_are_left_out_for_one_reason_share_a_sentence():
    absent = {"damped": "few were asked for", "self": "it is base", "permuted": "few were asked for"}
    few = "few were asked for"
    assert absent_notes(absent) == [f"damped and permuted are left out: {few}.", "self is left out: it is base."]
    three = absent_notes(dict.fromkeys(("damped", "permuted", "wrong_layer"), few))
    assert three == [f"damped, permuted and wrong_layer are left out: {few}."]
    assert absent_notes({}) == []


def test_the_number_of_trials_is_said_where_some_arm_had_several():
    assert trial_notes({}) == trial_notes({"no_hot": 1, "fused_adapted": 1}) == []
    (note,) = trial_notes({"no_hot": 1, "fused_adapted": 3})
    assert note == "Each training is the best of several trials, chosen on validation rows: no_hot 1, fused_adapted 3."
