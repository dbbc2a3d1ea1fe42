"""Strengths that are chosen or learned: the model with strengths, and the search on it."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import llama

from core.errors import UserError
from core.fusion.controls import CONTROLS
from core.fusion.residual import Residual
from core.fusion.strengths import in_words, mean_strength, strength_of
from core.models.checkpoints import open_checkpoint
from core.runs.plan_directory import PlanDirectory
from core.runs.settings import Experiment
from core.runs.strength_search import strength_rows, strength_search
from core.training.hot_linear import fold_in_place, restore_base
from core.training.strengths import StrengthSearch, StrengthSettings, StrengthTexts, learnable, lowest
from evaluation.arms.control_residuals import ControlResiduals
from evaluation.significance import record_of_difference

AUTO = StrengthSettings(learned=False, steps=0, free=False, seed=0)
PROJECTIONS = {"v": "self_attn.v_proj", "o": "self_attn.o_proj", "down": "mlp.down_proj", "gate": "mlp.gate_proj"}


def name_of(layer, projection):
    return f"model.layers.{layer}.{PROJECTIONS[projection]}"


def residual_of(model, layer, projection, k=None):
    """Random W~ on some rows or columns of a model's projection."""
    linear = model.get_submodule(name_of(layer, projection))
    empty = Residual(layer, projection, torch.empty(0), torch.empty(0), None, torch.empty(0), None)
    index = torch.randperm(linear.weight.shape[empty.axis])[:k].sort().values
    original = linear.weight.detach().index_select(empty.axis, index)
    residual = replace(empty, index=index, weight=original + 0.3 * torch.randn_like(original), original_weight=original)
    if linear.bias is None:
        return residual
    bias = linear.bias.detach()[residual.bias_index]
    return replace(residual, bias=bias + 0.3 * torch.randn_like(bias), original_bias=bias)


def examples(count, seed):
    """Texts that repeat three tokens, so that a model can be good or bad at them."""
    draw = torch.Generator().manual_seed(seed)
    ids = [[5, 6, 7] * 5 + torch.randint(3, 400, (3,), generator=draw).tolist() for _ in range(count)]
    return [{"input_ids": one, "labels": one} for one in ids]


def search_with(model, form="interpolate", groups=None):
    validation = examples(12, 1)
    texts = StrengthTexts(examples(16, 0), validation, groups or [str(n) for n in range(12)])
    tokens = [len(one["labels"]) - 1 for one in validation]
    return StrengthSearch(
        model, name_of, form, texts, 200, lambda ours, base: record_of_difference(ours, base, tokens, texts.groups)
    )


@pytest.fixture
def model():
    torch.manual_seed(0)
    return llama(attention_bias=True).eval()


@pytest.fixture
def improved(model):
    """(a target, the W~ that makes it better): the target was fine-tuned, and then got its old weights back."""
    before = [model.get_submodule(name_of(layer, "down")).weight.detach().clone() for layer in range(3)]
    trained = [model.get_submodule(name_of(layer, "down")).weight for layer in range(3)]
    adam = torch.optim.Adam(trained, lr=1e-2)
    for _ in range(15):
        batch = torch.tensor([one["input_ids"] for one in examples(8, 0)])
        model(input_ids=batch, labels=batch).loss.backward()
        adam.step()
        model.zero_grad()
    residuals = []
    for layer, (old, new) in enumerate(zip(before, trained, strict=True)):
        W_tilde = new.detach().clone()
        new.data.copy_(old)
        residuals.append(Residual(layer, "down", torch.arange(48), W_tilde, None, old, None))
    return model, residuals


