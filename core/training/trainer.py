"""The transformers Trainer as stage 3 uses it: exact resume points, validation per token, a teacher, a loss curve."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import EarlyStoppingCallback, Trainer, TrainerState, TrainingArguments, set_seed

from core.errors import UserError, first_line
from core.files import atomic_file, write_json
from core.models.locate import SINGLE_FILE
from core.runs.settings import Experiment
from core.training.distill import distillation_loss
from core.training.heldout import text_nll, trained_tokens
from core.training.sft import IGNORED, Example, flattening_collator, pack, pad

# Of the Trainer, in a resume point.
STATE = "trainer_state.json"
CURVE, CURVE_IMAGE = "loss_curve.json", "loss_curve.png"


@dataclass(frozen=True)
class Teacher:
    """A model whose next-token distribution is learned beside the labels (`core.training.distill`)."""

    model: Any
    weight: float
    temperature: float


class Diverged(UserError):
    """A loss or a weight that is no number: the weights are lost from there on."""


def trained_parameters(model: torch.nn.Module) -> dict[str, Tensor]:
    """What training changes, by the loaded model's own names."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def check_finite(model: torch.nn.Module) -> None:
    """Raises Diverged for a trained weight that is no number: the loss of the last update was that before it."""
    for name, parameter in trained_parameters(model).items():
        if not torch.isfinite(parameter).all():
            raise Diverged(
                f"{name} has NaN or infinite weights after the last update; lower the learning rate, or train in "
                "float32 or bfloat16"
            )


def load_trained(model: torch.nn.Module, path: Path) -> None:
    """Put saved `trained_parameters` back. Raises UserError when they are not those of this model."""
    saved, wanted = load_file(path), trained_parameters(model)
    if saved.keys() != wanted.keys():
        odd = sorted(saved.keys() ^ wanted.keys())[0]
        raise UserError(f"{path} does not belong to this model ({odd}); remove its folder and train again")
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(saved[name])


