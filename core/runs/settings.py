"""All settings of one run: a YAML file on disk, one frozen dataclass in memory, whose groups hold the settings.

Every key of the file is also a flag of the commands that use it. A new setting is one `option` in a group.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from core.data import DATA_SUBSETS, MAX_ROWS_READ, DataSpec, epsilon_of
from core.errors import UserError
from core.fusion.settings import FusionSettings
from core.hub import check_repo_id
from core.models.settings import ComputeSettings, ModelSettings, check_device
from core.options import AT_LEAST_ONE, NOT_NEGATIVE, SHARE, Range, Setting, option, settings_of
from core.runs.scoring_settings import BenchmarkSettings, EvaluationSettings
from core.training.settings import AdapterSettings, DistillSettings, TrainingSettings
from core.transport.settings import TransportSettings

# The correlations of stage 1 mean nothing on fewer texts or rows than these.
MIN_TEXTS = 16
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential", "cpu", "disk")

# The conditions that `option(only_with=...)` may name: whether a setting can change a byte of a stage's output while
# the other settings are as they are. In stage 1 the seed draws the rows of token pooling and nothing else. Stage 2 runs
# no model and draws nothing, unless it finds strengths.
CONDITIONS: dict[str, Callable[[Experiment, str], bool]] = {
    "token pooling": lambda e, stage: stage != "1" or e.reading.pooling == "token",
    "a model that runs": lambda e, stage: stage != "2" or e.fusion.finds_alpha,
    "something drawn": lambda e, stage: (
        e.reading.pooling == "token" if stage == "1" else stage != "2" or e.fusion.alpha == "learned"
    ),
    "hot": lambda e, _: e.training.training_scenario == "hot",
    "distill": lambda e, _: e.training.training_scenario == "distill",
    "learned strengths": lambda e, _: e.fusion.alpha == "learned",
    "distill by tokens": lambda e, _: e.training.training_scenario == "distill" and e.distill.distill_by == "tokens",
    "LoRA": lambda e, _: e.adapters.use_lora,
    "early stop": lambda e, _: e.training.early_stop is not None,
    "no early stop": lambda e, _: e.training.early_stop is None,
    "no search of rates": lambda e, _: not e.training.lr_search,
}


def results_root() -> Path:
    """Where runs are written: $TRANSPORT_RESULTS_ROOT, by default `runs/` in the working folder."""
    return Path(os.environ.get("TRANSPORT_RESULTS_ROOT") or "runs")


@dataclass(frozen=True)
class DataSettings:
    """Texts: which rows are read, and how they are divided."""

    split_seed: int = option(
        0,
        "123e",
        "seed of the split into calibration, fine-tuning, validation and held-out texts",
        range=NOT_NEGATIVE,
        changes="",
    )
    data_subset: str = option("", "123e", "texts", DATA_SUBSETS, changes="")
    data_file: str | None = option(
        None,
        "123e",
        "local .jsonl, .json, .csv, .parquet or .txt, a folder of such files, or one that datasets' save_to_disk wrote",
        changes="",
    )
    max_rows_read: int = option(
        MAX_ROWS_READ,
        "123e",
        "at most so many rows of the data set are read, in a seeded order, and divided into calibration, fine-tuning, "
        "validation and held-out parts",
        range=AT_LEAST_ONE,
        changes="",
        alias="max_samples",
    )
    group_column: str | None = option(
        None,
        "123e",
        "column that says what a row belongs to, e.g. its document: no group is in two parts; default the column "
        "group, and where there is none, what texts share",
        changes="",
    )

    @property
    def spec(self) -> DataSpec:
        """Which rows are read and how they are divided."""
        return DataSpec(self.data_subset, self.data_file, self.split_seed, self.max_rows_read, self.group_column)


@dataclass(frozen=True)
class ReadingSettings:
    """Activations: what both models read, and where its rows are kept."""

    calibration_samples: int = option(
        2000,
        "1",
        "at most so many texts are read by both models (in scripts/run_train_final.sh: --max-samples)",
        range=Range(MIN_TEXTS, f"plans need at least {MIN_TEXTS} texts"),
        changes="",
    )
    general_share: float = option(
        0.0,
        "1",
        "share of the calibration texts that is general text (--general-subset or --general-file), so that fusion may "
        "cost less there",
        range=SHARE,
        changes="",
    )
    max_tokens: int = option(512, "1e", "calibration and held-out texts are cut at so many tokens", range=AT_LEAST_ONE)
    pooling: str = option(
        "text", "1", "text: one mean per text (the paper); token: one row per aligned position", ("text", "token")
    )
    max_rows: int = option(
        4096,
        "1",
        "at most so many rows with token pooling",
        range=Range(MIN_TEXTS, f"plans need at least {MIN_TEXTS} rows"),
        only_with="token pooling",
    )
    activations_budget_mb: int = option(
        16384,
        "1",
        "memory for one model's rows in each process; where they need more, they are kept in a temporary file of the "
        "plan directory",
        range=Range(0, "expected 0 (all on disk) or more"),
        changes="",
    )
    device_map: str | None = option(
        None, "1", "spread each model over devices and disk while it reads; default all of it on --device", DEVICE_MAPS
    )


@dataclass(frozen=True)
class OutputSettings:
    """Checkpoints: how weights are written, and where they are uploaded."""

    push_to_hub: str | None = option(
        None,
        "23",
        "upload the finished checkpoint to this hub repository (made private when new); stage 3 appends -adapted, or "
        "-no-hot for no_hot",
        changes="",
    )
    max_shard_size: str = option("5GB", "23", "largest file of weights, e.g. 5GB or 500MB; one is in memory at a time")

    @property
    def max_shard_bytes(self) -> int:
        """`max_shard_size` as a number. Raises UserError when it is none."""
        from accelerate.utils import convert_file_size_to_int  # which imports torch.distributed

        try:
            return convert_file_size_to_int(self.max_shard_size.upper().replace("IB", "iB"))
        except ValueError:
            raise self._refused from None

    @property
    def _refused(self) -> UserError:
        return UserError(f"max_shard_size is {self.max_shard_size!r}; expected a size like 5GB or 500MB")

    def check(self) -> None:
        """Raise UserError for a repository id or a size that is none."""
        check_repo_id(self.push_to_hub)
        if self.max_shard_bytes < 1:
            raise self._refused


@dataclass(frozen=True)
class SharedFolders:
    """Shared folders: what a run takes from another run of the same pair instead of making it again."""

    task: str = option("", "", "the experiment that a run belongs to; default the name of the run")
    plans_from: str = option("", "", "the run whose plan directory is used; default its own")
    base_from: str = option("", "", "the run that keeps the benchmark scores of the unfused target; default its own")


@dataclass(frozen=True)
class Experiment:
    """All settings of one run, in groups. In files and flags a setting is named without its group."""

    name: str = option("experiment", "", "name of the run; outputs go to runs/<name>/")
    models: ModelSettings = field(default_factory=ModelSettings)
    compute: ComputeSettings = field(default_factory=ComputeSettings)
    data: DataSettings = field(default_factory=DataSettings)
    reading: ReadingSettings = field(default_factory=ReadingSettings)
    transport: TransportSettings = field(default_factory=TransportSettings)
    fusion: FusionSettings = field(default_factory=FusionSettings)
    output: OutputSettings = field(default_factory=OutputSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    adapters: AdapterSettings = field(default_factory=AdapterSettings)
    distill: DistillSettings = field(default_factory=DistillSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    scoring: BenchmarkSettings = field(default_factory=BenchmarkSettings)
    shared: SharedFolders = field(default_factory=SharedFolders)

    @classmethod
    def of(cls, **values: Any) -> Experiment:
        """The defaults with some settings changed, each by its own name: `Experiment.of(alpha=0.3, seed=1)`."""
        return cls().changed(**values)

    def changed(self, **values: Any) -> Experiment:
        """A copy of this experiment with some settings changed, each by its own name."""
        declared = all_settings()
        groups: dict[str, dict[str, Any]] = {}
        for name, value in values.items():
            groups.setdefault(declared[name].group, {})[name] = value
        own = groups.pop("", {})
        return dataclasses.replace(
            self, **own, **{group: dataclasses.replace(getattr(self, group), **new) for group, new in groups.items()}
        )

    def value(self, setting: Setting) -> Any:
        """The value of one setting."""
        return getattr(getattr(self, setting.group) if setting.group else self, setting.name)

    @property
    def run_dir(self) -> Path:
        """The folder of this run's outputs."""
        return results_root() / self.name

    def folder(self, part: str) -> Path:
        """Where a part of this run is, such as `fused`. Its `plans` may be those of another run."""
        run = self.shared.plans_from if part == "plans" else ""
        return results_root() / (run or self.name) / part

    @property
    def epsilon(self) -> float:
        """The regularisation of Q: the one that was given, else the paper's for the data set."""
        given = self.transport.epsilon
        return epsilon_of(self.data.data_subset) if given is None else given

    def deciding(self, stage: str) -> dict[str, Any]:
        """The settings that change the bytes of a stage's output, for its fingerprint.

        A setting that changes nothing while the others are as they are is None, so that no finished folder is emptied
        for it. Of a device only the kind is recorded, because it makes no difference which of two equal GPUs computes.
        """
        found = {}
        for name, setting in all_settings().items():
            if stage in setting.changes:
                matters = setting.only_with is None or CONDITIONS[setting.only_with](self, stage)
                found[name] = self.value(setting) if matters else None
        return {**found, "device": self.compute.device.partition(":")[0]}

    def check(self) -> None:
        """Raise UserError for a value out of range, settings that exclude each other, or a device that is absent."""
        for setting in all_settings().values():
            setting.check(self.value(setting))
        for group in (self.fusion, self.training, self.output):
            group.check()
        if self.models.source_base is not None:
            self.fusion.check_task_vector()
        if self.training.freeze_strategy == "frozen_base" and self.adapters.use_lora:
            raise UserError("LoRA adapts the base, which frozen_base freezes; leave out one of the two")
        check_device(self.compute.device)


@cache
def all_settings() -> dict[str, Setting]:
    """Every setting by its name, in the order of the groups."""
    found = settings_of(Experiment, "")
    for group in dataclasses.fields(Experiment):
        if not group.metadata:  # the field of a group, whose default factory is the class of the group
            found += settings_of(group.default_factory, group.name)  # type: ignore[arg-type]
    return {setting.name: setting for setting in found}


def of_one_scenario() -> set[str]:
    """The settings that only one scenario of stage 3 reads, in which trainings of different scenarios may differ."""
    of_one = ("hot", "distill", "distill by tokens")
    return {name for name, setting in all_settings().items() if setting.only_with in of_one}
