#!/usr/bin/env python
"""Accuracy, speed and memory of the Sinkhorn solver against POT and geomloss, each ratio measured in one process.

    python scripts/bench/transport.py --plans runs/demo/plans [--only accuracy|speed|pairs|memory|scale] [--threads 2]

Real problems are sides of the plan directory; larger ones join the neurons of several of its layers. A peer gets the
fewest iterations at which its recomputed L1 marginal error is at most 1e-6 (its own test is another norm), and POT the
faster of its numpy and torch backends. `geomloss` is optional.
"""

from __future__ import annotations

import argparse
import itertools
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
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
from core.hot_transport import corr_distance_matrix, solve_layer, standardize
from core.runs.plan_directory import PlanDirectory
from core.runs.plan_files import read_rows
from core.transport.sinkhorn import sinkhorn_uniform_streaming

TOLERANCE = 1e-6
# Threads of the library that ran last spin for a while: without a pause they would slow the next one down.
PAUSE_S = 0.1
PARTS = ("accuracy", "speed", "pairs", "memory", "scale")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plans", type=Path, default=Path("runs/demo/plans"))
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    versions = f"torch {torch.__version__}, POT {ot.__version__}, numpy {np.__version__}, {platform.machine()}"
    print(f"{versions}; {torch.get_num_threads()} threads")
    plans = PlanDirectory(arguments.plans)
    for part in PARTS if arguments.only is None else (arguments.only,):
        print(f"\n# {part}")
        {"accuracy": accuracy, "speed": speed, "pairs": pairs, "memory": memory, "scale": scale}[part](
            plans, arguments.repeats
        )


def layers(plans: PlanDirectory, side: str, rows: int | None = None) -> tuple[list[Tensor], list[Tensor]]:
    """Rows of all target and all source layers of one side."""
    L, M = plans.shape
    X, Y = (
        [read_rows(plans.folder, model, side, k)[:rows] for k in range(n)]
        for model, n in (("target", L), ("source", M))
    )
    return X, Y


def joined_cost(plans: PlanDirectory, n: int, m: int, rows: int = 1024) -> Tensor:
    """Cost [n, m] between the first n and m neurons of all layers of `attn_in`, side by side."""
    X, Y = layers(plans, "attn_in", rows)
    return corr_distance_matrix(torch.cat(X, 1)[:, :n].contiguous(), torch.cat(Y, 1)[:, :m].contiguous())


def marginal_error(f: Tensor, g: Tensor, C: Tensor, reg: float) -> tuple[float, Tensor]:
    """(larger L1 marginal error, Q), both from potentials in float64."""
    Q = torch.exp((f.double()[:, None] + g.double() - C.double()) / reg)
    n, m = Q.shape
    return max(float((Q.sum(1) - 1 / n).abs().sum()), float((Q.sum(0) - 1 / m).abs().sum())), Q


