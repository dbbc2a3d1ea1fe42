#!/usr/bin/env python
"""Ask a model something: one question, or a conversation where the command line has none.

The answer appears while it is made. The question goes into the model's chat template; a model without one continues it
as plain text. Answers are greedy, so that two models which are compared differ by nothing but their weights.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from core.errors import UserError
from core.manifest import check_finished
from core.models.checkpoints import open_checkpoint
from core.runs.command_line import Parser
from core.runs.process import run_command, setup_logging
from core.runs.settings import check_device
from evaluation.benchmarks.generation import Decoding, own_settings, prompt_ids
from evaluation.benchmarks.prompts import CHAT, PLAIN
from evaluation.evaluated_model import EvaluatedModel, NotFiniteError, check_logits
from evaluation.runner import compute_flags


class Conversation:
    """A model, and what was asked and answered so far, which its chat template repeats with every question."""

    def __init__(self, name: str, given: dict[str, Any]):
        check_finished(Path(name).expanduser())
        checkpoint = open_checkpoint(name, None, given["trust_remote_code"], given["device"])
        self.model = EvaluatedModel(checkpoint, given["dtype"])
        self.decoding = Decoding(given["max_new_tokens"], prompt=CHAT if self.model.tokenizer.chat_template else PLAIN)
        self.turns: list[tuple[str, str]] = []

    def ask(self, question: str, stream: bool) -> str:
        """The answer, which is also printed while it is made where `stream` is true. Raises UserError where the chat
        template refuses the question, or the model's logits are not finite."""
        from transformers import TextStreamer  # takes seconds

        model, tokenizer = self.model.loaded, self.model.tokenizer
        ids = torch.tensor([prompt_ids(tokenizer, question, self.decoding.prompt, self.turns)], device=model.device)
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
        try:
            with own_settings(model, tokenizer, self.decoding):
                options = {"streamer": streamer, "logits_processor": [check_logits]}
                out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        except NotFiniteError as error:
            raise UserError(f"{error}; check {self.model.checkpoint.name}, or give a wider --dtype") from None
        answer = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        self.turns += [("user", question), ("assistant", answer)]
        return answer


def typed() -> Iterator[str]:
    """The lines that the user types, up to the end of the input (Ctrl-D)."""
    with contextlib.suppress(EOFError):
        while True:
            if line := input("> ").strip():
                yield line


def show_beside(names: Sequence[str], answers: Sequence[str]) -> None:
    """Print answers in columns of one width that fill the terminal, wide characters counted as two."""
    table = Table(*(Column(Text(name), ratio=1, overflow="fold") for name in names), expand=True)
    table.add_row(*map(Text, answers))
    Console(highlight=False).print(table)


def main(argv: list[str]) -> None:
    setup_logging()
    parser = Parser((__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="folder, GGUF file, id in $MODELS_ROOT, or hub id")
    parser.add_argument("question", nargs="?", help="what to ask (default: a conversation; Ctrl-D ends it)")
    parser.add_argument("--compare", metavar="OTHER", help="show the answer of this model beside it")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="longest answer (default 256)")
    compute_flags(parser)
    given = parser.parse(argv)
    check_device(given["device"])
    names = [name for name in (given["model"], given["compare"]) if name]
    opened = [Conversation(name, given) for name in names]
    for question in [given["question"]] if given["question"] else typed():
        answers = [conversation.ask(question, stream=len(names) == 1) for conversation in opened]
        if len(names) > 1:
            show_beside(names, answers)


if __name__ == "__main__":
    run_command(main)
