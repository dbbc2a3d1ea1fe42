"""The cost of matching two neurons: one minus the correlation of their activations (Eqs. 7, 23)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from core.transport.precision import full_float32
from core.transport.problem import Rows

# Neurons are standardised in float64 in blocks of about this size, since float64 of all of them would take twice the
# memory of the activations.
STANDARDIZE_BYTES = 16 << 20
# A correlation lies in [-1, 1], so the cost lies in [0, 2].
LOWEST_COST, HIGHEST_COST = 0.0, 2.0


def standardize(X: Tensor) -> Tensor:
    """Centre each neuron and scale it to unit norm, so that Z_x^T Z_y holds Pearson's correlations.

    Dividing by the unbiased standard deviation and the product by T - 1 (Eq. 7) is the same as dividing by the norm of
    the centred column.

    Args:
        X: [T, n] activations, T >= 2.
    Returns:
        [T, n] float32. The column of a constant neuron is 0, so that it correlates 0 with every neuron.
    Raises:
        ValueError: fewer than 2 rows, or NaN or infinite entries.
    """
    if X.ndim != 2 or X.shape[0] < 2:
        raise ValueError(f"activations must be [T, n] with T >= 2, got shape {tuple(X.shape)}")
    low, high = X.amin(0), X.amax(0)
    if not torch.isfinite(torch.stack((low, high))).all():
        raise ValueError("activations contain NaN or infinite values")
    out = torch.empty_like(X, dtype=torch.float32)
    width = max(1, STANDARDIZE_BYTES // (8 * len(X)))
    for start in range(0, X.shape[1], width):
        block = slice(start, start + width)
        centred = X[:, block].double()
        centred -= centred.mean(0)
        # The mean of equal numbers can be rounded, which would leave a constant neuron noise to be scaled up.
        norm = centred.norm(dim=0).masked_fill_(high[block] == low[block], math.inf)
        out[:, block] = centred.div_(norm)
    return out


def standardize_layer(X: Tensor, model: str, layer: int) -> Tensor:
    """`standardize`, whose error names the model (`target` or `source`) and the layer."""
    try:
        return standardize(X)
    except ValueError as error:
        raise ValueError(f"{model} layer {layer}: {error}") from None


def corr_distance_matrix(X: Tensor, Y: Tensor) -> Tensor:
    """Correlation distance C[i, j] = 1 - Pearson(X[:, i], Y[:, j]) (Eqs. 7, 23).

    Args:
        X: [T, n] target activations.
        Y: [T, m] source activations; row t of both comes from the same text.
    Returns:
        [n, m] float32 in [0, 2].
    Raises:
        ValueError: row counts differ, T < 2, or non-finite entries.
    """
    if X.shape[0] != Y.shape[0]:
        raise ValueError(f"X has {X.shape[0]} rows and Y {Y.shape[0]}; both models must see the same texts")
    return _correlation_cost(standardize(X), standardize(Y))


def correlation_cost_rows(Zx: Tensor, Zy: Tensor) -> Callable[[Rows], Tensor]:
    """A function that computes chosen rows of the cost [n, m] again, so that the whole cost is never kept.

    Args:
        Zx, Zy: standardised activations [T, n] and [T, m]; the function holds both in memory.
    """
    return lambda rows: _correlation_cost(Zx[:, rows], Zy)


def _correlation_cost(Zx: Tensor, Zy: Tensor) -> Tensor:
    """C = 1 - Z_x^T Z_y; what rounding moves out of [0, 2] is clipped."""
    with full_float32():
        R = Zx.T @ Zy  # [n, T] @ [T, m] -> [n, m]
        return R.neg_().add_(1.0).clamp_(LOWEST_COST, HIGHEST_COST)
