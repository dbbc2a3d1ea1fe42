#!/usr/bin/env python
"""Peak memory of one 4096 x 8192 transport problem, beyond what its inputs take.

    python scripts/bench/transport_memory.py [--threads 2]

The peak is the kernel's own high-water mark, set back before the solve, so this runs on Linux only. It needs a process
of its own, because memory that other work has freed would be taken again without being counted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from core.hot_transport import SinkhornResult, sinkhorn_uniform_streaming, standardize
from core.transport.layer_pairs import solve_layer
from core.transport.problem import SinkhornSettings

N, M, ROWS = 4096, 8192, 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    torch.set_num_threads(parser.parse_args().threads)
    settings = SinkhornSettings(0.1)
    zx, zy = standardize(torch.randn(ROWS, N)), standardize(torch.randn(ROWS, M))
    sinkhorn_uniform_streaming(torch.rand(64, 48), 0.1)  # the libraries take memory of their own at their first call
    list(solve_layer(zx[:, :64], [zy[:, :48]], settings))
    report("stage 1, from activations (C included)", lambda: next(solve_layer(zx, [zy], settings)))
    C = 1 - zx.T @ zy
    report("sinkhorn_uniform_streaming(C)", lambda: sinkhorn_uniform_streaming(C, 0.1))


def report(name: str, solve: Callable[[], SinkhornResult]) -> None:
    """Print the peak memory of a solve, in MiB and relative to the size of one K."""
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    converged = solve().converged
    used, K = memory("VmHWM") - before, N * M * 4 / 2**20
    print(
        f"{N}x{M}, {name}: {used:.0f} MiB beyond the inputs, {used / K:.2f} of one K ({K:.0f} MiB); "
        f"converged {converged}"
    )


def memory(key: str) -> float:
    """MiB that the kernel gives for this process: resident now (`VmRSS`), or the most so far (`VmHWM`)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


if __name__ == "__main__":
    main()
