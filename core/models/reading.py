"""What each of the two models reads: token ids of every text, and the tokens that become rows of activations.

Row t of the target and row t of the source must come from the same text, and with token pooling from the same position
in it. Both readings are made together here, before any model is loaded; nothing later drops or reorders a row.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from core.batching import token_batches
from core.data import Row
from core.errors import UserError
from core.texts.tokens import tokenized

# Every eighth text is kept aside: no regression is fitted on its rows, so that fits can be measured on them.
ASIDE_EVERY = 8


@dataclass(frozen=True)
class Reading:
    """What one model reads.

    Attributes:
        ids: the token ids of every text.
        picks: with token pooling, the positions of the tokens of every text that become rows; None with text pooling,
            where the mean over a text's tokens is its one row.
    """

    ids: list[list[int]]
    picks: list[list[int]] | None

    @property
    def n_rows(self) -> int:
        """The number of rows T, which is the same for both models."""
        return sum(map(self.count, range(len(self.ids))))

    def count(self, text: int) -> int:
        """The number of rows that a text gives."""
        return 1 if self.picks is None else len(self.picks[text])

    def row_numbers(self, texts: Iterable[int]) -> Tensor:
        """The numbers, among all T rows, of the rows that `texts` give, ascending."""
        starts = list(accumulate(map(self.count, range(len(self.ids))), initial=0))
        return torch.tensor([row for n in sorted(texts) for row in range(starts[n], starts[n + 1])], dtype=torch.long)


@dataclass(frozen=True)
class Unaligned:
    """The target's positions at which no token of the source ends, in the texts that regressions are fitted on.

    Attributes:
        reading: those that become rows.
        positions, aligned: how many there are, and how many positions that have a partner.
        weight: how many of the positions one of the rows stands for, when a row of an aligned position stands for one.
    """

    reading: Reading
    positions: int
    aligned: int
    weight: float

    def record(self) -> dict[str, float]:
        """What the manifest says of them."""
        return {"positions": self.positions, "aligned": self.aligned, "weight": self.weight}


def read_texts(rows: Sequence[Row], tokenizer: Any, max_tokens: int) -> Reading:
    """Text pooling: the texts as this model's own chat template renders them, cut at `max_tokens`."""
    ids = []
    for row in rows:
        text, special = row.render(tokenizer)
        ids.append(tokenized(tokenizer, text, add_special_tokens=special)["input_ids"][:max_tokens])
    return Reading(ids, None)


def read_aligned(
    rows: Sequence[Row], target_tokenizer: Any, source_tokenizer: Any, max_tokens: int, max_rows: int, seed: int
) -> tuple[Reading, Reading, Tensor, Unaligned]:
    """Token pooling: the positions at which both models have read exactly the same prefix of a text.

    These are the character offsets at which a token ends in both tokenizations; so both models read the identical
    untemplated string. If there are more than `max_rows` positions, so many of them are drawn with the seed.

    Returns:
        (the target's reading, the source's reading, [T] bool: the row comes from a text kept aside, the positions of
        the target without a partner, as `Unaligned`).
    Raises:
        UserError: the tokenizations share fewer than two positions.
    """
    encoded = []
    positions: list[tuple[int, int, int]] = []  # (text, token of the target, token of the source)
    alone: list[tuple[int, int]] = []  # (text, token of the target)
    for number, row in enumerate(rows):
        target_ids, target_ends = text_token_ends(target_tokenizer, row.plain, max_tokens)
        source_ids, source_ends = text_token_ends(source_tokenizer, row.plain, max_tokens)
        encoded.append((target_ids, source_ids))
        positions += [(number, target_ends[end], source_ends[end]) for end in target_ends if end in source_ends]
        if not is_aside(number):
            alone += [(number, token) for end, token in target_ends.items() if end not in source_ends]
    if len(positions) < 2:
        raise UserError("the two tokenizations share fewer than 2 positions; use longer texts or --pooling text")
    fitted = sum(not is_aside(number) for number, *_ in positions)
    if len(positions) > max_rows:
        positions = sorted(random.Random(seed).sample(positions, max_rows))
    readings = []
    for model in (0, 1):
        picks: list[list[int]] = [[] for _ in rows]
        for number, *tokens in positions:
            picks[number].append(tokens[model])
        readings.append(Reading([ids[model] for ids in encoded], picks))
    aside = torch.tensor([is_aside(number) for number, *_ in positions])
    kept = sorted(random.Random(seed).sample(alone, max_rows)) if len(alone) > max_rows else alone
    picks = [[] for _ in rows]
    for number, token in kept:
        picks[number].append(token)
    drawn = int((~aside).sum())  # of the `fitted` positions
    weight = (len(alone) / len(kept)) / (fitted / drawn) if kept and drawn else 1.0
    unaligned = Unaligned(Reading(readings[0].ids, picks), len(alone), fitted, weight)
    return readings[0], readings[1], aside, unaligned


def is_aside(text_number: int) -> bool:
    """Whether a text is kept out of the regressions."""
    return text_number % ASIDE_EVERY == ASIDE_EVERY - 1


def text_token_ends(
    tokenizer: Any, text: str, max_tokens: int, add_special_tokens: bool = True
) -> tuple[list[int], dict[int, int]]:
    """(token ids cut at `max_tokens`, character offset -> the last token that ends there).

    Special tokens and the first token of the text are left out: attention sinks dominate their variance. Of several
    tokens that end at one offset, such as the bytes of a Thai letter, the last one has read all of it. The ends are
    found before the cut, because after a cut inside a letter its first bytes would pass for the whole.
    """
    options = {"return_offsets_mapping": True, "return_special_tokens_mask": True}
    encoding = tokenized(tokenizer, text, add_special_tokens=add_special_tokens, **options)
    first = min((token for token, _, _ in _text_tokens(encoding)), default=None)
    ends = token_ends(encoding).items()
    kept = {end: token for end, token in ends if token != first and token < max_tokens}
    return encoding["input_ids"][:max_tokens], kept


def token_ends(encoding: Any) -> dict[int, int]:
    """Character offset -> the token that ends there; special tokens that the tokenizer added are left out.

    A token may hold the end of one letter and the first bytes of the next. Tokenizers then say that it ends with the
    next letter, which it has not read whole. So an end counts only where the following token begins at or after it.

    Args:
        encoding: of one text, with `offset_mapping` and `special_tokens_mask`.
    """
    tokens = _text_tokens(encoding)
    following = [begin for _, begin, _ in tokens[1:]] + [math.inf]
    return {end: token for (token, _, end), begin in zip(tokens, following, strict=False) if begin >= end}


def _text_tokens(encoding: Any) -> list[tuple[int, int, int]]:
    """(token, the offset at which it begins, the one at which it ends) of the tokens that hold text."""
    spans = enumerate(zip(encoding["offset_mapping"], encoding["special_tokens_mask"], strict=True))
    return [(token, begin, end) for token, ((begin, end), special) in spans if not special and begin < end]


def text_batches(reading: Reading, tokens_per_batch: int) -> list[list[int]]:
    """Batches of the texts that give rows, as `core.batching.token_batches` divides them.

    Raises:
        UserError: a text has no tokens.
    """
    texts = [n for n in range(len(reading.ids)) if reading.count(n)]
    empty = [n for n in texts if not reading.ids[n]]
    if empty:
        raise UserError(f"text {empty[0] + 1} has no tokens")
    batches = token_batches([len(reading.ids[n]) for n in texts], tokens_per_batch)
    return [[texts[n] for n in batch] for batch in batches]
