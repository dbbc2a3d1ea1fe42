#!/usr/bin/env python
"""Compare base, controls, fused and adapted models on held-out texts: one table that says whether fusion helped."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from tqdm.auto import tqdm

from core.card import add_results, results_section
from core.checkpoints import Checkpoint, open_checkpoint
from core.command import parse_command
from core.controls import CONTROLS, control_residual
from core.data import check_same_split, data_identity, load_rows
from core.experiment import Experiment, open_pair
from core.fusion import FusionSettings, Residual, Transport
from core.heldout import text_nll, trained_tokens
from core.hot_residual import RESIDUAL_FILE, fold_bias, fold_weight, load_residuals, restore_base
from core.plans import PlanDirectory
from core.runs import (
    Manifest,
    UserError,
    digest_of,
    hold,
    log_to_file,
    outputs_held,
    provenance,
    read_json,
    run_command,
    setup_logging,
    write_json,
)
from core.sft import sft_example
from evaluation.tasks import TRAINED

log = logging.getLogger("compare")


@outputs_held()
def main(argv: list[str]) -> None:
    setup_logging()
    command = parse_command(
        argv,
        "e",
        __doc__ or "",
        {"run_dir": "run directory (default runs/<name>)", "hot_dir": "plan directory (default plans, in it)"},
    )
    experiment = command.experiment
    run = command.paths["run_dir"] or command.path("run_dir", ".")
    plans = PlanDirectory(command.paths["hot_dir"] or run / "plans", experiment.device)
    fused_manifest = Manifest.read(run / "fused", "fused")
    adapted = trained_arms(run)
    check_chain(run, plans, fused_manifest, adapted)
    target, source = open_pair(experiment)
    plans.check_models(target, source)
    check_same_split(plans.manifest.inputs["data"], experiment.data_subset, experiment.data_file,
                     experiment.split_seed, experiment.max_samples)  # fmt: skip
    rows = load_rows(experiment.data_subset, "held_out", experiment.held_out_samples, experiment.split_seed,
                     experiment.data_file, experiment.max_samples)  # fmt: skip
    general = [] if experiment.general_file is None else load_rows(
        "file", "held_out", experiment.held_out_samples, experiment.split_seed, experiment.general_file)  # fmt: skip
    tokenizer = target.load_tokenizer()
    sets = {name: [sft_example(row, tokenizer, experiment.max_tokens) for row in texts]
            for name, texts in (("held_out", rows), ("general", general)) if texts}  # fmt: skip
    for name, examples in sets.items():
        if not sum(trained_tokens(examples)):
            raise UserError(f"the {name} texts have no token with loss within {experiment.max_tokens} tokens; raise "
                            "--max-tokens")  # fmt: skip
    hold(run)
    log_to_file(command.log_file("run_dir", "."))
    inputs = {
        "fused": fused_manifest.record["fingerprint"],
        "data": data_identity(rows, experiment.data_subset, experiment.data_file, experiment.split_seed,
                              experiment.max_samples),
        "general": data_identity(general, "file", experiment.general_file, experiment.split_seed) if general else None,
        "settings": experiment.deciding("e"),
    }  # fmt: skip
    path = run / "results.json"
    record = read_json(path) if path.is_file() else {}
    if record.get("inputs") != inputs:
        record = {"metric": "negative log-likelihood per token (nats)", "inputs": inputs, "per_text": {}}
    folders = {"fused": run / "fused",
               **{f"{arm}/{place.name}": place for arm, found in adapted.items() for place in found}}  # fmt: skip
    made_from = {**dict.fromkeys(("base", *CONTROLS, "fused"), digest_of(fused_manifest.record)),
                 **{f"{arm}/{place.name}": digest_of(manifest.record) for arm, found in adapted.items()
                    for place, manifest in found.items()}}  # fmt: skip
    before = record.get("made_from", {})
    kept = {arm: sums for arm, sums in record["per_text"].items()
            if arm in made_from and before.get(arm) == made_from[arm]}  # fmt: skip
    # No figures until all of them are there: those of an earlier run would stand beside new losses.
    record = {"metric": record["metric"], "inputs": inputs, "made_from": made_from, "per_text": kept}
    settings = FusionSettings(**fused_manifest.inputs["settings"])
    missing = [arm for arm in made_from if arm not in record["per_text"]]
    for arm, sums in evaluate_arms(missing, folders, plans, target, source, settings, sets, experiment):
        record["per_text"][arm] = sums  # each finished arm is on disk before the next begins
        write_json(path, record)
    for name, examples in sets.items():
        tokens = trained_tokens(examples)
        sums = {arm: record["per_text"][arm][name] for arm in made_from}
        found = statistics(sums, tokens, experiment.bootstrap_samples, experiment.seed)
        record[name] = {"texts": len(examples), "tokens": sum(tokens)}
        record["arms" if name == "held_out" else "arms_general"] = found
    write_json(path, {**record, **provenance()})
    told = table(record["arms"], record["held_out"], record.get("arms_general")) + searches(adapted)
    for arm, place in folders.items():
        add_results(place, results_section(arm, inputs["data"], told))
    print(told)


def trained_arms(run: Path) -> dict[str, dict[Path, Manifest]]:
    """Arm -> folder -> manifest of every training; the same seeds for all arms, which is what is compared. Distillation
    may be missing, or all: empty when nothing was trained.

    Raises:
        UserError: a training that is missing or not finished.
    """
    found = {arm: {path.name: path for path in sorted((run / place).glob("seed*[0-9]"))}
             for arm, place in TRAINED.items()}  # fmt: skip
    if not any(found.values()):
        return {}
    if not found["distill"]:
        del found["distill"]
    seeds = sorted(set().union(*found.values()))
    return {arm: {run / TRAINED[arm] / seed: Manifest.read(run / TRAINED[arm] / seed, "adapted") for seed in seeds}
            for arm in found}  # fmt: skip


def searches(adapted: dict[str, dict[Path, Manifest]]) -> str:
    """A line of the table when an arm was chosen among several trials: it had more chances than the others."""
    trials = {arm: max(len(manifest.record["trials"]) for manifest in found.values())
              for arm, found in adapted.items()}  # fmt: skip
    if set(trials.values()) <= {1}:
        return ""
    counts = ", ".join(f"{arm} {count}" for arm, count in trials.items())
    return f"\nEach training is the best of so many trials, chosen on validation rows: {counts}."


def check_chain(run: Path, plans: PlanDirectory, fused: Manifest, adapted: dict[str, dict[Path, Manifest]]) -> None:
    """Refuse (UserError) to compare stages that were not made from each other, or trainings that differ in more than
    their start, their teacher and their seed."""
    if fused.inputs["plans"] != plans.manifest.record["fingerprint"]:
        raise UserError(f"{run / 'fused'} was made from other plans; run core/generate_hot_residual.py again")
    settings = []
    for place, manifest in (pair for found in adapted.values() for pair in found.items()):
        if manifest.inputs["made_by"] != fused.record["fingerprint"]:
            raise UserError(f"{place} was made from another fused checkpoint; run stage 3 again")
        used = {key: value for key, value in manifest.inputs["settings"].items()
                if key not in ("training_scenario", "seed")}  # fmt: skip
        settings.append((used, manifest.inputs["data"], manifest.inputs["validation"]))
    if any(other != settings[0] for other in settings):
        raise UserError(f"the trainings in {run / 'adapted'} had other settings or data; run all with the same")


def evaluate_arms(
    arms: Sequence[str], folders: dict[str, Path], plans: PlanDirectory, target: Checkpoint, source: Checkpoint,
    settings: FusionSettings, sets: dict[str, list[dict[str, list[int]]]], experiment: Experiment,
) -> Iterator[tuple[str, dict[str, list[float]]]]:  # fmt: skip
    """(arm, {set of texts: negative log-likelihood of each text in nats}) of each arm asked for.

    base and controls share one loaded target; fused and adapted arms are the folders on disk, loaded by stock
    transformers.
    """
    size = experiment.tokens_per_batch

    def measure(model: Any, arm: str) -> tuple[str, dict[str, list[float]]]:
        return arm, {name: text_nll(model, texts, size, f"{arm}, {name}") for name, texts in sets.items()}

    in_memory = [arm for arm in arms if arm == "base" or arm in CONTROLS]
    if in_memory:
        residuals, alpha, form = load_residuals(folders["fused"] / RESIDUAL_FILE)
        residuals = [residual.to(target.device) for residual in residuals]
        model = target.load_model(experiment.dtype)
        transport = Transport(plans, source, settings)
        for arm in in_memory:
            changed = [] if arm == "base" else residuals
            generator = torch.Generator().manual_seed(experiment.seed)
            for residual in tqdm(changed, desc=f"building {arm}", unit="projection", disable=not changed):
                control = control_residual(arm, residual, plans, transport, generator)
                fold_in_place(model, control, target, alpha, form)
            yield measure(model, arm)
            restore_base(model, changed, target.layout.name)
        del model
    for arm in arms:
        if arm not in in_memory:
            checkpoint = open_checkpoint(str(folders[arm]), None, experiment.trust_remote_code,
                                         experiment.device)  # fmt: skip
            yield measure(checkpoint.load_model(experiment.dtype), arm)


@torch.no_grad()
def fold_in_place(model: Any, residual: Residual, target: Checkpoint, alpha: float, form: str) -> None:
    """Write one projection's W_eff (and b_eff) into a loaded target."""
    linear = target.layout.linear(model, residual.layer, residual.projection)
    linear.weight.copy_(fold_weight(linear.weight, residual, alpha, form))
    if linear.bias is not None:
        linear.bias.copy_(fold_bias(linear.bias, residual, alpha, form))


