"""What stage 1 costs for a pair of configs, without weights: problems, FLOPs, memory, disk, and time from a short
calibration of the real solver on this machine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from core.fusion.projections import SIDES
from core.models.activations import row_bytes
from core.models.checkpoints import Checkpoint, open_config
from core.models.families import FAMILIES, AttentionLayout
from core.runs.settings import Experiment
from core.transport.correlation import STANDARDIZE_BYTES, standardize
from core.transport.layer_pairs import entry_bytes, solve_layer
from core.transport.problem import PLAN_BLOCK_ROWS, SinkhornSettings
from core.transport.scaling import CACHED_BYTES

# Rows on which stage 1 measures the reconstruction of X.
PROBE_ROWS = 64
CALIBRATION_S = 2.0
# Larger problems are calibrated on a part of this many multiply-adds and scaled up: all their work grows with n m T.
CALIBRATED_OPERATIONS = 4e9
# Iterations of an ordinary problem at epsilon 0.1, and how they grow as epsilon falls (the demo pair's plans).
ITERATIONS, ITERATIONS_POWER = 10, 0.7
# A backbone's forward over the time of its matrix products alone, and the libraries' own memory.
FORWARD_OVERHEAD = 1.1
BASE_BYTES = 0.5e9


@dataclass(frozen=True)
class Model:
    """One side of the pair: its layout, and its parameters inside and outside the decoder layers."""

    name: str
    layout: AttentionLayout
    layer_parameters: int
    other_parameters: int
    weight_bytes: int  # per parameter


@dataclass(frozen=True)
class SideCost:
    """Cost of all feature plans of one side. `flops` counts the products of C and of the iterations."""

    side: str
    n: int
    m: int
    problems: int
    flops: float
    seconds: float | None  # None where the time was not estimated


@dataclass(frozen=True)
class Cost:
    """What stage 1 takes. Bytes and seconds; memory is that of the host, or of the device where there is one."""

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
        """All sides together."""
        return _sum([side.seconds for side in self.sides])

    @property
    def seconds(self) -> float | None:
        """Plans and reading together; None where the time was not estimated."""
        return _sum([self.reading_seconds, self.plan_seconds])


def _sum(seconds: list[float | None]) -> float | None:
    known = [value for value in seconds if value is not None]
    return sum(known) if len(known) == len(seconds) else None


def read_model(name: str, revision: str | None, dtype: str, device: str) -> Model:
    """A model as its config describes it. Raises UserError as `open_config`."""
    import transformers

    config, layout = open_config(name, revision)
    family = layout.family
    if family.needs_code:  # its classes are not there: the text decoder is what counts
        config, family = config["text_config"], FAMILIES[config["text_config"]["model_type"]]
    rest = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device("meta"):
        loader = getattr(transformers, family.auto)
        model = loader.from_config(transformers.AutoConfig.for_model(config["model_type"], **rest))
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    return _model(name, layout, sizes, family.tower, dtype, device)


def opened_model(checkpoint: Checkpoint, dtype: str) -> Model:
    """The same from the headers of an opened checkpoint."""
    sizes = {name: math.prod(shape) for name, (shape, _) in checkpoint.headers.items()}
    return _model(checkpoint.name, checkpoint.layout, sizes, checkpoint.tower, dtype, checkpoint.device)


def _model(name: str, layout: AttentionLayout, sizes: dict[str, int], tower: str, dtype: str, device: str) -> Model:
    in_layers = sum(size for name, size in sizes.items() if name.startswith(tower + ".layers."))
    wide = dtype == "float32" or (dtype == "auto" and device == "cpu")
    return Model(name, layout, in_layers, sum(sizes.values()) - in_layers, 4 if wide else 2)


def estimate(experiment: Experiment, timed: bool = True) -> str:
    """Cost of stage 1 in words; `timed` as in `stage1_cost`. Raises UserError as `open_config`."""
    e = experiment
    target = read_model(e.models.target_model, e.models.target_revision, e.compute.dtype, e.compute.device)
    source = read_model(e.models.source_model, e.models.source_revision, e.compute.dtype, e.compute.device)
    lines = [
        f"{role} {model.name}: {model.layout.model_type}, {model.layout.n_layers} layers, "
        f"{(model.layer_parameters + model.other_parameters) / 1e9:.2f} billion parameters"
        for role, model in (("target", target), ("source", source))
    ]
    return "\n".join([*lines, table(stage1_cost(target, source, e, timed))])


def stage1_cost(target: Model, source: Model, experiment: Experiment, timed: bool = True) -> Cost:
    """Estimate stage 1, with texts as long and as many as the settings allow; `timed` calibrates on this machine."""
    e, token = experiment, experiment.reading.pooling == "token"
    texts = e.reading.calibration_samples
    T = min(e.reading.max_rows, texts * e.reading.max_tokens) if token else texts
    iterations = e.transport.sinkhorn_iters
    if e.transport.sinkhorn_mode != "paper":
        usual = round(ITERATIONS * max(1.0, 0.1 / e.epsilon) ** ITERATIONS_POWER)
        iterations = min(iterations, usual)
    L, M = target.layout.n_layers, source.layout.n_layers
    sizes = {side: (target.layout.size(side), source.layout.size(side)) for side in SIDES}
    shapes = set(sizes.values())
    budget = CALIBRATION_S / len(shapes)
    seconds = {shape: _side_seconds(*shape, T, L, M, iterations, e, budget) for shape in shapes} if timed else {}
    sides = []
    for side, (n, m) in sizes.items():
        flops = L * M * (2.0 * n * m * T + 4.0 * n * m * iterations)
        sides.append(SideCost(side, n, m, L * M, flops, seconds.get((n, m))))

    pair = (target, source)  # two models also where both are the same one
    passes = [2.0 * model.layer_parameters * texts * e.reading.max_tokens for model in pair]
    spent = None
    if timed:
        speeds = (
            _seconds_per_flop(e.compute.tokens_per_batch, model.layout.hidden, e.compute.device) for model in pair
        )
        spent = FORWARD_OVERHEAD * sum(one * speed for one, speed in zip(passes, speeds, strict=True))
    rows = [row_bytes(model.layout, T) for model in pair]
    reading = max(
        (model.layer_parameters + model.other_parameters) * model.weight_bytes
        + (size if size <= e.reading.activations_budget_mb * 2**20 else 0)
        for model, size in zip(pair, rows, strict=True)
    )
    plans = max(plans_memory(n, m, T, M, e) for n, m in sizes.values())
    potentials = sum(8.0 * L * M * (n + m) for n, m in sizes.values())
    disk = sum(rows) / (2 if token else 1) + potentials
    return Cost(T, texts, iterations, sides, sum(passes), spent, BASE_BYTES + max(reading, plans), disk)


def plans_memory(n: int, m: int, T: int, M: int, experiment: Experiment) -> float:
    """Peak memory of solving one side, in bytes.

    Three things are in memory at the same time: the rows of all source layers, where `pairs_budget_mb` holds them; what
    the pair of layers in work needs (on an accelerator as many pairs as fit in the rest of the budget); and the
    potentials and probes that are kept of the M results.

    Args:
        n, m: neurons of the target and of the source.
        T, M: rows per layer, and source layers.
    """
    budget, rows = experiment.transport.pairs_budget_mb * 2**20, 4 * M * T * m
    kept = rows if rows <= budget else 0
    target, one = 8.0 * T * n, 8.0 * T * m  # two copies of each layer: standardised and scaled, stored and standardised
    results = 8.0 * M * (n + m) + 4.0 * PROBE_ROWS * n * M
    matrix = entry_bytes(n, m, experiment.epsilon) * n * m
    if experiment.compute.device != "cpu":
        pairs = max(1, min(M, (budget - kept) // (matrix + 4 * T * m)))
        return kept + target + pairs * (matrix + 4.0 * T * m) + one + results
    if 4 * n * m <= CACHED_BYTES:
        matrix += 4 * n * m  # K has a buffer of its own
    # Two source layers, because the allocator does not always re-use the memory of a freed one; and two float64 blocks
    # of the standardisation.
    solving = 2 * one + matrix + 2 * min(STANDARDIZE_BYTES, one)
    measuring = 4.0 * T * m + max(8.0 * PROBE_ROWS * n * M, 28.0 * min(n, PLAN_BLOCK_ROWS) * m)
    return kept + target + results + max(solving, measuring)


def _side_seconds(
    n: int, m: int, T: int, L: int, M: int, iterations: int, experiment: Experiment, budget: float
) -> float:
    """Seconds of one side: L M problems, standardising the rows, and what the summary measures."""
    part = max(1.0, 2.0 * n * m * T / CALIBRATED_OPERATIONS) ** 0.5
    X, Y = (torch.randn(T, max(1, int(size / part)), device=experiment.compute.device) for size in (n, m))
    probe = torch.arange(min(T, PROBE_ROWS))
    zx, zy = standardize(X), standardize(Y)
    result = next(solve_layer(zx, [zy], SinkhornSettings(experiment.epsilon, 2, mode="paper"), probe))

    def solve(sweeps: int) -> Callable[[], Any]:
        settings = SinkhornSettings(experiment.epsilon, sweeps, mode="paper")
        return lambda: [list(solve_layer(zx, [zy] * 2, settings, probe))]

    work = {
        "few": solve(2),
        "many": solve(12),
        "standardize": lambda: standardize(Y),
        "top": lambda: result.top_mass(max(zx.shape[1], zy.shape[1])),
    }
    spent = {name: _seconds(function, budget / 4) for name, function in work.items()}
    sweep = max(0.0, spent["many"] - spent["few"]) / 20
    problem = spent["few"] / 2 + max(0, iterations - 2) * sweep
    scale = (n * m) / (zx.shape[1] * zy.shape[1])
    kept = experiment.transport.pairs_budget_mb * 2**20 >= 4 * M * T * m
    layers = L + (M if kept else L * M)
    return scale * (L * M * problem + L * spent["top"]) + part * layers * spent["standardize"]


def _seconds(function: Callable[[], Any], budget: float) -> float:
    """Least seconds of a call (what disturbs only adds), after one that warms up, within the budget; at least one."""
    function()
    times: list[float] = []
    while not times or (sum(times) + times[-1] < budget and len(times) < 15):
        start = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def _seconds_per_flop(tokens: int, hidden: int, device: str) -> float:
    """Of a matrix product as the projections do it."""
    tokens, hidden = min(tokens, 2048), min(hidden, 2048)
    A, B = torch.randn(tokens, hidden, device=device), torch.randn(hidden, hidden, device=device)
    return _seconds(lambda: A @ B, 0.2) / (2.0 * tokens * hidden * hidden)


def table(cost: Cost) -> str:
    """The estimate for reading; the column of times is left out where they were not estimated."""

    def line(name: str, size: str, problems: str, flops: float, seconds: float | None) -> str:
        time = "" if seconds is None else f"{_duration(seconds):>12}"
        return f"{name:8}{size:>13}{problems:>10}{flops / 1e12:12.2f}{time}"

    sides = [line(s.side, f"{s.n} x {s.m}", str(s.problems), s.flops, s.seconds) for s in cost.sides]
    problems, flops = sum(s.problems for s in cost.sides), sum(s.flops for s in cost.sides)
    if cost.seconds is None:
        time = "the time was not estimated; --plan-only does it"
    else:
        time = f"about {_duration(cost.seconds)} on this machine"
    return "\n".join(
        [
            f"at most {cost.texts} texts and {cost.rows} rows per layer and side; about {cost.iterations} Sinkhorn "
            f"iterations per problem",
            "side            n x m  problems       TFLOP" + ("" if cost.seconds is None else "        time"),
            *sides,
            line("plans", "", str(problems), flops, cost.plan_seconds),
            line("reading", "", "", cost.reading_flops, cost.reading_seconds),
            f"peak memory {cost.memory / 2**30:.1f} GiB, on disk {cost.disk / 2**30:.2f} GiB; {time}",
        ]
    )


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
