"""Made-up losses of all arms on 50 texts, and the counts of a set of texts."""

import numpy as np

from core.fusion.controls import CONTROLS
from evaluation.arms.run import TRAINED

# The rows of the table.
ARMS = ("base", *CONTROLS, "fused", *TRAINED)


def made_up(seed: int = 0) -> tuple[dict[str, list[float]], list[int]]:
    """(arm -> summed loss of every text in nats, number of tokens of every text).

    Base loses 3 nats per token, fused 0.05 less, and every other arm more, each by another amount.
    """
    rng = np.random.default_rng(seed)
    tokens = rng.integers(20, 40, 50)
    base = 3.0 * tokens
    shift = {arm: 0.1 * n for n, arm in enumerate(ARMS)} | {"base": 0.0, "fused": -0.05}
    noise = {arm: 0.0 if arm == "base" else rng.normal(0, 0.02, 50) for arm in ARMS}
    return {arm: (base + (shift[arm] + noise[arm]) * tokens).tolist() for arm in ARMS}, tokens.tolist()


def counts(tokens: list[int], groups: list[int], **more) -> dict:
    """What `TextSet.counts` says of texts with these tokens and groups."""
    return {"texts": len(tokens), "tokens": sum(tokens), "groups": len(set(groups)), **more}
