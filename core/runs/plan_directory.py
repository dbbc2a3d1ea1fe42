"""The plan directory: activations, potentials, layer plans and selection, written atomically and read lazily."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import count
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from core.errors import UserError
from core.files import TEMPORARY, write_safetensors
from core.fusion.projections import FORWARD_ORDER, PROJECTIONS, SELECTED_SIDES, SIDES
from core.hot_transport import SinkhornResult, effective_layer_plan, standardize
from core.manifest import Manifest
from core.models.checkpoints import Checkpoint
from core.models.families import AttentionLayout
from core.transport.correlation import correlation_cost_rows

log = logging.getLogger(__name__)
STAGE = "plans"
# Layers of standardised activations and of regression rows that stay in memory between reads.
ROWS_CACHE = 4
# The order in which a layer computes its sides: the first one with NaN is the one to look at.
# Prefix of what was measured on plans, in the parts of a side.
MEASURED = "measured."
HALF_MAX = 60000.0
HALF_MIN_STD = 1e-4


def activations_file(folder: Path, model: str) -> Path:
    """File of one model's rows; `model` is `target` or `source`."""
    return folder / "activations" / f"{model}.safetensors"


def plans_file(folder: Path, side: str) -> Path:
    """File of one side's potentials, costs and layer plan."""
    return folder / "plans" / f"{side}.safetensors"


@contextmanager
def row_memory(folder: Path, needed: int, budget: int) -> Iterator[Callable[[int, int], Tensor]]:
    """Yield allocate(T, n) -> float32 [T, n] for rows of `needed` bytes in all.

    They are in memory, or beyond `budget` (bytes) in files of a temporary folder in `folder`, mapped into memory; it is
    removed afterwards. Raises UserError when the disk has no room.
    """
    if needed <= budget:
        yield torch.empty
        return
    free = shutil.disk_usage(folder).free
    if free < 2 * needed:  # the rows, and the file made from them; a full disk would kill a process that maps a file
        raise UserError(
            f"{folder} has {free / 2**30:.1f} GiB free; rows beyond --activations-budget-mb need "
            f"{2 * needed / 2**30:.1f} GiB there: make room or raise the budget"
        )
    with tempfile.TemporaryDirectory(prefix=TEMPORARY + "rows-", dir=folder) as place:
        log.info("%.1f GiB of rows are kept on disk (--activations-budget-mb)", needed / 2**30)
        files = count()
        yield lambda rows, n: torch.from_numpy(
            np.memmap(Path(place) / str(next(files)), np.float32, "w+", shape=(rows, n))
        )


def share_file(folder: Path, model: str, process: int, processes: int) -> Path:
    """File of the rows that one of several processes reads, until they are joined."""
    return folder / "activations" / f"{model}-shares" / f"{process}-of-{processes}.safetensors"


def write_share(path: Path, rows: Mapping[tuple[str, int], Tensor], numbers: Tensor) -> None:
    """Write the rows [T', n] per (side, layer) that one process read; `numbers` [T'] are theirs among all rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(path, {f"{side}.{layer}": X for (side, layer), X in rows.items()} | {"numbers": numbers})


def join_shares(
    folder: Path, model: str, processes: int, layout: AttentionLayout, allocate: Callable[[int, int], Tensor]
) -> dict[tuple[str, int], Tensor]:
    """The rows [T, n] per (side, layer) of all processes, in the order of the texts."""
    paths = [share_file(folder, model, process, processes) for process in range(processes)]
    numbers = [_read_tensor(path, "numbers") for path in paths]
    joined = {}
    for side in SIDES:
        for layer in range(layout.n_layers):
            joined[side, layer] = X = allocate(sum(map(len, numbers)), layout.size(side))
            for path, places in zip(paths, numbers, strict=True):
                X[places] = _read_tensor(path, f"{side}.{layer}")
    return joined


def remove_shares(folder: Path, model: str) -> None:
    """Remove what the processes handed over; done when the model's rows are on disk."""
    shutil.rmtree(share_file(folder, model, 0, 1).parent, ignore_errors=True)


def _read_tensor(path: Path, key: str) -> Tensor:
    with safe_open(path, "pt") as file:
        return file.get_tensor(key)


