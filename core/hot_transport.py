"""Optimal transport between neurons (Q) and between layers (P): tensors in, tensors out.

Equation numbers are those of arXiv 2602.05495. Shapes: T calibration rows, n target neurons, m source neurons,
L target layers, M source layers. Marginals are uniform: 1/n and 1/m.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from core.transport.scaling import CACHED_BYTES, full_float32
from core.transport.sinkhorn import EXP_RANGE, Rows, SinkhornResult, sinkhorn_uniform_streaming, solve_batch, solve_one

__all__ = [
    "SinkhornResult",
    "compute_P",
    "compute_Q_and_layer_costs",
    "corr_distance_matrix",
    "effective_layer_plan",
    "reconstruct_X",
    "sinkhorn_uniform_streaming",
    "standardize",
]

log = logging.getLogger(__name__)

# Neurons are standardised in blocks of about this size in float64.
STANDARDIZE_BYTES = 16 << 20
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
    low, high = X.amin(0), X.amax(0)
    if not torch.isfinite(torch.stack((low, high))).all():
        raise ValueError("activations contain NaN or infinite values")
    out = torch.empty_like(X, dtype=torch.float32)
    width = max(1, STANDARDIZE_BYTES // (8 * len(X)))
    for start in range(0, X.shape[1], width):
        block = slice(start, start + width)  # float64 of all of X would take twice its memory
        centred = X[:, block].double()
        centred -= centred.mean(0)
        norm = centred.norm(dim=0).masked_fill_(high[block] == low[block], math.inf)
        out[:, block] = centred.div_(norm)
    return out


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
    with full_float32():
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
    zx: Tensor,
    Zy: Iterable[Tensor],
    reg: float,
    n_iters: int = 1000,
    tol: float = 1e-6,
    mode: str = "auto",
    probe_rows: Tensor | None = None,
    batch_bytes: int = 1 << 30,
) -> Iterator[SinkhornResult]:
    """Feature plans of one target layer with one source layer after the other, all in the same memory: one n x m
    buffer (two where they are small enough for the cache). On accelerators problems of one shape run together.

    Args:
        zx, Zy: standardised activations [T, n] and [T, m_k].
        reg, n_iters, tol, mode: see `sinkhorn_uniform_streaming`.
        probe_rows: row numbers [r]; each result then carries `probed` = Q @ zy[probe_rows]^T [n, r].
        batch_bytes: memory for the n x m matrices and the rows of one batch on an accelerator; one problem at least.
    """
    n, problem = zx.shape[1], (reg, n_iters, tol, mode)
    if zx.device.type != "cpu":
        for batch in _batches(zx, Zy, reg, batch_bytes):
            yield from _solve_together(zx, batch, problem, probe_rows)
        return
    inverse = float(np.float32(1.0 / reg))
    scaled = (zx * inverse).numpy().T  # the product is then the exponent of K, but for a constant
    R = K = np.empty((n, 0), np.float32)
    for zy in Zy:
        if R.shape[1] != zy.shape[1]:
            R = np.empty((n, zy.shape[1]), np.float32)
            K = np.empty_like(R) if R.nbytes <= CACHED_BYTES else R  # a large K takes the memory of R
        np.matmul(scaled, zy.numpy(), out=R)  # correlation / reg [n, T] @ [T, m]; C = 1 - reg * R
        probe = None if probe_rows is None else zy.numpy()[probe_rows.numpy()].T
        rows = correlation_cost_rows(zx, zy)
        yield solve_one(R, (1.0, -1.0 / inverse), COST_BOUNDS, *problem, rows, K, probe)
        del zy, rows, probe  # the caller decides which layers stay in memory while the next one is read


def _batches(zx: Tensor, Zy: Iterable[Tensor], reg: float, batch_bytes: int) -> Iterator[list[Tensor]]:
    """Source layers of one shape that are solved together within `batch_bytes`, at least one; each list is emptied
    before the next layers are read."""
    T, n = zx.shape
    batch: list[Tensor] = []
    for zy in Zy:
        if batch and zy.shape != batch[0].shape:
            yield batch
            batch.clear()
        batch.append(zy)
        m = zy.shape[1]
        del zy
        if (len(batch) + 1) * (entry_bytes(n, m, reg) * n * m + 4 * T * m) > batch_bytes:
            yield batch
            batch.clear()
    if batch:
        yield batch


def entry_bytes(n: int, m: int, reg: float) -> int:
    """Bytes that a solve needs per entry of its matrix: beyond float32's range it makes a float64 copy."""
    low, high = COST_BOUNDS
    return 4 if (high - low) / reg + math.log(max(n, m)) < EXP_RANGE["float32"] else 12


def _solve_together(
    zx: Tensor, batch: list[Tensor], problem: tuple[float, int, float, str], probe_rows: Tensor | None
) -> list[SinkhornResult]:
    """Plans of zx [T, n] with every zy [T, m] of the batch, on their device."""
    R = zx.new_empty(len(batch), zx.shape[1], batch[0].shape[1])
    with full_float32():
        for out, zy in zip(R, batch, strict=True):
            torch.mm(zx.T, zy, out=out)  # [n, T] @ [T, m] -> [n, m]
    probes = None if probe_rows is None else torch.stack([zy[probe_rows].T for zy in batch])  # [B, m, r]
    rows = [correlation_cost_rows(zx, zy) for zy in batch]
    return solve_batch(R, (1.0, -1.0), COST_BOUNDS, *problem, rows, probes)


def correlation_cost_rows(Zx: Tensor, Zy: Tensor) -> Callable[[Rows], Tensor]:
    """Function (slice or row numbers) -> rows of the cost [n, m], from standardised activations [T, n], [T, m]."""
    return lambda rows: _correlation_cost(Zx[:, rows], Zy)


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


def reconstruction_overlaps(x: Tensor, parts: Tensor) -> dict[str, Tensor]:
    """What decides how well X_hat = sum over k of w[k] n Q_k y_k (Eqs. 31-34) fits x, for any layer weights w.

    Args:
        x: [r, n] some standardised rows of one target layer.
        parts: [M, n, r] tensors Q_k y_k, `SinkhornResult.probed` on the same rows.
    Returns:
        `overlap` [M] = <x, n Q_k y_k>; `overlap_permuted` [M], the same with the neurons of the plan shuffled (one
        fixed order); `gram` [M, M] = <n Q_k y_k, n Q_j y_j>; `power` [] = <x, x>. float64.
    """
    n = x.shape[1]
    A = parts.flatten(1).double().mul_(n)  # [M, n r]
    shuffled = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    own, other = (rows.double().flatten() for rows in (x.T, x.T[shuffled]))
    return {"overlap": A @ own, "overlap_permuted": A @ other, "gram": A @ A.T, "power": own @ own}


def reconstruction_fit(P: Tensor, overlap: Tensor, gram: Tensor, power: Tensor) -> tuple[Tensor, Tensor]:
    """(R^2 [L], correlation [L]) of `reconstruct_X` with X, from the overlaps of all layers: overlap [L, M],
    gram [L, M, M], power [L]. R^2 = 1 - |X - X_hat|^2 / |X|^2."""
    w = len(P) * P
    product = (w * overlap).sum(1)
    square = torch.einsum("lm,lmk,lk->l", w, gram, w)
    shown = torch.where(power > 0, power, math.inf)  # constant neurons have nothing to explain: R^2 is 0
    return (2 * product - square) / shown, product / (square * power).clamp_min(1e-300).sqrt()
