"""One target layer with every source layer: the plans do not depend on how they are solved, and layers are let go."""

import weakref

import pytest
import torch
from torch.testing import assert_close

from core.hot_transport import sinkhorn_uniform_streaming, standardize
from core.transport import layer_pairs
from core.transport.problem import SinkhornSettings


@pytest.mark.parametrize("small", [True, False])
def test_layers_in_turn_in_batches_and_alone_give_the_same_plans(small, monkeypatch):
    if not small:
        monkeypatch.setattr(layer_pairs, "CACHED_BYTES", 0)
    generator = torch.Generator().manual_seed(0)
    zx, *Zy = (standardize(torch.randn(30, k, generator=generator)) for k in (12, 20, 20, 20))
    rows = torch.tensor([1, 5])
    in_turn = list(layer_pairs.solve_layer(zx, Zy, SinkhornSettings(0.1), rows))
    together = layer_pairs._solve_together(zx, Zy, SinkhornSettings(0.1), rows)
    for zy, one, other in zip(Zy, in_turn, together, strict=True):
        C = 1 - (zx.T @ zy)
        alone = sinkhorn_uniform_streaming(C, 0.1)
        for result in (one, other):
            assert_close(result.plan(), alone.plan(), atol=1e-8, rtol=1e-4)
            assert_close(result.probed, alone.apply(zy[rows].T), atol=1e-6, rtol=1e-4)
            assert result.cost == pytest.approx(alone.cost, abs=1e-6)


def test_batches_let_go_of_their_layers_before_the_next_are_read():
    """The budget holds two layers of 5 x 4 with their matrices of 3 x 4, or one where a solve needs float64."""
    zx = torch.zeros(5, 3)

    def sizes(reg, budget):
        refs, found = [], []

        def layers():
            for _ in range(5):
                held = sum(ref() is not None for ref in refs)
                assert held < max(1, budget // pair)  # those of the batch that is being filled
                layer = torch.zeros(5, 4)
                refs.append(weakref.ref(layer))
                yield layer
                del layer

        for group in layer_pairs._batches(zx, layers(), reg, budget):
            found.append(len(group))
        return found

    pair = 4 * 3 * 4 + 4 * 5 * 4
    assert sizes(0.1, 2 * pair) == [2, 2, 1] and sizes(0.01, 2 * pair) == [1] * 5 and sizes(0.1, 0) == [1] * 5
