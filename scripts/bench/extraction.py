#!/usr/bin/env python
"""Speed of recording activations against the bare forward pass of the backbone on the same batches, and padding.

    python scripts/bench/extraction.py --config scripts/experiments/demo.yaml [--batches 4] [--repeats 5] [--threads 2]

For each model of the pair it prints the share of padding in all batches, the real tokens per second of both (from the
median time of each batch), and the overhead of the hooks (median and quartiles of the ratios). The two take turns on
every batch, so that other work on the machine slows both down alike.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from core.batching import pad_with_mask
from core.data import load_rows
from core.models.activations import extract
from core.models.checkpoints import Checkpoint, open_pair
from core.models.reading import Reading, text_batches
from core.runs.command_line import load_experiment
from core.runs.settings import Experiment
from run_activs_and_hot import read_both


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("scripts/experiments/demo.yaml"))
    parser.add_argument("--batches", type=int, default=4, help="number of batches, spread over all")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    experiment = Experiment.of(**load_experiment(arguments.config))
    experiment.check()
    target, source = open_pair(experiment.models, experiment.compute.device)
    rows = load_rows(experiment.data.spec, "calibration", experiment.reading.calibration_samples)
    read = read_both(target, source, rows, experiment)
    readings = {"target": read.target, "source": read.source}
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads; pooling {experiment.reading.pooling}, "
        f"{experiment.compute.tokens_per_batch} tokens per batch"
    )
    print("model      texts  batches  padding  bare tokens/s  with hooks  overhead (quartiles)")
    for name, checkpoint in (("target", target), ("source", source)):
        batches = text_batches(readings[name], experiment.compute.tokens_per_batch)
        chosen = batches[:: max(1, len(batches) // arguments.batches)]
        bare, hooked = measure(checkpoint, readings[name], chosen, arguments.repeats, experiment)
        tokens = sum(len(readings[name].ids[n]) for batch in chosen for n in batch)
        speeds = [tokens / sum(map(statistics.median, spent)) for spent in (bare, hooked)]
        ratios = [b / a for first, second in zip(bare, hooked, strict=True) for a, b in zip(first, second, strict=True)]
        low, middle, high = (100 * (q - 1) for q in statistics.quantiles(ratios, n=4))
        print(
            f"{name:8}{len(readings[name].ids):8}{len(batches):9}{100 * padding(readings[name], batches):7.1f} %"
            f"{speeds[0]:15.0f}{speeds[1]:12.0f}{middle:7.1f} % ({low:.1f} to {high:.1f})"
        )


def padding(reading: Reading, batches: list[list[int]]) -> float:
    """Share of padding in the tokens of all batches."""
    lengths = [[len(reading.ids[n]) for n in batch] for batch in batches]
    return 1 - sum(map(sum, lengths)) / sum(len(batch) * max(batch) for batch in lengths)


def measure(
    checkpoint: Checkpoint, reading: Reading, batches: list[list[int]], repeats: int, experiment: Experiment
) -> tuple[list[list[float]], list[list[float]]]:
    """Seconds of (the bare pass, that with hooks), each [batches][repeats]. Which of the two goes first alternates."""
    model = checkpoint.load_model(experiment.compute.dtype)
    backbone: Any = checkpoint.layout.decoder(model)

    @torch.no_grad()
    def bare(batch: list[int]) -> None:
        ids, mask = pad_with_mask([reading.ids[n] for n in batch], model.device)
        backbone(input_ids=ids, attention_mask=mask, use_cache=False)

    def hooked(batch: list[int]) -> None:
        extract(model, checkpoint.layout, reading, [batch], "with hooks")

    spent: dict[Callable[[list[int]], None], list[list[float]]] = {bare: [], hooked: []}
    for batch in batches:
        bare(batch)
        for seconds in spent.values():
            seconds.append([])
        for repeat in range(repeats):
            for work in list(spent)[:: 1 if repeat % 2 else -1]:
                start = time.perf_counter()
                work(batch)
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                spent[work][-1].append(time.perf_counter() - start)
    return spent[bare], spent[hooked]


if __name__ == "__main__":
    main()
