"""Optimal transport between neurons (Q) and between layers (P): tensors in, tensors out.

Equation numbers are those of arXiv 2602.05495. Shapes: T calibration rows, n target neurons, m source neurons,
L target layers, M source layers. Marginals are uniform: 1/n and 1/m.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

log = logging.getLogger(__name__)

# exp(-x) and the scalings stay inside a float's range while osc(C)/reg + ln(max(n, m)) is below these (METHOD 2).
EXP_RANGE = {torch.float32: 80.0, torch.float64: 600.0}
# Rows of Q that exist at once when a plan is applied without being built.
PLAN_BLOCK_ROWS = 512
# Host synchronisations cost nothing on a CPU; on CUDA the error is read every tenth iteration.
CUDA_CHECK_EVERY = 10


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
    return (Zx.T @ Zy).neg_().add_(1.0).clamp_(0.0, 2.0)  # [n, T] @ [T, m] -> [n, m]


@dataclass(frozen=True)
class SinkhornResult:
    """Entropic plan Q[i, j] = exp((f[i] + g[j] - C[i, j]) / reg), kept as its dual potentials.

    Attributes:
        f: [n] float64 target potentials, in units of the cost.
        g: [m] float64 source potentials, in units of the cost.
        reg: entropic regularisation epsilon.
        cost_rows: rows a..b of C on demand, so that neither C nor Q has to stay in memory.
        n_iters: iterations done.
        error: larger L1 marginal error, max(sum |Q1 - 1/n|, sum |Q^T 1 - 1/m|).
        converged: whether `error` reached the tolerance.
        cost: transport cost <C, Q> (entry of the layer cost, Eq. 10).
        solver: `exp-float32`, `exp-float64` or `log-float64`.
    """

    f: Tensor
    g: Tensor
    reg: float
    cost_rows: Callable[[int, int], Tensor]
    n_iters: int
    error: float
    converged: bool
    cost: float
    solver: str

    def plan_rows(self, a: int, b: int) -> Tensor:
        """Rows a..b of Q: [b - a, m] in the cost's dtype."""
        C = self.cost_rows(a, b)
        exponent = (self.f[a:b, None].to(C.device) + self.g.to(C.device) - C) / self.reg  # float64
        return exponent.exp_().to(C.dtype)

    def plan(self) -> Tensor:
        """The dense plan Q: [n, m], rows summing to 1/n and columns to 1/m."""
        return self.plan_rows(0, len(self.f))

    def apply(self, W: Tensor) -> Tensor:
        """Q @ W for W [m, k] -> [n, k], in row blocks."""
        return torch.cat([block.to(W.dtype) @ W for _, block in self._blocks()])  # [b, m] @ [m, k] -> [b, k]

    def apply_t(self, W: Tensor) -> Tensor:
        """Q^T @ W for W [n, k] -> [m, k], in row blocks."""
        out = W.new_zeros(len(self.g), W.shape[1])
        for rows, block in self._blocks():
            out += block.to(W.dtype).T @ W[rows]  # [m, b] @ [b, k] -> [m, k]
        return out

    def _blocks(self):
        n = len(self.f)
        for a in range(0, n, PLAN_BLOCK_ROWS):
            b = min(a + PLAN_BLOCK_ROWS, n)
            yield slice(a, b), self.plan_rows(a, b)


def sinkhorn_uniform_streaming(C: Tensor, reg: float, n_iters: int = 1000, tol: float = 1e-6) -> SinkhornResult:
    """Entropic optimal transport with uniform marginals (Eqs. 8, 9, 24-26).

    Scales K = exp(-C / reg) in the exp domain, which is exact while osc(C)/reg + ln(max(n, m)) fits the float's
    range (float32 below 80, float64 below 600); beyond that it iterates in the log domain in float64. After each
    iteration the columns are exact and the L1 error of the rows decides when to stop.

    Args:
        C: [n, m] finite cost, left unchanged. float64 input is solved in float64.
        reg: epsilon > 0, in units of the cost.
        n_iters: upper bound on iterations.
        tol: bound on the larger of the two L1 marginal errors.
    Returns:
        SinkhornResult; `converged` is False when `tol` was not reached (the potentials are still those reached).
    Raises:
        ValueError: empty or non-finite C, reg <= 0, or n_iters < 1.
    """
    if C.ndim != 2 or 0 in C.shape:
        raise ValueError(f"cost must be a non-empty matrix, got shape {tuple(C.shape)}")
    if not reg > 0:
        raise ValueError(f"reg must be positive, got {reg}")
    if n_iters < 1:
        raise ValueError(f"n_iters must be at least 1, got {n_iters}")
    low, high = (float(x) for x in torch.aminmax(C))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("cost contains NaN or infinite values")
    exponent_range = (high - low) / reg + math.log(max(C.shape))
    candidates = [torch.float64] if C.dtype == torch.float64 else [torch.float32, torch.float64]
    dtype = next((t for t in candidates if exponent_range < EXP_RANGE[t]), None)
    if dtype is None:
        f, g, done, error, cost = _scale_log(C, reg, n_iters, tol)
        solver = "log-float64"
    else:
        f, g, done, error, cost = _scale_exp(C.to(dtype), low, reg, n_iters, tol)
        solver = f"exp-{str(dtype).removeprefix('torch.')}"
    return SinkhornResult(f, g, reg, lambda a, b: C[a:b], done, error, error <= tol, cost, solver)


