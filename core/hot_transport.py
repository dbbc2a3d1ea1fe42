"""Optimal transport between neurons (Q) and between layers (P): tensors in, tensors out.

Q says which source neurons correspond to which target neurons of a pair of layers (Eqs. 7-9, 23-26), and P which
source layers correspond to which target layers (Eqs. 10-13, 27-30). Equation numbers are those of arXiv 2602.05495.
Shapes: T calibration rows, n target neurons, m source neurons, L target layers, M source layers. Marginals are
uniform: 1/n and 1/m for Q, 1/L and 1/M for P.

The pieces stand in core/transport: the correlation cost (Eq. 7), the solver (Eqs. 8, 9), and the loop over pairs of
layers. This file has what the paper makes of them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from core.transport.correlation import corr_distance_matrix, standardize, standardize_layer
from core.transport.layer_pairs import solve_layer
from core.transport.problem import SinkhornSettings
from core.transport.sinkhorn import SinkhornResult, sinkhorn_uniform_streaming

__all__ = [
    "SinkhornResult",
    "compute_P",
    "compute_Q_and_layer_costs",
    "corr_distance_matrix",
    "effective_layer_plan",
    "reconstruct_X",
    "reconstruction_fit",
    "reconstruction_overlaps",
    "sinkhorn_uniform_streaming",
    "standardize",
]

log = logging.getLogger(__name__)


def compute_Q_and_layer_costs(
    X_list: Sequence[Tensor],
    Y_list: Sequence[Tensor],
    reg_inner: float,
    n_iters: int = 1000,
    tol: float = 1e-6,
    mode: str = "auto",
) -> tuple[list[list[SinkhornResult]], Tensor]:
    """Feature plans of every target layer with every source layer (Eqs. 7-9), and their costs <C, Q> (Eq. 10).

    Args:
        X_list: L tensors [T, n_l], target activations of one side.
        Y_list: M tensors [T, m_k], source activations of the same side, with rows from the same texts.
        reg_inner: epsilon, the entropic regularisation of Q.
        n_iters, tol, mode: as in `sinkhorn_uniform_streaming`.
    Returns:
        L x M results, and C_layer [L, M] float64 with C_layer[l, k] = <C, Q>. The results compute rows of their cost
        from the activations when asked, so nothing of size n x m is kept.
    Raises:
        ValueError: as `standardize`, with the model and the layer in the message; or the row counts differ.
    """
    Zx = [standardize_layer(X, "target", layer) for layer, X in enumerate(X_list)]
    Zy = [standardize_layer(Y, "source", layer) for layer, Y in enumerate(Y_list)]
    if len({len(Z) for Z in Zx + Zy}) != 1:
        raise ValueError("all layers of both models need the same number of rows")
    settings = SinkhornSettings(reg_inner, n_iters, tol, mode)
    results = [list(solve_layer(zx, Zy, settings)) for zx in Zx]
    return results, torch.tensor([[r.cost for r in row] for row in results], dtype=torch.float64)


def compute_P(C_layer: Tensor, reg_outer: float, cost_scale: str = "median") -> Tensor:
    """Layer plan P from the layer costs (Eqs. 11, 12, 27-30), in float64.

    Layer costs differ by a few percent only. Taken as they are, they leave P almost uniform at the paper's eta, which
    is why they are first spread out by default, as the authors' released code does.

    Args:
        C_layer: [L, M] costs <C, Q>.
        reg_outer: eta, the entropic regularisation of P. When the largest (scaled) cost exceeds 1000, eta is multiplied
            by that cost over 100.
        cost_scale: `median` shifts the cost to minimum 0 and divides it by its median; `none` takes it as it is, which
            is the paper's letter.
    Returns:
        [L, M] float64, whose rows sum to 1/L and columns to 1/M.
    Raises:
        ValueError: unknown cost_scale, or as `sinkhorn_uniform_streaming`.
    """
    if cost_scale not in ("median", "none"):
        raise ValueError(f"cost_scale must be 'median' or 'none', got {cost_scale!r}")
    cost = C_layer.double()
    if cost_scale == "median":
        cost = cost - cost.min()
        median = cost.quantile(0.5)
        if median > 0:
            cost = cost / median
    largest = float(cost.max())
    if largest > 1000:
        reg_outer = reg_outer * largest / 100
    result = sinkhorn_uniform_streaming(cost, reg_outer, n_iters=1000, tol=1e-9)
    if not result.converged:
        log.warning("the layer plan reached a marginal error of %.1e, not 1e-9; a larger eta converges", result.error)
    return result.plan()


def effective_layer_plan(P_pre: Tensor, P_post: Tensor) -> Tensor:
    """P_eff = sqrt(P_pre * P_post), entrywise (Eq. 13).

    Args:
        P_pre, P_post: [L, M] layer plans of the input and of the output side of a projection.
    """
    return torch.sqrt(P_pre * P_post)


def reconstruct_X(P: Tensor, Q: Sequence[Sequence[SinkhornResult]], Y_list: Sequence[Tensor]) -> list[Tensor]:
    """Target activations predicted from the source's through the plans (Eqs. 31-34).

    The prediction is barycentric: each target neuron is an average of source neurons, and each target layer an average
    of what the source layers predict. Constant activations therefore stay what they are.

    Args:
        P: [L, M] layer plan; row l of L * P sums to 1.
        Q: L x M feature plans; rows of n * Q sum to 1.
        Y_list: M tensors [T, m_k] of source activations.
    Returns:
        L tensors [T, n_l].
    """
    L = len(P)
    out = []
    for weights, plans in zip(L * P, Q, strict=True):
        parts = [w.to(Y.dtype) * (len(q.f) * q.apply(Y.T)).T for w, q, Y in zip(weights, plans, Y_list, strict=True)]
        out.append(torch.stack(parts).sum(0))
    return out


def reconstruction_overlaps(x: Tensor, parts: Tensor) -> dict[str, Tensor]:
    """The inner products from which `reconstruction_fit` measures the reconstruction (Eqs. 31-34) for any P.

    The reconstruction of a target layer is X_hat = sum over k of w[k] n Q_k y_k, with layer weights w from P. But P is
    known only when all layers are solved, and the plans are no longer in memory then. The fit of X_hat to x is a
    quadratic function of w, so the coefficients of that function are kept instead.

    Args:
        x: [r, n] some standardised rows of one target layer.
        parts: [M, n, r] tensors Q_k y_k, which are `SinkhornResult.probed` on the same rows.
    Returns:
        float64 tensors: `overlap` [M] = <x, n Q_k y_k>; `overlap_permuted` [M], the same with the neurons of the plan
        shuffled in one fixed order; `gram` [M, M] = <n Q_k y_k, n Q_j y_j>; `power` [] = <x, x>.
    """
    n = x.shape[1]
    A = parts.flatten(1).double().mul_(n)  # [M, n r]
    shuffled = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    own, other = (rows.double().flatten() for rows in (x.T, x.T[shuffled]))
    return {"overlap": A @ own, "overlap_permuted": A @ other, "gram": A @ A.T, "power": own @ own}


def reconstruction_fit(P: Tensor, overlap: Tensor, gram: Tensor, power: Tensor) -> tuple[Tensor, Tensor]:
    """How well `reconstruct_X` fits X (Eqs. 31-34), from the inner products that `reconstruction_overlaps` kept.

    Args:
        P: [L, M] layer plan.
        overlap: [L, M], gram: [L, M, M], power: [L], of all target layers.
    Returns:
        (R^2 [L] = 1 - |X - X_hat|^2 / |X|^2, correlation [L] of X with X_hat). A layer of constant neurons has nothing
        to explain: both are 0 there.
    """
    w = len(P) * P
    product = (w * overlap).sum(1)
    square = torch.einsum("lm,lmk,lk->l", w, gram, w)
    power_or_inf = torch.where(power > 0, power, math.inf)
    return (2 * product - square) / power_or_inf, product / (square * power).clamp_min(1e-300).sqrt()
