"""The benchmarks that are scored by their own rules, not by lm-evaluation-harness. Adding one is a row in `OWN`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation.benchmarks.generation import Decoding
from evaluation.benchmarks.malay_mmlu import data_file, read_questions
from evaluation.benchmarks.malay_scores import score_malay_mmlu
from evaluation.benchmarks.prompts import PromptSettings
from evaluation.benchmarks.yue_mmlu import question_folder
from evaluation.benchmarks.yue_predictions import read_prompts, score_yue_mmlu
from evaluation.runner import Scoring


@dataclass(frozen=True)
class OwnBenchmark:
    """A benchmark with rules of its own.

    Attributes:
        below: the folder below BENCHMARK_DATA that may have its files.
        find: that folder, or None for the benchmark's own repository -> the folder of its files. Raises UserError when
            it finds none.
        read: reads the files of that folder. Raises UserError when they are damaged.
        score: scores a model on them, writes the score file and returns its path.
    """

    below: str
    find: Callable[[Path | None], Path]
    read: Callable[[Path], Any]
    score: Callable[[Scoring, Path, PromptSettings], Path]

    def folder(self, data_dir: Path | None) -> Path:
        """The folder of the benchmark's files, below `data_dir` or in its own repository.

        Raises:
            UserError: the files are in neither.
        """
        local = data_dir / self.below if data_dir is not None else None
        return self.find(local if local is not None and local.is_dir() else None)


def _score_yue_mmlu(scoring: Scoring, folder: Path, prompts: PromptSettings) -> Path:
    decoding = Decoding(tokens_per_batch=scoring.tokens_per_batch, prompt=prompts.policy)
    return score_yue_mmlu(scoring, folder, decoding=decoding)


OWN = {
    "malay_mmlu": OwnBenchmark(
        below="malay_mmlu",
        find=lambda folder: data_file(folder, 0).parent,
        read=lambda folder: read_questions(data_file(folder, 0)),
        score=lambda scoring, folder, prompts: score_malay_mmlu(scoring, folder, prompts=prompts),
    ),
    "yue_mmlu": OwnBenchmark(
        below="yue_benchmark/Yue-MMLU",
        find=question_folder,
        read=lambda folder: read_prompts(folder, None, 0),
        score=_score_yue_mmlu,
    ),
}
