"""What every command that scores a model on benchmarks shares: its flags, and what they ask for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.errors import UserError
from core.models.checkpoints import open_checkpoint
from core.runs.command_line import Parser
from core.runs.settings import check_device
from evaluation.evaluated_model import EvaluatedModel


def runner_flags(description: str, default_folder: str | None = None, needs_model: bool = True) -> Parser:
    """A parser with the flags that every such command takes.

    Args:
        default_folder: what `--help` says of the default of --output-dir; None when that flag must be given.
        needs_model: whether --model must be given.
    """
    parser = Parser(description)
    parser.add_argument("--model", required=needs_model, help="folder, GGUF file, id in $MODELS_ROOT, or hub id")
    default = f" (default {default_folder})" if default_folder else ""
    parser.add_argument(
        "--output-dir", type=Path, required=default_folder is None, help=f"gets one file per benchmark{default}"
    )
    parser.add_argument("--limit", type=int, help="score only the first N items of every file (for a trial)")
    parser.add_argument(
        "--tokens-per-batch", type=int, default=4096, help="tokens of a batch, padding included (default 4096)"
    )
    compute_flags(parser)
    return parser


def compute_flags(parser: Parser) -> None:
    """Add the flags that say where and how precisely a model computes, and whether its own code may run."""
    parser.add_argument("--device", default="cpu", help="torch device (default cpu)")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="auto: float32 on a CPU, else the model's own",
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="allow code that comes with the model")


@dataclass(frozen=True)
class Scoring:
    """What a benchmark is asked to do.

    Attributes:
        model: the model to score.
        output_dir: folder that gets one file per benchmark.
        limit: only the first so many items of every file; None for all.
        tokens_per_batch: of one forward pass, padding included; no score depends on it.
    """

    model: EvaluatedModel
    output_dir: Path
    limit: int | None = None
    tokens_per_batch: int = 4096

    @classmethod
    def from_flags(cls, given: Mapping[str, Any]) -> Scoring:
        """Read what `runner_flags` parsed, and open the model, at `revision` where there is one.

        Raises:
            UserError: a number below 1, a device that this machine does not have, or as `open_checkpoint` does.
        """
        for name in ("limit", "tokens_per_batch"):
            if given[name] is not None and given[name] < 1:
                raise UserError(f"{name} is {given[name]}; expected at least 1")
        check_device(given["device"])
        checkpoint = open_checkpoint(given["model"], given.get("revision"), given["trust_remote_code"], given["device"])
        model = EvaluatedModel(checkpoint, given["dtype"])
        return cls(model, given["output_dir"], given["limit"], given["tokens_per_batch"])


def data_folder(given: Path | None) -> Path | None:
    """The folder of benchmark files, or None where none is given. Raises UserError when it does not exist."""
    if given is not None and not given.is_dir():
        raise UserError(f"data folder {given} does not exist; give the folder of benchmark files")
    return given
