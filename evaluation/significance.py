"""Whether two models differ: the difference of their losses or scores, with an interval and a test.

Two kinds of chance decide what a comparison shows. First, other texts would have given other differences: texts of one
group (a topic, a document) resemble each other, so the group is the unit, not the text. Second, another seed would have
trained another model: a mean over a few seeds carries their spread. `difference` combines both parts. Its interval and
its p-value are two readings of the same Student's t, so they never contradict each other. Right and wrong answers are
compared in the same way: where few answers changed, the t is as careful as McNemar's exact test
(tests/evaluation/test_significance.py compares the two).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import stdtr, stdtrit  # Student's t: its distribution function, and the inverse of that

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean difference and how well the data determine it.

    Attributes:
        diff: the difference, averaged over seeds where there are several.
        variance: how much `diff` would vary with other groups of items.
        dof: degrees of freedom of `variance`; 0 for a single group, from which no variance can be estimated.
        by_seed: the difference of each seed; a single number where nothing was trained more than once.
        groups: number of groups.
    """

    diff: float
    variance: float
    dof: float
    by_seed: tuple[float, ...]
    groups: int

    @property
    def seed_variance(self) -> float:
        """How much the mean over seeds would vary with other seeds, estimated from the spread of these.

        It is 0 for one seed, which has no spread; the difference then speaks of this seed alone.
        """
        return float(np.var(self.by_seed, ddof=1)) / len(self.by_seed) if len(self.by_seed) > 1 else 0.0

    @property
    def total(self) -> tuple[float, float]:
        """(variance, degrees of freedom) of groups and seeds together.

        The spread of the seeds' differences also contains how seeds differ on these very texts, which the variance over
        groups contains too, so the sum errs on the side of a wider interval.

        The degrees of freedom follow Satterthwaite's rule with one change: the variance of S seeds is weighted by
        (S + 4) / (S - 1). A few seeds often come out too similar by chance. Satterthwaite's rule then attributes nearly
        all variance to the groups and takes over their many degrees of freedom: where seeds vary most, its 95 %
        intervals contain the truth in 91 % of experiments with three seeds and in 87 % with two. With the change they
        do in 93 to 97 % (tests/evaluation/test_significance.py).
        """
        count, seeds = len(self.by_seed), self.seed_variance
        variance = self.variance + seeds
        if not seeds or not self.dof:
            return variance, self.dof
        counted = seeds * (count + 4) / (count - 1)
        squares = self.variance**2 / self.dof + counted**2 / (count - 1)
        return variance, (self.variance + counted) ** 2 / squares

    @property
    def known(self) -> bool:
        """Whether the data determine an error at all.

        They do not for a single group, nor for a difference that is the same everywhere, which happens by chance with
        two or three items.
        """
        variance, dof = self.total
        return dof > 0 and (variance > 0 or self.diff == 0)

    @property
    def ci95(self) -> list[float] | None:
        """The 95 % interval; None where no error is known."""
        if not self.known:
            return None
        variance, dof = self.total
        half = math.sqrt(variance) * float(stdtrit(dof, (1 + CONFIDENCE) / 2))
        return [self.diff - half, self.diff + half]

    @property
    def p(self) -> float | None:
        """Two-sided p-value of the hypothesis that there is no difference; None where no error is known.

        It is below 0.05 exactly where `ci95` excludes 0.
        """
        if not self.known:
            return None
        variance, dof = self.total
        return 2 * float(stdtr(dof, -abs(self.diff) / math.sqrt(variance))) if variance else 1.0

    def record(self) -> dict[str, Any]:
        """The entries of a result file: `diff`, `ci95`, `p` and `dof`."""
        return {"diff": self.diff, "ci95": self.ci95, "p": self.p, "dof": self.total[1]}


def difference(
    ours: Sequence[Sequence[float]],
    other: Sequence[Sequence[float]],
    weights: Sequence[float],
    groups: Sequence[Hashable],
) -> Estimate:
    """The difference (ours - other) of two ratios sum(values) / sum(weights) over the same n items.

    Let pi_g be the share of the weights that group g has, and r_g the difference within the group minus the overall
    one. The variance is the sum of pi_g^2 r_g^2 / (1 - 2 pi_g + sum pi^2), whose denominator makes it unbiased where
    all groups vary by the same amount, whatever their sizes (the CR2 estimator of Bell and McCaffrey, 2002). Its
    degrees of freedom are the effective number of groups, 1 / sum pi^2, minus one. With groups of one size both are
    those of a plain mean over groups.

    A group in which the two models do not differ says nothing about how differences vary, so there are never more
    degrees of freedom than groups that differ, minus one. With right or wrong answers of which few changed, this keeps
    the t close to the exact test.

    Args:
        ours, other: values of every item, [S, n] each, one row per seed; a model that was not trained has one row.
            Row s of one is compared with row s of the other, and a single row with every row of the other.
        weights: [n], for example tokens; ones for scores.
        groups: [n], the group of every item.
    Raises:
        ValueError: shapes that do not fit, no items, a weight that is not positive, or a value that is not finite.
    """
    a, b = (np.atleast_2d(np.asarray(values, float)) for values in (ours, other))
    w, n = np.asarray(weights, float), len(weights)
    seeds_fit = len(a) == len(b) or 1 in (len(a), len(b))
    if not n or not seeds_fit or any(count != n for count in (a.shape[1], b.shape[1], len(groups))):
        raise ValueError(f"values of shape {a.shape} and {b.shape}, {n} weights and {len(groups)} groups do not fit")
    values = a - b  # [S, n]
    if not np.isfinite(values).all() or not (w > 0).all():
        raise ValueError("a difference needs finite values and positive weights")
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    group_of = np.array([numbers[group] for group in groups])  # [n]
    sums = np.stack([np.bincount(group_of, row, minlength=len(numbers)) for row in values])  # [S, G]
    weight_of = np.bincount(group_of, w)  # [G]
    by_seed = sums.sum(1) / w.sum()
    diff = float(by_seed.mean())
    if len(numbers) == 1:
        return Estimate(diff, 0.0, 0.0, tuple(by_seed.tolist()), 1)
    share = weight_of / w.sum()
    squares = float(share @ share)
    residual = sums.mean(0) / weight_of - diff
    variance = float((share**2 / (1 - 2 * share + squares)) @ residual**2)
    changed = int((sums != 0).any(0).sum())
    dof = max(1.0, min(1 / squares, changed) - 1)
    return Estimate(diff, variance, dof, tuple(by_seed.tolist()), len(numbers))


