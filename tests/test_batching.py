"""Which texts share a batch, and how a batch is padded."""

import random

import pytest
import torch

from core.batching import pad, pad_with_mask, token_batches


def lengths_of(kind: str, count: int) -> list[int]:
    """Token counts as texts have them: of questions, of prose, evenly spread, and prose cut at 110."""
    rng = random.Random(count)
    draw = {
        "questions": lambda: max(20, int(rng.gauss(180, 70))),
        "prose": lambda: min(512, max(3, int(rng.lognormvariate(4.5, 1)))),
        "even": lambda: rng.randint(2, 512),
        "cut": lambda: min(110, 2 + int(rng.lognormvariate(4.3, 0.7))),
    }[kind]
    return [draw() for _ in range(count)]


@pytest.mark.parametrize("kind", ["questions", "prose", "even", "cut"])
@pytest.mark.parametrize("count", [60, 160, 2000])
@pytest.mark.parametrize("budget", [1024, 4096, 16384])
def test_batches_keep_to_the_budget_with_little_padding_and_few_passes(kind, count, budget):
    lengths = lengths_of(kind, count)
    batches = token_batches(lengths, budget)
    assert sorted(n for batch in batches for n in batch) == list(range(count))
    sizes = [len(batch) * max(lengths[n] for n in batch) for batch in batches]
    assert max(sizes) <= budget
    assert 1 - sum(lengths) / sum(sizes) <= 0.1
    # A batch of 10 % padding spans lengths of about 1 to 0.8, whatever their number.
    assert len(batches) <= 1.25 * sum(lengths) / budget + 17
    assert sum(len(batch) == 1 for batch in batches) <= 2


def test_a_longer_text_is_a_batch_of_its_own_and_tiny_batches_are_not_split():
    assert token_batches([5, 300, 7, 90, 4], 100) == [[1], [3], [2, 0, 4]]
    assert token_batches([], 100) == []
    assert token_batches([40, 2, 1], 4096) == [[0, 1, 2]]
    assert token_batches([640, 2, 1], 4096) == [[0], [1, 2]]


@pytest.mark.parametrize(("side", "padded"), [("right", [[7, 8, 9], [5, -1, -1]]), ("left", [[7, 8, 9], [-1, -1, 5]])])
def test_padding_fills_up_to_the_longest_text(side, padded):
    ids = pad([[7, 8, 9], [5]], -1, side)
    assert ids.tolist() == padded and ids.dtype == torch.long


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_mask_is_one_at_tokens_and_zero_at_padding(side):
    """Also where a token has the id of the padding, and for a text without tokens."""
    ids, mask = pad_with_mask([[0, 3], [], [0]], value=0, side=side)
    alone = [0, 1] if side == "left" else [1, 0]
    assert mask.tolist() == [[1, 1], [0, 0], alone] and mask.dtype == ids.dtype == torch.long
    assert ids.tolist() == [[0, 3], [0, 0], [0, 0]]
