"""How long parts of stage 1 take on this machine, measured by running them for a few seconds on random numbers."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from core.models.settings import ComputeSettings
from core.runs.model_size import ModelSize
from core.runs.plan_solver import PROBE_ROWS
from core.runs.settings import Experiment
from core.transport.correlation import standardize
from core.transport.layer_pairs import solve_layer
from core.transport.problem import SinkhornSettings

# Seconds for the measurements of all shapes together.
CALIBRATION_S = 2.0
# A problem of more multiply-adds is replaced by a smaller one, whose time is scaled up: all work grows with n m T.
CALIBRATED_OPERATIONS = 4e9
# A forward pass takes so many times as long as its matrix products alone.
FORWARD_OVERHEAD = 1.1


@dataclass(frozen=True)
class Workload:
    """How much stage 1 has to solve per side.

    Attributes:
        rows: rows of activations per layer, T.
        target_layers, source_layers: L and M.
        iterations: Sinkhorn iterations of a usual plan.
    """

    rows: int
    target_layers: int
    source_layers: int
    iterations: int

    @property
    def pairs(self) -> int:
        """Pairs of a target layer and a source layer, each of which has a plan."""
        return self.target_layers * self.source_layers


def time_budget(shapes: int) -> float:
    """Seconds for the measurements of one of so many shapes."""
    return CALIBRATION_S / shapes


def side_seconds(n: int, m: int, work: Workload, experiment: Experiment, budget: float) -> float:
    """Time of one side: all of its plans, standardising the rows, and what the summary measures on the plans.

    Args:
        n, m: neurons of the target and of the source.
        budget: seconds that the measurement may take.
    """
    shrink = max(1.0, 2.0 * n * m * work.rows / CALIBRATED_OPERATIONS) ** 0.5
    X, Y = (torch.randn(work.rows, max(1, int(size / shrink)), device=experiment.compute.device) for size in (n, m))
    probe = torch.arange(min(work.rows, PROBE_ROWS))
    zx, zy = standardize(X), standardize(Y)
    result = next(solve_layer(zx, [zy], SinkhornSettings(experiment.epsilon, 2, mode="paper"), probe))

    def solve_two(iterations: int) -> Callable[[], Any]:
        settings = SinkhornSettings(experiment.epsilon, iterations, mode="paper")
        return lambda: [list(solve_layer(zx, [zy] * 2, settings, probe))]

    measured = {
        "few": solve_two(2),
        "many": solve_two(12),
        "standardize": lambda: standardize(Y),
        "top_mass": lambda: result.top_mass(max(zx.shape[1], zy.shape[1])),
    }
    seconds = {name: _least_seconds(function, budget / 4) for name, function in measured.items()}
    # Each of the two plans has ten iterations more in one measurement than in the other.
    iteration = max(0.0, seconds["many"] - seconds["few"]) / 20
    plan = seconds["few"] / 2 + max(0, work.iterations - 2) * iteration
    scale = (n * m) / (zx.shape[1] * zy.shape[1])
    cached = experiment.transport.pairs_budget_mb * 2**20 >= 4 * work.source_layers * work.rows * m
    standardized = work.target_layers + (work.source_layers if cached else work.pairs)
    plans = work.pairs * plan + work.target_layers * seconds["top_mass"]
    return scale * plans + shrink * standardized * seconds["standardize"]


def token_seconds(model: ModelSize, compute: ComputeSettings) -> float:
    """Time of one token in a forward pass, from the speed of a matrix product of the size that a projection has."""
    tokens, hidden = min(compute.tokens_per_batch, 2048), min(model.layout.hidden, 2048)
    A = torch.randn(tokens, hidden, device=compute.device)
    B = torch.randn(hidden, hidden, device=compute.device)
    per_flop = _least_seconds(lambda: A @ B, 0.2) / (2.0 * tokens * hidden * hidden)
    return FORWARD_OVERHEAD * 2.0 * model.layer_parameters * per_flop


def _least_seconds(function: Callable[[], Any], budget: float) -> float:
    """The least time of a call, because other processes can only make a call slower.

    The function is called once to warm up, then at least once more, and as often as fits into `budget` seconds.
    """
    function()
    times: list[float] = []
    while not times or (sum(times) + times[-1] < budget and len(times) < 15):
        start = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)
