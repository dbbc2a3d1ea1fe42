"""Entropic optimal transport with uniform marginals (Eqs. 8, 9, 24-26): the solver and its result, tensors only."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from core.transport.batch import KernelBatch, scale_batch
from core.transport.log_domain import scale_log
from core.transport.precision import full_float32
from core.transport.problem import PLAN_BLOCK_ROWS, AffineCost, Exponent, Rows, Scaled, SinkhornSettings
from core.transport.scaling import Kernel, scale_one

# Gives rows of the cost C, which a result needs to make rows of its plan.
CostRows: TypeAlias = Callable[[Rows], Tensor]


@dataclass(frozen=True)
class SinkhornResult:
    """The entropic plan Q[i, j] = exp((f[i] + g[j] - C[i, j]) / reg) (Eqs. 8, 9, 24-26), kept as its dual potentials.

    Potentials are n + m numbers instead of n * m, which is why a plan directory can hold thousands of plans. Rows of Q
    are made again when they are needed.

    Attributes:
        f: [n] float64 potentials of the target neurons, in units of the cost.
        g: [m] float64 potentials of the source neurons, in units of the cost.
        reg: entropic regularisation epsilon.
        cost_rows: gives rows of C (a slice, or row numbers), so that neither C nor Q has to stay in memory.
        n_iters: iterations done.
        error: the larger L1 marginal error, max(sum |Q1 - 1/n|, sum |Q^T 1 - 1/m|).
        converged: whether `error` reached the tolerance.
        cost: transport cost <C, Q>, which is the entry of the layer cost (Eq. 10).
        solver: how it was found: `exp-float32`, `exp-float64` or `log-float64`.
        probed: Q @ probe [n, r] float32 where the caller gave a probe, else None.
    """

    f: Tensor
    g: Tensor
    reg: float
    cost_rows: CostRows
    n_iters: int
    error: float
    converged: bool
    cost: float
    solver: str
    probed: Tensor | None = None

    def plan_rows(self, a: int, b: int) -> Tensor:
        """Rows a to b - 1 of Q: [b - a, m] in the type of the cost."""
        return self.plan_at(slice(a, b))

    def plan_at(self, rows: Rows) -> Tensor:
        """The rows of Q that a slice or a tensor of row numbers [k] names: [k, m] in the type of the cost."""
        C = self.cost_rows(rows)
        exponent = (self.f[rows, None] + self.g - C) / self.reg  # float64: rounding f / reg to float32 costs 1e-6
        return exponent.exp_().to(C.dtype)

    def plan(self) -> Tensor:
        """The dense plan Q: [n, m], whose rows sum to 1/n and columns to 1/m."""
        return self.plan_rows(0, len(self.f))

    def apply(self, W: Tensor) -> Tensor:
        """Q @ W for W [m, k] -> [n, k], with a block of rows of Q in memory at a time."""
        return torch.cat([block.to(W.dtype) @ W for _, block in self.blocks()])  # [b, m] @ [m, k] -> [b, k]

    def apply_t(self, W: Tensor) -> Tensor:
        """Q^T @ W for W [n, k] -> [m, k], with a block of rows of Q in memory at a time."""
        out = W.new_zeros(len(self.g), W.shape[1])
        for rows, block in self.blocks():
            out += block.to(W.dtype).T @ W[rows]  # [m, b] @ [b, k] -> [m, k]
        return out

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Q as pairs (rows, block) of at most PLAN_BLOCK_ROWS rows."""
        n = len(self.f)
        for a in range(0, n, PLAN_BLOCK_ROWS):
            b = min(a + PLAN_BLOCK_ROWS, n)
            yield slice(a, b), self.plan_rows(a, b)

    def top_mass(self, k: int) -> float:
        """Share of the transport mass that lies in the k largest entries of Q (the paper's Figure 3)."""
        largest = torch.empty(0)
        total = 0.0
        for _, block in self.blocks():
            total += float(block.sum())
            largest = torch.cat([largest.to(block), block.flatten()])
            largest = largest.topk(min(k, len(largest))).values
        return float(largest.sum()) / total


def no_cost(_rows: Rows) -> Tensor:
    """Stands for `cost_rows` in a result that is kept without the activations of its two layers.

    Raises:
        ValueError: always, as rows of the plan cannot be made without the cost.
    """
    raise ValueError("this result was kept without its cost, which rows of the plan are made from")


