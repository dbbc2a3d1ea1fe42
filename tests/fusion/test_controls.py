"""Controls share the norm or the mean of the fused residual, but not its correspondence."""

import numpy as np
import pytest
import torch
from random_plans import random_pair
from torch.testing import assert_close

from core.fusion.controls import CONTROLS
from core.fusion.projections import COLUMNS, PROJECTIONS, ROWS
from core.fusion.ridge import Ridge
from core.fusion.settings import FusionSettings
from core.fusion.transport_weights import (
    Transport,
    empty_residual,
    fuse_attention_only_from_hot_dir,
    transport_into,
)


@pytest.mark.parametrize("biases", [(), tuple(PROJECTIONS)])
def test_permuted_shuffles_what_is_added(biases):
    """With `additive` W~ is the change itself, and a control of the same norm has the entries of W~."""
    plans, target, source = random_pair(biases)
    settings = FusionSettings("regression", "additive", top_k=3)
    fused, _ = next(fuse_attention_only_from_hot_dir(plans, target, source, settings))
    transport = Transport(plans, source, settings)
    made = CONTROLS["permuted"](fused, transport, torch.Generator().manual_seed(1))
    assert torch.equal(made.weight.flatten().sort().values, fused.weight.flatten().sort().values)
    assert not torch.equal(made.weight, fused.weight)
    if biases:
        assert torch.equal(made.bias.sort().values, fused.bias.sort().values)


@pytest.mark.parametrize("projection", ["q", "o"])
@pytest.mark.parametrize("biases", [(), tuple(PROJECTIONS)])
def test_controls_share_norm_or_mean_but_not_the_correspondence(projection, biases):
    plans, target, source = random_pair(biases)
    settings = FusionSettings("regression", top_k=3)
    transport = Transport(plans, source, settings)
    fused = {(r.layer, r.projection): r for r, _ in fuse_attention_only_from_hot_dir(plans, target, source, settings)}
    residual = fused[0, projection]
    made = {name: make(residual, transport, torch.Generator().manual_seed(1)) for name, make in CONTROLS.items()}
    x = plans.mean("target", PROJECTIONS[projection].input_side, 0)
    x = x[residual.index] if residual.axis == COLUMNS else x

    assert not made["damped"].weight.any()
    y = residual.original_weight @ x
    if biases:
        assert not made["damped"].bias.any()
        assert not made["damped_mean"].weight.any()
        assert_close(made["damped_mean"].bias, y + residual.original_bias)
    else:
        assert_close(made["damped_mean"].weight, torch.outer(y, x) / (x @ x))
    change, shuffled = (r.weight - residual.original_weight for r in (residual, made["permuted"]))
    assert_close(shuffled.flatten().sort().values, change.flatten().sort().values)
    assert not torch.equal(shuffled, change)
    elsewhere, _ = transport.transported(1, {projection: residual.index})[projection]
    wrong = transport.fill(residual, elsewhere, None)
    assert_close(made["wrong_layer"].weight, wrong.weight)
    R = plans.rows("target", PROJECTIONS[projection].input_side, 0, "fit")
    own = Ridge(R, settings.ridge).map(plans.rows("target", projection, 0, "fit"))
    smoothed = transport.fill(residual, own.index_select(residual.axis, residual.index), None)
    assert_close(made["self"].weight, smoothed.weight)
    assert torch.equal(made["random_source"].weight, residual.weight)  # here on the rows of the same source
    for control in made.values():
        assert torch.equal(control.index, residual.index) and control.weight.shape == residual.weight.shape


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_filtered_self_has_the_spectrum_of_the_transported_outputs(projection):
    """Against numpy's singular value decomposition: U S V^T of the target's outputs with S of the responses Z."""
    plans, target, source = random_pair()
    transport = Transport(plans, source, FusionSettings("regression"))
    (residual,) = transport_into([empty_residual(plans, target, 0, projection, 0)], transport, 0)
    made = CONTROLS["filtered_self"](residual, transport, torch.Generator())
    outputs = residual.index if residual.axis == ROWS else slice(None)
    own = plans.rows("target", projection, 0, "fit")[:, outputs].double().numpy()
    Z = transport.feature_map.responses(0, projection, None)[:, outputs].double().numpy()
    U, S, Vh = np.linalg.svd(own, full_matrices=False)
    wanted = np.where(1e-4 * S[0] < S, np.linalg.svd(Z, compute_uv=False)[: len(S)], 0)
    x = plans.rows("target", PROJECTIONS[projection].input_side, 0, "fit")
    weight = Ridge(x, 0.01).map(torch.from_numpy(U * wanted @ Vh).float())
    weight = weight if residual.axis == ROWS else weight[:, residual.index]
    assert_close(made.weight, transport.fill(residual, weight, None).weight, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(made.weight, CONTROLS["self"](residual, transport, torch.Generator()).weight, atol=1e-2)
