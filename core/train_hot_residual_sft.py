#!/usr/bin/env python
"""Stage 3: fused checkpoint + fine-tuning rows -> adapted checkpoint, with the transported part frozen."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import math
import shutil
from itertools import product

from torch import Tensor

from core.data import Row, divide
from core.errors import UserError
from core.files import MANIFEST, read_json, write_json, write_safetensors, write_text
from core.hub import push_folder
from core.locks import outputs_held
from core.manifest import Manifest, check_output_folder
from core.models.checkpoints import Checkpoint
from core.models.families import TOWERS
from core.runs.card import CARD, adapted_card, adapted_lineage
from core.runs.command_line import parse_command, save_resolved
from core.runs.process import log_to_file, process_state, provenance, run_command, setup_logging
from core.runs.rows_read import check_held_out, check_same_split, recorded, write_rows_read
from core.runs.settings import Experiment
from core.training.hot_linear import set_trainable
from core.training.sft import Example, sft_examples
from core.training.start import Start, open_source, open_start, resolved, save_folded

log = logging.getLogger("stage3")
STAGE, UNTRAINED = "adapted", "untrained"
RESULTS, ANSWERS = "results.json", "source_answers.jsonl"
# In the folder of a trial: its weights, and the last file to be written.
WEIGHTS, DONE = "trained.safetensors", "done.json"


@outputs_held()
def main(argv: list[str]) -> None:
    setup_logging()
    command = parse_command(
        argv,
        "3",
        __doc__ or "",
        {
            "model_dir": "fused checkpoint of stage 2, or any model for no_hot and distill (default runs/<name>/fused)",
            "output_dir": "adapted checkpoint to write (default runs/<name>/adapted/<scenario>/seed<seed>)",
        },
        {"alpha": "train_alpha"},
        {"dry_run": "check everything that can be checked without training, print it, and stop"},
    )
    if "dry_run" in command.modes and (waiting := command.waits_for("model_dir", "fused", "fused")):
        print(waiting)
        return
    experiment = command.experiment
    scenario = experiment.training.training_scenario
    place = f"adapted/{scenario}/seed{experiment.compute.seed}"
    folder = command.path("output_dir", place)
    start = open_start(str(command.path("model_dir", "fused")), experiment)
    check_output_folder(folder, start.checkpoint.folder)
    source = open_source(start, experiment) if scenario == "distill" else None
    experiment = resolved(start, experiment)
    division = divide(experiment.data.spec)
    if start.made_by is not None:
        check_same_split(start.made_by["data"], division.spec, division.revision)
    made_with = recorded(start.checkpoint, source)
    if start.made_by is not None and start.checkpoint.folder not in made_with:
        made_with.append(start.checkpoint.folder)  # its record is missing, which reading it tells
    check_held_out(division, made_with)
    rows = division.rows("sft", experiment.training.sft_samples)
    validation = (
        division.rows("validation", experiment.training.validation_samples)
        if experiment.training.validation_samples
        else []
    )
    data, validation_data = division.identity(rows), division.identity(validation)
    read = {"sft": division.marks(rows), "validation": division.marks(validation)}
    state = process_state(experiment.compute.device)
    settings = {**experiment.deciding("3"), "processes": state.num_processes}
    inputs = {
        "model": start.checkpoint.identity,
        "made_by": start.made_by and start.made_by["fingerprint"],
        "source": source and source.identity,
        "data": data,
        "validation": validation_data,
        "settings": settings,
    }
    if state.is_main_process:
        Manifest.begin(folder, STAGE, inputs)
    state.wait_for_everyone()
    manifest = Manifest(folder, read_json(folder / MANIFEST))
    log_to_file(command.log_file("output_dir", place) if state.is_main_process else None)
    if experiment.training.save_untrained_folded and state.is_main_process:
        save_untrained(start, folder, experiment)
    if manifest.complete:
        log.info("%s is finished already", folder)
    else:
        tokenizer = start.checkpoint.load_tokenizer()
        if state.is_main_process:
            save_resolved(experiment, "3", folder)
        rows, teacher, method = taught(rows, source, tokenizer, folder, experiment, state)
        examples, counts = sft_examples(rows, tokenizer, experiment.training.block_size)
        kept = sft_examples(validation, tokenizer, experiment.training.block_size)[0] if validation else []
        trials, chosen = search(start, examples, kept, teacher, folder, experiment, state)
        if state.is_main_process:
            told = {"data": data, "counts": counts, "method": method, "settings": settings, "teacher": source}
            finish(start, folder, manifest, experiment, trials, chosen, told | {"read": read})
    if state.is_main_process:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        push_folder(folder, repository(experiment))


def taught(
    rows: list[Row], source: Checkpoint | None, tokenizer: Any, folder: Path, experiment: Experiment, state: Any
) -> tuple[list[Row], Any, str | None]:
    """(rows to train on, the teacher whose distribution is learned, in words what the source does).

    Without a source the rows as they are. Where its vocabulary differs, the rows with the source's answers.
    """
    from core.training.distill import read_answers, same_vocabulary, write_answers
    from core.training.trainer import Teacher

    if source is None:
        return rows, None, None
    own = source.load_tokenizer()
    if same_vocabulary(tokenizer, own):
        method = (
            f"token-level: {experiment.distill.distill_weight} of the loss is T^2 KL(source || target), T = "
            f"{experiment.distill.distill_temperature}"
        )
        log.info("same vocabulary; %s", method)
        model = source.load_model(experiment.compute.dtype).requires_grad_(False)
        return rows, Teacher(model, experiment.distill.distill_weight, experiment.distill.distill_temperature), method
    method = "sequence-level: the source's greedy answers (of a text, its second half) in place of the rows' own"
    log.info("the vocabularies differ; %s", method)
    if state.is_main_process:
        model = source.load_model(experiment.compute.dtype)
        write_answers(
            rows, model, own, folder / ANSWERS, experiment.training.block_size, experiment.compute.tokens_per_batch
        )
        del model
    state.wait_for_everyone()
    return read_answers(rows, folder / ANSWERS), None, method


def search(
    start: Start,
    examples: list[Example],
    validation: list[Example],
    teacher: Any,
    folder: Path,
    experiment: Experiment,
    state: Any,
) -> tuple[list[dict[str, Any]], int]:
    """Train with every alpha and learning rate asked for; (all trials, number of the best).

    The best has the lowest validation loss. A finished trial is on disk, the best one's weights stay there.

    Raises:
        UserError: no trial has a loss that is a number.
    """
    from core.training.trainer import Diverged

    hot = experiment.training.training_scenario == "hot"
    grid = list(
        product(start.alphas(experiment), experiment.training.lr_search or (experiment.training.learning_rate,))
    )
    trials: list[dict[str, Any]] = []
    best = 0
    for number, (alpha, rate) in enumerate(grid):
        place = trial_folder(folder, number)
        if not (place / DONE).is_file():
            log.info("trial %d of %d: alpha %s, learning rate %s", number + 1, len(grid), alpha, rate)
            trial: dict[str, Any] = {"alpha": alpha if hot else None, "learning_rate": rate}
            weights: dict[str, Tensor] = {}
            curve = None
            try:
                weights, curve = train_once(start, examples, validation, teacher, place, experiment, alpha, rate)
                trial |= {"validation": curve["final_validation"], "train": curve["train"][-1]["loss"]}
            except Diverged as error:
                if len(grid) == 1:
                    raise
                log.warning("trial %d: %s", number + 1, error)
                trial |= {"validation": None, "diverged": str(error)}
            if state.is_main_process:
                place.mkdir(parents=True, exist_ok=True)
                write_safetensors(place / WEIGHTS, unshared(weights))
                write_json(place / DONE, {"trial": trial, "curve": curve})
            state.wait_for_everyone()
        trials.append(read_json(place / DONE)["trial"])
        better = loss_of(trials[number]) < loss_of(trials[best])
        worse, best = (best, number) if better else (number, best)
        if state.is_main_process:
            for point in place.glob("checkpoint-*"):
                shutil.rmtree(point)
            if worse != best:
                (trial_folder(folder, worse) / WEIGHTS).unlink(missing_ok=True)
            if len(grid) > 1:
                write_json(folder / RESULTS, {"metric": "validation loss, nats per token", "trials": trials})
    if len(trials) > 1 and loss_of(trials[best]) == math.inf:
        told = trials[best].get("diverged", f"the validation loss is {trials[best]['validation']}")
        raise UserError(f"every trial diverged; the first: {told}")
    return trials, best


def trial_folder(folder: Path, number: int) -> Path:
    """Where a trial keeps its resume points, and in the end its weights and its curve."""
    return folder / "checkpoints" / f"trial{number}"


def loss_of(trial: dict[str, Any]) -> float:
    """What trials are compared by: a loss that is no number is never the best; a single trial needs no validation."""
    loss = trial["validation"]
    return loss if loss is not None and math.isfinite(loss) else math.inf


def train_once(
    start: Start,
    examples: list[Example],
    validation: list[Example],
    teacher: Any,
    place: Path,
    experiment: Experiment,
    alpha: float,
    learning_rate: float,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """One training: (all weights of the unfolded model after it, in float32 on the CPU, by its own names; its curve).

    Of a sharded model only the first process gets the weights.
    """
    from transformers import set_seed

    from core.training.adapters import add_lora, merge_lora
    from core.training.trainer import train

    set_seed(experiment.compute.seed)  # before the adapters are drawn: a trial is the same alone and in a search
    hot, layout = experiment.training.training_scenario == "hot", start.checkpoint.layout
    model = start.load(hot, alpha)
    if experiment.adapters.use_lora:
        adapted = add_lora(
            model,
            layout.family.tower,
            experiment.adapters.lora_rank,
            experiment.adapters.lora_alpha,
            experiment.adapters.lora_dropout,
            experiment.adapters.lora_targets,
        )
        log.info("LoRA of rank %d on %d layers", experiment.adapters.lora_rank, adapted)
    strategy = experiment.training.freeze_strategy if hot else "frozen_hot"
    for part, (trainable, frozen) in set_trainable(model, strategy, experiment.adapters.use_lora).items():
        if trainable + frozen:
            log.info("%-8s %12d trainable %12d frozen parameters", part, trainable, frozen)
    unused = layout.model_type not in TOWERS or (hot and alpha == 0)
    trainer, curve = train(model, examples, validation, place, experiment, learning_rate, teacher, unused)
    if experiment.adapters.use_lora:
        merge_lora(model)
    whole = trainer.accelerator.get_state_dict(trainer.model_wrapped) if trainer.sharded else model.state_dict()
    return {name: value.to("cpu") for name, value in (whole or {}).items()}, curve


def unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """With a copy of each that shares memory with one before it (tied weights), which safetensors refuses."""
    seen: set[int] = set()
    out = {}
    for name, value in tensors.items():
        out[name] = value.clone() if value.data_ptr() in seen else value.contiguous()
        seen.add(value.data_ptr())
    return out


def finish(
    start: Start,
    folder: Path,
    manifest: Manifest,
    experiment: Experiment,
    trials: list[dict[str, Any]],
    chosen: int,
    told: dict[str, Any],
) -> None:
    """Write the adapted checkpoint of the chosen trial, its curve and its card, and mark it complete."""
    from safetensors.torch import load_file

    from core.training.trainer import save_curve

    hot, best, place = experiment.training.training_scenario == "hot", trials[chosen], trial_folder(folder, chosen)
    curve = read_json(place / DONE)["curve"]
    save_folded(start, folder, load_file(place / WEIGHTS), hot, best["alpha"] or 0.0, experiment.output.max_shard_bytes)
    save_curve(folder, curve)
    settings = told["settings"]
    if len(trials) > 1:
        settings = {**settings, "chosen alpha": best["alpha"], "chosen learning rate": best["learning_rate"]}
        write_json(folder / RESULTS, {"metric": "validation loss, nats per token", "trials": trials, "chosen": chosen})
    write_rows_read(folder, told["read"], recorded(start.checkpoint, told["teacher"]))
    lineage = adapted_lineage(start.checkpoint, (start.made_by or {}).get("lineage"), hot, settings, told["teacher"])
    write_text(folder / CARD, adapted_card(lineage, told["data"], curve, told["counts"], told["method"]))
    losses = [point["loss"] for point in curve["train"]]
    manifest.finish(
        data=told["data"],
        losses=losses,
        validation=[point["loss"] for point in curve["validation"]],
        final_validation=curve["final_validation"],
        counts=told["counts"],
        distillation=told["method"],
        trials=trials,
        chosen=best,
        lineage=lineage,
        **provenance(),
    )
    log.info("%s is finished; training loss %.4f at first, %.4f at last", folder, losses[0], losses[-1])
    if curve["validation"]:
        log.info("validation loss %.4f before, %.4f after", curve["validation"][0]["loss"], curve["final_validation"])


def save_untrained(start: Start, folder: Path, experiment: Experiment) -> None:
    """Write what training starts from, folded, beside the adapted checkpoint: the ablation without training."""
    hot, alpha = experiment.training.training_scenario == "hot", start.alphas(experiment)[0]
    place = folder.with_name(f"{folder.name}-{UNTRAINED}")
    made_by = start.made_by and start.made_by["fingerprint"]
    manifest = Manifest.begin(
        place,
        UNTRAINED,
        {
            "model": start.checkpoint.identity,
            "made_by": made_by,
            "hot": hot,
            "alpha": alpha,
            "max_shard_size": experiment.output.max_shard_size,
        },
    )
    if not manifest.complete:
        state = {name: value.to("cpu") for name, value in start.load(hot, alpha).state_dict().items()}
        save_folded(start, place, state, hot, alpha, experiment.output.max_shard_bytes)
        write_rows_read(place, {}, recorded(start.checkpoint))
        manifest.finish(**provenance())
    log.info("%s holds what training starts from", place)


def repository(experiment: Experiment) -> str | None:
    """Hub repository of this checkpoint: stage 2 has pushed the fused one to `push_to_hub` itself."""
    suffix = {"hot": "adapted", "no_hot": "no-hot", "distill": "distilled"}[experiment.training.training_scenario]
    return experiment.output.push_to_hub and f"{experiment.output.push_to_hub}-{suffix}"


if __name__ == "__main__":
    run_command(main)
