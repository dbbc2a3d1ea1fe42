"""Settings of the transport plans (stage 1)."""

from __future__ import annotations

from dataclasses import dataclass

from core.options import AT_LEAST_ONE, POSITIVE, option


@dataclass(frozen=True)
class TransportSettings:
    """Transport plans: how the entropic problems of Q and P are solved."""

    epsilon: float | None = option(
        None, "1", "entropic regularisation of Q; default 0.1, and 0.03 for gsm8k", range=POSITIVE
    )
    eta: float = option(0.1, "1", "entropic regularisation of P", range=POSITIVE)
    sinkhorn_iters: int = option(1000, "1", "upper bound on Sinkhorn iterations", range=AT_LEAST_ONE)
    sinkhorn_tol: float = option(1e-6, "1", "bound on the larger L1 marginal error of Q", range=POSITIVE)
    sinkhorn_mode: str = option(
        "auto", "1", "auto, or paper: exactly --sinkhorn-iters plain iterations (it used 200)", ("auto", "paper")
    )
    pairs_budget_mb: int = option(
        8192,
        "1",
        "memory for the source's rows of one side; where they need more, they are read again for every target layer",
        range=AT_LEAST_ONE,
        changes="",
    )
    layer_cost_scale: str = option(
        "median", "1", "scale of the layer cost: median, or none (the paper's letter)", ("median", "none")
    )
