"""The losses of arms on the same texts, and the differences between them with their intervals."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from evaluation.significance import difference


class Paired:
    """Losses of several arms on the same texts.

    Trainings `ARM/SEED` make up one arm: its loss is the mean over seeds, and the spread of the seeds is part of the
    intervals (`evaluation.significance.difference`).

    Attributes:
        mean: arm -> loss of every text, averaged over its seeds.
        weights: what the sum of losses is divided by, of every text, such as its number of tokens.
        groups: group of every text.
    """

    def __init__(
        self, per_text: Mapping[str, Sequence[float]], weights: Sequence[float], groups: Sequence[Hashable]
    ) -> None:
        """Keep the losses, `per_text`: arm, or `ARM/SEED` -> summed loss of every text."""
        self._runs: dict[str, dict[str, Sequence[float]]] = {}
        for name, sums in per_text.items():
            arm, _, seed = name.partition("/")
            self._runs.setdefault(arm, {})[seed] = sums
        self.mean = {arm: np.mean(list(by_seed.values()), axis=0) for arm, by_seed in self._runs.items()}
        self.weights, self.groups = weights, groups

    def average(self, arm: str) -> float:
        """The loss of an arm per unit of weight."""
        return float(self.mean[arm].sum() / sum(self.weights))

    def minus(self, a: str, b: str) -> dict[str, Any]:
        """Arm a minus arm b, as `Estimate.record` gives it, with "better": texts on which a has the smaller loss, and
        "seeds" where one was trained; each seed is compared with the same seed where both arms have several."""
        seeds = [seed for seed in {**self._runs[a], **self._runs[b]} if seed]
        estimate = difference(self._values(a, seeds), self._values(b, seeds), self.weights, self.groups)
        by_seed = {"seeds": dict(zip(seeds, estimate.by_seed, strict=True))} if seeds else {}
        return {**estimate.record(), "better": int((self.mean[a] < self.mean[b]).sum()), **by_seed}

    def _values(self, arm: str, seeds: Sequence[str]) -> list[Sequence[float]]:
        runs = self._runs[arm]
        return [runs[""]] if "" in runs else [runs[seed] for seed in seeds]
