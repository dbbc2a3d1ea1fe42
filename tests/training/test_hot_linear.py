"""The residual layer: forward equals folded, gradients scale, folding and unfolding are bit-exact."""

import pytest
import torch
import torch.nn.functional as F
from random_residuals import CASES, random_residual
from torch import nn
from torch.testing import assert_close

from core.fusion.residual import fold_bias, fold_weight
from core.training import hot_linear
from core.training.hot_linear import (
    HotResidualLinear,
    enable_hot_residual_for_model,
    restore_base,
    set_trainable,
    trained_residuals,
)


@pytest.fixture(params=["around the base", "through W_eff"])
def way(request, monkeypatch):
    """The two ways to compute the same, of which the number of tokens decides: each is forced for all of them."""
    fold_from = 0 if request.param == "through W_eff" else 1e9
    monkeypatch.setattr(hot_linear, "FOLD_FROM", dict.fromkeys(hot_linear.FOLD_FROM, fold_from))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("form", ["interpolate", "additive"])
@pytest.mark.parametrize(("axis", "k", "bias", "hot_bias"), CASES)
def test_forward_equals_the_folded_weight(axis, k, bias, hot_bias, form):
    linear, residual = random_residual(axis, k, bias, hot_bias)
    alpha, x = 0.3, torch.randn(4, 3, 6)
    W = fold_weight(linear.weight.detach(), residual, alpha, form)
    b = fold_bias(linear.bias.detach(), residual, alpha, form) if bias else None
    assert_close(HotResidualLinear(linear, residual, alpha, form)(x), F.linear(x, W, b), atol=1e-6, rtol=1e-5)


def effective(W, W_tilde, index, axis, alpha, form):
    """W_eff by its definition, with gradients to W and W~."""
    size = W.shape[axis]
    S = torch.zeros(size, len(index), dtype=W.dtype)
    S[index, torch.arange(len(index))] = 1
    placed = S @ W_tilde if axis == 0 else W_tilde @ S.T
    chosen = S.sum(1)
    base = W * (1 - alpha * (chosen[:, None] if axis == 0 else chosen)) if form == "interpolate" else W
    return base + alpha * placed


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("form", ["interpolate", "additive"])
@pytest.mark.parametrize("trains", ["base", "residual", "both"])
@pytest.mark.parametrize(("axis", "k", "bias", "hot_bias"), CASES)
def test_gradients_are_those_of_the_effective_weight(axis, k, bias, hot_bias, form, trains):
    """Eqs. 15-18 in float64 by autograd through W_eff itself: (1 - alpha) dL/dW_eff on selected weights."""
    linear, residual = random_residual(axis, k, bias, hot_bias)
    alpha, x = 0.3, torch.randn(4, 3, 6, dtype=torch.float64, requires_grad=True)
    hot = HotResidualLinear(linear.double(), residual, alpha, form)
    hot.weight.requires_grad_(trains != "residual")
    hot.hot_weight.requires_grad_(trains != "base")
    W, W_tilde = (t.detach().clone().requires_grad_() for t in (hot.weight, hot.hot_weight))
    b, b_tilde = (None if t is None else t.detach().clone().requires_grad_() for t in (hot.bias, hot.hot_bias))
    b_eff = b
    if b_tilde is not None:
        where = residual.index if axis == 0 else torch.arange(5)
        b_eff = effective(b[:, None], b_tilde[:, None], where, 0, alpha, form)[:, 0]
    y = hot(x)
    grad = torch.randn_like(y)
    y.backward(grad)
    got_x, x.grad = x.grad, None
    expected = F.linear(x, effective(W, W_tilde, residual.index, axis, alpha, form), b_eff)
    expected.backward(grad)
    assert_close(y, expected, atol=1e-12, rtol=1e-12)
    assert_close(got_x, x.grad, atol=1e-12, rtol=1e-12)
    pairs = [(hot.bias, b), (hot.hot_bias, b_tilde)]
    pairs += [(hot.weight, W)] if trains != "residual" else []
    pairs += [(hot.hot_weight, W_tilde)] if trains != "base" else []
    for ours, reference in pairs:
        if ours is not None:
            assert_close(ours.grad, reference.grad, atol=1e-12, rtol=1e-12)
    assert (hot.weight.grad is None) == (trains == "residual") and (hot.hot_weight.grad is None) == (trains == "base")


class Block(nn.Module):
    """Stands for a model: one `q` projection with rows and one `o` with columns."""

    def __init__(self, q: nn.Linear, o: nn.Linear):
        super().__init__()
        self.q, self.o, self.norm = q, o, nn.LayerNorm(3)


@pytest.fixture
def block():
    (q, rows), (o, columns) = random_residual(0, 2, True, True), random_residual(1, 3, True, True)
    return Block(q, o), [rows, columns]


def name_of(_layer: int, projection: str) -> str:
    return projection


def test_fold_and_restore_are_bit_exact(block):
    model, residuals = block
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def fold():
        with torch.no_grad():
            for linear, residual in zip((model.q, model.o), residuals, strict=True):
                linear.weight.copy_(fold_weight(linear.weight, residual, 0.4, "interpolate"))
                linear.bias.copy_(fold_bias(linear.bias, residual, 0.4, "interpolate"))
        return {name: value.clone() for name, value in model.state_dict().items()}

    once = fold()
    assert not torch.equal(once["q.weight"], before["q.weight"])
    restore_base(model, residuals, name_of)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(value, once[name]) for name, value in fold().items())


@pytest.mark.parametrize(
    ("strategy", "base", "residual"),
    [
        ("frozen_hot", True, False),
        ("frozen_transport", True, False),
        ("frozen_base", False, True),
        ("none", True, True),
    ],
)
def test_freeze_strategies(block, strategy, base, residual):
    model, residuals = block
    enable_hot_residual_for_model(model, residuals, name_of, 0.4, "interpolate")
    counts = set_trainable(model, strategy)
    n_base, n_residual = 2 * (5 * 6 + 5) + 6, 2 * 6 + 2 + 5 * 3 + 5
    assert counts == {
        "base": (n_base, 0) if base else (0, n_base),
        "residual": (n_residual, 0) if residual else (0, n_residual),
        "adapters": (0, 0),
    }
    assert model.q.weight.requires_grad is model.norm.weight.requires_grad is base
    assert model.q.hot_weight.requires_grad is model.o.hot_bias.requires_grad is residual


def test_unknown_freeze_strategy_is_refused(block):
    with pytest.raises(ValueError, match="frozen_hot, frozen_transport"):
        set_trainable(block[0], "frozen")


def test_trained_values_come_back_as_residuals(block):
    model, residuals = block
    enable_hot_residual_for_model(model, residuals, name_of, 0.4, "interpolate")
    with torch.no_grad():
        model.q.weight.add_(1.0)
        model.o.bias.add_(2.0)
    q, o = trained_residuals(model.state_dict(), residuals, name_of)
    assert_close(q.original_weight, residuals[0].original_weight + 1)
    assert_close(o.original_bias, residuals[1].original_bias + 2)
    assert torch.equal(q.weight, residuals[0].weight)
