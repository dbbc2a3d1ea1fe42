"""Ridge regressions against their normal equations, solved in float64."""

import pytest
import torch
from random_plans import draw
from torch.testing import assert_close

from core.fusion.ridge import Ridge


def ridge_map(R: torch.Tensor, S: torch.Tensor, ridge: float) -> torch.Tensor:
    return Ridge(R, ridge).map(S)


def test_equal_neurons_and_a_tiny_ridge_are_solved_in_float64_or_refused():
    R, S = draw(60, 25, seed=1).repeat(1, 2) * 100, draw(60, 4, seed=2)  # every neuron twice
    gram = R.double().T @ R.double()
    scaled = gram + 1e-9 * gram.diagonal().mean() * torch.eye(50, dtype=torch.float64)
    expected = torch.linalg.solve(scaled, R.double().T @ S.double()).T
    assert_close(ridge_map(R, S, 1e-9).double(), expected, atol=1e-6, rtol=1e-2)
    with pytest.raises(ValueError, match=r"ridge 1e-30 is too small for 60 rows of 50 neurons; raise --ridge"):
        ridge_map(R, S, 1e-30)


def test_constant_predictors_give_a_zero_map():
    assert torch.equal(ridge_map(torch.zeros(9, 3), torch.randn(9, 2), 0.01), torch.zeros(2, 3))


@pytest.mark.parametrize(("rows", "neurons"), [(60, 20), (20, 60), (30, 30)])
def test_maps_equal_the_normal_equations_from_either_side(rows, neurons):
    """Products of neurons and products of rows give the same map, and what it makes of its own rows."""
    R, S = draw(rows, neurons, seed=1), draw(rows, 4, seed=2)
    gram = R.double().T @ R.double()
    scaled = gram + 0.05 * gram.diagonal().mean() * torch.eye(neurons, dtype=torch.float64)
    expected = torch.linalg.solve(scaled, R.double().T @ S.double()).T
    assert_close(Ridge(R, 0.05).map(S).double(), expected, atol=1e-5, rtol=1e-4)
    assert_close(Ridge(R, 0.05).fitted(S).double(), R.double() @ expected.T, atol=1e-4, rtol=1e-4)


def test_predictors_that_span_few_directions_are_said_in_a_basis():
    """Outputs y = x W^T with more neurons than inputs: the regression on x R^T, W = basis R, is that on y."""
    x, W = draw(40, 5, seed=1), draw(12, 5, seed=2)
    S = draw(40, 3, seed=3)
    basis, triangle = torch.linalg.qr(W)
    short, whole = Ridge(x @ triangle.T, 0.05, basis), Ridge((x @ W.T).double(), 0.05)
    assert_close(short.map(S).double(), whole.map(S), atol=1e-5, rtol=1e-4)
    assert_close(short.fitted(S).double(), whole.fitted(S), atol=1e-5, rtol=1e-4)