def statistics(
    per_text: dict[str, list[float]], tokens: list[int], resamples: int, seed: int
) -> dict[str, dict[str, Any]]:
    """Per arm: nll per token, perplexity, n texts, difference to base and fused minus arm, each with a 95 % interval.

    Trainings `arm/seedN` are one arm: the mean of their losses on each text; `seeds` holds the difference of each. The
    interval is a paired bootstrap of the ratio sum(difference) / sum(tokens) over texts, and over seeds where there are
    several.
    """
    weights = np.asarray(tokens, dtype=float)
    draws = np.random.default_rng(seed).integers(len(tokens), size=(resamples, len(tokens)))
    runs: dict[str, dict[str, np.ndarray]] = {}
    for name, sums in per_text.items():
        arm, _, run = name.partition("/")
        runs.setdefault(arm, {})[run] = np.asarray(sums)
    mean = {arm: np.mean(list(found.values()), axis=0) for arm, found in runs.items()}
    out: dict[str, dict[str, Any]] = {}

    def paired(a: str, b: str) -> dict[str, Any]:
        """Of arm a minus arm b, each seed against the same one where both have it."""
        seeds = runs[a] if "" not in runs[a] else runs[b]
        by_seed = {run: runs[a].get(run, mean[a]) - runs[b].get(run, mean[b]) for run in seeds}
        count = len(by_seed)
        chosen = np.random.default_rng(seed + 1).multinomial(count, [1 / count] * count, size=resamples) / count
        resampled = sum(difference[draws].sum(1) * chosen[:, n] for n, difference in enumerate(by_seed.values()))
        low, high = np.quantile(resampled / weights[draws].sum(1), (0.025, 0.975))
        difference = mean[a] - mean[b]
        each = {run: float(found.sum() / weights.sum()) for run, found in by_seed.items() if run}
        return {"diff": float(difference.sum() / weights.sum()), "ci95": [float(low), float(high)],
                "better": int((difference < 0).sum()), **({"seeds": each} if each else {})}  # fmt: skip

    for arm in mean:
        nll = float(mean[arm].sum() / weights.sum())
        out[arm] = {"nll": nll, "ppl": float(np.exp(nll)), "n": len(tokens), **paired(arm, "base"),
                    "fused_minus_arm": paired("fused", arm)}  # fmt: skip
    for rival in TRAINED:
        if rival in mean and rival != "fused_adapted":
            out["fused_adapted"][f"minus_{rival}"] = paired("fused_adapted", rival)
    return out


