"""Optimal transport between neurons (Q) and between layers (P): tensors in, tensors out.

Equation numbers are those of arXiv 2602.05495. Shapes: T calibration rows, n target neurons, m source neurons,
L target layers, M source layers. Marginals are uniform: 1/n and 1/m.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.sinkhorn import CACHED_BYTES, SinkhornResult, as_array, sinkhorn_uniform_streaming, solve_uniform

__all__ = ["SinkhornResult", "compute_P", "compute_Q_and_layer_costs", "corr_distance_matrix", "effective_layer_plan",
           "reconstruct_X", "sinkhorn_uniform_streaming", "standardize"]  # fmt: skip

log = logging.getLogger(__name__)

# A correlation cost lies in [0, 2].
COST_BOUNDS = (0.0, 2.0)


def standardize(X: Tensor) -> Tensor:
    """Centre each neuron and scale it to unit norm, so that Z_x^T Z_y is Pearson's correlation.

    Dividing by the unbiased deviation and by T - 1 (Eq. 7) equals dividing by the norm of the centred column.

    Args:
        X: [T, n] activations, T >= 2.
    Returns:
        [T, n] float32; the column of a constant neuron is 0, so it correlates 0 with everything.
    Raises:
        ValueError: fewer than 2 rows, or NaN or infinite entries.
    """
    if X.ndim != 2 or X.shape[0] < 2:
        raise ValueError(f"activations must be [T, n] with T >= 2, got shape {tuple(X.shape)}")
    if not torch.isfinite(X).all():
        raise ValueError("activations contain NaN or infinite values")
    constant = X.amax(0) == X.amin(0)
    centred = X.double()
    centred -= centred.mean(0)
    norm = centred.norm(dim=0).masked_fill_(constant, math.inf)
    return centred.div_(norm).float()


def corr_distance_matrix(X: Tensor, Y: Tensor) -> Tensor:
    """Correlation distance C[i, j] = 1 - Pearson(X[:, i], Y[:, j]) (Eqs. 7, 23).

    Args:
        X: [T, n] target activations.
        Y: [T, m] source activations; row t of both comes from the same text.
    Returns:
        [n, m] float32 in [0, 2].
    Raises:
        ValueError: row counts differ, T < 2, or non-finite entries.
    """
    if X.shape[0] != Y.shape[0]:
        raise ValueError(f"X has {X.shape[0]} rows and Y {Y.shape[0]}; both models must see the same texts")
    return _correlation_cost(standardize(X), standardize(Y))


def _correlation_cost(Zx: Tensor, Zy: Tensor) -> Tensor:
    """C = 1 - Z_x^T Z_y, clipped to [0, 2] against rounding."""
    return (Zx.T @ Zy).neg_().add_(1.0).clamp_(*COST_BOUNDS)  # [n, T] @ [T, m] -> [n, m]


def compute_Q_and_layer_costs(
    X_list: Sequence[Tensor],
    Y_list: Sequence[Tensor],
    reg_inner: float,
    n_iters: int = 1000,
    tol: float = 1e-6,
    mode: str = "auto",
) -> tuple[list[list[SinkhornResult]], Tensor]:
    """Feature plans of every target layer with every source layer, and their costs (Eqs. 7-10).

    Args:
        X_list: L tensors [T, n_l], target activations of one side.
        Y_list: M tensors [T, m_k], source activations of the same side, rows from the same texts.
        reg_inner: epsilon.
        n_iters, tol, mode: see `sinkhorn_uniform_streaming`.
    Returns:
        L x M results (their costs are recomputed from the activations when needed, so nothing of size n x m is
        kept), and C_layer [L, M] float64 with C_layer[l, k] = <C, Q>.
    Raises:
        ValueError: as `standardize`, with the model and layer in the message; or row counts differ.
    """
    Zx = [standardize_layer(X, "target", layer) for layer, X in enumerate(X_list)]
    Zy = [standardize_layer(Y, "source", layer) for layer, Y in enumerate(Y_list)]
    if len({len(Z) for Z in Zx + Zy}) != 1:
        raise ValueError("all layers of both models need the same number of rows")
    results = [list(solve_layer(zx, Zy, reg_inner, n_iters, tol, mode)) for zx in Zx]
    return results, torch.tensor([[r.cost for r in row] for row in results], dtype=torch.float64)


def solve_layer(
    zx: Tensor, Zy: Iterable[Tensor], reg: float, n_iters: int = 1000, tol: float = 1e-6, mode: str = "auto"
) -> Iterator[SinkhornResult]:
    """Feature plans of one target layer with one source layer after the other, all in the same memory: one n x m
    buffer (two where they are small enough for the cache).

    Args:
        zx, Zy: standardised activations [T, n] and [T, m_k].
        reg, n_iters, tol, mode: see `sinkhorn_uniform_streaming`.
    """
    R: Any = None
    for zy in Zy:
        shape = (zx.shape[1], zy.shape[1])
        if R is None or R.shape != shape:
            R = as_array(zx.new_empty(shape))
            small = R.nbytes <= CACHED_BYTES
            K = as_array(zx.new_empty(shape)) if small else R  # a large K takes the memory of R
        xp: Any = np if isinstance(R, np.ndarray) else torch
        xp.matmul(as_array(zx).T, as_array(zy), out=R)  # correlation [n, T] @ [T, m] -> [n, m]; C = 1 - R
        yield solve_uniform(R, (1.0, -1.0), COST_BOUNDS, reg, n_iters, tol, mode, correlation_cost_rows(zx, zy), K)


def correlation_cost_rows(Zx: Tensor, Zy: Tensor) -> Callable[[int, int], Tensor]:
    """Function (a, b) -> rows a..b of the cost [n, m], computed from standardised activations [T, n], [T, m]."""
    return lambda a, b: _correlation_cost(Zx[:, a:b], Zy)


def standardize_layer(X: Tensor, model: str, layer: int) -> Tensor:
    """`standardize`, with the model and layer in the error."""
    try:
        return standardize(X)
    except ValueError as error:
        raise ValueError(f"{model} layer {layer}: {error}") from None


def compute_P(C_layer: Tensor, reg_outer: float, cost_scale: str = "median") -> Tensor:
    """Layer plan P from the layer costs (Eqs. 11, 12, 27-30), in float64.

    Args:
        C_layer: [L, M] costs <C, Q>.
        reg_outer: eta; multiplied by max/100 when the (scaled) cost exceeds 1000.
        cost_scale: `median` shifts the cost to minimum 0 and divides by its median; `none` takes it as it is.
    Returns:
        [L, M] float64, rows summing to 1/L and columns to 1/M.
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
    """P_eff = sqrt(P_pre * P_post), entrywise (Eq. 13): [L, M] of a projection's input and output side."""
    return torch.sqrt(P_pre * P_post)


def reconstruct_X(P: Tensor, Q: Sequence[Sequence[SinkhornResult]], Y_list: Sequence[Tensor]) -> list[Tensor]:
    """Target activations predicted from the source's through the plans (Eqs. 31-34), barycentric.

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
