"""The second half of stage 1: the feature plans Q of all pairs of layers, and the layer plan P of every side."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.fusion.projections import planned_sides
from core.hot_transport import SinkhornResult, compute_P, reconstruction_fit, reconstruction_overlaps
from core.manifest import Manifest
from core.progress import Progress
from core.runs.plan_files import join_layers, layer_file, plans_file, read_rows, write_layer
from core.runs.settings import Experiment
from core.transport.correlation import correlation_cost_rows, standardize_layer
from core.transport.layer_pairs import solve_layer
from core.transport.problem import SinkhornSettings
from core.transport.sinkhorn import no_cost

log = logging.getLogger(__name__)
# Rows on which is measured how well the plans reconstruct X (Eqs. 31-34).
PROBE_ROWS = 64


def make_plans(folder: Path, manifest: Manifest, shape: tuple[int, int], experiment: Experiment, state: Any) -> None:
    """Solve the plans that are not on disk yet: all L x M feature plans of every side, then its layer plan.

    The processes of a launch share the target layers. The plans of a target layer are written before the next one is
    solved, so that a killed run continues there.

    Args:
        folder: plan directory with the rows of both models.
        manifest: its manifest, in which `sides` records what was measured on the plans of every side.
        shape: (L, M).
        state: accelerate's PartialState of this process.
    """
    L, M = shape
    transport = experiment.transport
    planned = planned_sides(experiment.fusion.fused)
    sides = manifest.record.setdefault("sides", {})
    with Progress(total=len(planned) * L * M, desc="plans", unit="pairs", disable=not state.is_main_process) as bar:
        for done, side in enumerate(planned, 1):
            if side not in sides or not plans_file(folder, side).is_file():
                solver = SideSolver(folder, side, shape, experiment)
                for layer in range(state.process_index, L, state.num_processes):
                    solver.solve(layer, lambda: bar.update(state.num_processes))
                state.wait_for_everyone()
                if state.is_main_process:
                    tensors, measured = join_layers(
                        folder, side, L, lambda costs: compute_P(costs, transport.eta, transport.layer_cost_scale)
                    )
                    sides[side] = side_record(tensors, measured)
                    manifest.save()
            state.wait_for_everyone()
            bar.update(done * L * M - bar.n)  # also of what was solved before
    if transport.sinkhorn_mode == "auto":
        warn_of_missed_tolerance(sides, transport.sinkhorn_tol)


class SideSolver:
    """Solves the plans of one side, one target layer after the other.

    The standardised rows of all source layers stay in memory if they are within `pairs_budget_mb`. Otherwise they are
    read again for every target layer: keeping some of them would not help, because each layer that is kept would have
    to make room for another one before it is needed again.
    """

    def __init__(self, folder: Path, side: str, shape: tuple[int, int], experiment: Experiment):
        self.folder, self.side, self.experiment = folder, side, experiment
        self.target_layers, self.source_layers = shape
        T, self.m = read_rows(folder, "source", side, 0).shape
        budget, source_bytes = experiment.transport.pairs_budget_mb * 2**20, 4 * self.source_layers * T * self.m
        cached = source_bytes <= budget
        self.batch_bytes = budget - (source_bytes if cached else 0)
        self.source = lru_cache(self.source_layers if cached else 0)(lambda k: self._standardized("source", k))
        self.probe = torch.linspace(0, T - 1, min(T, PROBE_ROWS)).round().long()

    def solve(self, layer: int, advance: Callable[[], object]) -> None:
        """Solve and write the plans of one target layer with all source layers, unless they are on disk.

        Args:
            advance: called after each plan.
        """
        path = layer_file(self.folder, self.side, layer)
        if path.is_file():
            return
        transport = self.experiment.transport
        target = self._standardized("target", layer)
        settings = SinkhornSettings(
            self.experiment.epsilon, transport.sinkhorn_iters, transport.sinkhorn_tol, transport.sinkhorn_mode
        )
        source = map(self.source, range(self.source_layers))
        found = solve_layer(target, source, settings, self.probe, self.batch_bytes)
        results, probed = keep_potentials(found, self.source_layers, advance)
        measured = reconstruction_overlaps(target[self.probe], probed)
        measured["top_mass"] = torch.tensor(self._top_mass(target, layer, results))
        write_layer(path, results, measured)

    def _top_mass(self, target: Tensor, layer: int, results: list[SinkhornResult]) -> float:
        """Share of the mass in the largest entries of the plan with the source layer of the same relative depth."""
        k = round(layer * (self.source_layers - 1) / max(1, self.target_layers - 1))
        result = dataclasses.replace(results[k], cost_rows=correlation_cost_rows(target, self.source(k)))
        return result.top_mass(max(target.shape[1], self.m))

    def _standardized(self, model: str, layer: int) -> Tensor:
        rows = read_rows(self.folder, model, self.side, layer, self.experiment.compute.device)
        return standardize_layer(rows, model, layer)


def keep_potentials(
    found: Iterable[SinkhornResult], count: int, advance: Callable[[], object]
) -> tuple[list[SinkhornResult], Tensor]:
    """Keep of each result what is written, and free the rest before the next result is computed.

    A result refers to the rows of its source layer, from which its cost can be recomputed, so all M results together
    would hold the rows of all source layers. The potentials are copied into memory that is allocated once for all
    results. Small tensors that are allocated one by one would end up between the large blocks that freed layers leave
    behind; the next layer would not fit into these blocks any more, and memory would grow.

    Args:
        count: number of results, M.
        advance: called after each result.
    Returns:
        (results without their costs, what they probed [M, n, r]).
    """
    kept: list[Tensor] = []

    def keep(result: SinkhornResult, k: int) -> SinkhornResult:
        values = [value for value in (result.f, result.g, result.probed) if value is not None]
        if not kept:
            kept.extend(value.new_empty(count, *value.shape) for value in values)
        for memory, value in zip(kept, values, strict=True):
            memory[k] = value
        advance()
        return dataclasses.replace(result, f=kept[0][k], g=kept[1][k], probed=None, cost_rows=no_cost)

    # `map` and no loop, because the variable of a loop would hold a result while the next one is computed. `found` is
    # the first argument, so that it is run to its end.
    results = list(map(keep, found, range(count)))
    return results, kept[2]


def side_record(tensors: dict[str, Tensor], measured: dict[str, Tensor]) -> dict[str, Any]:
    """What the manifest records of the plans of one side.

    - `iterations_median`, `iterations_max`, `error_max`: of the Sinkhorn solver, over all pairs of layers.
    - `not_converged`: the pairs (target layer, source layer) that did not reach the tolerance.
    - `matched_layers`: for each target layer the source layer to which P gives most mass. `depth_spearman` is the rank
      correlation of these with depth, the first sign that plans mean something; None when all are the same layer.
    - `r2`, `correlation`: how well the source's z-scored activations, transported through Q and P, reconstruct the
      target's (Eqs. 31-34), as the share of variance explained and as a correlation, mean over layers, on PROBE_ROWS
      rows. `permuted` is the same with the neurons of every plan shuffled.
    - `top_mass`: share of a plan's mass that is in its max(n, m) largest entries, mean over the target layers, each of
      them with the source layer of the same relative depth.
    """
    from scipy.stats import spearmanr  # takes a second to import, and only a finished side needs it

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


def warn_of_missed_tolerance(sides: dict[str, dict[str, Any]], tolerance: float) -> None:
    """Warn once of all plans that did not reach the tolerance.

    Args:
        sides: side -> `side_record`.
    """
    missed = {side: record["not_converged"] for side, record in sides.items() if record["not_converged"]}
    if missed:
        log.warning(
            "plans that did not reach the tolerance %.0e: %s; raise --sinkhorn-iters or --epsilon",
            tolerance,
            "; ".join(
                f"{side} {len(pairs)}, e.g. (target, source) layers {pairs[:3]}" for side, pairs in missed.items()
            ),
        )
