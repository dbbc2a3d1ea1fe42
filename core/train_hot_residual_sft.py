#!/usr/bin/env python
"""Stage 3: fused checkpoint + fine-tuning rows -> adapted checkpoint, with the transported part frozen."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import dataclasses
import shutil

from torch import Tensor

from core.attention import SEED_MODEL_TYPES
from core.card import CARD, adapted_card, adapted_lineage
from core.checkpoints import Checkpoint, open_checkpoint, write_folded
from core.data import Row, check_same_split, data_identity, load_rows, sft_example
from core.experiment import Experiment, parse_command, save_resolved
from core.fusion import Residual
from core.hot_residual import (
    RESIDUAL_FILE,
    enable_hot_residual_for_model,
    fold_hot_residual,
    load_residuals,
    residuals_of,
    restore_base,
    save_residuals,
    set_trainable,
)
from core.hub import push_folder
from core.locate import SINGLE_FILE
from core.runs import (
    Manifest,
    UserError,
    check_output_folder,
    log_to_file,
    provenance,
    run_command,
    setup_logging,
    write_text,
)

log = logging.getLogger("stage3")
STAGE = "adapted"
SETTINGS = ("training_scenario", "freeze_strategy", "train_alpha", "block_size", "epochs", "train_batch_size",
            "gradient_accumulation", "learning_rate", "seed", "device", "dtype", "max_shard_size")  # fmt: skip


def main(argv: list[str]) -> None:
    setup_logging()
    command = parse_command(
        argv, "3", __doc__ or "",
        {"model_dir": "fused checkpoint of stage 2 (default runs/<name>/fused)",
         "output_dir": "adapted checkpoint to write (default runs/<name>/adapted/<scenario>)"},
        {"alpha": "train_alpha"},
    )  # fmt: skip
    experiment = command.experiment
    folder = command.path("output_dir", f"adapted/{experiment.training_scenario}")
    start = open_checkpoint(str(command.path("model_dir", "fused")), None, experiment.trust_remote_code,
                            experiment.device)  # fmt: skip
    check_model_type(start, experiment.model_type)
    check_output_folder(folder, start.folder)
    if experiment.device not in ("cpu", "cuda"):
        raise UserError(
            f"device {experiment.device}: training takes cpu or cuda; choose a GPU with CUDA_VISIBLE_DEVICES"
        )
    fused = (start.folder / RESIDUAL_FILE).is_file()
    made_by = None
    if fused:
        made_by = Manifest.read(start.folder, "fused", STAGE).record
        data = made_by["data"]
        if not experiment.data_subset and experiment.data_file is None:
            log.info("no data given: taking that of the plans, %s", data["file"] or data["subset"])
            experiment = dataclasses.replace(
                experiment, data_subset=data["subset"], data_file=data["file"], split_seed=data["split_seed"]
            )
        check_same_split(data, experiment.data_subset, experiment.data_file, experiment.split_seed)
    elif experiment.training_scenario == "hot":
        raise UserError(
            f"{start.folder} has no {RESIDUAL_FILE}; give a fused checkpoint, or --training-scenario no_hot"
        )
    tokenizer = start.load_tokenizer()
    rows = load_rows(experiment.data_subset, "sft", experiment.sft_samples, experiment.split_seed,
                     experiment.data_file)  # fmt: skip
    data = data_identity(rows, experiment.data_subset, experiment.data_file, experiment.split_seed)
    settings = {name: getattr(experiment, name) for name in SETTINGS}
    manifest = Manifest.begin(folder, STAGE, {
        "model": start.identity, "made_by": made_by and made_by["fingerprint"], "data": data, "settings": settings,
    })  # fmt: skip
    log_to_file(command.log_file)
    if manifest.complete:
        log.info("%s is finished already", folder)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        push_folder(folder, repository(experiment))
        return
    save_resolved(experiment, "3", folder)
    residuals, alpha, form = load_residuals(start.folder / RESIDUAL_FILE) if fused else ([], 0.0, "interpolate")
    alpha = alpha if experiment.train_alpha is None else experiment.train_alpha
    model = start.load_model("float32")  # half types are for the passes (autocast): updates would vanish in them
    restore_base(model, residuals, start.layout.name)
    hot = experiment.training_scenario == "hot"
    if hot:
        enable_hot_residual_for_model(model, residuals, start.layout.name, alpha, form)
    losses = train(model, tokenizer, rows, folder / "checkpoints", experiment)
    save_adapted(model, start, folder, residuals if hot else [], alpha, form, experiment.max_shard_bytes)
    lineage = adapted_lineage(start, (made_by or {}).get("lineage"), hot, settings)
    write_text(folder / CARD, adapted_card(lineage, data, losses))
    manifest.finish(data=data, losses=losses, lineage=lineage, **provenance())
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    log.info("%s is finished; training loss %.4f at first, %.4f at last", folder, losses[0], losses[-1])
    push_folder(folder, repository(experiment))


def repository(experiment: Experiment) -> str | None:
    """Hub repository of this checkpoint: stage 2 has pushed the fused one to `push_to_hub` itself."""
    suffix = "adapted" if experiment.training_scenario == "hot" else "no-hot"
    return experiment.push_to_hub and f"{experiment.push_to_hub}-{suffix}"


def check_model_type(checkpoint: Checkpoint, model_type: str | None) -> None:
    """Refuse a `--model_type` that is not the checkpoint's."""
    found = checkpoint.layout.model_type
    if model_type is not None and found not in SEED_MODEL_TYPES[model_type]:
        raise UserError(f"--model_type {model_type}, but {checkpoint.folder} is a {found} model; leave the flag out")


