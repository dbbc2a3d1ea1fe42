"""Transported weights W~ (Eqs. 14, 20, 21) of every projection, from plans and the source's weights.

For target layer l and projection c:  W~ = sum over m of p[m] * Out[m] @ W_source[m] @ In[m],  where the feature map
(core/fusion/feature_maps.py) says what p, Out and In are. Only the selected rows or columns of W~ are ever computed:
with k = 128 of 2048 neurons that is a sixteenth of the work and memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from core.fusion.feature_maps import FEATURE_MAPS
from core.fusion.inputs import Plans, Weights
from core.fusion.projections import COLUMNS, PROJECTIONS, ROWS
from core.fusion.residual import Residual, check_finite, select
from core.fusion.settings import FusionSettings


class Transport:
    """W~ of any target layer and projection, from one plan directory and the source's weights."""

    def __init__(self, plans: Plans, source: Weights, settings: FusionSettings):
        self.plans, self.source = plans, source
        kind = FEATURE_MAPS[settings.feature_map]
        self.feature_map = kind(plans, settings.p_topk, settings.q_topk, settings.ridge)
        # Projections that read the same input, such as q, k and v, share the map of all of it.
        self._whole_in = lru_cache(1)(lambda side, layer, m: self.feature_map.in_map(side, layer, m, None))

    def transported(self, layer: int, indices: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor | None]]:
        """W~ and b~ of projections of one target layer, on the selected rows [k, n'] or columns [n, k].

        b~ [k] or [n] is Out applied to the source's bias; it is None where the source has no bias or the feature map
        transports none. Source layers are the outer loop, so that the projections that read the same input can share
        its map.

        Args:
            indices: projection -> selected rows or columns [k].
        """
        shares = {c: self.feature_map.shares(layer, c) for c in indices}
        weights: dict[str, Tensor] = {}
        biases: dict[str, Tensor] = {}
        for m in sorted(set().union(*shares.values())):
            for c, index in indices.items():
                p = shares[c].get(m)
                if p is None:
                    continue
                Out, In = self.maps(layer, m, c, index)
                W = self.source.weight(m, c)
                # [n, m] @ ([m, m'] @ [m', k]) -> [n, k], or ([k, m] @ [m, m']) @ [m', n'] -> [k, n']
                part = Out @ (W @ In) if PROJECTIONS[c].axis == COLUMNS else (Out @ W) @ In
                weights[c] = p * part if c not in weights else weights[c].add_(part, alpha=p)
                b = self.source.bias(m, c) if self.feature_map.fuses_biases else None
                if b is not None:
                    biases[c] = p * (Out @ b) if c not in biases else biases[c].add_(Out @ b, alpha=p)
        return {c: (weights[c], biases.get(c)) for c in indices}

    def maps(self, layer: int, m: int, projection: str, index: Tensor) -> tuple[Tensor, Tensor]:
        """(Out, In) between target layer `layer` and source layer m, on the selection only: Out [k, m] and In [m', n']
        where rows are selected, Out [n, m] and In [m', k] where columns are."""
        input_side = PROJECTIONS[projection].input_side
        if PROJECTIONS[projection].axis == ROWS:
            return self.feature_map.out_map(projection, layer, m, index), self._whole_in(input_side, layer, m)
        return (
            self.feature_map.out_map(projection, layer, m, None),
            self.feature_map.in_map(input_side, layer, m, index),
        )

    def self_map(self, layer: int, projection: str) -> Tensor:
        """The target's own outputs regressed on its own inputs, [n, n']: what smoothing alone does to W."""
        side = PROJECTIONS[projection].input_side
        return self.feature_map.regressions.between(("target", side, layer), ("target", projection, layer))


def empty_residual(plans: Plans, target: Weights, layer: int, projection: str, top_k: int) -> Residual:
    """A residual with W~ = 0 on the selection of one projection (section 4.2, A.5), which holds the target's own values
    there."""
    index = select(plans.strongest(PROJECTIONS[projection].selected_side, layer), top_k)
    original = target.weight(layer, projection).index_select(PROJECTIONS[projection].axis, index)
    residual = Residual(layer, projection, index, torch.zeros_like(original), None, original, None)
    bias = target.bias(layer, projection)
    return residual if bias is None else replace(residual, original_bias=bias[residual.bias_index])


