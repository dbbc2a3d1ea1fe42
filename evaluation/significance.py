"""Whether two models differ on the same items."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

RESAMPLES = 10_000


def paired(ours: Sequence[float], base: Sequence[float], seed: int = 0) -> dict[str, Any]:
    """Mean difference (ours - base), its 95 % interval and a two-sided p-value, item by item.

    The interval is a paired bootstrap over items. The p-value is McNemar's exact test (binomial on the items that only
    one of the two has right) where scores are 0 or 1, else the bootstrap's: twice the smaller share of resampled means
    on one side of 0.

    Raises:
        ValueError: the two do not have the same number of items.
    """
    a, b = np.asarray(ours, float), np.asarray(base, float)
    if a.shape != b.shape or not a.size:
        raise ValueError(f"{a.size} and {b.size} items cannot be paired")
    difference = a - b
    generator = np.random.default_rng(seed)
    # Counts of the distinct differences are all that a resampled mean needs: exact, and fast for thousands of items.
    values, counts = np.unique(difference, return_counts=True)
    means = generator.multinomial(a.size, counts / a.size, size=RESAMPLES) @ values / a.size
    low, high = np.quantile(means, (0.025, 0.975))
    out = {"diff": float(difference.mean()), "ci95": [float(low), float(high)]}
    if set(np.unique(a)) | set(np.unique(b)) <= {0.0, 1.0}:
        from scipy.stats import binomtest

        won, lost = int((difference > 0).sum()), int((difference < 0).sum())
        p = binomtest(won, won + lost).pvalue if won + lost else 1.0
        return {**out, "p": float(p), "test": "McNemar, exact", "won": won, "lost": lost}
    p = min(1.0, 2 * min((means <= 0).mean(), (means >= 0).mean()))
    return {**out, "p": float(max(p, 1 / RESAMPLES)), "test": "paired bootstrap"}


def normalised(scores: dict[str, float]) -> dict[str, dict[str, float]]:
    """Arm -> {"z", "min_max"}: the arms of one domain on a common scale (the paper's Figure 1). All 0 when they are
    equal.

    Args:
        scores: arm -> mean score of the domain.
    """
    values = np.array(list(scores.values()))
    deviation, span = values.std(), values.max() - values.min()
    return {arm: {"z": float((value - values.mean()) / deviation) if span else 0.0,
                  "min_max": float((value - values.min()) / span) if span else 0.0}
            for arm, value in scores.items()}  # fmt: skip
