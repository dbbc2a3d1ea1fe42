"""How the source takes part in `distill`: by its next-token distributions, or by whole answers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.data import Row
from core.models.checkpoints import Checkpoint
from core.training.distill import SEQUENCE_METHOD, Teacher, read_answers, same_vocabulary, write_answers
from core.training.recipe import Recipe
from core.training.soft_targets import StoredTeacher, read_lessons, write_targets
from core.training.token_map import first_token_map

log = logging.getLogger(__name__)
# In the output folder: the source's answers, and its next-token distributions while training.
ANSWERS, TARGETS = "source_answers.jsonl", "source_targets"


@dataclass(frozen=True)
class Taught:
    """The fine-tuning rows, with what the source has to say about them.

    Attributes:
        rows: the rows to train on.
        method: how the source takes part, in words for the log and the card; None without a source.
        teacher: what joins the loss; None without a source, and where it has answered instead.
        numbers: with a StoredTeacher, for every row the numbers of its distributions (`Lessons.numbers`).
    """

    rows: Sequence[Row]
    method: str | None = None
    teacher: Teacher | StoredTeacher | None = None
    numbers: Sequence[list[int]] | None = None


def learn_from(
    source: Checkpoint, rows: Sequence[Row], tokenizer: Any, recipe: Recipe, folder: Path, process: Any
) -> Taught:
    """Let the source teach as the settings ask: by tokens, from memory where both models have the same vocabulary and
    from files elsewhere, or by whole answers.

    Args:
        tokenizer: the target's.
        folder: of the checkpoint that is being made.
        process: this process among those of `accelerate launch` (accelerate's PartialState).
    Raises:
        UserError: a row that the source's tokenizer or chat template refuses; or no position to teach at.
    """
    training, compute, settings = recipe.training, recipe.compute, recipe.distill
    source_tokenizer = source.load_tokenizer()
    if settings.distill_by == "answers":
        path = folder / ANSWERS
        if process.is_main_process:
            model = source.load_model(compute.dtype)
            write_answers(rows, model, source_tokenizer, path, training.block_size, compute.tokens_per_batch)
        process.wait_for_everyone()
        taught = Taught(read_answers(rows, path), SEQUENCE_METHOD)
    elif same_vocabulary(tokenizer, source_tokenizer):
        teacher = Teacher(source.load_model(compute.dtype).requires_grad_(False), settings)
        taught = Taught(rows, teacher.method, teacher)
    else:
        lessons = read_lessons(rows, tokenizer, source_tokenizer, training.block_size, compute.tokens_per_batch)
        if process.is_main_process:
            to_target = first_token_map(source_tokenizer, tokenizer)
            temperature = settings.distill_temperature
            write_targets(lessons, lambda: source.load_model(compute.dtype), to_target, folder / TARGETS, temperature)
        process.wait_for_everyone()
        stored = StoredTeacher.read(folder / TARGETS, lessons, settings)
        taught = Taught(rows, stored.method, stored, lessons.numbers())
    log.info("the source teaches; %s", taught.method)
    return taught
