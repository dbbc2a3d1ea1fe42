#!/usr/bin/env python
"""Step time and memory of residual-frozen training against plain fine-tuning of the same target.

    python scripts/bench/training.py [--config scripts/experiments/demo.yaml] [--tokens 110] [--rows 1] [--rounds 40]

A step is forward, backward and AdamW on one batch, the same for all variants. In every round each variant makes one
step, in an order that rotates, because other programs on the machine slow some steps down. Step times are given as
ratios to the plain step of the same round. A second plain model shows how far from 1 a ratio gets by chance.

Peak memory is measured in a process of its own for each variant. W~ is random, because its values change neither time
nor memory.

The goals are at most 1.05 times the plain step with k = 128 and 1.15 times with all neurons (dense), and a peak at most
the residual and 2 % above that of plain fine-tuning.
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

# Variant -> neurons per projection that have a residual (0: all of them), or None for plain fine-tuning.
VARIANTS = {"plain": None, "k = 128": 128, "dense": 0, "plain again": None}
MIB = 2**20
# With these, glibc gives freed memory back at once. By default it keeps a reserve, whose size varies from run to run by
# more than the size of the residual.
RETURN_MEMORY = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def random_residuals(target: Checkpoint, k: int) -> list[Residual]:
    """For every projection a random W~, as large as W, on the first `k` (0: all) rows or columns."""
    residuals = []
    for layer in range(target.layout.n_layers):
        for name, projection in PROJECTIONS.items():
            weight, axis = target.weight(layer, name), projection.axis
            index = torch.arange(min(k or weight.shape[axis], weight.shape[axis]))
            original = weight.index_select(axis, index)
            transported = torch.randn_like(original) * original.std()
            residuals.append(Residual(layer, name, index, transported, None, original, None))
    return residuals


def trainable(target: Checkpoint, k: int | None) -> tuple[Any, torch.optim.Optimizer, int]:
    """(model, optimizer, bytes of the residual) of one variant."""
    model, size = target.load_model("float32").train(), 0
    if k is not None:
        residuals = random_residuals(target, k)
        size = sum(residual.weight.nbytes for residual in residuals)
        enable_hot_residual_for_model(model, residuals, target.layout.name, 0.1, "interpolate")
        set_trainable(model, "frozen_hot")
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6), size


def step(model: Any, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> float:
    """Make one update; its seconds."""
    start = time.perf_counter()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - start


def print_peak(target: Checkpoint, variant: str, ids: torch.Tensor) -> None:
    """Train one variant for three steps; print the peak memory of this process and the residual's size, in bytes."""
    model, optimizer, size = trainable(target, VARIANTS[variant])
    for _ in range(3):
        step(model, optimizer, ids)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, size)


def peak_of(variant: str) -> list[int]:
    """[peak memory, size of the residual] of a variant, in bytes, from this script in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--peak-of", variant]
    done = subprocess.run(command, env={**os.environ, **RETURN_MEMORY}, capture_output=True, text=True, check=True)
    return [int(number) for number in done.stdout.split()[-2:]]


def step_ratios(target: Checkpoint, ids: torch.Tensor, rounds: int) -> tuple[dict[str, list[float]], float]:
    """(variant -> ratio of its step to the plain one in every round, seconds of the last plain step)."""
    variants = {name: trainable(target, k)[:2] for name, k in VARIANTS.items()}
    ratios: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for number in range(rounds + 1):
        first = number % len(names)
        spent = {name: step(*variants[name], ids) for name in names[first:] + names[:first]}
        if number:  # the first round warms up
            for name, seconds in spent.items():
                ratios[name].append(seconds / spent["plain"])
    return ratios, spent["plain"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("scripts/experiments/demo.yaml"))
    parser.add_argument("--tokens", type=int, default=110, help="tokens per row")
    parser.add_argument("--rows", type=int, default=1, help="rows per batch")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peak-of", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    target = open_checkpoint(load_experiment(arguments.config)["target_model"])
    torch.manual_seed(0)
    ids = torch.randint(100, 1000, (arguments.rows, arguments.tokens))
    if arguments.peak_of:
        print_peak(target, arguments.peak_of, ids)
        return
    peaks = {name: peak_of(name) for name in VARIANTS}
    ratios, seconds = step_ratios(target, ids, arguments.rounds)
    print(f"{arguments.rows} rows of {arguments.tokens} tokens, {arguments.rounds} rounds")
    print(f"last plain step {seconds:.3f} s")
    plain = peaks["plain"][0]
    for name, (peak, residual) in peaks.items():
        low, middle, high = statistics.quantiles(ratios[name], n=4)
        print(
            f"{name:11} step {middle:.3f} of plain (quartiles {low:.3f} to {high:.3f}); peak {peak / MIB:.0f} MiB, "
            f"{(peak - plain) / MIB:+.0f} MiB, residual {residual / MIB:.0f} MiB + 2 % = "
            f"{(residual + 0.02 * plain) / MIB:.0f} MiB"
        )


if __name__ == "__main__":
    main()