@pytest.mark.parametrize("form", ["interpolate", "additive"])
def test_a_model_with_strengths_is_the_folded_model_and_its_gradients_are_right(model, form):
    residuals = [residual_of(model, 0, "v", 5), residual_of(model, 1, "o", 9), residual_of(model, 2, "down")]
    ids, values = torch.arange(3, 23).reshape(2, 10), torch.tensor([0.3, -0.2, 0.7], requires_grad=True)

    def loss_of(given):
        fold_in_place(model, residuals, name_of, dict(zip((r.name for r in residuals), given, strict=True)), form)
        with torch.no_grad():
            out = model(ids, labels=ids)
        restore_base(model, residuals, name_of)
        return out

    with learnable(model, residuals, name_of, form, values):
        out = model(ids, labels=ids)
        out.loss.backward()
        with torch.no_grad():  # a pass without gradients is the plain target's
            assert torch.equal(model(ids).logits, loss_of([0.0, 0.0, 0.0]).logits)
    torch.testing.assert_close(out.logits.detach(), loss_of(values.tolist()).logits, atol=1e-5, rtol=1e-4)
    for number in range(3):
        step = torch.zeros(3)
        step[number] = 2e-3
        up, down = (loss_of((values.detach() + sign * step).tolist()).loss for sign in (1, -1))
        torch.testing.assert_close(values.grad[number], (up - down) / 4e-3, atol=1e-3, rtol=1e-2)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_a_strength_that_helps_is_found_and_one_that_harms_is_zero(improved):
    model, better = improved
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    harmful = [residual_of(model, layer, "gate") for layer in range(3)]
    search = search_with(model)
    choice = search.find("fused", {"harmful": lambda: harmful, "better": lambda: iter(better)}, AUTO)
    assert choice.candidate == "better" and choice.alpha == 0.2 and choice.gain["ci95"][1] < 0
    losses = {one["alpha"]: one["validation"] for one in choice.tried if one["candidate"] == "better"}
    assert list(losses) == [0.02, 0.05, 0.1, 0.2] and sorted(losses.values(), reverse=True) == list(losses.values())
    assert [one["alpha"] for one in choice.tried if one["candidate"] == "harmful"] == [0.02]
    none = search.find("fused", {"harmful": lambda: harmful}, AUTO)
    assert none.alpha == 0 and "does not reliably help" in none.sentence("x")
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_where_no_strength_helps_the_rows_that_harm_least_are_kept(improved):
    model, _ = improved
    harmful = [residual_of(model, layer, "gate") for layer in range(3)]
    milder = [replace(one, weight=torch.lerp(one.original_weight, one.weight, 0.5)) for one in harmful]
    candidates = {"harmful": lambda: harmful, "milder": lambda: milder}
    choice = search_with(model).find("fused", candidates, AUTO)
    assert choice.alpha == 0 and choice.gain["diff"] == 0 and choice.candidate == "milder"
    learned = search_with(model).find("fused", candidates, StrengthSettings(True, 7, False, 0))
    assert learned.tried[-1]["candidate"] == "milder"


def test_a_gain_that_rests_on_one_group_is_none(improved):
    model, better = improved
    choice = search_with(model, groups=["one"] * 12).find("fused", {"better": lambda: better}, AUTO)
    assert choice.alpha == 0 and choice.gain["ci95"] is None and choice.gain["diff"] < 0
    assert "no interval" in choice.sentence("x")


def test_weights_that_are_not_finite_are_never_chosen(improved):
    model, better = improved
    broken = [replace(one, weight=torch.full_like(one.weight, math.nan)) for one in better]
    choice = search_with(model).find("fused", {"broken": lambda: broken, "better": lambda: better}, AUTO)
    assert choice.candidate == "better" and choice.alpha == 0.2
    assert search_with(model).find("fused", {"broken": lambda: broken}, AUTO).alpha == 0


def test_a_loss_that_is_not_finite_is_none_on_disk_and_refused_of_the_target(improved, plans, models, monkeypatch):
    model, better = improved
    broken = [replace(one, weight=torch.full_like(one.weight, math.nan)) for one in better]
    choice = search_with(model).find("fused", {"broken": lambda: broken}, AUTO)
    assert choice.record()["tried"][0]["validation"] is None
    target, experiment = open_checkpoint(str(models["target"])), Experiment.of(alpha="auto", validation_samples=4)
    rows = strength_rows(experiment, PlanDirectory(plans["token"]))
    model.model.norm.weight.data.fill_(math.nan)
    with pytest.raises(UserError, match=r"the loss of 4 of 4 validation texts is not finite.*--dtype float32"):
        strength_search(rows, target, model, experiment, record_of_difference)


def test_a_control_that_is_not_finite_ends_in_one_line(monkeypatch):
    def damaged(*_):
        raise ValueError("the transported weight has NaN")

    monkeypatch.setitem(CONTROLS, "damped", damaged)
    controls = ControlResiduals.__new__(ControlResiduals)
    transport = SimpleNamespace(with_rows=lambda rows: None)
    controls.__dict__.update(rows="aligned", fused=[None], seed=0, transport_of=lambda control: transport)
    with pytest.raises(UserError, match="damped: the transported weight has NaN"):
        list(controls._made("damped", "aligned"))


def test_learned_strengths_beat_one_for_all_and_leave_out_what_harms(improved):
    model, better = improved
    both = [*better, *(residual_of(model, layer, "gate") for layer in range(3))]
    search = search_with(model)
    fixed, learned, free = (
        search.find("fused", {"both": lambda: both}, StrengthSettings(found, 28, is_free, 0))
        for found, is_free in ((False, False), (True, False), (True, True))
    )
    assert learned.gain["diff"] < fixed.gain["diff"] and learned.alpha.keys() == {one.name for one in both}
    assert min(learned.alpha[one.name] for one in better) > max(0.1, *(learned.alpha[one.name] for one in both[3:]))
    assert min(learned.alpha.values()) >= 0
    assert min(free.alpha.values()) < 0 and len(free.tried) == 4  # checks after 7 steps each, and no grid


def test_no_step_leaves_the_target(improved):
    model, better = improved
    choice = search_with(model).find("fused", {"better": lambda: better}, StrengthSettings(True, 0, False, 0))
    assert choice.alpha == 0 and choice.gain["diff"] == 0


def test_strengths_in_words(model):
    residual = residual_of(model, 1, "o")
    alpha = {"1.o": 0.25, "0.q": -0.05}
    assert strength_of(alpha, residual) == 0.25 and strength_of(0.1, residual) == 0.1
    assert mean_strength(alpha) == pytest.approx(0.1) and mean_strength(0.2) == 0.2
    assert in_words(0.07) == "0.07" and in_words(alpha).startswith(
        "one for each of 2 projections, from -0.050 to 0.250"
    )


def test_the_strength_between_the_best_ones_is_tried(improved, monkeypatch):
    """Losses that are a parabola in the strength, lowest at 0.07: it is found, though the grid has no 0.07."""
    model, better = improved
    search = search_with(model)
    base = sum(search.base)

    def losses(what, residuals, alpha):
        return [loss * (1 + ((alpha - 0.07) ** 2 - 0.07**2)) for loss in search.base]

    monkeypatch.setattr(search, "_losses", losses)
    choice = search.find("fused", {"one": lambda: better}, AUTO)
    assert choice.alpha == 0.07 and [one["alpha"] for one in choice.tried] == [0.02, 0.05, 0.1, 0.07]
    assert choice.tried[-1]["validation"] * search.tokens < base


@pytest.mark.parametrize("xs", [(0.0, 0.02, 0.05), (0.05, 0.1, 0.2)])
def test_the_lowest_point_of_a_parabola(xs):
    ys = [3.0, 1.0, 1.5]
    a, b, _ = np.polyfit(xs, ys, 2)
    assert lowest(list(zip(xs, ys, strict=True))) == pytest.approx(-b / (2 * a), abs=1e-4)
    assert xs[0] < lowest(list(zip(xs, ys, strict=True))) < xs[2]


@pytest.mark.parametrize("ys", [(1, 2, 3), (3, 2, 1), (1, 1, 1), (2, 1, math.inf), (2, math.nan, 3), (1, 2)])
def test_a_parabola_without_a_lowest_point_between_has_none(ys):
    assert lowest([(0.1 * n, float(y)) for n, y in enumerate(ys)]) is None
