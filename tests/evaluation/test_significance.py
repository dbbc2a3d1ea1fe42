"""Intervals and tests of differences: by hand, against exact tests, and their coverage in a simulation."""

import math

import numpy as np
import pytest

from evaluation.significance import (
    Estimate,
    below_zero,
    combined,
    difference,
    holm,
    interval,
    normalised,
    paired,
)


def test_groups_of_one_size_give_the_usual_t():
    """For equal groups the error is the standard error of the mean of group means, with G - 1 degrees of freedom."""
    rng = np.random.default_rng(0)
    means, within = rng.normal(0.3, 1, 12), rng.normal(0, 1, (12, 5))
    values = (means[:, None] + within).ravel()
    found = difference([values], [np.zeros(60)], [1.0] * 60, np.repeat(range(12), 5))
    of_group = values.reshape(12, 5).mean(1)
    error = of_group.std(ddof=1) / math.sqrt(12)
    assert found.diff == pytest.approx(values.mean()) and found.dof == pytest.approx(11)
    assert found.variance == pytest.approx(error**2) and found.groups == 12
    half = 2.200985 * error  # t(11) at 97.5 %
    assert found.ci95 == pytest.approx([found.diff - half, found.diff + half], rel=1e-5)


def test_one_heavy_group_leaves_few_degrees_of_freedom():
    groups = [0] * 40 + list(range(1, 11))
    rng = np.random.default_rng(1)
    found = difference([rng.normal(size=50)], [np.zeros(50)], [1.0] * 50, groups)
    share = np.array([0.8, *[0.02] * 10])
    assert found.dof == pytest.approx(max(1, 1 / (share @ share) - 1)) and found.groups == 11


def test_the_seeds_spread_is_part_of_the_interval():
    rng = np.random.default_rng(2)
    text = rng.normal(0, 0.1, 40)
    runs = [text + shift for shift in (-0.3, -0.1, -0.2)]
    found = difference(runs, [np.zeros(40)], [1.0] * 40, range(40))
    assert found.by_seed == pytest.approx([np.mean(run) for run in runs])
    assert found.seed_variance == pytest.approx(np.var([-0.3, -0.1, -0.2], ddof=1) / 3)
    variance, dof = found.total
    assert variance == pytest.approx(found.variance + found.seed_variance) and 2 <= dof < 4
    alone = difference(runs[:1], [np.zeros(40)], [1.0] * 40, range(40))
    assert alone.seed_variance == 0 and alone.total == (alone.variance, alone.dof)
    # Where the other arm has the same seeds, each seed is compared with the same seed.
    assert difference(runs, runs, [1.0] * 40, range(40)).by_seed == (0.0, 0.0, 0.0)


def test_interval_and_p_value_agree():
    rng = np.random.default_rng(3)
    seen = set()
    for trial in range(200):
        runs = rng.normal(0.25, 1, (1 + trial % 3, 1)) * 0.3 + rng.normal(0.1, 1, (1 + trial % 3, 30))
        found = difference(runs, [np.zeros(30)], rng.uniform(1, 5, 30).tolist(), rng.integers(0, 12, 30).tolist())
        excludes = found.ci95[0] > 0 or found.ci95[1] < 0
        assert excludes == (found.p < 0.05)
        seen.add(excludes)
    assert len(seen) == 2  # both verdicts came up


def answers(won: int, lost: int, same: int) -> tuple[list[float], list[float]]:
    """Right (1) and wrong (0) answers of two models.

    Args:
        won, lost: number of items that only the first model, or only the second, has right.
        same: number of items that both have right.
    """
    return [1.0] * won + [0.0] * lost + [1.0] * same, [0.0] * won + [1.0] * lost + [1.0] * same


def test_right_and_wrong_answers_are_judged_as_by_mcnemars_exact_test():
    """The exact test counts the items that only one of two models has right; without a difference, the number won is
    binomial. The t finds no difference where the exact p is clearly above 0.05, and one wherever it is clearly below.
    """
    assert exact(9, 3) == pytest.approx(2 * sum(math.comb(12, k) for k in range(4)) / 2**12)
    for won in range(1, 25):
        for lost in range(won + 1):
            p = paired([answers(won, lost, 400)[0]], answers(won, lost, 400)[1]).p
            if exact(won, lost) > 0.08:
                assert p > 0.05, (won, lost)
            if exact(won, lost) < 0.02:
                assert p < 0.05, (won, lost)


def exact(won: int, lost: int) -> float:
    """McNemar's exact two-sided p."""
    from scipy.stats import binomtest

    return float(binomtest(won, won + lost).pvalue)


def test_four_against_none_is_no_evidence():
    """A percentile bootstrap would find a difference here, although McNemar's exact p is 0.125."""
    ours, base = answers(4, 0, 16)
    found = paired([ours], base)
    assert exact(4, 0) == 0.125 and found.p > 0.1
    low, high = found.ci95
    assert low < 0 < found.diff == 0.2 < high
    several = paired([ours, ours, ours], base)  # three seeds with the same answers add no information
    assert several.p == pytest.approx(found.p)
    with pytest.raises(ValueError, match=r"\[20\] and 19 items"):
        paired([ours], base[1:])


