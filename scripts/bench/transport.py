#!/usr/bin/env python
"""Accuracy, speed and memory of the Sinkhorn solver against POT and geomloss, each ratio measured in one process.

    python scripts/bench/transport.py --plans runs/demo/plans [--only accuracy|speed|pairs|memory|scale] [--threads 2]

The problems are real: sides of the plan directory, and for larger ones the neurons of several of its layers joined. A
peer does the fewest iterations at which its L1 marginal error is at most 1e-6, as ours is (its own test uses another
norm), and POT runs with both its numpy and its torch backend. `geomloss` is used where it is installed.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np
import ot
import torch
from torch import Tensor

from core.fusion.projections import ATTENTION, planned_sides
from core.hot_transport import SinkhornResult, corr_distance_matrix, sinkhorn_uniform_streaming, standardize
from core.runs.plan_directory import PlanDirectory
from core.runs.plan_files import read_rows
from core.transport.layer_pairs import solve_layer
from core.transport.problem import SinkhornSettings
from scripts.bench.peers import pot_call, pot_iterations, pot_plan, total_variation
from scripts.bench.timing import machine_bound, median_times, seconds

EPSILONS = (0.1, 0.03)
# Rows per layer of `pairs` and `scale`.
ROWS = 256


def main() -> None:
    parts = {"accuracy": accuracy, "speed": speed, "pairs": pairs, "memory": memory, "scale": scale}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plans", type=Path, default=Path("runs/demo/plans"), help="plan directory of stage 1")
    parser.add_argument("--only", choices=parts, help="one part instead of all")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5, help="rounds that a median time is taken over")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    versions = f"torch {torch.__version__}, POT {ot.__version__}, numpy {np.__version__}, {platform.machine()}"
    print(f"{versions}; {torch.get_num_threads()} threads")
    plans = PlanDirectory(arguments.plans)
    for name, part in parts.items():
        if arguments.only in (None, name):
            print(f"\n# {name}")
            part(plans, arguments.repeats)


def layers(plans: PlanDirectory, side: str, rows: int | None = None) -> tuple[list[Tensor], list[Tensor]]:
    """Activations [T, n] of all target layers and [T, m] of all source layers of one side, or their first rows."""
    L, M = plans.shape
    X, Y = (
        [read_rows(plans.folder, model, side, k)[:rows] for k in range(n)]
        for model, n in (("target", L), ("source", M))
    )
    return X, Y


def joined_cost(plans: PlanDirectory, n: int, m: int, rows: int = 1024) -> Tensor:
    """Cost [n, m] between the first n and m neurons when all layers of `attn_in` stand side by side."""
    X, Y = layers(plans, "attn_in", rows)
    return corr_distance_matrix(torch.cat(X, 1)[:, :n].contiguous(), torch.cat(Y, 1)[:, :m].contiguous())


def accuracy(plans: PlanDirectory, _repeats: int) -> None:
    """Print errors against POT's float64 log-domain plan."""
    problems = {}
    for side in planned_sides(ATTENTION):
        X, Y = layers(plans, side)
        problems[side] = corr_distance_matrix(X[len(X) // 2], Y[len(Y) // 2])
        problems[f"{side}, first layers"] = corr_distance_matrix(X[0], Y[0])
    problems["uniform noise"] = torch.rand(300, 500, generator=torch.Generator().manual_seed(0)) * 2
    print(f"{'problem':22} epsilon  iterations  solver        marginal L1  TV to POT  cost difference")
    for name, C in problems.items():
        for reg in EPSILONS:
            result = sinkhorn_uniform_streaming(C, reg)
            error, Q = marginal_error(result, C)
            reference = pot_plan(C, reg, 50000, 1e-13)
            difference = abs(result.cost - float((reference * C).sum()))
            print(
                f"{name:22} {reg:7} {result.n_iters:10}  {result.solver:12} {error:12.1e} "
                f"{total_variation(Q, reference):10.1e} {difference:16.1e}"
            )


def marginal_error(result: SinkhornResult, C: Tensor) -> tuple[float, Tensor]:
    """(the larger L1 marginal error, Q [n, m]), both from the potentials in float64."""
    Q = torch.exp((result.f[:, None] + result.g - C.double()) / result.reg)
    n, m = Q.shape
    return max(float((Q.sum(1) - 1 / n).abs().sum()), float((Q.sum(0) - 1 / m).abs().sum())), Q


def speed(plans: PlanDirectory, repeats: int) -> None:
    """Print how long one problem takes, from C in memory to potentials, and how many times longer the peers take."""
    X, Y = layers(plans, "q")
    problems = {
        "q middle": corr_distance_matrix(X[len(X) // 2], Y[len(Y) // 2]),
        "q first": corr_distance_matrix(X[0], Y[0]),
        "joined": joined_cost(plans, 2048, 4096),
    }
    for name, C in problems.items():
        for reg in EPSILONS:
            print(f"{name:9} {C.shape[0]}x{C.shape[1]} epsilon {reg}: {compare_speed(C, reg, repeats)}")


def compare_speed(C: Tensor, reg: float, repeats: int) -> str:
    """Our time, our iterations and those of the plain iteration, and the time of each peer over ours."""
    plain = pot_iterations(C, reg)
    pot = partial(pot_call, C, reg)
    functions: dict[str, Callable[[], Any]] = {
        "ours": partial(sinkhorn_uniform_streaming, C, reg),
        "POT torch": partial(pot, "sinkhorn", "torch", plain),
        "POT numpy": partial(pot, "sinkhorn", "numpy", plain),
    }
    slow: dict[str, Callable[[], Any]] = {"POT log": partial(pot, "sinkhorn_log", "torch", plain)}
    try:
        from geomloss import ot as geomloss  # an optional peer
    except ModuleNotFoundError:
        pass
    else:
        slow["geomloss"] = partial(geomloss.solve, C, reg=reg, max_iter=plain)
    times = median_times(functions, repeats, burst=5)
    ours = times.pop("ours")
    ratios = [f"{peer} {time / ours:.2f}x" for peer, time in times.items()]
    ratios += [f"{peer} {time / ours:.1f}x" for peer, time in median_times(slow, 1, burst=5).items()]
    iterations = sinkhorn_uniform_streaming(C, reg).n_iters
    return f"{1000 * ours:.1f} ms, {iterations} iterations (plain {plain}); time of peer / ours: {', '.join(ratios)}"


@dataclass
class Work:
    """What solving some problems from activations takes: their number, iterations, and the work for the machine."""

    problems: int = 0
    iterations: int = 0
    flops: float = 0.0
    entries: float = 0.0
    reads: float = 0.0

    def add(self, result: SinkhornResult) -> None:
        """Count one problem: the product that makes its cost, an exp per entry, one read of K per iteration."""
        size = float(len(result.f) * len(result.g))
        self.problems += 1
        self.iterations += result.n_iters
        self.flops += 2 * ROWS * size
        self.entries += size
        self.reads += 4 * size * result.n_iters


def pairs(plans: PlanDirectory, _repeats: int) -> None:
    """Print how long all problems of the pair take, C included, against a loop over POT and the machine's bound."""
    sides = [layers(plans, side, ROWS) for side in planned_sides(ATTENTION)]
    for reg in EPSILONS:
        settings, work, ours = SinkhornSettings(reg), Work(), 0.0
        peers = dict.fromkeys(("torch", "numpy"), 0.0)
        for X, Y in sides:
            Zx, Zy = [standardize(x) for x in X], [standardize(y) for y in Y]
            ours += our_seconds(Zx, Zy, settings, work)
            for backend, time in pot_loop_seconds(Zx, Zy, reg).items():
                peers[backend] += time
        bound = machine_bound(work.flops, work.entries, work.reads)
        ratios = ", ".join(f"POT {backend} {time:.1f} s ({time / ours:.2f}x)" for backend, time in peers.items())
        print(
            f"epsilon {reg}: {work.problems} problems, {work.iterations / work.problems:.1f} iterations each: ours "
            f"{ours:.1f} s; loop over {ratios}; bound of this machine {bound:.1f} s (ours / bound {ours / bound:.2f})"
        )


def our_seconds(Zx: list[Tensor], Zy: list[Tensor], settings: SinkhornSettings, work: Work) -> float:
    """Seconds of our solver for all problems of one side, which are added to `work`."""
    results: list[SinkhornResult] = []
    spent = seconds(lambda: results.extend(result for zx in Zx for result in solve_layer(zx, Zy, settings)))
    for result in results:
        work.add(result)
    return spent


def pot_loop_seconds(Zx: list[Tensor], Zy: list[Tensor], reg: float) -> dict[str, float]:
    """Seconds of POT's backends for all problems of one side, C included.

    Each target layer is timed with one source layer, another one each time, and the time is scaled up to all of them.
    """
    chosen = [(zx, Zy[(7 * layer) % len(Zy)]) for layer, zx in enumerate(Zx)]
    needed = [pot_iterations(1 - zx.T @ zy, reg) for zx, zy in chosen]

    def loop(backend: str) -> None:
        for (zx, zy), n_iters in zip(chosen, needed, strict=True):
            C = torch.from_numpy(1 - zx.numpy().T @ zy.numpy()) if backend == "numpy" else 1 - zx.T @ zy
            pot_call(C, reg, "sinkhorn", backend, n_iters)

    return {backend: len(Zy) * seconds(partial(loop, backend)) for backend in ("torch", "numpy")}


def memory(_plans: PlanDirectory, _repeats: int) -> None:
    """Print the peak memory of one 4096 x 8192 problem, which a process of its own measures."""
    script = Path(__file__).with_name("transport_memory.py")
    sys.stdout.flush()
    subprocess.run([sys.executable, script, "--threads", str(torch.get_num_threads())], check=True)


def scale(_plans: PlanDirectory, repeats: int) -> None:
    """Print whether one problem of ten iterations takes time in proportion to n m, and all of them to L M."""
    generator, settings = torch.Generator().manual_seed(0), SinkhornSettings(0.1, 10, mode="paper")

    def problems(L: int, M: int, n: int, m: int) -> Callable[[], None]:
        Zx, Zy = (
            [standardize(torch.randn(ROWS, size, generator=generator)) for _ in range(count)]
            for count, size in ((L, n), (M, m))
        )

        def solve() -> None:
            for zx in Zx:
                for _ in solve_layer(zx, Zy, settings):
                    pass

        return solve

    sizes = ((1024, 2048), (2048, 4096), (4096, 8192))
    grids = ((4, 6), (8, 12), (16, 24))
    single = {f"{n}x{m}": (problems(1, 1, n, m), n * m) for n, m in sizes}
    many = {f"{L}x{M} layers": (problems(L, M, 576, 896), L * M) for L, M in grids}
    for what, unit, cases in (("problem", "n m", single), ("total", "L M", many)):
        times = median_times({name: solve for name, (solve, _) in cases.items()}, repeats)
        rates = {name: times[name] / size for name, (_, size) in cases.items()}
        middle = statistics.mean(rates.values())
        relative = ", ".join(f"{name} {rate / middle:.2f}" for name, rate in rates.items())
        print(f"{what}: time over {unit}, relative to the mean of the three: {relative}")


if __name__ == "__main__":
    main()
