"""Feature plans of one target layer with every source layer, in memory that all the problems share.

Stage 1 solves thousands of these problems. On a CPU they run one after the other in the same buffers; on an accelerator
as many as its memory holds run together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from core.transport.correlation import HIGHEST_COST, LOWEST_COST, correlation_cost_rows
from core.transport.precision import full_float32
from core.transport.problem import AffineCost, SinkhornSettings, fits_range
from core.transport.scaling import CACHED_BYTES
from core.transport.sinkhorn import SinkhornResult, solve_batch, solve_one


def solve_layer(
    zx: Tensor,
    Zy: Iterable[Tensor],
    settings: SinkhornSettings,
    probe_rows: Tensor | None = None,
    batch_bytes: int = 1 << 30,
) -> Iterator[SinkhornResult]:
    """Feature plans of one target layer with one source layer after the other (Eqs. 7-9).

    Args:
        zx: standardised activations [T, n] of the target layer.
        Zy: standardised activations [T, m_k] of the source layers, asked for only when their turn comes.
        settings: epsilon and when the iteration stops.
        probe_rows: row numbers [r]. Each result then carries `probed` = Q @ zy[probe_rows]^T [n, r], which is what the
            plan makes of those rows, so that the reconstruction can be measured without making Q again.
        batch_bytes: memory for the matrices and the rows of one batch on an accelerator; at least one problem is solved
            at a time whatever it needs.
    """
    if zx.device.type == "cpu":
        yield from _solve_in_turn(zx, Zy, settings, probe_rows)
    else:
        for batch in _batches(zx, Zy, settings.reg, batch_bytes):
            yield from _solve_together(zx, batch, settings, probe_rows)


def entry_bytes(n: int, m: int, reg: float) -> int:
    """Bytes that a solve needs per entry of its n x m matrix.

    A float32 matrix becomes K in its own memory. Where K does not fit float32's range, a float64 copy comes on top.
    """
    return 4 if fits_range("float32", HIGHEST_COST - LOWEST_COST, reg, (n, m)) else 12


def _solve_in_turn(
    zx: Tensor, Zy: Iterable[Tensor], settings: SinkhornSettings, probe_rows: Tensor | None
) -> Iterator[SinkhornResult]:
    """On a CPU: one problem after the other in one n x m buffer, or in two while they are small.

    The target's rows are divided by epsilon once, so that their product with a source layer is already the exponent of
    K but for a constant: with R = correlation / reg the cost is C = 1 - reg * R.
    """
    n = zx.shape[1]
    inverse = float(np.float32(1.0 / settings.reg))
    scaled = (zx * inverse).numpy().T
    cost = AffineCost(LOWEST_COST, HIGHEST_COST, 1.0, -1.0 / inverse)
    R, K = np.empty((n, 0), np.float32), None
    for zy in Zy:
        if R.shape[1] != zy.shape[1]:
            R = np.empty((n, zy.shape[1]), np.float32)
            K = np.empty_like(R) if R.nbytes <= CACHED_BYTES else None
        np.matmul(scaled, zy.numpy(), out=R)  # [n, T] @ [T, m] -> [n, m]
        probe = None if probe_rows is None else zy.numpy()[probe_rows.numpy()].T
        rows = correlation_cost_rows(zx, zy)
        yield solve_one(R, cost, settings, rows, K, probe)
        del zy, rows, probe  # the caller decides which source layers stay in memory while the next one is read


def _batches(zx: Tensor, Zy: Iterable[Tensor], reg: float, batch_bytes: int) -> Iterator[list[Tensor]]:
    """Source layers of one shape that are solved together within `batch_bytes`, at least one.

    Each list is emptied before the next layers are read, so that two batches are never in memory.
    """
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


def _solve_together(
    zx: Tensor, batch: list[Tensor], settings: SinkhornSettings, probe_rows: Tensor | None
) -> list[SinkhornResult]:
    """On an accelerator: plans of zx [T, n] with every zy [T, m] of a batch. The cost is C = 1 - R, R correlations."""
    R = zx.new_empty(len(batch), zx.shape[1], batch[0].shape[1])
    with full_float32():
        for out, zy in zip(R, batch, strict=True):
            torch.mm(zx.T, zy, out=out)  # [n, T] @ [T, m] -> [n, m]
    probes = None if probe_rows is None else torch.stack([zy[probe_rows].T for zy in batch])  # [B, m, r]
    rows = [correlation_cost_rows(zx, zy) for zy in batch]
    return solve_batch(R, AffineCost(LOWEST_COST, HIGHEST_COST, 1.0, -1.0), settings, rows, probes)
