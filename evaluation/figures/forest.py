"""Forest plots: differences to the base with their intervals, one line per arm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes

from core.fusion.controls import CONTROLS
from evaluation.arms.bits import SOURCE
from evaluation.arms.run import FUSED_LEARNED, TRAINED
from evaluation.figures.figure import Figure, Panel
from evaluation.figures.theme import colour, series_of

# Kind of an arm -> colour and marker; trainings look as in every other figure (`theme.series_of`).
KINDS = {
    "base": ("ink", "o"),
    "fused": ("blue", "D"),
    "learned": ("sky", "P"),
    "control": ("grey", "o"),
    "source": ("gold", "v"),
    "other": ("muted", "x"),
}
# In inches: the width of a plot, the height of one of its lines, and what the axis below takes.
WIDTH, LINE, MARGIN = 3.8, 0.26, 0.7


@dataclass(frozen=True)
class Line:
    """One line of a forest plot: a difference, its interval (None where there is none) and that of every seed."""

    name: str
    kind: str
    diff: float
    ci95: Sequence[float] | None
    seeds: Sequence[float] = ()


def kind_of(arm: str) -> str:
    """Whether an arm is the base, the fused model (with learned strengths or not), the source, a training, a control,
    or something else."""
    if arm in CONTROLS:
        return "control"
    if arm == FUSED_LEARNED:
        return "learned"
    return arm if arm in ("base", "fused", SOURCE) else "trained" if arm in TRAINED else "other"


def look_of(arm: str, kind: str) -> tuple[str, str]:
    """(colour, marker) of an arm."""
    if kind == "trained":
        look = series_of(arm)
        return look["color"], look["marker"]
    name, marker = KINDS[kind]
    return colour(name), marker


def lines_of(arms: Mapping[str, Mapping[str, Any]]) -> list[Line]:
    """One line per arm; that of the base is a point at 0.

    Args:
        arms: arm -> its difference to base with `ci95`, and `seeds` where it was trained.
    """
    return [
        Line(
            arm,
            kind_of(arm),
            found["diff"],
            None if arm == "base" else found["ci95"],
            [*found.get("seeds", {}).values()],
        )
        for arm, found in arms.items()
    ]


def losses(arms: Mapping[str, Mapping[str, Any]]) -> Figure:
    """The loss of every arm minus that of the base on held-out texts, in nats per token.

    Args:
        arms: `evaluation.arms.verdict.statistics`.
    """
    caption = (
        "Loss of every arm minus that of the base on held-out texts; left of the line is better. Bars are 95 % "
        "intervals, small dots are single seeds. Transfer shows as a blue diamond left of the base and of all grey "
        "circles, the controls; where a grey circle lies as far left, the gain needs no knowledge of the source."
    )
    if FUSED_LEARNED in arms:
        caption += (
            f" The light blue plus, {FUSED_LEARNED}, is the fused model with strengths that are learned, one per layer "
            "and projection; no control here learns its own, so its lead over them is not shown to be transfer."
        )
    return _forest(arms, "nll", "nats per token", "losses", "Loss on held-out texts", caption)


def general_losses(arms: Mapping[str, Mapping[str, Any]]) -> Figure:
    """The same on general text.

    Args:
        arms: `evaluation.arms.verdict.statistics`.
    """
    caption = (
        "The same on general text. An arm whose interval lies right of the line is worse there than the base, which is "
        "the price of what it gained on the held-out texts; an interval that reaches the line shows no such price."
    )
    return _forest(arms, "nll", "nats per token", "losses_general", "Cost on general text", caption)


def bits(arms: Mapping[str, Mapping[str, Any]]) -> Figure:
    """The same in bits per byte, in which the source can be compared as well.

    Args:
        arms: arm, or `source` -> "bits_per_byte" and the difference to base.
    """
    caption = (
        "The same differences in bits per byte of text, a unit that does not depend on the tokenizer, with the source "
        "itself as the last line: how far it lies to the left is all that could be gained from it."
    )
    return _forest(arms, "bits_per_byte", "bits per byte", "bits_per_byte", "Against the source", caption)


def _forest(arms: Mapping[str, Mapping[str, Any]], key: str, unit: str, name: str, title: str, caption: str) -> Figure:
    """A figure with one forest plot: `key` is the entry of an arm that holds its loss, in `unit`."""
    lines = lines_of(arms)
    rows = [
        (line.name, line.kind, arms[line.name][key], line.diff, *ends(line.ci95), " ".join(map(repr, line.seeds)))
        for line in lines
    ]
    alt = "Forest plot. " + "; ".join(f"{line.name} {line.diff:+.4f}" for line in lines) + f" {unit}."
    columns = ("arm", "kind", key, "diff", "low", "high", "seeds")
    return Figure(name, title, caption, [panel_of(lines, unit, alt)], columns, rows)


def ends(ci95: Sequence[float] | None) -> Sequence[float | str]:
    """The two cells of an interval in a table of numbers; empty where there is none."""
    return ci95 or ("", "")


def panel_of(lines: Sequence[Line], unit: str, alt: str) -> Panel:
    """The lines as a forest plot, as high as their number needs."""
    size = (WIDTH, MARGIN + LINE * len(lines))
    return Panel(lambda axes: draw(axes, lines, f"{unit}, minus base"), alt, size, measured=True)


def draw(axes: Axes, lines: Sequence[Line], label: str) -> None:
    """Draw the lines from top to bottom, the first one at the top."""
    axes.axvline(0, color=colour("ink"), linewidth=0.9)
    for y, line in enumerate(lines):
        shade, marker = look_of(line.name, line.kind)
        if line.ci95 is not None:
            axes.plot(line.ci95, [y, y], color=shade, linewidth=1.6, solid_capstyle="butt")
        if len(line.seeds) > 1:
            axes.plot(line.seeds, [y + 0.26] * len(line.seeds), ".", color=colour("muted"), markersize=3)
        axes.plot([line.diff], [y], marker, color=shade, markersize=5.5)
    axes.set_yticks(range(len(lines)), [line.name for line in lines])
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.set_xlabel(label)
    axes.grid(axis="x")
    axes.set_axisbelow(True)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0, labelsize=8.5)
    axes.locator_params(axis="x", nbins=6)
