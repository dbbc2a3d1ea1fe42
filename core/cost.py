"""What stage 1 costs for a pair of configs, without weights: problems, FLOPs, memory, disk, and time from a short
calibration of the real solver on this machine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from core.activations import row_bytes
from core.attention import FAMILIES, SIDES, AttentionLayout
from core.checkpoints import Checkpoint, open_config
from core.experiment import Experiment
from core.hot_transport import solve_layer, standardize

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
    seconds: float  # 0 where time was not asked for


@dataclass(frozen=True)
class Cost:
    """What stage 1 takes. Bytes and seconds; memory is that of the host, or of the device where there is one."""

    rows: int
    iterations: int
    sides: list[SideCost]
    reading_flops: float
    reading_seconds: float
    memory: float
    disk: float

    @property
    def seconds(self) -> float:
        """Plans and reading together."""
        return self.reading_seconds + sum(side.seconds for side in self.sides)


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
    """Cost of stage 1 as a table; `timed` as in `stage1_cost`. Raises UserError as `open_config`."""
    e = experiment
    target = read_model(e.target_model, e.target_revision, e.dtype, e.device)
    source = read_model(e.source_model, e.source_revision, e.dtype, e.device)
    return table(stage1_cost(target, source, e, timed), target, source)


def stage1_cost(target: Model, source: Model, experiment: Experiment, timed: bool = True) -> Cost:
    """Estimate stage 1, with texts as long and as many as the settings allow; `timed` calibrates on this machine."""
    token = experiment.pooling == "token"
    texts = experiment.calibration_samples
    T = min(experiment.max_rows, texts * experiment.max_tokens) if token else texts
    iterations = (experiment.sinkhorn_iters if experiment.sinkhorn_mode == "paper"
                  else round(ITERATIONS * max(1.0, 0.1 / experiment.regularisation) ** ITERATIONS_POWER))  # fmt: skip
    L, M = target.layout.n_layers, source.layout.n_layers
    sizes = {side: (target.layout.size(side), source.layout.size(side)) for side in SIDES}
    shapes = set(sizes.values())
    budget = CALIBRATION_S / len(shapes)
    seconds = {shape: _side_seconds(*shape, T, L, M, iterations, experiment, budget) if timed else 0.0
               for shape in shapes}  # fmt: skip
    sides = [SideCost(side, n, m, L * M, L * M * (2.0 * n * m * T + 4.0 * n * m * iterations), seconds[n, m])
             for side, (n, m) in sizes.items()]  # fmt: skip

    reading_flops = reading_seconds = 0.0
    for model in (target, source):
        flops = 2.0 * model.layer_parameters * texts * experiment.max_tokens
        reading_flops += flops
        if timed:
            reading_seconds += FORWARD_OVERHEAD * flops * _seconds_per_flop(
                experiment.tokens_per_batch, model.layout.hidden, experiment.device)  # fmt: skip
    rows = {model: row_bytes(model.layout, T) for model in (target, source)}
    kept = {model: size if size <= experiment.activations_budget_mb * 2**20 else 0 for model, size in rows.items()}
    reading = max((m.layer_parameters + m.other_parameters) * m.weight_bytes + kept[m] for m in (target, source))
    plans = max(min(experiment.pairs_budget_mb * 2**20, 4.0 * M * T * m) + 12.0 * T * max(n, m) + 8.0 * n * m
                for n, m in sizes.values())  # fmt: skip
    potentials = sum(8.0 * L * M * (n + m) for n, m in sizes.values())
    return Cost(T, iterations, sides, reading_flops, reading_seconds, BASE_BYTES + max(reading, plans),
                sum(rows.values()) / (2 if token else 1) + potentials)  # fmt: skip


def _side_seconds(
    n: int, m: int, T: int, L: int, M: int, iterations: int, experiment: Experiment, budget: float
) -> float:
    """Seconds of one side: L M problems, standardising the rows, and what the summary measures."""
    part = max(1.0, 2.0 * n * m * T / CALIBRATED_OPERATIONS) ** 0.5
    X, Y = (torch.randn(T, max(1, int(size / part)), device=experiment.device) for size in (n, m))
    probe = torch.arange(min(T, 64))
    zx, zy = standardize(X), standardize(Y)
    result = next(solve_layer(zx, [zy], experiment.regularisation, 2, mode="paper", probe_rows=probe))

    def solve(sweeps: int) -> Callable[[], Any]:
        return lambda: [list(solve_layer(zx, [zy] * 2, experiment.regularisation, sweeps, mode="paper",
                                         probe_rows=probe))]  # fmt: skip

    work = {"few": solve(2), "many": solve(12), "standardize": lambda: standardize(Y),
            "top": lambda: result.top_mass(max(zx.shape[1], zy.shape[1]))}  # fmt: skip
    spent = {name: _seconds(function, budget / 4) for name, function in work.items()}
    sweep = max(0.0, spent["many"] - spent["few"]) / 20
    problem = spent["few"] / 2 + (iterations - 2) * sweep
    scale = (n * m) / (zx.shape[1] * zy.shape[1])
    kept = experiment.pairs_budget_mb * 2**20 >= 4 * M * T * m
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


def table(cost: Cost, target: Model, source: Model) -> str:
    """The estimate for reading."""
    lines = [f"{role} {model.name}: {model.layout.model_type}, {model.layout.n_layers} layers, "
             f"{(model.layer_parameters + model.other_parameters) / 1e9:.2f} billion parameters"
             for role, model in (("target", target), ("source", source))]  # fmt: skip
    lines += [f"{cost.rows} rows per layer and side; {cost.iterations} iterations per problem assumed",
              "side         n x m     problems     TFLOP       time"]  # fmt: skip
    for side in cost.sides:
        size = f"{side.n} x {side.m}"
        lines.append(f"{side.side:8}{size:>13}{side.problems:10}{side.flops / 1e12:12.2f}{_duration(side.seconds):>12}")
    lines += [
        f"{'plans':8}{'':13}{sum(s.problems for s in cost.sides):10}{sum(s.flops for s in cost.sides) / 1e12:12.2f}"
        f"{_duration(sum(s.seconds for s in cost.sides)):>12}",
        f"{'reading':8}{'':23}{cost.reading_flops / 1e12:12.2f}{_duration(cost.reading_seconds):>12}",
        f"peak memory {cost.memory / 2**30:.1f} GiB, on disk {cost.disk / 2**30:.2f} GiB, "
        f"time {_duration(cost.seconds)}",
    ]  # fmt: skip
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    if not seconds:
        return "not asked"
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
