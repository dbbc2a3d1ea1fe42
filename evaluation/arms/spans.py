"""The bytes of each text that target and source are both scored on, so that their losses can be compared.

Nats per token compare models with one tokenizer only. The negative log-likelihood of the same bytes compares any two,
as nanochat's `evaluate_bpb` does: sum of nats / (ln 2 * bytes of UTF-8). The bytes of a text run from the first to the
last character offset at which a token ends in both tokenizations, each cut at the same number of tokens. At the first
offset both models have read the same characters, and from there to the last one the tokens of either model are exactly
these bytes.

Of a conversation the bytes are those of the assistant's answers, each from the first to the last such offset within it,
its very beginning included where a token ends there. Each model reads the conversation in its own chat template. White
space around an answer, which some templates strip, and the token that ends it are left out. So are texts and answers
that are not in Unicode's form NFC, into which some tokenizers bring them: the two models would read other characters.
"""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from core.data import Row
from core.errors import UserError
from core.models.reading import token_ends
from core.texts.tokens import tokenized
from core.training.sft import IGNORED, Example, answer_spans, lines_of_answers

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ByteSpans:
    """The bytes that are compared, for every text.

    Attributes:
        sizes: number of bytes of every text; 0 where the two tokenizations have no span in common.
        answers: whether some of them are answers of conversations.
        target: the numbers of the target's tokens that make up these bytes, for every text.
        source: what the source reads of the texts that have a span, with a loss on the tokens of the span alone.
    """

    sizes: list[int]
    answers: bool
    target: list[list[int]]
    source: list[Example]


@dataclass(frozen=True)
class _Reading:
    """What one model reads of a text.

    Attributes:
        ids: its token ids, cut at the largest number of tokens.
        parts: what is compared: the text itself, or each answer of a conversation, without white space around answers.
        ends: for every part, offset from its beginning -> the last token that ends there, before the cut.
    """

    ids: list[int]
    parts: list[str]
    ends: list[dict[int, int]]


def byte_spans(
    name: str, rows: Sequence[Row], examples: Sequence[Example], tokenizers: tuple[Any, Any], max_tokens: int
) -> ByteSpans:
    """The bytes of each row that both models are scored on.

    Args:
        name: of the texts, for the log.
        examples: the target's token ids and labels of every row.
        tokenizers: of target and source.
        max_tokens: where each model's reading is cut, as that of the arms (`core.training.sft.sft_example`).
    """
    found = ByteSpans([], any(row.has_roles for row in rows), [], [])
    reasons = []
    for row, example in zip(rows, examples, strict=True):
        try:
            size, to_target, to_source, ids = _shared(*(_read(row, tokenizer, max_tokens) for tokenizer in tokenizers))
        except UserError as error:  # a chat template that refuses these messages, or hides where the answers are
            reasons.append(str(error))
            size, to_target, to_source, ids = 0, [], [], []
        if any(example["labels"][token] == IGNORED for token in to_target):
            size, to_target = 0, []  # a template whose {% generation %} leaves out a part of its answer
        found.sizes.append(size)
        found.target.append(to_target)
        if size:
            ids, within = ids[: to_source[-1] + 1], set(to_source)
            labels = [token if number in within else IGNORED for number, token in enumerate(ids)]
            found.source.append({"input_ids": ids, "labels": labels})
    if reasons:
        log.warning("%d %s texts have no bits per byte, the first because %s", len(reasons), name, reasons[0])
    return found


def _read(row: Row, tokenizer: Any, max_tokens: int) -> _Reading:
    """What a model reads of a row, tokenised as for its loss.

    Raises:
        UserError: the tokenizer or the chat template refuses the row, or the template hides where the answers are.
    """
    text, spans, special = row.plain, [(0, len(row.plain))], True
    if row.has_roles and tokenizer.chat_template:
        (text, spans), special = answer_spans(row, tokenizer), False
    elif row.has_roles:
        spans = lines_of_answers(row)
    if row.has_roles:
        spans = [_stripped(text, *span) for span in spans]
    options = {"return_offsets_mapping": True, "return_special_tokens_mask": True}
    encoding = tokenized(tokenizer, text, add_special_tokens=special, **options)
    # The ends are found before the cut, because after a cut inside a letter its first bytes would pass for the whole.
    ends = {end: token for end, token in token_ends(encoding).items() if token < max_tokens}
    within = [{end - begin: token for end, token in ends.items() if begin <= end <= stop} for begin, stop in spans]
    return _Reading(encoding["input_ids"][:max_tokens], [text[begin:stop] for begin, stop in spans], within)


def _stripped(text: str, begin: int, end: int) -> tuple[int, int]:
    """The span without the white space at its two ends."""
    part = text[begin:end]
    return begin + len(part) - len(part.lstrip()), end - len(part) + len(part.rstrip())


def _shared(target: _Reading, source: _Reading) -> tuple[int, list[int], list[int], list[int]]:
    """(number of bytes, the target's tokens that make them up, the source's, the source's token ids)."""
    size = 0
    to_target: list[int] = []
    to_source: list[int] = []
    for part, other, at_target, at_source in zip(target.parts, source.parts, target.ends, source.ends, strict=True):
        comparable = part == other and unicodedata.is_normalized("NFC", part)
        shared = sorted(at_target.keys() & at_source.keys()) if comparable else []
        if len(shared) < 2:
            continue
        first, last = shared[0], shared[-1]
        size += len(part[first:last].encode())
        to_target += range(at_target[first] + 1, at_target[last] + 1)
        to_source += range(at_source[first] + 1, at_source[last] + 1)
    return size, to_target, to_source, source.ids
