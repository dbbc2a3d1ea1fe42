"""How MalayMMLU reads the answer of a model: the letter that follows a prompt, and the likeliest option."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from core.batching import pad_with_mask
from core.errors import UserError
from core.models.families import AttentionLayout
from core.texts.tokens import tokenized

# Rows of logits [n, V] that are made float32 at a time: beside the logits themselves, little memory.
ROWS = 256


@dataclass(frozen=True)
class Encoded:
    """Token ids of a question.

    Attributes:
        stem: what the prompt and every prompt + option begin with, at least one token.
        tails: the rest of the prompt (often nothing), then the rest of every prompt + option.
        cut: whether the beginning was left out, for want of positions.
    """

    stem: list[int]
    tails: list[list[int]]
    cut: bool

    @property
    def tokens(self) -> int:
        """Tokens of all its sequences, the stem repeated and padding included."""
        return len(self.tails) * (len(self.stem) + max(map(len, self.tails)))


def letter_ids(tokenizer: Any, letters: str) -> list[int]:
    """Token of each letter: the last one of the letter on its own, special tokens included.

    This is the benchmark's convention. For a tokenizer that puts a space before every text (SentencePiece) it is the
    letter with that space, as it would follow a prompt; for the others (byte-level) the letter without a space.

    Raises UserError when two letters have the same token, as where the tokenizer ends every text with a special one.
    """
    ids = [tokenizer.encode(letter)[-1] for letter in letters]
    if len(set(ids)) < len(ids):
        raise UserError(
            f"the tokenizer has the tokens {ids} for {', '.join(letters)}; expected different ones, so it cannot be "
            "scored by letter"
        )
    return ids


def encode(tokenizer: Any, prompt: str, options: Sequence[str], max_positions: int) -> Encoded:
    """Token ids of a prompt, and of the prompt with every option right behind it, special tokens added as usual.

    Args:
        max_positions: of the model; of longer texts the last tokens are kept.
    Raises:
        UserError: no position is left for what the texts have in common.
    """
    texts = tokenized(tokenizer, [prompt, *(prompt + option for option in options)])["input_ids"]
    shared = sum(1 for _ in takewhile(lambda ids: len(set(ids)) == 1, zip(*texts, strict=False)))
    longest = max(map(len, texts))
    cut = max(0, longest - max_positions)
    if shared <= cut:
        raise UserError(
            f"an answer has {longest - shared} tokens, but the model has {max_positions} positions; it cannot be "
            "scored with this model"
        )
    return Encoded(texts[0][cut:shared], [ids[shared:] for ids in texts], cut > 0)


@torch.no_grad()
def option_scores(
    model: Any, layout: AttentionLayout, batch: Sequence[Encoded], letters: Sequence[int]
) -> list[tuple[list[float], list[float]]]:
    """Logits of the letters, and mean log-probabilities (nats) of the options, of the questions of a batch.

    The stems are read once, padded on the left: so all of them end in the same column, and windows of attention are
    exact. The tails, padded on the right, go on from copies of what their stem left in the cache.

    Args:
        layout: of the model.
        letters: token of every letter.
    Returns:
        for every question (logit at the prompt's last position of each letter, for as many as it has options; mean over
        all tokens of prompt + option of their log-probability, the first token, which has none, left out).
    """
    head = model.get_submodule(layout.family.head)
    stems, seen = pad_with_mask([question.stem for question in batch], model.device, side="left")
    places = (seen.cumsum(1) - 1).clamp(min=0)
    following, sums, cache = _read_stems(model, head, stems, seen, places)
    tails = [(number, tail) for number, question in enumerate(batch) for tail in question.tails if tail]
    owners = [number for number, _ in tails]
    begins = _log_probabilities(following[owners], torch.tensor([tail[0] for _, tail in tails], device=model.device))
    cache.batch_select_indices(torch.tensor(owners, device=model.device))
    tokens, there = pad_with_mask([tail for _, tail in tails], model.device)
    steps = torch.arange(1, tokens.shape[1] + 1, device=model.device)
    later, _ = _logits(
        model,
        head,
        there,
        input_ids=tokens,
        past_key_values=cache,
        attention_mask=torch.cat([seen[owners], there], 1),
        position_ids=places[owners, -1:] + steps,
    )
    lengths = [len(tail) for _, tail in tails]
    after = _log_probabilities(later, tokens[there.bool()].roll(-1)).split(lengths)
    read = iter(zip(begins.tolist(), after, later.split(lengths), strict=True))
    out = []
    for number, question in enumerate(batch):
        prompt, *options = question.tails
        last = next(read)[2][-1] if prompt else following[number]
        means = []
        for tail in options:
            begin, rest, _ = next(read) if tail else (0.0, sums[number].new_zeros(1), None)
            total = sums[number] + begin + rest[:-1].sum()
            means.append(total.item() / (len(question.stem) + len(tail) - 1))
        out.append((last[list(letters)].cpu().double().tolist()[: len(means)], means))
    return out


def _read_stems(model: Any, head: Any, stems: Tensor, seen: Tensor, places: Tensor) -> tuple[Tensor, list[Tensor], Any]:
    """(logits [questions, V] of what follows each stem, sum of the log-probabilities within each, the cache)."""
    logits, cache = _logits(model, head, seen, input_ids=stems, attention_mask=seen, position_ids=places)
    lengths = seen.sum(1)
    within = _log_probabilities(logits, stems[seen.bool()].roll(-1))  # [all tokens]; of a stem's last one meaningless
    return logits[lengths.cumsum(0) - 1], [part[:-1].sum() for part in within.split(lengths.tolist())], cache


def _logits(model: Any, head: Any, chosen: Tensor, **inputs: Any) -> tuple[Tensor, Any]:
    """(logits [n, V] of what follows the n `chosen` [B, S] tokens, the cache) of the model's own forward.

    Its head, the widest layer, reads the chosen tokens only.
    """
    hook = head.register_forward_pre_hook(lambda _head, hidden: (hidden[0][chosen.bool()],))
    try:
        out = model(**inputs, use_cache=True)
    finally:
        hook.remove()
    return out.logits, out.past_key_values


def _log_probabilities(logits: Tensor, ids: Tensor) -> Tensor:
    """log-softmax (in float32) of logits [n, V] at ids [n]; in float64 on the CPU, so that long sums lose nothing."""
    found = [
        rows.float().log_softmax(-1).gather(1, chosen.unsqueeze(1)).squeeze(1).cpu().double()
        for rows, chosen in zip(logits.split(ROWS), ids.split(ROWS), strict=True)
    ]
    return torch.cat(found)
