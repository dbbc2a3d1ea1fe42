"""Least-squares maps between rows of activations: tensors in, tensors out.

The map from rows R [T, r] to rows S [T, s], both centred, is Z^T [s, r], where Z solves

    (R^T R + ridge * d * I) Z = R^T S,

with d the mean diagonal of R^T R, so that `ridge` means the same for activations of any scale. The Cholesky factor of
the left side depends on R alone; maps that read the same rows share it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def ridge_factor(R: Tensor, ridge: float) -> Tensor:
    """Cholesky factor [r, r] of R^T R + ridge * d * I, in float64 only where float32 finds it not positive definite.

    Args:
        R: [T, r] centred predictors. If all of them are constant, the factor is the identity and the map is zero.
        ridge: lambda, relative to d.
    Raises:
        ValueError: the ridge is too small for R^T R to be positive definite even in float64.
    """
    gram = R.T @ R  # [r, T] @ [T, r] -> [r, r]
    scale = gram.diagonal().mean()
    gram.diagonal().add_(ridge * scale if scale > 0 else 1.0)
    factor, info = torch.linalg.cholesky_ex(gram)
    if info == 0:
        return factor
    if R.dtype == torch.float64:
        raise ValueError(f"ridge {ridge} is too small for {len(R)} rows of {R.shape[1]} neurons; raise --ridge")
    return ridge_factor(R.double(), ridge)


def solve_ridge(factor: Tensor, R: Tensor, S: Tensor) -> Tensor:
    """The map [s, r] with S ~ R @ map^T.

    Args:
        factor: `ridge_factor` of the predictors R [T, r].
        S: [T, s] centred responses.
    """
    cross = R.to(factor.dtype).T @ S.to(factor.dtype)  # [r, T] @ [T, s] -> [r, s]
    return torch.cholesky_solve(cross, factor).T.to(R.dtype)
