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
import torch.nn.functional as F
from tqdm.auto import tqdm

from core.activations import token_batches
from core.card import add_results, results_section
from core.checkpoints import Checkpoint, open_checkpoint
from core.controls import CONTROLS, control_residual
from core.data import check_same_split, data_identity, load_rows, sft_example
from core.experiment import Experiment, open_pair, parse_command
from core.fusion import FusionSettings, Residual, Transport
from core.hot_residual import RESIDUAL_FILE, fold_bias, fold_weight, load_residuals, restore_base
from core.plans import PlanDirectory
from core.runs import Manifest, UserError, log_to_file, provenance, read_json, run_command, setup_logging, write_json

log = logging.getLogger("compare")
TRAINED = {"no_hot": "adapted/no_hot", "fused_adapted": "adapted/hot"}
SETTINGS = ("max_tokens", "tokens_per_batch", "seed", "dtype", "device")
ARMS = ("base", *CONTROLS, "fused", *TRAINED)


def main(argv: list[str]) -> None:
    setup_logging()
    command = parse_command(argv, "e", __doc__ or "", {"run_dir": "run directory (default runs/<name>)"})
    experiment = command.experiment
    run = command.paths["run_dir"] or command.path("run_dir", ".")
    plans = PlanDirectory(run / "plans", experiment.device)
    fused_manifest = Manifest.read(run / "fused", "fused")
    adapted = {arm: Manifest.read(run / place, "adapted") for arm, place in TRAINED.items()}
    check_chain(run, plans, fused_manifest, adapted)
    target, source = open_pair(experiment)
    plans.check_models(target, source)
    check_same_split(plans.manifest.inputs["data"], experiment.data_subset, experiment.data_file, experiment.split_seed)
    rows = load_rows(experiment.data_subset, "held_out", experiment.held_out_samples, experiment.split_seed,
                     experiment.data_file)  # fmt: skip
    general = [] if experiment.general_file is None else load_rows(
        "file", "held_out", experiment.held_out_samples, experiment.split_seed, experiment.general_file)  # fmt: skip
    tokenizer = target.load_tokenizer()
    sets = {name: [sft_example(row, tokenizer, experiment.max_tokens) for row in texts]
            for name, texts in (("held_out", rows), ("general", general)) if texts}  # fmt: skip
    log_to_file(command.log_file)
    inputs = {
        "fused": fused_manifest.record["fingerprint"],
        "data": data_identity(rows, experiment.data_subset, experiment.data_file, experiment.split_seed),
        "general": data_identity(general, "file", experiment.general_file, experiment.split_seed) if general else None,
        "adapted": {arm: manifest.record["fingerprint"] for arm, manifest in adapted.items()},
        "settings": {name: getattr(experiment, name) for name in SETTINGS},
    }  # fmt: skip
    path = run / "results.json"
    record = read_json(path) if path.is_file() else {}
    if record.get("inputs") != inputs:
        record = {"metric": "negative log-likelihood per token (nats)", "inputs": inputs, "per_text": {}}
    settings = FusionSettings(**fused_manifest.inputs["settings"])
    missing = [arm for arm in ARMS if arm not in record["per_text"]]
    for arm, sums in evaluate_arms(missing, run, plans, target, source, settings, sets, experiment):
        record["per_text"][arm] = sums  # each finished arm is on disk before the next begins
        write_json(path, record)
    for name, examples in sets.items():
        tokens = [sum(label != -100 for label in example["labels"][1:]) for example in examples]
        sums = {arm: record["per_text"][arm][name] for arm in ARMS}
        found = statistics(sums, tokens, experiment.bootstrap_samples, experiment.seed)
        record[name] = {"texts": len(examples), "tokens": sum(tokens)}
        record["arms" if name == "held_out" else "arms_general"] = found
    write_json(path, {**record, **provenance()})
    told = table(record["arms"], record["held_out"], record.get("arms_general"))
    for arm, place in {"fused": "fused", **TRAINED}.items():
        add_results(run / place, results_section(arm, inputs["data"], told))
    print(told)


def check_chain(run: Path, plans: PlanDirectory, fused: Manifest, adapted: dict[str, Manifest]) -> None:
    """Refuse (UserError) to compare stages that were not made from each other, or two trainings that differ in more
    than their start."""
    if fused.inputs["plans"] != plans.manifest.record["fingerprint"]:
        raise UserError(f"{run / 'fused'} was made from other plans; run core/generate_hot_residual.py again")
    settings = []
    for arm, manifest in adapted.items():
        if manifest.inputs["made_by"] != fused.record["fingerprint"]:
            raise UserError(f"{run / TRAINED[arm]} was made from another fused checkpoint; run stage 3 again")
        used = {key: value for key, value in manifest.inputs["settings"].items() if key != "training_scenario"}
        settings.append((used, manifest.inputs["data"]))
    if settings[0] != settings[1]:
        raise UserError(f"the two trainings in {run / 'adapted'} had other settings or data; run both with the same")


