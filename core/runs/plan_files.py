"""The files of a plan directory: where they are, and how stage 1 writes them. Each is complete or absent.

`PlanDirectory` (core/runs/plan_directory.py) reads a finished one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from core.errors import UserError
from core.files import write_safetensors
from core.fusion.projections import ATTENTION, forward_order, selected_sides
from core.hot_transport import SinkhornResult

log = logging.getLogger(__name__)
# Name of the stage in manifests.
STAGE = "plans"
# In the files of single layers: prefix of figures that were measured on the plans. The side's file leaves them out.
MEASURED = "measured."
# float16 rounds well between these two: the largest number is 65504, and numbers below 6e-5 lose digits.
HALF_MAX = 60000.0
HALF_MIN_STD = 1e-4


def activations_file(folder: Path, model: str) -> Path:
    """The file of one model's rows; `model` is `target` or `source`."""
    return folder / "activations" / f"{model}.safetensors"


def plans_file(folder: Path, side: str) -> Path:
    """The file of one side's potentials, costs and layer plan."""
    return folder / "plans" / f"{side}.safetensors"


def layer_file(folder: Path, side: str, layer: int) -> Path:
    """The file of one target layer's plans with all source layers, which exists until the side is complete."""
    return folder / "plans" / "parts" / f"{side}.{layer}.safetensors"


def selection_file(folder: Path) -> Path:
    """The file of the target's neurons in the order of their strength."""
    return folder / "selection.safetensors"


def read_tensor(path: Path, key: str) -> Tensor:
    """One tensor of a safetensors file, without reading the others."""
    with safe_open(path, "pt") as file:
        return file.get_tensor(key)


def read_rows(folder: Path, model: str, side: str, layer: int, device: str = "cpu") -> Tensor:
    """The rows of one layer and side as they are stored, in float32 [T, n] (centred with token pooling)."""
    return read_tensor(activations_file(folder, model), f"{side}.{layer}").to(device, torch.float32)


def write_activations(
    folder: Path, model: str, rows: dict[tuple[str, int], Tensor], aside: Tensor, half: bool
) -> dict[tuple[str, int], Tensor]:
    """Write one model's rows with the mean, standard deviation and strength of every neuron.

    Args:
        rows: (side, layer) -> [T, n] float32. The dictionary is emptied and the tensors are overwritten with what is
            stored, so that rows that are kept on disk (`core.runs.row_recorder.row_memory`) take no memory here.
        aside: [T] bool, the rows that are kept out of regressions, to measure the regressions on.
        half: store the rows centred and in float16, with their mean in float32. A layer stays in float32 if float16
            would overflow or lose its small neurons.
    Returns:
        (side, layer) -> strength [n], the mean |activation| of each neuron over the rows (A.5).
    Raises:
        UserError: an activation is NaN or infinite; the message names model, layer and side.
    """
    tensors: dict[str, Tensor] = {"kept_aside": aside}
    strengths = {}
    for side, layer in sorted(rows, key=lambda key: (key[1], forward_order(key[0]))):
        X = rows.pop((side, layer))
        # Only reductions: copies of X would fragment the heap by as much memory as all rows take.
        low, high = X.amin(0), X.amax(0)
        if not torch.isfinite(torch.stack((low, high))).all():
            raise UserError(f"{model} layer {layer}, side {side}: activations contain NaN or infinite values")
        strengths[side, layer] = torch.linalg.vector_norm(X, 1, 0) / len(X)
        # The rounding of the mean would give a constant neuron a small deviation.
        mean, std = X.mean(0), X.std(0).masked_fill_(high == low, 0.0)
        key = f"{side}.{layer}"
        if half:
            X -= mean
            largest = torch.maximum(high - mean, mean - low).max()
            if largest < HALF_MAX and (std[std > 0] > HALF_MIN_STD).all():
                X = _half_in_place(X)
            else:
                log.debug("%s %s: float16 does not hold its range, stored as float32", model, key)
        tensors |= {key: X, f"{key}.mean": mean, f"{key}.std": std}
    path = activations_file(folder, model)
    path.parent.mkdir(exist_ok=True)
    write_safetensors(path, tensors, {"centred": str(half)})
    return strengths


def _half_in_place(X: Tensor) -> Tensor:
    """X [T, n] float32 as float16, in the first half of its own memory."""
    half = X.half()
    return X.view(torch.float16).flatten()[: half.numel()].view(half.shape).copy_(half)


def write_selection(
    folder: Path, strengths: Mapping[tuple[str, int], Tensor], projections: Iterable[str] = ATTENTION
) -> None:
    """Write the target's neurons from strongest to weakest, with their strengths, per layer of the sides on which the
    projections select."""
    sides = selected_sides(projections)
    tensors: dict[str, Tensor] = {}
    for (side, layer), strength in strengths.items():
        if side in sides:
            values, order = strength.sort(descending=True, stable=True)
            tensors |= {f"{side}.{layer}.index": order, f"{side}.{layer}.strength": values}
    write_safetensors(selection_file(folder), tensors)


def write_layer(path: Path, results: Sequence[SinkhornResult], measured: Mapping[str, Tensor]) -> None:
    """Write the plans of one target layer with all M source layers.

    The file holds the potentials f [M, n] and g [M, m] in float64, and per plan the iterations, the error, whether it
    converged, and the cost.

    Args:
        path: `layer_file`.
        measured: figures that were measured on the plans; `join_layers` returns them.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        "f": torch.stack([r.f for r in results]),
        "g": torch.stack([r.g for r in results]),
        "n_iters": torch.tensor([r.n_iters for r in results], dtype=torch.int32),
        "error": torch.tensor([r.error for r in results], dtype=torch.float64),
        "converged": torch.tensor([r.converged for r in results]),
        "layer_cost": torch.tensor([r.cost for r in results], dtype=torch.float64),
    }
    write_safetensors(path, tensors | {MEASURED + key: value for key, value in measured.items()})


def join_layers(
    folder: Path, side: str, n_layers: int, layer_plan: Callable[[Tensor], Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Join the files of a side's layers into the file of the side, and remove them.

    The side's file holds f [L, M, n], g [L, M, m], and n_iters, error, converged, layer_cost and P, all [L, M].

    Args:
        layer_plan: function layer costs [L, M] -> P [L, M].
    Returns:
        (the tensors of the side's file, the figures that were measured on the plans [L, ...]).
    """
    paths = [layer_file(folder, side, layer) for layer in range(n_layers)]
    layers = [load_file(path) for path in paths]
    joined = {key: torch.stack([layer[key] for layer in layers]) for key in layers[0]}
    tensors = {key: value for key, value in joined.items() if not key.startswith(MEASURED)}
    tensors["P"] = layer_plan(tensors["layer_cost"])
    write_safetensors(plans_file(folder, side), tensors)
    for path in paths:
        path.unlink()
    return tensors, {key.removeprefix(MEASURED): joined[key] for key in joined.keys() - tensors.keys()}
