"""Sinkhorn's iteration for many problems of one shape together, as accelerators need it.

A single problem of a few hundred neurons would leave an accelerator idle, and so would a host that waits for a result
after every sweep. Here one batched product serves all problems, and the host reads the device only every tenth sweep.
Each problem has an exponent of over-relaxation and a stop of its own: it leaves the batch when it is finished.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from core.transport.problem import Exponent, Scaled, SinkhornSettings
from core.transport.relaxation import Relaxation

# Sweeps from one reading of the errors to the next; each reading makes the host wait for the device.
CHECK_EVERY = 10


@dataclass
class Slot:
    """One problem that is still in the batch: its number, its relaxation, and the exponent w of its last sweep."""

    problem: int
    relaxation: Relaxation
    w: float = 1.0


@dataclass(frozen=True)
class Sweep:
    """What one sweep started from, and the products that it made of it.

    Attributes:
        u, v: scalings [B, n] and [B, m] before the sweep.
        Kv, KTu: K v [B, n] with that v, and K^T u [B, m] with the new u.
        exact_columns: per slot, whether the sweep before was plain, so that only the rows of the plan have an error.
    """

    u: Tensor
    v: Tensor
    Kv: Tensor
    KTu: Tensor
    exact_columns: list[bool]


class KernelBatch:
    """The kernels K [B, n, m] of the problems that are not finished, their scalings, and what was found for the rest.

    The problems in work are always the first ones in memory, so that a sweep is one product over a prefix of K.
    """

    def __init__(self, matrices: Tensor, exponent: Exponent, settings: SinkhornSettings, probes: Tensor | None = None):
        """Compute K and do the first sweep, which is plain and starts from v = 1.

        Args:
            matrices: [B, n, m]; K is written over them unless it needs a wider float type.
            exponent, settings: shared by all problems.
            probes: [B, m, r], each multiplied by the plan of its problem.
        """
        self.exponent, self.settings = exponent, settings
        self.K = matrices.to(getattr(torch, exponent.dtype))
        self.K.mul_(exponent.factor).add_(exponent.offset).exp_()
        self.probes = None if probes is None else probes.to(self.K.dtype)
        count, n, m = self.K.shape
        self.a, self.b = 1.0 / n, 1.0 / m
        self.u = self.a / self.K.sum(2)
        self.v = self.b / _rows_times(self.u, self.K)
        self.slots = [Slot(problem, Relaxation(settings)) for problem in range(count)]
        self.w = torch.ones(count, 1, dtype=self.K.dtype, device=self.K.device)
        self.found: dict[int, Scaled] = {}
        self.log_costs: dict[int, Tensor] = {}

    def sweep(self, sweeps: int) -> Sweep:
        """Do the sweep that follows `sweeps` sweeps: u <- u^(1-w) (a / Kv)^w, v <- v^(1-w) (b / K^T u)^w."""
        weights = [slot.relaxation.after(sweeps) for slot in self.slots]
        if weights != [slot.w for slot in self.slots]:
            self.w = _to_device([[w] for w in weights], self.K)
        K, u, v = self.K[: len(self.slots)], self.u, self.v
        Kv = torch.bmm(K, v.unsqueeze(2)).squeeze(2)  # [B, n, m] @ [B, m, 1] -> [B, n]
        self.u = _relaxed(u, self.a / Kv, self.w, weights)
        KTu = _rows_times(self.u, K)
        self.v = _relaxed(v, self.b / KTu, self.w, weights)
        exact_columns = [slot.w == 1 for slot in self.slots]
        for slot, w in zip(self.slots, weights, strict=True):
            slot.w = w
        return Sweep(u, v, Kv, KTu, exact_columns)

    def check(self, swept: Sweep, sweeps: int) -> None:
        """Read the errors of the plans before a sweep, read out the finished ones, and let the others relax."""
        last = sweeps == self.settings.n_iters
        errors = self._errors(swept)
        finished = {
            number
            for number, (error, exact) in enumerate(zip(errors, swept.exact_columns, strict=True))
            if last or (exact and self.settings.stops_at(error))
        }
        for number, slot in enumerate(self.slots):
            if number in finished:
                self._read_out(number, swept.u[number], swept.v[number], sweeps, errors[number])
            else:
                slot.relaxation.observe(sweeps, errors[number])
        if finished:
            self._close_gaps(finished)

    def results(self) -> list[Scaled]:
        """What was found for every problem, in the order of the matrices. The costs are read all at once."""
        costs = torch.stack([self.log_costs[problem] for problem in range(len(self.found))]).tolist()
        return [
            replace(self.found[problem], cost=self.exponent.cost_from_log_kernel(cost))
            for problem, cost in enumerate(costs)
        ]

    def _errors(self, swept: Sweep) -> list[float]:
        """The larger L1 marginal error of every plan, as far as it has two."""
        rows = (swept.u * swept.Kv - self.a).abs().sum(1)
        columns = (swept.v * swept.KTu - self.b).abs().sum(1)
        pairs = zip(torch.stack([rows, columns], 1).tolist(), swept.exact_columns, strict=True)
        return [row if exact else max(row, column) for (row, column), exact in pairs]

    def _read_out(self, number: int, u: Tensor, v: Tensor, sweeps: int, error: float) -> None:
        """Keep what was found for a finished problem; its K is lost, and its cost stays on the device for now."""
        K, problem = self.K[number], self.slots[number].problem
        probed = None if self.probes is None else u[:, None] * (K @ (v[:, None] * self.probes[problem]))
        self.log_costs[problem] = u @ (torch.xlogy(K, K, out=K) @ v)
        f, g = self.exponent.potentials(u.double().log(), v.double().log())
        self.found[problem] = Scaled(f, g, sweeps, error, float("nan"), probed)

    def _close_gaps(self, finished: set[int]) -> None:
        """Move the last problems to where finished ones were, so that as few kernels as possible are copied."""
        stay = len(self.slots) - len(finished)
        movers = iter(number for number in range(stay, len(self.slots)) if number not in finished)
        order = [next(movers) if number in finished else number for number in range(stay)]
        for number, moved in enumerate(order):
            if number != moved:
                self.K[number].copy_(self.K[moved])
        self.slots = [self.slots[number] for number in order]
        self.u, self.v, self.w = (x[order] for x in (self.u, self.v, self.w))


def scale_batch(batch: KernelBatch) -> list[Scaled]:
    """Sinkhorn's iteration on all kernels of a batch (Eqs. 8, 9, 24-26), until every problem is finished."""
    sweeps = 1
    while batch.slots:
        swept = batch.sweep(sweeps)
        if sweeps == batch.settings.n_iters or sweeps % CHECK_EVERY == 0:
            batch.check(swept, sweeps)
        sweeps += 1
    return batch.results()


def _rows_times(u: Tensor, K: Tensor) -> Tensor:
    """u^T K of every problem."""
    return torch.bmm(u.unsqueeze(1), K).squeeze(1)  # [B, 1, n] @ [B, n, m] -> [B, m]


def _relaxed(before: Tensor, ratio: Tensor, w: Tensor, weights: list[float]) -> Tensor:
    """before^(1-w) ratio^w [B, n] with w [B, 1]; the host knows its values as `weights` without asking the device."""
    if all(weight == 1 for weight in weights):
        return ratio
    return torch.where(w == 1, ratio, before * (ratio / before) ** w)


def _to_device(values: list[list[float]], like: Tensor) -> Tensor:
    """A small tensor of the type and on the device of another one, sent without waiting for the device."""
    tensor = torch.tensor(values, dtype=like.dtype)
    if like.device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(like.device, non_blocking=True)
