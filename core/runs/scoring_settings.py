"""Settings of what is measured: losses on held-out texts, and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass

from core.data import DATA_SUBSETS, DataSpec
from core.options import AT_LEAST_ONE, option


@dataclass(frozen=True)
class EvaluationSettings:
    """Held-out texts: on which losses are compared."""

    held_out_samples: int = option(64, "e", "at most so many held-out texts", range=AT_LEAST_ONE, changes="")
    general_subset: str | None = option(
        None,
        "1e",
        "general text, whose loss is reported beside the gain: what fusion costs there",
        DATA_SUBSETS,
        changes="",
    )
    general_file: str | None = option(None, "1e", "local general text, in place of general_subset", changes="")
    controls: str = option(
        "usual",
        "e",
        "few: permuted, self and filtered_self, where every control learns its strengths; all: also random_source, for "
        "which a model as large as the source reads the calibration texts (minutes)",
        ("few", "usual", "all"),
        changes="",
    )

    learned_arm: bool = option(
        False,
        "e",
        "where alpha is auto: also measure the fusion with strengths that are learned, without a checkpoint of it",
        changes="",
    )

    def general_spec(self, split_seed: int) -> DataSpec | None:
        """Which general text is read, and how it is divided: the held-out part is scored, and calibration texts may be
        of its calibration part. None for no such text."""
        if self.general_file is None and self.general_subset is None:
            return None
        return DataSpec("file" if self.general_file else str(self.general_subset), self.general_file, split_seed)


@dataclass(frozen=True)
class BenchmarkSettings:
    """Benchmarks: which ones belong to the experiment, and how models are asked."""

    benchmarks: tuple[str, ...] = option(
        (), "", "what evaluation/run_task.py runs: malay_mmlu, yue_mmlu, and names of lm-evaluation-harness"
    )
    limit: int | None = option(
        None, "b", "only the first so many items of every benchmark file (for a trial)", range=AT_LEAST_ONE
    )
    prompt: str = option(
        "chat", "b", "chat: in the model's chat template; plain: for models without one", ("chat", "plain")
    )
    llama_name: str = option(
        "auto",
        "b",
        "whether MalayMMLU asks the model as one whose name contains llama; auto: by the name of the target",
        ("yes", "no", "auto"),
    )
    benchmark_data: str | None = option(
        None, "b", "folder with files of the benchmarks; what it does not have comes from the hub"
    )
