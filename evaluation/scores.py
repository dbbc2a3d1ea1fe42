"""What every benchmark runner shares: the model under test, and one file per benchmark with the score of every item."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from core.errors import UserError
from core.files import digest_of, read_json, write_json
from core.manifest import FORMAT_VERSION, provenance
from core.models.checkpoints import Checkpoint, open_checkpoint
from core.runs.command_line import Parser
from core.runs.settings import check_device

log = logging.getLogger(__name__)
# Beside weights and config, what a score depends on: tokens, prompts, where an answer ends.
TEXT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)


def runner_flags(description: str, folder: str | None = None, needs_model: bool = True) -> Parser:
    """The flags that every runner takes.

    Args:
        folder: what --output-dir is said to default to; None when it must be given.
        needs_model: whether --model must be given.
    """
    parser = Parser(description)
    parser.add_argument("--model", required=needs_model, help="folder, GGUF file, id in $MODELS_ROOT, or hub id")
    parser.add_argument(
        "--output-dir", type=Path, required=folder is None, help=f"one file per benchmark goes here (default {folder})"
    )
    parser.add_argument("--limit", type=int, help="only the first N items of every file (for a trial)")
    parser.add_argument("--tokens-per-batch", type=int, default=4096, help="padding included (default 4096)")
    parser.add_argument("--device", default="cpu", help="torch device (default cpu)")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="auto: float32 on a CPU, else the model's own",
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="allow code that comes with the model")
    return parser


def data_folder(given: Path | None) -> Path | None:
    """The folder of benchmark files, None for none. Raises UserError when it does not exist."""
    if given is not None and not given.is_dir():
        raise UserError(f"data folder {given} does not exist; give the folder of benchmark files")
    return given


@dataclass(frozen=True)
class Evaluated:
    """A model under test; weights are loaded at first use, once for all benchmarks."""

    checkpoint: Checkpoint
    dtype: str = "auto"

    @classmethod
    def from_flags(cls, given: Mapping[str, Any]) -> Evaluated:
        """From what `runner_flags` parsed. Raises UserError as `open_checkpoint` does, and for numbers below 1 and a
        device that is not there."""
        for name in ("limit", "tokens_per_batch"):
            if (value := given.get(name)) is not None and value < 1:
                raise UserError(f"{name} is {value}; expected at least 1")
        check_device(given["device"])
        return cls(open_checkpoint(given["model"], None, given["trust_remote_code"], given["device"]), given["dtype"])

    @cached_property
    def model(self) -> Any:
        """In eval mode, on its device."""
        return self.checkpoint.load_model(self.dtype)

    @cached_property
    def tokenizer(self) -> Any:
        """The model's fast tokenizer."""
        return self.checkpoint.load_tokenizer()

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What a score depends on: contents, not names and times of files."""
        folder, identity = self.checkpoint.folder, self.checkpoint.identity
        contents = {key: identity[key] for key in ("config", "weights", "made")}
        texts = {
            name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
            for name in TEXT_FILES
            if (folder / name).is_file()
        }
        device = self.checkpoint.device.partition(":")[0]
        return {**contents, **texts, "dtype": self.dtype, "device": device}


class NotFiniteError(Exception):
    """A model gave NaN or infinity where an answer is read: an arg max over them would be a score like any other."""


@contextlib.contextmanager
def finite(evaluated: Evaluated, benchmark: str) -> Iterator[None]:
    """Inside, NotFiniteError is a UserError that names model and benchmark."""
    try:
        yield
    except NotFiniteError as error:
        raise UserError(
            f"{evaluated.checkpoint.name} on {benchmark}: {error}, so it has no score there; check the "
            "model's weights, or give a wider --dtype such as float32"
        ) from None


def check_finite(values: Iterable[float], what: str) -> None:
    """Raises NotFiniteError for log-probabilities or logits that are not finite. `what`: what they are of."""
    if not all(map(math.isfinite, values)):
        raise NotFiniteError(f"log-probabilities that are not finite (NaN or infinite) in {what}")


def check_logits(ids: Tensor, logits: Tensor) -> Tensor:
    """A logits processor of `generate` that changes nothing [B, V]. Raises NotFiniteError for a row whose largest logit
    is not finite: `generate` would go on with an arbitrary token."""
    if not logits.max(-1).values.isfinite().all():
        raise NotFiniteError("logits that are not finite (NaN or infinite) in a generated answer")
    return logits


@dataclass(frozen=True)
class Score:
    """One model on one benchmark.

    Attributes:
        benchmark: as the table names it, e.g. `belebele_ind_Latn`.
        ids: of the items, unique, in the order of the file: two models are compared item by item.
        metrics: metric -> score of every item (0 or 1 for accuracies).
        metric: the one of them that tables and tests report; declared by the runner, never the first by chance.
        groups: category of every item, where the benchmark reports by category.
        details: what else the runner knows: task version, prompt, note on the data.
    """

    benchmark: str
    ids: Sequence[str]
    metrics: Mapping[str, Sequence[float]]
    metric: str = field(kw_only=True)
    groups: Sequence[str] = ()
    details: Mapping[str, Any] = field(default_factory=dict)


def mean_and_error(values: Sequence[float]) -> dict[str, float | int]:
    """{"value": mean, "stderr": its standard error (unbiased; 0 for one item), "n"}."""
    n = len(values)
    mean = math.fsum(values) / n
    variance = math.fsum((value - mean) ** 2 for value in values) / max(1, n - 1)
    return {"value": mean, "stderr": math.sqrt(variance / n), "n": n}


def finished(path: Path, inputs: Mapping[str, Any]) -> bool:
    """Whether `path` holds the score for exactly these inputs, in the present format; says so in the log."""
    record = read_json(path) if path.is_file() else {}
    done = (record.get("format"), record.get("fingerprint")) == (FORMAT_VERSION, digest_of(inputs))
    if done:
        log.info("%s is finished already", path)
    return done


def read_score(path: Path) -> dict[str, Any]:
    """A benchmark's file. Raises UserError for one of an earlier version, which was scored by other rules."""
    record = read_json(path)
    if record.get("format") != FORMAT_VERSION:
        raise UserError(
            f"{path} has format {record.get('format')}, expected {FORMAT_VERSION}; run the benchmark again "
            "(evaluation/run_task.py), with the same output folder"
        )
    return record


def write_score(path: Path, score: Score, inputs: Mapping[str, Any]) -> None:
    """Write one benchmark's file, atomically.

    Args:
        inputs: all that the score depends on: `Evaluated.identity`, digest of the data, limit, settings.
    """
    n = len(score.ids)
    assert n and len(set(score.ids)) == n and all(len(values) == n for values in score.metrics.values())
    assert score.metric in score.metrics
    groups: dict[str, list[int]] = {}
    for place, group in enumerate(score.groups):
        groups.setdefault(group, []).append(place)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(
        path,
        {
            "format": FORMAT_VERSION,
            "benchmark": score.benchmark,
            "metric": score.metric,
            "metrics": {metric: mean_and_error(values) for metric, values in score.metrics.items()},
            "groups": {
                group: {
                    metric: mean_and_error([values[place] for place in places])
                    for metric, values in score.metrics.items()
                }
                for group, places in sorted(groups.items())
            },
            "item_groups": list(score.groups),
            "details": dict(score.details),
            "fingerprint": digest_of(inputs),
            "inputs": dict(inputs),
            "items": {"ids": list(score.ids), **{metric: list(values) for metric, values in score.metrics.items()}},
            **provenance(),
        },
    )
