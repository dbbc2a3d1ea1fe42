"""Ridge regressions against their normal equations, solved in float64."""

import pytest
import torch
from random_plans import draw
from torch.testing import assert_close

from core.fusion.ridge import ridge_factor, solve_ridge


def ridge_map(R: torch.Tensor, S: torch.Tensor, ridge: float) -> torch.Tensor:
    return solve_ridge(ridge_factor(R, ridge), R, S)


def test_few_rows_and_a_tiny_ridge_are_solved_in_float64_or_refused():
    R, S = draw(30, 50, seed=1) * 100, draw(30, 4, seed=2)
    gram = R.double().T @ R.double()
    scaled = gram + 1e-9 * gram.diagonal().mean() * torch.eye(50, dtype=torch.float64)
    expected = torch.linalg.solve(scaled, R.double().T @ S.double()).T
    assert_close(ridge_map(R, S, 1e-9).double(), expected, atol=1e-6, rtol=1e-2)
    with pytest.raises(ValueError, match=r"ridge 1e-30 is too small for 30 rows of 50 neurons; raise --ridge"):
        ridge_map(R, S, 1e-30)


def test_constant_predictors_give_a_zero_map():
    assert torch.equal(ridge_map(torch.zeros(9, 3), torch.randn(9, 2), 0.01), torch.zeros(2, 3))