def accuracy(plans: PlanDirectory, _repeats: int) -> None:
    """Errors against POT's float64 log-domain plan."""
    generator = torch.Generator().manual_seed(0)
    problems = {}
    for side in planned_sides(ATTENTION):
        X, Y = layers(plans, side)
        problems[side] = corr_distance_matrix(X[len(X) // 2], Y[len(Y) // 2])
        problems[f"{side}, first layers"] = corr_distance_matrix(X[0], Y[0])
    problems["uniform noise"] = torch.rand(300, 500, generator=generator) * 2
    print(f"{'problem':22} epsilon  iterations  solver        marginal L1  TV to POT  cost difference")
    for name, C in problems.items():
        for reg in (0.1, 0.03):
            result = sinkhorn_uniform_streaming(C, reg)
            error, Q = marginal_error(result.f, result.g, C, reg)
            n, m = C.shape
            a, b = np.full(n, 1 / n), np.full(m, 1 / m)
            exact = ot.sinkhorn(a, b, C.double().numpy(), reg, "sinkhorn_log", 50000, 1e-13)
            reference = torch.from_numpy(exact)
            variation = float((Q - reference).abs().sum() / 2)
            difference = abs(result.cost - float((reference * C).sum()))
            print(
                f"{name:22} {reg:7} {result.n_iters:10}  {result.solver:12} {error:12.1e} {variation:10.1e} "
                f"{difference:16.1e}"
            )


def median_times(functions: dict[str, Callable[[], Any]], repeats: int, burst: int = 1) -> dict[str, float]:
    """Median seconds of each function, run in turn so that drift meets all alike; `burst` calls are timed together, as
    the job is thousands of problems in a row."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            time.sleep(PAUSE_S)
            start = time.perf_counter()
            for _ in range(burst):
                function()
            if repeat:  # the first round warms up
                times[name].append((time.perf_counter() - start) / burst)
    return {name: statistics.median(values) for name, values in times.items()}


def pot_call(C: Tensor, reg: float, method: str, numpy: bool, n_iters: int) -> Any:
    """One POT solve with its log, exactly `n_iters` iterations."""
    n, m = C.shape
    a, b = torch.full((n,), 1 / n, dtype=C.dtype), torch.full((m,), 1 / m, dtype=C.dtype)
    arguments = [x.numpy() for x in (a, b, C)] if numpy else [a, b, C]
    return ot.sinkhorn(*arguments, reg, method, n_iters, 0.0, log=True, warn=False)[1]


def pot_iterations(C: Tensor, reg: float, method: str) -> int:
    """Fewest POT iterations with an L1 marginal error of at most 1e-6 (float64 iteration of the same order)."""
    K = torch.exp(-C.double() / reg)
    n, m = K.shape
    u, done = torch.full((n,), 1 / n, dtype=torch.float64), 0
    while done < 5000:
        v = 1 / (m * (u @ K))
        u = 1 / (n * (K @ v))
        done += 1
        if float((v * (u @ K) - 1 / m).abs().sum()) <= TOLERANCE:
            break
    return done


def speed(plans: PlanDirectory, repeats: int) -> None:
    """Seconds from C in memory to potentials."""
    try:
        from geomloss import ot as geomloss
    except ModuleNotFoundError:
        geomloss = None
    X, Y = layers(plans, "q")
    problems = {
        "q middle": corr_distance_matrix(X[len(X) // 2], Y[len(Y) // 2]),
        "q first": corr_distance_matrix(X[0], Y[0]),
        "joined": joined_cost(plans, 2048, 4096),
    }
    for name, C in problems.items():
        for reg in (0.1, 0.03):
            ours = sinkhorn_uniform_streaming(C, reg)
            n_pot = pot_iterations(C, reg, "sinkhorn")
            functions: dict[str, Callable[[], Any]] = {
                "ours": partial(sinkhorn_uniform_streaming, C, reg),
                "POT torch": partial(pot_call, C, reg, "sinkhorn", False, n_pot),
                "POT numpy": partial(pot_call, C, reg, "sinkhorn", True, n_pot),
            }
            slow: dict[str, Callable[[], Any]] = {"POT log": partial(pot_call, C, reg, "sinkhorn_log", False, n_pot)}
            if geomloss is not None:
                slow["geomloss"] = partial(geomloss.solve, C, reg=reg, max_iter=n_pot)
            fast = median_times(functions, repeats, burst=5)
            line = [f"{key} {seconds / fast['ours']:.2f}x" for key, seconds in fast.items() if key != "ours"]
            slowly = median_times(slow, 1, burst=5)
            line += [f"{key} {seconds / fast['ours']:.1f}x" for key, seconds in slowly.items()]
            print(
                f"{name:9} {C.shape[0]}x{C.shape[1]} epsilon {reg}: {1000 * fast['ours']:.1f} ms, "
                f"{ours.n_iters} iterations (plain {n_pot}); time of peer / ours: {', '.join(line)}"
            )


def pairs(plans: PlanDirectory, _repeats: int) -> None:
    """All problems of the pair with 256 rows, C included, against a loop over POT and the bound of the machine."""
    sides = {side: layers(plans, side, 256) for side in planned_sides(ATTENTION)}
    for reg in (0.1, 0.03):
        total, iterations, ours = 0, 0, 0.0
        reads = entries = flops = 0.0
        peers = {"POT torch": 0.0, "POT numpy": 0.0}
        for X, Y in sides.values():
            Zx, Zy = [standardize(x) for x in X], [standardize(y) for y in Y]
            time.sleep(PAUSE_S)
            start = time.perf_counter()
            results = [list(solve_layer(zx, Zy, reg)) for zx in Zx]
            ours += time.perf_counter() - start
            for result in itertools.chain.from_iterable(results):
                size = float(len(result.f) * len(result.g))
                total, iterations = total + 1, iterations + result.n_iters
                entries, reads, flops = entries + size, reads + 4 * size * result.n_iters, flops + 512 * size
            chosen = [(layer, (7 * layer) % len(Zy)) for layer in range(len(Zx))]  # one in every len(Zy), scaled up
            needed = [pot_iterations(1 - Zx[k].T @ Zy[m], reg, "sinkhorn") for k, m in chosen]
            for peer in peers:
                numpy = peer == "POT numpy"
                time.sleep(PAUSE_S)
                start = time.perf_counter()
                for (k, m), n_pot in zip(chosen, needed, strict=True):
                    C = torch.from_numpy(1 - Zx[k].numpy().T @ Zy[m].numpy()) if numpy else 1 - Zx[k].T @ Zy[m]
                    pot_call(C, reg, "sinkhorn", numpy, n_pot)
                peers[peer] += (time.perf_counter() - start) * len(Zy)
        bound = machine_bound(flops, entries, reads)
        ratios = ", ".join(f"{peer} {seconds:.1f} s ({seconds / ours:.2f}x)" for peer, seconds in peers.items())
        print(
            f"epsilon {reg}: {total} problems, {iterations / total:.1f} iterations each: ours {ours:.1f} s; loop "
            f"over {ratios}; bound of this machine {bound:.1f} s (ours / bound {ours / bound:.2f})"
        )


def machine_bound(flops: float, entries: float, reads: float) -> float:
    """Seconds for the matrix products of C, one exp per entry, and one read of K per iteration, at the rates that the
    faster of numpy and torch reaches here."""
    A, B, K = torch.rand(576, 256), torch.rand(256, 896), torch.rand(576, 896)
    v, out = torch.rand(896), torch.empty(576, 896)
    a, b, k, x, o = (tensor.numpy() for tensor in (A, B, K, v, out))
    repeat = 50
    kernels: dict[str, Callable[[], Any]] = {
        "gemm numpy": lambda: [np.matmul(a, b, out=o) for _ in range(repeat)],
        "exp numpy": lambda: [np.exp(k, out=o) for _ in range(repeat)],
        "read numpy": lambda: [k @ x for _ in range(repeat)],
        "gemm torch": lambda: [torch.mm(A, B, out=out) for _ in range(repeat)],
        "exp torch": lambda: [torch.exp(K, out=out) for _ in range(repeat)],
        "read torch": lambda: [K @ v for _ in range(repeat)],
    }
    times = median_times(kernels, 3)
    per = {name: min(times[f"{name} numpy"], times[f"{name} torch"]) / repeat for name in ("gemm", "exp", "read")}
    return (
        flops * per["gemm"] / (2 * 576 * 256 * 896)
        + entries * per["exp"] / K.numel()
        + reads * per["read"] / (4 * K.numel())
    )


MEMORY = """
import sys, torch
from core.hot_transport import solve_layer, standardize
from core.transport.sinkhorn import sinkhorn_uniform_streaming

def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) / 1024

def peak(work):  # MiB beyond what is there before: the kernel's high-water mark, set back first
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = status("VmRSS")
    result = work()
    return status("VmHWM") - before, result.converged

torch.set_num_threads(int(sys.argv[1]))
n, m = 4096, 8192
zx, zy = standardize(torch.randn(256, n)), standardize(torch.randn(256, m))
small = torch.rand(64, 48)
sinkhorn_uniform_streaming(small, 0.1), list(solve_layer(zx[:, :64], [zy[:, :48]], 0.1))  # libraries warm up
print(*peak(lambda: list(solve_layer(zx, [zy], 0.1))[0]))
C = 1 - zx.T @ zy
print(*peak(lambda: sinkhorn_uniform_streaming(C, 0.1)))
"""


def memory(_plans: PlanDirectory, _repeats: int) -> None:
    """Peak resident memory of one 4096 x 8192 problem, over the process that holds its inputs already."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(torch.get_num_threads())],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).resolve().parents[2],
    )
    K = 4096 * 8192 * 4 / 2**20
    names = ("stage 1, from activations (C included)", "sinkhorn_uniform_streaming(C)")
    for name, line in zip(names, done.stdout.splitlines(), strict=True):
        used, converged = line.split()
        print(
            f"4096x8192, {name}: {float(used):.0f} MiB beyond the inputs, {float(used) / K:.2f} of one K "
            f"({K:.0f} MiB); converged {converged}"
        )


