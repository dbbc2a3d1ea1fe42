"""Distillation by tokens across vocabularies: what the source expects next, as a distribution over the target's tokens.

Two tokenizers divide a text at different characters, but at some characters a token ends in both. There both models
have read exactly the same characters, and the source's distribution over its next token says something about the
target's next token. Its likeliest tokens are taken, each becomes the target's first token of its text
(`core.training.token_map`), and the mass that found a token is scaled to 1. Positions at which too little of it did,
and all others, have no teacher.

Both models read the characters that the target is trained on. A row with roles is therefore rendered with the
*target's* chat template, and the source reads that as plain characters. It may know another template better, but after
its own template it would not have read the same characters. Where the next token is a special one, such as the end of
an answer, nothing is taught, because which special token comes there is a convention of the target's template.

The source teaches once, before training, so that it is not in memory while the target trains.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from core.batching import pad_with_mask, token_batches
from core.data import Row
from core.errors import UserError
from core.files import write_safetensors
from core.models.reading import text_token_ends
from core.progress import Progress
from core.texts.tokens import special_ids, tokenized
from core.training.settings import DistillSettings
from core.training.sft import IGNORED, NO_TARGET, SOFT_TARGETS, sft_example
from core.training.token_map import UNMAPPED

log = logging.getLogger(__name__)
# The source teaches its so many likeliest tokens, where at least this share of the probability found a token.
LIKELIEST, LEAST_MASS = 50, 0.3
# What the files hold for every position: a token id and a probability, of four bytes each.
BYTES_PER_POSITION = LIKELIEST * 8


@dataclass(frozen=True)
class Lesson:
    """What the source reads of one row, and where it teaches.

    Attributes:
        ids: the source's tokens, up to the last one after which it teaches.
        picks: the positions in `ids` after which it teaches.
        positions: the positions in the target's example that have read the same characters, one for each of `picks`.
        length: the number of tokens of the target's example.
    """

    ids: list[int]
    picks: list[int]
    positions: list[int]
    length: int


def lesson_of(row: Row, tokenizer: Any, source_tokenizer: Any, block_size: int) -> Lesson:
    """Where the source can teach a row that the target reads as `sft_example` gives it.

    These are the positions of `core.models.reading.text_token_ends` that both tokenizations have, whose next token has
    a loss and is not special.

    Raises:
        UserError: as `sft_example`; or a tokenizer gives no character offsets.
    """
    labels = sft_example(row, tokenizer, block_size)["labels"]
    text, special = row.render(tokenizer)
    _, ends = text_token_ends(tokenizer, text, block_size, special)
    # A template may write the token with which the source's own texts begin.
    begins = source_tokenizer.bos_token is not None and text.startswith(source_tokenizer.bos_token)
    ids = tokenized(source_tokenizer, text, add_special_tokens=not begins)["input_ids"]
    _, source_ends = text_token_ends(source_tokenizer, text, len(ids), not begins)
    untaught = {IGNORED, *special_ids(tokenizer)}
    pairs = [
        (source_ends[end], position)
        for end, position in ends.items()
        if end in source_ends and position + 1 < len(labels) and labels[position + 1] not in untaught
    ]
    picks, positions = [pick for pick, _ in pairs], [position for _, position in pairs]
    return Lesson(ids[: picks[-1] + 1] if picks else [], picks, positions, len(labels))


@dataclass(frozen=True)
class Lessons:
    """The lessons of all rows, and the batches in which the source reads them.

    The distributions of all lessons are numbered in the order of the batches, so that each batch is a file of its own.

    Attributes:
        rows: the lesson of every row.
        batches: for every batch the numbers of its rows. Rows without a position are in none.
    """

    rows: list[Lesson]
    batches: list[list[int]]

    @property
    def starts(self) -> list[int]:
        """The number of the first distribution of every batch, and of one past the last."""
        return list(accumulate((sum(len(self.rows[n].picks) for n in batch) for batch in self.batches), initial=0))

    def numbers(self) -> list[list[int]]:
        """For every row, for each token of the target's example, the number of the distribution over the token after
        it; NO_TARGET where there is none."""
        found = [[NO_TARGET] * lesson.length for lesson in self.rows]
        number = 0
        for row in (row for batch in self.batches for row in batch):
            for position in self.rows[row].positions:
                found[row][position] = number
                number += 1
        return found


def read_lessons(
    rows: Sequence[Row], tokenizer: Any, source_tokenizer: Any, block_size: int, tokens_per_batch: int
) -> Lessons:
    """The lessons of all rows.

    Args:
        block_size: the target's examples are cut at so many tokens.
        tokens_per_batch: of the source's tokens, padding included.
    Raises:
        UserError: as `lesson_of`; or there is no position at which the source can teach.
    """
    lessons = [lesson_of(row, tokenizer, source_tokenizer, block_size) for row in rows]
    taught = [n for n, lesson in enumerate(lessons) if lesson.picks]
    if not taught:
        raise UserError(
            f"in none of the {len(rows)} rows do the tokens of both models end at the same character before one with a "
            "loss, so that the source cannot teach by tokens; give longer rows, or --distill-by answers"
        )
    batches = token_batches([len(lessons[n].ids) for n in taught], tokens_per_batch)
    return Lessons(lessons, [[taught[k] for k in batch] for batch in batches])


def write_targets(
    lessons: Lessons, load_model: Callable[[], Any], to_target: Tensor, folder: Path, temperature: float
) -> None:
    """Write what the source expects after every position at which it teaches, a file for each batch.

    A killed run continues with the batches that have no file yet. When all are there, no model is loaded.

    Args:
        load_model: loads the source.
        to_target: `first_token_map`.
        folder: of the files. Each holds `ids` [P, k] int32, tokens of the target, and `probabilities` [P, k] float32,
            which sum to 1, or are all 0 where too little of the source's probability found a token. k is LIKELIEST, or
            the size of a smaller vocabulary. An id may stand in a row several times, because several tokens of the
            source may begin alike for the target; its probability is the sum.
        temperature: softens the source's distribution before anything else.
    Raises:
        UserError: the source gives numbers that are not finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = [number for number in range(len(lessons.batches)) if not batch_file(folder, number).is_file()]
    model = load_model() if missing else None
    for number in Progress(missing, desc="next tokens of the source", unit="batches"):
        rows = [lessons.rows[n] for n in lessons.batches[number]]
        ids, probabilities = _expected(model, rows, to_target, temperature)
        write_safetensors(batch_file(folder, number), {"ids": ids.int(), "probabilities": probabilities})