def keep_mean(residual: Residual, plans: Plans) -> Residual:
    """Correct W~ so that the target's mean input x gives the target's mean output W x again.

    A target with biases gets b~ = b + (W - W~) x. One without gets W~ <- W~ + (W - W~) x x^T / |x|^2, which is the
    smallest change of W~ that does it. Both are done on the selection alone.
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
    """Transported residual and report of every projection of the target, layer by layer.

    Args:
        plans: an opened plan directory.
        target, source: the weights of the two models.
        settings: feature map, form, alpha and selection.
        layers: the target layers to do; None for all.
    Yields:
        (Residual, report). The report has the keys layer, projection, selected (the number k), norm_ratio |W~| / |W|,
        cosine (between W~ and W), explained_variance (None without rows kept aside), source_layers {m: p[m]} and bias
        (fused, dropped, kept or none).
    Raises:
        UserError: a target layer has no corresponding source layer.
        ValueError: a weight or W~ is not finite, or the ridge is too small.
    """
    transport = Transport(plans, source, settings)
    for layer in range(plans.shape[0]) if layers is None else layers:
        empty = [empty_residual(plans, target, layer, projection, settings.top_k) for projection in PROJECTIONS]
        for residual in transport_into(empty, transport, layer):
            check_finite(residual)
            yield residual, _report(residual, transport)


def transport_into(residuals: Sequence[Residual], transport: Transport, from_layer: int) -> list[Residual]:
    """Fill the residuals of one layer with W~ of target layer `from_layer`, which is their own except in the control
    `wrong_layer`."""
    found = transport.transported(from_layer, {residual.projection: residual.index for residual in residuals})
    filled = []
    for residual in residuals:
        weight, bias = found[residual.projection]
        residual = replace(residual, weight=weight, bias=None if residual.original_bias is None else bias)
        filled.append(keep_mean(residual, transport.plans) if transport.feature_map.keeps_mean else residual)
    return filled


def explained_variance(residual: Residual, plans: Plans) -> float | None:
    """Share of the variance of the target's output that W~ predicts, on the rows kept aside:

        1 - sum |x W^T - x W~^T|^2 / sum |x W^T|^2,   with x centred,

    of the selected outputs, or of the part of the output that is read from the selected inputs. None without rows.
    """
    x = plans.rows("target", PROJECTIONS[residual.projection].input_side, residual.layer, "aside")
    if len(x) < 2:
        return None
    if residual.axis == COLUMNS:
        x = x[:, residual.index]
    y = x @ residual.original_weight.T  # [T, n'] @ [n', k] -> [T, k]
    total = y.square().sum()
    return float(1 - (y - x @ residual.weight.T).square().sum() / total) if total > 0 else None


def _report(residual: Residual, transport: Transport) -> dict[str, Any]:
    """What `fuse_attention_only_from_hot_dir` yields beside a residual."""
    W, W_tilde = residual.original_weight.double(), residual.weight.double()
    norm, norm_tilde = float(W.norm()), float(W_tilde.norm())
    shares = transport.feature_map.shares(residual.layer, residual.projection)
    return {
        "layer": residual.layer,
        "projection": residual.projection,
        "selected": len(residual.index),
        "norm_ratio": norm_tilde / norm if norm else None,
        "cosine": float((W * W_tilde).sum()) / (norm * norm_tilde) if norm and norm_tilde else None,
        "explained_variance": explained_variance(residual, transport.plans),
        "source_layers": {str(m): p for m, p in shares.items()},
        "bias": _fate_of_biases(residual, transport.source, next(iter(shares))),
    }


def _fate_of_biases(residual: Residual, source: Weights, source_layer: int) -> str:
    """What became of the biases of one projection, for the report."""
    if residual.bias is not None:
        return "fused"
    if source.bias(source_layer, residual.projection) is not None:
        return "dropped"  # the target has none that it could be fused with
    return "none" if residual.original_bias is None else "kept"
