#!/usr/bin/env python
"""Check the plans of a plan directory in float64, from its stored potentials and activations.

    python scripts/bench/plan_accuracy.py --plans runs/demo/plans [--pairs 60]

Per side this prints the largest L1 errors of the row and the column sums over some pairs of layers, chosen with a seed,
and for the pair of middle layers the total variation to POT's float64 log-domain plan at epsilon 0.1 and 0.03. The
costs are computed here in float64, apart from the solver's own.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import ot
import torch
from torch import Tensor
from tqdm.auto import tqdm

from core.fusion.projections import ATTENTION, planned_sides
from core.hot_transport import SinkhornResult, corr_distance_matrix, sinkhorn_uniform_streaming
from core.runs.plan_directory import PlanDirectory
from core.runs.plan_files import read_rows
from scripts.bench.peers import pot_plan, total_variation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plans", type=Path, default=Path("runs/demo/plans"), help="plan directory of stage 1")
    parser.add_argument("--pairs", type=int, default=60, help="pairs of layers per side (0: all)")
    arguments = parser.parse_args()
    plans = PlanDirectory(arguments.plans)
    L, M = plans.shape
    pairs = [(layer, m) for layer in range(L) for m in range(M)]
    if 0 < arguments.pairs < len(pairs):
        pairs = random.Random(0).sample(pairs, arguments.pairs)
    print(f"torch {torch.__version__}, POT {ot.__version__}, {torch.get_num_threads()} threads; {plans.folder}")
    print("side      pairs   rows L1   columns L1   TV to POT at 0.1   at 0.03   (n, m)")
    for side in planned_sides(ATTENTION):
        rows, columns = marginal_errors(plans, side, pairs)
        X, Y = rows_of_pair(plans, side, L // 2, M // 2)
        at_01, at_003 = (variation_to_pot(X, Y, epsilon) for epsilon in (0.1, 0.03))
        print(
            f"{side:8} {len(pairs):6} {rows:9.1e} {columns:12.1e} {at_01:18.1e} {at_003:9.1e}   "
            f"({X.shape[1]}, {Y.shape[1]})"
        )


def marginal_errors(plans: PlanDirectory, side: str, pairs: list[tuple[int, int]]) -> tuple[float, float]:
    """The largest L1 errors (of the rows, of the columns) of the stored plans of some pairs of layers."""
    rows, columns = 0.0, 0.0
    for layer, m in tqdm(pairs, desc=side, leave=False):
        C = cost64(*rows_of_pair(plans, side, layer, m))
        Q = plan64(plans.feature_result(side, layer, m), C)
        rows = max(rows, float((Q.sum(1) - 1 / Q.shape[0]).abs().sum()))
        columns = max(columns, float((Q.sum(0) - 1 / Q.shape[1]).abs().sum()))
    return rows, columns


def rows_of_pair(plans: PlanDirectory, side: str, layer: int, m: int) -> tuple[Tensor, Tensor]:
    """Activations of one target layer [T, n] and one source layer [T, m], as they are stored."""
    return read_rows(plans.folder, "target", side, layer), read_rows(plans.folder, "source", side, m)


def cost64(X: Tensor, Y: Tensor) -> Tensor:
    """1 - Pearson's correlation (Eq. 7), in float64; a constant neuron correlates 0 with every neuron."""
    x, y = (a.double() - a.double().mean(0) for a in (X, Y))
    x, y = (a / a.norm(dim=0).masked_fill(a.norm(dim=0) == 0, torch.inf) for a in (x, y))
    return 1 - x.T @ y


def plan64(result: SinkhornResult, C: Tensor) -> Tensor:
    """Q [n, m] in float64 from the potentials of a result and a cost computed apart from the solver's."""
    return torch.exp((result.f[:, None] + result.g - C) / result.reg)


def variation_to_pot(X: Tensor, Y: Tensor, epsilon: float) -> float:
    """Total variation between our plan and POT's."""
    C = cost64(X, Y)
    result = sinkhorn_uniform_streaming(corr_distance_matrix(X, Y), epsilon)
    return total_variation(plan64(result, C), pot_plan(C, epsilon))


if __name__ == "__main__":
    main()
