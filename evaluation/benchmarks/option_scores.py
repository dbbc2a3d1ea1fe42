"""How MalayMMLU reads a model's answer: from the letter that follows a prompt, and from the likelihood of options."""

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

# Rows of logits [n, V] that are converted to float32 at a time, which takes little memory compared with the logits.
ROWS = 256


@dataclass(frozen=True)
class Encoded:
    """Token ids of a question.

    Attributes:
        stem: the tokens with which the prompt and every prompt + option begin, at least one.
        tails: the rest of the prompt (often empty), then the rest of every prompt + option.
        cut: whether the beginning of the texts was left out because the model has too few positions.
    """

    stem: list[int]
    tails: list[list[int]]
    cut: bool

    @property
    def tokens(self) -> int:
        """Number of tokens of all sequences, where the stem is repeated in each and padding included."""
        return len(self.tails) * (len(self.stem) + max(map(len, self.tails)))


def letter_ids(tokenizer: Any, letters: str) -> list[int]:
    """Token of each letter: the last token of the letter when it is encoded on its own, with special tokens.

    This is the benchmark's convention. A tokenizer that puts a space before every text (SentencePiece) gives the letter
    with that space, as it would follow a prompt; the others (byte-level) give the letter without a space.

    Raises:
        UserError: two letters have the same token, as with a tokenizer that ends every text with a special token.
    """
    ids = [tokenizer.encode(letter)[-1] for letter in letters]
    if len(set(ids)) < len(ids):
        raise UserError(
            f"the tokenizer has the tokens {ids} for {', '.join(letters)}; expected different ones, so it cannot be "
            "scored by letter"
        )
    return ids


def encode(tokenizer: Any, prompt: str, options: Sequence[str], max_positions: int) -> Encoded:
    """Token ids of a prompt, and of the prompt with each option right behind it, with the usual special tokens.

    Args:
        max_positions: of the model; of longer texts the last tokens are kept.
    Raises:
        UserError: the options alone fill all positions, so that nothing is left of what the texts have in common.
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
    """Logits of the letters, and mean log-probabilities (nats) of the options, for the questions of a batch.

    The stems are read once, padded on the left, so that all of them end in the same column and windows of local
    attention are exact. The tails, padded on the right, continue from copies of what their stem left in the cache.

    Args:
        layout: of the model.
        letters: token of every letter.
    Returns:
        for every question: (the logit of each letter after the prompt, for as many letters as there are options; for
        each option the mean log-probability of all tokens of prompt + option but the first, which has none).
    """
    head = model.get_submodule(layout.family.head)
    stems, seen = pad_with_mask([question.stem for question in batch], model.device, side="left")
    positions = (seen.cumsum(1) - 1).clamp(min=0)
    following, sums, cache = _read_stems(model, head, stems, seen, positions)
    tails = [(number, tail) for number, question in enumerate(batch) for tail in question.tails if tail]
    owners = [number for number, _ in tails]
    begins = _log_probabilities(following[owners], torch.tensor([tail[0] for _, tail in tails], device=model.device))
    cache.batch_select_indices(torch.tensor(owners, device=model.device))
    tokens, seen_tails = pad_with_mask([tail for _, tail in tails], model.device)
    steps = torch.arange(1, tokens.shape[1] + 1, device=model.device)
    later, _ = _logits(
        model,
        head,
        seen_tails,
        input_ids=tokens,
        past_key_values=cache,
        attention_mask=torch.cat([seen[owners], seen_tails], 1),
        position_ids=positions[owners, -1:] + steps,
    )
    lengths = [len(tail) for _, tail in tails]
    after = _log_probabilities(later, tokens[seen_tails.bool()].roll(-1)).split(lengths)
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


def _read_stems(
    model: Any, head: Any, stems: Tensor, seen: Tensor, positions: Tensor
) -> tuple[Tensor, list[Tensor], Any]:
    """(logits [questions, V] of what follows each stem, sum of the log-probabilities within each stem, the cache)."""
    logits, cache = _logits(model, head, seen, input_ids=stems, attention_mask=seen, position_ids=positions)
    lengths = seen.sum(1)
    within = _log_probabilities(logits, stems[seen.bool()].roll(-1))  # [all tokens]; a stem's last one means nothing
    return logits[lengths.cumsum(0) - 1], [part[:-1].sum() for part in within.split(lengths.tolist())], cache


def _logits(model: Any, head: Any, chosen: Tensor, **inputs: Any) -> tuple[Tensor, Any]:
    """(logits [n, V] of what follows the n tokens that `chosen` [B, S] marks, the cache), by the model's own forward.

    The head, which is the widest layer, only reads the chosen tokens.
    """
    hook = head.register_forward_pre_hook(lambda _head, hidden: (hidden[0][chosen.bool()],))
    try:
        out = model(**inputs, use_cache=True)
    finally:
        hook.remove()
    return out.logits, out.past_key_values


def _log_probabilities(logits: Tensor, ids: Tensor) -> Tensor:
    """log-softmax (in float32) of logits [n, V] at ids [n]; returned as float64 on the CPU, so that sums are exact."""
    found = [
        rows.float().log_softmax(-1).gather(1, chosen.unsqueeze(1)).squeeze(1).cpu().double()
        for rows, chosen in zip(logits.split(ROWS), ids.split(ROWS), strict=True)
    ]
    return torch.cat(found)
