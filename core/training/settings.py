"""Settings of fine-tuning (stage 3): what is trained, how, and how the best of several trainings is chosen."""

from __future__ import annotations

from dataclasses import dataclass

from core.errors import UserError
from core.models.families import SEED_MODEL_TYPES
from core.options import AT_LEAST_ONE, NOT_NEGATIVE, POSITIVE, SHARE, option

SCENARIOS = ("hot", "no_hot", "distill")
FREEZE_STRATEGIES = ("frozen_hot", "frozen_transport", "frozen_base", "none")
DISTILL_BY = ("tokens", "answers")
SCHEDULERS = ("linear", "cosine", "constant", "constant_with_warmup")


@dataclass(frozen=True)
class TrainingSettings:
    """Training: what is trained, and how."""

    model_type: str | None = option(
        None, "3", "family of --model_dir; detected when left out", tuple(SEED_MODEL_TYPES), changes=""
    )
    training_scenario: str = option(
        "hot",
        "3",
        "hot: train from the fused start with its residual; no_hot: the same from the unfused target; distill: no_hot "
        "with the source as teacher",
        SCENARIOS,
    )
    freeze_strategy: str = option(
        "frozen_hot",
        "3",
        "with hot: frozen_hot (= frozen_transport): the base trains and the residual is fixed; frozen_base: only the "
        "residual trains; none: both train",
        FREEZE_STRATEGIES,
        only_with="hot",
    )
    train_alpha: float | None = option(
        None,
        "3",
        "with hot: the residual's strength while training; default that of the fusion",
        range=SHARE,
        only_with="hot",
    )
    sft_samples: int = option(2000, "3", "at most so many fine-tuning rows", range=AT_LEAST_ONE, changes="")
    block_size: int = option(
        2048,
        "3",
        "fine-tuning rows are cut at so many tokens; with --packing also the most tokens of a pack",
        range=AT_LEAST_ONE,
    )
    packing: bool = option(False, "3", "put several whole rows into one sequence, in which no row attends to another")
    epochs: float = option(1.0, "3", "passes over the fine-tuning rows", range=POSITIVE)
    train_batch_size: int = option(1, "3", "rows (with --packing, packs) per device and step", range=AT_LEAST_ONE)
    gradient_accumulation: int = option(8, "3", "steps per optimizer update", range=AT_LEAST_ONE)
    gradient_checkpointing: bool = option(
        False, "3", "compute activations again in the backward pass, which saves memory"
    )
    learning_rate: float = option(1e-6, "3", "peak learning rate", range=POSITIVE, only_with="no search of rates")
    lr_scheduler: str = option("linear", "3", "how the learning rate goes after the warmup", SCHEDULERS)
    warmup: float = option(
        0.0, "3", "updates in which the learning rate rises; below 1: their share of all updates", range=NOT_NEGATIVE
    )
    weight_decay: float = option(0.0, "3", "weight decay of AdamW", range=NOT_NEGATIVE)
    max_grad_norm: float = option(
        1.0, "3", "gradients are clipped at this norm; 0: they are not clipped", range=NOT_NEGATIVE
    )
    save_steps: int = option(
        200,
        "3",
        "optimizer updates between training checkpoints (resume points)",
        range=AT_LEAST_ONE,
        only_with="early stop",
    )
    validation_samples: int = option(
        32,
        "23",
        "at most so many validation rows, of groups that nothing else reads; their loss is recorded before, during and "
        "after training (0: none), and strengths are chosen on them",
        range=NOT_NEGATIVE,
        only_with="a model that runs",
    )
    eval_steps: int | None = option(
        None,
        "3",
        "updates between validations; default once per epoch",
        range=AT_LEAST_ONE,
        only_with="no early stop",
    )
    early_stop: int | None = option(
        None,
        "3",
        "stop when the validation loss has not fallen in so many validations, one at each --save-steps, and keep the "
        "best weights; default never",
        range=AT_LEAST_ONE,
    )
    alpha_search: tuple[float, ...] = option(
        (),
        "3",
        "with hot: train with each of these alphas, e.g. 0.03,0.1, and keep the best on the validation rows",
        range=SHARE,
        only_with="hot",
    )
    lr_search: tuple[float, ...] = option(
        (), "3", "the same for learning rates; with both, every combination is tried", range=POSITIVE
    )
    report_to: str = option("none", "3", "logging service of the Trainer, e.g. tensorboard or wandb", changes="")
    save_untrained_folded: bool = option(
        False, "3", "also write <output_dir>-untrained, which is what training starts from, folded", changes=""
    )

    @property
    def hot(self) -> bool:
        """Whether the residual takes part in training."""
        return self.training_scenario == "hot"

    def check(self) -> None:
        """Raise UserError for settings that exclude each other."""
        if self.warmup >= 1 and self.warmup != int(self.warmup):
            raise UserError(f"warmup is {self.warmup}; expected a share below 1, or a whole number of updates")
        if (self.alpha_search or self.lr_search or self.early_stop) and not self.validation_samples:
            raise UserError("a search and early_stop choose on validation rows; give --validation-samples")
        if self.alpha_search and self.train_alpha is not None:
            raise UserError("train_alpha and alpha_search exclude each other; give one of them")
        if self.early_stop and self.eval_steps not in (None, self.save_steps):
            raise UserError("early_stop validates at each of save_steps; leave eval_steps out")
        if self.warmup and self.lr_scheduler == "constant":
            raise UserError("lr_scheduler constant has no warmup; take constant_with_warmup")
        if self.eval_steps and not self.validation_samples:
            raise UserError("eval_steps needs rows to validate on; give --validation-samples")
        if self.save_untrained_folded and len(self.alpha_search) > 1 and self.hot:
            raise UserError("save_untrained_folded writes one alpha; leave alpha_search out")


@dataclass(frozen=True)
class AdapterSettings:
    """LoRA adapters: what trains in place of the base weights."""

    use_lora: bool = option(False, "3", "train LoRA adapters (merged at the end) instead of the base weights")
    lora_rank: int = option(8, "3", "rank of the adapters", range=AT_LEAST_ONE, only_with="LoRA")
    lora_alpha: float = option(
        16.0, "3", "adapters are scaled by lora_alpha / lora_rank", range=POSITIVE, only_with="LoRA"
    )
    lora_dropout: float = option(0.0, "3", "dropout before the adapters", range=SHARE, only_with="LoRA")
    lora_targets: str = option(
        "q_proj,k_proj,v_proj,o_proj", "3", "layers that get adapters, or all-linear", only_with="LoRA"
    )


@dataclass(frozen=True)
class DistillSettings:
    """Distillation: how much the source teaches."""

    distill_by: str = option(
        "tokens",
        "3",
        "tokens: the source's distributions over the next token join the labels, across vocabularies where tokens of "
        "both models end at the same character; answers: the source's greedy answers replace the rows' own",
        DISTILL_BY,
        only_with="distill",
    )
    distill_weight: float = option(
        0.5, "3", "share of the teacher in the loss of distill by tokens", range=SHARE, only_with="distill by tokens"
    )
    distill_temperature: float = option(
        1.0,
        "3",
        "temperature that softens the teacher's distribution and the target's in that share",
        range=POSITIVE,
        only_with="distill by tokens",
    )
