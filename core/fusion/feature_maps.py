"""Feature maps: how the plans between two models become the linear maps of a transported weight (Eqs. 14, 20, 21).

For target layer l and projection c, with m running over the source layers:

    W~ = sum over m of  p[m] * Out[m] @ W_source[m] @ In[m]      [n, n'] = [n, m] @ [m, m'] @ [m', n']

| name        | p[m]                    | Out [n, m]                       | In [m', n']                       |
| ----------- | ----------------------- | -------------------------------- | --------------------------------- |
| coupling    | P_eff[l, m]             | Q_out                            | Q_in^T                            |
| barycentric | P_eff[l, m] / row's sum | n Q_out                          | m' Q_in^T                         |
| calibrated  | as barycentric          | diag(s_t) n Q_out diag(1 / s_s)  | diag(s_s) m' Q_in^T diag(1 / s_t) |
| regression  | as barycentric, largest | source outputs -> target outputs | target inputs -> source inputs    |

Here n Q and m' Q^T have rows that sum to 1, s_t and s_s are the standard deviations of the target's and the source's
neurons, and `largest` means that by default only the largest entry of the row takes part.

To add a feature map, derive a class from `FeatureMap` or from one of the four and add it to `FEATURE_MAPS` at the end.
Settings, `--help`, fusion and the controls read all they need from the class.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import lru_cache

import torch
from torch import Tensor

from core.errors import UserError
from core.fusion.inputs import Plans
from core.fusion.ridge import ridge_factor, solve_ridge

# A source layer with less than this share of a row of P_eff takes no part unless `p_topk` asks for it.
NEGLIGIBLE_SHARE = 1e-4
# Ridge factors that are kept per model: neighbouring target layers often read the same source layer.
KEPT_FACTORS = 8


class FeatureMap(ABC):
    """One row of the table above.

    Attributes:
        default_p_topk: how many source layers take part where the settings do not say. None stands for all that have
            at least NEGLIGIBLE_SHARE of their row of P_eff.
        reads_feature_plans: whether Out and In are made from Q, so that `q_topk` has entries to thin out.
        fuses_biases: whether the source's bias is transported as well, by Out alone.
        keeps_mean: whether W~ is corrected afterwards, so that the target's mean input gives its mean output again
            (`core.fusion.transport_weights.keep_mean`).
    """

    default_p_topk: int | None = None
    reads_feature_plans = True
    fuses_biases = True
    keeps_mean = False

    def __init__(self, plans: Plans, p_topk: int | None = None, q_topk: int | None = None, ridge: float = 0.01):
        self.plans, self.p_topk, self.q_topk = plans, p_topk, q_topk
        self.regressions = Regressions(plans, ridge)

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

    @abstractmethod
    def out_map(self, side: str, layer: int, m: int, rows: Tensor | None) -> Tensor:
        """Out [n, m] from source layer m to target layer `layer` on an output side, or the given rows [k, m] of it."""

    @abstractmethod
    def in_map(self, side: str, layer: int, m: int, columns: Tensor | None) -> Tensor:
        """In [m', n'] from target layer `layer` to source layer m on an input side, or the given columns [m', k]."""

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

    Both maps are fitted on centred rows of activations, so that the means of the two models play no part in them; the
    target's own mean output is kept afterwards, and it takes the place of a transported bias.
    """

    default_p_topk = 1
    reads_feature_plans = False
    fuses_biases = False
    keeps_mean = True

    def out_map(self, side: str, layer: int, m: int, rows: Tensor | None) -> Tensor:
        """The least-squares map from the source's outputs to the target's."""
        return self.regressions.between(("source", side, m), ("target", side, layer), rows)

    def in_map(self, side: str, layer: int, m: int, columns: Tensor | None) -> Tensor:
        """The least-squares map from the target's inputs to the source's."""
        In = self.regressions.between(("target", side, layer), ("source", side, m))
        return In if columns is None else In[:, columns]


class Regressions:
    """Ridge regressions between the recorded rows of two (model, side, layer), with the factors of recent ones kept."""

    def __init__(self, plans: Plans, ridge: float):
        self.plans, self.ridge = plans, ridge
        self._factors = {model: lru_cache(KEPT_FACTORS)(self._factor) for model in ("target", "source")}

    def between(
        self, predictors: tuple[str, str, int], responses: tuple[str, str, int], selected: Tensor | None = None
    ) -> Tensor:
        """The map [s, r] from the rows of `predictors` [T, r] to those of `responses` [T, s], or the selected rows of
        the map.

        Raises:
            ValueError: the ridge is too small, as `core.fusion.ridge.ridge_factor` says.
        """
        R, S = self.plans.rows(*predictors, "fit"), self.plans.rows(*responses, "fit")
        return solve_ridge(self._factors[predictors[0]](*predictors), R, S if selected is None else S[:, selected])

    def _factor(self, model: str, side: str, layer: int) -> Tensor:
        return ridge_factor(self.plans.rows(model, side, layer, "fit"), self.ridge)


def _inverse(scale: Tensor) -> Tensor:
    """1 / scale, and 0 for a constant neuron, which has no unit of its own."""
    return torch.where(scale > 0, scale.reciprocal(), torch.zeros_like(scale))


FEATURE_MAPS: dict[str, type[FeatureMap]] = {
    "coupling": Coupling,
    "barycentric": Barycentric,
    "calibrated": Calibrated,
    "regression": Regression,
}