def scale(_plans: PlanDirectory, repeats: int) -> None:
    """Whether the time per problem grows with n m, and the total with L M (ten iterations, products included)."""
    generator = torch.Generator().manual_seed(0)

    def activations(layers: int, size: int) -> list[Tensor]:
        return [standardize(torch.randn(256, size, generator=generator)) for _ in range(layers)]

    def solve(Zx: list[Tensor], Zy: list[Tensor]) -> None:
        for zx in Zx:
            for _ in solve_layer(zx, Zy, 0.1, 10, mode="paper"):
                pass

    sizes = ((1024, 2048), (2048, 4096), (4096, 8192))
    problems = {f"{n}x{m}": (partial(solve, activations(1, n), activations(1, m)), n * m) for n, m in sizes}
    grids = {
        f"{L}x{M} layers": (partial(solve, activations(L, 576), activations(M, 896)), L * M)
        for L, M in ((4, 6), (8, 12), (16, 24))
    }
    for what, unit, cases in (("problem", "n m", problems), ("total", "L M", grids)):
        times = median_times({name: case[0] for name, case in cases.items()}, repeats)
        rates = {name: times[name] / cases[name][1] for name in cases}
        middle = statistics.mean(rates.values())
        print(
            f"{what}: time over {unit}, relative to the mean of the three: "
            + ", ".join(f"{name} {rate / middle:.2f}" for name, rate in rates.items())
        )


if __name__ == "__main__":
    main()