def table(
    arms: dict[str, dict[str, Any]], held_out: dict[str, int], general: dict[str, dict[str, Any]] | None = None
) -> str:
    """The table that ends the pipeline, with one sentence of verdict; `general` are the arms on general text."""
    lines = [
        f"held out: {held_out['texts']} texts, {held_out['tokens']} tokens; nats per token, negative is better",
        f"{'arm':14} {'nll':>8} {'ppl':>8}  {'minus base [95 %]':>27} {'better':>10}  {'fused minus arm [95 %]':>27}",
    ]
    for arm, r in arms.items():
        base = "" if arm == "base" else interval(r)
        better = "" if arm == "base" else f"{r['better']} of {r['n']}"
        versus = "" if arm == "fused" else interval(r["fused_minus_arm"])
        lines.append(f"{arm:14} {r['nll']:8.4f} {r['ppl']:8.2f}  {base:>27} {better:>10}  {versus:>27}")
    rivals = ("base", *CONTROLS)
    lost = [arm for arm in rivals if arms[arm]["fused_minus_arm"]["ci95"][1] >= 0]
    if lost:
        lines.append(f"No transfer shown: fused is not reliably better than {', '.join(lost)}.")
    else:
        lines.append("Transfer: without training, fused is better than base and than every control (95 % intervals).")
    for rival in ("no_hot", "distill"):
        if rival in arms:
            found = arms["fused_adapted"][f"minus_{rival}"]
            lines.append(f"After fine-tuning: fused_adapted minus {rival} = {interval(found)}{by_seed(found)}.")
    if general:
        changes = ", ".join(f"{arm} {interval(general[arm])}" for arm in ("fused", *TRAINED) if arm in general)
        lines.append(f"On general text (base {general['base']['nll']:.4f}), minus base: {changes}.")
    return "\n".join(lines)


def by_seed(r: dict[str, Any]) -> str:
    """`; by seed -0.04, -0.05`; nothing for one seed."""
    found = r.get("seeds", {})
    return "; by seed " + ", ".join(f"{value:+.4f}" for value in found.values()) if len(found) > 1 else ""


def interval(r: dict[str, Any]) -> str:
    """`-0.0400 [-0.0500, -0.0300]`."""
    return f"{r['diff']:+.4f} [{r['ci95'][0]:+.4f}, {r['ci95'][1]:+.4f}]"


if __name__ == "__main__":
    run_command(main)
