"""Transported weights against the formulas written out densely, selection, mixing, and Corollary 4.2."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from core.errors import UserError
from core.fusion.controls import CONTROLS, control_residual
from core.fusion.projections import PROJECTIONS
from core.fusion.residual import mix, select
from core.fusion.ridge import ridge_factor, solve_ridge
from core.fusion.settings import FEATURE_MAPS, FusionSettings
from core.fusion.transport_weights import (
    Transport,
    empty_residual,
    explained_variance,
    fuse_attention_only_from_hot_dir,
    keep_mean,
)
from core.hot_transport import effective_layer_plan

L, M, T = 2, 3, 60
TARGET = {"q": 6, "k": 4, "v": 4, "o": 5, "attn_in": 5, "o_in": 6}
SOURCE = {"q": 8, "k": 4, "v": 4, "o": 7, "attn_in": 7, "o_in": 8}


def ridge_map(R: torch.Tensor, S: torch.Tensor, ridge: float) -> torch.Tensor:
    return solve_ridge(ridge_factor(R, ridge), R, S)


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class FakeWeights:
    def __init__(self, sizes, seed, biases):
        self.sizes, self.seed, self.biases = sizes, seed, biases

    def weight(self, layer, projection):
        return draw(
            self.sizes[projection],
            self.sizes[PROJECTIONS[projection].input_side],
            seed=self.seed + 7 * layer + ord(projection),
        )

    def bias(self, layer, projection):
        return (
            draw(self.sizes[projection], seed=self.seed + 99 + layer + ord(projection))
            if projection in self.biases
            else None
        )


class FakePlans:
    """Random plans, and rows with the law of real ones: the target's outputs are its weights times its inputs."""

    shape = (L, M)

    def __init__(self, target):
        self.target = target

    def layer_plan(self, projection):
        return torch.softmax(draw(L, M, seed=ord(projection)), 1).double() / L

    def feature_plan(self, side, layer, m, rows=None):
        n, k = TARGET[side], SOURCE[side]
        Q = torch.softmax(draw(n * k, seed=layer + 10 * m + len(side)), 0).reshape(n, k)
        return Q if rows is None else Q[rows]

    def raw(self, model, side, layer):
        if model == "target" and side in "qkvo":
            x = self.raw(model, PROJECTIONS[side].input_side, layer)
            bias = self.target.bias(layer, side)
            return x @ self.target.weight(layer, side).T + (0 if bias is None else bias)
        n = (TARGET if model == "target" else SOURCE)[side]
        mixed = draw(T, n, seed=1000 + layer + len(side) + (500 if model == "source" else 0)) @ draw(n, n, seed=n)
        return mixed + draw(n, seed=3)

    def rows(self, model, side, layer, part):
        rows = self.raw(model, side, layer)[: T - 20] if part == "fit" else self.raw(model, side, layer)[T - 20 :]
        return rows - rows.mean(0)

    def mean(self, model, side, layer):
        return self.raw(model, side, layer).mean(0)

    def std(self, model, side, layer):
        return self.raw(model, side, layer).std(0)

    def strongest(self, side, layer):
        return self.raw("target", side, layer).abs().mean(0).argsort(descending=True)


@pytest.fixture
def world():
    target = FakeWeights(TARGET, 0, "")
    return FakePlans(target), target, FakeWeights(SOURCE, 300, "qkv")


def dense(plans, source, feature_map, layer, projection):
    """W~ and b~ by the table of feature maps, all source layers, nothing selected."""
    side = PROJECTIONS[projection].input_side
    P = plans.layer_plan(projection)[layer].float()
    p = P if feature_map == "coupling" else P / P.sum()
    W_tilde, b_tilde = 0, 0
    for m in range(M):
        Q_out, Q_in = plans.feature_plan(projection, layer, m), plans.feature_plan(side, layer, m)
        if feature_map == "coupling":
            Out, In = Q_out, Q_in.T
        else:
            Out, In = len(Q_out) * Q_out, Q_in.shape[1] * Q_in.T
        if feature_map == "calibrated":
            Out = (
                torch.diag(plans.std("target", projection, layer))
                @ Out
                @ torch.diag(1 / plans.std("source", projection, m))
            )
            In = torch.diag(plans.std("source", side, m)) @ In @ torch.diag(1 / plans.std("target", side, layer))
        W_tilde = W_tilde + p[m] * Out @ source.weight(m, projection) @ In
        if source.bias(m, projection) is not None:
            b_tilde = b_tilde + p[m] * Out @ source.bias(m, projection)
    return W_tilde, b_tilde