def _scale_exp(C: Tensor, low: float, reg: float, n_iters: int, tol: float):
    """Sinkhorn scalings u, v with K = exp(-(C - low)/reg): u = a / Kv, v = b / K^T u."""
    n, m = C.shape
    K = torch.sub(C, low).div_(-reg).exp_()
    u = C.new_zeros(n)
    v = C.new_ones(m)
    check_every = CUDA_CHECK_EVERY if C.is_cuda else 1
    done, error = 0, math.inf
    Kv = K @ v  # [n, m] @ [m] -> [n]
    while True:
        u = torch.reciprocal(Kv).div_(n)
        v = torch.reciprocal(u @ K).div_(m)  # [n] @ [n, m] -> [m]
        Kv = K @ v
        done += 1
        if done % check_every == 0 or done == n_iters:
            error = float((u * Kv).sub_(1.0 / n).abs_().sum())
            if error <= tol or done == n_iters:
                break
    cost = float(u @ (K.mul_(C) @ v))
    f = (u.double().log_() * reg).add_(low)
    g = v.double().log_() * reg
    return f, g, done, error, cost


def _scale_log(C: Tensor, reg: float, n_iters: int, tol: float):
    """The same iteration on potentials with log-sum-exp, float64, in blocks of rows and of columns."""
    n, m = C.shape
    step = PLAN_BLOCK_ROWS
    f = torch.zeros(n, dtype=torch.float64, device=C.device)
    g = torch.zeros(m, dtype=torch.float64, device=C.device)

    def row_logsums() -> Tensor:
        return torch.cat([torch.logsumexp((g - C[a : a + step]) / reg, 1) for a in range(0, n, step)])

    def column_logsums() -> Tensor:
        return torch.cat([torch.logsumexp((f[:, None] - C[:, a : a + step]) / reg, 0) for a in range(0, m, step)])

    done, error = 0, math.inf
    rows = row_logsums()
    while done < n_iters and error > tol:
        f = -reg * (rows + math.log(n))
        g = -reg * (column_logsums() + math.log(m))
        rows = row_logsums()
        done += 1
        error = float((torch.exp(f / reg + rows) - 1.0 / n).abs().sum())
    cost = sum(float((torch.exp((f[a : a + step, None] + g - C[a : a + step]) / reg) * C[a : a + step]).sum())
               for a in range(0, n, step))  # fmt: skip
    return f, g, done, error, cost


def compute_Q_and_layer_costs(
    X_list: Sequence[Tensor],
    Y_list: Sequence[Tensor],
    reg_inner: float,
    n_iters: int = 1000,
    tol: float = 1e-6,
    desc: str | None = None,
) -> tuple[list[list[SinkhornResult]], Tensor]:
    """Feature plans of every target layer with every source layer, and their costs (Eqs. 7-10).

    Args:
        X_list: L tensors [T, n_l], target activations of one side.
        Y_list: M tensors [T, m_k], source activations of the same side, rows from the same texts.
        reg_inner: epsilon.
        n_iters, tol: see `sinkhorn_uniform_streaming`.
        desc: label of the progress bar (none without it).
    Returns:
        L x M results (their costs are recomputed from the activations when needed, so nothing of size n x m is
        kept), and C_layer [L, M] float64 with C_layer[l, k] = <C, Q>.
    Raises:
        ValueError: as `standardize`, with the model and layer in the message; or row counts differ.
    """
    Zx = [_standardize_layer(X, "target", layer) for layer, X in enumerate(X_list)]
    Zy = [_standardize_layer(Y, "source", layer) for layer, Y in enumerate(Y_list)]
    if len({len(Z) for Z in Zx + Zy}) != 1:
        raise ValueError("all layers of both models need the same number of rows")
    results: list[list[SinkhornResult]] = []
    with tqdm(total=len(Zx) * len(Zy), desc=desc, unit="pair", disable=desc is None) as bar:
        for zx in Zx:
            row = []
            for zy in Zy:
                solved = sinkhorn_uniform_streaming(_correlation_cost(zx, zy), reg_inner, n_iters, tol)
                row.append(corr_cost_plan(zx, zy, solved.f, solved.g, reg_inner, solved.n_iters, solved.error,
                                          solved.converged, solved.cost, solved.solver))  # fmt: skip
                bar.update()
            results.append(row)
    return results, torch.tensor([[r.cost for r in row] for row in results], dtype=torch.float64)


def corr_cost_plan(
    Zx: Tensor, Zy: Tensor, f: Tensor, g: Tensor, reg: float,
    n_iters: int, error: float, converged: bool, cost: float, solver: str,
) -> SinkhornResult:  # fmt: skip
    """A plan from its potentials whose cost is recomputed, when needed, from standardised activations.

    Args:
        Zx, Zy: [T, n] and [T, m] of `standardize`; the rest as in SinkhornResult.
    """
    return SinkhornResult(
        f, g, reg, lambda a, b: _correlation_cost(Zx[:, a:b], Zy), n_iters, error, converged, cost, solver
    )


def _standardize_layer(X: Tensor, model: str, layer: int) -> Tensor:
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
