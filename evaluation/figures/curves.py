"""The loss curves of all trainings of a run, in one axis."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes

from evaluation.figures.figure import Figure, Panel, whole_numbers
from evaluation.figures.theme import WIDE, series_of

COLUMNS = ("training", "part", "update", "loss")


def loss_curves(curves: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Training losses as lines, validation losses as markers.

    Args:
        curves: `ARM/SEED` -> contents of its loss_curve.json.
    """
    rows = [
        (name, part, point["update"], point["loss"])
        for name, curve in curves.items()
        for part in ("train", "validation")
        for point in curve[part]
    ]
    caption = (
        "Thin lines are the training loss of every update in nats per token, one line per seed; markers are the "
        "validation loss. The fused start should begin below the plain target and stay there; a validation loss that "
        "rises means too high a learning rate. Every update reads other rows, so thin lines are rough, and with a "
        "teacher they hold the teacher's part of the loss as well: only the markers compare distill with the others."
    )
    last = "; ".join(f"{name} {curve['train'][-1]['loss']:.3f}" for name, curve in curves.items() if curve["train"])
    panel = Panel(lambda axes: draw(axes, curves), f"Training loss of the last update: {last}", WIDE, measured=True)
    return Figure("loss_curves", "How the trainings went", caption, [panel], COLUMNS, rows)


def draw(axes: Axes, curves: Mapping[str, Mapping[str, Any]]) -> None:
    """All curves; the trainings of one arm share a colour and one entry of the legend."""
    named = set()
    for name, curve in curves.items():
        arm = name.partition("/")[0]
        look = series_of(arm)
        label = None if arm in named else arm
        named.add(arm)
        train = [(point["update"], point["loss"]) for point in curve["train"]]
        axes.plot(*zip(*train, strict=True), color=look["color"], linewidth=0.9, alpha=0.7)
        validation = [(point["update"], point["loss"]) for point in curve["validation"]]
        updates, losses = zip(*validation, strict=True) if validation else ((), ())
        axes.plot(updates, losses, label=label, **{**look, "linestyle": "--"})
    axes.set(xlabel="update", ylabel="nats per token")
    whole_numbers(axes.xaxis)
    axes.grid(axis="y")
    # Above the axes, because thin lines may be anywhere inside.
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3)
