"""Transported weights (Eqs. 14, 20, 21) of every projection, from plans and the source's weights.

For target layer l and projection c:  W~ = sum over m of p[m] * Out[m] @ W_source[m] @ In[m].
Four feature maps say what p, Out and In are; see `Transport`. Shapes: n, n' target outputs and inputs of a
projection, m, m' the source's. Only the selected rows (q, k, v) or columns (o) of W~ are ever computed.

Plans and weights come in through two small protocols: this file knows no files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

from core.errors import UserError
from core.fusion.projections import COLUMNS, PROJECTIONS, ROWS
from core.fusion.residual import Residual, check_finite, select
from core.fusion.ridge import ridge_factor, solve_ridge
from core.fusion.settings import FusionSettings

# Source layers with less than this share of a row of P_eff take no part unless `p_topk` asks for them.
NEGLIGIBLE_SHARE = 1e-4
# Regression maps kept for neighbouring target layers that read the same source layer.
MAP_CACHE = 8


class Weights(Protocol):
    """Attention weights of one model, read one tensor at a time, float32."""

    def weight(self, layer: int, projection: str) -> Tensor: ...  # [out, in]
    def bias(self, layer: int, projection: str) -> Tensor | None: ...  # [out]


class Plans(Protocol):
    """A plan directory (core.runs.plan_directory.PlanDirectory): model is `target` or `source`."""

    shape: tuple[int, int]  # (L, M)

    def layer_plan(self, projection: str) -> Tensor: ...  # P_eff [L, M] of a projection
    # Q [n, m], or some rows of it
    def feature_plan(self, side: str, target_layer: int, source_layer: int, rows: Tensor | None) -> Tensor: ...
    def rows(self, model: str, side: str, layer: int, part: str) -> Tensor: ...  # `fit` or `aside`, centred [T, n]
    def mean(self, model: str, side: str, layer: int) -> Tensor: ...  # [n]
    def std(self, model: str, side: str, layer: int) -> Tensor: ...  # [n]
    def strongest(self, side: str, layer: int) -> Tensor: ...  # target neurons, strongest first [n]


class Transport:
    """W~ of any target layer and projection, from one plan directory and the source's weights.

    | feature map | p[m] | Out [n, m] | In [m', n'] |
    | coupling    | P_eff[l, m] | Q_out | Q_in^T |  (Eq. 14 to the letter)
    | barycentric | P_eff row / its sum | n Q_out | m' Q_in^T |
    | calibrated  | as barycentric | diag(s_t) n Q_out diag(1/s_s) | diag(s_s) m' Q_in^T diag(1/s_t) |
    | regression  | as barycentric, top p_topk | source outputs -> target outputs | target inputs -> source inputs |
    """

    def __init__(self, plans: Plans, source: Weights, settings: FusionSettings):
        self.plans, self.source, self.settings = plans, source, settings
        self._target_factor = lru_cache(MAP_CACHE)(lambda side, layer: self._factor("target", side, layer))
        self._source_factor = lru_cache(MAP_CACHE)(lambda side, layer: self._factor("source", side, layer))
        # q, k and v read the same input and share the map of all of it.
        self._whole_in = lru_cache(1)(lambda side, layer, m: self._in_map(side, layer, m, None))

    def layer_weights(self, layer: int, projection: str) -> dict[int, float]:
        """p[m] of every source layer that takes part: the `p_topk` largest, by default those with at least
        NEGLIGIBLE_SHARE of the row (one for `regression`). The row's mass is kept.

        Raises:
            UserError: the row has no mass, so that no source layer corresponds to this one.
        """
        row = self.plans.layer_plan(projection)[layer]
        if not row.sum() > 0:
            raise UserError(
                f"P_eff of target layer {layer}, projection {projection}, sums to {float(row.sum())}: the layer plans "
                "of its input and its output have no source layer in common, because eta is too small; make the plans "
                "again with a larger --eta (default 0.1)"
            )
        mass = row.sum() if self.settings.feature_map == "coupling" else torch.ones_like(row.sum())
        values, order = row.sort(descending=True, stable=True)
        keep = self.settings.p_topk or (
            1 if self.settings.feature_map == "regression" else int((values >= NEGLIGIBLE_SHARE * row.sum()).sum())
        )
        values, order = values[:keep], order[:keep]
        values = values * (mass / values.sum())
        return {int(m): float(p) for m, p in sorted(zip(order.tolist(), values.tolist(), strict=True))}

    def transported(self, layer: int, indices: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor | None]]:
        """W~ and b~ of projections of one target layer, on the selected rows [k, n'] (q, k, v) or columns [n, k] (o).

        b~ is Out applied to the source's bias (the three OT maps), [k] or [n]; None for `regression` and where the
        source has no bias. Source layers are the outer loop: q, k and v read the same input and share its map.

        Args:
            indices: projection -> selected rows or columns [k].
        """
        shares = {c: self.layer_weights(layer, c) for c in indices}
        weights: dict[str, Tensor] = {}
        biases: dict[str, Tensor] = {}
        for m in sorted(set().union(*shares.values())):
            for c, index in indices.items():
                p = shares[c].get(m)
                if p is None:
                    continue
                Out, In = self._maps(layer, m, c, index)
                W = self.source.weight(m, c)
                # [n, m] @ ([m, m'] @ [m', k]) -> [n, k], or ([k, m] @ [m, m']) @ [m', n'] -> [k, n']
                part = Out @ (W @ In) if PROJECTIONS[c].axis == COLUMNS else (Out @ W) @ In
                weights[c] = p * part if c not in weights else weights[c].add_(part, alpha=p)
                b = self.source.bias(m, c)
                if b is not None and self.settings.feature_map != "regression":
                    biases[c] = p * (Out @ b) if c not in biases else biases[c].add_(Out @ b, alpha=p)
        return {c: (weights[c], biases.get(c)) for c in indices}

    def self_map(self, layer: int, projection: str) -> Tensor:
        """The target's own outputs regressed on its own inputs [n, n']: smoothing without a source (control)."""
        side = PROJECTIONS[projection].input_side
        R = self.plans.rows("target", side, layer, "fit")
        S = self.plans.rows("target", projection, layer, "fit")
        return solve_ridge(self._target_factor(side, layer), R, S)

    def _maps(self, layer: int, m: int, projection: str, index: Tensor) -> tuple[Tensor, Tensor]:
        """(Out, In) of one pair of layers, on the selection only: Out [k, m] and In [m', n'] where rows are selected,
        Out [n, m] and In [m', k] where columns are."""
        place = PROJECTIONS[projection]
        if place.axis == ROWS:
            return self._out_map(projection, layer, m, index), self._whole_in(place.input_side, layer, m)
        return self._out_map(projection, layer, m, None), self._in_map(place.input_side, layer, m, index)

    def _out_map(self, side: str, layer: int, m: int, rows: Tensor | None) -> Tensor:
        """Out [n, m], or its `rows` [k, m]."""
        if self.settings.feature_map == "regression":
            R = self.plans.rows("source", side, m, "fit")
            S = self.plans.rows("target", side, layer, "fit")
            return solve_ridge(self._source_factor(side, m), R, S if rows is None else S[:, rows])
        Out = self._sparse_plan(side, layer, m, rows)
        if self.settings.feature_map == "coupling":
            return Out
        target = self.plans.std("target", side, layer)
        Out = Out * len(target)
        if self.settings.feature_map == "calibrated":
            target = target if rows is None else target[rows]
            Out = target[:, None] * Out * _inverse(self.plans.std("source", side, m))
        return Out

    def _in_map(self, side: str, layer: int, m: int, columns: Tensor | None) -> Tensor:
        """In [m', n'], or its `columns` [m', k]."""
        if self.settings.feature_map == "regression":
            R = self.plans.rows("target", side, layer, "fit")
            S = self.plans.rows("source", side, m, "fit")
            In = solve_ridge(self._target_factor(side, layer), R, S)
            return In if columns is None else In[:, columns]
        In = self._sparse_plan(side, layer, m, columns).T
        if self.settings.feature_map != "coupling":
            In = In * len(In)
        if self.settings.feature_map == "calibrated":
            target = self.plans.std("target", side, layer)
            target = target if columns is None else target[columns]
            In = self.plans.std("source", side, m)[:, None] * In * _inverse(target)
        return In

    def _sparse_plan(self, side: str, layer: int, m: int, rows: Tensor | None) -> Tensor:
        """Q [n, m] or `rows` of it, with only the `q_topk` largest entries of each row when asked (A.1); the row's mass
        is kept."""
        Q = self.plans.feature_plan(side, layer, m, rows)
        keep = self.settings.q_topk
        if not keep or keep >= Q.shape[1]:
            return Q
        values, columns = Q.topk(keep, dim=1)
        values *= Q.sum(1, keepdim=True) / values.sum(1, keepdim=True)
        return torch.zeros_like(Q).scatter_(1, columns, values)

    def _factor(self, model: str, side: str, layer: int) -> Tensor:
        return ridge_factor(self.plans.rows(model, side, layer, "fit"), self.settings.ridge)


def _inverse(scale: Tensor) -> Tensor:
    """1 / scale, and 0 for a constant neuron."""
    return torch.where(scale > 0, scale.reciprocal(), torch.zeros_like(scale))


def empty_residual(plans: Plans, target: Weights, layer: int, projection: str, top_k: int) -> Residual:
    """Residual with W~ = 0 on the selection of one projection (A.5): rows by the strength of the output, or columns by
    the strength of the input."""
    axis = PROJECTIONS[projection].axis
    index = select(plans.strongest(PROJECTIONS[projection].selected_side, layer), top_k)
    original = target.weight(layer, projection).index_select(axis, index)
    bias = target.bias(layer, projection)
    if bias is not None and axis == ROWS:
        bias = bias[index]
    return Residual(layer, projection, axis, index, torch.zeros_like(original), None, original, bias)


def keep_mean(residual: Residual, plans: Plans) -> Residual:
    """Let W~ give the target's mean output on the target's mean input.

    Without biases: W~ <- W~ + (W - W~) x x^T / |x|^2 on the selection, with x the mean input (y_bar = W x);
    with biases: b~ = b + (W - W~) x, which is y_bar - W~ x.
    """
    x = plans.mean("target", PROJECTIONS[residual.projection].input_side, residual.layer)
    if residual.axis == COLUMNS:
        x = x[residual.index]
    missing = (residual.original_weight - residual.weight) @ x  # [k, n'] @ [n'] -> [k], or [n, k] @ [k] -> [n]
    if residual.original_bias is not None:
        return replace(residual, bias=residual.original_bias + missing)
    square = x @ x
    if square == 0:
        return residual
    return replace(residual, weight=residual.weight + torch.outer(missing, x / square))


def fuse_attention_only_from_hot_dir(
    plans: Plans, target: Weights, source: Weights, settings: FusionSettings, layers: Iterable[int] | None = None
) -> Iterator[tuple[Residual, dict[str, Any]]]:
    """Transported residual and report of every attention projection of the target, layer by layer.

    Args:
        plans: an opened plan directory.
        target, source: the two models' attention weights.
        settings: feature map, form, alpha and selection.
        layers: target layers to do; None for all.
    Yields:
        (Residual, report) with report keys layer, projection, selected, norm_ratio |W~|/|W|, cosine,
        explained_variance (None without rows kept aside), source_layers {m: p}, bias (fused, dropped, kept or none).
    """
    transport = Transport(plans, source, settings)
    for layer in range(plans.shape[0]) if layers is None else layers:
        empty = [empty_residual(plans, target, layer, projection, settings.top_k) for projection in PROJECTIONS]
        for residual in transport_into(empty, transport, layer):
            check_finite(residual)
            yield residual, _report(residual, plans, source, transport)


def transport_into(residuals: Sequence[Residual], transport: Transport, from_layer: int) -> list[Residual]:
    """Fill residuals of one layer with W~ of target layer `from_layer` (its own, except in the wrong-layer control)."""
    found = transport.transported(from_layer, {r.projection: r.index for r in residuals})
    filled = []
    for residual in residuals:
        weight, bias = found[residual.projection]
        residual = replace(residual, weight=weight, bias=bias if residual.original_bias is not None else None)
        regression = transport.settings.feature_map == "regression"
        filled.append(keep_mean(residual, transport.plans) if regression else residual)
    return filled


def explained_variance(residual: Residual, plans: Plans) -> float | None:
    """Share of the variance of the target's output (selected rows, or the part read from the selected columns) that
    W~ predicts on the rows kept aside: 1 - sum |x W^T - x W~^T|^2 / sum |x W^T|^2, x centred. None without rows."""
    x = plans.rows("target", PROJECTIONS[residual.projection].input_side, residual.layer, "aside")
    if len(x) < 2:
        return None
    if residual.axis == COLUMNS:
        x = x[:, residual.index]
    y = x @ residual.original_weight.T  # [T, n'] @ [n', k] -> [T, k]
    total = y.square().sum()
    return float(1 - (y - x @ residual.weight.T).square().sum() / total) if total > 0 else None


def _report(residual: Residual, plans: Plans, source: Weights, transport: Transport) -> dict[str, Any]:
    W, W_tilde = residual.original_weight.double(), residual.weight.double()
    norm, norm_tilde = float(W.norm()), float(W_tilde.norm())
    layers = transport.layer_weights(residual.layer, residual.projection)
    source_bias = source.bias(next(iter(layers)), residual.projection) is not None
    if residual.bias is not None:
        bias = "fused"
    elif source_bias:
        bias = "dropped"  # only the source has one
    else:
        bias = "kept" if residual.original_bias is not None else "none"
    return {
        "layer": residual.layer,
        "projection": residual.projection,
        "selected": len(residual.index),
        "norm_ratio": norm_tilde / norm if norm else None,
        "cosine": float((W * W_tilde).sum()) / (norm * norm_tilde) if norm and norm_tilde else None,
        "explained_variance": explained_variance(residual, plans),
        "source_layers": {str(m): p for m, p in layers.items()},
        "bias": bias,
    }