@pytest.mark.parametrize("feature_map", ["coupling", "barycentric", "calibrated"])
@pytest.mark.parametrize("projection", ["q", "k", "v", "o"])
@pytest.mark.parametrize("top_k", [0, 2])
@pytest.mark.parametrize("o_bias", [False, True])
def test_transported_weight_equals_the_formula(world, feature_map, projection, top_k, o_bias):
    plans, target, source = world
    if o_bias:
        source = FakeWeights(SOURCE, 300, "qkvo")
    transport = Transport(plans, source, FusionSettings(feature_map))
    W_tilde, b_tilde = dense(plans, source, feature_map, 1, projection)
    residual = empty_residual(plans, target, 1, projection, top_k)
    weight, bias = transport.transported(1, {projection: residual.index})[projection]
    assert residual.axis == (1 if projection == "o" else 0)
    assert_close(weight, W_tilde.index_select(residual.axis, residual.index), atol=1e-6, rtol=1e-5)
    if projection == "o" and not o_bias:
        assert bias is None
    elif projection == "o":
        assert_close(bias, b_tilde, atol=1e-5, rtol=1e-5)
    else:
        assert_close(bias, b_tilde[residual.index], atol=1e-5, rtol=1e-5)


def test_regression_reads_the_best_layer_with_ridge_maps(world):
    plans, _, source = world
    transport = Transport(plans, source, FusionSettings("regression", ridge=0.05))
    m = int(plans.layer_plan("v")[0].argmax())
    assert transport.layer_weights(0, "v") == {m: pytest.approx(1.0)}

    def ridge(R, S):
        R, S = R.double().numpy(), S.double().numpy()
        gram = R.T @ R
        return np.linalg.solve(gram + 0.05 * np.mean(np.diag(gram)) * np.eye(len(gram)), R.T @ S).T

    In = ridge(plans.rows("target", "attn_in", 0, "fit"), plans.rows("source", "attn_in", m, "fit"))
    Out = ridge(plans.rows("source", "v", m, "fit"), plans.rows("target", "v", 0, "fit"))
    expected = torch.from_numpy(Out @ source.weight(m, "v").double().numpy() @ In)
    weight, bias = transport.transported(0, {"v": torch.arange(4)})["v"]
    assert_close(weight.double(), expected, atol=1e-4, rtol=1e-3)
    assert bias is None


def test_projections_together_are_each_alone(world):
    """Also where their layer plans keep other source layers."""
    plans, _, source = world
    for feature_map in ("calibrated", "regression"):
        transport = Transport(plans, source, FusionSettings(feature_map, p_topk=2))
        indices = {c: torch.tensor([0, 2]) for c in "qkvo"}
        together = transport.transported(0, indices)
        for c, (weight, bias) in together.items():
            alone = transport.transported(0, {c: indices[c]})[c]
            assert torch.equal(weight, alone[0]) and (bias is None) == (alone[1] is None)


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_a_target_layer_without_a_source_layer_is_refused(world, monkeypatch, feature_map):
    """Too small an eta: the plans of a projection's two sides have no source layer in common, and P_eff a row of 0."""
    plans, _, source = world
    before, after = torch.tensor([[0.5, 0, 0], [0, 0.25, 0.25]]), torch.tensor([[0, 0.25, 0.25], [0.5, 0, 0]])
    monkeypatch.setattr(type(plans), "layer_plan", lambda *_: effective_layer_plan(before, after))
    with pytest.raises(UserError, match=r"target layer 0, projection q, sums to 0.0.*a larger --eta"):
        Transport(plans, source, FusionSettings(feature_map)).layer_weights(0, "q")


def test_negligible_source_layers_are_left_out(world, monkeypatch):
    plans, _, source = world
    row = torch.tensor([0.5, 1e-5, 0.5]).double()
    monkeypatch.setattr(type(plans), "layer_plan", lambda *_: row.repeat(2, 1) / 7)
    mass = float(row.sum()) / 7
    by_default = Transport(plans, source, FusionSettings("coupling")).layer_weights(0, "q")
    kept = [m for m in range(M) if row[m] >= 1e-4 * row.sum()]
    assert list(by_default) == kept and len(kept) < M
    assert sum(by_default.values()) == pytest.approx(mass)
    everything = Transport(plans, source, FusionSettings("coupling", p_topk=M)).layer_weights(0, "q")
    assert len(everything) == M and sum(everything.values()) == pytest.approx(mass)


def test_p_topk_keeps_the_mass_and_renormalises(world):
    plans, _, source = world
    row = plans.layer_plan("q")[0]
    for feature_map, mass in (("coupling", float(row.sum())), ("barycentric", 1.0), ("regression", 1.0)):
        weights = Transport(plans, source, FusionSettings(feature_map, p_topk=2)).layer_weights(0, "q")
        assert set(weights) == set(row.topk(2).indices.tolist())
        assert sum(weights.values()) == pytest.approx(mass)
        best, second = row.topk(2).indices.tolist()
        assert weights[best] / weights[second] == pytest.approx(float(row[best] / row[second]))


def test_q_topk_keeps_the_mass_of_each_row(world):
    plans, _, source = world
    Q = plans.feature_plan("q", 0, 1)
    sparse = Transport(plans, source, FusionSettings("coupling", q_topk=3))._sparse_plan("q", 0, 1, None)
    assert torch.equal((sparse > 0).sum(1), torch.full((6,), 3))
    assert_close(sparse.sum(1), Q.sum(1))
    assert torch.equal(sparse.argmax(1), Q.argmax(1))


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


