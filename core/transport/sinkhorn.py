"""Entropic optimal transport with uniform marginals (Eqs. 8, 9, 24-26): the solver and its result. Tensors only."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from core.transport.scaling import PLAN_BLOCK_ROWS, Scaled, scale_batch, scale_log, scale_one

# exp(-x) and the scalings stay inside a float's range while osc(C)/reg + ln(max(n, m)) is below these.
EXP_RANGE = {"float32": 80.0, "float64": 600.0}
MODES = ("auto", "paper")
Rows: TypeAlias = slice | Tensor


@dataclass(frozen=True)
class SinkhornResult:
    """Entropic plan Q[i, j] = exp((f[i] + g[j] - C[i, j]) / reg), kept as its dual potentials.

    Attributes:
        f: [n] float64 target potentials, in units of the cost.
        g: [m] float64 source potentials, in units of the cost.
        reg: entropic regularisation epsilon.
        cost_rows: rows of C (a slice, or their numbers) on demand, so that neither C nor Q has to stay in memory.
        n_iters: iterations done.
        error: larger L1 marginal error, max(sum |Q1 - 1/n|, sum |Q^T 1 - 1/m|).
        converged: whether `error` reached the tolerance.
        cost: transport cost <C, Q> (entry of the layer cost, Eq. 10).
        solver: `exp-float32`, `exp-float64` or `log-float64`.
        probed: Q @ probe [n, r] float32 where the caller gave a probe, else None.
    """

    f: Tensor
    g: Tensor
    reg: float
    cost_rows: Callable[[Rows], Tensor]
    n_iters: int
    error: float
    converged: bool
    cost: float
    solver: str
    probed: Tensor | None = None

    def plan_rows(self, a: int, b: int) -> Tensor:
        """Rows a..b of Q: [b - a, m] in the cost's dtype."""
        return self.plan_at(slice(a, b))

    def plan_at(self, rows: Rows) -> Tensor:
        """Some rows of Q [k, m], in the cost's dtype."""
        C = self.cost_rows(rows)
        exponent = (self.f[rows, None] + self.g - C) / self.reg  # float64
        return exponent.exp_().to(C.dtype)

    def plan(self) -> Tensor:
        """The dense plan Q: [n, m], rows summing to 1/n and columns to 1/m."""
        return self.plan_rows(0, len(self.f))

    def apply(self, W: Tensor) -> Tensor:
        """Q @ W for W [m, k] -> [n, k], in row blocks."""
        return torch.cat([block.to(W.dtype) @ W for _, block in self.blocks()])  # [b, m] @ [m, k] -> [b, k]

    def apply_t(self, W: Tensor) -> Tensor:
        """Q^T @ W for W [n, k] -> [m, k], in row blocks."""
        out = W.new_zeros(len(self.g), W.shape[1])
        for rows, block in self.blocks():
            out += block.to(W.dtype).T @ W[rows]  # [m, b] @ [b, k] -> [m, k]
        return out

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Q as (rows, block) pairs of at most PLAN_BLOCK_ROWS rows."""
        n = len(self.f)
        for a in range(0, n, PLAN_BLOCK_ROWS):
            b = min(a + PLAN_BLOCK_ROWS, n)
            yield slice(a, b), self.plan_rows(a, b)

    def top_mass(self, k: int) -> float:
        """Share of the transport mass in the k largest entries of Q (the paper's Figure 3), in row blocks."""
        largest = torch.empty(0)
        total = 0.0
        for _, block in self.blocks():
            total += float(block.sum())
            largest = torch.cat([largest.to(block), block.flatten()])
            largest = largest.topk(min(k, len(largest))).values
        return float(largest.sum()) / total


def no_cost(_rows: Rows) -> Tensor:
    """`cost_rows` of a result that is kept without the activations of its two layers."""
    raise ValueError("this result was kept without its cost, which rows of the plan are made from")


def sinkhorn_uniform_streaming(
    C: Tensor, reg: float, n_iters: int = 1000, tol: float = 1e-6, mode: str = "auto"
) -> SinkhornResult:
    """Entropic optimal transport with uniform marginals (Eqs. 8, 9, 24-26).

    Scales K = exp(-C / reg) in the exp domain, which is exact while osc(C)/reg + ln(max(n, m)) fits the float's
    range (float32 below 80, float64 below 600); beyond that it iterates in the log domain in float64. The last sweep
    is plain, so the columns are exact and the L1 error of the rows decides.

    Args:
        C: [n, m] finite cost, left unchanged. float64 input is solved in float64, half types in float32.
        reg: epsilon > 0, in units of the cost.
        n_iters: upper bound on iterations.
        tol: bound on the larger of the two L1 marginal errors.
        mode: `auto`, or `paper`: exactly `n_iters` plain iterations.
    Returns:
        SinkhornResult; `converged` is False when `tol` was not reached (the potentials are still those reached).
    Raises:
        ValueError: empty or non-finite C, reg <= 0, n_iters < 1, or an unknown mode.
    """
    if C.ndim != 2 or 0 in C.shape:
        raise ValueError(f"cost must be a non-empty matrix, got shape {tuple(C.shape)}")
    C = C.detach() if C.dtype in (torch.float32, torch.float64) else C.detach().float()
    on_cpu = C.device.type == "cpu"
    matrix: Any = C.numpy() if on_cpu else C  # torch's threads, once woken, would disturb numpy's for milliseconds
    bounds = float(matrix.min()), float(matrix.max())
    if not all(map(math.isfinite, bounds)):
        raise ValueError("cost contains NaN or infinite values")
    rows = C.__getitem__
    if on_cpu:
        return solve_one(matrix, (0.0, 1.0), bounds, reg, n_iters, tol, mode, rows)
    return solve_batch(matrix.clone()[None], (0.0, 1.0), bounds, reg, n_iters, tol, mode, [rows])[0]


def solve_one(
    matrix: np.ndarray,
    affine: tuple[float, float],
    bounds: tuple[float, float],
    reg: float,
    n_iters: int,
    tol: float,
    mode: str,
    cost_rows: Callable[[Rows], Tensor],
    K: np.ndarray | None = None,
    probe: np.ndarray | None = None,
) -> SinkhornResult:
    """`sinkhorn_uniform_streaming` on a CPU, for a caller that knows the range of its cost and has memory for K.

    Args:
        matrix: [n, m]. The cost is C = affine[0] + affine[1] * matrix.
        bounds: (low, high) with low <= C <= high.
        cost_rows: how the result finds rows of C again.
        K: buffer like `matrix` for K, or `matrix` itself, which is lost then; allocated when None.
        probe: [m, r] to be multiplied by Q while K is in memory.
    """
    dtype, shift = _range(matrix.shape, matrix.itemsize, affine[0], bounds, reg, n_iters, mode)
    if dtype is None:
        C, factor = torch.from_numpy(affine[0] + affine[1] * matrix), None if probe is None else torch.tensor(probe)
        scaled = scale_log(C, reg, n_iters, tol, mode == "paper", factor)
    else:
        if matrix.dtype != dtype:
            K = matrix = matrix.astype(dtype)
        elif K is None:
            K = np.empty_like(matrix)
        scaled = scale_one(matrix, K, affine, shift, reg, n_iters, tol, mode == "paper", probe)
    return _result(scaled, reg, tol, cost_rows, dtype)


def solve_batch(
    matrices: Tensor,
    affine: tuple[float, float],
    bounds: tuple[float, float],
    reg: float,
    n_iters: int,
    tol: float,
    mode: str,
    cost_rows: Sequence[Callable[[Rows], Tensor]],
    probes: Tensor | None = None,
) -> list[SinkhornResult]:
    """`solve_one` for B problems of one shape on an accelerator: `matrices` [B, n, m] is lost, `probes` [B, m, r]."""
    dtype, shift = _range(matrices.shape[1:], matrices.element_size(), affine[0], bounds, reg, n_iters, mode)
    if dtype is None:
        factors = [None] * len(matrices) if probes is None else probes
        scaled = [
            scale_log(affine[0] + affine[1] * matrix, reg, n_iters, tol, mode == "paper", factor)
            for matrix, factor in zip(matrices, factors, strict=True)
        ]
    else:
        K = matrices.to(getattr(torch, dtype))
        probes = None if probes is None else probes.to(K.dtype)
        scaled = scale_batch(K, affine, shift, reg, n_iters, tol, mode == "paper", probes)
    return [_result(one, reg, tol, rows, dtype) for one, rows in zip(scaled, cost_rows, strict=True)]


def _range(
    shape: Sequence[int], itemsize: int, origin: float, bounds: tuple[float, float], reg: float, n_iters: int, mode: str
) -> tuple[str | None, float]:
    """(float type in whose range K = exp(-(C - shift) / reg) and its scalings stay, shift); None: no type is enough.

    `origin`, the cost where the matrix is 0, saves a pass over the matrix as the shift; else the lowest cost is it.
    """
    if not 0 < reg < math.inf:
        raise ValueError(f"reg must be positive, got {reg}")
    if n_iters < 1:
        raise ValueError(f"n_iters must be at least 1, got {n_iters}")
    if mode not in MODES:
        raise ValueError(f"mode {mode!r}; expected one of {', '.join(MODES)}")
    low, high = bounds
    size = math.log(max(shape))
    for dtype in ("float64",) if itemsize == 8 else ("float32", "float64"):
        if (high - low) / reg + size < EXP_RANGE[dtype]:
            farthest = max(abs(low - origin), abs(high - origin))
            return dtype, origin if farthest / reg + size < EXP_RANGE[dtype] else low
    return None, 0.0


def _result(
    scaled: Scaled, reg: float, tol: float, cost_rows: Callable[[Rows], Tensor], dtype: str | None
) -> SinkhornResult:
    solver = "log-float64" if dtype is None else f"exp-{dtype}"
    probed = None if scaled.probed is None else scaled.probed.float()
    return SinkhornResult(
        scaled.f,
        scaled.g,
        reg,
        cost_rows,
        scaled.n_iters,
        scaled.error,
        scaled.error <= tol,
        scaled.cost,
        solver,
        probed,
    )
