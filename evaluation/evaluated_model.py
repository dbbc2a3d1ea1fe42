"""The model that benchmarks score: loaded once, known by its contents, and refused where its answers are NaN."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from core.errors import UserError
from core.models.checkpoints import Checkpoint

# The files besides weights and config that a score depends on: tokens, prompts, where an answer ends.
TEXT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)


@dataclass(frozen=True)
class EvaluatedModel:
    """A model that benchmarks score; its weights are loaded at first use, once for all benchmarks.

    Attributes:
        checkpoint: the opened model.
        dtype: in which it computes; `auto` is float32 on a CPU and the model's own type elsewhere.
    """

    checkpoint: Checkpoint
    dtype: str = "auto"

    @cached_property
    def loaded(self) -> Any:
        """The model with its weights, in eval mode, on its device."""
        return self.checkpoint.load_model(self.dtype)

    @cached_property
    def tokenizer(self) -> Any:
        """The model's fast tokenizer."""
        return self.checkpoint.load_tokenizer()

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Everything that a score depends on: the contents of the model's files (not their names and times), the dtype,
        and the kind of device."""
        folder, identity = self.checkpoint.folder, self.checkpoint.identity
        contents = {key: identity[key] for key in ("config", "weights", "made")}
        texts = {name: sha256_of(folder / name) for name in TEXT_FILES if (folder / name).is_file()}
        device = self.checkpoint.device.partition(":")[0]
        return {**contents, **texts, "dtype": self.dtype, "device": device}


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class NotFiniteError(Exception):
    """A model gave NaN or infinity where an answer is read; an argmax over such numbers would pass for an answer."""


@contextlib.contextmanager
def finite_answers(model: EvaluatedModel, benchmark: str) -> Iterator[None]:
    """Turn a NotFiniteError inside into a UserError that names the model and the benchmark."""
    try:
        yield
    except NotFiniteError as error:
        raise UserError(
            f"{model.checkpoint.name} on {benchmark}: {error}, so it has no score there; check the "
            "model's weights, or give a wider --dtype such as float32"
        ) from None


def check_finite(values: Iterable[float], where: str) -> None:
    """Raise NotFiniteError for log-probabilities or logits that are not finite.

    Args:
        where: which answer they belong to, for the message.
    """
    if not all(map(math.isfinite, values)):
        raise NotFiniteError(f"log-probabilities that are not finite (NaN or infinite) in {where}")


def check_logits(ids: Tensor, logits: Tensor) -> Tensor:
    """A logits processor for `generate` that returns the logits [B, V] unchanged.

    Raises:
        NotFiniteError: the largest logit of a row is not finite, where `generate` would go on with an arbitrary token.
    """
    if not logits.max(-1).values.isfinite().all():
        raise NotFiniteError("logits that are not finite (NaN or infinite) in a generated answer")
    return logits
