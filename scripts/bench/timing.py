"""Fair times on a shared machine: functions run in turn, and what the machine could do at best."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch

# The threads of the library that ran last wait actively for a while. Without a pause they would slow the next one down.
PAUSE_S = 0.1


def seconds(function: Callable[[], Any], calls: int = 1) -> float:
    """Wall-clock seconds per call of a few calls in a row, after a pause."""
    time.sleep(PAUSE_S)
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls


def median_times(functions: Mapping[str, Callable[[], Any]], repeats: int, burst: int = 1) -> dict[str, float]:
    """Median seconds of each function.

    The functions take turns, so that a machine which becomes slower meanwhile becomes slower for all of them. The first
    round only warms up.

    Args:
        repeats: rounds that count.
        burst: calls that are timed together, because stage 1 also solves its problems without a pause between them.
    """
    rounds = [{name: seconds(function, burst) for name, function in functions.items()} for _ in range(repeats + 1)]
    return {name: statistics.median(times[name] for times in rounds[1:]) for name in functions}


def machine_bound(flops: float, entries: float, reads: float) -> float:
    """Seconds that this machine needs at least for given work, with the faster of numpy's and torch's kernels.

    Args:
        flops: of the matrix products that make the costs.
        entries: of all kernels K, each of which takes one exp.
        reads: bytes of K that all iterations read together.
    """
    A, B, K = torch.rand(576, 256), torch.rand(256, 896), torch.rand(576, 896)
    v, out = torch.rand(896), torch.empty(576, 896)
    a, b, k, x, o = (tensor.numpy() for tensor in (A, B, K, v, out))
    kernels: dict[str, dict[str, Callable[[], Any]]] = {
        "product": {"numpy": partial(np.matmul, a, b, out=o), "torch": partial(torch.mm, A, B, out=out)},
        "exp": {"numpy": partial(np.exp, k, out=o), "torch": partial(torch.exp, K, out=out)},
        "read": {"numpy": partial(np.matmul, k, x), "torch": partial(torch.mv, K, v)},
    }
    best = {name: min(median_times(both, 3, burst=50).values()) for name, both in kernels.items()}
    return (
        flops * best["product"] / (2 * 576 * 256 * 896)
        + entries * best["exp"] / K.numel()
        + reads * best["read"] / (4 * K.numel())
    )
