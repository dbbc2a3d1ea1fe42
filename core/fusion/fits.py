"""The regressions that `regression` and `procrustes` share: maps between recorded rows, and the last one, of W~."""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from core.fusion.anchored import Anchors, regress
from core.fusion.inputs import Plans, Weights
from core.fusion.projections import PROJECTIONS
from core.fusion.ridge import Ridge
from core.fusion.task_vector import TaskVector

# Regressions that are kept: those of one target layer, which has seven projections with four inputs. Neighbouring
# layers often read the same source layer.
KEPT_FITS = 11


class Fits:
    """Ridge regressions between recorded rows, and the final regression, which gives W~.

    Attributes:
        kind: which rows the final regression is fitted on (`core.fusion.anchored.KINDS`).
        of_task_vector: whether the responses are those of a task vector.
        source: the weights of the source; of a task vector those of the expert, on which its rows were recorded.
        of: (model, side, layer) -> the regressions on its rows; those of recent sides are kept.
    """

    def __init__(self, plans: Plans, source: Weights, ridge: float, rows: str):
        self.plans, self.ridge, self.kind = plans, ridge, rows
        self.of_task_vector = isinstance(source, TaskVector)
        self.source = source.expert if isinstance(source, TaskVector) else source
        self.of = lru_cache(KEPT_FITS)(self._on)

    def _on(self, model: str, side: str, layer: int) -> Ridge:
        """The regressions on the rows of one side.

        The outputs of the source that are not recorded are W_s x_s, all of them in the span of the columns of W_s. In
        an orthonormal basis of this span each output takes as many numbers as an input x_s has, and the regressions on
        a wide side of the MLP become several times faster.
        """
        if model == "target" or side not in PROJECTIONS or PROJECTIONS[side].matches_layers:
            return Ridge(self.plans.rows(model, side, layer, "fit"), self.ridge)
        x = self.source_inputs(side, layer)
        basis, triangle = torch.linalg.qr(self.source.weight(layer, side))  # W_s [m, m'] = [m, r] @ [r, m']
        return Ridge(x @ triangle.T, self.ridge, basis)  # [T, m'] @ [m', r]

    def source_outputs(self, projection: str, layer: int) -> Tensor:
        """What a projection of the source gives [T, m], centred: as recorded, or computed from what it reads."""
        if PROJECTIONS[projection].matches_layers:
            return self.plans.rows("source", projection, layer, "fit")
        return self.source_inputs(projection, layer) @ self.source.weight(layer, projection).T  # [T, m'] @ [m', m]

    def source_inputs(self, projection: str, layer: int) -> Tensor:
        """What a projection of the source reads [T, m'], centred."""
        return self.plans.rows("source", PROJECTIONS[projection].input_side, layer, "fit")

    def with_rows(self, rows: str) -> Fits:
        """The same regressions, with a final one on rows of another kind."""
        other = copy(self)
        other.kind = rows
        return other

    @property
    def gives_change(self) -> bool:
        """Whether the final regression gives a change of the target's weight, which is to be added to it, and not W~
        itself.

        This is so with a task vector, and where only the difference to the target's own outputs is regressed. Where the
        source says nothing, the change is 0.
        """
        return self.of_task_vector or self.kind == "difference"

    def regress(self, layer: int, projection: str, responses: Tensor, outputs: Tensor | None) -> Tensor:
        """The weight [k, n'] that gives the responses [T, k] for the target's inputs, on the rows of the settings.

        With `difference` it is the weight that gives the responses less the target's own outputs. The responses of a
        task vector are differences already.

        Args:
            outputs: the columns of the target's outputs that the responses are for; None for all.
        """
        side = PROJECTIONS[projection].input_side
        if self.kind == "aligned":
            return self.of("target", side, layer).map(responses)
        anchors = self.anchors(layer, projection, outputs)
        if self.kind == "difference":
            own = self.plans.rows("target", projection, layer, "fit")
            responses = responses - (own if outputs is None else own[:, outputs])
        if self.gives_change:
            anchors = replace(anchors, y=torch.zeros_like(anchors.y))
        if not len(anchors.x):
            return self.of("target", side, layer).map(responses)
        return regress(self.plans.rows("target", side, layer, "fit"), responses, self.ridge, anchors)

    def anchors(self, layer: int, projection: str, outputs: Tensor | None) -> Anchors:
        """The target's inputs and outputs at positions without a partner."""
        x = self.plans.unaligned(PROJECTIONS[projection].input_side, layer)
        y = self.plans.unaligned(projection, layer)
        return Anchors(x, y if outputs is None else y[:, outputs], self.plans.unaligned_weight)

    def mean_input(self, side: str, layer: int) -> Tensor:
        """The mean [n'] of the target's inputs over the rows of the final regression."""
        mean = self.plans.mean("target", side, layer)
        if self.kind == "aligned":
            return mean
        x = self.plans.unaligned(side, layer)
        if not len(x):
            return mean
        aligned = len(self.plans.rows("target", side, layer, "fit"))
        others = self.plans.unaligned_weight * len(x)
        return self.plans.fit_mean(side, layer) + x.mean(0) * (others / (aligned + others))
