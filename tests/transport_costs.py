"""Costs that the solver is tested on, and what its results are compared with."""

from __future__ import annotations

import torch

from core.hot_transport import corr_distance_matrix
from core.transport import sinkhorn
from core.transport.problem import AffineCost, SinkhornSettings
from core.transport.sinkhorn import SinkhornResult


def random_cost(n: int, m: int, seed: int) -> torch.Tensor:
    """A cost [n, m] without structure, uniform in [0, 2]."""
    return torch.rand(n, m, generator=torch.Generator().manual_seed(seed)) * 2


def correlated(n: int, m: int, seed: int, noise: float = 0.3, factors: int = 6) -> torch.Tensor:
    """The cost [n, m] of neurons that read the same few factors; the less noise, the more iterations it needs."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(80, factors, generator=generator)
    X, Y = (
        shared @ torch.randn(factors, k, generator=generator) + noise * torch.randn(80, k, generator=generator)
        for k in (n, m)
    )
    return corr_distance_matrix(X, Y)


def plain(C: torch.Tensor, reg: float, tol: float, n_iters: int) -> tuple[int, torch.Tensor]:
    """Textbook Sinkhorn in float64: (iterations until the L1 row error is at most tol, plan)."""
    K = torch.exp(-C.double() / reg)
    n, m = K.shape
    v = torch.ones(m, dtype=torch.float64)
    done = 0
    while done < n_iters:
        u = 1 / (n * (K @ v))
        v = 1 / (m * (u @ K))
        done += 1
        if float((u * (K @ v) - 1 / n).abs().sum()) <= tol:
            break
    return done, u[:, None] * K * v


def errors(result: SinkhornResult, C: torch.Tensor) -> float:
    """Larger L1 marginal error, recomputed in float64 from the potentials."""
    Q = torch.exp((result.f[:, None] + result.g - C.double()) / result.reg)
    n, m = Q.shape
    return max(float((Q.sum(1) - 1 / n).abs().sum()), float((Q.sum(0) - 1 / m).abs().sum()))


def batch(costs: list[torch.Tensor], reg: float, n_iters: int = 20000, mode: str = "auto") -> list[SinkhornResult]:
    """Solve the costs together, as an accelerator does, but on the CPU."""
    rows = [C.__getitem__ for C in costs]
    settings = SinkhornSettings(reg, n_iters, mode=mode)
    return sinkhorn.solve_batch(torch.stack(costs), AffineCost(0.0, 2.0), settings, rows)
