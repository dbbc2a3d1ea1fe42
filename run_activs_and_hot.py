#!/usr/bin/env python
"""Stage 1: two models + texts -> plan directory (activations, feature plans Q, layer plans P, selection)."""

from __future__ import annotations

import dataclasses
import gc
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from core.data import Row, divide
from core.errors import UserError
from core.files import MANIFEST, TEMPORARY, read_json
from core.fusion.projections import SIDES
from core.hot_transport import (
    SinkhornResult,
    compute_P,
    correlation_cost_rows,
    reconstruction_fit,
    reconstruction_overlaps,
    solve_layer,
    standardize_layer,
)
from core.locks import outputs_held
from core.manifest import Manifest, check_output_folder, provenance
from core.models.activations import extract, row_bytes
from core.models.checkpoints import Checkpoint, open_pair
from core.models.locate import missing_step
from core.models.reading import Reading, is_aside, read_aligned, read_texts, text_batches
from core.runs import cost, plan_directory
from core.runs import preflight as checks
from core.runs.command_line import parse_command, save_resolved
from core.runs.process import log_to_file, process_state, run_command, setup_logging
from core.runs.rows_read import recorded, write_rows_read
from core.runs.settings import MIN_TEXTS, Experiment
from core.transport.sinkhorn import no_cost

log = logging.getLogger("stage1")


@outputs_held()
def main(argv: list[str]) -> None:
    setup_logging()
    command = parse_command(
        argv,
        "1",
        __doc__ or "",
        {"out_dir": "plan directory to write (default runs/<name>/plans)"},
        {"model_a_path": "source_model", "model_b_path": "target_model"},
        {
            "plan_only": "print what this would cost, from the two configs alone, and stop",
            "dry_run": "check everything that can be checked without loading a model, print it, and stop",
        },
    )
    experiment = command.experiment.changed(epsilon=command.experiment.epsilon)
    if "plan_only" in command.modes:
        print(cost.estimate(experiment))
        return
    dry_run = "dry_run" in command.modes
    if dry_run and (waiting := models_to_fetch(experiment)):
        print(cost.estimate(experiment, timed=False))
        print(f"{'; '.join(waiting)}: its tensors, tokenizer and the disk are checked after that")
        return
    folder = command.path("out_dir", "plans")
    target, source = open_pair(experiment.models, experiment.compute.device)
    check_output_folder(folder, target.folder, source.folder)
    preflight(target, source, folder, experiment, dry_run)
    division = divide(experiment.data.spec)
    for part in ("sft", "validation", "held_out"):  # later stages need them, when it is too late to split anew
        division.warn_if_small(part)
    rows = division.rows("calibration", experiment.reading.calibration_samples)
    if len(rows) < MIN_TEXTS:
        raise UserError(f"{len(rows)} calibration texts; plans need at least {MIN_TEXTS} texts: give more data")
    if dry_run:
        target.check_tokenizer()
        source.check_tokenizer()
        print(f"{len(rows)} texts; nothing is missing")
        return
    readings, aside = read_both(target, source, rows, experiment)
    settings = experiment.deciding("1")
    data = division.identity(rows)
    state = process_state(experiment.compute.device)
    inputs = {"target": target.identity, "source": source.identity, "data": data, "settings": settings}
    if state.is_main_process:
        Manifest.begin(folder, plan_directory.STAGE, inputs)
    state.wait_for_everyone()
    manifest = Manifest(folder, read_json(folder / MANIFEST))
    log_to_file(command.log_file("out_dir", "plans") if state.is_main_process else None)
    if manifest.complete:
        log.info("%s is finished already", folder)
    else:
        if state.is_main_process:
            save_resolved(experiment, "1", folder)
            write_rows_read(folder, {"calibration": division.marks(rows)}, recorded(target, source))
        record_activations(folder, {"target": target, "source": source}, readings, aside, experiment, state)
        state.wait_for_everyone()
        make_plans(folder, manifest, (target.layout.n_layers, source.layout.n_layers), experiment, state)
        if state.is_main_process:
            shutil.rmtree(folder / "plans" / "parts", ignore_errors=True)
            for name in readings:  # of a run that was killed before it removed them
                plan_directory.remove_shares(folder, name)
            shapes = {name: vars(c.layout) for name, c in (("target", target), ("source", source))}
            manifest.finish(shapes=shapes, rows=readings["target"].n_rows, **provenance())
            log.info("%s is finished", folder)
    if state.is_main_process:
        print(summary(manifest.record))


