"""The solvers that ours is measured against: POT, as reference and as competitor."""

from __future__ import annotations

from typing import Any

import numpy as np
import ot
import torch
from torch import Tensor

# Largest L1 marginal error at which a peer counts as finished, as for our solver.
TOLERANCE = 1e-6
MOST_ITERATIONS = 5000


def pot_plan(C: Tensor, reg: float, n_iters: int = 20000, stop: float = 1e-12) -> Tensor:
    """POT's plan [n, m] in the log domain in float64, which the accuracy of other plans is measured against."""
    n, m = C.shape
    a, b = np.full(n, 1 / n), np.full(m, 1 / m)
    return torch.from_numpy(ot.sinkhorn(a, b, C.double().numpy(), reg, "sinkhorn_log", n_iters, stop))


def total_variation(Q: Tensor, reference: Tensor) -> float:
    """Half the L1 distance of two plans: the share of the mass that lies elsewhere."""
    return float((Q - reference).abs().sum() / 2)


def pot_call(C: Tensor, reg: float, method: str, backend: str, n_iters: int) -> Any:
    """Exactly `n_iters` iterations of one of POT's methods, with its `numpy` or its `torch` backend."""
    n, m = C.shape
    a, b = torch.full((n,), 1 / n, dtype=C.dtype), torch.full((m,), 1 / m, dtype=C.dtype)
    arguments = [x.numpy() for x in (a, b, C)] if backend == "numpy" else [a, b, C]
    return ot.sinkhorn(*arguments, reg, method, n_iters, 0.0, log=True, warn=False)[1]


def pot_iterations(C: Tensor, reg: float) -> int:
    """The fewest iterations after which POT's L1 marginal error is at most TOLERANCE.

    POT's own test uses another norm, so that the same tolerance would mean another accuracy. Its iteration is done here
    in float64, in POT's order (columns first), until the error is small enough, or MOST_ITERATIONS times.
    """
    K = torch.exp(-C.double() / reg)
    n, m = K.shape
    u = torch.full((n,), 1 / n, dtype=torch.float64)
    for done in range(1, MOST_ITERATIONS):
        v = 1 / (m * (u @ K))
        u = 1 / (n * (K @ v))
        if float((v * (u @ K) - 1 / m).abs().sum()) <= TOLERANCE:
            return done
    return MOST_ITERATIONS
