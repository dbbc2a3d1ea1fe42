#!/usr/bin/env python
"""Compare base, controls, fused and adapted models on held-out texts: one table that says whether fusion helped."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from tqdm.auto import tqdm

from core.errors import UserError
from core.files import digest_of, read_json, write_json
from core.fusion.controls import CONTROLS
from core.fusion.residual import Residual, fold_bias, fold_weight
from core.fusion.residual_file import RESIDUAL_FILE, load_residuals
from core.fusion.settings import FusionSettings
from core.fusion.transport_weights import Transport
from core.locks import hold, outputs_held
from core.manifest import FORMAT_VERSION, Manifest, provenance
from core.models.checkpoints import Checkpoint, open_checkpoint, open_pair
from core.runs.card import add_results, results_section
from core.runs.command_line import parse_command
from core.runs.plan_directory import PlanDirectory
from core.runs.process import log_to_file, run_command, setup_logging
from core.runs.settings import Experiment, of_one_scenario
from core.training.heldout import text_nll
from core.training.hot_linear import restore_base
from evaluation.benchmarks.registry import TRAINED
from evaluation.texts import TextSet, text_sets
from evaluation.verdict import statistics, table

log = logging.getLogger("compare")


@outputs_held()
def main(argv: list[str]) -> None:
    setup_logging()
    command = parse_command(
        argv,
        "e",
        __doc__ or "",
        {"run_dir": "run directory (default runs/<name>)", "hot_dir": "plan directory (default plans, in it)"},
        modes={"dry_run": "check everything that can be checked without loading a model, print it, and stop"},
    )
    if "dry_run" in command.modes and (waiting := command.waits_for("hot_dir", "plans", "plans")):
        print(waiting)
        return
    experiment = command.experiment
    run = command.paths["run_dir"] or command.path("run_dir", ".")
    in_run = command.paths["run_dir"] is not None and command.paths["hot_dir"] is None
    plans = PlanDirectory(run / "plans" if in_run else command.path("hot_dir", "plans"), experiment.compute.device)
    fused_manifest = Manifest.read(run / "fused", "fused")
    adapted = trained_arms(run)
    check_chain(run, plans, fused_manifest, adapted)
    target, source = open_pair(experiment.models, experiment.compute.device)
    plans.check_models(target, source)
    stages = [plans.folder, run / "fused", *(place for found in adapted.values() for place in found)]
    sets = text_sets(experiment, plans.manifest.inputs["data"], stages, target.load_tokenizer())
    hold(run)
    log_to_file(command.log_file("run_dir", "."))
    folders = {"fused": run / "fused"}
    impossible = impossible_controls(plans.shape[0])
    untrained = ("base", *(control for control in CONTROLS if control not in impossible), "fused")
    made_from = dict.fromkeys(untrained, digest_of(fused_manifest.record))
    for arm, found in adapted.items():
        folders |= {f"{arm}/{place.name}": place for place in found}
        made_from |= {f"{arm}/{place.name}": digest_of(manifest.record) for place, manifest in found.items()}
    inputs = {
        "fused": fused_manifest.record["fingerprint"],
        "data": sets["held_out"].identity,
        "general": sets["general"].identity if "general" in sets else None,
        "settings": experiment.deciding("e"),
    }
    path = run / "results.json"
    record = begun(path, inputs, made_from)
    record["near_duplicates"] = {name: texts.near_duplicates for name, texts in sets.items()}
    settings = FusionSettings(**fused_manifest.inputs["settings"])
    missing = [arm for arm in made_from if arm not in record["per_text"]]
    for arm, sums in evaluate_arms(missing, folders, plans, target, source, settings, sets, experiment):
        record["per_text"][arm] = sums  # each finished arm is on disk before the next begins
        write_json(path, record)
    for name, texts in sets.items():
        sums = {arm: record["per_text"][arm][name] for arm in made_from}
        record[name] = texts.counts()
        record["arms" if name == "held_out" else "arms_general"] = statistics(sums, texts.tokens, texts.groups)
    record["held_out"]["absent"] = impossible
    write_json(path, {**record, **provenance()})
    told = table(record["arms"], record["held_out"], record.get("arms_general"), record.get("general"))
    told += searches(adapted)
    print(told)
    for arm, place in folders.items():
        try:
            add_results(place, results_section(arm, inputs["data"], told))
        except UserError as error:  # another command works on the folder; the results themselves are written
            log.warning("the results are not in the card of %s: %s", place, error)


def begun(path: Path, inputs: Mapping[str, Any], made_from: Mapping[str, str]) -> dict[str, Any]:
    """The results to go on with: of an earlier run with the same inputs the losses of those arms that are still the
    same models. Its figures go, because they would stand beside new losses until all of these are there."""
    before = read_json(path) if path.is_file() else {}
    same = (before.get("format"), before.get("inputs")) == (FORMAT_VERSION, inputs)
    models, losses = before.get("made_from", {}), before.get("per_text", {}) if same else {}
    return {
        "format": FORMAT_VERSION,
        "metric": "negative log-likelihood per token (nats)",
        "inputs": inputs,
        "made_from": made_from,
        "per_text": {arm: sums for arm, sums in losses.items() if models.get(arm) == made_from.get(arm, "gone")},
    }


def impossible_controls(n_layers: int) -> dict[str, str]:
    """Controls that this target cannot have -> why."""
    if n_layers > 1:
        return {}
    return {"wrong_layer": "the target has one layer, so that W~ of another layer does not exist"}


def trained_arms(run: Path) -> dict[str, dict[Path, Manifest]]:
    """Arm -> folder -> manifest of every training; the same seeds for all arms, which is what is compared. Distillation
    may be missing, or all: empty when nothing was trained.

    Raises:
        UserError: a training that is missing or not finished.
    """
    found = {
        arm: {path.name: path for path in sorted((run / place).glob("seed*[0-9]"))} for arm, place in TRAINED.items()
    }
    if not any(found.values()):
        return {}
    if not found["distill"]:
        del found["distill"]
    seeds = sorted(set().union(*found.values()))
    return {
        arm: {run / TRAINED[arm] / seed: Manifest.read(run / TRAINED[arm] / seed, "adapted") for seed in seeds}
        for arm in found
    }


def searches(adapted: dict[str, dict[Path, Manifest]]) -> str:
    """A line of the table when an arm was chosen among several trials: it had more chances than the others."""
    trials = {arm: max(len(manifest.record["trials"]) for manifest in found.values()) for arm, found in adapted.items()}
    if set(trials.values()) <= {1}:
        return ""
    counts = ", ".join(f"{arm} {count}" for arm, count in trials.items())
    return f"\nEach training is the best of so many trials, chosen on validation rows: {counts}."


def check_chain(run: Path, plans: PlanDirectory, fused: Manifest, adapted: dict[str, dict[Path, Manifest]]) -> None:
    """Refuse (UserError) to compare stages that were not made from each other, or trainings that differ in more than
    their start, their teacher, what only their scenario has, and their seed."""
    if fused.inputs["plans"] != plans.manifest.record["fingerprint"]:
        raise UserError(f"{run / 'fused'} was made from other plans; run core/generate_hot_residual.py again")
    own, shared = {"training_scenario", *of_one_scenario()}, []
    for found in adapted.values():
        scenario = []
        for place, manifest in found.items():
            if manifest.inputs["made_by"] != fused.record["fingerprint"]:
                raise UserError(f"{place} was made from another fused checkpoint; run stage 3 again")
            used = {key: value for key, value in manifest.inputs["settings"].items() if key != "seed"}
            scenario.append({key: value for key, value in used.items() if key in own})
            rest = {key: value for key, value in used.items() if key not in own}
            shared.append((rest, manifest.inputs["data"], manifest.inputs["validation"]))
        if any(other != scenario[0] for other in scenario) or any(other != shared[0] for other in shared):
            raise UserError(f"the trainings in {run / 'adapted'} had other settings or data; run all with the same")


def evaluate_arms(
    arms: Sequence[str],
    folders: dict[str, Path],
    plans: PlanDirectory,
    target: Checkpoint,
    source: Checkpoint,
    settings: FusionSettings,
    sets: Mapping[str, TextSet],
    experiment: Experiment,
) -> Iterator[tuple[str, dict[str, list[float]]]]:
    """(arm, {set of texts: negative log-likelihood of each text in nats}) of each arm asked for.

    base and controls share one loaded target; fused and adapted arms are the folders on disk, loaded by stock
    transformers.

    Raises:
        UserError: a loss that is not finite.
    """
    size = experiment.compute.tokens_per_batch

    def measure(model: Any, arm: str) -> tuple[str, dict[str, list[float]]]:
        sums = {name: text_nll(model, texts.examples, size, f"{arm}, {name}") for name, texts in sets.items()}
        for name, losses in sums.items():
            check_finite(losses, arm, name)
        return arm, sums

    in_memory = [arm for arm in arms if arm == "base" or arm in CONTROLS]
    if in_memory:
        residuals, alpha, form = load_residuals(folders["fused"] / RESIDUAL_FILE)
        residuals = [residual.to(target.device) for residual in residuals]
        model = target.load_model(experiment.compute.dtype)
        transport = Transport(plans, source, settings)
        for arm in in_memory:
            changed = [] if arm == "base" else residuals
            generator = torch.Generator().manual_seed(experiment.compute.seed)
            for residual in tqdm(changed, desc=f"building {arm}", unit="projection", disable=not changed):
                control = CONTROLS[arm](residual, transport, generator)
                fold_in_place(model, control, target, alpha, form)
            yield measure(model, arm)
            restore_base(model, changed, target.layout.name)
        del model
    for arm in arms:
        if arm not in in_memory:
            checkpoint = open_checkpoint(
                str(folders[arm]), None, experiment.models.trust_remote_code, experiment.compute.device
            )
            yield measure(checkpoint.load_model(experiment.compute.dtype), arm)


def check_finite(losses: Sequence[float], arm: str, name: str) -> None:
    """Refuse (UserError) losses with which nothing can be compared: one NaN makes every mean NaN."""
    bad = [number for number, loss in enumerate(losses, 1) if not math.isfinite(loss)]
    if bad:
        raise UserError(
            f"{arm}: the loss of {len(bad)} of {len(losses)} {name} texts is not finite, first that of text {bad[0]} "
            f"({losses[bad[0] - 1]}); the model is damaged or overflows: look for NaN in its weights, make it again "
            "with a smaller alpha or learning rate, or compute with --dtype float32"
        )


@torch.no_grad()
def fold_in_place(model: Any, residual: Residual, target: Checkpoint, alpha: float, form: str) -> None:
    """Write one projection's W_eff (and b_eff) into a loaded target."""
    linear = target.layout.linear(model, residual.layer, residual.projection)
    linear.weight.copy_(fold_weight(linear.weight, residual, alpha, form))
    if linear.bias is not None:
        linear.bias.copy_(fold_bias(linear.bias, residual, alpha, form))


if __name__ == "__main__":
    run_command(main)
