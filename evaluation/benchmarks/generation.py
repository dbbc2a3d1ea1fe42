"""Answers that a model generates to prompts, in batches; the beginning that all prompts share is read once."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from core.batching import pad_with_mask, token_batches
from core.errors import UserError
from core.texts.tokens import DATE_STRING, tokenized
from evaluation.benchmarks.prompts import CHAT, chat_template, rendered
from evaluation.evaluated_model import EvaluatedModel, check_logits

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Decoding:
    """How answers are generated.

    Attributes:
        max_new_tokens: longest answer.
        temperature: 0 is greedy; above 0, tokens are drawn from the whole distribution at this temperature.
        seed: of the draws; every call of `answers` starts from it.
        tokens_per_batch: tokens of one batch: prompts without the beginning that they share, answers and padding. A
            prompt that is longer is a batch of its own.
        prompt: `chat` puts every prompt into the chat template as one turn of a user; `plain` continues its text.
    """

    max_new_tokens: int = 32
    temperature: float = 0.0
    seed: int = 0
    tokens_per_batch: int = 4096
    prompt: str = CHAT

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.tokens_per_batch < 1:
            raise UserError(
                f"max_new_tokens {self.max_new_tokens} and tokens_per_batch {self.tokens_per_batch} must be at least 1"
            )
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature {self.temperature} must be 0 (greedy) or a positive number")

    @property
    def inputs(self) -> dict[str, float | str]:
        """Everything that an answer depends on; batches and seed only matter to draws, as padding changes no greedy
        answer."""
        drawn = {"seed": self.seed, "tokens_per_batch": self.tokens_per_batch} if self.temperature else {}
        date = {"date": DATE_STRING} if self.prompt == CHAT else {}
        answer = {"max_new_tokens": self.max_new_tokens, "temperature": self.temperature}
        return {**answer, "prompt": self.prompt, **date, **drawn}


def answers(
    evaluated: EvaluatedModel,
    prompts: Sequence[str],
    decoding: Decoding,
    advance: Callable[[int], object] = lambda n: None,
) -> list[str]:
    """The model's answer to each prompt, in the order of the prompts.

    Args:
        advance: called with the number of prompts of every finished batch, for a progress bar.
    Raises:
        UserError: the model has no chat template, or one that leaves the prompt out.
        NotFiniteError: logits that are not finite, from which no token can be chosen.
    """
    if decoding.prompt == CHAT:
        chat_template(evaluated)
    tokenizer = evaluated.tokenizer
    ids = [prompt_ids(tokenizer, prompt, decoding.prompt) for prompt in prompts]
    model = evaluated.loaded
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if window and (long := sum(len(one) + decoding.max_new_tokens > window for one in ids)):
        log.warning(
            "%d of %d prompts with their answers exceed the %d positions of %s; fewer examples are shorter",
            long,
            len(ids),
            window,
            evaluated.checkpoint.name,
        )
    out = [""] * len(ids)
    torch.manual_seed(decoding.seed)
    with own_settings(model, tokenizer, decoding):
        shared = common_beginning(model, ids, decoding.max_new_tokens)
        lengths = [len(one) - shared.tokens + decoding.max_new_tokens for one in ids]
        for batch in token_batches(lengths, decoding.tokens_per_batch):
            new = continuations(model, [ids[n] for n in batch], shared)
            for n, text in zip(batch, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
                out[n] = text
            advance(len(batch))
    return out


def prompt_ids(tokenizer: Any, prompt: str, policy: str, earlier: Sequence[tuple[str, str]] = ()) -> list[int]:
    """Token ids of a prompt.

    A chat template writes the special tokens itself; to a plain prompt the tokenizer adds them.

    Args:
        policy: `chat` or `plain`.
        earlier: (role, text) of the turns before it, which only `chat` repeats.
    Raises:
        UserError: as `rendered` does.
    """
    if policy == CHAT:
        return tokenized(tokenizer, rendered(tokenizer, prompt, earlier), add_special_tokens=False)["input_ids"]
    return tokenized(tokenizer, prompt)["input_ids"]


@dataclass(frozen=True)
class Beginning:
    """How many tokens all prompts begin with, and the model's cache after these; by default none."""

    tokens: int = 0
    cache: Any = None


NOTHING = Beginning()


@torch.inference_mode()
def common_beginning(model: Any, prompts: Sequence[list[int]], max_new_tokens: int) -> Beginning:
    """Read once what all prompts begin with (system prompt, instruction); each prompt keeps at least one token.

    Nothing is shared for vision-language models, which count positions by rules of their own. Nor is it where a prompt
    with its answer is longer than a window of local attention, because the padding between beginning and rest would
    take up positions in the window.
    """
    text = model.config.get_text_config()
    window = getattr(text, "sliding_window", None)
    least, most = min(prompts), max(prompts)  # what the first and last in lexicographic order share, all share
    differ = (n for n, (a, b) in enumerate(zip(least, most, strict=False)) if a != b)
    tokens = min(next(differ, len(least)), min(map(len, prompts)) - 1)
    if (
        len(prompts) == 1
        or not tokens
        or text is not model.config
        or (window and max(map(len, prompts)) + max_new_tokens > window)
    ):
        return NOTHING
    ids = torch.tensor([prompts[0][:tokens]], device=model.device)
    return Beginning(tokens, model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values)


@torch.inference_mode()
def continuations(model: Any, prompts: Sequence[list[int]], shared: Beginning = NOTHING) -> list[list[int]]:
    """New token ids after each prompt, up to the first end of text, by the model's generation settings.

    The padding is between the shared beginning and the rest of each prompt, and masked, so that all prompts end in the
    same column; `generate` counts positions by the mask.
    """
    settings = model.generation_config
    rests = [prompt[shared.tokens :] for prompt in prompts]
    rest, rest_mask = pad_with_mask(rests, model.device, settings.pad_token_id, "left")
    begin = torch.tensor(prompts[0][: shared.tokens], dtype=torch.long, device=model.device).expand(len(prompts), -1)
    inputs = torch.cat([begin, rest], 1)
    seen = torch.cat([torch.ones_like(begin), rest_mask], 1)
    cache = copy.deepcopy(shared.cache)
    if cache is not None:
        cache.batch_repeat_interleave(len(prompts))
    made = model.generate(input_ids=inputs, past_key_values=cache, attention_mask=seen, logits_processor=[check_logits])
    out = made[:, inputs.shape[1] :].tolist()
    ends = set(settings.eos_token_id or ())
    return [new[: next((n for n, token in enumerate(new) if token in ends), len(new))] for new in out]


@contextlib.contextmanager
def own_settings(model: Any, tokenizer: Any, decoding: Decoding) -> Iterator[None]:
    """Inside, the model generates by `decoding` alone.

    Many models come with sampling and a repetition penalty, which `generate` applies wherever a caller leaves them out;
    the penalty would also make an answer depend on the padding. The model's own tokens that end a text are kept, and
    the tokenizer's is added.
    """
    from transformers import GenerationConfig  # takes seconds

    shipped = model.generation_config
    ends = shipped.eos_token_id
    ends = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends, default=0)
    draws = {"do_sample": True, "temperature": decoding.temperature, "top_k": 0, "top_p": 1.0}
    model.generation_config = GenerationConfig(
        max_new_tokens=decoding.max_new_tokens,
        eos_token_id=sorted(ends) or None,
        pad_token_id=pad,
        **(draws if decoding.temperature else {"do_sample": False}),
    )
    try:
        yield
    finally:
        model.generation_config = shipped