def batch_file(folder: Path, number: int) -> Path:
    """Where the distributions of one batch are."""
    return folder / f"batch{number:05}.safetensors"


@torch.no_grad()
def _expected(model: Any, rows: Sequence[Lesson], to_target: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(ids, probabilities), [P, k] each, of the P positions of a batch, in the order of its rows."""
    ids, mask = pad_with_mask([lesson.ids for lesson in rows], model.device)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits  # [B, S, V]
    # Models round their vocabulary up; ids that no token has take no part.
    picked = [logits[n, lesson.picks, : len(to_target)] for n, lesson in enumerate(rows)]
    parts = []
    for picks in picked:
        probabilities = (picks.float() / temperature).softmax(-1)
        if not probabilities.isfinite().all():
            raise UserError(
                "the source's next-token distribution is not finite; compute it with --dtype float32 or bfloat16"
            )
        likeliest = probabilities.topk(min(LIKELIEST, probabilities.shape[-1]))
        parts.append(mapped(likeliest.values.cpu(), likeliest.indices.cpu(), to_target))
    return torch.cat([ids for ids, _ in parts]), torch.cat([probabilities for _, probabilities in parts])


def mapped(probabilities: Tensor, tokens: Tensor, to_target: Tensor) -> tuple[Tensor, Tensor]:
    """Distributions over tokens of the source as distributions over tokens of the target.

    Args:
        probabilities, tokens: [P, k] each, the likeliest tokens of the source. What is missing to 1 is that of all
            other tokens.
        to_target: `first_token_map`.
    Returns:
        (ids [P, k], probabilities [P, k]), as `write_targets` writes them.
    """
    ids = to_target[tokens]  # [P, k]
    kept = probabilities * (ids != UNMAPPED)
    mass = kept.sum(-1, keepdim=True)  # [P, 1]
    return ids.clamp(min=0), torch.where(mass >= LEAST_MASS, kept / mass, torch.zeros_like(kept))


@dataclass(frozen=True)
class StoredTeacher:
    """The source's distributions over the target's next token, from the files of `write_targets`.

    Attributes:
        starts: `Lessons.starts`.
        ids, probabilities: of every batch, [P, k] each, mapped from its file.
        settings: how much they count.
    """

    starts: list[int]
    ids: list[Tensor]
    probabilities: list[Tensor]
    settings: DistillSettings

    @classmethod
    def read(cls, folder: Path, lessons: Lessons, settings: DistillSettings) -> StoredTeacher:
        """Open the files of all batches."""
        files = [load_file(batch_file(folder, number)) for number in range(len(lessons.batches))]
        return cls(lessons.starts, [f["ids"] for f in files], [f["probabilities"] for f in files], settings)

    @property
    def taught(self) -> int:
        """The number of positions that have a teacher."""
        return sum(int((probabilities.sum(-1) > 0).sum()) for probabilities in self.probabilities)

    @property
    def method(self) -> str:
        """What the teacher does, in words for the log and the model card."""
        return (
            f"token-level across vocabularies: at {self.taught} tokens with loss, {self.settings.distill_weight} of it "
            f"is T^2 times the cross-entropy to the source's {LIKELIEST} likeliest next tokens, each as the target's "
            f"first token of its text, T = {self.settings.distill_temperature}"
        )

    def distributions(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """(ids, probabilities), [P, k] each on the CPU, of P distributions by their numbers [P]."""
        places = [(bisect_right(self.starts, n) - 1, n) for n in numbers.tolist()]
        ids, probabilities = (
            torch.stack([values[batch][n - self.starts[batch]] for batch, n in places])
            for values in (self.ids, self.probabilities)
        )
        return ids.long(), probabilities

    def joined(self, total: Tensor, logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """The loss of a batch with the teacher, summed over its labelled tokens, in nats.

        At a position that has a teacher it is (1 - w) times the cross-entropy to the label, plus w times T^2 times the
        cross-entropy to the teacher's distribution, where the target's own is softened by the temperature T as well. At
        every other position the label counts fully.

        Args:
            total: the cross-entropy to the labels, summed.
            logits: of the target, [B, S, V].
            batch: as the collators of `core.training.sft` make it.
        """
        numbers = batch[SOFT_TARGETS]  # [B, S]
        taught = numbers != NO_TARGET
        if not taught.any():
            return total
        ids, probabilities = (values.to(logits.device) for values in self.distributions(numbers[taught]))
        has_mass = probabilities.sum(-1) > 0  # [P]
        own, temperature = logits[taught].float(), self.settings.distill_temperature  # [P, V]
        soft = (own / temperature).log_softmax(-1)
        to_teacher = -(probabilities * soft.gather(-1, ids)).sum(-1)  # [P]
        labels = batch["labels"].roll(-1, 1)[taught]  # the token at s + 1 is predicted at s
        to_label = -own.log_softmax(-1).gather(-1, labels[:, None])[:, 0]  # [P]
        difference = (temperature**2 * to_teacher - to_label)[has_mass].sum()
        return total + self.settings.distill_weight * difference