def evaluate_arms(
    arms: Sequence[str], run: Path, plans: PlanDirectory, target: Checkpoint, source: Checkpoint,
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
        residuals, alpha, form = load_residuals(run / "fused" / RESIDUAL_FILE)
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
            checkpoint = open_checkpoint(str(run / TRAINED.get(arm, arm)), None, experiment.trust_remote_code,
                                         experiment.device)  # fmt: skip
            yield measure(checkpoint.load_model(experiment.dtype), arm)


@torch.no_grad()
def fold_in_place(model: Any, residual: Residual, target: Checkpoint, alpha: float, form: str) -> None:
    """Write one projection's W_eff (and b_eff) into a loaded target."""
    linear = target.layout.linear(model, residual.layer, residual.projection)
    linear.weight.copy_(fold_weight(linear.weight, residual, alpha, form))
    if linear.bias is not None:
        linear.bias.copy_(fold_bias(linear.bias, residual, alpha, form))


@torch.inference_mode()
def text_nll(model: Any, examples: list[dict[str, list[int]]], tokens_per_batch: int, desc: str) -> list[float]:
    """Summed negative log-likelihood (nats) of the labelled tokens of every text, in text order."""
    out = [0.0] * len(examples)
    batches = token_batches([len(example["input_ids"]) for example in examples], tokens_per_batch)
    for batch in tqdm(batches, desc=f"evaluating {desc}", unit="batch"):
        longest = len(examples[batch[0]]["input_ids"])
        ids, mask, labels = (
            torch.tensor([fill(examples[n], longest) for n in batch], device=model.device)
            for fill in (
                lambda e, s: e["input_ids"] + [0] * (s - len(e["input_ids"])),
                lambda e, s: [1] * len(e["input_ids"]) + [0] * (s - len(e["input_ids"])),
                lambda e, s: e["labels"] + [-100] * (s - len(e["labels"])),
            )
        )
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()  # [B, S-1, V]
        losses = F.cross_entropy(logits.transpose(1, 2), labels[:, 1:], ignore_index=-100, reduction="none")
        for n, loss in zip(batch, losses.sum(1).tolist(), strict=True):
            out[n] = loss
    return out


def statistics(
    per_text: dict[str, list[float]], tokens: list[int], resamples: int, seed: int
) -> dict[str, dict[str, Any]]:
    """Per arm: nll per token, perplexity, n texts, difference to base and fused minus arm, each with a 95 % interval.

    The interval is a paired bootstrap over texts of the ratio sum(difference) / sum(tokens).
    """
    weights = np.asarray(tokens, dtype=float)
    draws = np.random.default_rng(seed).integers(len(tokens), size=(resamples, len(tokens)))
    out: dict[str, dict[str, Any]] = {}

    def paired(a: str, b: str) -> dict[str, Any]:
        difference = np.asarray(per_text[a]) - np.asarray(per_text[b])
        resampled = difference[draws].sum(1) / weights[draws].sum(1)
        low, high = np.quantile(resampled, (0.025, 0.975))
        return {"diff": float(difference.sum() / weights.sum()), "ci95": [float(low), float(high)],
                "better": int((difference < 0).sum())}  # fmt: skip

    for arm in ARMS:
        nll = sum(per_text[arm]) / sum(tokens)
        out[arm] = {"nll": nll, "ppl": float(np.exp(nll)), "n": len(tokens), **paired(arm, "base"),
                    "fused_minus_arm": paired("fused", arm)}  # fmt: skip
    out["fused_adapted"]["minus_no_hot"] = paired("fused_adapted", "no_hot")
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
    lines.append(f"After fine-tuning: fused_adapted minus no_hot = {interval(arms['fused_adapted']['minus_no_hot'])}.")
    if general:
        changes = ", ".join(f"{arm} {interval(general[arm])}" for arm in ("fused", "no_hot", "fused_adapted"))
        lines.append(f"On general text (base {general['base']['nll']:.4f}), minus base: {changes}.")
    return "\n".join(lines)


def interval(r: dict[str, Any]) -> str:
    """`-0.0400 [-0.0500, -0.0300]`."""
    return f"{r['diff']:+.4f} [{r['ci95'][0]:+.4f}, {r['ci95'][1]:+.4f}]"


if __name__ == "__main__":
    run_command(main)
