"""Benchmarks: differences to the base with intervals (the paper's Tables 1 to 6, Figure 6), and arms on one scale."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes

from evaluation.figures.figure import Figure, Panel
from evaluation.figures.forest import ends, kind_of, look_of
from evaluation.figures.theme import colour, series_of
from evaluation.tables.rows import ARMS, MEAN

COLUMNS = ("benchmark", "metric", "n", "arm", "value", "diff", "low", "high", "p_holm")
WIDTH, LINE, MARGIN = 4.2, 0.17, 0.9


def scores(kind: str, found: Mapping[str, Any]) -> Figure:
    """The differences to base of all arms on the benchmarks of one set.

    Args:
        kind: name of the set: a task, or `general`.
        found: as `evaluation.tables.rows.benchmark_rows` returns it.
    """
    by_name = {name: (row["metric"], row["n"], row["arms"]) for name, row in found["rows"].items()}
    if len(by_name) > 1 and found["mean"]:
        by_name[MEAN] = ("", "", found["mean"])
    rows = [
        (
            name,
            metric,
            n,
            arm,
            score["value"],
            score.get("diff", ""),
            *ends(score.get("ci95")),
            score.get("p_holm", ""),
        )
        for name, (metric, n, arms) in by_name.items()
        for arm, score in arms.items()
    ]
    arms = [arm for arm in ARMS if arm != "base" and any(arm in row[2] for row in by_name.values())]
    caption = (
        "Score of every arm minus the score of the base, in percentage points; right of the line is better. Bars are "
        "95 % intervals over items and seeds. Intervals that cross the line show no difference, and of many benchmarks "
        "some leave it by chance, which is why the table gives p after Holm's correction."
    )
    size = (WIDTH, MARGIN + LINE * max(1, len(arms)) * len(by_name))
    said = "; ".join(f"{row[0]} {row[3]} {row[4]:.1f} %" for row in rows)
    scores_of = {name: row[2] for name, row in by_name.items()}
    panel = Panel(lambda axes: draw(axes, scores_of, arms), said, size, measured=True)
    title = "General abilities" if kind == "general" else f"Benchmarks of {kind}"
    return Figure(f"benchmarks_{kind}", title, caption, [panel], COLUMNS, rows)


def draw(axes: Axes, by_name: Mapping[str, Mapping[str, Mapping[str, Any]]], arms: list[str]) -> None:
    """Benchmarks from top to bottom, and within each of them the arms."""
    axes.axvline(0, color=colour("ink"), linewidth=0.9)
    step = 1 / (len(arms) + 1)
    colours = {arm: series_of(arm)["color"] for arm in arms}
    markers = {arm: look_of(arm, kind_of(arm))[1] for arm in arms}
    for y, scores_of in enumerate(by_name.values()):
        for number, arm in enumerate(arms):
            score = scores_of.get(arm, {})
            if "diff" not in score:
                continue
            at = y + (number - (len(arms) - 1) / 2) * step
            if score["ci95"] is not None:
                axes.plot(score["ci95"], [at, at], color=colours[arm], linewidth=1.4)
            axes.plot([score["diff"]], [at], markers[arm], color=colours[arm], markersize=4.5)
    for arm in arms:
        axes.plot([], [], markers[arm], color=colours[arm], label=arm)
    axes.set_yticks(range(len(by_name)), list(by_name))
    axes.set_ylim(len(by_name) - 0.5, -0.5)
    axes.set_xlabel("percentage points, minus base")
    axes.grid(axis="x")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    if arms:
        axes.figure.legend(loc="outside upper center", ncols=len(arms))


def common_scale(sets: Mapping[str, Mapping[str, Any]]) -> Figure | None:
    """The arms of every set between its worst (0) and its best (1), as in the paper's Figure 1; None where no set has
    three arms to compare.

    Args:
        sets: name -> as `evaluation.tables.rows.benchmark_rows` returns it.
    """
    scaled = {name: found["normalised"] for name, found in sets.items() if found["normalised"]}
    if not scaled:
        return None
    arms = [arm for arm in ARMS if any(arm in found for found in scaled.values())]
    rows = [(name, arm, one["z"], one["min_max"]) for name, found in scaled.items() for arm, one in found.items()]
    caption = (
        "Mean score of every arm between the worst arm (0) and the best one (1) of its set. The scale stretches small "
        "differences as much as large ones, so it says who is ahead and nothing about by how much."
    )
    alt = "; ".join(f"{name} {arm} {min_max:.2f}" for name, arm, _, min_max in rows)
    size = (WIDTH, MARGIN + LINE * len(arms) * len(scaled))
    panel = Panel(lambda axes: _draw_scale(axes, scaled, arms), alt, size, measured=True)
    columns = ("set", "arm", "z", "min_max")
    return Figure("common_scale", "Arms on a common scale", caption, [panel], columns, rows)


def _draw_scale(axes: Axes, scaled: Mapping[str, Mapping[str, Mapping[str, float]]], arms: list[str]) -> None:
    for number, arm in enumerate(arms):
        offset = (number - (len(arms) - 1) / 2) / (len(arms) + 1)
        found = [(one[arm]["min_max"], place + offset) for place, one in enumerate(scaled.values()) if arm in one]
        axes.plot(*zip(*found, strict=True), label=arm, **{**series_of(arm), "linestyle": "", "markersize": 5})
    axes.set_yticks(range(len(scaled)), list(scaled))
    axes.set(xlabel="0 = worst, 1 = best", xlim=(-0.04, 1.04), ylim=(len(scaled) - 0.5, -0.5))
    axes.grid(axis="x")
    axes.tick_params(axis="y", length=0)
    axes.figure.legend(loc="outside upper center", ncols=len(arms))
