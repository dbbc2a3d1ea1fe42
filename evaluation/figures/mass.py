"""How concentrated the neuron plans are: the mass in their k largest entries (the paper's Figure 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

from evaluation.figures.figure import Figure, Panel
from evaluation.figures.pairs import Pair
from evaluation.figures.theme import WIDE, colour, series

AVERAGE = "average"
# Shares of all entries at which the curves of plans of different sizes are averaged.
SHARES = np.logspace(-5, 0, 51)


def top_k_mass(pairs: Sequence[Pair]) -> Figure:
    """The mass against the share of entries: per side the mean over target layers, and the mean over sides."""
    curves = by_side(pairs)
    columns = ("side", "share_of_entries", "mass")
    rows = [(side, float(x), float(y)) for side, ys in curves.items() for x, y in zip(SHARES, ys, strict=True)]
    caption = (
        "Of all entries of Q, the largest ones hold most of the mass when neurons have clear partners, so that curves "
        "rise early. Each curve is the mean over the target layers that were read, every one with the source layer "
        "that P matches to it; the thick one is the mean over sides. A curve on the dotted line is the uniform plan, "
        "in which every neuron is matched with all others alike."
    )
    said = "; ".join(f"{side}: {np.interp(0.01, SHARES, ys):.2f}" for side, ys in curves.items())
    alt = f"Mass in the largest 1 % of all entries, {said}"
    panel = Panel(lambda axes: draw(axes, curves), alt, WIDE, measured=True)
    return Figure("top_k_mass", "How concentrated the neuron plans are", caption, [panel], columns, rows)


def by_side(pairs: Sequence[Pair]) -> dict[str, np.ndarray]:
    """Side, and `average` -> the mean mass at `SHARES`. Between two measured k a curve is interpolated; below the
    first, k = 1, it is proportional to the share."""
    curves: dict[str, list[np.ndarray]] = {}
    for pair in pairs:
        size = pair.shape[0] * pair.shape[1]
        k, mass = np.array([(0, 0.0), *pair.mass], float).T
        curves.setdefault(pair.side, []).append(np.interp(SHARES, k / size, mass))
    means = {side: np.mean(found, axis=0) for side, found in curves.items()}
    return means | {AVERAGE: np.mean(list(means.values()), axis=0)}


def draw(axes: Axes, curves: Mapping[str, np.ndarray]) -> None:
    """The curves of all sides, on a logarithmic axis of shares."""
    for number, (side, mass) in enumerate(curves.items()):
        if side == AVERAGE:
            axes.plot(SHARES, mass, color=colour("ink"), linewidth=2.2, label=side)
        else:
            axes.plot(SHARES, mass, label=side, markevery=(number, 7), **series(number))
    axes.plot(SHARES, SHARES, ":", color=colour("muted"), label="uniform plan")
    axes.set(xscale="log", xlabel="k as a share of all entries of Q", ylabel="mass in the k largest", ylim=(0, 1.02))
    axes.set_xlim(SHARES[0], 1)
    axes.set_xticks([1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1], ["0.001 %", "0.01 %", "0.1 %", "1 %", "10 %", "100 %"])
    axes.grid(axis="y")
    axes.legend(loc="upper left")
