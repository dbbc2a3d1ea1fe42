"""One pass over the neuron plans of matched layers: what the figures of Q show; nothing dense stays in memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from core.runs.plan_directory import PlanDirectory
from core.runs.plan_files import read_rows
from core.transport.correlation import standardize
from evaluation.figures.layer_plans import plan_of, sides_of

# Blocks of the reordered plan along each side, matches that are listed, and neurons whose activations are drawn.
BLOCKS = 40
MATCHES = 8
SCATTERS = 3
POINTS = 120
# Multiply-adds of all correlations together, T n m per pair. Where all matched pairs cost more, layers are left out at
# equal distances, so that the report of large models takes minutes and not hours. It is enough for all layers of the
# demo pair with all seven projections.
WORK = 6e11
# At how many k the mass is told.
MASS_STEPS = 48


@dataclass(frozen=True)
class Match:
    """Two matched neurons.

    Attributes:
        target, source: their numbers.
        correlation: of their activations.
        share: of the target neuron's mass that goes to the source neuron.
        points: [2, p] z-scored activations of the two on some rows; empty for all but the first matches.
    """

    target: int
    source: int
    correlation: float
    share: float
    points: Tensor


@dataclass(frozen=True)
class Pair:
    """The neuron plan Q [n, m] of a target layer with the source layer that P matches to it.

    Attributes:
        side, target_layer, source_layer: which plan it is.
        shape: (n, m).
        blocks: [h, w] mean of Q over blocks of the reordered plan, in units of the uniform plan 1 / (n m).
        matches: the largest entries of Q, no neuron twice.
        mass: (k, share of the mass in the k largest entries of Q), for some k from 1 to n m (the paper's Figure 3).
    """

    side: str
    target_layer: int
    source_layer: int
    shape: tuple[int, int]
    blocks: Tensor
    matches: list[Match]
    mass: list[tuple[int, float]]


def matched_pairs(plans: PlanDirectory) -> Iterator[Pair]:
    """One plan per side and target layer that is read (`layers_to_read`), each with the source layer that has most of
    the layer's mass in P."""
    sides = sides_of(plans)
    for side in sides:
        matched = plan_of(plans, side)[0].argmax(1).tolist()
        for layer in layers_to_read(plans, side, len(sides)):
            yield read_pair(plans, side, layer, matched[layer])


def layers_to_read(plans: PlanDirectory, side: str, n_sides: int) -> list[int]:
    """The target layers whose plan is read: all of them, or as many as `WORK` allows, at equal distances."""
    target, source = (read_rows(plans.folder, model, side, 0) for model in ("target", "source"))
    cost = target.numel() * source.shape[1]
    layers = plans.shape[0]
    count = max(1, min(layers, int(WORK / n_sides / cost)))
    return sorted({round(position * (layers - 1) / max(1, count - 1)) for position in range(count)})


def read_pair(plans: PlanDirectory, side: str, target_layer: int, source_layer: int) -> Pair:
    """The plan of one pair of layers, reduced to what is shown of it."""
    Q = plans.feature_result(side, target_layer, source_layer).plan()
    found = strongest(Q, MATCHES)
    of_target, of_source = zip(*found, strict=True)
    x = standardize(read_rows(plans.folder, "target", side, target_layer)[:, list(of_target)])  # [T, matches]
    y = standardize(read_rows(plans.folder, "source", side, source_layer)[:, list(of_source)])
    matches = [
        Match(
            i,
            j,
            float(x[:, number] @ y[:, number]),
            float(Q[i, j]) * len(Q),
            points_of(x[:, number], y[:, number]) if number < SCATTERS else torch.empty(2, 0),
        )
        for number, (i, j) in enumerate(found)
    ]
    n, m = Q.shape
    return Pair(side, target_layer, source_layer, (n, m), blocks_of(Q), matches, mass_curve(Q))


def strongest(Q: Tensor, count: int) -> list[tuple[int, int]]:
    """The largest entries of Q, from the largest on, without naming a row or a column twice."""
    left = Q.clone()
    found = []
    for _ in range(min(count, *Q.shape)):
        i, j = divmod(int(left.argmax()), Q.shape[1])
        found.append((i, j))
        left[i] = left[:, j] = -1
    return found


def mass_curve(Q: Tensor) -> list[tuple[int, float]]:
    """(k, share of the mass in the k largest entries), for at most `MASS_STEPS` k from 1 to all, evenly in log k."""
    size = Q.numel()
    cumulated = Q.flatten().double().sort(descending=True).values.cumsum(0)
    steps = {round(math.exp(step * math.log(size) / (MASS_STEPS - 1))) for step in range(MASS_STEPS)}
    return [(k, float(cumulated[k - 1] / cumulated[-1])) for k in sorted(steps)]


def blocks_of(Q: Tensor) -> Tensor:
    """Q [n, m] in the order of `co_clustered`, averaged over at most BLOCKS x BLOCKS blocks, 1 where Q is uniform."""
    rows, columns = co_clustered(Q)
    ordered = (Q[rows][:, columns] * Q.numel())[None, None]
    return F.adaptive_avg_pool2d(ordered, (min(BLOCKS, len(Q)), min(BLOCKS, Q.shape[1])))[0, 0]


def co_clustered(Q: Tensor) -> tuple[Tensor, Tensor]:
    """Orders of the rows [n] and columns [m] of Q in which neurons with similar partners stand together.

    Spectral co-clustering (Dhillon, 2001): both marginals are uniform, so the first singular vectors are constant, and
    the second ones, the first of Q minus its mean, place every row and every column on a line. A decomposition leaves
    their sign open; here the first row comes before the last one.
    """
    deviation = (Q - Q.mean()).double()
    U, _, Vh = torch.linalg.svd(deviation, full_matrices=False) if min(Q.shape) <= 64 else _leading(deviation)
    u, v = U[:, 0], Vh[0]
    if u[0] > u[-1]:
        u, v = -u, -v
    return u.argsort(stable=True), v.argsort(stable=True)


def _leading(deviation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular vectors of a large matrix, by power iterations from the row with the largest norm."""
    v = deviation[deviation.norm(dim=1).argmax()]
    for _ in range(60):
        u = deviation @ (v / v.norm())
        v = deviation.T @ (u / u.norm())
    return u[:, None], v.norm()[None], (v / v.norm())[None]


def points_of(x: Tensor, y: Tensor) -> Tensor:
    """Two standardised columns [T] as z-scores [2, p], on rows at equal distances."""
    chosen = torch.linspace(0, len(x) - 1, min(POINTS, len(x))).round().long()
    return torch.stack([x[chosen], y[chosen]]) * math.sqrt(len(x) - 1)
