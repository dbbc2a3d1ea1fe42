"""A random linear layer with a random residual of it, and all shapes that the two can have."""

import torch
from torch import nn

from core.fusion.residual import Residual

CASES = [
    (axis, k, bias, hot)
    for axis, sizes in ((0, (2, 5)), (1, (2, 6)))
    for k in sizes
    for bias, hot in ((False, False), (True, False), (True, True))
]


def random_residual(axis: int, k: int, bias: bool, hot_bias: bool) -> tuple[nn.Linear, Residual]:
    """A 6 -> 5 linear layer, and a residual of `q` on k of its rows (axis 0) or of `o` on k of its columns."""
    torch.manual_seed(axis + 10 * k)
    linear = nn.Linear(6, 5, bias=bias)
    n = linear.weight.shape[axis]
    index = torch.randperm(n)[:k].sort().values
    original = linear.weight.detach().index_select(axis, index).clone()
    size = k if axis == 0 else 5
    original_bias = None
    if bias:
        original_bias = linear.bias.detach()[index].clone() if axis == 0 else linear.bias.detach().clone()
    residual = Residual(
        0,
        "o" if axis else "q",
        index,
        torch.randn_like(original),
        torch.randn(size) if hot_bias else None,
        original,
        original_bias,
    )
    return linear, residual