def models_to_fetch(experiment: Experiment) -> list[str]:
    """The models of which only the config can be read now, with what they wait for."""
    pair = {
        "target": (experiment.models.target_model, experiment.models.target_revision),
        "source": (experiment.models.source_model, experiment.models.source_revision),
    }
    found = {role: (name, missing_step(name, revision)) for role, (name, revision) in pair.items() if name}
    return [f"{role} {name} waits for {what}" for role, (name, what) in found.items() if what]


def preflight(target: Checkpoint, source: Checkpoint, folder: Path, experiment: Experiment, report: bool) -> None:
    """Check models, disk and memory from configs and headers; print them when `report`. Raises UserError."""
    small, large = (cost.opened_model(model, experiment.compute.dtype) for model in (target, source))
    estimate = cost.stage1_cost(small, large, experiment, timed=False)
    if report:
        print(checks.stage1_report(target, source, estimate))
    problems = [
        *checks.model_problems("target", target),
        *checks.model_problems("source", source),
        *checks.disk_problems(folder, estimate.disk),
    ]
    short = checks.memory_problems(estimate.memory, experiment.compute.device)
    if report:
        problems += short
    elif short:
        log.warning(short[0])  # an estimate alone stops nobody
    checks.refuse(problems)


def read_both(
    target: Checkpoint, source: Checkpoint, rows: list[Row], experiment: Experiment
) -> tuple[dict[str, Reading], Tensor]:
    """Token ids and row positions of both models, and which rows are kept aside."""
    tokenizers = target.load_tokenizer(), source.load_tokenizer()
    if experiment.reading.pooling == "token":
        to_target, to_source, aside = read_aligned(
            rows, *tokenizers, experiment.reading.max_tokens, experiment.reading.max_rows, experiment.compute.seed
        )
    else:
        to_target, to_source = (read_texts(rows, tokenizer, experiment.reading.max_tokens) for tokenizer in tokenizers)
        aside = torch.tensor([is_aside(number) for number in range(len(rows))])
    return {"target": to_target, "source": to_source}, aside


def record_activations(
    folder: Path,
    models: dict[str, Checkpoint],
    readings: dict[str, Reading],
    aside: Tensor,
    experiment: Experiment,
    state: Any,
) -> None:
    """Extract and write the rows of one model after the other; what is on disk already is kept.

    Several processes share the batches, which are those of a single one, and hand their rows to the first by files.
    """
    selected = (folder / "selection.safetensors").is_file()
    there = {name: plan_directory.activations_file(folder, name).is_file() for name in models}
    budget = experiment.reading.activations_budget_mb * 2**20
    for name in [name for name in models if not (there[name] and (name == "source" or selected))]:
        checkpoint, reading = models[name], readings[name]
        if state.num_processes > 1:
            read_share(folder, name, checkpoint, reading, experiment, state)
            state.wait_for_everyone()
        if not state.is_main_process:
            continue
        with plan_directory.row_memory(folder, row_bytes(checkpoint.layout, reading.n_rows), budget) as allocate:
            if state.num_processes > 1:
                rows = plan_directory.join_shares(folder, name, state.num_processes, checkpoint.layout, allocate)
            else:
                batches = text_batches(reading, experiment.compute.tokens_per_batch)
                rows = read_rows(folder, name, checkpoint, reading, batches, experiment, allocate)
            strengths = plan_directory.write_activations(
                folder, name, rows, aside, half=experiment.reading.pooling == "token"
            )
        if name == "target":
            plan_directory.write_selection(folder, strengths)
        plan_directory.remove_shares(folder, name)


