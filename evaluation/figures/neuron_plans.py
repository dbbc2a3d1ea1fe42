"""The neuron plan Q of one pair of layers: reordered so that structure shows, with its strongest matches."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor

from evaluation.figures.figure import Figure, Panel
from evaluation.figures.pairs import Match, Pair
from evaluation.figures.theme import colour

SIZE = (3.0, 2.7)
# What the picker of the page draws: densities in powers of two between 2^-RANGE and 2^RANGE, z-scores up to Z_MAX.
RANGE, Z_MAX = 3.0, 5.0
CAPTION = (
    "The plan says how much of a target neuron's mass goes to each source neuron. Rows and columns are put in an order "
    "in which neurons with similar partners stand together, and averaged in blocks; 1 is the density of the plan that "
    "knows nothing. Structure shows as bright blocks or a bright diagonal; an even grey field means that no neuron has "
    "a partner. The points are the activations of the three strongest matches: a narrow cloud is a good match."
)


def default_pair(pairs: Sequence[Pair]) -> Pair:
    """The plan that is shown first: of the first side, in the middle of the target's depth."""
    first = [pair for pair in pairs if pair.side == pairs[0].side]
    return first[len(first) // 2]


def left_out(pairs: Sequence[Pair], layers: int) -> str:
    """A sentence on the sides of which not all plans were read; empty where all were.

    Args:
        layers: number of the target's layers.
    """
    read = Counter(pair.side for pair in pairs)
    told = [f"{side} {count} of {layers}" for side, count in read.items() if count < layers]
    why = "Of large layers not all plans are read, because that would take long; those that are lie at equal distances"
    return f" {why}: {', '.join(told)} target layers." if told else ""


def neuron_plan(pair: Pair, note: str = "") -> Figure:
    """One plan with the scatter plots of its strongest matches; `note` ends the caption."""
    where = f"{pair.side}, target layer {pair.target_layer}, source layer {pair.source_layer}"
    n, m = pair.shape
    panels = [
        Panel(
            lambda axes: draw_blocks(axes, pair.blocks, where),
            f"Neuron plan of {where}: {n} target neurons by {m} source neurons, co-clustered",
            SIZE,
        )
    ]
    for match in pair.matches:
        if match.points.numel():
            said = f"{match.target} and {match.source}, r = {match.correlation:.2f}"
            panels.append(Panel(_scatter(match, said), f"Activations of target and source neuron {said}", SIZE))
    rows = [
        (pair.side, pair.target_layer, pair.source_layer, one.target, one.source, one.correlation, one.share)
        for one in pair.matches
    ]
    columns = ("side", "target_layer", "source_layer", "target_neuron", "source_neuron", "correlation", "share")
    return Figure("neuron_plan", "Which neurons correspond", CAPTION + note, panels, columns, rows)


def draw_blocks(axes: Axes, blocks: Tensor, title: str) -> None:
    """The blocks as a heat map, in powers of two relative to the uniform plan."""
    image = axes.imshow(blocks.clamp_min(1e-9).log2().numpy(), vmin=-RANGE, vmax=RANGE)
    axes.set(title=title, xlabel="source neurons, reordered", ylabel="target neurons, reordered")
    axes.set_xticks([])
    axes.set_yticks([])
    bar = axes.figure.colorbar(image, ax=axes, shrink=0.85)
    bar.outline.set_visible(False)
    bar.set_ticks([-RANGE, 0, RANGE], labels=["1/8", "1", "8"])


def _scatter(match: Match, title: str) -> Any:
    def draw(axes: Axes) -> None:
        axes.plot(*match.points.numpy(), "o", color=colour("blue"), markersize=2.6, alpha=0.6, markeredgewidth=0)
        axes.set(title=title, xlabel="target neuron (z-score)", ylabel="source neuron (z-score)")

    return draw


def picker_data(pairs: Sequence[Pair]) -> dict[str, list[dict[str, Any]]]:
    """Side -> its plans, as the page's script reads them: numbers, and bytes in base64."""
    sides: dict[str, list[dict[str, Any]]] = {}
    for pair in pairs:
        scatters = [match for match in pair.matches if match.points.numel()]
        sides.setdefault(pair.side, []).append(
            {
                "layer": pair.target_layer,
                "source": pair.source_layer,
                "height": pair.blocks.shape[0],
                "width": pair.blocks.shape[1],
                "blocks": _bytes((pair.blocks.clamp_min(1e-9).log2() / RANGE).clamp(-1, 1)),
                "points": [_bytes((match.points / Z_MAX).clamp(-1, 1)) for match in scatters],
                "matches": [
                    [one.target, one.source, round(one.correlation, 3), round(100 * one.share, 1)]
                    for one in pair.matches
                ],
            }
        )
    return sides


def _bytes(values: Tensor) -> str:
    """Numbers from -1 to 1 as the bytes 0 to 254 in base64."""
    return base64.b64encode(((values + 1) * 127).round().to(torch.uint8).numpy().tobytes()).decode()
