"""The iterations behind `core.transport.sinkhorn`: one problem with numpy on a CPU, batches with torch on
accelerators, and the log domain for epsilons beyond a float's range.

All return potentials f [n], g [m] in units of the cost (float64).

K = exp(-(C - shift) / reg) with C = affine[0] + affine[1] * matrix; one sweep is u <- u^(1-w) (a / Kv)^w,
v <- v^(1-w) (b / K^T u)^w. With w = 1 this is Sinkhorn's iteration; w > 1 is over-relaxation (Thibault, Chizat, Dossal
and Papadakis 2021), with w from the observed rate. The last sweep is plain, so the columns are exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Rows of K or Q that exist at once where neither is kept.
PLAN_BLOCK_ROWS = 512
# A K beyond the first size (no cache holds it) is swept in row blocks of the second, which both products of a sweep
# then read from the cache: one read of memory per iteration instead of two.
CACHED_BYTES = 32 << 20
BLOCK_BYTES = 8 << 20
# Elementwise work on K runs in row blocks of the first size; beyond the second size threads share blocks of the third.
ELEMENTWISE_BYTES = 256 << 10
THREADED_BYTES = 8 << 20
THREAD_BYTES = 4 << 20
# Host synchronisations cost nothing on a CPU; on accelerators the errors are read every tenth sweep, all at once.
CHECK_EVERY = 10
# Over-relaxation: sweeps over which a rate is measured, and the fewest plain sweeps left that make it worth while.
RATE_WINDOW = 4
WORTH_RELAXING = 8


@contextmanager
def full_float32() -> Iterator[None]:
    """Matrix products in full float32, whatever the global TF32 and bfloat16 settings say; those come back after."""
    mkldnn: Any = torch.backends.mkldnn
    backends: list[Any] = [torch.backends.cuda.matmul, mkldnn.matmul]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


@dataclass(frozen=True)
class Scaled:
    """What an iteration found. `probed` is Q @ probe [n, r], None without a probe."""

    f: Tensor
    g: Tensor
    n_iters: int
    error: float
    cost: float
    probed: Tensor | None


@dataclass
class Relaxation:
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


def scale_one(
    matrix: np.ndarray,
    K: np.ndarray,
    affine: tuple[float, float],
    shift: float,
    reg: float,
    n_iters: int,
    tol: float,
    paper: bool,
    probe: np.ndarray | None = None,
) -> Scaled:
    """One problem, by numpy: its exp is vectorised, its BLAS knows every make of processor, and a loop that used
    torch's kernels as well would have two thread pools fight for the cores.

    Args:
        matrix: [n, m], float32 or float64.
        K: buffer of the same kind for K, or `matrix` itself, which is lost then.
        paper: exactly `n_iters` plain sweeps.
        probe: [m, r] to be multiplied by Q while K is in memory.
    """
    n, m = K.shape
    a, b = 1.0 / n, 1.0 / m
    # The reciprocal of reg as this dtype holds it: potentials in units of the problem that is really solved.
    scale = float(K.dtype.type(-1.0 / reg))
    _exp(matrix, K, affine[1] * scale, (affine[0] - shift) * scale)
    blocks = [slice(0, n)] if K.nbytes <= CACHED_BYTES else _row_blocks(K, BLOCK_BYTES)
    u = a / (K @ np.ones_like(K[0]))  # v = 1
    v = b / (u @ K)  # [n] @ [n, m] -> [m]
    relaxation = Relaxation(tol)
    sweep, error, exact = 1, math.inf, True  # sweeps done; exact: the columns are, since the last one was plain
    while True:
        last = sweep == n_iters
        w = 1.0 if paper or sweep + 1 >= n_iters else relaxation.w
        u_before, u, Kv, KTu = u, np.empty_like(u), np.empty_like(u), 0
        for rows in blocks:  # one read of K: a block is still in the cache for its second product
            Kv[rows] = K[rows] @ v  # [b, m] @ [m] -> [b]
            ratio = a / Kv[rows]
            u[rows] = ratio if w == 1 else u_before[rows] * (ratio / u_before[rows]) ** w
            KTu = KTu + u[rows] @ K[rows]  # [b] @ [b, m] -> [m]
        error = float(abs(u_before * Kv - a).sum())
        if not exact:
            error = max(error, float(abs(v * KTu - b).sum()))
        if last or (exact and not paper and error <= tol):
            u = u_before
            break
        if not paper:
            relaxation.show(sweep, error)
        ratio = b / KTu
        v = ratio if w == 1 else v * (ratio / v) ** w
        sweep, exact = sweep + 1, w == 1
    probed = (
        None if probe is None else torch.from_numpy(u[:, None] * (K @ (v[:, None] * probe)))
    )  # [n, m] @ [m, r] -> [n, r]
    # <C, Q> with C from the matrix, or from K where K took its place; the mass of Q is 1, as its columns are exact.
    known = None if K is matrix else matrix
    product = sum(float(u[rows] @ (_weighed(K, known, rows) @ v)) for rows in _row_blocks(K, ELEMENTWISE_BYTES))
    cost = shift + product / scale if known is None else affine[0] + affine[1] * product
    f, g = (torch.from_numpy(np.log(x.astype(np.float64)) / -scale) for x in (u, v))
    return Scaled(f + shift, g, sweep, error, cost, probed)


def _exp(matrix: np.ndarray, out: np.ndarray, factor: float, offset: float) -> None:
    """out <- exp(factor * matrix + offset), with as few passes as that takes, in row blocks that stay in the cache
    between them, or, for a large matrix, in blocks big enough for threads (numpy lets go of the lock)."""

    def work(rows: slice) -> None:
        block, to = matrix[rows], out[rows]
        if abs(factor - 1) > 1e-12:
            block = np.multiply(block, factor, out=to)
        if offset:
            block = np.add(block, offset, out=to)
        np.exp(block, out=to)

    threads = torch.get_num_threads() if out.nbytes > THREADED_BYTES else 1
    if threads == 1:
        for rows in _row_blocks(out, ELEMENTWISE_BYTES):
            work(rows)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, _row_blocks(out, THREAD_BYTES)))


def _weighed(K: np.ndarray, matrix: np.ndarray | None, rows: slice) -> np.ndarray:
    """Rows of K * matrix, or of K * log K."""
    if matrix is not None:
        return K[rows] * matrix[rows]
    weighed = np.log(K[rows])
    weighed *= K[rows]
    return weighed


def _row_blocks(K: np.ndarray, size: int) -> list[slice]:
    """Row ranges of K of about `size` bytes each."""
    n, m = K.shape
    rows = max(1, size // (m * K.itemsize))
    return [slice(s, min(s + rows, n)) for s in range(0, n, rows)]


def scale_batch(
    K: Tensor,
    affine: tuple[float, float],
    shift: float,
    reg: float,
    n_iters: int,
    tol: float,
    paper: bool,
    probes: Tensor | None = None,
) -> list[Scaled]:
    """Problems of one shape together, for accelerators. Each stops by itself and leaves the batch.

    The host reads the device once per CHECK_EVERY sweeps (all errors at once) and once at the end (all costs).

    Args:
        K: [B, n, m] matrices, which become K in place and are lost.
        probes: [B, m, r] to be multiplied by each Q.
    """
    with full_float32():
        return _scale_batch(K, affine, shift, reg, n_iters, tol, paper, probes)


def _scale_batch(
    K: Tensor,
    affine: tuple[float, float],
    shift: float,
    reg: float,
    n_iters: int,
    tol: float,
    paper: bool,
    probes: Tensor | None,
) -> list[Scaled]:
    count, n, m = K.shape
    a, b = 1.0 / n, 1.0 / m
    scale = -1.0 / reg if K.dtype == torch.float64 else float(np.float32(-1.0 / reg))
    K.mul_(affine[1] * scale).add_((affine[0] - shift) * scale).exp_()
    u = a / K.sum(2)  # v = 1
    v = b / _rows_times(u, K)
    # Per slot still alive: which problem it holds, its relaxation, and the w it uses now and used in the last sweep.
    problems, relaxations = list(range(count)), [Relaxation(tol) for _ in range(count)]
    held, used = [1.0] * count, [1.0] * count
    w = torch.ones(count, 1, dtype=K.dtype, device=K.device)
    found: dict[int, tuple[Tensor, Tensor, int, float, Tensor, Tensor | None]] = {}
    sweep = 1
    while problems:
        last = sweep == n_iters
        chosen = [1.0 if paper or sweep + 1 >= n_iters else r.w for r in relaxations]
        if chosen != held:
            held, w = chosen, _to_device([[x] for x in chosen], K)
        live = K[: len(problems)]
        u_before, Kv = u, torch.bmm(live, v.unsqueeze(2)).squeeze(2)  # [B, n, m] @ [B, m, 1]
        u = _relaxed(u, a / Kv, w, held)
        KTu = _rows_times(u, live)
        if last or sweep % CHECK_EVERY == 0:
            both = torch.stack([(u_before * Kv - a).abs().sum(1), (v * KTu - b).abs().sum(1)])
            errors = [
                rows if x == 1 else max(rows, columns) for (rows, columns), x in zip(both.T.tolist(), used, strict=True)
            ]
            done = {s for s, x in enumerate(used) if last or (x == 1 and not paper and errors[s] <= tol)}
            for slot in done:
                k, row, column = problems[slot], u_before[slot], v[slot]
                probed = None if probes is None else row[:, None] * (K[slot] @ (column[:, None] * probes[k]))
                log_cost = row @ (torch.xlogy(K[slot], K[slot], out=K[slot]) @ column)  # sum of Q log K
                found[k] = (row.double().log(), column.double().log(), sweep, errors[slot], log_cost, probed)
            for slot in set() if paper else set(range(len(problems))) - done:
                relaxations[slot].show(sweep, errors[slot])
            if done:
                order = _close_ranks(len(problems), done)
                for slot, moved in enumerate(order):
                    if slot != moved:
                        K[slot].copy_(K[moved])
                problems = [problems[s] for s in order]
                relaxations, held = [relaxations[s] for s in order], [held[s] for s in order]
                u, v, w, KTu = (x[order] for x in (u, v, w, KTu))
        v = _relaxed(v, b / KTu, w, held)
        used, sweep = held, sweep + 1
    costs = torch.stack([found[k][4] for k in range(count)]).tolist()
    return [
        Scaled(f / -scale + shift, g / -scale, done_at, error, shift + cost / scale, probed)
        for (f, g, done_at, error, _, probed), cost in zip((found[k] for k in range(count)), costs, strict=True)
    ]


def _rows_times(u: Tensor, K: Tensor) -> Tensor:
    return torch.bmm(u.unsqueeze(1), K).squeeze(1)  # [B, 1, n] @ [B, n, m] -> [B, m]


def _relaxed(before: Tensor, ratio: Tensor, w: Tensor, values: list[float]) -> Tensor:
    """before^(1-w) ratio^w [B, n]; `values` are w [B, 1] as the host knows them."""
    if all(x == 1 for x in values):
        return ratio
    return torch.where(w == 1, ratio, before * (ratio / before) ** w)


def _close_ranks(count: int, gone: set[int]) -> list[int]:
    """Old slot of every new slot: the last ones move into the slots that became free, so few matrices are copied."""
    stay = count - len(gone)
    movers = iter(s for s in range(stay, count) if s not in gone)
    return [next(movers) if slot in gone else slot for slot in range(stay)]


def _to_device(values: list[list[float]], like: Tensor) -> Tensor:
    """A small tensor sent without waiting for the device."""
    tensor = torch.tensor(values, dtype=like.dtype)
    if like.device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(like.device, non_blocking=True)


def scale_log(
    C: Tensor, reg: float, n_iters: int, tol: float, paper: bool = False, probe: Tensor | None = None
) -> Scaled:
    """The same iteration on potentials with log-sum-exp, in float64, in blocks of rows and of columns of C [n, m]."""
    n, m = C.shape
    step = PLAN_BLOCK_ROWS
    f = torch.zeros(n, dtype=torch.float64, device=C.device)
    g = torch.zeros(m, dtype=torch.float64, device=C.device)
    check_every = 1 if C.device.type == "cpu" else CHECK_EVERY

    def row_logsums() -> Tensor:
        return torch.cat([torch.logsumexp((g - C[a : a + step]) / reg, 1) for a in range(0, n, step)])

    def column_logsums() -> Tensor:
        return torch.cat([torch.logsumexp((f[:, None] - C[:, a : a + step]) / reg, 0) for a in range(0, m, step)])

    done, error = 0, math.inf
    rows = row_logsums()
    while done < n_iters and (paper or not error <= tol):
        f = -reg * (rows + math.log(n))
        g = -reg * (column_logsums() + math.log(m))
        rows = row_logsums()
        done += 1
        if done == n_iters or done % check_every == 0:
            error = float((torch.exp(f / reg + rows) - 1.0 / n).abs().sum())
    cost, probed = torch.zeros((), dtype=torch.float64, device=C.device), []
    for a in range(0, n, step):
        Q = torch.exp((f[a : a + step, None] + g - C[a : a + step]) / reg)
        cost += (Q * C[a : a + step]).sum()
        if probe is not None:
            probed.append(Q.to(probe.dtype) @ probe)  # [b, m] @ [m, r]
    return Scaled(f, g, done, error, float(cost), torch.cat(probed) if probed else None)
