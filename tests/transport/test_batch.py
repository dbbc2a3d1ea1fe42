"""Problems of one shape that are solved together, as on an accelerator, give what each gives alone."""

import pytest
import torch
from torch.testing import assert_close
from transport_costs import batch, correlated, errors, plain, random_cost

from core.hot_transport import sinkhorn_uniform_streaming
from core.transport.batch import CHECK_EVERY, KernelBatch, scale_batch
from core.transport.problem import AffineCost, Exponent, SinkhornSettings

# (noise, seed) of five costs that need different numbers of iterations.
COMPANY = [(0.02, 1), (1.0, 2), (0.1, 3), (0.3, 4), (0.05, 5)]


@pytest.mark.parametrize("reg", [0.1, 0.03, 0.01])
def test_batches_solve_each_problem_and_stop_it_by_itself(reg):
    costs = [correlated(30, 50, seed, noise) for noise, seed in COMPANY]
    together = batch(costs, reg)
    for C, result in zip(costs, together, strict=True):
        (alone,) = batch([C], reg)
        assert (result.n_iters, result.solver) == (alone.n_iters, alone.solver)
        assert result.converged and errors(result, C) <= 5e-6
        assert float((result.plan() - alone.plan()).abs().sum() / 2) <= 1e-6
        assert float((result.plan() - sinkhorn_uniform_streaming(C, reg, 20000).plan()).abs().sum() / 2) <= 5e-6
        assert result.cost == pytest.approx(float((result.plan() * C).sum()), abs=1e-6)
    assert reg == 0.1 or len({result.n_iters for result in together}) > 1


def test_batches_beyond_a_floats_range_take_the_log_domain():
    costs = [random_cost(12, 15, seed) for seed in (0, 1)]
    for C, result in zip(costs, batch(costs, 0.003, 100), strict=True):
        alone = sinkhorn_uniform_streaming(C, 0.003, 100)
        assert result.solver == "log-float64" and result.error == alone.error > 1e-6 and not result.converged
        assert_close(result.f, alone.f, atol=1e-12, rtol=0)


def test_batched_paper_mode_is_plain():
    costs = [correlated(40, 56, seed, 0.1) for seed in (0, 1, 2)]
    for n_iters in (1, 10, 25):
        for C, result in zip(costs, batch(costs, 0.03, n_iters, "paper"), strict=True):
            _, Q = plain(C, 0.03, -1.0, n_iters)
            assert result.n_iters == n_iters
            assert float((result.plan().double() - Q).abs().sum() / 2) <= 1e-6


def test_a_batch_reads_the_device_once_per_check(monkeypatch):
    costs = torch.stack([correlated(30, 50, seed, noise) for noise, seed in COMPANY])
    exponent = Exponent.choose(AffineCost(0.0, 2.0), 0.05, (30, 50), 4)
    reads = []
    as_list = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: reads.append("check") or as_list(tensor))
    for name in ("item", "__float__", "__int__", "__bool__", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, lambda tensor, name=name: reads.append(name) or 0.0)
    scaled = scale_batch(KernelBatch(costs, exponent, SinkhornSettings(0.05, 2000)))
    monkeypatch.undo()
    assert reads == ["check"] * (max(one.n_iters for one in scaled) // CHECK_EVERY + 1)