def test_a_difference_that_is_the_same_everywhere_has_no_known_error():
    """All seeds win both of two items: that no variance was seen does not mean that it is 0."""
    found = paired([[1.0, 1.0]] * 3, [0.0, 0.0])
    assert found.diff == 1 and found.ci95 is None and found.p is None
    other = difference([[0.0, 1.0, 0.5]], [[0.0, 0.0, 0.0]], [1.0] * 3, range(3))
    assert combined({"a": found, "b": other}, {"a": 0.5, "b": 0.5}).ci95 is None


def test_holm_by_hand():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": None}) == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})
    assert holm({"a": 0.7, "b": 0.9}) == {"a": 1.0, "b": 1.0} and holm({}) == {}


def test_the_mean_of_benchmarks_has_their_joint_error():
    rng = np.random.default_rng(4)
    found = {
        name: difference(rng.normal(0, s, (3, n)), [np.zeros(n)], [1.0] * n, range(n))
        for name, s, n in (("a", 1, 50), ("b", 2, 80))
    }
    whole = combined(found, {"a": 0.25, "b": 0.75})
    assert whole.diff == pytest.approx(0.25 * found["a"].diff + 0.75 * found["b"].diff)
    assert whole.variance == pytest.approx(found["a"].variance / 16 + found["b"].variance * 9 / 16)
    assert whole.by_seed == pytest.approx(0.25 * np.array(found["a"].by_seed) + 0.75 * np.array(found["b"].by_seed))
    assert min(found["a"].dof, found["b"].dof) < whole.dof < found["a"].dof + found["b"].dof


def test_nothing_is_shown_without_an_interval_or_by_nan():
    single = difference([[1.0, 2.0]], [[2.0, 3.0]], [1, 1], ["a", "a"])
    assert single.ci95 is None and single.p is None and interval(single.record()) == "-1.0000 [no interval]"
    assert not below_zero(single.record()) and not below_zero({"ci95": [float("nan")] * 2})
    assert below_zero({"ci95": [-2.0, -1.0]}) and not below_zero({"ci95": [-1.0, 0.0]})
    same = difference([[1.0, 2.0]], [[1.0, 2.0]], [1, 1], ["a", "b"])
    assert same.ci95 == [0.0, 0.0] and same.p == 1.0
    for values, weights in (([1.0, math.nan], [1, 1]), ([1.0, 2.0], [1, 0]), ([1.0, 2.0], [1, math.nan])):
        with pytest.raises(ValueError, match="finite values and positive weights"):
            difference([values], [[0.0, 0.0]], weights, ["a", "b"])
    with pytest.raises(ValueError, match="do not fit"):
        difference(np.zeros((3, 2)), np.zeros((2, 2)), [1, 1], ["a", "b"])


def test_common_scale():
    found = normalised({"base": 10.0, "fused": 20.0, "no_hot": 30.0})
    assert [each["min_max"] for each in found.values()] == [0, 0.5, 1]
    assert found["no_hot"]["z"] == pytest.approx(10 / math.sqrt(200 / 3)) and found["fused"]["z"] == 0
    assert normalised(dict.fromkeys("abc", 1.0))["a"] == {"z": 0.0, "min_max": 0.0}
    assert normalised({"base": 1.0, "fused": 2.0}) == {}


def sizes(rng: np.random.Generator, groups: int) -> np.ndarray:
    """Very unequal numbers of texts per group."""
    return np.maximum(1, np.round(np.exp(rng.normal(1, 0.8, groups)))).astype(int)


@pytest.mark.parametrize("groups", [10, 40])
@pytest.mark.parametrize("seeds", [1, 2, 3, 5])
@pytest.mark.parametrize("ratio", [0.25, 1.0, 4.0])
def test_intervals_cover_the_truth(groups, seeds, ratio):
    """95 % intervals contain the true difference in 92 to 98 % of all experiments.

    The texts of a group share its deviation, and groups have unequal sizes. Every seed has a deviation of its own,
    which adds `ratio` times as much to the error of the mean as the groups do. With one seed the truth is that of this
    seed.
    """
    rng = np.random.default_rng([groups, seeds, int(100 * ratio)])
    trials, covered = 600, 0
    of_seed = ratio * math.sqrt(seeds / groups)
    for _ in range(trials):
        group_of = np.repeat(np.arange(groups), sizes(rng, groups))
        tokens = rng.integers(20, 110, len(group_of)).astype(float)
        per_token = rng.normal(0, 1, groups)[group_of] + rng.normal(0, 0.7, len(group_of))
        shift = rng.normal(0, of_seed, seeds)
        own = rng.normal(0, 0.3 * of_seed, (seeds, groups))[:, group_of]
        values = (per_token + shift[:, None] + own) * tokens
        found = difference(values, [np.zeros(len(group_of))], tokens, group_of)
        low, high = found.ci95
        covered += low <= (shift[0] if seeds == 1 else 0.0) <= high
    assert 0.92 <= covered / trials <= 0.98


def test_the_record_of_an_estimate_holds_its_readings():
    found = Estimate(-0.2, 0.01, 20.0, (-0.2,), 21)
    assert found.record() == {"diff": -0.2, "ci95": found.ci95, "p": found.p, "dof": 20.0}