def test_select_is_strongest_first_then_ascending():
    order = torch.tensor([4, 1, 3, 0, 2])
    assert select(order, 2).tolist() == [1, 4]
    assert select(order, 0).tolist() == select(order, 9).tolist() == [0, 1, 2, 3, 4]


def test_mix_forms_and_alpha_zero_bit_for_bit():
    W, W_tilde = torch.tensor([1.0, -0.0, 2.0]), torch.tensor([3.0, 5.0, -2.0])
    assert_close(mix(W, W_tilde, 0.25, "interpolate"), 0.75 * W + 0.25 * W_tilde)
    assert_close(mix(W, W_tilde, 0.25, "additive"), W + 0.25 * W_tilde)
    for form in ("interpolate", "additive"):
        assert torch.equal(torch.signbit(mix(W, W_tilde, 0.0, form)), torch.signbit(W))


@pytest.mark.parametrize(("projection", "top_k"), [("q", 0), ("v", 2), ("o", 0), ("o", 3)])
@pytest.mark.parametrize("biases", ["", "qkvo"])
def test_keep_mean_gives_the_mean_output_on_the_mean_input(projection, top_k, biases):
    target = FakeWeights(TARGET, 0, biases)
    plans = FakePlans(target)
    residual = empty_residual(plans, target, 0, projection, top_k)
    residual = keep_mean(replace(residual, weight=torch.randn_like(residual.weight)), plans)
    x = plans.mean("target", PROJECTIONS[projection].input_side, 0)
    if projection == "o":
        x = x[residual.index]
    got, expected = residual.weight @ x, residual.original_weight @ x
    if biases:
        got, expected = got + residual.bias, expected + residual.original_bias
        assert_close(residual.bias, expected - residual.weight @ x, atol=1e-5, rtol=1e-5)
    assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_report_counts_biases_and_measures(world):
    plans, target, source = world
    out = list(fuse_attention_only_from_hot_dir(plans, target, source, FusionSettings("regression", top_k=0)))
    assert [(r.layer, r.projection) for r, _ in out] == [(layer, c) for layer in range(L) for c in "qkvo"]
    assert [line["bias"] for _, line in out] == ["dropped", "dropped", "dropped", "none"] * L
    residual, line = out[0]
    W, W_tilde = residual.original_weight, residual.weight
    assert line["norm_ratio"] == pytest.approx(float(W_tilde.norm() / W.norm()), rel=1e-5)
    assert line["cosine"] == pytest.approx(float(torch.cosine_similarity(W.flatten(), W_tilde.flatten(), 0)), abs=1e-5)
    with_bias = FakeWeights(TARGET, 0, "qk")
    plans = FakePlans(with_bias)
    kinds = [line["bias"] for _, line in fuse_attention_only_from_hot_dir(plans, with_bias, source, FusionSettings())]
    assert kinds == ["fused", "fused", "dropped", "none"] * L


def test_explained_variance_is_one_for_the_target_itself_and_zero_for_nothing(world):
    plans, target, _ = world
    for projection, top_k in (("q", 0), ("o", 3)):
        residual = empty_residual(plans, target, 0, projection, top_k)
        assert explained_variance(residual, plans) == pytest.approx(0.0, abs=1e-6)
        assert explained_variance(replace(residual, weight=residual.original_weight), plans) == pytest.approx(1.0)


@pytest.mark.parametrize("projection", ["q", "o"])
@pytest.mark.parametrize("biases", ["", "qkvo"])
def test_controls_share_norm_or_mean_but_not_the_correspondence(projection, biases):
    target = FakeWeights(TARGET, 0, biases)
    plans, source = FakePlans(target), FakeWeights(SOURCE, 300, "qkv")
    settings = FusionSettings("regression", top_k=3)
    transport = Transport(plans, source, settings)
    fused = {(r.layer, r.projection): r for r, _ in fuse_attention_only_from_hot_dir(plans, target, source, settings)}
    residual = fused[0, projection]
    made = {
        name: control_residual(name, residual, plans, transport, torch.Generator().manual_seed(1)) for name in CONTROLS
    }
    x = plans.mean("target", PROJECTIONS[projection].input_side, 0)
    x = x[residual.index] if projection == "o" else x

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
    wrong = keep_mean(replace(residual, weight=elsewhere, bias=None), plans)
    assert_close(made["wrong_layer"].weight, wrong.weight)
    own = ridge_map(
        plans.rows("target", PROJECTIONS[projection].input_side, 0, "fit"),
        plans.rows("target", projection, 0, "fit"),
        settings.ridge,
    )
    smoothed = keep_mean(replace(residual, weight=own.index_select(residual.axis, residual.index)), plans)
    assert_close(made["self"].weight, smoothed.weight)
    for control in made.values():
        assert torch.equal(control.index, residual.index) and control.weight.shape == residual.weight.shape


def test_unknown_control_is_refused(world):
    plans, target, source = world
    residual = empty_residual(plans, target, 0, "q", 0)
    with pytest.raises(ValueError, match="expected one of damped"):
        control_residual("shuffled", residual, plans, Transport(plans, source, FusionSettings()), torch.Generator())
