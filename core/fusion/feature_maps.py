"""Feature maps: how the plans between two models become the linear maps of a transported weight (Eqs. 14, 20, 21).

For target layer l and projection c, with m running over the source layers:

    W~ = sum over m of  p[m] * Out[m] @ W_source[m] @ In[m]      [n, n'] = [n, m] @ [m, m'] @ [m', n']

| name        | p[m]                    | Out [n, m]                       | In [m', n']                       |
| ----------- | ----------------------- | -------------------------------- | --------------------------------- |
| coupling    | P_eff[l, m]             | Q_out                            | Q_in^T                            |
| barycentric | P_eff[l, m] / row's sum | n Q_out                          | m' Q_in^T                         |
| calibrated  | as barycentric          | diag(s_t) n Q_out diag(1 / s_s)  | diag(s_s) m' Q_in^T diag(1 / s_t) |
| regression  | as barycentric, largest | source outputs -> target outputs | target inputs -> source inputs    |
| procrustes  | as regression           | the same, orthogonal             | as regression                     |

In the sum, m is a source layer; in the shapes, n and n' are numbers of target neurons, and m and m' of source neurons.
n Q and m' Q^T have rows that sum to 1, and s_t and s_s are the standard deviations of the target's and the source's
neurons. `largest` means that by default only the largest entry of the row takes part. `regression` never forms In; its
class says why.

With a task vector (core/fusion/task_vector.py), W_source[m] is the difference of an expert to its base, and the sum is
a change of the target's weight. The plans, Out and In are those of the expert.

To add a feature map, derive a class from `FeatureMap` or from one of the five and add it to `FEATURE_MAPS` at the end.
Settings, `--help`, fusion and the controls read all they need from the class.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from copy import copy
from functools import lru_cache

import torch
from torch import Tensor

from core.errors import UserError
from core.fusion.fits import Fits
from core.fusion.inputs import Plans, Weights
from core.fusion.projections import PROJECTIONS, ROWS
from core.fusion.ridge import orthogonal_map

# A source layer with less than this share of a row of P_eff takes no part unless `p_topk` asks for it.
NEGLIGIBLE_SHARE = 1e-4
# projection -> (W~, b~ or None)
Transported = dict[str, tuple[Tensor, Tensor | None]]


class FeatureMap(ABC):
    """One row of the table above.

    Attributes:
        default_p_topk: how many source layers take part where the settings do not say. None stands for all that have
            at least NEGLIGIBLE_SHARE of their row of P_eff.
        reads_feature_plans: whether Out and In are made from Q, so that `q_topk` has entries to thin out.
        fuses_biases: whether the source's bias is transported as well, by Out alone.
        keeps_mean: whether W~ is corrected afterwards, so that the target's mean input gives its mean output again
            (`core.fusion.transport_weights.Transport.keep_mean`).
    """

    default_p_topk: int | None = None
    reads_feature_plans = True
    fuses_biases = True
    keeps_mean = False

    def __init__(self, plans: Plans, source: Weights, p_topk: int | None, q_topk: int | None, ridge: float, rows: str):
        self.plans, self.source, self.p_topk, self.q_topk = plans, source, p_topk, q_topk
        self.fits = Fits(plans, source, ridge, rows)

    def with_rows(self, rows: str) -> FeatureMap:
        """The same map with W~ regressed on rows of another kind; the regressions that both need are kept once."""
        other = copy(self)
        other.fits = self.fits.with_rows(rows)
        return other

    def shares(self, layer: int, projection: str) -> dict[int, float]:
        """p[m] of every source layer that takes part: the largest entries of the row of P_eff, rescaled so that leaving
        out the others loses no mass (A.1).

        Raises:
            UserError: the row has no mass, so that no source layer corresponds to this target layer.
        """
        row = self.plans.layer_plan(projection)[layer]
        total = row.sum()
        if not total > 0:
            raise UserError(
                f"P_eff of target layer {layer}, projection {projection}, sums to {float(total)}: the layer plans of "
                "its input and its output have no source layer in common, because eta is too small; make the plans "
                "again with a larger --eta (default 0.1)"
            )
        values, order = row.sort(descending=True, stable=True)
        keep = self.p_topk or self.default_p_topk or int((values >= NEGLIGIBLE_SHARE * total).sum())
        values, order = values[:keep], order[:keep]
        values = values * (self.mass(total) / values.sum())
        return {int(m): float(p) for m, p in sorted(zip(order.tolist(), values.tolist(), strict=True))}

    def mass(self, total: Tensor) -> Tensor:
        """What the shares of a target layer sum to, when its row of P_eff sums to `total`."""
        return torch.ones_like(total)

    def transported(self, layer: int, indices: Mapping[str, Tensor]) -> Transported:
        """W~ and b~ of projections of one target layer, on the selected rows [k, n'] or columns [n, k].

        b~ [k] or [n] is Out applied to the source's bias; it is None where the source has no bias or this map
        transports none. Source layers are the outer loop, so that projections that read the same input share its map.

        Args:
            indices: projection -> selected rows or columns [k].
        """
        shares = {c: self.shares(layer, c) for c in indices}
        whole_in = lru_cache(1)(lambda side, m: self.in_map(side, layer, m, None))
        weights: dict[str, Tensor] = {}
        biases: dict[str, Tensor] = {}
        for m in sorted(set().union(*shares.values())):
            for c, index in indices.items():
                p, projection = shares[c].get(m), PROJECTIONS[c]
                if p is None:
                    continue
                W, b = self.source.weight(m, c), self.source.bias(m, c) if self.fuses_biases else None
                if projection.axis == ROWS:
                    Out, In = self.out_map(c, layer, m, index), whole_in(projection.input_side, m)
                    part = (Out @ W) @ In  # ([k, m] @ [m, m']) @ [m', n'] -> [k, n']
                else:
                    Out, In = self.out_map(c, layer, m, None), self.in_map(projection.input_side, layer, m, index)
                    part = Out @ (W @ In)  # [n, m] @ ([m, m'] @ [m', k]) -> [n, k]
                weights[c] = p * part if c not in weights else weights[c].add_(part, alpha=p)
                if b is not None:
                    biases[c] = p * (Out @ b) if c not in biases else biases[c].add_(Out @ b, alpha=p)
        return {c: (weights[c], biases.get(c)) for c in indices}

    @abstractmethod
    def out_map(self, side: str, layer: int, m: int, rows: Tensor | None) -> Tensor:
        """Out [n, m] from source layer m to target layer `layer` on an output side, or the given rows [k, m] of it."""

    @abstractmethod
    def in_map(self, side: str, layer: int, m: int, columns: Tensor | None) -> Tensor:
        """In [m', n'] from target layer `layer` to source layer m on an input side, or the given columns [m', k]."""

    def responses(self, layer: int, projection: str, outputs: Tensor | None) -> Tensor:
        """Z [T, n]: the source's outputs as the target's neurons would give them; of regression alone.

        Raises:
            UserError: this feature map has none.
        """
        raise UserError("filtered_self needs the responses of a regression; leave it out with this feature map")

    def plan(self, side: str, layer: int, m: int, rows: Tensor | None) -> Tensor:
        """Q [n, m] or the given rows of it. With `q_topk` only the largest entries of each row stay, rescaled to the
        row's mass (A.1)."""
        Q = self.plans.feature_plan(side, layer, m, rows)
        if not self.q_topk or self.q_topk >= Q.shape[1]:
            return Q
        values, columns = Q.topk(self.q_topk, dim=1)
        values *= Q.sum(1, keepdim=True) / values.sum(1, keepdim=True)
        return torch.zeros_like(Q).scatter_(1, columns, values)


class Coupling(FeatureMap):
    """Eq. 14 to the letter: Q and P are joint distributions, whose entries sum to 1 all together.

    W~ is then smaller than W by many orders of magnitude, so that fusing with it only damps the target.
    """

    def mass(self, total: Tensor) -> Tensor:
        """The row keeps its own mass, which is 1 / L for a plan with uniform marginals."""
        return total

    def out_map(self, side: str, layer: int, m: int, rows: Tensor | None) -> Tensor:
        """Q_out."""
        return self.plan(side, layer, m, rows)

    def in_map(self, side: str, layer: int, m: int, columns: Tensor | None) -> Tensor:
        """Q_in^T."""
        return self.plan(side, layer, m, columns).T


class Barycentric(FeatureMap):
    """Conditional expectations: a source neuron is read as an average of target neurons, and a target neuron written as
    an average of source neurons, so that the rows of Out and In sum to 1."""

    def out_map(self, side: str, layer: int, m: int, rows: Tensor | None) -> Tensor:
        """n Q_out."""
        return self.plan(side, layer, m, rows) * len(self.plans.std("target", side, layer))

    def in_map(self, side: str, layer: int, m: int, columns: Tensor | None) -> Tensor:
        """m' Q_in^T."""
        In = self.plan(side, layer, m, columns).T
        return In * len(In)


class Calibrated(Barycentric):
    """Barycentric maps between raw units: plans are fitted on standardised activations, s is the standard deviation."""

    def out_map(self, side: str, layer: int, m: int, rows: Tensor | None) -> Tensor:
        """diag(s_target) n Q_out diag(1 / s_source)."""
        target = self.plans.std("target", side, layer)
        target = target if rows is None else target[rows]
        return target[:, None] * super().out_map(side, layer, m, rows) * _inverse(self.plans.std("source", side, m))

    def in_map(self, side: str, layer: int, m: int, columns: Tensor | None) -> Tensor:
        """diag(s_source) m' Q_in^T diag(1 / s_target)."""
        target = self.plans.std("target", side, layer)
        target = target if columns is None else target[columns]
        return self.plans.std("source", side, m)[:, None] * super().in_map(side, layer, m, columns) * _inverse(target)


class Regression(FeatureMap):
    """Optimal transport says which layers correspond (P), ridge regression says how their features do.

    Out [n, m] maps the source's outputs y_s = W_s x_s to the target's, and W~ = Out W_s In, where In maps the target's
    inputs x to the source's, is the same as one regression from x to Z = Out y_s on the same rows. So W~ needs the
    source's outputs alone, and they are recorded, but for those of gate and up, which are W_s x_s. Of a task vector y_s
    is (W_s - W_base) x_s, where x_s are the inputs that were recorded on the expert. All maps are fitted on centred
    rows, so that the means of the two models play no part in them; the target's own mean output is kept afterwards, and
    it takes the place of a transported bias.
    """

    default_p_topk = 1
    reads_feature_plans = False
    fuses_biases = False
    keeps_mean = True

    def transported(self, layer: int, indices: Mapping[str, Tensor]) -> Transported:
        """W~ of projections of one target layer; no biases. As `FeatureMap.transported`."""
        return {c: (self.regressed(layer, c, index), None) for c, index in indices.items()}

    def regressed(self, layer: int, projection: str, index: Tensor) -> Tensor:
        """W~ of one projection on the selected rows [k, n'] or columns [n, k]."""
        outputs = index if PROJECTIONS[projection].axis == ROWS else None
        responses = self.responses(layer, projection, outputs)
        found = self.fits.regress(layer, projection, responses, outputs)
        return found if PROJECTIONS[projection].axis == ROWS else found[:, index]

    def responses(self, layer: int, projection: str, outputs: Tensor | None) -> Tensor:
        """Z [T, n], or the given columns of it: the source's outputs as the target's neurons would give them."""
        parts = [p * self.mapped(layer, projection, m, outputs) for m, p in self.shares(layer, projection).items()]
        return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]

    def mapped(self, layer: int, projection: str, m: int, outputs: Tensor | None) -> Tensor:
        """What Out makes of what source layer m gives, [T, n], or the given columns of it.

        Where Out is the least-squares map and reads the rows that it was fitted on, the regression knows the result
        without Out itself, which is large for the wide sides of the MLP.
        """
        if not self.fits.of_task_vector and type(self).out_map is Regression.out_map:
            target = self.plans.rows("target", projection, layer, "fit")
            return self.fits.of("source", projection, m).fitted(target if outputs is None else target[:, outputs])
        given = self.given(projection, m)
        return given @ self.out_map(projection, layer, m, outputs).T  # [T, m] @ [m, n] -> [T, n]

    def given(self, projection: str, m: int) -> Tensor:
        """What source layer m gives to the target [T, m]: its outputs, or of a task vector its part in them."""
        if not self.fits.of_task_vector:
            return self.fits.source_outputs(projection, m)
        return self.fits.source_inputs(projection, m) @ self.source.weight(m, projection).T  # [T, m'] @ [m', m]

    def out_map(self, side: str, layer: int, m: int, rows: Tensor | None) -> Tensor:
        """The least-squares map from the source's outputs to the target's."""
        target = self.plans.rows("target", side, layer, "fit")
        return self.fits.of("source", side, m).map(target if rows is None else target[:, rows])

    def in_map(self, side: str, layer: int, m: int, columns: Tensor | None) -> Tensor:
        """The least-squares map from the target's inputs to the source's. `transported` does without it."""
        In = self.fits.of("target", side, layer).map(self.plans.rows("source", side, m, "fit"))
        return In if columns is None else In[:, columns]


class Procrustes(Regression):
    """`regression` with an orthogonal map of the outputs, which turns them and stretches nothing, as THESEUS maps task
    vectors (Rinaldi et al. 2026, PMLR 306). Between layers of unequal width the map has orthonormal rows or columns."""

    def out_map(self, side: str, layer: int, m: int, rows: Tensor | None) -> Tensor:
        """The orthogonal map from the source's outputs to the target's."""
        source, target = self.fits.source_outputs(side, m), self.plans.rows("target", side, layer, "fit")
        # Outputs span no more directions than there are inputs. The narrow input of the MLP stands for that of down,
        # which is wider than its outputs.
        inputs = PROJECTIONS[side].layer_sides[0]
        rank = min(len(self.plans.mean(model, inputs, where)) for model, where in (("target", layer), ("source", m)))
        Out = orthogonal_map(source, target, rank)
        return Out if rows is None else Out[rows]


def _inverse(scale: Tensor) -> Tensor:
    """1 / scale, and 0 for a constant neuron, which has no unit of its own."""
    return torch.where(scale > 0, scale.reciprocal(), torch.zeros_like(scale))


FEATURE_MAPS: dict[str, type[FeatureMap]] = {
    "coupling": Coupling,
    "barycentric": Barycentric,
    "calibrated": Calibrated,
    "regression": Regression,
    "procrustes": Procrustes,
}
