"""Matrix products in full float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def full_float32() -> Iterator[None]:
    """Compute matrix products in full float32 inside, whatever the global TF32 and bfloat16 settings are.

    TF32 keeps about three digits. A correlation that is off by 1e-3 changes an entry of K by 3 % at epsilon 0.03. The
    global settings are as they were afterwards.
    """
    mkldnn: Any = torch.backends.mkldnn
    backends: list[Any] = [torch.backends.cuda.matmul, mkldnn.matmul]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
