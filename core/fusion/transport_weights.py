"""Transported weights W~ (Eqs. 14, 20, 21) of every projection, from plans and the source's weights.

For target layer l and projection c:  W~ = sum over m of p[m] * Out[m] @ W_source[m] @ In[m],  where the feature map
(core/fusion/feature_maps.py) says what p, Out and In are. Only the selected rows or columns of W~ are ever computed:
with k = 128 of 2048 neurons that is a sixteenth of the work and memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from core.fusion.feature_maps import FEATURE_MAPS, Transported
from core.fusion.inputs import Plans, Weights
from core.fusion.projections import COLUMNS, PROJECTIONS, ROWS
from core.fusion.residual import Residual, check_finite, select
from core.fusion.settings import FusionSettings
from core.fusion.task_vector import TaskVector


class Transport:
    """W~ of any target layer and projection, from one plan directory and the source's weights.

    Attributes:
        plans: the plan directory.
        source: what is transported: the source's weights or, with the base that it was tuned from, its task vector.
        of_task_vector: whether it is the task vector. W~ is then W plus the transported difference, so that mixing it
            in with strength alpha gives W + alpha Out (W_source - W_base) In.
        adds: whether W~ is added to W, and does not take the place of a share of it.
    """

    def __init__(self, plans: Plans, source: Weights, settings: FusionSettings, base: Weights | None = None):
        self.plans, self.of_task_vector = plans, base is not None
        self.source = source if base is None else TaskVector(source, base)
        self.adds = settings.residual_form == "additive"
        kind = FEATURE_MAPS[settings.feature_map]
        self.feature_map = kind(
            plans, self.source, settings.p_topk, settings.q_topk, settings.ridge, settings.row_kinds[0]
        )

    def with_rows(self, rows: str) -> Transport:
        """The same transport with W~ regressed on rows of another kind (`core.fusion.anchored`)."""
        other = copy(self)
        other.feature_map = self.feature_map.with_rows(rows)
        return other

    def transported(self, layer: int, indices: Mapping[str, Tensor]) -> Transported:
        """W~ and b~ of projections of one target layer on the selected rows or columns, as the feature map gives them
        (`FeatureMap.transported`)."""
        return self.feature_map.transported(layer, indices)

    def fill(self, residual: Residual, weight: Tensor, bias: Tensor | None) -> Residual:
        """A residual with W~ on its selection, as the settings complete it: added to the target's own weight where a
        change of it was transported, and with the target's mean output kept where the feature map says so.

        Keeping the mean takes what a change does to the mean output out of the change, Delta - Delta x x^T / |x|^2, so
        that no change stays none.
        """
        if self.feature_map.fits.gives_change:
            weight = residual.original_weight + weight
            if bias is not None and residual.original_bias is not None:
                bias = residual.original_bias + bias
        filled = replace(residual, weight=weight, bias=None if residual.original_bias is None else bias)
        return self.keep_mean(filled) if self.feature_map.keeps_mean else filled

    def keep_mean(self, residual: Residual) -> Residual:
        """Correct W~ so that the target's mean input x gives the target's mean output W x again.

        A target with biases gets b~ = b + (W - W~) x. One without gets W~ <- W~ + (W - W~) x x^T / |x|^2, which is the
        smallest change of W~ that does it. Both are done on the selection alone.

        What is added to W must give nothing on x instead (METHOD 11): b~ = -W~ x, or W~ <- W~ - W~ x x^T / |x|^2.
        """
        x = self.feature_map.fits.mean_input(PROJECTIONS[residual.projection].input_side, residual.layer)
        if residual.axis == COLUMNS:
            x = x[residual.index]
        kept = 0 if self.adds else residual.original_weight
        missing = (kept - residual.weight) @ x  # [k, n'] @ [n'] -> [k], or [n, k] @ [k] -> [n]
        if residual.original_bias is not None:
            return replace(residual, bias=missing if self.adds else residual.original_bias + missing)
        square = x @ x
        if square == 0:
            return residual
        return replace(residual, weight=residual.weight + torch.outer(missing, x / square))

    def regress_own(self, residual: Residual, filtered: bool = False) -> Residual:
        """W~ regressed from the target's own inputs to its own outputs: what smoothing alone does to W.

        The target has learned nothing over itself, so with a task vector W~ is W. Filtered, a task vector has a control
        nevertheless: W plus a change along the target's own components, as strong as the transported one.

        Args:
            filtered: the outputs are first given the spectrum that transport gives the source's outputs, in their own
                principal components: what denoising alone does to W.
        """
        layer, projection, index = residual.layer, residual.projection, residual.index
        outputs = index if residual.axis == ROWS else None
        own = self.plans.rows("target", projection, layer, "fit")
        own = own if outputs is None else own[:, outputs]
        if filtered:
            responses = self.feature_map.responses(layer, projection, outputs)
            if residual.axis == ROWS and len(residual.original_weight) > residual.original_weight.shape[1]:
                # Outputs that are more than the inputs lie in the span of the columns of W, which has fewer directions.
                basis, _ = torch.linalg.qr(residual.original_weight)  # [k, n']
                own = with_spectrum_of(own @ basis, responses) @ basis.T
            else:
                own = with_spectrum_of(own, responses)
        elif self.of_task_vector:
            own = torch.zeros_like(own)
        weight = self.feature_map.fits.regress(layer, projection, own, outputs)
        return self.fill(residual, weight if residual.axis == ROWS else weight[:, index], None)


def with_spectrum_of(Y: Tensor, Z: Tensor) -> Tensor:
    """Y [T, n] with its singular values replaced by the n largest of Z [T, m], m >= n, largest for largest; its
    components stay."""
    power, V = torch.linalg.eigh(Y.T @ Y)  # ascending
    wanted = torch.linalg.eigvalsh(Z.T @ Z)[-Y.shape[1] :]
    scale = torch.where(power > 0, wanted.clamp_min(0) / power, 0).sqrt()
    return Y @ (V * scale @ V.T)  # [T, n] @ ([n, n] @ [n, n]) -> [T, n]


def empty_residual(plans: Plans, target: Weights, layer: int, projection: str, top_k: int) -> Residual:
    """A residual with W~ = 0 on the selection of one projection (section 4.2, A.5), which holds the target's own values
    there."""
    index = select(plans.strongest(PROJECTIONS[projection].selected_side, layer), top_k)
    original = target.weight(layer, projection).index_select(PROJECTIONS[projection].axis, index)
    residual = Residual(layer, projection, index, torch.zeros_like(original), None, original, None)
    bias = target.bias(layer, projection)
    return residual if bias is None else replace(residual, original_bias=bias[residual.bias_index])


def fuse_attention_only_from_hot_dir(
    plans: Plans,
    target: Weights,
    source: Weights,
    settings: FusionSettings,
    layers: Iterable[int] | None = None,
    base: Weights | None = None,
) -> Iterator[tuple[Residual, dict[str, Any]]]:
    """Transported residual and report of every projection of the target, layer by layer.

    Args:
        plans: an opened plan directory.
        target, source: the weights of the two models.
        settings: feature map, form, alpha and selection.
        layers: the target layers to do; None for all.
        base: the model that the source was tuned from; what is transported is then the difference of the two.
    Yields:
        (Residual, report). The report has the keys layer, projection, selected (the number k), norm_ratio |W~| / |W|,
        cosine (between W~ and W), explained_variance (None without rows kept aside), source_layers {m: p[m]} and bias
        (fused, dropped, kept or none). With a base, W~ stands for the transported difference alone in the first two,
        and nothing is said of the variance that it explains, because the target's output is not what it is to predict.
    Raises:
        UserError: a target layer has no corresponding source layer.
        ValueError: a weight or W~ is not finite, or the ridge is too small.
    """
    transport = Transport(plans, source, settings, base)
    for layer in range(plans.shape[0]) if layers is None else layers:
        yield from fuse_layer(transport, target, settings, layer)


def fuse_layer(
    transport: Transport, target: Weights, settings: FusionSettings, layer: int
) -> Iterator[tuple[Residual, dict[str, Any]]]:
    """Transported residual and report of every projection of one target layer, as `fuse_attention_only_from_hot_dir`
    yields them."""
    empty = [empty_residual(transport.plans, target, layer, name, settings.top_k) for name in settings.fused]
    for residual in transport_into(empty, transport, layer):
        check_finite(residual)
        yield residual, _report(residual, transport)


def transport_into(residuals: Sequence[Residual], transport: Transport, from_layer: int) -> list[Residual]:
    """Fill the residuals of one layer with W~ of target layer `from_layer`, which is their own except in the control
    `wrong_layer`."""
    found = transport.transported(from_layer, {residual.projection: residual.index for residual in residuals})
    return [transport.fill(residual, *found[residual.projection]) for residual in residuals]


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
    if transport.of_task_vector:
        W_tilde = W_tilde - W
    norm, norm_tilde = float(W.norm()), float(W_tilde.norm())
    shares = transport.feature_map.shares(residual.layer, residual.projection)
    return {
        "layer": residual.layer,
        "projection": residual.projection,
        "selected": len(residual.index),
        "norm_ratio": norm_tilde / norm if norm else None,
        "cosine": float((W * W_tilde).sum()) / (norm * norm_tilde) if norm and norm_tilde else None,
        "explained_variance": None if transport.of_task_vector else explained_variance(residual, transport.plans),
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
