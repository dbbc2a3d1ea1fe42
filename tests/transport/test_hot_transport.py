"""Costs, plans and reconstructions against POT in float64 and against the formulas written out densely."""

import math

import numpy as np
import ot
import pytest
import torch
from torch.testing import assert_close

from core.hot_transport import (
    compute_P,
    compute_Q_and_layer_costs,
    corr_distance_matrix,
    effective_layer_plan,
    reconstruct_X,
    reconstruction_fit,
    reconstruction_overlaps,
    sinkhorn_uniform_streaming,
    standardize,
)
from core.transport import layer_pairs, log_domain, sinkhorn
from core.transport.layer_pairs import solve_layer
from core.transport.precision import full_float32
from core.transport.problem import SinkhornSettings


def activations(T: int, n: int, seed: int) -> torch.Tensor:
    """Activations with correlated neurons, so that their cost has structure."""
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randn(T, 6, generator=generator)
    return factors @ torch.randn(6, n, generator=generator) + 0.3 * torch.randn(T, n, generator=generator) + 2.0


def pot_plan(C: torch.Tensor, reg: float, stop: float = 1e-10) -> torch.Tensor:
    n, m = C.shape
    plan = ot.sinkhorn(
        np.full(n, 1 / n),
        np.full(m, 1 / m),
        C.double().numpy(),
        reg,
        method="sinkhorn_log",
        numItermax=20000,
        stopThr=stop,
    )
    return torch.from_numpy(plan)


def total_variation(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b).abs().sum() / 2)


def test_cost_is_one_minus_pearson():
    X, Y = activations(50, 7, 0), activations(50, 9, 1)
    expected = 1 - np.corrcoef(X.double().numpy().T, Y.double().numpy().T)[:7, 7:]
    assert_close(corr_distance_matrix(X, Y).double(), torch.from_numpy(expected), atol=1e-6, rtol=0)


def test_cost_is_full_float32_whatever_the_global_setting():
    X, Y = activations(256, 64, 0), activations(256, 64, 1)
    exact = corr_distance_matrix(X, Y)
    torch.set_float32_matmul_precision("medium")
    try:
        chosen = torch.backends.mkldnn.matmul.fp32_precision, torch.backends.cuda.matmul.fp32_precision
        assert torch.equal(corr_distance_matrix(X, Y), exact)
        with full_float32():
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        after = torch.backends.mkldnn.matmul.fp32_precision, torch.backends.cuda.matmul.fp32_precision
        assert after == chosen and "ieee" not in chosen
    finally:
        torch.set_float32_matmul_precision("highest")


def test_constant_neuron_costs_one_and_shift_and_scale_change_nothing():
    X, Y = activations(30, 4, 0), activations(30, 5, 1)
    X[:, 2] = 0.1  # not exactly representable: a mean of it has rounding noise
    C = corr_distance_matrix(X, Y)
    assert torch.equal(C[2], torch.ones(5))
    assert_close(corr_distance_matrix(3 * X + 7, 0.5 * Y - 1), C, atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    ("X", "message"),
    [
        (torch.tensor([[1.0, 2.0]]), "T >= 2"),
        (torch.tensor([[1.0, 2.0], [math.nan, 0.0]]), "NaN or infinite"),
        (torch.tensor([[1.0, 2.0], [math.inf, 0.0]]), "NaN or infinite"),
    ],
)
def test_bad_activations_are_refused(X, message):
    with pytest.raises(ValueError, match=message):
        corr_distance_matrix(X, X)


def test_other_row_counts_are_refused():
    with pytest.raises(ValueError, match="same texts"):
        corr_distance_matrix(torch.rand(5, 3), torch.rand(6, 3))


@pytest.mark.parametrize("reg", [0.1, 0.03])
def test_plan_equals_pot(reg):
    C = corr_distance_matrix(activations(64, 40, 0), activations(64, 56, 1))
    before = C.clone()
    result = sinkhorn_uniform_streaming(C, reg, 5000)
    assert torch.equal(C, before)
    assert result.converged and result.error <= 1e-6 and result.solver == "exp-float32"
    Q = torch.exp((result.f[:, None] + result.g - C.double()) / reg)  # potentials alone, float64
    assert float((Q.sum(1) - 1 / 40).abs().sum()) <= 5e-6
    assert float((Q.sum(0) - 1 / 56).abs().sum()) <= 5e-6
    assert total_variation(Q, pot_plan(C, reg)) <= 1e-5
    assert abs(result.cost - float((Q * C).sum())) <= 1e-6


