"""What was transported into each layer: figures of W~ by layer and projection, strengths, and the selected neurons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from torch import Tensor

from core.fusion.strengths import Strength
from evaluation.figures.figure import Figure, Panel, whole_numbers
from evaluation.figures.theme import PANEL, series

# Figure of fusion_report.json, or the strength -> the title of its panel, which also begins the panel's text in words.
FIGURES = {
    "norm_ratio": "Size: |W~| / |W|",
    "cosine": "Direction: cosine of W~ and W",
    "explained_variance": "Explained variance, rows kept aside",
    "source_layer": "Source layer with the largest share",
    "strength": "Strength alpha",
}
# Bins of neurons in the picture of the selection.
BINS = 48


def strength_in(alpha: Strength, layer: int, projection: str) -> float:
    """The strength of one projection of one layer."""
    return float(alpha[f"{layer}.{projection}"] if isinstance(alpha, Mapping) else alpha)


def transported(lines: Sequence[Mapping[str, Any]], alpha: Strength) -> Figure:
    """Five figures of every fused projection by target layer.

    Args:
        lines: the lines of fusion_report.json.
        alpha: as the residual file holds it.
    """
    rows = [
        (
            line["layer"],
            line["projection"],
            line["selected"],
            line["norm_ratio"],
            line["cosine"],
            line["explained_variance"],
            int(max(line["source_layers"], key=lambda key: line["source_layers"][key])),
            strength_in(alpha, line["layer"], line["projection"]),
        )
        for line in lines
    ]
    columns = ("layer", "projection", "selected", *FIGURES)
    projections = list(dict.fromkeys(line["projection"] for line in lines))
    panels = [_panel(title, rows, columns.index(name), projections) for name, title in FIGURES.items()]
    panels.append(_legend(projections))
    caption = (
        "One line per projection, from the first target layer to the last. With the map regression, |W~| / |W| "
        "should be of the order of 1 and the explained variance clearly above 0: the source then predicts what the "
        "target's layer does. A ratio near 0 means that fusing only makes the target's own weight smaller. The source "
        "layer should rise with depth."
    )
    return Figure("transported_weights", "What was transported into each layer", caption, panels, columns, rows)


def _panel(title: str, rows: Sequence[Sequence[Any]], column: int, projections: Sequence[str]) -> Panel:
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if row[column] is not None:
            lines.setdefault(row[1], []).append((row[0], row[column]))
    means = "; ".join(f"{name} {np.mean([value for _, value in line]):.3g}" for name, line in lines.items())
    alt = f"{title}, mean over layers: {means}" if lines else f"{title}: not measured"
    return Panel(lambda axes: draw(axes, title, lines, projections), alt, PANEL, measured=True)


def draw(axes: Axes, title: str, lines: Mapping[str, Sequence[tuple[int, float]]], projections: Sequence[str]) -> None:
    """One figure: projection -> (layer, value). The place of a projection in `projections` decides its look."""
    for projection, line in lines.items():
        axes.plot(*zip(*line, strict=True), label=projection, **series(projections.index(projection)))
    axes.set(title=title, xlabel="target layer")
    whole_numbers(axes.xaxis)
    axes.grid(axis="y")
    if title == FIGURES["strength"] and axes.get_ylim()[0] > 0:
        axes.set_ylim(bottom=0)
    if not lines:
        axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes)


def _legend(projections: Sequence[str]) -> Panel:
    """The legend of all figures as a panel of its own, so that it lies on no curve, however many projections."""

    def draw_legend(axes: Axes) -> None:
        for number, projection in enumerate(projections):
            axes.plot([], [], label=projection, **series(number))
        axes.set_axis_off()
        axes.legend(loc="upper left", title="projection", alignment="left")

    return Panel(draw_legend, f"Legend: {', '.join(projections)}", PANEL, measured=True)


def selected(index: Mapping[tuple[int, str], Tensor], sizes: Mapping[str, int]) -> Figure:
    """Which neurons of every projection were fused.

    Args:
        index: (layer, projection) -> the selected neurons.
        sizes: projection -> number of neurons among which they were selected.
    """
    panels, rows = [], []
    for projection, size in sizes.items():
        of_layers = {layer: found for (layer, name), found in index.items() if name == projection}
        shares = np.stack([share_by_bin(of_layers[layer].numpy(), size) for layer in sorted(of_layers)])
        count = sum(map(len, of_layers.values())) / len(of_layers)
        title = f"{projection}: {count:.0f} of {size}"
        panels.append(Panel(_draw_selection(shares, title, size), f"Selected neurons of {title} per layer", PANEL))
        rows += [
            (layer, projection, size, " ".join(map(str, found.tolist()))) for layer, found in sorted(of_layers.items())
        ]
    caption = (
        "Share of neurons that were fused, by target layer and place in the layer: the strongest ones by their mean "
        "absolute activation. Columns that are bright in all layers are neurons, or heads, that are strong everywhere."
    )
    columns = ("layer", "projection", "neurons", "selected")
    return Figure("selection", "Which neurons were fused", caption, panels, columns, rows)


def share_by_bin(index: np.ndarray, size: int) -> np.ndarray:
    """The share of selected neurons in each of at most `BINS` bins of `size` neurons."""
    edges = np.linspace(0, size, min(BINS, size) + 1)
    return np.histogram(index + 0.5, edges)[0] / np.maximum(np.histogram(np.arange(size) + 0.5, edges)[0], 1)


def _draw_selection(shares: np.ndarray, title: str, size: int) -> Any:
    def draw_shares(axes: Axes) -> None:
        axes.imshow(shares, origin="lower", vmin=0, vmax=1, extent=(0, size, -0.5, len(shares) - 0.5))
        axes.set(title=title, xlabel="neuron", ylabel="target layer")
        whole_numbers(axes.yaxis)

    return draw_shares
