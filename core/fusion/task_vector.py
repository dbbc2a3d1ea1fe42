"""What an expert learned: the difference of its weights to those of the base that it was tuned from.

A task vector is transported in place of a whole source, W + alpha Out (W_source - W_base) In, as THESEUS does (Rinaldi
et al. 2026, "Transporting Task Vectors across Different Architectures without Training", PMLR 306). The target's own
weight is not damped by it, and what the expert and its base have in common plays no part.
"""

from __future__ import annotations

from torch import Tensor

from core.fusion.inputs import Weights


class TaskVector:
    """The weights of an expert less those of its base. Implements `core.fusion.inputs.Weights`.

    Attributes:
        expert, base: the weights of the two models.
    """

    def __init__(self, expert: Weights, base: Weights):
        self.expert, self.base = expert, base

    def weight(self, layer: int, projection: str) -> Tensor:
        """W_expert - W_base [out, in] of one projection."""
        return self.expert.weight(layer, projection) - self.base.weight(layer, projection)

    def bias(self, layer: int, projection: str) -> Tensor | None:
        """b_expert - b_base [out], where a bias that only one of the two has is 0 in the other; None without any."""
        expert, base = self.expert.bias(layer, projection), self.base.bias(layer, projection)
        if expert is None:
            return None if base is None else -base
        return expert if base is None else expert - base
