"""The source as a teacher (`--training-scenario distill`): what the same budget gives without transport.

Where both models read and write the same token ids, the target learns the source's distribution over the next token
(Hinton et al., arXiv 1503.02531); elsewhere it learns what the source would have written (sequence-level distillation,
Kim and Rush, arXiv 1606.07947): the source's greedy answer in place of a row's own, or, for a text, its continuation of
the text's first half in place of the second.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from core.batching import token_batches
from core.data import Row
from core.errors import UserError
from core.files import write_text
from core.texts.tokens import templated, tokenized
from core.training.sft import IGNORED


def same_vocabulary(a: Any, b: Any) -> bool:
    """Whether two tokenizers give the same ids to the same tokens."""
    return a.get_vocab() == b.get_vocab()


def distillation_loss(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Sum over labelled positions of T^2 KL(teacher || student), both softened by the temperature T.

    Args:
        student, teacher: logits [B, S, V] and [B, S, V'] of the same ids; padding beyond the smaller V is not compared.
        labels: [B, S], -100 where there is no loss; position s + 1 is predicted at s.
    """
    size = min(student.shape[-1], teacher.shape[-1])
    there = labels[:, 1:] != IGNORED
    p, q = (logits[:, :-1, :size][there].float() / temperature for logits in (teacher, student))
    return temperature**2 * F.kl_div(q.log_softmax(-1), p.log_softmax(-1), reduction="sum", log_target=True)


def write_answers(
    rows: Sequence[Row], model: Any, tokenizer: Any, path: Path, block_size: int, tokens_per_batch: int
) -> None:
    """Write the source's greedy answers to every row, none longer than the row's own (the same budget).

    Args:
        model: the source's language model.
        path: .jsonl that finished batches are appended to; a killed run goes on after the last whole one.
    """
    asked = [n for n, row in enumerate(rows) if _has_question(row)]
    prompts = {n: _prompt(rows[n], tokenizer, block_size) for n in asked}
    sizes = [len(prompts[n][0]) + prompts[n][1] for n in asked]
    batches = [[asked[k] for k in batch] for batch in token_batches(sizes, tokens_per_batch)]
    done = _finished(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(line) + "\n" for line in done))  # without a last line that was cut short
    with open(path, "a", encoding="utf-8") as file:
        for batch in tqdm(batches, desc="answers of the source", unit="batch"):
            if any(line["rows"] == batch for line in done):
                continue
            written = _generate(model, tokenizer, [prompts[n][:2] for n in batch])
            answers = [
                prompts[n][2] + _text_after(tokenizer, prompts[n][0] if prompts[n][2] else [], new)
                for n, new in zip(batch, written, strict=True)
            ]
            file.write(json.dumps({"rows": batch, "answers": answers}) + "\n")
            file.flush()
            os.fsync(file.fileno())


def read_answers(rows: Sequence[Row], path: Path) -> list[Row]:
    """The rows with what `write_answers` wrote in place of their last message."""
    answers = {n: answer for line in _finished(path) for n, answer in zip(line["rows"], line["answers"], strict=True)}
    return [_answered(row, answers[n]) if n in answers else row for n, row in enumerate(rows)]


def _text_after(tokenizer: Any, before: list[int], new: list[int]) -> str:
    """The text of new tokens as it stands after those before it: many decoders drop a first blank."""
    start, whole = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (before, before + new))
    return whole.removeprefix(start.rstrip("\ufffd"))  # half a character is no text


def _has_question(row: Row) -> bool:
    """Whether there is something that the source can answer: a text, or an answer with messages before it."""
    return not row.has_roles or (len(row.messages) > 1 and row.messages[-1][0] == "assistant")


def _prompt(row: Row, tokenizer: Any, block_size: int) -> tuple[list[int], int, str]:
    """(ids the source continues, most tokens it may write, the text before them for a row without roles)."""
    if not row.has_roles:
        done = tokenized(tokenizer, row.plain, return_offsets_mapping=True)
        ids = done["input_ids"][:block_size]
        if not ids:
            raise UserError(f"the text {row.plain[:60]!r} has no tokens for the source; leave it out")
        half, offsets = max(1, len(ids) // 2), done["offset_mapping"]
        # Not inside a character of several tokens: half of one decodes to nothing.
        while 1 < half < len(ids) and offsets[half - 1][1] > offsets[half][0]:
            half -= 1
        kept = offsets[half - 1][1]
        return ids[:half], max(1, len(ids) - half), row.plain[:kept]
    answer = row.messages[-1][1]
    length = min(block_size, len(tokenized(tokenizer, answer, add_special_tokens=False)["input_ids"]) + 1)
    if tokenizer.chat_template:
        options = {"tokenize": True, "add_generation_prompt": True, "return_dict": False}
        ids = templated(tokenizer, row.chat()[:-1], row.own_text, **options)
    else:
        asked = "\n".join(content for _, content in row.messages[:-1])
        ids = tokenized(tokenizer, asked + "\n")["input_ids"]
    return ids[-block_size:], length, ""


def _answered(row: Row, answer: str) -> Row:
    messages = list(row.messages)
    messages[-1] = (messages[-1][0], answer)
    return dataclasses.replace(row, messages=tuple(messages))


def _finished(path: Path) -> list[dict[str, Any]]:
    """Whole lines of an earlier run."""
    done = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").split("\n"):
            try:
                done.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return done


@torch.no_grad()
def _generate(model: Any, tokenizer: Any, prompts: Sequence[tuple[list[int], int]]) -> list[list[int]]:
    """Ids of greedy continuations, each cut at its own length; prompts are padded on the left."""
    longest, most = max(len(ids) for ids, _ in prompts), max(length for _, length in prompts)
    fill = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    ids = torch.tensor([[fill] * (longest - len(p)) + p for p, _ in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p, _ in prompts], device=model.device)
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=most,
        do_sample=False,
        pad_token_id=fill,
        temperature=None,
        top_p=None,
        top_k=None,
    )
    return [new[:length] for new, (_, length) in zip(out[:, longest:].tolist(), prompts, strict=True)]
