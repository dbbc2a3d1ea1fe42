"""Fine-tuning rows as token ids and labels: where the loss is, where rows are cut, and how they become batches."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from core.batching import pad, pad_with_mask
from core.data import Row
from core.errors import UserError
from core.texts.tokens import special_ids, templated, tokenized

log = logging.getLogger(__name__)
# One row: {"input_ids", "labels"}, of equal length. Where a teacher has stored distributions, also SOFT_TARGETS: for
# every token the number of the distribution over the token after it, or NO_TARGET.
Example = dict[str, list[int]]
SOFT_TARGETS, NO_TARGET = "soft_targets", -1
# The label of a token without loss.
IGNORED = -100
# While a chat template is rendered, this stands in place of an answer, so that we find where the template puts it.
_MARK = "\ue000{}\ue001"
# A template with this tag says itself where the answers are.
_GENERATION = re.compile(r"{%-?\s*generation\b")


def sft_example(row: Row, tokenizer: Any, block_size: int) -> Example:
    """Token ids and labels of one row, cut at `block_size` tokens.

    A row of text has a loss on every token but the first, which nothing predicts. A row with roles has a loss on the
    assistant's answers and on the token that ends each of them; the labels of all other tokens are -100. Such a row is
    rendered with the chat template. Without one, every message is a line, and the tokenizer's end-of-text token ends
    the row.

    Raises:
        UserError: the chat template hides where the answers are, or the template or the tokenizer refuses the row.
    """
    ids, has_loss = _ids_with_loss(row, tokenizer)
    has_loss[:1] = [False] * len(has_loss[:1])
    labels = [token if learned else IGNORED for token, learned in zip(ids, has_loss, strict=True)]
    return {"input_ids": ids[:block_size], "labels": labels[:block_size]}


def _ids_with_loss(row: Row, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """The token ids of a whole row, and for each whether it is something to learn."""
    if not row.has_roles:
        ids = tokenized(tokenizer, row.plain)["input_ids"]
        return ids, [True] * len(ids)
    if not tokenizer.chat_template:
        encoded = tokenized(tokenizer, row.plain, return_offsets_mapping=True)
        ids, has_loss = encoded["input_ids"], _in_spans(encoded, lines_of_answers(row), tokenizer)
        if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
            return [*ids, tokenizer.eos_token_id], [*has_loss, row.messages[-1][0] == "assistant"]
        return ids, has_loss
    if _GENERATION.search(_template(tokenizer)):
        options = {"return_dict": True, "return_assistant_tokens_mask": True}
        encoded = templated(tokenizer, row.chat(), row.own_text, **options)
        return encoded["input_ids"], [bool(learned) for learned in encoded["assistant_masks"]]
    text, spans = answer_spans(row, tokenizer)
    encoded = tokenized(tokenizer, text, add_special_tokens=False, return_offsets_mapping=True)
    return encoded["input_ids"], _in_spans(encoded, spans, tokenizer)


def answer_spans(row: Row, tokenizer: Any) -> tuple[str, list[tuple[int, int]]]:
    """The row as the chat template renders it, and the span of characters of each of the assistant's answers.

    The answers cannot simply be searched for, because a question may hold the same words. The template is therefore
    rendered a second time, with a mark in place of each answer. Some templates strip the messages that they are given;
    the spans are accepted when the marks, filled with the answers or with the stripped answers, give the same text.

    Returns:
        (text, [(first character, character after the last)] in the order of the answers).
    Raises:
        UserError: the template changes the answers in some other way, so that their spans are not known.
    """
    chat = row.chat()
    answers = [turn for turn, message in enumerate(chat) if message["role"] == "assistant"]
    marked = [
        {**message, "content": _MARK.format(turn)} if turn in answers else message for turn, message in enumerate(chat)
    ]
    text, rendered = (templated(tokenizer, turns, row.own_text, tokenize=False) for turns in (chat, marked))
    for clean in (str, str.strip):
        filled, rest, spans = "", rendered, []
        for turn in answers:
            before, mark, rest = rest.partition(_MARK.format(turn))
            if not mark:
                break
            content = clean(chat[turn]["content"])
            spans.append((len(filled) + len(before), len(filled) + len(before) + len(content)))
            filled += before + content
        if len(spans) == len(answers) and filled + rest == text:
            return text, spans
    raise UserError(
        "the chat template changes the assistant's answers, so that the loss cannot be put on them; mark "
        "them in the template with {% generation %} and {% endgeneration %}"
    )


def lines_of_answers(row: Row) -> list[tuple[int, int]]:
    """The spans of characters of the assistant's answers in `Row.plain`, which has one message per line."""
    spans, begin = [], 0
    for role, content in row.messages:
        if role == "assistant":
            spans.append((begin, begin + len(content)))
        begin += len(content) + 1
    return spans


