"""Log-probabilities of the options of a question: of their letters, and of their full answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from core.attention import AttentionLayout
from core.runs import UserError
from core.tokens import templated, tokenized


@dataclass(frozen=True)
class Encoded:
    """Token ids of a question.

    Attributes:
        prompt: what the model reads, at least one token.
        answers: what follows it in each option, at least one token each.
        cut: whether the beginning of the prompt was left out, for want of positions.
    """

    prompt: list[int]
    answers: list[list[int]]
    cut: bool

    @property
    def tokens(self) -> int:
        """Tokens of all its sequences, the prompt repeated and padding included."""
        return len(self.answers) * (len(self.prompt) + max(map(len, self.answers)))


def letter_ids(tokenizer: Any, letters: str) -> list[int]:
    """Token of each letter: the last one of the letter on its own.

    This is the benchmark's convention. For a tokenizer that puts a space before every text (SentencePiece) it is the
    letter with that space, as it would follow a prompt; for the others (byte-level) the letter without a space.

    Raises UserError when two letters have the same token.
    """
    ids = [tokenizer.encode(letter, add_special_tokens=False)[-1] for letter in letters]
    if len(set(ids)) < len(ids):
        raise UserError(f"the tokenizer has the tokens {ids} for {', '.join(letters)}; expected different ones, so it "
                        f"cannot be scored by letter")  # fmt: skip
    return ids


def encode(tokenizer: Any, prompt: str, options: Sequence[str], chat_template: bool, max_positions: int) -> Encoded:
    """Token ids of a prompt and of the answers after it.

    Args:
        chat_template: the prompt is the user's message, and the answer begins the assistant's turn; otherwise it is
            read as it is, with one space before the answer.
        max_positions: of the model; of a longer prompt the last tokens are kept, so that the longest answer fits.
    Raises:
        UserError: no position is left for the prompt.
    """
    if chat_template:
        turn = [{"role": "user", "content": prompt}]
        prompt = templated(tokenizer, turn, prompt, tokenize=False, add_generation_prompt=True)
    space = "" if chat_template or prompt[-1].isspace() else " "
    texts = [prompt, *(prompt + space + option for option in options)]
    ids, *wholes = tokenized(tokenizer, texts, add_special_tokens=not chat_template)["input_ids"]
    answers = []
    for option, whole in zip(options, wholes, strict=True):
        # Where a token would span the end of the prompt, the answer is read on its own: all follow the same prompt.
        after = whole[len(ids) :] if whole[: len(ids)] == ids else []
        answers.append(after or tokenizer.encode(space + option, add_special_tokens=False))
    room = max_positions - max(map(len, answers))
    if room < 1:
        raise UserError(f"an answer has {max_positions - room} tokens, but the model has {max_positions} positions; "
                        f"it cannot be scored with this model")  # fmt: skip
    return Encoded(ids[-room:], answers, len(ids) > room)


@torch.no_grad()
def option_scores(
    model: Any, layout: AttentionLayout, batch: Sequence[Encoded], letters: Sequence[int]
) -> list[tuple[list[float], list[float]]]:
    """Log-probabilities (nats, log-softmax in float32) of the questions of a batch.

    The prompts are read once, padded on the left: so all of them end in the same column, and windows of attention are
    exact. The answers, padded on the right, go on from copies of what their prompt left in the cache.

    Args:
        layout: of the model.
        letters: token of every letter.
    Returns:
        for every question (letter after its prompt, for as many letters as it has options; sum over the tokens of each
        full answer after its prompt).
    """
    prompts, seen = _padded([question.prompt for question in batch], model.device, left=True)
    places = (seen.cumsum(1) - 1).clamp(min=0)
    head = model.get_submodule(layout.family.head)
    last = torch.zeros_like(seen, dtype=torch.bool)
    last[:, -1] = True
    following, cache = _predicted(model, head, last, input_ids=prompts, attention_mask=seen,
                                  position_ids=places)  # fmt: skip
    owners = [number for number, question in enumerate(batch) for _ in question.answers]
    answers = [answer for question in batch for answer in question.answers]
    # The sums are in float64, on the CPU (not every device has it): long answers lose nothing to rounding.
    sums = following[owners, [answer[0] for answer in answers]].cpu().double()  # [answers]
    if max(map(len, answers)) > 1:
        cache.batch_select_indices(torch.tensor(owners, device=model.device))
        tokens, there = _padded(answers, model.device)
        chosen = there[:, 1:].bool()
        steps = torch.arange(1, tokens.shape[1], device=model.device)
        later, _ = _predicted(model, head, chosen, input_ids=tokens[:, :-1], past_key_values=cache,
                              attention_mask=torch.cat([seen[owners], there[:, :-1]], 1),
                              position_ids=places[owners, -1:] + steps)  # fmt: skip
        found = torch.zeros(chosen.shape, dtype=torch.float64)
        found[chosen.cpu()] = later.gather(1, tokens[:, 1:][chosen].unsqueeze(1)).squeeze(1).cpu().double()
        sums = sums + found.sum(1)
    rest = iter(sums.tolist())
    by_letter = following[:, list(letters)].tolist()
    return [(row[: len(question.answers)], [next(rest) for _ in question.answers])
            for row, question in zip(by_letter, batch, strict=True)]  # fmt: skip


def _predicted(model: Any, head: Any, chosen: Tensor, **inputs: Any) -> tuple[Tensor, Any]:
    """(log-probabilities [n, V] of what follows the n `chosen` [B, S] tokens, the cache) of the model's own forward.

    Its head, the widest layer, reads the chosen tokens only.
    """
    hook = head.register_forward_pre_hook(lambda _head, hidden: (hidden[0][chosen],))
    try:
        out = model(**inputs, use_cache=True)
    finally:
        hook.remove()
    return out.logits.float().log_softmax(-1), out.past_key_values


def _padded(texts: Sequence[list[int]], device: Any, left: bool = False) -> tuple[Tensor, Tensor]:
    """Token ids [B, S] and their mask [B, S]; the padding token is masked, so any id serves."""
    longest = max(map(len, texts))

    def filled(values: list[int]) -> list[int]:
        empty = [0] * (longest - len(values))
        return [*empty, *values] if left else [*values, *empty]

    ids = torch.tensor([filled(text) for text in texts], device=device)
    return ids, torch.tensor([filled([1] * len(text)) for text in texts], device=device)
