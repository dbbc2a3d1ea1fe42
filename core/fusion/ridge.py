"""Least-squares maps between rows of activations: tensors in, tensors out.

The map from rows R [T, r] to rows S [T, s], both centred, is Z^T [s, r], where Z solves

    (R^T R + lambda d I) Z = R^T S,

with d the mean diagonal of R^T R, so that lambda (`ridge`) means the same for activations of any scale. Where there
are fewer rows than neurons the same map is found from the products of rows instead: Z = R^T (R R^T + lambda d I)^-1 S.
The Cholesky factor depends on R alone; maps that read the same rows share it.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Ridge:
    """Ridge regressions on one set of rows R [T, r].

    Args:
        R: centred predictors. If all of them are constant, every map is zero.
        ridge: lambda, relative to d.
        basis: [w, r] with orthonormal columns, for predictors R basis^T [T, w] that span no more than r directions. The
            regression on R [T, r] fits the same responses as the one on these, with fewer numbers. None where R are the
            predictors themselves.
    Raises:
        ValueError: lambda is too small for the system to be positive definite even in float64.
    """

    def __init__(self, R: Tensor, ridge: float, basis: Tensor | None = None):
        self.R, self.basis = R, basis
        self.by_rows = R.shape[0] < R.shape[1]
        width = R.shape[1] if basis is None else len(basis)
        self.factor, self.shift = _factor(R, ridge, width, self.by_rows)

    def map(self, S: Tensor) -> Tensor:
        """The map [s, w] to the responses S [T, s], so that S is about the predictors times map^T."""
        found = self._map(S)
        return found if self.basis is None else found @ self.basis.T  # [s, r] @ [r, w] -> [s, w]

    def _map(self, S: Tensor) -> Tensor:
        """The map [s, r] that reads R."""
        R, S = self.R.to(self.factor.dtype), S.to(self.factor.dtype)
        if self.by_rows:
            found = torch.cholesky_solve(S, self.factor).T @ R  # [s, T] @ [T, r] -> [s, r]
        else:
            found = torch.cholesky_solve(R.T @ S, self.factor).T  # [r, T] @ [T, s] -> [r, s]
        return found.to(self.R.dtype)

    def fitted(self, S: Tensor) -> Tensor:
        """What the map makes of the predictors themselves, [T, s].

        By rows this is S - lambda d (R R^T + lambda d I)^-1 S, which needs no product with R.
        """
        if not self.by_rows:
            return self.R @ self._map(S).T  # [T, r] @ [r, s] -> [T, s]
        S = S.to(self.factor.dtype)
        return (S - self.shift * torch.cholesky_solve(S, self.factor)).to(self.R.dtype)


def _factor(R: Tensor, ridge: float, width: int, by_rows: bool) -> tuple[Tensor, Tensor]:
    """(Cholesky factor [r, r] or [T, T] of the system, lambda d), in float64 only where float32 finds the system not
    positive definite.

    Args:
        width: over how many predictors d is the mean.
    """
    gram = R @ R.T if by_rows else R.T @ R
    scale = gram.diagonal().sum() / width
    shift = torch.where(scale > 0, ridge * scale, torch.ones_like(scale))
    gram.diagonal().add_(shift)
    factor, info = torch.linalg.cholesky_ex(gram)
    if info == 0:
        return factor, shift
    if R.dtype == torch.float64:
        raise ValueError(f"ridge {ridge} is too small for {len(R)} rows of {R.shape[1]} neurons; raise --ridge")
    return _factor(R.double(), ridge, width, by_rows)


def orthogonal_map(R: Tensor, S: Tensor, rank: int) -> Tensor:
    """The map [s, r] with orthonormal rows or columns, whichever are fewer, that fits R @ map^T to S best.

    This is the orthogonal Procrustes problem (Schonemann 1966): U V^T from the singular value decomposition of S^T R.
    For r = s it minimises |R map^T - S|, and otherwise it maximises the inner product of the two. Computed in float64,
    because the singular values of activations span seven orders of magnitude.

    Args:
        R: [T, r] and S: [T, s], both centred.
        rank: how many directions the rows can span. The others, in which rows hold nothing but their rounding, are
            mapped to zero; an orthogonal map would turn that rounding into any direction at full length.
    """
    product = S.T.double() @ R.double()  # [s, T] @ [T, r] -> [s, r]
    if rank < min(product.shape):
        # The leading directions of the shorter side come first, which takes less than half the time of the whole SVD.
        short = product if product.shape[0] <= product.shape[1] else product.T
        leading = torch.linalg.eigh(short @ short.T).eigenvectors[:, -rank:]  # ascending
        short_map = leading @ _polar(leading.T @ short)
        return (short_map if short is product else short_map.T).to(R.dtype)
    return _polar(product).to(R.dtype)


def _polar(matrix: Tensor) -> Tensor:
    """U V^T of a matrix U S V^T, without the directions in which it is zero."""
    U, values, Vh = torch.linalg.svd(matrix, full_matrices=False)
    kept = values > values[0] * torch.finfo(values.dtype).eps * max(matrix.shape)
    return U[:, kept] @ Vh[kept]
