"""Task vectors: what an expert learned over its base, transported through every feature map."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from random_plans import SOURCE, TARGET, L, M, RandomPlans, RandomWeights, T, draw, number, random_pair
from scipy.linalg import orthogonal_procrustes
from torch.testing import assert_close

from core.errors import UserError
from core.fusion.anchored import Anchors, regress
from core.fusion.controls import CONTROLS
from core.fusion.feature_maps import FEATURE_MAPS
from core.fusion.projections import ATTENTION, COLUMNS, PROJECTIONS
from core.fusion.residual import fold_weight
from core.fusion.ridge import Ridge, orthogonal_map
from core.fusion.settings import FusionSettings
from core.fusion.task_vector import TaskVector
from core.fusion.transport_weights import (
    Transport,
    empty_residual,
    fuse_attention_only_from_hot_dir,
    transport_into,
)
from core.runs.settings import Experiment

EVERY, FITTED = tuple(PROJECTIONS), ("regression", "procrustes")


def base_of_source(biases=("q", "k", "v")):
    return RandomWeights(SOURCE, 900, biases)


def fused(transport, target, projection, top_k=0, layer=0):
    (residual,) = transport_into([empty_residual(transport.plans, target, layer, projection, top_k)], transport, layer)
    return residual


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("projection", ATTENTION)
@pytest.mark.parametrize("biases", [(), EVERY])
def test_a_source_has_learned_nothing_over_itself(feature_map, projection, biases):
    plans, target, source = random_pair(biases)
    transport = Transport(plans, source, FusionSettings(feature_map), source)
    residual = fused(transport, target, projection, top_k=3)
    assert torch.equal(residual.weight, residual.original_weight)
    if residual.bias is not None:
        assert torch.equal(residual.bias, residual.original_bias)


@pytest.mark.parametrize("feature_map", ["coupling", "barycentric", "calibrated"])
@pytest.mark.parametrize("projection", ATTENTION)
@pytest.mark.parametrize("top_k", [0, 3])
def test_plans_transport_the_difference_as_they_transport_the_two_models(feature_map, projection, top_k):
    """They are linear: what they make of the difference is the difference of what they make of expert and base."""
    plans, target, source = random_pair(EVERY, EVERY)
    base = base_of_source(EVERY)
    settings = FusionSettings(feature_map)
    residual = fused(Transport(plans, source, settings, base), target, projection, top_k)
    of_expert, of_base = (
        fused(Transport(plans, model, settings), target, projection, top_k) for model in (source, base)
    )
    change, expected = residual.weight - residual.original_weight, of_expert.weight - of_base.weight
    assert_close(change, expected, atol=1e-5, rtol=1e-4)
    assert_close(residual.bias - residual.original_bias, of_expert.bias - of_base.bias, atol=1e-5, rtol=1e-4)


def in_numpy(plans, feature_map, projection, difference, ridge=0.01):
    """Out (W_s - W_base) In of target layer 0 in float64, with scipy's Procrustes."""
    m, side = int(plans.layer_plan(projection)[0].argmax()), PROJECTIONS[projection].input_side
    x, y, x_s, y_s = (
        plans.rows(model, c, layer, "fit").double().numpy()
        for model, layer in (("target", 0), ("source", m))
        for c in (side, projection)
    )

    def ridge_map(R, S):
        gram = R.T @ R
        return np.linalg.solve(gram + ridge * np.mean(np.diag(gram)) * np.eye(len(gram)), R.T @ S).T

    if feature_map == "procrustes":
        width = max(y.shape[1], y_s.shape[1])
        padded = [np.pad(rows, ((0, 0), (0, width - rows.shape[1]))) for rows in (y_s, y)]
        Out = orthogonal_procrustes(*padded)[0].T[: y.shape[1], : y_s.shape[1]]
        Out = np.linalg.pinv(y, rcond=1e-4) @ y @ Out  # scipy also turns what the outputs cannot span
    else:
        Out = ridge_map(y_s, y)
    return Out @ difference.weight(m, projection).double().numpy() @ ridge_map(x, x_s)


