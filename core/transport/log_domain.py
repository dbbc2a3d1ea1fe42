"""Sinkhorn's iteration on potentials instead of scalings, for an epsilon so small that K leaves a float's range.

It takes a log-sum-exp over the whole cost twice per iteration, which is many times slower than a product with K. That
is why it runs only where float64 cannot hold K.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from core.transport.batch import CHECK_EVERY
from core.transport.problem import PLAN_BLOCK_ROWS, Scaled, SinkhornSettings


def scale_log(C: Tensor, settings: SinkhornSettings, probe: Tensor | None = None) -> Scaled:
    """Entropic transport in the log domain, in float64 (Eqs. 8, 9, 24-26).

    Each iteration sets f so that the rows of the plan sum to 1/n and then g so that its columns sum to 1/m. The work is
    done in blocks of rows and of columns, so that nothing else of the size of C is in memory.

    Args:
        C: [n, m] cost.
        probe: [m, r], multiplied by the plan.
    """
    reg, (n, m) = settings.reg, C.shape
    f = torch.zeros(n, dtype=torch.float64, device=C.device)
    g = torch.zeros(m, dtype=torch.float64, device=C.device)
    check_every = 1 if C.device.type == "cpu" else CHECK_EVERY  # to read an error from an accelerator takes time
    sweeps, error = 0, math.inf
    rows = _row_logsums(C, g, reg)
    while sweeps < settings.n_iters and not settings.stops_at(error):
        f = -reg * (rows + math.log(n))
        g = -reg * (_column_logsums(C, f, reg) + math.log(m))
        rows = _row_logsums(C, g, reg)
        sweeps += 1
        if sweeps == settings.n_iters or sweeps % check_every == 0:
            error = float((torch.exp(f / reg + rows) - 1.0 / n).abs().sum())
    cost, probed = _read_out(C, f, g, reg, probe)
    return Scaled(f, g, sweeps, error, cost, probed)


def _row_logsums(C: Tensor, g: Tensor, reg: float) -> Tensor:
    """log sum_j exp((g[j] - C[i, j]) / reg): [n]."""
    step = PLAN_BLOCK_ROWS
    return torch.cat([torch.logsumexp((g - C[a : a + step]) / reg, 1) for a in range(0, len(C), step)])


def _column_logsums(C: Tensor, f: Tensor, reg: float) -> Tensor:
    """log sum_i exp((f[i] - C[i, j]) / reg): [m]."""
    step = PLAN_BLOCK_ROWS
    blocks = (C[:, a : a + step] for a in range(0, C.shape[1], step))
    return torch.cat([torch.logsumexp((f[:, None] - block) / reg, 0) for block in blocks])


def _read_out(C: Tensor, f: Tensor, g: Tensor, reg: float, probe: Tensor | None) -> tuple[float, Tensor | None]:
    """(<C, Q>, Q @ probe [n, r]) of the plan that the potentials describe, whose rows exist a block at a time."""
    step = PLAN_BLOCK_ROWS
    cost, probed = torch.zeros((), dtype=torch.float64, device=C.device), []
    for a in range(0, len(C), step):
        block = C[a : a + step]
        Q = torch.exp((f[a : a + step, None] + g - block) / reg)
        cost += (Q * block).sum()
        if probe is not None:
            probed.append(Q.to(probe.dtype) @ probe)  # [b, m] @ [m, r] -> [b, r]
    return float(cost), torch.cat(probed) if probed else None