def _in_spans(encoded: Any, spans: Sequence[tuple[int, int]], tokenizer: Any) -> list[bool]:
    """For every token whether it has a loss: it holds characters of a span, or it is the special token that ends one.

    Some templates put blanks between an answer and the special token. The blanks have no loss.

    Args:
        encoded: what the tokenizer gave for the text, with `offset_mapping`.
    """
    special = special_ids(tokenizer)
    has_loss, after_span = [], False
    for token, (begin, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        inside = begin < end and any(begin < to and end > start for start, to in spans)
        has_loss.append(inside or (after_span and token in special))
        blank = token not in special and not tokenizer.decode([token]).strip()
        after_span = inside or (after_span and blank)
    return has_loss


def _template(tokenizer: Any) -> str:
    """The chat template that transformers uses when none is named; some tokenizers have several."""
    template = tokenizer.chat_template
    return template if isinstance(template, str) else template.get("default", "")


def sft_examples(
    rows: Sequence[Row], tokenizer: Any, block_size: int, soft_targets: Sequence[list[int]] | None = None
) -> tuple[list[Example], dict[str, int]]:
    """The examples of all rows that have a token with loss.

    Args:
        soft_targets: for every row what its example has as SOFT_TARGETS.
    Returns:
        (examples, counts): `rows` that were given, `tokens` and `trained_tokens` (those with loss) of the examples, how
        many rows were `cut` at `block_size` tokens, and how many were `left_out` for want of a loss.
    Raises:
        UserError: no row has a token with loss.
    """
    examples: list[Example] = []
    cut = 0
    for number, row in enumerate(rows):
        example = sft_example(row, tokenizer, block_size + 1)  # one token more shows whether the row has to be cut
        cut += len(example["input_ids"]) > block_size
        example = {name: values[:block_size] for name, values in example.items()}
        if soft_targets is not None:
            example[SOFT_TARGETS] = soft_targets[number]
        if any(label != IGNORED for label in example["labels"]):
            examples.append(example)
    counts = {
        "rows": len(rows),
        "tokens": sum(len(e["input_ids"]) for e in examples),
        "trained_tokens": sum(label != IGNORED for e in examples for label in e["labels"]),
        "cut": cut,
        "left_out": len(rows) - len(examples),
    }
    log.info(
        "%(rows)d rows, %(tokens)d tokens, %(trained_tokens)d of them with loss; %(cut)d rows cut, %(left_out)d "
        "left out because nothing in them has a loss",
        counts,
    )
    if not examples:
        raise UserError(
            f"none of the {len(rows)} rows has a token with loss within {block_size} tokens; raise "
            "--block-size, or give rows with answers"
        )
    return examples, counts


def pack(examples: Sequence[Example], block_size: int) -> list[list[Example]]:
    """Group whole examples into packs of at most `block_size` tokens. No example is split or dropped.

    The longest examples are placed first, each into the first pack that has room for it.
    """
    packs: list[list[Example]] = []
    room: list[int] = []
    for example in sorted(examples, key=lambda e: -len(e["input_ids"])):
        size = len(example["input_ids"])
        number = next((n for n, left in enumerate(room) if left >= size), len(packs))
        if number == len(packs):
            packs.append([])
            room.append(block_size)
        packs[number].append(example)
        room[number] -= size
    return packs


def flattening_collator(mrope: bool) -> Callable[[list[list[Example]]], dict[str, Tensor]]:
    """The collator of packs. It makes one row [1, S] of a batch, in which positions begin anew with each example.

    transformers derives the attention mask from the positions, so that no example attends to another.

    Args:
        mrope: the model wants the positions of text, time, height and width, [4, 1, S] (`has_mrope`).
    """
    from transformers import DataCollatorWithFlattening  # seconds of imports, which training alone needs

    flatten = DataCollatorWithFlattening()

    def collate(packs: list[list[Example]]) -> dict[str, Tensor]:
        examples = [example for pack in packs for example in pack]
        batch = flatten(examples)
        if SOFT_TARGETS in examples[0]:
            batch[SOFT_TARGETS] = torch.tensor([[n for example in examples for n in example[SOFT_TARGETS]]])
        if mrope:
            batch["position_ids"] = batch["position_ids"].expand(4, 1, -1)
        return batch

    return collate


def has_mrope(model: Any) -> bool:
    """Whether a model counts positions by text, time, height and width, as Qwen2-VL does."""
    return "mrope_section" in (getattr(model.config.get_text_config(), "rope_parameters", None) or {})


def padded_batch(examples: Sequence[Example], device: Any = None) -> dict[str, Tensor]:
    """A batch of examples, each a row [S] padded on the right: ids, attention mask and labels, all [B, S], and
    SOFT_TARGETS where the examples have them.

    Padding has no loss.
    """
    ids, mask = pad_with_mask([example["input_ids"] for example in examples], device)
    labels = pad([example["labels"] for example in examples], IGNORED)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels.to(device)}
    if SOFT_TARGETS in examples[0]:
        batch[SOFT_TARGETS] = pad([example[SOFT_TARGETS] for example in examples], NO_TARGET)
    return batch


def model_inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What of a batch a model reads; the rest is for the loss."""
    return {name: value for name, value in batch.items() if name not in ("labels", SOFT_TARGETS)}