class ExactTrainer(Trainer):
    """Resume points hold what trains, under the names of the loaded model: the Trainer's own hold published names,
    which it does not find again in a vision-language model or around a residual. Under FSDP and DeepSpeed, which
    shard the model, they stay the Trainer's.

    `evaluate` gives the loss per token of the validation texts, whatever their batches.
    """

    teacher: Teacher | None = None
    validation: Sequence[Example] = ()
    tokens_per_batch = 4096

    @property
    def sharded(self) -> bool:
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        place = Path(output_dir or self.args.output_dir)
        if self.sharded:
            super()._save(output_dir, state_dict)
            return
        place.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: value.contiguous() for name, value in trained_parameters(self.model).items()},
            str(place / SINGLE_FILE),
        )

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
        """Nats per token on the validation texts; every process computes all of it."""
        was_training = self.model_wrapped.training
        self.model_wrapped.eval()
        with self.accelerator.autocast():
            model = self.model_wrapped if self.sharded else self.model
            sums = text_nll(model, self.validation, self.tokens_per_batch, "validation", show=False)
        self.model_wrapped.train(was_training)
        metrics = {"eval_loss": sum(sums) / sum(trained_tokens(self.validation))}
        self.log(metrics)
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Raises Diverged when a loss is no number."""
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
        """Cross-entropy per token with loss, over all tokens of an update (models average it in ways of their own);
        with a teacher, mixed with its divergence."""
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        outputs = model(**inputs, use_cache=False)
        total = F.cross_entropy(
            outputs.logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
        )
        if self.teacher is not None:
            with torch.no_grad():
                if "position_ids" in inputs:  # packed
                    text = inputs["position_ids"].reshape(-1, 1, labels.shape[1])[0]
                    inputs["position_ids"] = text.expand(4, 1, -1) if has_mrope(self.teacher.model) else text
                taught = self.teacher.model(**inputs, use_cache=False).logits
            divergence = distillation_loss(outputs.logits, taught, labels, self.teacher.temperature)
            total = torch.lerp(total, divergence, self.teacher.weight)
        # The update's tokens are those of all processes, whose gradients are averaged.
        loss = total * self.accelerator.num_processes / num_items_in_batch
        return (loss, outputs) if return_outputs else loss


def train(
    model: Any,
    examples: Sequence[Example],
    validation: Sequence[Example],
    folder: Path,
    experiment: Experiment,
    learning_rate: float,
    teacher: Teacher | None = None,
    unused: bool = False,
) -> tuple[ExactTrainer, dict[str, Any]]:
    """Fine-tune in place; continues from the last whole resume point in `folder`.

    Args:
        unused: the model has parameters that text does not reach (a vision tower).
    Returns:
        The trainer, and the curve: {"train": [{update, loss, learning_rate, grad_norm}],
        "validation": [{update, loss}], "final_validation": loss of the weights that are kept}, nats per token.
    Raises:
        UserError: settings that the Trainer refuses (a logging service that is not installed).
        Diverged: a loss or a weight that is no number.
    """
    set_seed(experiment.compute.seed)
    last, state = _last_point(folder)
    items: list[Any] = pack(examples, experiment.training.block_size) if experiment.training.packing else list(examples)
    try:
        arguments = _arguments(folder, experiment, learning_rate, bool(validation), last is None, unused)
        if not (experiment.training.eval_steps or experiment.training.early_stop):
            # Validate once per epoch, counted in updates: at the end of an epoch the Trainer validates after it has
            # saved, and what is killed in between would never validate.
            batches = math.ceil(len(items) / (arguments.train_batch_size * arguments.world_size))
            arguments.eval_steps = math.ceil(batches / experiment.training.gradient_accumulation)
        trainer = ExactTrainer(
            model=model,
            args=arguments,
            train_dataset=items,
            eval_dataset=list(validation) or None,
            data_collator=flattening_collator(has_mrope(model)) if experiment.training.packing else pad,
            callbacks=[EarlyStoppingCallback(experiment.training.early_stop)] if experiment.training.early_stop else [],
        )
    except (ImportError, RuntimeError, ValueError) as error:
        raise UserError(f"training cannot begin: {first_line(error)}") from None
    trainer.teacher, trainer.validation = teacher, validation
    trainer.tokens_per_batch = experiment.compute.tokens_per_batch
    trainer.model_accepts_loss_kwargs = True  # our compute_loss divides by the tokens of the whole update
    try:
        if last is not None and _has_ended(state, experiment.training.early_stop) and not trainer.sharded:
            # Killed after its last update: the Trainer would make one more.
            trainer.state = TrainerState.load_from_json(str(last / STATE))
            best = trainer.state.best_model_checkpoint if experiment.training.early_stop else None
            load_trained(model, folder / Path(best or last).name / SINGLE_FILE)
        else:
            trainer.train(resume_from_checkpoint=str(last) if last else None)
        best_loss = trainer.state.best_metric if experiment.training.early_stop else None
        seen = [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry]
        if validation and best_loss is None and seen[-1:] != [trainer.state.global_step]:
            trainer.evaluate()
        if not trainer.sharded:
            check_finite(model)
    except Diverged:
        for callback in trainer.callback_handler.callbacks:  # the message gets a line of its own
            if (bar := getattr(callback, "training_bar", None)) is not None:
                bar.close()
        raise
    return trainer, curve_of(trainer.state.log_history, best_loss)


def _last_point(folder: Path) -> tuple[Path | None, dict[str, Any]]:
    """The last resume point whose every file is there, and the Trainer's state in it."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    random_states = ["rng_state.pth"] if count == 1 else [f"rng_state_{n}.pth" for n in range(count)]
    for path in sorted(folder.glob("checkpoint-*"), key=lambda path: -int(path.name.rpartition("-")[2])):
        try:
            state = json.loads((path / STATE).read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            continue
        if all((path / name).is_file() for name in random_states):
            return path, state
    return None, {}


def _has_ended(state: dict[str, Any], early_stop: int | None) -> bool:
    """Whether a resume point is that of the last update."""
    stopping = state.get("stateful_callbacks", {}).get("EarlyStoppingCallback", {})
    waited = stopping.get("attributes", {}).get("early_stopping_patience_counter", 0)
    return state["global_step"] >= state["max_steps"] or (early_stop is not None and waited >= early_stop)


def _arguments(
    folder: Path, e: Experiment, learning_rate: float, validates: bool, fresh: bool, unused: bool
) -> TrainingArguments:
    every = e.training.save_steps if e.training.early_stop else e.training.eval_steps
    # Ours decides, not the launcher's; and TensorBoard's files outlive the resume points.
    os.environ["ACCELERATE_MIXED_PRECISION"] = {"bfloat16": "bf16", "float16": "fp16"}.get(e.compute.dtype, "no")
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder.parents[1] / "logs" / folder.name)
    arguments = TrainingArguments(
        output_dir=str(folder),
        run_name=e.name,
        num_train_epochs=e.training.epochs,
        per_device_train_batch_size=e.training.train_batch_size,
        gradient_accumulation_steps=e.training.gradient_accumulation,
        activation_checkpointing=e.training.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if e.training.gradient_checkpointing else None,
        learning_rate=learning_rate,
        warmup_steps=e.training.warmup,
        weight_decay=e.training.weight_decay,
        lr_scheduler_type=e.training.lr_scheduler,
        max_grad_norm=e.training.max_grad_norm,
        save_steps=e.training.save_steps,
        save_total_limit=2,
        eval_strategy="steps" if validates else "no",
        eval_steps=every,
        eval_on_start=validates and fresh,
        load_best_model_at_end=e.training.early_stop is not None,
        metric_for_best_model="eval_loss" if e.training.early_stop else None,
        restore_callback_states_from_checkpoint=not fresh,
        logging_steps=1,
        logging_nan_inf_filter=False,  # a loss that is no number is told, not smoothed over
        seed=e.compute.seed,
        use_cpu=e.compute.device == "cpu",
        ddp_backend="gloo" if e.compute.device == "cpu" and torch.distributed.is_initialized() else None,
        ddp_find_unused_parameters=unused,
        ddp_timeout=30 * 24 * 3600,
        bf16=e.compute.dtype == "bfloat16",
        fp16=e.compute.dtype == "float16",
        report_to=e.training.report_to,
        remove_unused_columns=False,
        dataloader_pin_memory=e.compute.device != "cpu",
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # one process drives one GPU: no silent DataParallel, no larger batch
    return arguments


def has_mrope(model: Any) -> bool:
    """Whether positions are those of text, time, height and width (Qwen2-VL)."""
    return "mrope_section" in (getattr(model.config.get_text_config(), "rope_parameters", None) or {})


def curve_of(history: Sequence[dict[str, Any]], best_loss: float | None = None) -> dict[str, Any]:
    """The Trainer's log as a curve. The weights kept are those of `best_loss`, or the last ones."""
    validation = [{"update": e["step"], "loss": e["eval_loss"]} for e in history if "eval_loss" in e]
    final = best_loss if best_loss is not None or not validation else validation[-1]["loss"]
    steps = [entry for entry in history if "loss" in entry]
    names = ("loss", "learning_rate", "grad_norm")
    return {
        "unit": "nats per token",
        "train": [{"update": e["step"], **{n: e[n] for n in names if n in e}} for e in steps],
        "validation": validation,
        "final_validation": final,
    }


def save_curve(folder: Path, curve: dict[str, Any]) -> None:
    """Write the curve as JSON and as a picture."""
    from matplotlib.figure import Figure

    write_json(folder / CURVE, curve)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, style in (("train", "-"), ("validation", "o-")):
        if curve[name]:
            axes.plot([p["update"] for p in curve[name]], [p["loss"] for p in curve[name]], style, label=name)
    axes.set(xlabel="update", ylabel=curve["unit"], title="loss")
    axes.legend()
    with atomic_file(folder / CURVE_IMAGE) as temporary:
        figure.savefig(temporary, format="png")
