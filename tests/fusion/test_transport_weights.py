"""The mean output, the report and what is measured on rows kept aside."""

from dataclasses import replace

import pytest
import torch
from random_plans import L, random_pair
from torch.testing import assert_close

from core.fusion.projections import ATTENTION, COLUMNS, PROJECTIONS
from core.fusion.residual import fold_bias, fold_weight
from core.fusion.settings import FusionSettings
from core.fusion.transport_weights import (
    Transport,
    empty_residual,
    explained_variance,
    fuse_attention_only_from_hot_dir,
    transport_into,
)


@pytest.mark.parametrize(("projection", "top_k"), [("q", 0), ("v", 2), ("o", 0), ("o", 3)])
@pytest.mark.parametrize("biases", [(), tuple(PROJECTIONS)])
def test_keep_mean_gives_the_mean_output_on_the_mean_input(projection, top_k, biases):
    plans, target, source = random_pair(biases)
    residual = empty_residual(plans, target, 0, projection, top_k)
    transport = Transport(plans, source, FusionSettings("regression"))
    residual = transport.keep_mean(replace(residual, weight=torch.randn_like(residual.weight)))
    x = plans.mean("target", PROJECTIONS[projection].input_side, 0)
    if residual.axis == COLUMNS:
        x = x[residual.index]
    got, expected = residual.weight @ x, residual.original_weight @ x
    if biases:
        got, expected = got + residual.bias, expected + residual.original_bias
        assert_close(residual.bias, expected - residual.weight @ x, atol=1e-5, rtol=1e-5)
    assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("projection", "top_k"), [("q", 0), ("v", 2), ("o", 0), ("o", 3)])
@pytest.mark.parametrize("biases", [(), tuple(PROJECTIONS)])
@pytest.mark.parametrize("rows", ["aligned", "anchored"])
def test_adding_leaves_the_mean_output_as_it_is(projection, top_k, biases, rows):
    """W + alpha W~ on the target's mean input, written out, against the target itself."""
    plans, target, source = random_pair(biases)
    transport = Transport(plans, source, FusionSettings("regression", "additive", rows=rows))
    (residual,) = transport_into([empty_residual(plans, target, 0, projection, top_k)], transport, 0)
    x = transport.feature_map.fits.mean_input(PROJECTIONS[projection].input_side, 0)
    W, b = target.weight(0, projection), target.bias(0, projection)
    got, expected = fold_weight(W, residual, 0.3, "additive") @ x, W @ x
    assert not torch.allclose(fold_weight(W, residual, 0.3, "additive"), W, atol=1e-2)
    if biases:
        got, expected = got + fold_bias(b, residual, 0.3, "additive"), expected + b
    assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_report_counts_biases_and_measures():
    plans, target, source = random_pair()
    out = list(fuse_attention_only_from_hot_dir(plans, target, source, FusionSettings("regression", top_k=0)))
    assert [(r.layer, r.projection) for r, _ in out] == [(layer, c) for layer in range(L) for c in ATTENTION]
    assert [line["bias"] for _, line in out] == ["dropped", "dropped", "dropped", "none"] * L
    residual, line = out[0]
    W, W_tilde = residual.original_weight, residual.weight
    assert line["norm_ratio"] == pytest.approx(float(W_tilde.norm() / W.norm()), rel=1e-5)
    assert line["cosine"] == pytest.approx(float(torch.cosine_similarity(W.flatten(), W_tilde.flatten(), 0)), abs=1e-5)
    plans, with_bias, _ = random_pair(("q", "k"))
    kinds = [line["bias"] for _, line in fuse_attention_only_from_hot_dir(plans, with_bias, source, FusionSettings())]
    assert kinds == ["fused", "fused", "dropped", "none"] * L


def test_explained_variance_is_one_for_the_target_itself_and_zero_for_nothing():
    plans, target, _ = random_pair()
    for projection, top_k in (("q", 0), ("o", 3)):
        residual = empty_residual(plans, target, 0, projection, top_k)
        assert explained_variance(residual, plans) == pytest.approx(0.0, abs=1e-6)
        assert explained_variance(replace(residual, weight=residual.original_weight), plans) == pytest.approx(1.0)
