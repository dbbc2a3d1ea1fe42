"""The layer plans P (the paper's Figures 7 and 8): which source layer corresponds to which target layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from matplotlib.axes import Axes
from torch import Tensor

from core.runs.plan_directory import PlanDirectory
from core.runs.plan_files import plans_file, read_tensor
from evaluation.figures.figure import Figure, Panel, whole_numbers
from evaluation.figures.theme import MARK, MARK_EDGE

# A few layers can be in order by chance, so that one shuffle alone may look like a sound plan.
SHUFFLES = 20
SIZE = (3.0, 2.7)
# The colours run between these quantiles: the first layers of two models often match so well that on a scale up to
# their cell all others would be black.
SHOWN = (0.01, 0.98)


def sides_of(plans: PlanDirectory) -> tuple[str, ...]:
    """The sides of a plan directory that have plans, in the order in which they were made."""
    return tuple(plans.manifest.record["sides"])


def plan_of(plans: PlanDirectory, side: str) -> tuple[Tensor, Tensor]:
    """(P [L, M], layer costs [L, M]) of one side."""
    path = plans_file(plans.folder, side)
    return read_tensor(path, "P"), read_tensor(path, "layer_cost")


def depth_correlation(P: Tensor) -> float | None:
    """Spearman's correlation of the arg max of P over source layers with target depth; None where all arg max agree."""
    from scipy.stats import spearmanr  # takes a second to import, which --help need not wait for

    matched = P.argmax(1).tolist()
    return float(spearmanr(range(len(matched)), matched).statistic) if len(set(matched)) > 1 else None


def correlation_in_words(P: Tensor) -> str:
    """`depth_correlation` as titles show it."""
    rank = depth_correlation(P)
    return "no rank correlation" if rank is None else f"Spearman {rank:.2f}"


def layer_plans(plans: PlanDirectory) -> Figure:
    """P and the layer costs of every side, and one plan of shuffled layers, which shows what a bad one looks like."""
    panels, rows = [], []
    for side in sides_of(plans):
        P, cost = plan_of(plans, side)
        said = correlation_in_words(P)
        panels.append(_panel(P, f"{side}: P, {said}", f"Layer plan of side {side}, {said} with depth"))
        panels.append(_panel(cost, f"{side}: layer cost", f"Layer costs of side {side}", path=False))
        rows += table(side, P, cost)
    shuffled = bad_plan(plan_of(plans, sides_of(plans)[0])[0])
    said = correlation_in_words(shuffled)
    panels.append(_panel(shuffled, f"A bad plan: {said}", f"For comparison a plan of shuffled layers, {said}"))
    caption = (
        "Bright cells of P say which source layer corresponds to which target layer; orange dots mark the strongest of "
        "each row. A sound plan is a band that rises from the lower left to the upper right, with a rank correlation "
        "near 1, and the cost has its valley in the same place. The last panel is the first plan with shuffled source "
        "layers: dots all over the place mean that the layers were not matched, and nothing later can be trusted. The "
        "brightest 2 % of the cells have one colour, and so have the darkest 1 %."
    )
    columns = ("side", "target_layer", "source_layer", "P", "layer_cost", "is_argmax")
    return Figure("layer_plans", "Which layers correspond", caption, panels, columns, rows)


def table(side: str, P: Tensor, cost: Tensor) -> list[tuple[str, int, int, float, float, int]]:
    """The lines of the CSV for one side."""
    best = P.argmax(1).tolist()
    return [
        (side, layer, k, float(P[layer, k]), float(cost[layer, k]), int(best[layer] == k))
        for layer in range(P.shape[0])
        for k in range(P.shape[1])
    ]


def bad_plan(P: Tensor) -> Tensor:
    """P with the source layers of every row shuffled: of `SHUFFLES` shuffles the one that least follows depth."""
    shuffles = []
    for seed in range(SHUFFLES):
        generator = torch.Generator().manual_seed(seed)
        shuffles.append(torch.stack([row[torch.randperm(len(row), generator=generator)] for row in P]))
    return min(shuffles, key=lambda shuffled: abs(depth_correlation(shuffled) or 0.0))


def _panel(values: Tensor, title: str, alt: str, path: bool = True) -> Panel:
    return Panel(lambda axes: draw(axes, values, title, values.argmax(1).tolist() if path else []), alt, SIZE)


def draw(axes: Axes, values: Tensor, title: str, path: Sequence[int]) -> None:
    """A matrix [L, M] as a heat map, target layers upwards, with a dot at column `path[l]` of every row l."""
    low, high = values.double().quantile(torch.tensor(SHOWN, dtype=torch.double)).tolist()
    axes.imshow(values.numpy(), origin="lower", vmin=low, vmax=high)
    if path:
        axes.plot(path, range(len(path)), "o", color=MARK, markersize=3, markeredgecolor=MARK_EDGE, mew=0.4)
    axes.set(title=title, xlabel="source layer", ylabel="target layer")
    axes.set_xlim(-0.5, values.shape[1] - 0.5)
    axes.set_ylim(-0.5, values.shape[0] - 0.5)
    whole_numbers(axes.xaxis)
    whole_numbers(axes.yaxis)
