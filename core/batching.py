"""Texts of different lengths as batches: which texts go together, and the padding that makes one tensor of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

# A batch is closed before more than this share of its tokens would be padding.
MAX_PADDING = 0.1
# A batch with fewer tokens than this stays open all the same, because a forward pass costs more than its padding.
MIN_BATCH_TOKENS = 128


def token_batches(lengths: Sequence[int], tokens_per_batch: int) -> list[list[int]]:
    """Divide texts into batches of similar length, the longest texts first.

    The padded size of a batch, which is its number of texts times the length of its longest text, stays within
    `tokens_per_batch`. A text that is longer than that is a batch of its own. A batch is also closed when the next text
    is so much shorter that more than MAX_PADDING of the batch would be padding, unless the batch is still tiny.

    Args:
        lengths: the number of tokens of every text.
        tokens_per_batch: the largest padded size of a batch.
    Returns:
        For every batch the numbers of its texts, as indices into `lengths`.
    """
    batches: list[list[int]] = []
    longest = used = 0
    for number in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        size = len(batches[-1]) if batches else 0
        padded_size = longest * (size + 1)
        padding = padded_size - used - lengths[number]
        wasteful = padding > MAX_PADDING * padded_size and longest * size >= MIN_BATCH_TOKENS
        if not batches or padded_size > tokens_per_batch or wasteful:
            batches.append([])
            longest, used = lengths[number], 0
        batches[-1].append(number)
        used += lengths[number]
    return batches


def pad(texts: Sequence[Sequence[int]], value: int = 0, side: str = "right") -> Tensor:
    """Texts of different lengths as one tensor of integers [B, S] on the CPU, S being the longest text's length.

    Args:
        value: what stands in the padding.
        side: where the padding goes, `right` or `left`.
    """
    rows = [torch.tensor(text, dtype=torch.long) for text in texts]
    return pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)


def pad_with_mask(
    texts: Sequence[Sequence[int]], device: Any = None, value: int = 0, side: str = "right"
) -> tuple[Tensor, Tensor]:
    """Token ids [B, S], and the attention mask [B, S] that is 1 at tokens and 0 at padding, both on `device`.

    Models do not read what is masked, so that any token id may stand in the padding.
    """
    ids = pad(texts, value, side)
    mask = pad([[1] * len(text) for text in texts], side=side)
    return ids.to(device), mask.to(device)
