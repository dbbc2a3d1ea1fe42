"""The verdict on the page is the table's, whatever was measured."""

import numpy as np
import pytest

from core.fusion.controls import CONTROLS
from evaluation.arms.verdict import statistics, table, verdict
from evaluation.pages.verdict import NO_RESULTS, amount, arm_rows, further_sentences, headline

TOKENS = [20] * 30
# Case -> mean difference to base per token of every arm that is not 0, and the seeds of the trainings.
CASES = {
    "transfer": ({"fused": -0.1}, (0, 1)),
    "a control is as good": ({"fused": -0.1, "self": -0.1}, (0,)),
    "worse than base": ({"fused": 0.2}, (0,)),
    "no training": ({"fused": -0.1}, ()),
    "three seeds": ({"fused": -0.1}, (0, 1, 2)),
    "denoising": ({"fused": -0.1, "filtered_self": -0.1}, (0,)),
    "strength 0": ({"fused": 0.0}, (0,)),
}
SHOWN = ("transfer", "no training", "three seeds")


def results(shift, seeds, groups=30, general=False):
    """A results.json of made-up losses."""
    rng = np.random.default_rng(0)
    trained = [f"{arm}/seed{seed}" for arm in ("no_hot", "fused_adapted") for seed in seeds]
    losses = {}
    for arm in ("base", *CONTROLS, "fused", *trained):
        noise = rng.normal(0, 0.01, 30) if arm != "base" else 0
        losses[arm] = (20 * (3 + shift.get(arm, 0.0) + noise) + np.zeros(30)).tolist()
    counts = {"texts": 30, "tokens": sum(TOKENS), "groups": groups}
    record = {"arms": statistics(losses, TOKENS, [n % groups for n in range(30)]), "held_out": {**counts, "absent": {}}}
    if shift["fused"] == 0:  # where the search left the target alone
        record["arms"]["fused"]["strength"] = {"alpha": 0, "sentence": "Fusion does not reliably help"}
    return record | ({"arms_general": record["arms"], "general": counts} if general else {})


@pytest.mark.parametrize("groups", [30, 5, 1])
@pytest.mark.parametrize("case", CASES)
def test_every_sentence_is_the_tables(case, groups):
    found = results(*CASES[case], groups=groups, general=case == "transfer")
    lines = table(found["arms"], found["held_out"], found.get("arms_general"), found.get("general")).splitlines()
    told = [headline(found), *further_sentences(found, {})]
    assert sorted(told) == sorted(lines[2 + len(found["arms"]) :])
    assert headline(found) == verdict(found["arms"]) and len(set(told)) == len(told)
    assert headline(found).startswith("Transfer") == (case in SHOWN and groups > 1)
    assert ("denoising" in headline(found)) == (case == "denoising" and groups > 1)
    assert ("The strength is 0: fused is the base." in headline(found)) == (case == "strength 0")
    assert ("Fusion does not reliably help." in told) == (case == "strength 0")


def test_a_difference_that_is_no_number_shows_no_transfer():
    found = results({"fused": -0.1}, ())
    found["arms"]["base"]["fused_minus_arm"]["ci95"] = [float("nan")] * 2
    assert headline(found) == verdict(found["arms"]) == "No transfer shown: fused is not reliably better than base."


def test_without_results_there_is_no_verdict():
    assert headline(None) == NO_RESULTS


def test_the_amount_is_given_in_every_unit_that_was_measured():
    found = results({"fused": -0.1}, ())
    figures = found["arms"]["fused"]
    low, high = figures["ci95"]
    assert f"{figures['diff']:+.4f} [{low:+.4f}, {high:+.4f}] nats per token." in amount(found)
    fused = {"bits_per_byte": 1.0, "diff": -0.05, "ci95": [-0.06, -0.04], "closed": 0.25}
    found["held_out"]["bits_per_byte"] = {"arms": {"fused": fused}}
    told = amount(found)
    assert ", -0.0500 [-0.0600, -0.0400] bits per byte, 25.0 % of the way from the base to the source." in told


def test_the_table_of_arms_has_the_numbers_of_the_table():
    found = results({"fused": -0.1}, (0, 1))
    bits = {arm: {"bits_per_byte": 1.5, "diff": -0.1, "ci95": [-0.2, -0.05]} for arm in (*found["arms"], "source")}
    bits["fused"]["closed"], bits["source"]["closed"] = 0.25, 1.0
    found["held_out"]["bits_per_byte"] = {"texts": 30, "left_out": 0, "answers": False, "bytes": 9, "arms": bits}
    lines = table(found["arms"], found["held_out"]).splitlines()
    rows = arm_rows(found)
    for row in rows[1:]:
        line = next(line for line in lines if line.startswith(f"{row[0]:14} "))
        assert all(cell in line for cell in row)
    assert rows[0][-2:] == ["bits per byte", "closed"] and rows[-1] == ["source", *[""] * 4, "1.5000", "100.0 %"]
    assert {len(row) for row in rows} == {7} and next(row for row in rows if row[0] == "fused")[-1] == "25.0 %"