@pytest.mark.parametrize(("reg", "solver"), [(0.02, "exp-float64"), (0.002, "log-float64")])
def test_small_epsilon_takes_a_wider_range_and_still_equals_pot(reg, solver):
    generator = torch.Generator().manual_seed(0)
    C = torch.rand(12, 15, generator=generator) * 2
    C[0, 0], C[1, 1] = 0.0, 2.0
    result = sinkhorn_uniform_streaming(C, reg, 50000, 1e-7)
    assert result.converged and result.solver == solver
    assert total_variation(result.plan(), pot_plan(C, reg)) <= 1e-5


def test_log_domain_blocks_do_not_matter(monkeypatch):
    C = torch.rand(13, 11, generator=torch.Generator().manual_seed(1)) * 2
    whole = sinkhorn_uniform_streaming(C, 0.002, 50)
    monkeypatch.setattr(log_domain, "PLAN_BLOCK_ROWS", 4)
    assert_close(sinkhorn_uniform_streaming(C, 0.002, 50).f, whole.f, atol=1e-12, rtol=0)


def test_an_unreached_tolerance_is_reported_and_potentials_are_finite():
    C = corr_distance_matrix(activations(64, 40, 0), activations(64, 56, 1))
    for reg in (0.03, 0.001):
        result = sinkhorn_uniform_streaming(C, reg, n_iters=2)
        Q = torch.exp((result.f[:, None] + result.g - C.double()) / reg)
        rows = float((Q.sum(1) - 1 / 40).abs().sum())
        assert not result.converged and result.n_iters == 2
        assert rows > 1e-6 and result.error == pytest.approx(rows, rel=1e-3)


@pytest.mark.parametrize("shape", [(1, 1), (1, 6), (6, 1)])
def test_single_neurons(shape):
    C = torch.rand(shape)
    assert_close(sinkhorn_uniform_streaming(C, 0.1).plan(), torch.full(shape, 1 / (shape[0] * shape[1])))


def test_lazy_plan_equals_dense(monkeypatch):
    monkeypatch.setattr(sinkhorn, "PLAN_BLOCK_ROWS", 3)
    C = corr_distance_matrix(activations(20, 8, 0), activations(20, 5, 1))
    result = sinkhorn_uniform_streaming(C, 0.1)
    Q = result.plan()
    assert torch.equal(result.plan_rows(2, 7), Q[2:7])
    W, V = torch.rand(5, 4), torch.rand(8, 4)
    assert_close(result.apply(W), Q @ W)
    assert_close(result.apply_t(V), Q.T @ V)


@pytest.mark.parametrize(
    ("C", "reg", "n_iters", "message"),
    [
        (torch.tensor([[math.nan]]), 0.1, 10, "NaN or infinite"),
        (torch.ones(2, 0), 0.1, 10, "non-empty"),
        (torch.ones(2, 2), 0.0, 10, "positive"),
        (torch.ones(2, 2), 0.1, 0, "at least 1"),
    ],
)
def test_bad_problems_are_refused(C, reg, n_iters, message):
    with pytest.raises(ValueError, match=message):
        sinkhorn_uniform_streaming(C, reg, n_iters)


@pytest.mark.parametrize("epsilon", [0.1, 0.02, 0.002])
def test_a_probe_is_multiplied_by_the_plan(epsilon):
    """In the exp domain of both widths, with K over its matrix or beside it, and in the log domain."""
    zx, zy = standardize(activations(40, 18, 0)), standardize(activations(40, 12, 1))
    rows = torch.tensor([3, 0, 17])
    for small in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(layer_pairs, "CACHED_BYTES", 32 << 20 if small else 0)
            (result,) = solve_layer(zx, [zy], SinkhornSettings(epsilon, 5000), rows)
        assert_close(result.probed, result.apply(zy[rows].T), atol=1e-7, rtol=1e-4)


def test_every_target_layer_meets_every_source_layer():
    X = [activations(40, 6 + layer, layer) for layer in range(2)]
    Y = [activations(40, 5 + layer, 10 + layer) for layer in range(3)]
    results, costs = compute_Q_and_layer_costs(X, Y, 0.1)
    assert costs.shape == (2, 3) and [len(row) for row in results] == [3, 3]
    for layer, x in enumerate(X):
        for m, y in enumerate(Y):
            C = corr_distance_matrix(x, y)
            Q = pot_plan(C, 0.1)
            assert total_variation(results[layer][m].plan(), Q) <= 1e-5
            assert abs(float(costs[layer, m]) - float((C * Q).sum())) <= 2e-6


