"""The estimated cost of stage 1 as text: a line per model, a table of the sides, and what it takes in all."""

from __future__ import annotations

from core.progress import duration
from core.runs.cost import Cost, stage1_cost
from core.runs.model_size import read_model_size
from core.runs.settings import Experiment


def estimate(experiment: Experiment, timed: bool = True) -> str:
    """The cost of stage 1 for an experiment, of whose models nothing but the configs has to exist on this machine.

    Args:
        timed: as in `stage1_cost`.
    Raises:
        UserError: as `read_model_size`.
    """
    models, compute = experiment.models, experiment.compute
    target = read_model_size(models.target_model, models.target_revision, compute)
    source = read_model_size(models.source_model, models.source_revision, compute)
    lines = [
        f"{role} {model.name}: {model.layout.model_type}, {model.layout.n_layers} layers, "
        f"{model.parameters / 1e9:.2f} billion parameters"
        for role, model in (("target", target), ("source", source))
    ]
    return "\n".join([*lines, cost_table(stage1_cost(target, source, experiment, timed))])


def cost_table(cost: Cost) -> str:
    """The estimate as a table. The column of times is left out where they were not estimated."""
    problems, flops = sum(side.problems for side in cost.sides), sum(side.flops for side in cost.sides)
    if cost.seconds is None:
        time = "the time was not estimated; --plan-only does it"
    else:
        time = f"about {duration(cost.seconds)} on this machine"
    return "\n".join(
        [
            f"at most {cost.texts} texts and {cost.rows} rows per layer and side; about {cost.iterations} Sinkhorn "
            f"iterations per problem",
            "side            n x m  problems       TFLOP" + ("" if cost.seconds is None else "        time"),
            *(_line(s.side, f"{s.n} x {s.m}", str(s.problems), s.flops, s.seconds) for s in cost.sides),
            _line("plans", "", str(problems), flops, cost.plan_seconds),
            _line("reading", "", "", cost.reading_flops, cost.reading_seconds),
            f"peak memory {cost.memory / 2**30:.1f} GiB, on disk {cost.disk / 2**30:.2f} GiB; {time}",
        ]
    )


def _line(name: str, shape: str, problems: str, flops: float, seconds: float | None) -> str:
    time = "" if seconds is None else f"{duration(seconds):>12}"
    return f"{name:8}{shape:>13}{problems:>10}{flops / 1e12:12.2f}{time}"