def write_activations(
    folder: Path, model: str, rows: dict[tuple[str, int], Tensor], aside: Tensor, half: bool
) -> dict[tuple[str, int], Tensor]:
    """Write one model's rows [T, n] per (side, layer), with mean, standard deviation and strength.

    Text rows are stored float32; token rows (`half`) centred in float16 beside their float32 mean, unless float16
    would overflow or lose small neurons (such a layer stays float32). Consumes `rows`: what is stored takes the place
    of what was given, so that rows on disk (`row_memory`) stay there.

    Args:
        aside: [T] bool, rows kept out of the regression to measure it on.
    Returns:
        {(side, layer): strength [n]}, the mean |activation| of each neuron over the rows (A.5).
    Raises:
        UserError: NaN or infinite activations, naming model, side and layer.
    """
    tensors: dict[str, Tensor] = {"kept_aside": aside}
    strengths = {}
    for side, layer in sorted(rows, key=lambda key: (key[1], FORWARD_ORDER.index(key[0]))):
        X = rows.pop((side, layer))
        # Reductions alone: copies of X would fragment the heap by as much memory as all rows take.
        low, high = X.amin(0), X.amax(0)
        if not torch.isfinite(torch.stack((low, high))).all():
            raise UserError(f"{model} layer {layer}, side {side}: activations contain NaN or infinite values")
        strengths[side, layer] = torch.linalg.vector_norm(X, 1, 0) / len(X)
        key = f"{side}.{layer}"
        # Rounding of the mean would give a constant neuron a deviation.
        mean, std = X.mean(0), X.std(0).masked_fill_(high == low, 0.0)
        if half:
            X -= mean
            spread = std[std > 0]
            largest = torch.maximum(high - mean, mean - low).max()
            fits = largest < HALF_MAX and (len(spread) == 0 or spread.min() > HALF_MIN_STD)
            if not fits:
                log.info("%s %s: float16 does not hold its range, stored as float32", model, key)
            X = _half_in_place(X) if fits else X
        tensors |= {key: X, f"{key}.mean": mean, f"{key}.std": std}
    path = activations_file(folder, model)
    path.parent.mkdir(exist_ok=True)
    write_safetensors(path, tensors, {"centred": str(half)})
    return strengths


def _half_in_place(X: Tensor) -> Tensor:
    """X [T, n] float32 as float16, in the first half of its own memory."""
    half = X.half()
    return X.view(torch.float16).flatten()[: half.numel()].view(half.shape).copy_(half)


def read_layer(folder: Path, model: str, side: str, layer: int, device: str = "cpu") -> Tensor:
    """One layer of one side as stored, float32 [T, n] (centred for token rows)."""
    with safe_open(activations_file(folder, model), "pt") as file:
        return file.get_tensor(f"{side}.{layer}").to(device, torch.float32)


def part_file(folder: Path, side: str, layer: int) -> Path:
    """File of one target layer's plans with all source layers, until the side is complete."""
    return folder / "plans" / "parts" / f"{side}.{layer}.safetensors"


def write_part(
    folder: Path, side: str, layer: int, results: Sequence[SinkhornResult], measured: Mapping[str, Tensor]
) -> None:
    """Write the plans of one target layer: potentials f [M, n], g [M, m] (float64), iterations, errors and costs, and
    what was `measured` on them, which `join_parts` hands on."""
    path = part_file(folder, side, layer)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(
        path,
        {
            "f": torch.stack([r.f for r in results]),
            "g": torch.stack([r.g for r in results]),
            "n_iters": torch.tensor([r.n_iters for r in results], dtype=torch.int32),
            "error": torch.tensor([r.error for r in results], dtype=torch.float64),
            "converged": torch.tensor([r.converged for r in results]),
            "layer_cost": torch.tensor([r.cost for r in results], dtype=torch.float64),
            **{MEASURED + key: value for key, value in measured.items()},
        },
    )


