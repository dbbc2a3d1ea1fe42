"""Forest plots: differences to the base with their intervals, one line per arm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes

from core.fusion.controls import CONTROLS
from evaluation.arms.bits import SOURCE
from evaluation.arms.run import TRAINED
from evaluation.figures.figure import Figure, Panel
from evaluation.figures.theme import colour, series_of

# Kind of an arm -> colour and marker; trainings look as in every other figure (`theme.series_of`).
KINDS = {
    "base": ("ink", "o"),
    "fused": ("blue", "D"),
    "control": ("grey", "o"),
    "source": ("gold", "v"),
    "other": ("muted", "x"),
}
WIDTH, LINE, MARGIN = 4.2, 0.26, 0.7
COLUMNS = ("arm", "kind", "nll", "diff", "low", "high", "seeds")


@dataclass(frozen=True)
class Line:
    """One line of a forest plot: a difference, its interval (None where there is none) and that of every seed."""

    name: str
    kind: str
    diff: float
    ci95: Sequence[float] | None
    seeds: Sequence[float] = ()


def kind_of(arm: str) -> str:
    """Whether an arm is the base, the fused model, the source, a training, a control, or something else."""
    if arm in CONTROLS:
        return "control"
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


def losses(arms: Mapping[str, Mapping[str, Any]], name: str, title: str, texts: str) -> Figure:
    """The loss of every arm minus that of the base, in nats per token.

    Args:
        arms: `evaluation.arms.verdict.statistics`.
        texts: which texts these are, in words.
    """
    lines = lines_of(arms)
    caption = (
        f"Loss of every arm minus that of the base on {texts}; left of the line is better. Bars are 95 % intervals, "
        "small dots are single seeds. Transfer shows as a blue diamond left of the base and of all grey "
        "circles, the controls; where a grey circle lies as far left, the gain needs no knowledge of the source."
    )
    rows = [
        (line.name, line.kind, arms[line.name]["nll"], line.diff, *(line.ci95 or ("", "")), _joined(line.seeds))
        for line in lines
    ]
    alt = "Forest plot. " + "; ".join(f"{line.name} {line.diff:+.4f}" for line in lines) + " nats per token."
    panel = Panel(lambda axes: draw(axes, lines, "nats per token, minus base"), alt, height_for(lines), measured=True)
    return Figure(name, title, caption, [panel], COLUMNS, rows)


def bits(arms: Mapping[str, Mapping[str, Any]]) -> Figure:
    """The same in bits per byte, in which the source can be compared as well.

    Args:
        arms: arm, or `source` -> "bits_per_byte" and the difference to base.
    """
    lines = lines_of(arms)
    caption = (
        "The same differences in bits per byte of text, a unit that does not depend on the tokenizer, with the source "
        "itself as the last line: how far it lies to the left is all that could be gained from it."
    )
    rows = [
        (
            line.name,
            line.kind,
            arms[line.name]["bits_per_byte"],
            line.diff,
            *(line.ci95 or ("", "")),
            _joined(line.seeds),
        )
        for line in lines
    ]
    alt = "Forest plot. " + "; ".join(f"{line.name} {line.diff:+.4f}" for line in lines) + " bits per byte."
    panel = Panel(lambda axes: draw(axes, lines, "bits per byte, minus base"), alt, height_for(lines), measured=True)
    columns = ("arm", "kind", "bits_per_byte", *COLUMNS[3:])
    return Figure("bits_per_byte", "Against the source", caption, [panel], columns, rows)


def height_for(lines: Sequence[Line]) -> tuple[float, float]:
    """The size of a forest plot with so many lines."""
    return WIDTH, MARGIN + LINE * len(lines)


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


def _joined(values: Sequence[float]) -> str:
    return " ".join(map(repr, values))