@pytest.mark.parametrize("feature_map", FITTED)
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_one_regression_gives_the_product_of_both_maps_with_the_difference(feature_map, projection):
    plans, target, source = random_pair(EVERY)
    base = base_of_source()
    residual = fused(Transport(plans, source, FusionSettings(feature_map), base), target, projection)
    change = (residual.weight - residual.original_weight).double()
    expected = torch.from_numpy(in_numpy(plans, feature_map, projection, TaskVector(source, base)))
    assert float((change - expected).norm() / expected.norm()) < 1e-3
    x = plans.mean("target", PROJECTIONS[projection].input_side, 0)
    assert_close(residual.bias, residual.original_bias - change.float() @ x, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("feature_map", FITTED)
@pytest.mark.parametrize(("projection", "top_k"), [("q", 0), ("v", 2), ("o", 3), ("down", 0)])
def test_the_mean_is_taken_out_of_the_change(feature_map, projection, top_k):
    """A target without biases: Delta - Delta x x^T / |x|^2, and the mean output stays what it was."""
    plans, target, source = random_pair()
    base = base_of_source()
    transport = Transport(plans, source, FusionSettings(feature_map), base)
    residual = fused(transport, target, projection, top_k)
    (delta, _) = transport.transported(0, {projection: residual.index})[projection]
    x = plans.mean("target", PROJECTIONS[projection].input_side, 0)
    x = x[residual.index] if residual.axis == COLUMNS else x
    expected = delta - torch.outer(delta @ x, x) / (x @ x)
    assert_close(residual.weight - residual.original_weight, expected, atol=1e-4, rtol=1e-3)
    folded = fold_weight(target.weight(0, projection), residual, 0.25, "interpolate").index_select(
        residual.axis, residual.index
    )
    assert_close(folded, residual.original_weight + 0.25 * expected, atol=1e-4, rtol=1e-3)


class Permuted(RandomPlans):
    """The source's neurons are the target's in another order, layer by layer."""

    def layer_plan(self, projection):
        return torch.eye(L, M).double() / L

    def raw(self, model, side, layer, rows=T):
        if side in PROJECTIONS:
            return super().raw(model, side, layer, rows)
        n = TARGET[side]
        x = draw(rows, n, seed=layer + number(side)) + draw(n, seed=3)
        return x if model == "target" else x[:, order(n)]


class InOtherOrder:
    """A model with the neurons of another in another order, and with a change of some of its weights."""

    def __init__(self, model, changes):
        self.model, self.changes, self.sizes = model, changes, model.sizes

    def weight(self, layer, projection):
        W = self.model.weight(layer, projection) + self.changes.get((layer, projection), 0)
        return W[order(W.shape[0])][:, order(W.shape[1])]

    def bias(self, layer, projection):
        return None


def order(n):
    return torch.randperm(n, generator=torch.Generator().manual_seed(n))


@pytest.mark.parametrize("feature_map", FITTED)
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_a_permuted_expert_gives_the_target_what_it_learned(feature_map, projection):
    """Base = the target permuted, expert = the target plus a small change, permuted: the change comes back.

    To first order, because Out is fitted on outputs that the change has moved. What it did to the mean output is taken
    out. Where there are more outputs than inputs, Out is known on what the outputs span alone, and the change is there.
    """
    _, target, _ = random_pair()
    W = target.weight(1, projection)
    n, inputs = W.shape
    change = 1e-4 * (draw(n, inputs, seed=8) if n <= inputs else W @ draw(inputs, inputs, seed=8))
    expert, base = InOtherOrder(target, {(1, projection): change}), InOtherOrder(target, {})
    plans = Permuted(target, expert)
    transport = Transport(plans, expert, FusionSettings(feature_map, ridge=1e-6), base)
    residual = fused(transport, target, projection, layer=1)
    x = plans.mean("target", PROJECTIONS[projection].input_side, 1)
    expected = change - torch.outer(change @ x, x) / (x @ x)
    found = residual.weight - residual.original_weight
    assert float((found - expected).norm() / expected.norm()) < 0.01
    untouched = fused(transport, target, projection, layer=0)
    assert torch.equal(untouched.weight, untouched.original_weight)


@pytest.mark.parametrize("feature_map", FITTED)
def test_where_the_source_says_nothing_the_change_is_none(feature_map):
    """Anchored rows of a task vector have the response 0, and count in their natural proportion."""
    plans, target, source = random_pair(EVERY)
    base = base_of_source()
    transport = Transport(plans, source, FusionSettings(feature_map, rows="anchored"), base)
    residual = fused(transport, target, "up")
    x, others = plans.rows("target", "mlp_in", 0, "fit"), plans.unaligned("mlp_in", 0)
    nothing = Anchors(others, torch.zeros(len(others), len(residual.weight)), plans.unaligned_weight)
    expected = regress(x, transport.feature_map.responses(0, "up", None), 0.01, nothing)
    assert_close(residual.weight - residual.original_weight, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("r", "s"), [(6, 6), (4, 7), (7, 4)])
def test_the_orthogonal_map_is_scipys(r, s):
    """scipy knows square problems alone; the narrower rows are filled up with zeros."""
    R, S = draw(30, r, seed=1).double(), draw(30, s, seed=2).double()
    width = max(r, s)
    padded = [np.pad(rows.numpy(), ((0, 0), (0, width - rows.shape[1]))) for rows in (R, S)]
    expected = orthogonal_procrustes(*padded)[0].T[:s, :r]
    assert_close(orthogonal_map(R, S, min(r, s)), torch.from_numpy(expected.copy()), atol=1e-10, rtol=1e-10)


def test_the_orthogonal_map_sends_what_the_rows_do_not_say_to_zero():
    R, S = draw(30, 5, seed=1), draw(30, 5, seed=2)
    R[:, 2], S[:, 4] = 0, 0
    found = orthogonal_map(R, S, 5)
    assert_close(found[:, 2], torch.zeros(5), atol=1e-6, rtol=0)
    assert_close(found[4], torch.zeros(5), atol=1e-6, rtol=0)
    assert_close(torch.linalg.svdvals(found), torch.tensor([1.0, 1, 1, 1, 0]), atol=1e-5, rtol=1e-5)
    assert not orthogonal_map(torch.zeros_like(R), S, 5).any()


@pytest.mark.parametrize(("r", "s"), [(9, 7), (7, 9)])
def test_rounding_beyond_the_rank_of_the_rows_is_not_turned(r, s):
    """Rows of rank 3 in half precision: the map is that of the exact rows."""
    R, S = draw(50, 3, seed=1) @ draw(3, r, seed=2), draw(50, 3, seed=3) @ draw(3, s, seed=4)
    exact, rounded = orthogonal_map(R, S, 3), orthogonal_map(R.half().float(), S.half().float(), 3)
    assert_close(rounded, exact, atol=5e-3, rtol=0)
    assert_close(torch.linalg.svdvals(rounded)[:4], torch.tensor([1.0, 1, 1, 0]), atol=1e-5, rtol=0)
    U, _, Vh = torch.linalg.svd(S.T.double() @ R.double())
    assert_close(exact, (U[:, :3] @ Vh[:3]).float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("projection", ["q", "o"])
def test_procrustes_transports_a_whole_source_as_well(projection):
    plans, target, source = random_pair(EVERY)
    residual = fused(Transport(plans, source, FusionSettings("procrustes")), target, projection)
    m = int(plans.layer_plan(projection)[0].argmax())
    y_s, y = plans.rows("source", projection, m, "fit"), plans.rows("target", projection, 0, "fit")
    x = plans.rows("target", PROJECTIONS[projection].input_side, 0, "fit")
    assert_close(residual.weight, Ridge(x, 0.01).map(y_s @ orthogonal_map(y_s, y, 5).T), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("feature_map", FITTED)
@pytest.mark.parametrize("projection", ["q", "o"])
def test_controls_of_a_task_vector(feature_map, projection):
    plans, target, source = random_pair()
    transport = Transport(plans, source, FusionSettings(feature_map), base_of_source())
    residual = fused(transport, target, projection, top_k=3)
    made = {name: make(residual, transport, torch.Generator().manual_seed(1)) for name, make in CONTROLS.items()}
    W = residual.original_weight
    assert torch.equal(made["self"].weight, W)
    assert_close((made["permuted"].weight - W).flatten().sort().values, (residual.weight - W).flatten().sort().values)
    (elsewhere, _) = transport.transported(1, {projection: residual.index})[projection]
    assert_close(made["wrong_layer"].weight, transport.keep_mean(replace(residual, weight=W + elsewhere)).weight)
    assert not torch.equal(made["filtered_self"].weight, W)
    assert not made["damped"].weight.any()


def test_the_report_is_of_the_difference():
    plans, target, source = random_pair(EVERY)
    settings = FusionSettings("regression", top_k=0)
    for residual, line in fuse_attention_only_from_hot_dir(plans, target, source, settings, base=base_of_source()):
        W, change = residual.original_weight, residual.weight - residual.original_weight
        assert line["norm_ratio"] == pytest.approx(float(change.norm() / W.norm()), rel=1e-4)
        cosine = torch.cosine_similarity(W.flatten(), change.flatten(), 0)
        assert line["cosine"] == pytest.approx(float(cosine), abs=1e-4)
        assert line["explained_variance"] is None


def test_a_bias_that_one_model_lacks_is_zero_there():
    with_bias, without = RandomWeights(SOURCE, 1, ("q",)), RandomWeights(SOURCE, 2, ())
    b = with_bias.bias(0, "q")
    assert torch.equal(TaskVector(with_bias, without).bias(0, "q"), b)
    assert torch.equal(TaskVector(without, with_bias).bias(0, "q"), -b)
    assert not TaskVector(with_bias, with_bias).bias(0, "q").any()
    assert TaskVector(without, without).bias(0, "q") is None


def test_settings_that_mean_nothing_with_a_task_vector_are_refused():
    for name, value in (("residual_form", "additive"), ("rows", "difference")):
        Experiment.of(**{name: value}).check()
        with pytest.raises(UserError, match=f"{name} {value}.*--source-base"):
            Experiment.of(source_base="somebody", **{name: value}).check()
