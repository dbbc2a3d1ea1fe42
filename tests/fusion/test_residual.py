"""Which neurons are selected, how W~ is mixed with W, and folding by its definition."""

import pytest
import torch
from random_residuals import CASES, random_residual
from torch.testing import assert_close

from core.fusion.residual import check_finite, fold_bias, fold_weight, mix, select


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


@pytest.mark.parametrize("form", ["interpolate", "additive"])
@pytest.mark.parametrize(("axis", "k", "bias", "hot_bias"), CASES)
def test_folding_mixes_the_selection_and_leaves_the_rest(axis, k, bias, hot_bias, form):
    linear, residual = random_residual(axis, k, bias, hot_bias)
    kept = 0.7 if form == "interpolate" else 1.0
    expected = linear.weight.detach().clone()
    chosen = (residual.index,) if axis == 0 else (slice(None), residual.index)
    expected[chosen] = kept * expected[chosen] + 0.3 * residual.weight
    assert_close(fold_weight(linear.weight.detach(), residual, 0.3, form), expected)
    if bias:
        b = linear.bias.detach().clone()
        where = residual.index if axis == 0 else slice(None)
        if hot_bias:
            b[where] = kept * b[where] + 0.3 * residual.bias
        assert_close(fold_bias(linear.bias.detach(), residual, 0.3, form), b)


@pytest.mark.parametrize(("axis", "k"), [(0, 2), (1, 2)])
def test_unselected_entries_are_bit_identical(axis, k):
    linear, residual = random_residual(axis, k, False, False)
    folded = fold_weight(linear.weight.detach(), residual, 0.5, "interpolate")
    others = [i for i in range(linear.weight.shape[axis]) if i not in residual.index.tolist()]
    assert torch.equal(
        folded.index_select(axis, torch.tensor(others)), linear.weight.detach().index_select(axis, torch.tensor(others))
    )
    assert torch.equal(fold_weight(linear.weight.detach(), residual, 0.0, "interpolate"), linear.weight.detach())


def test_values_that_are_not_finite_are_named():
    _, residual = random_residual(0, 2, True, True)
    check_finite(residual)
    residual.bias[1] = torch.inf
    with pytest.raises(ValueError, match="layer 0, projection q: the transported bias has NaN or infinite entries"):
        check_finite(residual)
