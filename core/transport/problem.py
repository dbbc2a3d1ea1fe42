"""What the solver is given and what its iterations hand back: settings, cost, the exponent of K, and scalings.

Entropic transport with uniform marginals (Eqs. 8, 9, 24-26) has the plan Q = diag(u) K diag(v) with the kernel
K = exp(-C / reg). Everything that the three iterations (one problem on a CPU, a batch on an accelerator, the log
domain) have in common stands here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import numpy as np
from torch import Tensor

# Rows of the cost or of the plan that are made at once wherever the whole matrix is not kept in memory.
PLAN_BLOCK_ROWS = 512
# The entries of K and the scalings u and v stay inside a float's range while the spread of the cost over reg, plus
# ln(max(n, m)), is below these.
EXP_RANGE = {"float32": 80.0, "float64": 600.0}
MODES = ("auto", "paper")
# Which rows of a matrix are meant: a range of them, or their numbers.
Rows: TypeAlias = slice | Tensor
Vector = TypeVar("Vector", np.ndarray, Tensor)


@dataclass(frozen=True)
class SinkhornSettings:
    """How an entropic transport problem is regularised and when its iteration stops.

    Attributes:
        reg: entropic regularisation epsilon > 0, in units of the cost.
        n_iters: the largest number of iterations; in `paper` mode the exact number.
        tol: bound on the larger of the two L1 marginal errors, sum |Q1 - 1/n| and sum |Q^T 1 - 1/m|.
        mode: `auto` over-relaxes where that saves iterations and stops at `tol`; `paper` does exactly `n_iters` plain
            iterations.
    Raises:
        ValueError: reg is not a positive number, n_iters < 1, or an unknown mode.
    """

    reg: float
    n_iters: int = 1000
    tol: float = 1e-6
    mode: str = "auto"

    def __post_init__(self) -> None:
        if not 0 < self.reg < math.inf:
            raise ValueError(f"reg must be positive, got {self.reg}")
        if self.n_iters < 1:
            raise ValueError(f"n_iters must be at least 1, got {self.n_iters}")
        if self.mode not in MODES:
            raise ValueError(f"mode {self.mode!r}; expected one of {', '.join(MODES)}")

    @property
    def paper(self) -> bool:
        """Whether the iteration is the paper's, of a fixed length."""
        return self.mode == "paper"

    def stops_at(self, error: float) -> bool:
        """Whether an iteration with this L1 marginal error is finished before its last sweep."""
        return not self.paper and error <= self.tol


@dataclass(frozen=True)
class AffineCost:
    """How a cost C is made from a matrix: C = origin + slope * matrix, and low <= C <= high everywhere.

    Stage 1 has the correlations R of two layers in memory, and their cost is C = 1 - R (Eq. 7). K = exp(-C / reg) is
    an exponential of R just as well, so the solver takes R as it is, which saves the pass over memory that makes C.
    """

    low: float
    high: float
    origin: float = 0.0
    slope: float = 1.0


@dataclass(frozen=True)
class Exponent:
    """K = exp(factor * matrix + offset), which is exp(-(C - shift) / reg), in a float type that can hold it.

    Subtracting a constant from the cost changes the potentials by that constant and the plan not at all.

    Attributes:
        cost: how C is made from the matrix.
        dtype: `float32` or `float64`.
        shift: what is subtracted from the cost, so that K neither overflows nor underflows.
        scale: -1 / reg as rounded by `dtype`. The potentials and the cost are read out with the same number, so that
            they belong to the problem that was really solved.
    """

    cost: AffineCost
    dtype: str
    shift: float
    scale: float

    @classmethod
    def choose(cls, cost: AffineCost, reg: float, shape: Sequence[int], itemsize: int) -> Exponent | None:
        """The narrowest float type in whose range K and its scalings stay, or None where no type is wide enough.

        The cost where the matrix is 0 is preferred as the shift, because the offset is 0 then and K takes one pass
        over memory less; the lowest cost is the shift where that one does not fit the range.

        Args:
            reg: epsilon, in units of the cost.
            shape: (n, m) of the matrix.
            itemsize: bytes per entry of the matrix; a float64 matrix (8) is never solved in float32.
        """
        for dtype in ("float64",) if itemsize == 8 else ("float32", "float64"):
            if fits_range(dtype, cost.high - cost.low, reg, shape):
                farthest = max(abs(cost.low - cost.origin), abs(cost.high - cost.origin))
                shift = cost.origin if fits_range(dtype, farthest, reg, shape) else cost.low
                return cls(cost, dtype, shift, float(np.dtype(dtype).type(-1.0 / reg)))
        return None

    @property
    def factor(self) -> float:
        """What the matrix is multiplied by in the exponent of K."""
        return self.cost.slope * self.scale

    @property
    def offset(self) -> float:
        """What is then added."""
        return (self.cost.origin - self.shift) * self.scale

    def potentials(self, log_u: Vector, log_v: Vector) -> tuple[Vector, Vector]:
        """Dual potentials (f [n], g [m]) in units of the cost, from the logarithms of the scalings in float64."""
        return log_u / -self.scale + self.shift, log_v / -self.scale

    def cost_from_log_kernel(self, mean: float) -> float:
        """<C, Q> from sum Q log K, for a plan of mass 1."""
        return self.shift + mean / self.scale

    def cost_from_matrix(self, mean: float) -> float:
        """<C, Q> from sum Q matrix, for a plan of mass 1."""
        return self.cost.origin + self.cost.slope * mean


def fits_range(dtype: str, spread: float, reg: float, shape: Sequence[int]) -> bool:
    """Whether exp(-C / reg) and its scalings stay in the range of a float type, for costs that differ by `spread`."""
    return spread / reg + math.log(max(shape)) < EXP_RANGE[dtype]


@dataclass(frozen=True)
class Scaled:
    """What an iteration found.

    Attributes:
        f, g: dual potentials [n] and [m] in units of the cost, float64.
        n_iters: iterations done.
        error: the larger L1 marginal error of the plan.
        cost: transport cost <C, Q>.
        probed: Q @ probe [n, r], or None where there was no probe.
    """

    f: Tensor
    g: Tensor
    n_iters: int
    error: float
    cost: float
    probed: Tensor | None
