"""Feature maps against the formulas written out densely, the source layers that take part, and a map of one's own."""

import ast

import numpy as np
import pytest
import torch
from conftest import ROOT
from random_plans import M, random_pair
from torch.testing import assert_close

from core.errors import UserError
from core.fusion.feature_maps import FEATURE_MAPS, Barycentric
from core.fusion.projections import ATTENTION, COLUMNS, PROJECTIONS, ROWS
from core.fusion.settings import FusionSettings
from core.fusion.transport_weights import Transport, empty_residual, fuse_attention_only_from_hot_dir
from core.hot_transport import effective_layer_plan


@pytest.fixture
def world():
    return random_pair()


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
@pytest.mark.parametrize("projection", ATTENTION)
@pytest.mark.parametrize("top_k", [0, 2])
@pytest.mark.parametrize("biases", [("q", "k", "v"), tuple(PROJECTIONS)])
def test_transported_weight_equals_the_formula(feature_map, projection, top_k, biases):
    plans, target, source = random_pair(source_biases=biases)
    transport = Transport(plans, source, FusionSettings(feature_map))
    W_tilde, b_tilde = dense(plans, source, feature_map, 1, projection)
    residual = empty_residual(plans, target, 1, projection, top_k)
    weight, bias = transport.transported(1, {projection: residual.index})[projection]
    assert residual.axis == (COLUMNS if projection == "o" else ROWS)
    assert_close(weight, W_tilde.index_select(residual.axis, residual.index), atol=1e-6, rtol=1e-5)
    if projection not in biases:
        assert bias is None
    elif residual.axis == COLUMNS:
        assert_close(bias, b_tilde, atol=1e-5, rtol=1e-5)
    else:
        assert_close(bias, b_tilde[residual.index], atol=1e-5, rtol=1e-5)


def test_regression_reads_the_best_layer_with_ridge_maps(world):
    plans, _, source = world
    transport = Transport(plans, source, FusionSettings("regression", ridge=0.05))
    m = int(plans.layer_plan("v")[0].argmax())
    assert transport.feature_map.shares(0, "v") == {m: pytest.approx(1.0)}

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
        indices = {c: torch.tensor([0, 2]) for c in ATTENTION}
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
        Transport(plans, source, FusionSettings(feature_map)).feature_map.shares(0, "q")


def test_negligible_source_layers_are_left_out(world, monkeypatch):
    plans, _, source = world
    row = torch.tensor([0.5, 1e-5, 0.5]).double()
    monkeypatch.setattr(type(plans), "layer_plan", lambda *_: row.repeat(2, 1) / 7)
    mass = float(row.sum()) / 7
    by_default = Transport(plans, source, FusionSettings("coupling")).feature_map.shares(0, "q")
    kept = [m for m in range(M) if row[m] >= 1e-4 * row.sum()]
    assert list(by_default) == kept and len(kept) < M
    assert sum(by_default.values()) == pytest.approx(mass)
    everything = Transport(plans, source, FusionSettings("coupling", p_topk=M)).feature_map.shares(0, "q")
    assert len(everything) == M and sum(everything.values()) == pytest.approx(mass)


def test_p_topk_keeps_the_mass_and_renormalises(world):
    plans, _, source = world
    row = plans.layer_plan("q")[0]
    for feature_map, mass in (("coupling", float(row.sum())), ("barycentric", 1.0), ("regression", 1.0)):
        weights = Transport(plans, source, FusionSettings(feature_map, p_topk=2)).feature_map.shares(0, "q")
        assert set(weights) == set(row.topk(2).indices.tolist())
        assert sum(weights.values()) == pytest.approx(mass)
        best, second = row.topk(2).indices.tolist()
        assert weights[best] / weights[second] == pytest.approx(float(row[best] / row[second]))


def test_q_topk_keeps_the_mass_of_each_row(world):
    plans, _, source = world
    Q = plans.feature_plan("q", 0, 1)
    sparse = Transport(plans, source, FusionSettings("coupling", q_topk=3)).feature_map.plan("q", 0, 1, None)
    assert torch.equal((sparse > 0).sum(1), torch.full((6,), 3))
    assert_close(sparse.sum(1), Q.sum(1))
    assert torch.equal(sparse.argmax(1), Q.argmax(1))


def test_a_map_that_reads_no_plans_refuses_to_thin_them_out():
    with pytest.raises(UserError, match="q_topk thins out plans, which regression does not read"):
        FusionSettings("regression", q_topk=3).check()
    FusionSettings("calibrated", q_topk=3).check()


class Halved(Barycentric):
    """A feature map of one's own: half of the barycentric one, from the two best source layers."""

    default_p_topk = 2
    fuses_biases = False
    keeps_mean = True

    def out_map(self, side, layer, m, rows):
        return super().out_map(side, layer, m, rows) / 2


def test_a_feature_map_is_a_class_and_a_row(world, monkeypatch):
    plans, target, source = random_pair(target_biases=tuple(PROJECTIONS))
    monkeypatch.setitem(FEATURE_MAPS, "halved", Halved)
    halved, whole = (Transport(plans, source, FusionSettings(name, p_topk=2)) for name in ("halved", "barycentric"))
    indices = {projection: torch.tensor([0, 2]) for projection in ATTENTION}
    expected = whole.transported(1, indices)
    for projection, (weight, bias) in halved.transported(1, indices).items():
        assert_close(weight, expected[projection][0] / 2)
        assert bias is None
    settings = FusionSettings("halved", q_topk=3)
    settings.check()
    for residual, line in fuse_attention_only_from_hot_dir(plans, target, source, settings):
        x = plans.mean("target", PROJECTIONS[residual.projection].input_side, residual.layer)
        x = x[residual.index] if residual.axis == COLUMNS else x
        kept = residual.weight @ x + residual.bias
        assert_close(kept, residual.original_weight @ x + residual.original_bias, atol=1e-5, rtol=1e-5)
        assert len(line["source_layers"]) == 2 and line["bias"] == "fused"


def test_no_file_compares_the_name_of_a_feature_map():
    """Whatever differs between feature maps is asked of the class, so that a new one needs no change elsewhere."""
    folders = [ROOT / name for name in ("core", "evaluation", "scripts", "datasets")]
    found = []
    for path in [*ROOT.glob("*.py"), *(path for folder in folders for path in folder.rglob("*.py"))]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare | ast.Match):
                names = {part.value for part in ast.walk(node) if isinstance(part, ast.Constant)} & FEATURE_MAPS.keys()
                found += [f"{path.relative_to(ROOT)}:{node.lineno} {name}" for name in names]
    assert not found
