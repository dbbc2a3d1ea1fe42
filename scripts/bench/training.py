#!/usr/bin/env python
"""Step time and memory of residual-frozen training against plain fine-tuning of the same target.

    python scripts/bench/training.py [--config scripts/experiments/demo.yaml] [--tokens 110] [--rows 1] [--rounds 40]

A step is forward, backward and AdamW on the same batch. The variants take turns, in an order that rotates, so that what
else runs on the machine disturbs all of them; the ratio of each round is to plain fine-tuning in that round. A second
plain model shows what the machine's noise alone makes of a ratio. Peak memory is that of a process of
its own per variant. W~ is random: what it holds changes neither. Goals: 1.05 times (k = 128) and 1.15 times (dense),
memory the residual's and 2 % of plain fine-tuning's.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from core.fusion.projections import PROJECTIONS
from core.fusion.residual import Residual
from core.models.checkpoints import Checkpoint, open_checkpoint
from core.runs.command_line import load_experiment
from core.training.hot_linear import enable_hot_residual_for_model, set_trainable

VARIANTS = {"plain": None, "k = 128": 128, "dense": 0, "plain again": None}
MIB = 2**20
# What is freed goes back at once: the allocator's own reserve varies by more than the residual from run to run.
RETURN_MEMORY = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def random_residuals(target: Checkpoint, k: int) -> list[Residual]:
    """W~ as large as W on the first `k` (0: all) rows or columns of every projection."""
    out = []
    for layer in range(target.layout.n_layers):
        for projection, place in PROJECTIONS.items():
            weight, axis = target.weight(layer, projection), place.axis
            index = torch.arange(min(k or weight.shape[axis], weight.shape[axis]))
            original = weight.index_select(axis, index)
            transported = torch.randn_like(original) * original.std()
            out.append(Residual(layer, projection, index, transported, None, original, None))
    return out


def trainable(target: Checkpoint, k: int | None) -> tuple[Any, torch.optim.Optimizer, int]:
    """(model, optimizer, bytes of the residual)."""
    model, size = target.load_model("float32").train(), 0
    if k is not None:
        residuals = random_residuals(target, k)
        size = sum(r.weight.nbytes for r in residuals)
        enable_hot_residual_for_model(model, residuals, target.layout.name, 0.1, "interpolate")
        set_trainable(model, "frozen_hot")
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6), size


def step(model: Any, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> float:
    """Seconds of one update."""
    start = time.perf_counter()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("scripts/experiments/demo.yaml"))
    parser.add_argument("--tokens", type=int, default=110, help="per row")
    parser.add_argument("--rows", type=int, default=1, help="per batch")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peak-of", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    target = open_checkpoint(load_experiment(arguments.config)["target_model"])
    torch.manual_seed(0)
    ids = torch.randint(100, 1000, (arguments.rows, arguments.tokens))
    if arguments.peak_of:
        model, optimizer, size = trainable(target, VARIANTS[arguments.peak_of])
        for _ in range(3):
            step(model, optimizer, ids)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, size)
        return
    peaks = {}
    for name in VARIANTS:
        command = [sys.executable, __file__, *sys.argv[1:], "--peak-of", name]
        done = subprocess.run(command, env={**os.environ, **RETURN_MEMORY}, capture_output=True, text=True, check=True)
        peaks[name] = [int(n) for n in done.stdout.split()[-2:]]
    variants = {name: trainable(target, k)[:2] for name, k in VARIANTS.items()}
    ratios: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for number in range(arguments.rounds + 1):
        names = list(variants)
        turns = names[number % len(names) :] + names[: number % len(names)]
        spent = {name: step(*variants[name], ids) for name in turns}
        if number:  # the first warms up
            for name, seconds in spent.items():
                ratios[name].append(seconds / spent["plain"])
    print(
        f"{arguments.rows} rows of {arguments.tokens} tokens, {arguments.rounds} rounds; last plain step "
        f"{spent['plain']:.3f} s"
    )
    plain = peaks["plain"][0]
    for name, found in ratios.items():
        low, middle, high = statistics.quantiles(found, n=4)
        peak, residual = peaks[name]
        print(
            f"{name:11} step {middle:.3f} of plain (quartiles {low:.3f} to {high:.3f}); peak {peak / MIB:.0f} MiB, "
            f"{(peak - plain) / MIB:+.0f} MiB, residual {residual / MIB:.0f} MiB + 2 % = "
            f"{(residual + 0.02 * plain) / MIB:.0f} MiB"
        )


if __name__ == "__main__":
    main()