def read_share(
    folder: Path, name: str, checkpoint: Checkpoint, reading: Reading, experiment: Experiment, state: Any
) -> None:
    """Read and write this process's share of the batches of one model, unless an earlier run has done so."""
    path = plan_directory.share_file(folder, name, state.process_index, state.num_processes)
    if path.is_file():
        return
    batches = text_batches(reading, experiment.compute.tokens_per_batch)[state.process_index :: state.num_processes]
    numbers = reading.row_numbers(n for batch in batches for n in batch)
    needed = row_bytes(checkpoint.layout, len(numbers))
    with plan_directory.row_memory(folder, needed, experiment.reading.activations_budget_mb * 2**20) as allocate:
        plan_directory.write_share(
            path, read_rows(folder, name, checkpoint, reading, batches, experiment, allocate), numbers
        )


def read_rows(
    folder: Path,
    name: str,
    checkpoint: Checkpoint,
    reading: Reading,
    batches: list[list[int]],
    experiment: Experiment,
    allocate: Callable[[int, int], Tensor],
) -> dict[tuple[str, int], Tensor]:
    """Load a model, read batches of texts with it, and let it go. What it offloads goes to a temporary folder."""
    with tempfile.TemporaryDirectory(prefix=TEMPORARY + "offload-", dir=folder) as offload:
        model = checkpoint.load_model(experiment.compute.dtype, experiment.reading.device_map, Path(offload))
        rows = extract(model, checkpoint.layout, reading, batches, f"{name} activations", allocate)
        del model
        gc.collect()
    return rows


def make_plans(folder: Path, manifest: Manifest, shape: tuple[int, int], experiment: Experiment, state: Any) -> None:
    """Solve what is not on disk yet: all L x M feature plans of every side, then its layer plan.

    Target layers are shared by the processes; each layer's plans are on disk before the next one begins.
    """
    L, M = shape
    sides = manifest.record.setdefault("sides", {})
    with tqdm(total=len(SIDES) * L * M, desc="plans", unit="pair", disable=not state.is_main_process) as bar:
        for side in SIDES:
            todo = side not in sides or not plan_directory.plans_file(folder, side).is_file()
            if todo:
                solve_side(folder, side, shape, experiment, state, bar)
                state.wait_for_everyone()
            if todo and state.is_main_process:
                tensors, measured = plan_directory.join_parts(
                    folder,
                    side,
                    L,
                    lambda costs: compute_P(costs, experiment.transport.eta, experiment.transport.layer_cost_scale),
                )
                sides[side] = describe(tensors, measured)
                manifest.save()
            state.wait_for_everyone()
            bar.n = (list(SIDES).index(side) + 1) * L * M
            bar.refresh()
    missed = {side: record["not_converged"] for side, record in sides.items() if record["not_converged"]}
    if missed and experiment.transport.sinkhorn_mode == "auto":
        pairs = "; ".join(
            f"{side} {len(found)}, e.g. (target, source) layers {found[:3]}" for side, found in missed.items()
        )
        log.warning(
            "plans that did not reach the tolerance %.0e: %s; raise --sinkhorn-iters or --epsilon",
            experiment.transport.sinkhorn_tol,
            pairs,
        )


def solve_side(folder: Path, side: str, shape: tuple[int, int], experiment: Experiment, state: Any, bar: tqdm) -> None:
    """This process's share of one side's target layers."""

    def standardized(model: str, layer: int) -> Tensor:
        return standardize_layer(
            plan_directory.read_layer(folder, model, side, layer, experiment.compute.device), model, layer
        )

    L, M = shape
    T, m = plan_directory.read_layer(folder, "source", side, 0).shape
    budget, rows = experiment.transport.pairs_budget_mb * 2**20, 4 * M * T * m
    fits = rows <= budget  # a part of the layers would be of no use: each would be dropped before it is read again
    source = lru_cache(M if fits else 0)(lambda k: standardized("source", k))
    e = experiment
    problem = (e.epsilon, e.transport.sinkhorn_iters, e.transport.sinkhorn_tol, e.transport.sinkhorn_mode)
    probe = torch.linspace(0, T - 1, min(T, cost.PROBE_ROWS)).round().long()
    for layer in range(state.process_index, L, state.num_processes):
        if plan_directory.part_file(folder, side, layer).is_file():
            continue
        target = standardized("target", layer)
        found = solve_layer(target, map(source, range(M)), *problem, probe, budget - fits * rows)
        results, probed = keep_potentials(found, M, lambda: bar.update(state.num_processes))
        overlaps = reconstruction_overlaps(target[probe], probed)
        k = round(layer * (M - 1) / max(1, L - 1))
        cost_rows = correlation_cost_rows(target, source(k))
        largest = dataclasses.replace(results[k], cost_rows=cost_rows).top_mass(max(target.shape[1], m))
        del cost_rows  # which holds a layer of rows
        plan_directory.write_part(folder, side, layer, results, {**overlaps, "top_mass": torch.tensor(largest)})


