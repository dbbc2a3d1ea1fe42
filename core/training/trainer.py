"""The transformers Trainer as stage 3 uses it: exact resume points, validation per token, and a teacher."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainerState, TrainingArguments, set_seed

from core.errors import UserError, first_line
from core.models.locate import SINGLE_FILE
from core.training.curve import curve_of
from core.training.heldout import text_nll, trained_tokens
from core.training.recipe import Recipe, TrainingData
from core.training.sft import IGNORED, flattening_collator, has_mrope, model_inputs, pack, padded_batch
from core.training.shown import TrainingBar
from core.training.weights import Diverged, check_finite, load_trained, save_trained

# The file of a resume point in which the Trainer keeps its state.
STATE = "trainer_state.json"


def train(
    model: Any, data: TrainingData, recipe: Recipe, folder: Path, unused_parameters: bool = False
) -> tuple[ExactTrainer, dict[str, Any]]:
    """Fine-tune a model in place. A killed training continues from the last whole resume point in `folder`.

    Args:
        model: its parameters that require gradients are trained.
        folder: of the resume points.
        unused_parameters: the model has parameters that take no part in a pass over text, such as those of a vision
            tower, or a residual of strength 0.
    Returns:
        The trainer, and the loss curve (`curve_of`).
    Raises:
        UserError: settings that the Trainer refuses, such as a logging service that is not installed.
        Diverged: a loss or a weight became NaN or infinite.
    """
    set_seed(recipe.compute.seed)
    point = last_resume_point(folder)
    trainer = _make_trainer(model, data, recipe, folder, point is None, unused_parameters)
    bar = TrainingBar(f"training {recipe.training.training_scenario}")
    trainer.pop_callback(PrinterCallback)
    trainer.add_callback(bar)
    early_stop = recipe.training.early_stop
    try:
        if point is not None and point.has_ended(early_stop) and not trainer.sharded:
            trainer.restore_finished(point)
        else:
            trainer.train(resume_from_checkpoint=None if point is None else str(point.folder))
        best_loss = trainer.state.best_metric if early_stop else None
        validated = [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry]
        if data.validation and best_loss is None and validated[-1:] != [trainer.state.global_step]:
            trainer.evaluate()
        if not trainer.sharded:
            check_finite(model)
    finally:
        bar.close()
    return trainer, curve_of(trainer.state.log_history, best_loss)


class ExactTrainer(Trainer):
    """The Trainer with resume points that continue to the same bytes, and with losses per token.

    A resume point holds the parameters that train under the names of the loaded model. The Trainer's own ones hold the
    names of published checkpoints, under which it does not find the weights of a vision-language model or those around
    a residual again. FSDP and DeepSpeed shard a model over processes; there the resume points stay the Trainer's.
    """

    def __init__(self, data: TrainingData, tokens_per_batch: int, **options: Any):
        super().__init__(**options)
        self.data, self.tokens_per_batch = data, tokens_per_batch
        # Tells the Trainer not to divide by the accumulation steps: `compute_loss` divides by the tokens of an update.
        self.model_accepts_loss_kwargs = True

    @property
    def sharded(self) -> bool:
        """Whether every process holds a part of the model."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def all_weights(self) -> dict[str, Tensor]:
        """All weights of the model, by its own names, on the CPU. Of a sharded one only the first process gets them."""
        weights = self.accelerator.get_state_dict(self.model_wrapped) if self.sharded else self.model.state_dict()
        return {name: value.to("cpu") for name, value in (weights or {}).items()}

    def restore_finished(self, point: ResumePoint) -> None:
        """Restore the weights and the state of a training that was killed after its last update.

        Resuming it would make one more update.
        """
        self.state = TrainerState.load_from_json(str(point.folder / STATE))
        best = self.state.best_model_checkpoint if self.args.load_best_model_at_end else None
        load_trained(self.model, point.folder.with_name(Path(best or point.folder).name) / SINGLE_FILE)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.sharded:
            super()._save(output_dir, state_dict)
        else:
            save_trained(self.model, Path(output_dir or self.args.output_dir) / SINGLE_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.sharded:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_trained(self.model, Path(resume_from_checkpoint) / SINGLE_FILE)

    def _load_best_model(self) -> None:
        if self.sharded:
            super()._load_best_model()
        else:
            load_trained(self.model, Path(self.state.best_model_checkpoint) / SINGLE_FILE)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """The loss on the validation rows, in nats per token. Every process computes all of it."""
        was_training = self.model_wrapped.training
        self.model_wrapped.eval()
        with self.accelerator.autocast():
            model = self.model_wrapped if self.sharded else self.model
            sums = text_nll(model, self.data.validation, self.tokens_per_batch, "validation", show=False)
        self.model_wrapped.train(was_training)
        metrics = {"eval_loss": sum(sums) / sum(trained_tokens(self.data.validation))}
        self.log(metrics)
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log as the Trainer does. Raises Diverged for a loss that is NaN or infinite."""
        for name in ("loss", "eval_loss"):
            if not math.isfinite(logs.get(name, 0.0)):
                raise Diverged(
                    f"the {name} is {logs[name]} at update {self.state.global_step}; lower the learning "
                    "rate, or train in float32 or bfloat16"
                )
        super().log(logs, *args, **kwargs)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The cross-entropy per token with loss, in nats; with a teacher, as its `joined` mixes the two.

        The mean is over all tokens of an update, whatever its batches. Models would average every batch alone.
        """
        labels = inputs["labels"]
        outputs = model(**model_inputs(inputs), use_cache=False)
        total = F.cross_entropy(
            outputs.logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
        )
        if self.data.teacher is not None:
            total = self.data.teacher.joined(total, outputs.logits, inputs)
        # The number of tokens is that of all processes together, but their gradients are averaged and not summed.
        loss = total * self.accelerator.num_processes / num_items_in_batch
        return (loss, outputs) if return_outputs else loss


@dataclass(frozen=True)
class ResumePoint:
    """A folder from which a training continues, and the Trainer's state in it."""

    folder: Path
    state: dict[str, Any]

    def has_ended(self, early_stop: int | None) -> bool:
        """Whether it was written after the last update: of all, or of those that early stopping leaves."""
        stopping = self.state.get("stateful_callbacks", {}).get("EarlyStoppingCallback", {})
        without_gain = stopping.get("attributes", {}).get("early_stopping_patience_counter", 0)
        stopped = early_stop is not None and without_gain >= early_stop
        return stopped or self.state["global_step"] >= self.state["max_steps"]


def last_resume_point(folder: Path) -> ResumePoint | None:
    """The last resume point whose files are all there; a kill may have left the last one unfinished."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    random_states = ["rng_state.pth"] if count == 1 else [f"rng_state_{n}.pth" for n in range(count)]
    for path in sorted(folder.glob("checkpoint-*"), key=lambda path: -int(path.name.rpartition("-")[2])):
        try:
            state = json.loads((path / STATE).read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            continue
        if all((path / name).is_file() for name in random_states):
            return ResumePoint(path, state)
    return None


def _make_trainer(
    model: Any, data: TrainingData, recipe: Recipe, folder: Path, fresh: bool, unused_parameters: bool
) -> ExactTrainer:
    """The trainer of `train`; `fresh`: it does not continue from a resume point."""
    training = recipe.training
    items: list[Any] = pack(data.examples, training.block_size) if training.packing else list(data.examples)
    try:
        arguments = _arguments(recipe, folder, bool(data.validation), fresh)
        arguments.ddp_find_unused_parameters = unused_parameters
        if not (training.eval_steps or training.early_stop):
            # Validate once per epoch, counted in updates. Asked to validate at the end of an epoch, the Trainer would
            # do so after it has saved, and a training that is killed in between would never validate there.
            batches = math.ceil(len(items) / (arguments.train_batch_size * arguments.world_size))
            arguments.eval_steps = math.ceil(batches / training.gradient_accumulation)
        return ExactTrainer(
            data,
            recipe.compute.tokens_per_batch,
            model=model,
            args=arguments,
            train_dataset=items,
            eval_dataset=list(data.validation) or None,
            data_collator=flattening_collator(has_mrope(model)) if training.packing else padded_batch,
            callbacks=[EarlyStoppingCallback(training.early_stop)] if training.early_stop else [],
        )
    except (ImportError, RuntimeError, ValueError) as error:
        raise UserError(f"training cannot begin: {first_line(error)}") from None


def _arguments(recipe: Recipe, folder: Path, validates: bool, fresh: bool) -> TrainingArguments:
    """The Trainer's settings for a recipe. Sets environment variables, where the Trainer takes nothing else."""
    training, compute = recipe.training, recipe.compute
    on_cpu = compute.device == "cpu"
    # The precision is ours to choose, and not what `accelerate launch` was configured with.
    os.environ["ACCELERATE_MIXED_PRECISION"] = {"bfloat16": "bf16", "float16": "fp16"}.get(compute.dtype, "no")
    # Beside the resume points, which are removed at the end.
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder.parents[1] / "logs" / folder.name)
    arguments = TrainingArguments(
        output_dir=str(folder),
        run_name=recipe.run_name,
        num_train_epochs=training.epochs,
        per_device_train_batch_size=training.train_batch_size,
        gradient_accumulation_steps=training.gradient_accumulation,
        activation_checkpointing=training.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if training.gradient_checkpointing else None,
        learning_rate=training.learning_rate,
        warmup_steps=training.warmup,
        weight_decay=training.weight_decay,
        lr_scheduler_type=training.lr_scheduler,
        max_grad_norm=training.max_grad_norm,
        save_steps=training.save_steps,
        save_total_limit=2,
        eval_strategy="steps" if validates else "no",
        eval_steps=training.save_steps if training.early_stop else training.eval_steps,
        eval_on_start=validates and fresh,
        load_best_model_at_end=training.early_stop is not None,
        metric_for_best_model="eval_loss" if training.early_stop else None,
        restore_callback_states_from_checkpoint=not fresh,
        logging_steps=1,
        logging_nan_inf_filter=False,  # a non-finite loss must reach `log`, which the filter would smooth over
        seed=compute.seed,
        use_cpu=on_cpu,
        ddp_backend="gloo" if on_cpu and torch.distributed.is_initialized() else None,
        ddp_timeout=30 * 24 * 3600,
        bf16=compute.dtype == "bfloat16",
        fp16=compute.dtype == "float16",
        report_to=training.report_to,
        disable_tqdm=True,  # `train` has a bar of its own
        remove_unused_columns=False,
        dataloader_pin_memory=not on_cpu,
    )
    # One process drives one GPU. Otherwise the Trainer would use all GPUs, with a larger batch, and say nothing.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments
