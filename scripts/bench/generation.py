#!/usr/bin/env python
"""Questions per second of our batches against one question at a time by `generate`, on Yue-MMLU.

    python scripts/bench/generation.py --model MODEL [--data-dir DIR] [--questions 32] [--shots 0]

Both give the same greedy answers; how many are equal is printed. A first batch warms up and is not timed. Questions
have different lengths, so the ratio contains what padding costs.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from core.models.checkpoints import open_checkpoint
from core.runs.process import run_command
from evaluation.benchmarks.generation import Decoding, answers, continuations, own_settings, prompt_ids
from evaluation.benchmarks.prompts import CHAT
from evaluation.benchmarks.yue_mmlu import prompt, question_folder, read_questions
from evaluation.evaluated_model import EvaluatedModel


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data-dir", type=Path, help="default: the questions in $YUE_BENCHMARK_ROOT")
    parser.add_argument("--questions", type=int, default=32)
    parser.add_argument("--shots", type=int, default=0)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--tokens-per-batch", type=int, default=4096)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    path = min(question_folder(given.data_dir).glob("*.json"))
    found = read_questions(path)
    prompts = [prompt(path.stem, found, number, given.shots) for number in list(found)[: given.questions]]
    evaluated = EvaluatedModel(open_checkpoint(given.model, device=given.device))
    answers(evaluated, prompts[:2], Decoding(given.max_new_tokens))
    decoding = Decoding(given.max_new_tokens, tokens_per_batch=given.tokens_per_batch)
    start = time.perf_counter()
    alone = one_by_one(evaluated, prompts, decoding)
    between = time.perf_counter()
    batched = answers(evaluated, prompts, decoding)
    seconds = between - start, time.perf_counter() - between
    equal = sum(a == b for a, b in zip(alone, batched, strict=True))
    slow, fast = (len(prompts) / spent for spent in seconds)
    print(
        f"{len(prompts)} questions, {given.max_new_tokens} new tokens, {given.threads} threads: one at a time "
        f"{slow:.2f}/s, batched {fast:.2f}/s, {fast / slow:.2f} times; {equal} answers equal"
    )


def one_by_one(evaluated: EvaluatedModel, prompts: list[str], decoding: Decoding) -> list[str]:
    """The answers of `answers`, where every question is read on its own from its first token on."""
    tokenizer = evaluated.tokenizer
    ids = [prompt_ids(tokenizer, prompt, CHAT) for prompt in prompts]
    with own_settings(evaluated.loaded, tokenizer, decoding):
        new = [continuations(evaluated.loaded, [one])[0] for one in ids]
    return tokenizer.batch_decode(new, skip_special_tokens=True)


if __name__ == "__main__":
    run_command(main)
