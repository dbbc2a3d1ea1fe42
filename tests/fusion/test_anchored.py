"""Anchored rows: where the source says nothing, the target's own output is the response."""

import pytest
import torch
from random_plans import T, draw, random_pair
from torch.testing import assert_close

from core.errors import UserError
from core.fusion.anchored import Anchors, regress
from core.fusion.controls import CONTROLS
from core.fusion.projections import PROJECTIONS
from core.fusion.ridge import Ridge
from core.fusion.settings import FusionSettings
from core.fusion.transport_weights import Transport, empty_residual, transport_into, with_spectrum_of


def transported(plans, target, source, projection, rows, top_k=0):
    transport = Transport(plans, source, FusionSettings("regression", rows=rows))
    (residual,) = transport_into([empty_residual(plans, target, 0, projection, top_k)], transport, 0)
    return residual


def test_weighted_anchors_equal_rows_that_are_there_as_often():
    """An anchor of weight 2 counts as two positions; against a regression on all rows written out."""
    X, Z, x, y = draw(40, 6, seed=1), draw(40, 3, seed=2), draw(15, 6, seed=3) + 1, draw(15, 3, seed=4) - 1
    found = regress(X, Z, 0.01, Anchors(x, y, 2.0))
    R, S = torch.cat([X, x, x]), torch.cat([Z, y, y])
    assert_close(found, Ridge(R - R.mean(0), 0.01).map(S - S.mean(0)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("projection", ["q", "o", "up", "down"])
@pytest.mark.parametrize("top_k", [0, 3])
def test_without_anchors_anchored_is_aligned_bit_for_bit(projection, top_k):
    plans, target, source = random_pair()
    plans.n_unaligned = 0
    aligned, anchored = (
        transported(plans, target, source, projection, rows, top_k) for rows in ("aligned", "anchored")
    )
    assert torch.equal(aligned.weight, anchored.weight)


def test_with_anchors_alone_anchored_is_self_and_the_difference_is_the_target():
    x, y = draw(50, 6, seed=3), draw(50, 6, seed=3) @ draw(6, 4, seed=5)
    nothing = X, Z = x[:0], y[:0]
    own = Ridge(x - x.mean(0), 0.01).map(y - y.mean(0))
    assert_close(regress(X, Z, 0.01, Anchors(x, y, 1.0)), own, atol=1e-5, rtol=1e-5)
    assert not regress(*nothing, 0.01, Anchors(x, torch.zeros_like(y), 1.0)).any()


@pytest.mark.parametrize("biases", [(), tuple(PROJECTIONS)])
@pytest.mark.parametrize("projection", ["q", "down"])
def test_the_difference_form_leaves_the_target_alone_where_the_source_agrees_with_it(projection, biases, monkeypatch):
    """A source whose outputs, mapped, are the target's own: the difference is 0 and W~ is W, exactly."""
    plans, target, source = random_pair(biases)
    transport = Transport(plans, source, FusionSettings("regression", rows="difference"))
    own = plans.rows("target", projection, 0, "fit")
    monkeypatch.setattr(
        transport.feature_map, "responses", lambda layer, c, outputs: own if outputs is None else own[:, outputs]
    )
    (residual,) = transport_into([empty_residual(plans, target, 0, projection, 0)], transport, 0)
    assert torch.equal(residual.weight, residual.original_weight)
    if biases:
        assert torch.equal(residual.bias, residual.original_bias)


@pytest.mark.parametrize("rows", ["aligned", "anchored", "difference"])
def test_the_mean_output_is_kept_on_the_mean_of_the_rows_that_were_regressed(rows):
    plans, target, source = random_pair()
    residual = transported(plans, target, source, "q", rows)
    aligned, others = plans.raw("target", "attn_in", 0), plans.raw("target", "attn_in", 0, 25)
    if rows == "aligned":
        x = aligned.mean(0)
    else:
        weights = torch.cat([torch.ones(T - 20), torch.full((25,), plans.unaligned_weight)])[:, None]
        x = (weights * torch.cat([aligned[: T - 20], others])).sum(0) / weights.sum()
    assert_close(residual.weight @ x, residual.original_weight @ x, atol=1e-4, rtol=1e-4)


def test_self_regresses_on_the_same_rows_as_the_transported_weight():
    plans, target, source = random_pair()
    for rows in ("aligned", "anchored"):
        transport = Transport(plans, source, FusionSettings("regression", rows=rows))
        residual = empty_residual(plans, target, 0, "up", 0)
        x, y = (plans.rows("target", side, 0, "fit") for side in ("mlp_in", "up"))
        expected = Ridge(x, 0.01).map(y)
        if rows == "anchored":
            others = Anchors(plans.unaligned("mlp_in", 0), plans.unaligned("up", 0), plans.unaligned_weight)
            expected = regress(x, y, 0.01, others)
        got = CONTROLS["self"](residual, transport, torch.Generator())
        assert_close(got.weight, transport.fill(residual, expected, None).weight)


def test_filtered_self_has_the_spectrum_of_the_responses_in_the_targets_own_components():
    Y, Z = draw(50, 6, seed=1), draw(50, 6, seed=2) @ draw(6, 6, seed=3) / 4
    filtered = with_spectrum_of(Y, Z)
    assert_close(torch.linalg.svdvals(filtered), torch.linalg.svdvals(Z), atol=1e-4, rtol=1e-4)
    directions = torch.linalg.svd(Y, full_matrices=False).Vh
    mixed = directions @ (filtered.T @ filtered) @ directions.T  # diagonal in the target's own components
    assert_close(mixed, torch.diag(mixed.diagonal()), atol=1e-3, rtol=1e-3)
    plans, target, source = random_pair()
    coupling = Transport(plans, source, FusionSettings("coupling"))
    with pytest.raises(UserError, match="filtered_self needs the responses of a regression"):
        CONTROLS["filtered_self"](empty_residual(plans, target, 0, "q", 0), coupling, torch.Generator())
