"""What stage 1 costs for a pair of models: floating-point operations, memory, disk space and, if asked for, time."""

from __future__ import annotations

from dataclasses import dataclass

from core.fusion.projections import planned_sides, recorded_sides, source_sides
from core.models.activations import row_bytes
from core.runs.cost_timing import CALIBRATION_S, Workload, side_seconds, token_seconds
from core.runs.model_size import ModelSize
from core.runs.plan_solver import PROBE_ROWS
from core.runs.settings import Experiment
from core.transport.correlation import STANDARDIZE_BYTES
from core.transport.layer_pairs import entry_bytes
from core.transport.problem import PLAN_BLOCK_ROWS
from core.transport.scaling import CACHED_BYTES

# At epsilon 0.1 a plan of the demo pair usually converges within so many iterations. For a smaller epsilon the number
# grows as (0.1 / epsilon) to this power.
ITERATIONS, ITERATIONS_POWER = 10, 0.7
# Memory of Python and of the libraries themselves.
BASE_BYTES = 0.5e9
MIB = 2**20


@dataclass(frozen=True)
class SideCost:
    """The cost of all feature plans of one side.

    Attributes:
        side: name of the side.
        n, m: neurons of the target and of the source.
        problems: number of plans, one for each pair of a target layer and a source layer.
        flops: floating-point operations of computing the costs C and of the Sinkhorn iterations.
        seconds: None where the time was not estimated.
    """

    side: str
    n: int
    m: int
    problems: int
    flops: float
    seconds: float | None


@dataclass(frozen=True)
class Cost:
    """The cost of stage 1.

    Attributes:
        rows: rows of activations per layer and side.
        texts: calibration texts that each model reads.
        iterations: Sinkhorn iterations of a usual plan.
        sides: the plans, side by side.
        reading_flops: floating-point operations of both models while they read; with token pooling the target reads
            twice.
        reading_seconds: None where the time was not estimated.
        memory: peak bytes, on the device if there is one and otherwise on the host.
        disk: bytes of the plan directory.
    """

    rows: int
    texts: int
    iterations: int
    sides: list[SideCost]
    reading_flops: float
    reading_seconds: float | None
    memory: float
    disk: float

    @property
    def plan_seconds(self) -> float | None:
        """Time of the plans of all sides; None where it was not estimated."""
        return _sum([side.seconds for side in self.sides])

    @property
    def seconds(self) -> float | None:
        """Time of reading and of the plans; None where it was not estimated."""
        return _sum([self.reading_seconds, self.plan_seconds])


def _sum(seconds: list[float | None]) -> float | None:
    known = [value for value in seconds if value is not None]
    return sum(known) if len(known) == len(seconds) else None


def stage1_cost(target: ModelSize, source: ModelSize, experiment: Experiment, timed: bool = True) -> Cost:
    """Estimate the cost of stage 1, as if there were as many texts as the settings allow and all of them were cut.

    Args:
        timed: estimate the time, too, by running parts of the work on this machine for a few seconds.
    """
    reading, pair = experiment.reading, (target, source)
    texts, tokens = reading.calibration_samples, reading.calibration_samples * reading.max_tokens
    rows = min(reading.max_rows, tokens) if reading.pooling == "token" else texts
    work = Workload(rows, target.layout.n_layers, source.layout.n_layers, usual_iterations(experiment))
    sides = _side_costs(target, source, work, experiment, timed)
    # The target reads a second time where it may have positions without a partner.
    alone = min(reading.max_rows, tokens - rows) if reading.pooling == "token" else 0
    readers = (*pair, target) if alone else pair
    passes = [2.0 * model.layer_parameters * tokens for model in readers]
    seconds = sum(token_seconds(model, experiment.compute) * tokens for model in readers) if timed else None
    whole = recorded_sides(experiment.fusion.fused)
    of_source = source_sides(experiment.fusion.fused, experiment.models.source_base is not None)
    recorded = ((target, rows, whole), (source, rows, of_source), (target, alone, whole))
    written = [row_bytes(model.layout, count, sides) for model, count, sides in recorded]
    potentials = sum(8.0 * side.problems * (side.n + side.m) for side in sides)
    return Cost(
        rows=rows,
        texts=texts,
        iterations=work.iterations,
        sides=sides,
        reading_flops=sum(passes),
        reading_seconds=seconds,
        memory=BASE_BYTES
        + max(
            *(_reading_memory(model, size, experiment) for (model, *_), size in zip(recorded, written, strict=True)),
            *(plans_memory(side.n, side.m, rows, work.source_layers, experiment) for side in sides),
        ),
        # Rows of token pooling are stored in half precision.
        disk=sum(written) / (2 if reading.pooling == "token" else 1) + potentials,
    )


