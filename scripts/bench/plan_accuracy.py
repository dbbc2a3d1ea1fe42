#!/usr/bin/env python
"""Check the plans of a plan directory in float64, from its stored potentials and activations.

    python scripts/bench/plan_accuracy.py --plans runs/demo/plans [--pairs 60]

Prints, per side, the largest L1 marginal errors over seeded pairs of layers, and the total variation to POT's float64
log-domain plan for the middle pair at epsilon 0.1 and 0.03.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np
import ot
import torch
from safetensors import safe_open
from torch import Tensor
from tqdm.auto import tqdm

from core.fusion.projections import ATTENTION, planned_sides
from core.hot_transport import corr_distance_matrix, sinkhorn_uniform_streaming
from core.runs.plan_directory import PlanDirectory
from core.runs.plan_files import activations_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plans", type=Path, default=Path("runs/demo/plans"))
    parser.add_argument("--pairs", type=int, default=60, help="pairs of layers per side (0: all)")
    arguments = parser.parse_args()
    plans = PlanDirectory(arguments.plans)
    L, M = plans.shape
    everything = [(layer, m) for layer in range(L) for m in range(M)]
    print(f"torch {torch.__version__}, POT {ot.__version__}, {torch.get_num_threads()} threads; {plans.folder}")
    print("side      pairs   rows L1   columns L1   TV to POT at 0.1   at 0.03   (n, m)")
    for side in planned_sides(ATTENTION):
        pairs = everything if arguments.pairs in (0, L * M) else random.Random(0).sample(everything, arguments.pairs)
        rows, columns = 0.0, 0.0
        for layer, m in tqdm(pairs, desc=side, leave=False):
            Q = stored_plan(plans, side, layer, m)
            rows = max(rows, float((Q.sum(1) - 1 / Q.shape[0]).abs().sum()))
            columns = max(columns, float((Q.sum(0) - 1 / Q.shape[1]).abs().sum()))
        X, Y = raw(plans, "target", side, L // 2), raw(plans, "source", side, M // 2)
        variation = [total_variation(X, Y, epsilon) for epsilon in (0.1, 0.03)]
        print(
            f"{side:8} {len(pairs):6} {rows:9.1e} {columns:12.1e} {variation[0]:18.1e} {variation[1]:9.1e}   "
            f"({X.shape[1]}, {Y.shape[1]})"
        )


def raw(plans: PlanDirectory, model: str, side: str, layer: int) -> Tensor:
    """Rows as stored."""
    with safe_open(activations_file(plans.folder, model), "pt") as file:
        return file.get_tensor(f"{side}.{layer}").float()


def cost64(X: Tensor, Y: Tensor) -> Tensor:
    """1 - Pearson by numpy's definition, float64; constant neurons cost 1."""
    x, y = (a.double() - a.double().mean(0) for a in (X, Y))
    x, y = (a / a.norm(dim=0).masked_fill(a.norm(dim=0) == 0, np.inf) for a in (x, y))
    return 1 - x.T @ y


def stored_plan(plans: PlanDirectory, side: str, layer: int, m: int) -> Tensor:
    """Q in float64 from the stored potentials and a cost computed apart from the solver's."""
    result = plans.feature_result(side, layer, m)
    C = cost64(raw(plans, "target", side, layer), raw(plans, "source", side, m))
    return torch.exp((result.f[:, None] + result.g - C) / plans.reg)


def total_variation(X: Tensor, Y: Tensor, epsilon: float) -> float:
    """Half the L1 distance between our plan and POT's."""
    C = cost64(X, Y)
    result = sinkhorn_uniform_streaming(corr_distance_matrix(X, Y), epsilon)
    Q = torch.exp((result.f[:, None] + result.g - C) / epsilon).numpy()
    n, m = C.shape
    reference = ot.sinkhorn(np.full(n, 1 / n), np.full(m, 1 / m), C.numpy(), epsilon, "sinkhorn_log", 20000, 1e-12)
    return float(np.abs(Q - reference).sum() / 2)


if __name__ == "__main__":
    main()