def sinkhorn_uniform_streaming(
    C: Tensor, reg: float, n_iters: int = 1000, tol: float = 1e-6, mode: str = "auto"
) -> SinkhornResult:
    """Solve entropic optimal transport with uniform marginals (Eqs. 8, 9, 24-26).

    The iteration scales K = exp(-C / reg), which is exact and fast as long as K fits a float's range: the spread of
    the cost over reg, plus ln(max(n, m)), below 80 in float32 and below 600 in float64. Beyond that it works on
    potentials in the log domain, in float64. The last sweep is plain, so the columns of the plan are exact and the L1
    error of its rows decides whether it converged.

    Args:
        C: [n, m] finite cost, left unchanged. float64 input is solved in float64, half types in float32.
        reg: epsilon > 0, in units of the cost.
        n_iters: the largest number of iterations.
        tol: bound on the larger of the two L1 marginal errors.
        mode: `auto`, or `paper` for exactly `n_iters` plain iterations.
    Returns:
        SinkhornResult; `converged` is False when `tol` was not reached, and the potentials are those of the last
        iteration.
    Raises:
        ValueError: empty or non-finite C, reg <= 0, n_iters < 1, or an unknown mode.
    """
    if C.ndim != 2 or 0 in C.shape:
        raise ValueError(f"cost must be a non-empty matrix, got shape {tuple(C.shape)}")
    C = C.detach() if C.dtype in (torch.float32, torch.float64) else C.detach().float()
    on_cpu = C.device.type == "cpu"
    # numpy finds the range as well: torch's threads, once awake, would disturb numpy's for milliseconds.
    matrix: Any = C.numpy() if on_cpu else C
    cost = AffineCost(float(matrix.min()), float(matrix.max()))
    if not (math.isfinite(cost.low) and math.isfinite(cost.high)):
        raise ValueError("cost contains NaN or infinite values")
    settings = SinkhornSettings(reg, n_iters, tol, mode)
    if on_cpu:
        return solve_one(matrix, cost, settings, C.__getitem__, memory=np.empty_like(matrix))
    return solve_batch(matrix.clone()[None], cost, settings, [C.__getitem__])[0]


def solve_one(
    matrix: np.ndarray,
    cost: AffineCost,
    settings: SinkhornSettings,
    cost_rows: CostRows,
    memory: np.ndarray | None = None,
    probe: np.ndarray | None = None,
) -> SinkhornResult:
    """Solve one problem on a CPU, for a caller that knows the range of its cost and owns the memory.

    Args:
        matrix: [n, m], what the cost is made from.
        cost: how it is made, and its range.
        cost_rows: gives rows of C to the result.
        memory: array like `matrix` for K. None writes K over `matrix`, which is lost.
        probe: [m, r], multiplied by the plan while K is in memory.
    """
    exponent = Exponent.choose(cost, settings.reg, matrix.shape, matrix.itemsize)
    if exponent is None:
        C = torch.from_numpy(cost.origin + cost.slope * matrix)
        scaled = scale_log(C, settings, None if probe is None else torch.tensor(probe))
    else:
        scaled = scale_one(Kernel(matrix, exponent, memory), settings, probe)
    return _result(scaled, settings, cost_rows, exponent)


def solve_batch(
    matrices: Tensor,
    cost: AffineCost,
    settings: SinkhornSettings,
    cost_rows: Sequence[CostRows],
    probes: Tensor | None = None,
) -> list[SinkhornResult]:
    """Solve B problems of one shape together on their device.

    Args:
        matrices: [B, n, m], what the costs are made from; they are lost.
        cost: how they are made, and a range that holds all of them.
        cost_rows: per problem, gives rows of C to the result.
        probes: [B, m, r], each multiplied by the plan of its problem.
    """
    exponent = Exponent.choose(cost, settings.reg, matrices.shape[1:], matrices.element_size())
    if exponent is None:
        factors = [None] * len(matrices) if probes is None else probes
        scaled = [
            scale_log(cost.origin + cost.slope * matrix, settings, factor)
            for matrix, factor in zip(matrices, factors, strict=True)
        ]
    else:
        with full_float32():
            scaled = scale_batch(KernelBatch(matrices, exponent, settings, probes))
    return [_result(one, settings, rows, exponent) for one, rows in zip(scaled, cost_rows, strict=True)]


def _result(
    scaled: Scaled, settings: SinkhornSettings, cost_rows: CostRows, exponent: Exponent | None
) -> SinkhornResult:
    return SinkhornResult(
        f=scaled.f,
        g=scaled.g,
        reg=settings.reg,
        cost_rows=cost_rows,
        n_iters=scaled.n_iters,
        error=scaled.error,
        converged=scaled.error <= settings.tol,
        cost=scaled.cost,
        solver="log-float64" if exponent is None else f"exp-{exponent.dtype}",
        probed=None if scaled.probed is None else scaled.probed.float(),
    )