def test_bad_layer_is_named():
    with pytest.raises(ValueError, match=r"source layer 1: .*NaN"):
        compute_Q_and_layer_costs([torch.rand(4, 2)], [torch.rand(4, 2), torch.full((4, 2), math.nan)], 0.1)


def test_layer_plan_median_scale_and_letter():
    C = torch.rand(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 0.2 + 0.5
    scaled = (C - C.min()) / (C - C.min()).quantile(0.5)
    assert total_variation(compute_P(C, 0.1), pot_plan(scaled, 0.1)) <= 1e-8
    assert total_variation(compute_P(C, 0.1, "none"), pot_plan(C, 0.1)) <= 1e-8
    assert float(compute_P(C, 0.1).max(1).values.mean()) > 1.5 * float(compute_P(C, 0.1, "none").max(1).values.mean())


def test_huge_layer_costs_raise_eta():
    C = torch.rand(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) * 20 + 2000
    assert total_variation(compute_P(C, 0.1, "none"), pot_plan(C, 0.1 * float(C.max()) / 100)) <= 1e-8


def test_equal_layer_costs_give_the_uniform_plan():
    assert_close(compute_P(torch.full((2, 4), 0.7), 0.1), torch.full((2, 4), 1 / 8, dtype=torch.float64))


def test_effective_plan_is_the_geometric_mean():
    a, b = torch.rand(3, 4), torch.rand(3, 4)
    assert_close(effective_layer_plan(a, b) ** 2, a * b)


def test_reconstruction_is_barycentric():
    X, Y = [activations(30, 4, 0), activations(30, 3, 1)], [activations(30, 5, s) for s in range(2, 5)]
    Q, costs = compute_Q_and_layer_costs(X, Y, 0.1)
    P = compute_P(costs, 0.1)
    for layer, X_hat in enumerate(reconstruct_X(P, Q, Y)):
        n = X[layer].shape[1]
        expected = sum(2 * P[layer, m] * (Y[m].double() @ (n * Q[layer][m].plan().double()).T) for m in range(3))
        assert_close(X_hat.double(), expected, atol=1e-5, rtol=1e-5)
    constant = [torch.full((30, 5), 3.0) for _ in range(3)]
    for X_hat in reconstruct_X(P, Q, constant):  # weights sum to 1: a constant stays what it is
        assert_close(X_hat, torch.full_like(X_hat, 3.0), atol=1e-4, rtol=0)


def test_fit_from_overlaps_is_that_of_the_reconstruction():
    X = [activations(30, n, seed) for seed, n in enumerate((8, 10, 9))]
    Y = [activations(30, n, 10 + seed) for seed, n in enumerate((7, 12))]
    Zx, Zy = [standardize(x) for x in X], [standardize(y) for y in Y]
    Q, costs = compute_Q_and_layer_costs(X, Y, 0.1)
    P = compute_P(costs, 0.1)
    rows = torch.tensor([4, 20, 3])
    kept = [
        reconstruction_overlaps(x[rows], torch.stack([q.apply(y[rows].T) for q, y in zip(plans, Zy, strict=True)]))
        for x, plans in zip(Zx, Q, strict=True)
    ]
    overlap, shuffled, gram, power = (
        torch.stack([one[key] for one in kept]) for key in ("overlap", "overlap_permuted", "gram", "power")
    )
    r2, correlation = reconstruction_fit(P, overlap, gram, power)
    other, _ = reconstruction_fit(P, shuffled, gram, power)
    order = [torch.randperm(len(x.T), generator=torch.Generator().manual_seed(0)) for x in X]
    for layer, (x, x_hat) in enumerate(zip(Zx, reconstruct_X(P, Q, Zy), strict=True)):
        x, x_hat = x[rows].double(), x_hat[rows].double()
        assert r2[layer] == pytest.approx(float(1 - (x - x_hat).square().sum() / x.square().sum()), abs=1e-5)
        assert correlation[layer] == pytest.approx(float((x * x_hat).sum() / (x.norm() * x_hat.norm())), abs=1e-5)
        x = x[:, order[layer]]
        assert other[layer] == pytest.approx(float(1 - (x - x_hat).square().sum() / x.square().sum()), abs=1e-5)
