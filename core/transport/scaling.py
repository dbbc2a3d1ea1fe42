"""Sinkhorn's iteration for one problem on a CPU: the kernel K in memory, its sweeps, and what is read out of it.

numpy does the work here: its exp is vectorised, its BLAS is fast on every make of processor, and a loop that used
torch's kernels as well would have two thread pools compete for the cores.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from core.transport.problem import Exponent, Scaled, SinkhornSettings
from core.transport.relaxation import Relaxation

# A K that is larger than this does not fit in a processor's cache.
CACHED_BYTES = 32 << 20
# Such a K is swept in row blocks of this size: a block is still in the cache for the second product of a sweep, so that
# a sweep reads K once from memory instead of twice.
BLOCK_BYTES = 8 << 20
# What is done to every entry of K is done in row blocks of this size, which stay in the cache between the steps.
ELEMENTWISE_BYTES = 256 << 10
# exp of a K larger than the first size is shared by threads, in blocks of the second size.
THREADED_BYTES = 8 << 20
THREAD_BYTES = 4 << 20


class Kernel:
    """K = exp(-(C - shift) / reg) of one problem, [n, m], with the memory that it lies in."""

    def __init__(self, matrix: np.ndarray, exponent: Exponent, memory: np.ndarray | None = None):
        """Compute K.

        Args:
            matrix: [n, m] float32 or float64, what the cost is made from.
            exponent: how K is made from the matrix, and in which float type.
            memory: array like `matrix` that K is written to. None writes K over the matrix, which is lost; that halves
                the memory of a large problem. Where K needs a wider type than the matrix has, both are left alone.
        """
        if matrix.dtype != exponent.dtype:
            matrix, memory = matrix.astype(exponent.dtype), None
        self.exponent = exponent
        self.K = matrix if memory is None else memory
        self.matrix = None if memory is None else matrix
        self.a, self.b = (1.0 / size for size in matrix.shape)
        _exp(matrix, self.K, exponent.factor, exponent.offset)
        fits_cache = self.K.nbytes <= CACHED_BYTES
        self.sweep_blocks = [slice(0, len(matrix))] if fits_cache else _row_blocks(self.K, BLOCK_BYTES)

    def first_sweep(self) -> tuple[np.ndarray, np.ndarray]:
        """The scalings (u [n], v [m]) after one plain sweep from v = 1."""
        u = self.a / (self.K @ np.ones_like(self.K[0]))
        return u, self.b / (u @ self.K)  # [n] @ [n, m] -> [m]

    def sweep(
        self, u: np.ndarray, v: np.ndarray, w: float, exact_columns: bool
    ) -> tuple[np.ndarray, np.ndarray, float]:
        """One sweep u <- u^(1-w) (a / Kv)^w, v <- v^(1-w) (b / K^T u)^w.

        Its two products also give the marginals of the plan that it starts from: u * Kv are that plan's row sums.

        Args:
            u, v: scalings [n], [m] to start from.
            w: exponent of over-relaxation; 1 is a plain sweep.
            exact_columns: the sweep before was plain, after which the columns of the plan sum to 1/m exactly and only
                the rows have an error.
        Returns:
            (u, v, the larger L1 marginal error of the plan before the sweep).
        """
        u_next, Kv, KTu = np.empty_like(u), np.empty_like(u), np.zeros(len(v), v.dtype)
        for rows in self.sweep_blocks:
            Kv[rows] = self.K[rows] @ v  # [b, m] @ [m] -> [b]
            u_next[rows] = _relaxed(u[rows], self.a / Kv[rows], w)
            KTu += u_next[rows] @ self.K[rows]  # [b] @ [b, m] -> [m]
        error = float(abs(u * Kv - self.a).sum())
        if not exact_columns:
            error = max(error, float(abs(v * KTu - self.b).sum()))
        return u_next, _relaxed(v, self.b / KTu, w), error

    def plan_times(self, u: np.ndarray, v: np.ndarray, probe: np.ndarray) -> np.ndarray:
        """Q @ probe for the plan Q = diag(u) K diag(v) and a probe [m, r] -> [n, r]."""
        return u[:, None] * (self.K @ (v[:, None] * probe))  # [n, m] @ [m, r] -> [n, r]

    def transport_cost(self, u: np.ndarray, v: np.ndarray) -> float:
        """<C, Q> of the plan Q = diag(u) K diag(v), whose mass is 1 (Eq. 10).

        The cost comes from the matrix where that is kept, and from log K where K was written over it.
        """
        total = 0.0
        for rows in _row_blocks(self.K, ELEMENTWISE_BYTES):
            values = np.log(self.K[rows]) if self.matrix is None else self.matrix[rows]
            total += float(u[rows] @ ((values * self.K[rows]) @ v))  # [b] @ ([b, m] @ [m])
        read = self.exponent.cost_from_log_kernel if self.matrix is None else self.exponent.cost_from_matrix
        return read(total)


def scale_one(kernel: Kernel, settings: SinkhornSettings, probe: np.ndarray | None = None) -> Scaled:
    """Sinkhorn's iteration on a kernel (Eqs. 8, 9, 24-26), over-relaxed where that saves sweeps.

    Args:
        probe: [m, r], multiplied by the plan while K is in memory.
    """
    relaxation = Relaxation(settings)
    u, v = kernel.first_sweep()
    sweeps, exact_columns = 1, True
    while True:
        w = relaxation.after(sweeps)
        u_next, v_next, error = kernel.sweep(u, v, w, exact_columns)
        if sweeps == settings.n_iters or (exact_columns and settings.stops_at(error)):
            break
        relaxation.observe(sweeps, error)
        u, v, sweeps, exact_columns = u_next, v_next, sweeps + 1, w == 1
    probed = None if probe is None else torch.from_numpy(kernel.plan_times(u, v, probe))
    cost = kernel.transport_cost(u, v)
    f, g = kernel.exponent.potentials(np.log(u.astype(np.float64)), np.log(v.astype(np.float64)))
    return Scaled(torch.from_numpy(f), torch.from_numpy(g), sweeps, error, cost, probed)


def _relaxed(before: np.ndarray, ratio: np.ndarray, w: float) -> np.ndarray:
    """before^(1-w) ratio^w, the over-relaxed step from `before` towards `ratio`."""
    return ratio if w == 1 else before * (ratio / before) ** w


def _exp(matrix: np.ndarray, out: np.ndarray, factor: float, offset: float) -> None:
    """out <- exp(factor * matrix + offset), where a factor of 1 and an offset of 0 cost nothing.

    The steps run block after block, so that a block stays in the cache between them. numpy releases the interpreter's
    lock, so threads share the blocks of a large matrix.
    """

    def work(rows: slice) -> None:
        block, target = matrix[rows], out[rows]
        if abs(factor - 1) > 1e-12:
            block = np.multiply(block, factor, out=target)
        if offset:
            block = np.add(block, offset, out=target)
        np.exp(block, out=target)

    threads = torch.get_num_threads() if out.nbytes > THREADED_BYTES else 1
    if threads == 1:
        for rows in _row_blocks(out, ELEMENTWISE_BYTES):
            work(rows)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, _row_blocks(out, THREAD_BYTES)))


def _row_blocks(K: np.ndarray, size: int) -> list[slice]:
    """Row ranges of K of about `size` bytes each."""
    n, m = K.shape
    rows = max(1, size // (m * K.itemsize))
    return [slice(start, min(start + rows, n)) for start in range(0, n, rows)]
