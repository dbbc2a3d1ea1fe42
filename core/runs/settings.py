"""One experiment = one YAML = one frozen dataclass. Every key is a flag of the commands that use it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.data import DATA_SUBSETS, MAX_SAMPLES, DataSpec
from core.fusion.residual import RESIDUAL_FORMS
from core.fusion.transport_weights import FEATURE_MAPS, FusionSettings
from core.models.checkpoints import Checkpoint, open_checkpoint
from core.models.families import SEED_MODEL_TYPES
from core.runs.process import UserError
from core.runs.settings_check import check_settings
from core.training.hot_linear import FREEZE_STRATEGIES

DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential", "cpu", "disk")


def results_root() -> Path:
    """Where runs are written: $TRANSPORT_RESULTS_ROOT, by default `runs/` in the working folder."""
    return Path(os.environ.get("TRANSPORT_RESULTS_ROOT") or "runs")


# Conditions of `option`: whether a setting can change a byte of a stage, with the others as they are. In stage 1 the
# seed draws the rows of token pooling and nothing else; in the other stages it always counts.
CONDITIONS: dict[str, Callable[[Experiment, str], bool]] = {
    "token pooling": lambda e, stage: stage != "1" or e.pooling == "token",
    "hot": lambda e, _: e.training_scenario == "hot",
    "distill": lambda e, _: e.training_scenario == "distill",
    "LoRA": lambda e, _: e.use_lora,
    "early stop": lambda e, _: e.early_stop is not None,
    "no early stop": lambda e, _: e.early_stop is None,
    "no search of rates": lambda e, _: not e.lr_search,
}


def option(
    default: Any,
    stages: str,
    help: str,
    choices: Sequence[str] | None = None,
    changes: str | None = None,
    only_with: str | None = None,
) -> Any:
    """A dataclass field that is also a flag of the commands in `stages` (1, 2, 3; e for evaluation).

    Args:
        changes: those of `stages` whose output has other bytes when the value is another one; there the value is part
            of the fingerprint. The default is all of them. It is narrower for a setting that names an input (a model,
            rows), whose contents are in the fingerprint instead, and for one that only decides where or how fast
            something is done.
        only_with: the one of CONDITIONS without which the value changes nothing; None: it always counts.
    """
    changes = stages if changes is None else changes
    return field(
        default=default,
        metadata={"stages": stages, "help": help, "choices": choices, "changes": changes, "only_with": only_with},
    )


@dataclass(frozen=True)
class Experiment:
    """All settings of one run. Keys of the YAML and flags of the commands are these fields."""

    name: str = option("experiment", "", "name of the run; outputs go to runs/<name>/")
    target_model: str = option(
        "", "12e", "small model that is improved: folder, id in $MODELS_ROOT, or hub id", changes=""
    )
    source_model: str = option(
        "", "123e", "model that gives knowledge: folder, id in $MODELS_ROOT, or hub id", changes=""
    )
    target_revision: str | None = option(None, "12e", "hub revision of the target", changes="")
    source_revision: str | None = option(None, "123e", "hub revision of the source", changes="")
    trust_remote_code: bool = option(False, "13e", "allow code that comes with a model", changes="")
    device: str = option("cpu", "123e", "torch device, e.g. cpu or cuda:0")
    dtype: str = option(
        "auto",
        "13e",
        "compute dtype; auto: float32 on a CPU, else the model's own",
        ("auto", "float32", "bfloat16", "float16"),
    )
    seed: int = option(
        0, "13e", "seed of the row sample, of training and of the permuted control", only_with="token pooling"
    )
    split_seed: int = option(0, "13e", "seed of the split into calibration, fine-tuning and held-out texts", changes="")

    data_subset: str = option("", "13e", "texts", tuple(DATA_SUBSETS), changes="")
    data_file: str | None = option(
        None,
        "13e",
        "local .jsonl, .json, .csv, .parquet or .txt, a folder of such files, or one that datasets' save_to_disk wrote",
        changes="",
    )
    max_samples: int = option(
        MAX_SAMPLES,
        "13e",
        "at most so many rows of the data set are read, in a seeded order, and divided into calibration, fine-tuning, "
        "validation and held-out parts",
        changes="",
    )
    group_column: str | None = option(
        None,
        "13e",
        "column that says what a row belongs to, e.g. its document: no group is in two parts; default the column "
        "group, and where there is none, what texts share",
        changes="",
    )
    calibration_samples: int = option(2000, "1", "at most so many texts are read by both models", changes="")
    max_tokens: int = option(512, "1e", "calibration and held-out texts are cut at so many tokens")
    pooling: str = option(
        "text", "1", "text: one mean per text (the paper); token: one row per aligned position", ("text", "token")
    )
    max_rows: int = option(4096, "1", "at most so many rows with token pooling", only_with="token pooling")
    tokens_per_batch: int = option(4096, "13e", "tokens per forward pass, padding included; a longer text goes alone")
    activations_budget_mb: int = option(
        16384,
        "1",
        "memory for one model's rows in each process; beyond it they are "
        "kept in a temporary file of the plan directory",
        changes="",
    )
    device_map: str | None = option(
        None, "1", "spread each model over devices and disk while it reads; default all of it on --device", DEVICE_MAPS
    )

    epsilon: float | None = option(None, "1", "entropic regularisation of Q; default 0.1, and 0.03 for gsm8k")
    eta: float = option(0.1, "1", "entropic regularisation of P")
    sinkhorn_iters: int = option(1000, "1", "upper bound on Sinkhorn iterations")
    sinkhorn_tol: float = option(1e-6, "1", "bound on the larger L1 marginal error of Q")
    sinkhorn_mode: str = option(
        "auto", "1", "auto, or paper: exactly --sinkhorn-iters plain iterations (it used 200)", ("auto", "paper")
    )
    pairs_budget_mb: int = option(
        8192,
        "1",
        "memory for the source's rows of one side; beyond it they are read again for every target layer",
        changes="",
    )
    layer_cost_scale: str = option(
        "median", "1", "scale of the layer cost: median, or none (the paper's letter)", ("median", "none")
    )

    feature_map: str = option("coupling", "2", "how plans become linear maps (README: four feature maps)", FEATURE_MAPS)
    residual_form: str = option("interpolate", "2", "(1-a) W + a W~, or W + a W~ (additive)", RESIDUAL_FORMS)
    alpha: float = option(0.1, "2", "fusion strength, 0 to 1")
    top_k: int = option(128, "2", "strongest neurons fused per layer and projection; 0: all")
    p_topk: int | None = option(
        None,
        "2",
        "source layers per target layer; default 1 for regression, else all with at least 1e-4 of the row of P",
    )
    q_topk: int | None = option(None, "2", "entries kept per row of Q (not for regression); default all")
    ridge: float = option(0.01, "2", "lambda of the regression maps, relative to the mean diagonal")

    push_to_hub: str | None = option(
        None,
        "23",
        "upload the finished checkpoint to this hub repository (made private when new); stage 3 appends -adapted, or "
        "-no-hot for no_hot",
        changes="",
    )
    max_shard_size: str = option("5GB", "23", "largest file of weights, e.g. 5GB or 500MB; one is in memory at a time")

    model_type: str | None = option(
        None, "3", "family of --model_dir; detected when left out", tuple(SEED_MODEL_TYPES), changes=""
    )
    training_scenario: str = option(
        "hot",
        "3",
        "hot: train from the fused start with its residual; no_hot: the same "
        "from the unfused target; distill: no_hot with the source as teacher",
        ("hot", "no_hot", "distill"),
    )
    freeze_strategy: str = option(
        "frozen_hot",
        "3",
        "with hot: frozen_hot (= frozen_transport) fixes the residual; frozen_base: only it trains; none: both train",
        FREEZE_STRATEGIES,
        only_with="hot",
    )
    train_alpha: float | None = option(
        None, "3", "with hot: residual strength while training; default the fused one", only_with="hot"
    )
    sft_samples: int = option(2000, "3", "at most so many fine-tuning rows", changes="")
    block_size: int = option(2048, "3", "fine-tuning rows are cut at so many tokens; with --packing, tokens per pack")
    packing: bool = option(False, "3", "put several whole rows into one sequence; none attends to another")
    epochs: float = option(1.0, "3", "passes over the fine-tuning rows")
    train_batch_size: int = option(1, "3", "rows (with --packing, packs) per device and step")
    gradient_accumulation: int = option(8, "3", "steps per optimizer update")
    gradient_checkpointing: bool = option(False, "3", "compute activations again in the backward pass: less memory")
    learning_rate: float = option(1e-6, "3", "peak learning rate", only_with="no search of rates")
    lr_scheduler: str = option(
        "linear", "3", "how the learning rate ends", ("linear", "cosine", "constant", "constant_with_warmup")
    )
    warmup: float = option(0.0, "3", "updates in which the learning rate rises; below 1, share of all updates")
    weight_decay: float = option(0.0, "3", "of AdamW")
    max_grad_norm: float = option(1.0, "3", "gradients are clipped at this norm; 0: not at all")
    save_steps: int = option(
        200, "3", "optimizer updates between training checkpoints (resume points)", only_with="early stop"
    )
    validation_samples: int = option(
        32,
        "3",
        "at most so many validation rows (of groups that nothing else reads); "
        "their loss is recorded before, during and after; 0: none",
    )
    eval_steps: int | None = option(
        None, "3", "updates between validations; default once per epoch", only_with="no early stop"
    )
    early_stop: int | None = option(
        None,
        "3",
        "stop when the validation loss has not fallen in so many validations, "
        "one at each --save-steps, and take the best; default never",
    )
    alpha_search: tuple[float, ...] = option(
        (),
        "3",
        "with hot: train with each of these alphas, e.g. 0.03,0.1, and keep the best on the validation rows",
        only_with="hot",
    )
    lr_search: tuple[float, ...] = option((), "3", "the same for learning rates; both: every combination")
    report_to: str = option("none", "3", "logging service of the Trainer, e.g. tensorboard or wandb", changes="")
    save_untrained_folded: bool = option(
        False, "3", "also write <output_dir>-untrained: what training starts from, folded", changes=""
    )

    use_lora: bool = option(False, "3", "train LoRA adapters (merged at the end) instead of the base weights")
    lora_rank: int = option(8, "3", "rank of the adapters", only_with="LoRA")
    lora_alpha: float = option(16.0, "3", "adapters are scaled by lora_alpha / lora_rank", only_with="LoRA")
    lora_dropout: float = option(0.0, "3", "dropout before the adapters", only_with="LoRA")
    lora_targets: str = option(
        "q_proj,k_proj,v_proj,o_proj", "3", "layers that get adapters, or all-linear", only_with="LoRA"
    )

    distill_weight: float = option(
        0.5,
        "3",
        "share of the teacher's divergence in the loss of distill, where both models have the same vocabulary",
        only_with="distill",
    )
    distill_temperature: float = option(1.0, "3", "softens both distributions in that divergence", only_with="distill")

    held_out_samples: int = option(64, "e", "at most so many held-out texts", changes="")
    general_file: str | None = option(
        None,
        "e",
        "local general text; what fusion costs there is reported beside the gain",
        changes="",
    )
    benchmarks: tuple[str, ...] = option(
        (), "", "what evaluation/run_task.py runs: malay_mmlu, yue_mmlu, and names of lm-evaluation-harness"
    )

    @property
    def run_dir(self) -> Path:
        """Folder of this experiment's outputs."""
        return results_root() / self.name

    @property
    def data_spec(self) -> DataSpec:
        """Which rows are read and how they are divided."""
        return DataSpec(self.data_subset, self.data_file, self.split_seed, self.max_samples, self.group_column)

    @property
    def regularisation(self) -> float:
        """epsilon, or the paper's for the data."""
        return self.epsilon if self.epsilon is not None else (0.03 if self.data_subset == "gsm8k" else 0.1)

    @property
    def max_shard_bytes(self) -> int:
        """`max_shard_size` as a number. Raises UserError when it is none."""
        from accelerate.utils import convert_file_size_to_int

        try:
            return convert_file_size_to_int(self.max_shard_size.upper().replace("IB", "iB"))
        except ValueError:
            raise UserError(f"max_shard_size is {self.max_shard_size!r}; expected a size like 5GB or 500MB") from None

    def deciding(self, stage: str) -> dict[str, Any]:
        """The settings that change the bytes of a stage's output, for its fingerprint: None where the others make it
        change nothing, and of a device its kind (which of two equal GPUs makes no difference)."""
        found = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if stage in f.metadata["changes"]}
        for f in dataclasses.fields(self):
            condition = f.metadata["only_with"]
            if f.name in found and condition and not CONDITIONS[condition](self, stage):
                found[f.name] = None
        return {**found, "device": self.device.partition(":")[0]}

    def fusion_settings(self) -> FusionSettings:
        """The part that stage 2 needs."""
        return FusionSettings(**{f.name: getattr(self, f.name) for f in dataclasses.fields(FusionSettings)})

    def check(self) -> None:
        """Raise UserError for a value out of range, or for settings that exclude each other."""
        check_settings(self)


def of_one_scenario() -> set[str]:
    """The settings that only one scenario of stage 3 has: two trainings of different scenarios may differ in them."""
    return {f.name for f in dataclasses.fields(Experiment) if f.metadata["only_with"] in ("hot", "distill")}


def open_pair(experiment: Experiment) -> tuple[Checkpoint, Checkpoint]:
    """The experiment's (target, source), opened on its device. Raises UserError as `open_checkpoint`."""
    code, device = experiment.trust_remote_code, experiment.device
    return (
        open_checkpoint(experiment.target_model, experiment.target_revision, code, device),
        open_checkpoint(experiment.source_model, experiment.source_revision, code, device),
    )
