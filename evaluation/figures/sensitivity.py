"""How the gain depends on the strength (the paper's Figure 5) and on the source (Table 7, Figure 4), over many runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes

from evaluation.figures.figure import Figure, Panel
from evaluation.figures.forest import Line, ends, panel_of
from evaluation.figures.theme import WIDE, colour, series_of

# Names of the figures that depend on other runs.
BY_STRENGTH, BY_SOURCE = "by_strength", "by_source"


@dataclass(frozen=True)
class Point:
    """What one run adds to a comparison of runs.

    Attributes:
        run: its name.
        source: name of the source model.
        alpha: the strength of fusion.
        diffs: arm -> (difference to base in nats per token, its 95 % interval or None).
        mean: arm -> mean score on the task's benchmarks in per cent; empty where it was not scored.
    """

    run: str
    source: str
    alpha: float
    diffs: dict[str, tuple[float, Sequence[float] | None]]
    mean: dict[str, float]


def by_strength(points: Sequence[Point]) -> Figure:
    """The gain against alpha, from runs that differ in nothing else."""
    points = sorted(points, key=lambda point: point.alpha)
    arms = list(dict.fromkeys(arm for point in points for arm in point.diffs))
    panels = [Panel(lambda axes: _losses(axes, points, arms), f"Gain at {len(points)} strengths", WIDE, measured=True)]
    scored = list(dict.fromkeys(arm for point in points for arm in point.mean))
    if scored:
        panels.append(Panel(lambda axes: _scores(axes, points, scored), "Mean score by strength", WIDE, measured=True))
    caption = (
        "Every point is a run of its own that differs in alpha alone. A useful strength is a valley that is wider than "
        "the intervals; a curve that only rises means that more of the source only does more damage."
    )
    title = "How the gain depends on the strength"
    return Figure(BY_STRENGTH, title, caption, panels, _columns("alpha"), _rows(points, "alpha"))


def _losses(axes: Axes, points: Sequence[Point], arms: Sequence[str]) -> None:
    for arm in arms:
        found = [(point.alpha, *point.diffs[arm]) for point in points if arm in point.diffs]
        look = series_of(arm)
        axes.plot([x for x, _, _ in found], [y for _, y, _ in found], label=arm, **look)
        for x, _, ci95 in found:
            if ci95 is not None:
                axes.plot([x, x], ci95, color=look["color"], linewidth=1)
    axes.axhline(0, color=colour("ink"), linewidth=0.9)
    axes.set(xlabel="alpha", ylabel="nats per token, minus base")
    axes.grid(axis="y")
    axes.legend()


def _scores(axes: Axes, points: Sequence[Point], arms: Sequence[str]) -> None:
    for arm in arms:
        found = [(point.alpha, point.mean[arm]) for point in points if arm in point.mean]
        axes.plot(*zip(*found, strict=True), label=arm, **series_of(arm))
    axes.set(xlabel="alpha", ylabel="mean score (%)")
    axes.grid(axis="y")
    axes.legend()


def by_source(points: Sequence[Point]) -> Figure:
    """The gain of the fused model with several sources, from runs that differ in nothing else."""
    points = sorted(points, key=lambda point: point.source)
    lines = [Line(point.source, "fused", *point.diffs["fused"]) for point in points]
    caption = (
        "The fused model without training, minus the base, for every source that was tried with this target. A larger "
        "source is not better by itself: what counts is what it knows of these texts."
    )
    alt = "; ".join(f"{line.name} {line.diff:+.4f}" for line in lines)
    panel, title = panel_of(lines, "nats per token", alt), "How the gain depends on the source"
    return Figure(BY_SOURCE, title, caption, [panel], _columns("source"), _rows(points, "source"))


def _columns(varied: str) -> tuple[str, ...]:
    """The head of the CSV of runs that differ in `alpha` or `source`."""
    return ("run", varied, "arm", "diff", "low", "high", "benchmark_mean")


def _rows(points: Sequence[Point], varied: str) -> list[tuple[Any, ...]]:
    """The lines of the CSV."""
    return [
        (point.run, getattr(point, varied), arm, diff, *ends(ci95), point.mean.get(arm, ""))
        for point in points
        for arm, (diff, ci95) in point.diffs.items()
    ]
