"""One experiment is one YAML file and one frozen dataclass, whose groups hold the settings.

Every key of the file is a flag of the commands that use it.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from core.data import DATA_SUBSETS, MAX_ROWS_READ, DataSpec, epsilon_of
from core.errors import UserError
from core.fusion.settings import FusionSettings
from core.hub import check_repo_id
from core.models.settings import ComputeSettings, ModelSettings
from core.options import AT_LEAST_ONE, NOT_NEGATIVE, POSITIVE, Range, Setting, option, settings_of
from core.training.settings import AdapterSettings, DistillSettings, TrainingSettings

# Plans need so many texts or rows.
MIN_TEXTS = 16
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential", "cpu", "disk")

# Conditions of `option`: whether a setting can change a byte of a stage, with the others as they are. In stage 1 the
# seed draws the rows of token pooling and nothing else; in the other stages it always counts.
CONDITIONS: dict[str, Callable[[Experiment, str], bool]] = {
    "token pooling": lambda e, stage: stage != "1" or e.reading.pooling == "token",
    "hot": lambda e, _: e.training.training_scenario == "hot",
    "distill": lambda e, _: e.training.training_scenario == "distill",
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
    """texts"""

    split_seed: int = option(
        0,
        "13e",
        "seed of the split into calibration, fine-tuning, validation and held-out texts",
        range=NOT_NEGATIVE,
        changes="",
    )
    data_subset: str = option("", "13e", "texts", DATA_SUBSETS, changes="")
    data_file: str | None = option(
        None,
        "13e",
        "local .jsonl, .json, .csv, .parquet or .txt, a folder of such files, or one that datasets' save_to_disk wrote",
        changes="",
    )
    max_rows_read: int = option(
        MAX_ROWS_READ,
        "13e",
        "at most so many rows of the data set are read, in a seeded order, and divided into calibration, fine-tuning, "
        "validation and held-out parts",
        range=AT_LEAST_ONE,
        changes="",
        alias="max_samples",
    )
    group_column: str | None = option(
        None,
        "13e",
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
    """reading activations"""

    calibration_samples: int = option(
        2000,
        "1",
        "at most so many texts are read by both models",
        range=Range(MIN_TEXTS, f"plans need at least {MIN_TEXTS} texts"),
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
        "memory for one model's rows in each process; beyond it they are "
        "kept in a temporary file of the plan directory",
        range=Range(0, "expected 0 (all on disk) or more"),
        changes="",
    )
    device_map: str | None = option(
        None, "1", "spread each model over devices and disk while it reads; default all of it on --device", DEVICE_MAPS
    )


@dataclass(frozen=True)
class TransportSettings:
    """transport plans"""

    epsilon: float | None = option(
        None, "1", "entropic regularisation of Q; default 0.1, and 0.03 for gsm8k", range=POSITIVE
    )
    eta: float = option(0.1, "1", "entropic regularisation of P", range=POSITIVE)
    sinkhorn_iters: int = option(1000, "1", "upper bound on Sinkhorn iterations", range=AT_LEAST_ONE)
    sinkhorn_tol: float = option(1e-6, "1", "bound on the larger L1 marginal error of Q", range=POSITIVE)
    sinkhorn_mode: str = option(
        "auto", "1", "auto, or paper: exactly --sinkhorn-iters plain iterations (it used 200)", ("auto", "paper")
    )
    pairs_budget_mb: int = option(
        8192,
        "1",
        "memory for the source's rows of one side; beyond it they are read again for every target layer",
        range=AT_LEAST_ONE,
        changes="",
    )
    layer_cost_scale: str = option(
        "median", "1", "scale of the layer cost: median, or none (the paper's letter)", ("median", "none")
    )


@dataclass(frozen=True)
class OutputSettings:
    """checkpoints"""

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
class EvaluationSettings:
    """evaluation"""

    held_out_samples: int = option(64, "e", "at most so many held-out texts", range=AT_LEAST_ONE, changes="")
    general_file: str | None = option(
        None, "e", "local general text; what fusion costs there is reported beside the gain", changes=""
    )
    benchmarks: tuple[str, ...] = option(
        (), "", "what evaluation/run_task.py runs: malay_mmlu, yue_mmlu, and names of lm-evaluation-harness"
    )


@dataclass(frozen=True)
class Experiment:
    """All settings of one run, in groups. In files and flags the names of the settings stand alone, without a group."""

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

    @classmethod
    def of(cls, **values: Any) -> Experiment:
        """The defaults with some settings changed, by their names alone: `Experiment.of(alpha=0.3, seed=1)`."""
        return cls().changed(**values)

    def changed(self, **values: Any) -> Experiment:
        """This experiment with some settings changed, by their names alone."""
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
        """Folder of this experiment's outputs."""
        return results_root() / self.name

    @property
    def epsilon(self) -> float:
        """Regularisation of Q: the one given, or the paper's for the data."""
        given = self.transport.epsilon
        return epsilon_of(self.data.data_subset) if given is None else given

    def deciding(self, stage: str) -> dict[str, Any]:
        """The settings that change the bytes of a stage's output, for its fingerprint: None where the others make it
        change nothing, and of a device its kind (which of two equal GPUs makes no difference)."""
        found = {}
        for name, setting in all_settings().items():
            if stage in setting.changes:
                idle = setting.only_with and not CONDITIONS[setting.only_with](self, stage)
                found[name] = None if idle else self.value(setting)
        return {**found, "device": self.compute.device.partition(":")[0]}

    def check(self) -> None:
        """Raise UserError for a value out of range, for settings that exclude each other, or a device not here."""
        for setting in all_settings().values():
            setting.check(self.value(setting))
        for group in (self.fusion, self.training, self.output):
            group.check()
        if self.training.freeze_strategy == "frozen_base" and self.adapters.use_lora:
            raise UserError("LoRA adapts the base, which frozen_base freezes; leave out one of the two")
        check_device(self.compute.device)


@cache
def all_settings() -> dict[str, Setting]:
    """Every setting by its name, in the order of the groups."""
    found = settings_of(Experiment, "")
    for group in dataclasses.fields(Experiment):
        if not group.metadata:
            found += settings_of(group.default_factory, group.name)  # type: ignore[arg-type]  # the group's class
    return {setting.name: setting for setting in found}


def of_one_scenario() -> set[str]:
    """The settings that only one scenario of stage 3 has: two trainings of different scenarios may differ in them."""
    return {name for name, setting in all_settings().items() if setting.only_with in ("hot", "distill")}


def check_device(name: str) -> None:
    """Raise UserError for a device that this machine does not have."""
    try:
        device = torch.device(name)
        present = 1 if device.type == "cpu" else torch.get_device_module(device).device_count()
        usable = (device.index or 0) < present
    except RuntimeError:
        usable = False
    if not usable:
        raise UserError(f"device {name!r} is not available here; use cpu, or cuda on a machine with a GPU")
