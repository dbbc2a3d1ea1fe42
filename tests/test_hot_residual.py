"""The residual layer: forward equals folded, gradients scale, folding and unfolding are bit-exact."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from core.fusion import Residual
from core.hot_residual import (
    HotResidualLinear,
    enable_hot_residual_for_model,
    fold_bias,
    fold_hot_residual,
    fold_weight,
    load_residuals,
    residuals_of,
    restore_base,
    save_residuals,
    set_trainable,
)
from core.runs import UserError


def make(axis: int, k: int, bias: bool, hot_bias: bool) -> tuple[nn.Linear, Residual]:
    torch.manual_seed(axis + 10 * k)
    linear = nn.Linear(6, 5, bias=bias)
    n = linear.weight.shape[axis]
    index = torch.randperm(n)[:k].sort().values
    original = linear.weight.detach().index_select(axis, index).clone()
    size = k if axis == 0 else 5
    original_bias = None
    if bias:
        original_bias = linear.bias.detach()[index].clone() if axis == 0 else linear.bias.detach().clone()
    residual = Residual(0, "o" if axis else "q", axis, index, torch.randn_like(original),
                        torch.randn(size) if hot_bias else None, original, original_bias)  # fmt: skip
    return linear, residual


CASES = [(axis, k, bias, hot) for axis, sizes in ((0, (2, 5)), (1, (2, 6))) for k in sizes
         for bias, hot in ((False, False), (True, False), (True, True))]  # fmt: skip


@pytest.mark.parametrize("form", ["interpolate", "additive"])
@pytest.mark.parametrize(("axis", "k", "bias", "hot_bias"), CASES)
def test_forward_equals_the_folded_weight(axis, k, bias, hot_bias, form):
    linear, residual = make(axis, k, bias, hot_bias)
    alpha, x = 0.3, torch.randn(4, 3, 6)
    W, W_tilde = linear.weight.detach(), residual.weight
    expected = W.clone()
    part = expected[residual.index] if axis == 0 else expected[:, residual.index]
    part = (1 - alpha) * part + alpha * W_tilde if form == "interpolate" else part + alpha * W_tilde
    if axis == 0:
        expected[residual.index] = part
    else:
        expected[:, residual.index] = part
    b = None
    if bias:
        b = linear.bias.detach().clone()
        if hot_bias:
            where = residual.index if axis == 0 else torch.arange(5)
            b[where] = ((1 - alpha) * b[where] if form == "interpolate" else b[where]) + alpha * residual.bias
    hot = HotResidualLinear(linear, residual, alpha, form)
    assert_close(hot(x), F.linear(x, expected, b), atol=1e-6, rtol=1e-5)
    assert_close(fold_weight(W, residual, alpha, form), expected)
    if bias:
        assert_close(fold_bias(linear.bias.detach(), residual, alpha, form), b)


@pytest.mark.parametrize(("axis", "k"), [(0, 2), (0, 5), (1, 2), (1, 6)])
def test_gradient_of_the_base_is_one_minus_alpha_on_selected_weights(axis, k):
    linear, residual = make(axis, k, False, False)
    x, alpha = torch.randn(7, 6), 0.3
    hot = HotResidualLinear(linear, residual, alpha, "interpolate")
    folded = hot.effective_weight().detach().requires_grad_()
    hot(x).square().sum().backward()
    F.linear(x, folded).square().sum().backward()
    expected = folded.grad.clone()
    if axis == 0:
        expected[residual.index] *= 1 - alpha
    else:
        expected[:, residual.index] *= 1 - alpha
    assert_close(linear.weight.grad, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("axis", "k"), [(0, 2), (1, 2)])
def test_unselected_entries_are_bit_identical(axis, k):
    linear, residual = make(axis, k, False, False)
    folded = fold_weight(linear.weight.detach(), residual, 0.5, "interpolate")
    others = [i for i in range(linear.weight.shape[axis]) if i not in residual.index.tolist()]
    assert torch.equal(folded.index_select(axis, torch.tensor(others)),
                       linear.weight.detach().index_select(axis, torch.tensor(others)))  # fmt: skip
    assert torch.equal(fold_weight(linear.weight.detach(), residual, 0.0, "interpolate"), linear.weight.detach())


class Block(nn.Module):
    """Stands for a model: one `q` projection with rows and one `o` with columns."""

    def __init__(self, q: nn.Linear, o: nn.Linear):
        super().__init__()
        self.q, self.o, self.norm = q, o, nn.LayerNorm(3)


@pytest.fixture
def block():
    (q, rows), (o, columns) = make(0, 2, True, True), make(1, 3, True, True)
    return Block(q, o), [rows, columns]


def name_of(_layer: int, projection: str) -> str:
    return projection


def test_fold_and_restore_are_bit_exact(block):
    model, residuals = block
    before = {name: value.clone() for name, value in model.state_dict().items()}
    enable_hot_residual_for_model(model, residuals, name_of, 0.4, "interpolate")
    fold_hot_residual(model)
    assert type(model.q) is nn.Linear and set(model.state_dict()) == set(before)
    once = {name: value.clone() for name, value in model.state_dict().items()}
    assert not torch.equal(once["q.weight"], before["q.weight"])
    restore_base(model, residuals, name_of)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    enable_hot_residual_for_model(model, residuals, name_of, 0.4, "interpolate")
    fold_hot_residual(model)
    assert all(torch.equal(value, once[name]) for name, value in model.state_dict().items())


def test_residual_file_round_trip(block, tmp_path):
    _, residuals = block
    save_residuals(tmp_path / "r.safetensors", residuals, 0.4, "additive")
    loaded, alpha, form = load_residuals(tmp_path / "r.safetensors")
    assert (alpha, form) == (0.4, "additive")
    for a, b in zip(residuals, loaded, strict=True):
        assert (a.layer, a.projection, a.axis) == (b.layer, b.projection, b.axis)
        for field in ("index", "weight", "bias", "original_weight", "original_bias"):
            assert torch.equal(getattr(a, field), getattr(b, field))


def test_missing_residual_file_says_what_to_give(tmp_path):
    with pytest.raises(UserError, match=r"generate_hot_residual\.py"):
        load_residuals(tmp_path / "none.safetensors")


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
    q, o = residuals_of(model, residuals, name_of)
    assert_close(q.original_weight, residuals[0].original_weight + 1)
    assert_close(o.original_bias, residuals[1].original_bias + 2)
    assert torch.equal(q.weight, residuals[0].weight)
