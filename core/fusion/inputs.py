"""What fusion reads, as two small protocols: the weights of a model, and a plan directory.

Fusion computes with tensors and knows no files. `core.models.checkpoints.Checkpoint` implements the first protocol,
`core.runs.plan_directory.PlanDirectory` the second, and tests implement both with random tensors.

Shapes everywhere in this room: n and n' are the target's outputs and inputs of a projection, m and m' the source's.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Weights(Protocol):
    """The projections of one model in float32, read one tensor at a time."""

    def weight(self, layer: int, projection: str) -> Tensor:
        """The weight [out, in] of one projection."""

    def bias(self, layer: int, projection: str) -> Tensor | None:
        """The bias [out] of one projection; None when the model has none there."""


class Plans(Protocol):
    """What stage 1 found out about a pair of models; `model` is `target` or `source`."""

    shape: tuple[int, int]  # (L, M): the numbers of target layers and source layers

    def layer_plan(self, projection: str) -> Tensor:
        """P_eff [L, M] of a projection (Eq. 13)."""

    def feature_plan(self, side: str, target_layer: int, source_layer: int, rows: Tensor | None = None) -> Tensor:
        """The plan Q [n, m] between the neurons of two layers, or the given rows of it."""

    def rows(self, model: str, side: str, layer: int, part: str) -> Tensor:
        """Activations [T, n], centred: those that regressions are fitted on (`fit`), or those kept aside (`aside`)."""

    @property
    def unaligned_weight(self) -> float:
        """How many positions without a partner one of their rows stands for, when an aligned row stands for one."""
        ...

    def unaligned(self, side: str, layer: int) -> Tensor:
        """The target's activations [U, n] at positions without a partner, relative to `fit_mean`."""
        ...

    def fit_mean(self, side: str, layer: int) -> Tensor:
        """The target's mean activation [n] over the rows that regressions are fitted on."""
        ...

    def mean(self, model: str, side: str, layer: int) -> Tensor:
        """The mean activation [n] of every neuron."""

    def std(self, model: str, side: str, layer: int) -> Tensor:
        """The standard deviation [n] of every neuron."""

    def strongest(self, side: str, layer: int) -> Tensor:
        """The numbers [n] of the target's neurons, from the strongest to the weakest."""