def keep_potentials(
    found: Iterable[SinkhornResult], count: int, advance: Callable[[], object]
) -> tuple[list[SinkhornResult], Tensor]:
    """What is written of the plans of one target layer: (results without their cost, what was probed [M, n, r]).

    A result with its cost holds the rows of its source layer, so that M of them would hold those of all. The potentials
    go to memory that the first result takes for all: small tensors that come one by one would settle in what a layer of
    rows leaves behind, and the next layer, which then does not fit there, would take more memory.
    """
    places: list[Tensor] = []

    def keep(result: SinkhornResult, k: int) -> SinkhornResult:
        values = [value for value in (result.f, result.g, result.probed) if value is not None]
        if not places:
            places.extend(value.new_empty(count, *value.shape) for value in values)
        for place, value in zip(places, values, strict=True):
            place[k] = value
        advance()
        return dataclasses.replace(result, f=places[0][k], g=places[1][k], probed=None, cost_rows=no_cost)

    # A loop's variable would hold a layer while the next one is read. `found` goes first, so that it comes to its end.
    results = list(map(keep, found, range(count)))
    return results, places[2]


def describe(tensors: dict[str, Tensor], measured: dict[str, Tensor]) -> dict[str, Any]:
    """Iterations, errors, layer match and fit of one side.

    `depth_spearman`: how the most similar source layer (arg max of P) follows target depth, the first sign that plans
    mean something. `r2`: share of the target's z-scored activations that the source's explain through P and Q (Eqs.
    31-34), mean over layers, on up to 64 rows; `permuted`: the same with the neurons of every plan shuffled.
    `top_mass`: share of a plan's mass in its max(n, m) largest entries, with the source layer of the same depth.
    """
    from scipy.stats import spearmanr

    matched = tensors["P"].argmax(1)
    rank = float(spearmanr(range(len(matched)), matched.tolist()).statistic) if len(matched.unique()) > 1 else None
    fits = {
        name: reconstruction_fit(tensors["P"], measured[key], measured["gram"], measured["power"])
        for name, key in (("plans", "overlap"), ("permuted", "overlap_permuted"))
    }
    return {
        "iterations_median": int(tensors["n_iters"].flatten().median()),
        "iterations_max": int(tensors["n_iters"].max()),
        "error_max": float(tensors["error"].max()),
        "not_converged": (~tensors["converged"]).nonzero().tolist(),
        "depth_spearman": rank,
        "matched_layers": matched.tolist(),
        "r2": {name: float(r2.mean()) for name, (r2, _) in fits.items()},
        "correlation": {name: float(r.mean()) for name, (_, r) in fits.items()},
        "top_mass": float(measured["top_mass"].mean()),
    }


def summary(record: dict[str, Any]) -> str:
    """The table that ends stage 1."""
    lines = [
        f"{record['rows']} rows per layer and side",
        f"{'':8}{'iterations':>14}{'marginal':>10}{'Spearman of layer':>19}"
        f"{'R^2 of X from Y':>20}{'correlation':>20}{'mass in':>9}",
        f"{'side':8}{'(median, max)':>14}{'error':>10}{'match and depth':>19}"
        f"{'(plans permuted)':>20}{'(plans permuted)':>20}{'largest':>9}",
    ]
    for side, r in record["sides"].items():
        rank = "one layer" if r["depth_spearman"] is None else f"{r['depth_spearman']:.3f}"
        fits = "".join(f"{r[key]['plans']:11.3f} ({r[key]['permuted']:6.3f})" for key in ("r2", "correlation"))
        lines.append(
            f"{side:8}{r['iterations_median']:8} {r['iterations_max']:5}{r['error_max']:10.1e}{rank:>19}"
            f"{fits}{r['top_mass']:9.3f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
