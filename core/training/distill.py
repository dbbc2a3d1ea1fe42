"""The source as a teacher (`--training-scenario distill`): what the same budget gives without transport.

The target learns the source's distribution over the next token (Hinton et al., arXiv 1503.02531). Here is the case in
which both models read and write the same token ids; the other one is in `core.training.soft_targets`.

By flag it learns what the source would have written instead, which is called sequence-level distillation (Kim and Rush,
arXiv 1606.07947): the source's greedy answer takes the place of a row's own answer. In a row of text, which has no
answer, the source's continuation of the first half takes the place of the second half.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from core.batching import pad_with_mask, token_batches
from core.data import Row
from core.errors import UserError
from core.files import write_text
from core.progress import Progress
from core.texts.tokens import templated, tokenized
from core.training.settings import DistillSettings
from core.training.sft import IGNORED, has_mrope, model_inputs


@dataclass(frozen=True)
class Teacher:
    """A model whose next-token distribution is learned together with the labels."""

    model: Any
    settings: DistillSettings

    @property
    def method(self) -> str:
        """What the teacher does, in words for the log and the model card."""
        return (
            f"token-level: {self.settings.distill_weight} of the loss is T^2 KL(source || target), T = "
            f"{self.settings.distill_temperature}"
        )

    def joined(self, total: Tensor, logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """The loss of a batch with the teacher, summed over its labelled tokens, in nats: (1 - w) of the cross-entropy
        to the labels, and w of the divergence.

        Args:
            total: the cross-entropy to the labels, summed.
            logits: of the target, [B, S, V].
            batch: as the collators of `core.training.sft` make it.
        """
        temperature = self.settings.distill_temperature
        divergence = distillation_loss(logits, self._logits(model_inputs(batch)), batch["labels"], temperature)
        return torch.lerp(total, divergence, self.settings.distill_weight)

    @torch.no_grad()
    def _logits(self, inputs: dict[str, Tensor]) -> Tensor:
        """The teacher's logits [B, S, V] for the student's inputs, with positions of the kind that the teacher counts.

        Only packs come with positions, [1, S] or, for a student with M-RoPE, [4, 1, S].
        """
        if "position_ids" in inputs:
            positions = inputs["position_ids"].reshape(-1, *inputs["input_ids"].shape)[0]
            positions = positions.expand(4, 1, -1) if has_mrope(self.model) else positions
            inputs = {**inputs, "position_ids": positions}
        return self.model(**inputs, use_cache=False).logits


# The same of a source that answers.
SEQUENCE_METHOD = "sequence-level: the source's greedy answers (of a text, its second half) in place of the rows' own"


def same_vocabulary(a: Any, b: Any) -> bool:
    """Whether two tokenizers give the same ids to the same tokens."""
    return a.get_vocab() == b.get_vocab()


def distillation_loss(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """The sum over all labelled positions of T^2 KL(teacher || student), in nats.

    Both distributions are softened by the temperature T. The factor T^2 keeps the size of the gradients (Hinton et
    al., section 2).

    Args:
        student, teacher: logits [B, S, V] and [B, S, V'] of the same token ids. Models round their vocabulary up, so
            that V and V' may differ; only ids below the smaller one are compared.
        labels: [B, S], -100 where there is no loss. The token at s + 1 is predicted at s.
    """
    size = min(student.shape[-1], teacher.shape[-1])
    labelled = labels[:, 1:] != IGNORED
    p, q = (logits[:, :-1, :size][labelled].float() / temperature for logits in (teacher, student))
    return temperature**2 * F.kl_div(q.log_softmax(-1), p.log_softmax(-1), reduction="sum", log_target=True)


def write_answers(
    rows: Sequence[Row], model: Any, tokenizer: Any, path: Path, block_size: int, tokens_per_batch: int
) -> None:
    """Write the source's greedy answer to every row that asks something.

    No answer is longer than the row's own, so that training has the same budget of tokens.

    Args:
        model, tokenizer: the source's.
        path: .jsonl file to which every finished batch is appended. A killed run continues after the last whole line.
        block_size: prompts and answers have at most so many tokens.
        tokens_per_batch: of prompts with their answers, padding included.
    Raises:
        UserError: a row without tokens, or one that the tokenizer or its chat template refuses.
    """
    prompts = {n: _prompt(row, tokenizer, block_size) for n, row in enumerate(rows) if _has_question(row)}
    numbers = list(prompts)
    sizes = [len(prompt.ids) + prompt.new_tokens for prompt in prompts.values()]
    batches = [[numbers[k] for k in batch] for batch in token_batches(sizes, tokens_per_batch)]
    finished = _finished_batches(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The last line may have been cut short by a kill; it is not among the finished ones.
    write_text(path, "".join(json.dumps(line) + "\n" for line in finished))
    with open(path, "a", encoding="utf-8") as file:
        for batch in Progress(batches, desc="answers of the source", unit="batches"):
            if any(line["rows"] == batch for line in finished):
                continue
            answers = _answers(model, tokenizer, [prompts[n] for n in batch])
            file.write(json.dumps({"rows": batch, "answers": answers}) + "\n")
            file.flush()
            os.fsync(file.fileno())


def read_answers(rows: Sequence[Row], path: Path) -> list[Row]:
    """The rows with the answers that `write_answers` wrote in place of their last message."""
    lines = _finished_batches(path)
    answers = {n: answer for line in lines for n, answer in zip(line["rows"], line["answers"], strict=True)}
    return [_with_answer(row, answers[n]) if n in answers else row for n, row in enumerate(rows)]


def _with_answer(row: Row, answer: str) -> Row:
    role, _ = row.messages[-1]
    return dataclasses.replace(row, messages=(*row.messages[:-1], (role, answer)))


def _finished_batches(path: Path) -> list[dict[str, Any]]:
    """The whole lines of an earlier run: {"rows": numbers, "answers": texts} of every batch."""
    lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else [""]
    return [json.loads(line) for line in lines[:-1]]


class Prompt(NamedTuple):
    """What the source continues.

    Attributes:
        ids: its tokens.
        new_tokens: the source may write at most so many.
        text: the beginning of the row that the answer has to keep, which is the first half of a row of text. Empty for
            a row with roles, whose answer stands alone.
    """

    ids: list[int]
    new_tokens: int
    text: str


def _has_question(row: Row) -> bool:
    """Whether there is something for the source to answer: a text, or an answer with messages before it."""
    return not row.has_roles or (len(row.messages) > 1 and row.messages[-1][0] == "assistant")


def _prompt(row: Row, tokenizer: Any, block_size: int) -> Prompt:
    """The prompt of a row that `_has_question`."""
    if not row.has_roles:
        return _first_half(row, tokenizer, block_size)
    answer = row.messages[-1][1]
    length = min(block_size, len(tokenized(tokenizer, answer, add_special_tokens=False)["input_ids"]) + 1)
    if tokenizer.chat_template:
        options = {"tokenize": True, "add_generation_prompt": True, "return_dict": False}
        ids = templated(tokenizer, row.chat()[:-1], row.own_text, **options)
    else:
        question = "\n".join(content for _, content in row.messages[:-1])
        ids = tokenized(tokenizer, question + "\n")["input_ids"]
    return Prompt(ids[-block_size:], length, "")


def _first_half(row: Row, tokenizer: Any, block_size: int) -> Prompt:
    """The first half of the tokens of a row of text."""
    encoded = tokenized(tokenizer, row.plain, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"][:block_size], encoded["offset_mapping"]
    if not ids:
        raise UserError(f"the text {row.plain[:60]!r} has no tokens for the source; leave it out")
    half = max(1, len(ids) // 2)
    # A character may have several tokens. The prompt does not end inside one, because half of one decodes to nothing.
    while 1 < half < len(ids) and offsets[half - 1][1] > offsets[half][0]:
        half -= 1
    return Prompt(ids[:half], max(1, len(ids) - half), row.plain[: offsets[half - 1][1]])


def _answers(model: Any, tokenizer: Any, prompts: Sequence[Prompt]) -> list[str]:
    """The text with which each prompt's row is answered."""
    written = _generate(model, tokenizer, prompts)
    return [
        prompt.text + _text_after(tokenizer, prompt.ids if prompt.text else [], new)
        for prompt, new in zip(prompts, written, strict=True)
    ]


def _text_after(tokenizer: Any, before: list[int], new: list[int]) -> str:
    """The text of new tokens as it stands after the tokens before them.

    New tokens are not decoded alone, because many decoders drop the blank with which they begin. The text before them
    may end with the replacement character of half a character, which the new tokens complete.
    """
    start, whole = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (before, before + new))
    return whole.removeprefix(start.rstrip("\ufffd"))


@torch.no_grad()
def _generate(model: Any, tokenizer: Any, prompts: Sequence[Prompt]) -> list[list[int]]:
    """The token ids of the greedy continuation of each prompt, cut at the prompt's own limit.

    Prompts are padded on the left, so that all of them end where the new tokens begin.
    """
    fill = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    ids, mask = pad_with_mask([prompt.ids for prompt in prompts], model.device, fill, "left")
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=max(prompt.new_tokens for prompt in prompts),
        do_sample=False,
        pad_token_id=fill,
        temperature=None,
        top_p=None,
        top_k=None,
    )
    new = out[:, ids.shape[1] :].tolist()
    return [continuation[: prompt.new_tokens] for continuation, prompt in zip(new, prompts, strict=True)]
