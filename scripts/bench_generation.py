#!/usr/bin/env python
"""Questions per second of batched generation against one question at a time, on Yue-MMLU.

    python scripts/bench_generation.py --model MODEL [--data-dir DIR] [--questions 16] [--max-new-tokens 8]

Both write the same greedy answers (how many are equal is printed); a first batch, not timed, warms up. What padding
costs is in the ratio: questions are of different lengths.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from core.checkpoints import open_checkpoint
from core.runs import run_command
from evaluation.generation import Decoding, answers
from evaluation.scores import Evaluated
from evaluation.yue_mmlu import prompt, question_folder, read_questions


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data-dir", type=Path, help="default: the questions in $YUE_BENCHMARK_ROOT")
    parser.add_argument("--questions", type=int, default=16)
    parser.add_argument("--shots", type=int, default=0)
    parser.add_argument("--max-new-tokens", type=int, default=8)
    parser.add_argument("--tokens-per-batch", type=int, default=4096)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    path = min(question_folder(given.data_dir).glob("*.json"))
    found = read_questions(path)
    prompts = [prompt(path.stem, found, place, given.shots) for place in list(found)[: given.questions]]
    evaluated = Evaluated(open_checkpoint(given.model, device=given.device))
    answers(evaluated, prompts[:2], Decoding(given.max_new_tokens))
    texts, speeds = [], []
    for tokens_per_batch in (1, given.tokens_per_batch):  # 1: every question is longer, a batch of its own
        start = time.perf_counter()
        texts.append(answers(evaluated, prompts, Decoding(given.max_new_tokens, tokens_per_batch=tokens_per_batch)))
        speeds.append(len(prompts) / (time.perf_counter() - start))
    equal = sum(a == b for a, b in zip(*texts, strict=True))
    alone, batched = speeds
    print(f"{len(prompts)} questions, {given.max_new_tokens} new tokens, {given.threads} threads: one at a time "
          f"{alone:.2f}/s, batched {batched:.2f}/s, {batched / alone:.2f} times; {equal} answers equal")  # fmt: skip


if __name__ == "__main__":
    run_command(main)
