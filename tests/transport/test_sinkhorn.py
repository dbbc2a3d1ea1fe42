"""The solver: over-relaxation against plain iterations, the laws that any plan obeys, adversarial costs."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from transport_costs import batch, correlated, errors, plain, random_cost

from core.hot_transport import corr_distance_matrix, standardize
from core.transport import scaling, sinkhorn
from core.transport.log_domain import scale_log
from core.transport.problem import AffineCost, SinkhornSettings
from core.transport.sinkhorn import sinkhorn_uniform_streaming

HARD = [(30, 50, 0, 0.03, 0.1), (64, 48, 1, 0.03, 0.05), (40, 40, 2, 0.027, 0.05), (100, 80, 3, 0.03, 0.02)]
EASY = [(30, 50, 4, 0.3, 0.3), (80, 60, 5, 0.1, 0.5), (50, 50, 6, 0.1, 1.0), (20, 90, 7, 0.05, 0.3)]


@pytest.mark.parametrize(("n", "m", "seed", "reg", "noise"), HARD + EASY)
def test_over_relaxation_never_needs_more_iterations_and_half_where_there_are_many(n, m, seed, reg, noise):
    C = correlated(n, m, seed, noise)
    many, _ = plain(C, reg, 1e-6, 20000)
    result = sinkhorn_uniform_streaming(C, reg, 20000)
    assert result.converged and errors(result, C) <= 5e-6
    assert result.n_iters <= many and (many <= 100 or result.n_iters <= many / 2)


def test_the_hard_problems_are_hard():
    assert sum(plain(correlated(n, m, seed, noise), reg, 1e-6, 20000)[0] > 100 for n, m, seed, reg, noise in HARD) >= 3


@pytest.mark.parametrize("n_iters", [1, 10, 200])
@pytest.mark.parametrize("reg", [0.1, 0.03])
def test_paper_mode_is_exactly_so_many_plain_iterations(n_iters, reg):
    C = correlated(40, 56, 0, 0.1)
    result = sinkhorn_uniform_streaming(C, reg, n_iters, mode="paper")
    _, Q = plain(C, reg, -1.0, n_iters)
    assert result.n_iters == n_iters
    assert float((result.plan().double() - Q).abs().sum() / 2) <= 1e-6


# Each of these once divided by an error of 0, which small problems reach, or stopped there.
TINY = [(1, 4, 3, 0.1), (2, 3, 3, 0.03), (2, 3, 4, 1.0), (1, 1, 0, 0.001), (1, 2, 1, 0.001), (4, 1, 0, 0.001)]


@pytest.mark.parametrize(("n", "m", "seed", "reg"), TINY)
def test_paper_mode_on_tiny_problems_is_exact_as_well(n, m, seed, reg):
    C = random_cost(n, m, seed)
    for n_iters in (1, 2, 30, 200):
        for result in (sinkhorn_uniform_streaming(C, reg, n_iters, mode="paper"), *batch([C], reg, n_iters, "paper")):
            assert result.n_iters == n_iters
            assert torch.isfinite(result.f).all() and torch.isfinite(result.g).all() and math.isfinite(result.cost)
            assert float(result.plan().sum()) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("n_iters", [1, 3, 40])
@pytest.mark.parametrize("size", [(9, 14), (1, 3), (1, 1)])
def test_the_log_domain_does_exactly_the_iterations_of_pot(n_iters, size):
    """POT begins with the columns, so it gets the transposed problem."""
    ot = pytest.importorskip("ot")
    C, reg = random_cost(*size, 3).double(), 0.02
    n, m = size
    scaled = scale_log(C, SinkhornSettings(reg, n_iters, mode="paper"))
    a, b = (torch.full((size,), 1 / size, dtype=torch.float64) for size in (m, n))
    _, log = ot.bregman.sinkhorn_log(a, b, C.T, reg, n_iters, stopThr=0, log=True, warn=False)
    assert scaled.n_iters == n_iters
    shift = log["log_v"][0] * reg - scaled.f[0]  # potentials are unique up to a constant
    assert_close(scaled.f + shift, log["log_v"] * reg, atol=1e-12, rtol=0)
    assert_close(scaled.g - shift, log["log_u"] * reg, atol=1e-12, rtol=0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_costs_and_settings_that_are_no_numbers_are_refused(value):
    C = random_cost(3, 4, 0)
    for reg in (value, 0.0, -1.0):
        with pytest.raises(ValueError, match="reg must be positive"):
            sinkhorn_uniform_streaming(C, reg)
    assert not sinkhorn_uniform_streaming(C, 0.1, 5, tol=math.nan).converged
    C[1, 2] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        sinkhorn_uniform_streaming(C, 0.1)
    with pytest.raises(ValueError, match="NaN or infinite"):
        standardize(C)


@pytest.mark.parametrize("reg", [0.1, 0.03])
def test_row_blocks_do_not_matter(monkeypatch, reg):
    C = correlated(70, 50, 1)
    whole = sinkhorn_uniform_streaming(C, reg)
    monkeypatch.setattr(scaling, "CACHED_BYTES", 1000)
    monkeypatch.setattr(scaling, "BLOCK_BYTES", 7 * 50 * 4)
    blocked = sinkhorn_uniform_streaming(C, reg)
    assert float((blocked.plan() - whole.plan()).abs().sum() / 2) <= 1e-6
    assert blocked.cost == pytest.approx(whole.cost, abs=1e-6)


@pytest.mark.parametrize("in_place", [True, False])
def test_a_cost_given_as_correlation_is_the_same_problem(in_place):
    C = correlated(30, 20, 2)
    R = (1 - C).numpy().copy()
    memory = None if in_place else np.empty_like(R)
    given_C = sinkhorn_uniform_streaming(C, 0.1)
    given_R = sinkhorn.solve_one(R, AffineCost(0.0, 2.0, 1.0, -1.0), SinkhornSettings(0.1), C.__getitem__, memory)
    assert_close(given_R.plan(), given_C.plan(), atol=1e-8, rtol=1e-4)
    assert given_R.cost == pytest.approx(given_C.cost, abs=1e-6)
    assert in_place != bool(((1 - C).numpy() == R).all())


def test_top_mass_is_the_share_of_the_largest_entries(monkeypatch):
    monkeypatch.setattr(sinkhorn, "PLAN_BLOCK_ROWS", 4)
    result = sinkhorn_uniform_streaming(correlated(18, 12, 3), 0.05)
    Q = result.plan().flatten().sort(descending=True).values
    for k in (1, 10, 1000):
        assert result.top_mass(k) == pytest.approx(float(Q[:k].sum() / Q.sum()), rel=1e-5)


problems = st.tuples(st.integers(1, 24), st.integers(1, 24), st.integers(0, 10**6), st.sampled_from([1.0, 0.1, 0.03]))


@settings(max_examples=40, deadline=None)
@given(problems)
def test_laws_of_the_plan(problem):
    """Transposing, permuting, shifting, and scaling cost and epsilon together; the reported error is the true one."""
    n, m, seed, reg = problem
    C = random_cost(n, m, seed)
    result = sinkhorn_uniform_streaming(C, reg, 20000)
    Q = result.plan()
    assert result.converged == (result.error <= 1e-6)
    # The exponent of K is rounded to float32, so the mass of an entry is off by up to 2^-24 C / reg.
    assert abs(errors(result, C) - result.error) <= 5e-7 + 2**-24 * float(C.max()) / reg
    if not result.converged:
        return
    rows = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    others = {
        "transposed": sinkhorn_uniform_streaming(C.T.contiguous(), reg, 20000).plan().T,
        "permuted": sinkhorn_uniform_streaming(C[rows], reg, 20000).plan()[rows.argsort()],
        "shifted": sinkhorn_uniform_streaming(C + 3, reg, 20000).plan(),
        "scaled": sinkhorn_uniform_streaming(C * 7, reg * 7, 20000).plan(),
    }
    # Two plans within a marginal error of 1e-6 differ by more the smaller epsilon is.
    for name, other in others.items():
        assert float((other - Q).abs().sum() / 2) <= (1e-5 if reg >= 0.1 else 1e-3), name


def adversarial() -> dict[str, torch.Tensor]:
    blocks = torch.full((20, 30), 2.0)
    blocks[:10, :15] = blocks[10:, 15:] = 0.0
    X = torch.randn(50, 12, generator=torch.Generator().manual_seed(0))
    constant = X.clone()
    constant[:, 3] = 1.0
    one = X[:, :1] + 1e-3 * torch.randn(50, 30, generator=torch.Generator().manual_seed(1))
    return {
        "blocks of 0 and 2": blocks,
        "duplicate neurons": corr_distance_matrix(X[:, [0, 0, 0, 1, 2, 2]], X),
        "constant neurons": corr_distance_matrix(constant, constant),
        "one neuron correlated with many": corr_distance_matrix(X, one),
        "two rows": corr_distance_matrix(X[:2], X[:2]),
        "single target": random_cost(1, 9, 1),
        "single source": random_cost(9, 1, 2),
        "all equal": torch.full((7, 5), 2.0),
    }


@pytest.mark.parametrize("reg", [0.1, 0.03, 0.01, 0.001])
@pytest.mark.parametrize("name", adversarial())
def test_adversarial_costs_stay_finite_and_report_their_error(name, reg):
    C = adversarial()[name]
    result = sinkhorn_uniform_streaming(C, reg, 3000)
    assert torch.isfinite(result.f).all() and torch.isfinite(result.g).all() and math.isfinite(result.cost)
    assert result.converged == (result.error <= 1e-6)
    assert abs(errors(result, C) - result.error) <= 2e-6


@pytest.mark.parametrize("reg", [0.1, 0.01, 0.001])
def test_small_epsilon_finds_the_permutation(reg):
    X = torch.randn(200, 30, generator=torch.Generator().manual_seed(4))
    order = torch.randperm(30, generator=torch.Generator().manual_seed(5))
    result = sinkhorn_uniform_streaming(corr_distance_matrix(X, X[:, order]), reg, 3000)
    assert result.converged and torch.equal(result.plan().argmax(1), order.argsort())
    if reg < 0.1:
        assert_close(result.plan().max(1).values, torch.full((30,), 1 / 30), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64])
def test_other_types_are_solved_in_float32(dtype):
    C = (random_cost(6, 8, 0) * 2).to(dtype)
    assert_close(sinkhorn_uniform_streaming(C, 0.5).plan(), sinkhorn_uniform_streaming(C.float(), 0.5).plan())


def test_tolerance_zero_uses_every_iteration():
    result = sinkhorn_uniform_streaming(correlated(30, 50, 0), 0.1, 60, tol=0.0)
    assert result.n_iters == 60 and not result.converged and result.error < 1e-6


def test_bad_mode_is_refused():
    with pytest.raises(ValueError, match="expected one of auto, paper"):
        sinkhorn_uniform_streaming(torch.ones(2, 2), 0.1, mode="fast")