def train(model: Any, tokenizer: Any, rows: list[Row], folder: Path, experiment: Experiment) -> list[float]:
    """Fine-tune in place with the transformers Trainer; returns the logged training losses.

    Continues from the last whole checkpoint in `folder`.
    """
    from safetensors.torch import load_model, save_model
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments, set_seed

    set_seed(experiment.seed)
    if experiment.training_scenario == "hot":
        for part, (trainable, frozen) in set_trainable(model, experiment.freeze_strategy).items():
            log.info("%-8s %12d trainable %12d frozen parameters", part, trainable, frozen)
    examples = [sft_example(row, tokenizer, experiment.block_size) for row in rows]
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=experiment.epochs,
        per_device_train_batch_size=experiment.train_batch_size,
        gradient_accumulation_steps=experiment.gradient_accumulation,
        learning_rate=experiment.learning_rate,
        save_steps=experiment.save_steps,
        save_total_limit=2,
        logging_steps=1,
        seed=experiment.seed,
        use_cpu=experiment.device == "cpu",
        bf16=experiment.dtype == "bfloat16",
        fp16=experiment.dtype == "float16",
        report_to="none",
        dataloader_pin_memory=experiment.device != "cpu",
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # one process drives one GPU: no silent DataParallel, no larger batch
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token

    class ExactTrainer(Trainer):
        """Resume points with the names of the loaded model: its own are those of published files, which the Trainer
        does not find again in a vision-language model or around a residual."""

        def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
            place = Path(output_dir or self.args.output_dir)
            place.mkdir(parents=True, exist_ok=True)
            save_model(self.model, str(place / SINGLE_FILE))

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
            load_model(self.model, str(Path(resume_from_checkpoint) / SINGLE_FILE), strict=True)

    trainer = ExactTrainer(
        model=model,
        args=arguments,
        train_dataset=examples,
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
    )
    whole = [path for path in folder.glob("checkpoint-*") if (path / "trainer_state.json").is_file()]
    last = max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def save_adapted(
    model: Any, start: Checkpoint, folder: Path, residuals: list[Residual], alpha: float, form: str,
    max_shard_bytes: int,
) -> None:  # fmt: skip
    """Fold and write the adapted checkpoint with exactly the tensors, names and dtypes it started from."""
    if residuals:
        save_residuals(folder / RESIDUAL_FILE, residuals_of(model, residuals, start.layout.name), alpha, form)
        fold_hot_residual(model)
    state = model.state_dict()

    def trained(name: str, tensor: Tensor) -> Tensor:
        # A copy: tied weights that are stored twice would share memory, which safetensors refuses.
        return state.get(start.name_in_model(name), tensor).to("cpu", tensor.dtype, copy=True)

    write_folded(start, folder, trained, max_shard_bytes)


if __name__ == "__main__":
    run_command(main)
