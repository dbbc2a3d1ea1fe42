"""Fine-tuning rows as token ids and labels: the chat template's loss mask, the cut at a length, packing."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from core.data import Row
from core.errors import UserError
from core.texts.tokens import templated, tokenized

log = logging.getLogger(__name__)
Example = dict[str, list[int]]
IGNORED = -100
# Stands for an answer while a chat template is rendered, to find where the template puts it.
_MARK = "\ue000{}\ue001"
_GENERATION = re.compile(r"{%-?\s*generation\b")


def sft_example(row: Row, tokenizer: Any, block_size: int) -> Example:
    """Token ids and labels of one row, cut at `block_size` tokens.

    Text rows: loss on every token that has one before it. Rows with roles: loss on the assistant's answers and the
    token that ends each of them, -100 elsewhere; without a chat template, messages are lines and the end is the
    tokenizer's end of text.

    Raises:
        UserError: the chat template hides where the answers are, or refuses the row; the tokenizer refuses it.
    """
    if not row.has_roles:
        ids = tokenized(tokenizer, row.plain)["input_ids"][:block_size]
        labels = list(ids)
    elif not tokenizer.chat_template:
        done = tokenized(tokenizer, row.plain, return_offsets_mapping=True)
        ids = done["input_ids"]
        marks = _in_spans(done, _lines_of_answers(row), tokenizer)
        if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
            ids, marks = [*ids, tokenizer.eos_token_id], [*marks, row.messages[-1][0] == "assistant"]
        ids = ids[:block_size]
        labels = [t if marked else IGNORED for t, marked in zip(ids, marks, strict=False)]
    elif _GENERATION.search(_template(tokenizer)):
        options = {"return_dict": True, "return_assistant_tokens_mask": True}
        done = templated(tokenizer, row.chat(), row.own_text, **options)
        ids = done["input_ids"][:block_size]
        labels = [t if marked else IGNORED for t, marked in zip(ids, done["assistant_masks"], strict=False)]
    else:
        text, spans = answer_spans(row, tokenizer)
        done = tokenized(tokenizer, text, add_special_tokens=False, return_offsets_mapping=True)
        ids = done["input_ids"][:block_size]
        labels = [t if marked else IGNORED for t, marked in zip(ids, _in_spans(done, spans, tokenizer), strict=False)]
    labels[:1] = [IGNORED] * len(labels[:1])  # nothing predicts the first token: it must not count as one
    return {"input_ids": ids, "labels": labels}


def answer_spans(row: Row, tokenizer: Any) -> tuple[str, list[tuple[int, int]]]:
    """The row as the chat template renders it, and where the assistant's answers are in it (characters, from to).

    The template is rendered with a mark in place of each answer, so that no answer can be mistaken for other text.
    """
    chat = row.chat()
    answers = [turn for turn, message in enumerate(chat) if message["role"] == "assistant"]
    marked = [
        {**message, "content": _MARK.format(turn)} if turn in answers else message for turn, message in enumerate(chat)
    ]
    text, rendered = (templated(tokenizer, turns, row.own_text, tokenize=False) for turns in (chat, marked))
    for clean in (str, str.strip):  # some templates strip what they are given
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


def _lines_of_answers(row: Row) -> list[tuple[int, int]]:
    """Where the assistant's answers are in `Row.plain`."""
    spans, begin = [], 0
    for role, content in row.messages:
        if role == "assistant":
            spans.append((begin, begin + len(content)))
        begin += len(content) + 1
    return spans


def _in_spans(done: Any, spans: Sequence[tuple[int, int]], tokenizer: Any) -> list[bool]:
    """Per token: whether it holds characters of a span, or is the special token right after one (blanks between them,
    which some templates put there, have no loss)."""
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    marks, open_span = [], False
    for token, (begin, end) in zip(done["input_ids"], done["offset_mapping"], strict=True):
        inside = begin < end and any(begin < to and end > start for start, to in spans)
        marks.append(inside or (open_span and token in special))
        blank = token not in special and not tokenizer.decode([token]).strip()
        open_span = inside or (open_span and blank)
    return marks


def _template(tokenizer: Any) -> str:
    """The chat template that is used when none is named."""
    template = tokenizer.chat_template
    return template if isinstance(template, str) else template.get("default", "")


def sft_examples(rows: Sequence[Row], tokenizer: Any, block_size: int) -> tuple[list[Example], dict[str, int]]:
    """Examples of all rows that have something to learn, and counts: rows, tokens, those with loss, cut, left out.

    Raises:
        UserError: no row has a token with loss.
    """
    examples: list[Example] = []
    cut = 0
    for row in rows:
        example = sft_example(row, tokenizer, block_size + 1)  # one more tells what is cut
        cut += len(example["input_ids"]) > block_size
        example = {name: values[:block_size] for name, values in example.items()}
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
    """Whole examples grouped to at most `block_size` tokens (first fit, longest first); none is split or dropped."""
    packs: list[list[Example]] = []
    room: list[int] = []
    for example in sorted(examples, key=lambda e: -len(e["input_ids"])):
        size = len(example["input_ids"])
        place = next((n for n, left in enumerate(room) if left >= size), None)
        if place is None:
            packs.append([])
            room.append(block_size)
            place = len(packs) - 1
        packs[place].append(example)
        room[place] -= size
    return packs


def flattening_collator(mrope: bool) -> Callable[[list[list[Example]]], dict[str, Tensor]]:
    """Collator of packs: one row per batch, positions that begin anew with each example, so that attention (which
    transformers derives from them) stays within examples.

    Args:
        mrope: the model takes the positions of text, time, height and width, [4, 1, S].
    """
    from transformers import DataCollatorWithFlattening

    flatten = DataCollatorWithFlattening()

    def collate(packs: list[list[Example]]) -> dict[str, Tensor]:
        batch = flatten([example for examples in packs for example in examples])
        if mrope:
            batch["position_ids"] = batch["position_ids"].expand(4, 1, -1)
        return batch

    return collate


def pad(examples: Sequence[Example], device: Any = None) -> dict[str, Tensor]:
    """A batch [B, S], padded on the right; labels never include padding."""
    longest = max(len(example["input_ids"]) for example in examples)

    def filled(values: list[list[int]], empty: int) -> Tensor:
        return torch.tensor([v + [empty] * (longest - len(v)) for v in values], device=device)

    ids = [example["input_ids"] for example in examples]
    return {
        "input_ids": filled(ids, 0),
        "attention_mask": filled([[1] * len(v) for v in ids], 0),
        "labels": filled([example["labels"] for example in examples], IGNORED),
    }