def usual_iterations(experiment: Experiment) -> int:
    """Sinkhorn iterations of a usual plan; in paper mode every plan takes exactly as many as the settings say."""
    limit = experiment.transport.sinkhorn_iters
    if experiment.transport.sinkhorn_mode == "paper":
        return limit
    return min(limit, round(ITERATIONS * max(1.0, 0.1 / experiment.epsilon) ** ITERATIONS_POWER))


def _side_costs(
    target: ModelSize, source: ModelSize, work: Workload, experiment: Experiment, timed: bool
) -> list[SideCost]:
    """The cost of the plans of each side. Sides of one shape take the same time, so each shape is timed once."""
    shapes = {
        side: (target.layout.size(side), source.layout.size(side)) for side in planned_sides(experiment.fusion.fused)
    }
    seconds: dict[tuple[int, int], float] = {}
    if timed:
        distinct = set(shapes.values())
        budget = CALIBRATION_S / len(distinct)
        seconds = {shape: side_seconds(*shape, work, experiment, budget) for shape in distinct}
    costs = []
    for side, (n, m) in shapes.items():
        # The matrix product of C, and two matrix-vector products per iteration.
        flops = work.pairs * (2.0 * n * m * work.rows + 4.0 * n * m * work.iterations)
        costs.append(SideCost(side, n, m, work.pairs, flops, seconds.get((n, m))))
    return costs


def _reading_memory(model: ModelSize, size: float, experiment: Experiment) -> float:
    """Bytes of a model while it reads: its weights, and its rows of `size` bytes unless they are kept on disk."""
    in_memory = size <= experiment.reading.activations_budget_mb * MIB
    return model.parameters * model.parameter_bytes + (size if in_memory else 0)


def plans_memory(n: int, m: int, rows: int, source_layers: int, experiment: Experiment) -> float:
    """Peak memory of solving one side, in bytes.

    Three things are in memory at the same time: the rows of all source layers, if they are within `pairs_budget_mb`;
    what the current pair of layers needs, or on an accelerator as many pairs as fit into the rest of the budget; and
    the potentials and probes of the results of one target layer.

    Args:
        n, m: neurons of the target and of the source.
        rows: rows per layer.
        source_layers: source layers, each of which gives one result.
    """
    budget, all_source_rows = experiment.transport.pairs_budget_mb * MIB, 4 * source_layers * rows * m
    cached = all_source_rows if all_source_rows <= budget else 0
    # A layer is in memory twice: the target's standardised and scaled, a source's as stored and standardised.
    target_rows, source_rows = 8.0 * rows * n, 8.0 * rows * m
    results = 8.0 * source_layers * (n + m) + 4.0 * PROBE_ROWS * n * source_layers
    matrix = entry_bytes(n, m, experiment.epsilon) * n * m
    if experiment.compute.device != "cpu":
        together = max(1, min(source_layers, (budget - cached) // (matrix + 4 * rows * m)))
        return cached + target_rows + together * (matrix + 4.0 * rows * m) + source_rows + results
    if 4 * n * m <= CACHED_BYTES:
        matrix += 4 * n * m  # a small kernel K has a buffer of its own
    # Two source layers are counted, because the allocator does not always use the memory of a freed layer again.
    # Standardising takes two blocks of float64.
    solving = 2 * source_rows + matrix + 2 * min(STANDARDIZE_BYTES, source_rows)
    measuring = 4.0 * rows * m + max(
        8.0 * PROBE_ROWS * n * source_layers,  # the probed results in float64
        28.0 * min(n, PLAN_BLOCK_ROWS) * m,  # blocks of a plan whose largest entries are summed
    )
    return cached + target_rows + results + max(solving, measuring)