def record_of_difference(
    ours: Sequence[float], other: Sequence[float], weights: Sequence[float], groups: Sequence[Hashable]
) -> dict[str, Any]:
    """`difference` of two models without seeds, as a record for files."""
    return difference([ours], [other], weights, groups).record()


def combined(estimates: Mapping[str, Estimate], weights: Mapping[str, float]) -> Estimate:
    """The weighted sum of differences on independent items, such as the mean over benchmarks.

    Seeds are summed one by one, so that their spread is that of the sum; the degrees of freedom are Satterthwaite's.

    Args:
        estimates: by name; each has the same seeds, or a single one.
        weights: the weight of every name.
    """
    variances = {name: weights[name] ** 2 * found.variance for name, found in estimates.items()}
    total = sum(variances.values())
    squares = sum(variances[name] ** 2 / found.dof for name, found in estimates.items() if found.dof)
    dof = total**2 / squares if squares else max(found.dof for found in estimates.values())
    if not all(found.known for found in estimates.values()):
        dof = 0.0
    seeds = max(len(found.by_seed) for found in estimates.values())
    by_seed = sum(weights[name] * np.broadcast_to(found.by_seed, seeds) for name, found in estimates.items())
    values = np.asarray(by_seed, float)
    groups = sum(found.groups for found in estimates.values())
    return Estimate(float(values.mean()), total, dof, tuple(values.tolist()), groups)


def paired(ours: Sequence[Sequence[float]], base: Sequence[float]) -> Estimate:
    """The difference of scores, item by item, where every item is a group of its own.

    Args:
        ours: [S, n], the score of every item, one row per seed.
        base: [n].
    Raises:
        ValueError: the two do not have the same number of items.
    """
    n = len(base)
    if any(len(row) != n for row in ours) or not n or not ours:
        raise ValueError(f"{[len(row) for row in ours]} and {n} items cannot be paired")
    return difference(ours, [base], [1.0] * n, range(n))


def holm(p_values: Mapping[Hashable, float | None]) -> dict[Hashable, float]:
    """Holm's adjusted p-values of one family of tests; tests without a p-value are left out.

    Read at some level, they keep the chance of even one false alarm in the family below that level, whatever the tests
    have in common. (scipy only controls the rate of false discoveries, which promises less.)
    """
    known = sorted(((name, p) for name, p in p_values.items() if p is not None), key=lambda test: test[1])
    adjusted: dict[Hashable, float] = {}
    largest = 0.0
    for rank, (name, p) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        adjusted[name] = largest
    return adjusted


def below_zero(found: Mapping[str, Any]) -> bool:
    """Whether a difference is reliably negative: its interval lies below 0. False without an interval, and for NaN."""
    return found["ci95"] is not None and bool(found["ci95"][1] < 0)


def interval(found: Mapping[str, Any], digits: int = 4) -> str:
    """A difference and its interval as text: `-0.0400 [-0.0500, -0.0300]`."""
    if found["ci95"] is None:
        return f"{found['diff']:+.{digits}f} [no interval]"
    low, high = found["ci95"]
    return f"{found['diff']:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def normalised(scores: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Arm -> {"z", "min_max"}: the arms of one domain on a common scale (the paper's Figure 1).

    All values are 0 when the arms are equal. The result is empty for fewer than three arms: of two, one would be 0 and
    the other 1 whatever they scored.

    Args:
        scores: arm -> mean score of the domain.
    """
    if len(scores) < 3:
        return {}
    values = np.array(list(scores.values()))
    mean, deviation = values.mean(), values.std()
    low, span = values.min(), values.max() - values.min()
    return {
        arm: {
            "z": float((value - mean) / deviation) if span else 0.0,
            "min_max": float((value - low) / span) if span else 0.0,
        }
        for arm, value in scores.items()
    }
