#!/usr/bin/env python
"""Stage 3: fused checkpoint + fine-tuning rows -> adapted checkpoint, with the transported part frozen."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import shutil
from itertools import product

from torch import Tensor

from core.attention import TOWERS
from core.card import CARD, adapted_card, adapted_lineage
from core.checkpoints import Checkpoint
from core.command import parse_command, save_resolved
from core.data import Row, data_identity, load_rows
from core.experiment import Experiment
from core.hot_residual import set_trainable
from core.hub import push_folder
from core.runs import (
    MANIFEST,
    Manifest,
    UserError,
    check_output_folder,
    log_to_file,
    process_state,
    provenance,
    read_json,
    run_command,
    setup_logging,
    write_json,
    write_safetensors,
    write_text,
)
from core.sft import Example, sft_examples
from core.start import Start, open_source, open_start, save_folded, with_data_of

log = logging.getLogger("stage3")
STAGE, UNTRAINED = "adapted", "untrained"
RESULTS, ANSWERS, BEST = "results.json", "source_answers.jsonl", "best.safetensors"
# Settings that change the bytes of the adapted checkpoint.
SETTINGS = ("training_scenario", "freeze_strategy", "train_alpha", "alpha_search", "block_size", "packing", "epochs",
            "train_batch_size", "gradient_accumulation", "gradient_checkpointing", "learning_rate", "lr_search",
            "lr_scheduler", "warmup", "weight_decay", "max_grad_norm", "validation_samples", "eval_steps", "early_stop",
            "use_lora", "lora_rank", "lora_alpha", "lora_dropout", "lora_targets", "distill_weight",
            "distill_temperature", "tokens_per_batch", "seed", "device", "dtype", "max_shard_size")  # fmt: skip


def main(argv: list[str]) -> None:
    setup_logging()
    command = parse_command(
        argv, "3", __doc__ or "",
        {"model_dir": "fused checkpoint of stage 2, or any model for no_hot and distill (default runs/<name>/fused)",
         "output_dir": "adapted checkpoint to write (default runs/<name>/adapted/<scenario>/seed<seed>)"},
        {"alpha": "train_alpha"},
    )  # fmt: skip
    experiment = command.experiment
    scenario = experiment.training_scenario
    folder = command.path("output_dir", f"adapted/{scenario}/seed{experiment.seed}")
    start = open_start(str(command.path("model_dir", "fused")), experiment)
    check_output_folder(folder, start.checkpoint.folder)
    source = open_source(start, experiment) if scenario == "distill" else None
    experiment = with_data_of(start, experiment)
    rows, validation = (
        load_rows(experiment.data_subset, part, count, experiment.split_seed, experiment.data_file) if count else []
        for part, count in (("sft", experiment.sft_samples), ("validation", experiment.validation_samples))
    )
    data, validation_data = (
        data_identity(part, experiment.data_subset, experiment.data_file, experiment.split_seed)
        for part in (rows, validation)
    )
    settings = {name: getattr(experiment, name) for name in SETTINGS}
    inputs = {"model": start.checkpoint.identity, "made_by": start.made_by and start.made_by["fingerprint"],
              "source": source and source.identity, "data": data, "validation": validation_data,
              "settings": settings}  # fmt: skip
    state = process_state(experiment.device)
    if state.is_main_process:
        Manifest.begin(folder, STAGE, inputs)
    state.wait_for_everyone()
    manifest = Manifest(folder, read_json(folder / MANIFEST))
    log_to_file(command.log_file if state.is_main_process else None)
    if manifest.complete:
        log.info("%s is finished already", folder)
    else:
        tokenizer = start.checkpoint.load_tokenizer()
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        if state.is_main_process:
            save_resolved(experiment, "3", folder)
        rows, teacher, method = taught(rows, source, tokenizer, folder, experiment, state)
        examples, counts = sft_examples(rows, tokenizer, experiment.block_size)
        kept = sft_examples(validation, tokenizer, experiment.block_size)[0] if validation else []
        if experiment.save_untrained_folded and state.is_main_process:
            save_untrained(start, folder, experiment)
        trials, trained, curve = search(start, tokenizer, examples, kept, teacher, folder, experiment, state)
        best = trials[0] if len(trials) == 1 else min(trials, key=lambda trial: trial["validation"])
        if state.is_main_process:
            finish(start, folder, manifest, experiment, trained, curve, best, {
                "data": data, "counts": counts, "method": method, "settings": settings, "trials": trials,
                "teacher": source})  # fmt: skip
    if state.is_main_process:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        push_folder(folder, repository(experiment))


def taught(
    rows: list[Row], source: Checkpoint | None, tokenizer: Any, folder: Path, experiment: Experiment, state: Any
) -> tuple[list[Row], Any, str | None]:
    """(rows to train on, the teacher whose distribution is learned, in words what the source does).

    Without a source the rows as they are. Where its vocabulary differs, the rows with the source's answers.
    """
    from core.distill import same_vocabulary, source_answers
    from core.trainer import Teacher

    if source is None:
        return rows, None, None
    own = source.load_tokenizer()
    if same_vocabulary(tokenizer, own):
        method = (f"token-level: {experiment.distill_weight} of the loss is T^2 KL(source || target), T = "
                  f"{experiment.distill_temperature}")  # fmt: skip
        log.info("same vocabulary; %s", method)
        model = source.load_model(experiment.dtype).requires_grad_(False)
        return rows, Teacher(model, experiment.distill_weight, experiment.distill_temperature), method
    method = "sequence-level: the source's greedy answers (of a text, its second half) in place of the rows' own"
    log.info("the vocabularies differ; %s", method)
    if state.is_main_process:
        model = source.load_model(experiment.dtype)
        size = experiment.tokens_per_batch
        source_answers(rows, model, own, folder / ANSWERS, experiment.block_size, size)
        del model
    state.wait_for_everyone()
    return (
        source_answers(rows, None, own, folder / ANSWERS, experiment.block_size, experiment.tokens_per_batch),
        None,
        method,
    )


def search(
    start: Start, tokenizer: Any, examples: list[Example], validation: list[Example], teacher: Any, folder: Path,
    experiment: Experiment, state: Any,
) -> tuple[list[dict[str, Any]], dict[str, Tensor], dict[str, Any]]:  # fmt: skip
    """Train with every alpha and learning rate asked for; (all trials, the best one's weights, its curve).

    The best has the lowest validation loss. Finished trials are on disk; a killed search goes on with the others.
    """
    hot = experiment.training_scenario == "hot"
    given = start.alpha if experiment.train_alpha is None else experiment.train_alpha
    alphas = experiment.alpha_search if hot and experiment.alpha_search else (given,)
    rates = experiment.lr_search or (experiment.learning_rate,)
    grid = list(product(alphas, rates))
    record, best = folder / RESULTS, folder / "checkpoints" / BEST
    trials = read_json(record)["trials"] if record.is_file() and best.is_file() else []
    curve: dict[str, Any] = read_json(best.with_suffix(".json")) if trials else {}
    trained: dict[str, Tensor] = {}
    for number, (alpha, rate) in enumerate(grid):
        if number < len(trials):
            continue
        log.info("trial %d of %d: alpha %s, learning rate %s", number + 1, len(grid), alpha, rate)
        place = folder / "checkpoints" / f"trial{number}"
        state_dict, found = train_once(start, tokenizer, examples, validation, teacher, place, experiment, alpha, rate)
        trial = {"alpha": alpha if hot else None, "learning_rate": rate,
                 "validation": found["validation"][-1]["loss"] if validation else None,
                 "train": found["train"][-1]["loss"]}  # fmt: skip
        better = all(trial["validation"] < other["validation"] for other in trials)
        if better:
            trained, curve = state_dict, found
        trials.append(trial)
        if len(grid) > 1 and state.is_main_process:
            if better:
                write_safetensors(best, unshared(trained))
                write_json(best.with_suffix(".json"), curve)
            write_json(record, {"metric": "validation loss, nats per token", "trials": trials})
            shutil.rmtree(place, ignore_errors=True)
    if not trained:
        from safetensors.torch import load_file

        trained = load_file(best)
    return trials, trained, curve


def train_once(
    start: Start, tokenizer: Any, examples: list[Example], validation: list[Example], teacher: Any, place: Path,
    experiment: Experiment, alpha: float, learning_rate: float,
) -> tuple[dict[str, Tensor], dict[str, Any]]:  # fmt: skip
    """One training: (all weights of the unfolded model after it, in float32 on the CPU, by its own names; curve)."""
    from core.adapters import add_lora, merge_lora
    from core.trainer import train

    hot, family = experiment.training_scenario == "hot", start.checkpoint.layout.family
    model = start.load(hot, alpha)
    if experiment.use_lora:
        adapted = add_lora(model, family.tower, experiment.lora_rank, experiment.lora_alpha, experiment.lora_dropout,
                           experiment.lora_targets)  # fmt: skip
        log.info("LoRA of rank %d on %d layers", experiment.lora_rank, adapted)
    strategy = experiment.freeze_strategy if hot else "frozen_hot"
    for part, (trainable, frozen) in set_trainable(model, strategy, experiment.use_lora).items():
        if trainable + frozen:
            log.info("%-8s %12d trainable %12d frozen parameters", part, trainable, frozen)
    unused = start.checkpoint.layout.model_type not in TOWERS
    trainer, curve = train(model, tokenizer, examples, validation, place, experiment, learning_rate, teacher, unused)
    if experiment.use_lora:
        merge_lora(model)
    whole = trainer.accelerator.get_state_dict(trainer.model_wrapped) if trainer.sharded else model.state_dict()
    return {name: value.to("cpu") for name, value in whole.items()}, curve


def unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """With a copy of each that shares memory with one before it (tied weights), which safetensors refuses."""
    seen: set[int] = set()
    out = {}
    for name, value in tensors.items():
        out[name] = value.clone() if value.data_ptr() in seen else value.contiguous()
        seen.add(value.data_ptr())
    return out


def finish(
    start: Start, folder: Path, manifest: Manifest, experiment: Experiment, trained: dict[str, Tensor],
    curve: dict[str, Any], best: dict[str, Any], told: dict[str, Any],
) -> None:  # fmt: skip
    """Write the adapted checkpoint, its curve and its card, and mark it complete."""
    from core.trainer import save_curve

    hot = experiment.training_scenario == "hot"
    save_folded(start, folder, trained, hot, best["alpha"] if hot else 0.0, experiment.max_shard_bytes)
    save_curve(folder, curve)
    losses = [point["loss"] for point in curve["train"]]
    settings = told["settings"]
    if len(told["trials"]) > 1:
        settings = {**settings, "chosen alpha": best["alpha"], "chosen learning rate": best["learning_rate"]}
        write_json(folder / RESULTS, {"metric": "validation loss, nats per token", "trials": told["trials"],
                                      "chosen": told["trials"].index(best)})  # fmt: skip
    lineage = adapted_lineage(start.checkpoint, (start.made_by or {}).get("lineage"), hot, settings, told["teacher"])
    write_text(folder / CARD, adapted_card(lineage, told["data"], curve, told["counts"], told["method"]))
    manifest.finish(data=told["data"], losses=losses, validation=[point["loss"] for point in curve["validation"]],
                    counts=told["counts"], distillation=told["method"], trials=told["trials"], chosen=best,
                    lineage=lineage, **provenance())  # fmt: skip
    log.info("%s is finished; training loss %.4f at first, %.4f at last", folder, losses[0], losses[-1])
    if curve["validation"]:
        log.info("validation loss %.4f before, %.4f after", *(curve["validation"][n]["loss"] for n in (0, -1)))


def save_untrained(start: Start, folder: Path, experiment: Experiment) -> None:
    """Write what training starts from, folded, beside the adapted checkpoint: the ablation without training."""
    hot = experiment.training_scenario == "hot"
    alphas = experiment.alpha_search or (experiment.train_alpha,)
    alpha = start.alpha if alphas[0] is None else alphas[0]
    if len(alphas) > 1:
        raise UserError("save_untrained_folded writes one alpha; leave alpha_search out")
    place = folder.with_name(f"{folder.name}-{UNTRAINED}")
    made_by = start.made_by and start.made_by["fingerprint"]
    manifest = Manifest.begin(place, UNTRAINED, {
        "model": start.checkpoint.identity, "made_by": made_by, "hot": hot, "alpha": alpha,
        "max_shard_size": experiment.max_shard_size})  # fmt: skip
    if not manifest.complete:
        save_folded(start, place, start.load(hot, alpha).state_dict(), hot, alpha, experiment.max_shard_bytes)
        manifest.finish(**provenance())
    log.info("%s holds what training starts from", place)


def repository(experiment: Experiment) -> str | None:
    """Hub repository of this checkpoint: stage 2 has pushed the fused one to `push_to_hub` itself."""
    suffix = {"hot": "adapted", "no_hot": "no-hot", "distill": "distilled"}[experiment.training_scenario]
    return experiment.push_to_hub and f"{experiment.push_to_hub}-{suffix}"


if __name__ == "__main__":
    run_command(main)