def join_parts(
    folder: Path, side: str, n_layers: int, layer_plan: Callable[[Tensor], Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Join the parts of a side into its file, with P = layer_plan(layer costs), and remove them.

    The file holds f [L, M, n], g [L, M, m], n_iters, error, converged, layer_cost and P, all [L, M].

    Returns:
        (tensors of the file, what was measured [L, ...]).
    """
    parts = [load_file(part_file(folder, side, layer)) for layer in range(n_layers)]
    joined = {key: torch.stack([part[key] for part in parts]) for key in parts[0]}
    tensors = {key: value for key, value in joined.items() if not key.startswith(MEASURED)}
    tensors["P"] = layer_plan(tensors["layer_cost"])
    write_safetensors(plans_file(folder, side), tensors)
    for layer in range(n_layers):
        part_file(folder, side, layer).unlink()
    return tensors, {key.removeprefix(MEASURED): joined[key] for key in joined.keys() - tensors.keys()}


def write_selection(folder: Path, strengths: Mapping[tuple[str, int], Tensor]) -> None:
    """Write, per target layer of the sides that selections are made on, all neurons from strongest to weakest and their
    strengths."""
    tensors: dict[str, Tensor] = {}
    for (side, layer), strength in strengths.items():
        if side in SELECTED_SIDES:
            values, order = strength.sort(descending=True, stable=True)
            tensors |= {f"{side}.{layer}.index": order, f"{side}.{layer}.strength": values}
    write_safetensors(folder / "selection.safetensors", tensors)


class PlanDirectory:
    """An opened plan directory, read lazily. Implements `core.fusion.transport_weights.Plans`."""

    def __init__(self, folder: Path, device: str = "cpu"):
        self.folder, self.device = folder, device
        self.manifest = Manifest.read(folder, STAGE)
        shapes = self.manifest.record["shapes"]
        self.shape = (shapes["target"]["n_layers"], shapes["source"]["n_layers"])
        self.reg = self.manifest.inputs["settings"]["epsilon"]
        self._standardized = lru_cache(ROWS_CACHE)(self._load_standardized)
        self._centred = lru_cache(ROWS_CACHE)(self._load_centred)
        self._layer_plan = lru_cache(len(SIDES))(lambda side: self._read_plan(side, "P"))

    def check_models(self, target: Checkpoint, source: Checkpoint) -> None:
        """Refuse models other than those the plans were made from, and say so when the two are swapped."""
        was = {model: self.manifest.inputs[model] for model in ("target", "source")}
        if target.same_model(was["target"]) and source.same_model(was["source"]):
            return
        made = f"{self.folder} was made for target {was['target']['id']} and source {was['source']['id']}"
        got = f"got target {target.name} and source {source.name}"
        if target.same_model(was["source"]) and source.same_model(was["target"]):
            raise UserError(f"target and source are swapped: {made}, {got}")
        raise UserError(f"the plans belong to other models: {made}, {got}; run run_activs_and_hot.py for this pair")

    def side_plan(self, side: str) -> Tensor:
        """P [L, M] of one side, rows summing to 1/L."""
        return self._layer_plan(side)

    def layer_plan(self, projection: str) -> Tensor:
        """P_eff [L, M] of a projection (Eq. 13)."""
        return effective_layer_plan(self._layer_plan(PROJECTIONS[projection].input_side), self._layer_plan(projection))

    def feature_result(self, side: str, target_layer: int, source_layer: int) -> SinkhornResult:
        """The plan of one pair as potentials, its cost recomputed from the stored activations."""
        with safe_open(plans_file(self.folder, side), "pt") as file:
            f, g = (file.get_slice(key)[target_layer, source_layer].to(self.device) for key in "fg")
            n_iters, error, converged, cost = (
                file.get_slice(key)[target_layer, source_layer].item()
                for key in ("n_iters", "error", "converged", "layer_cost")
            )
        Zx, Zy = self._standardized("target", side, target_layer), self._standardized("source", side, source_layer)
        rows = correlation_cost_rows(Zx, Zy)
        return SinkhornResult(f, g, self.reg, rows, n_iters, error, converged, cost, "stored")

    def feature_plan(self, side: str, target_layer: int, source_layer: int, rows: Tensor | None = None) -> Tensor:
        """Dense Q [n, m] of one pair, or its `rows` [k, m], float32."""
        result = self.feature_result(side, target_layer, source_layer)
        return result.plan() if rows is None else result.plan_at(rows)

    def rows(self, model: str, side: str, layer: int, part: str) -> Tensor:
        """Rows [T', n] of one layer, float32, centred on themselves: `fit`, or `aside` (kept out of every fit)."""
        X, aside = self._centred(model, side, layer), self._kept_aside()
        X = X[aside if part == "aside" else ~aside]
        return X - X.mean(0) if len(X) else X

    def mean(self, model: str, side: str, layer: int) -> Tensor:
        """Mean activation [n] over all rows."""
        return self._read(model, f"{side}.{layer}.mean")

    def std(self, model: str, side: str, layer: int) -> Tensor:
        """Unbiased standard deviation [n] over all rows."""
        return self._read(model, f"{side}.{layer}.std")

    def strongest(self, side: str, layer: int) -> Tensor:
        """Target neurons [n] of one of SELECTED_SIDES, strongest first."""
        with safe_open(self.folder / "selection.safetensors", "pt") as file:
            return file.get_tensor(f"{side}.{layer}.index").to(self.device)

    def _kept_aside(self) -> Tensor:
        return self._read("target", "kept_aside")

    def _load_centred(self, model: str, side: str, layer: int) -> Tensor:
        return self._read(model, f"{side}.{layer}").float()

    def _load_standardized(self, model: str, side: str, layer: int) -> Tensor:
        return standardize(self._read(model, f"{side}.{layer}").float())

    def _read(self, model: str, key: str) -> Tensor:
        with safe_open(activations_file(self.folder, model), "pt") as file:
            return file.get_tensor(key).to(self.device)

    def _read_plan(self, side: str, key: str) -> Tensor:
        with safe_open(plans_file(self.folder, side), "pt") as file:
            return file.get_tensor(key)
