"""Entropic optimal transport with uniform marginals (Eqs. 8, 9, 24-26): the solver and its result. Tensors only.

K = exp(-C / reg); one sweep is u <- u^(1-w) (a / Kv)^w, v <- v^(1-w) (b / K^T u)^w. With w = 1 this is Sinkhorn's
iteration; w > 1 is over-relaxation (Thibault, Chizat, Dossal and Papadakis 2021), with w from the observed rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

# exp(-x) and the scalings stay inside a float's range while osc(C)/reg + ln(max(n, m)) is below these.
EXP_RANGE = {"float32": 80.0, "float64": 600.0}
# Rows of Q that exist at once when a plan is applied without being built.
PLAN_BLOCK_ROWS = 512
# A K beyond the first size (no cache holds it) is swept in row blocks of the second, which both products of a sweep
# then read from the cache: one read of memory per iteration instead of two.
CACHED_BYTES = 32 << 20
BLOCK_BYTES = 4 << 20
# Elementwise work on K runs in row blocks of this size, threads sharing the blocks of a K larger than the next.
ELEMENTWISE_BYTES = 2 << 20
THREADED_BYTES = 8 << 20
# Host synchronisations cost nothing on a CPU; on CUDA the errors are read every tenth sweep.
CUDA_CHECK_EVERY = 10
# Over-relaxation: sweeps over which a rate is measured, and the fewest plain sweeps left that make it worth while.
RATE_WINDOW = 4
WORTH_RELAXING = 8
MODES = ("auto", "paper")


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
    if C.dtype not in (torch.float32, torch.float64):
        C = C.float()
    matrix = as_array(C)
    low, high = float(matrix.min()), float(matrix.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("cost contains NaN or infinite values")
    return solve_uniform(matrix, (0.0, 1.0), (low, high), reg, n_iters, tol, mode, lambda a, b: C[a:b])


def as_array(tensor: Tensor) -> Any:
    """What the solver computes with: a numpy view of a CPU tensor, the tensor itself on other devices.

    On a CPU numpy has the faster kernels (its exp is vectorised, its BLAS knows every make of processor), and a loop
    that used both libraries would have their thread pools fight for the cores.
    """
    return tensor.detach().numpy() if tensor.device.type == "cpu" else tensor.detach()


def solve_uniform(
    matrix: Any, affine: tuple[float, float], bounds: tuple[float, float], reg: float, n_iters: int, tol: float,
    mode: str, cost_rows: Callable[[int, int], Tensor], K: Any = None,
) -> SinkhornResult:  # fmt: skip
    """`sinkhorn_uniform_streaming` for a caller that knows the range of its cost and has memory for K.

    Args:
        matrix: [n, m] of `as_array`. The cost is C = affine[0] + affine[1] * matrix.
        bounds: (low, high) with low <= C <= high.
        cost_rows: how the result finds rows of C again.
        K: buffer like `matrix` for K, or `matrix` itself, which is lost then; allocated when None.
    """
    if not reg > 0:
        raise ValueError(f"reg must be positive, got {reg}")
    if n_iters < 1:
        raise ValueError(f"n_iters must be at least 1, got {n_iters}")
    if mode not in MODES:
        raise ValueError(f"mode {mode!r}; expected one of {', '.join(MODES)}")
    low, high = bounds
    size = math.log(max(matrix.shape))
    candidates = ("float64",) if matrix.itemsize == 8 else ("float32", "float64")
    dtype = next((t for t in candidates if (high - low) / reg + size < EXP_RANGE[t]), None)
    if dtype is None:
        C = torch.as_tensor(affine[0] + affine[1] * matrix)
        f, g, done, error, cost = _scale_log(C, reg, n_iters, 0.0 if mode == "paper" else tol)
        solver = "log-float64"
    else:
        shift = 0.0 if max(abs(low), abs(high)) / reg + size < EXP_RANGE[dtype] else low
        if dtype != str(matrix.dtype).removeprefix("torch."):
            K = matrix = matrix.astype(dtype) if isinstance(matrix, np.ndarray) else matrix.double()
        elif K is None:
            K = np.empty_like(matrix) if isinstance(matrix, np.ndarray) else torch.empty_like(matrix)
        f, g, done, error, cost = _scale_exp(matrix, K, affine, shift, reg, n_iters, tol, mode == "paper")
        solver = f"exp-{dtype}"
    return SinkhornResult(f, g, reg, cost_rows, done, error, error <= tol, cost, solver)


@dataclass
class _Relaxation:
    """Chooses w from the residuals it is shown: 1 until their rate says that many plain sweeps are left.

    With contraction r per plain sweep the best w is 2 / (1 + sqrt(1 - r)); while relaxed with rate s, the contraction
    behind it solves (s + w - 1)^2 = w^2 r s (Young's relation), so a w chosen too small is raised.
    """

    tol: float
    w: float = 1.0
    seen: list[tuple[int, float]] = field(default_factory=list)

    def show(self, sweep: int, residual: float) -> None:
        """Update w after the residual of `sweep`."""
        self.seen.append((sweep, residual))
        start = next((s for s in reversed(self.seen) if sweep - s[0] >= RATE_WINDOW), None)
        if self.w > 1 and residual <= 4 * self.tol:
            self._change(1.0)
        elif start is not None and residual > 0 and self.tol > 0:
            rate = (residual / start[1]) ** (1 / (sweep - start[0]))
            if self.w == 1:
                if rate < 1 and math.log(self.tol / residual) / math.log(rate) > WORTH_RELAXING:
                    self._change(2 / (1 + math.sqrt(1 - rate)))
            elif rate >= 1:
                self._change(1 + (self.w - 1) / 2)
            elif rate > self.w - 1 + 0.03:
                plain = min((rate + self.w - 1) ** 2 / (self.w**2 * rate), 0.9999)
                raised = 2 / (1 + math.sqrt(1 - plain))
                if raised > self.w:
                    self._change(raised)

    def _change(self, w: float) -> None:
        self.w, self.seen = w, []


def _scale_exp(
    matrix: Any, K: Any, affine: tuple[float, float], shift: float, reg: float, n_iters: int, tol: float, paper: bool
) -> tuple[Tensor, Tensor, int, float, float]:
    """(f, g, iterations, error, <C, Q>) by scaling K = exp(-(C - shift) / reg), written into `K` (may be `matrix`)."""
    n, m = K.shape
    a, b = 1.0 / n, 1.0 / m
    # The reciprocal of reg as this dtype holds it: potentials in units of the problem that is really solved.
    scale = float(np.float64(-1.0 / reg) if K.itemsize == 8 else np.float32(-1.0 / reg))
    blocks = [slice(0, n)] if n * m * K.itemsize <= CACHED_BYTES else _row_blocks(K, BLOCK_BYTES)
    _for_each(K, lambda s: _exp(matrix[s], K[s], affine[1] * scale, (affine[0] - shift) * scale))
    u = a / (K @ (K[0] * 0 + 1))  # v = 1
    v = b / (u @ K)  # [n] @ [n, m] -> [m]
    relaxation = _Relaxation(tol)
    check_every = 1 if isinstance(K, np.ndarray) else CUDA_CHECK_EVERY
    sweep, error, exact = 1, math.inf, True  # sweeps done; exact: the columns are, since the last one was plain
    while True:
        last = sweep == n_iters
        w = 1.0 if paper or sweep + 1 >= n_iters else relaxation.w
        u_before, u, Kv, KTu = u, u * 0, u * 0, v * 0
        for s in blocks:  # one read of K: a block is still in the cache for its second product
            Kv[s] = K[s] @ v  # [b, m] @ [m] -> [b]
            ratio = a / Kv[s]
            u[s] = ratio if w == 1 else u_before[s] * (ratio / u_before[s]) ** w
            KTu += u[s] @ K[s]  # [b] @ [b, m] -> [m]
        if last or sweep % check_every == 0:
            error = float(abs(u_before * Kv - a).sum())
            if not exact:
                error = max(error, float(abs(v * KTu - b).sum()))
            if last or (exact and not paper and error <= tol):
                u = u_before
                break
            relaxation.show(sweep, error)
        ratio = b / KTu
        v = ratio if w == 1 else v * (ratio / v) ** w
        sweep, exact = sweep + 1, w == 1
    # <C, Q> with C from the matrix, or from K where K took its place; the mass of Q is 1, as its columns are exact.
    if K is matrix:
        _for_each(K, lambda s: _times(K[s], _log(K[s])))
        cost = shift + float(u @ (K @ v)) / scale
    else:
        _for_each(K, lambda s: _times(K[s], matrix[s]))
        cost = affine[0] + affine[1] * float(u @ (K @ v))
    f, g = (_log(x.astype(np.float64) if isinstance(x, np.ndarray) else x.double()) / -scale for x in (u, v))
    return torch.as_tensor(f + shift), torch.as_tensor(g), sweep, error, cost


def _exp(matrix: Any, out: Any, factor: float, offset: float) -> None:
    """out <- exp(factor * matrix + offset)."""
    xp: Any = np if isinstance(matrix, np.ndarray) else torch
    xp.multiply(matrix, factor, out=out)
    if offset:
        out += offset
    xp.exp(out, out=out)


def _times(out: Any, factor: Any) -> None:
    out *= factor


def _log(x: Any) -> Any:
    return np.log(x) if isinstance(x, np.ndarray) else x.log()


def _row_blocks(K: Any, size: int) -> list[slice]:
    """Row ranges of K of about `size` bytes each."""
    n, m = K.shape
    rows = max(1, size // (m * K.itemsize))
    return [slice(s, min(s + rows, n)) for s in range(0, n, rows)]


def _for_each(K: Any, work: Callable[[slice], None]) -> None:
    """Run elementwise work on row blocks of K, those of a large CPU array in threads (numpy lets go of the lock)."""
    on_cpu = isinstance(K, np.ndarray)
    blocks = _row_blocks(K, ELEMENTWISE_BYTES) if on_cpu else [slice(0, len(K))]
    threads = torch.get_num_threads() if on_cpu and K.nbytes > THREADED_BYTES else 1
    if threads == 1:
        for s in blocks:
            work(s)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, blocks))


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
