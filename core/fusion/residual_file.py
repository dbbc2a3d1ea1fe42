"""`hot_residual.safetensors`: the residuals of a fused checkpoint, from which the target and W~ can both be restored.

For every fused projection it holds `<layer>.<projection>.` followed by `index`, `weight`, `original_weight` and, where
there are biases, `bias` and `original_bias`; its metadata holds the residual's form and alpha, which is one number, or
`<layer>.<projection>` -> number.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from core.errors import UserError
from core.files import write_safetensors
from core.fusion.projections import PROJECTIONS
from core.fusion.residual import Residual
from core.fusion.strengths import Strength

RESIDUAL_FILE = "hot_residual.safetensors"
TENSORS = ("index", "weight", "bias", "original_weight", "original_bias")


def save_residuals(path: Path, residuals: Iterable[Residual], alpha: Strength, form: str) -> None:
    """Write residuals, and the alpha and form they are mixed with, to one file."""
    tensors = {
        f"{residual.name}.{name}": getattr(residual, name)
        for residual in residuals
        for name in TENSORS
        if getattr(residual, name) is not None
    }
    write_safetensors(path, tensors, _metadata(alpha, form))


def join_residuals(parts: Sequence[Path], path: Path, alpha: Strength, form: str) -> None:
    """Join the files of different layers into one with this alpha and form. Their tensors stay mapped from the parts
    and are never all in memory."""
    tensors: dict[str, Tensor] = {}
    for part in parts:
        with safe_open(part, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.offset_keys()}
    write_safetensors(path, tensors, _metadata(alpha, form))


def _metadata(alpha: Strength, form: str) -> dict[str, str]:
    return {"settings": json.dumps({"alpha": alpha, "form": form})}


def load_residuals(path: Path) -> tuple[list[Residual], Strength, str]:
    """Read (residuals, alpha, form); the residuals come layer by layer, in the order of the table of projections.

    Raises:
        UserError: the file does not exist.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist; give a folder that core/generate_hot_residual.py wrote")
    found: dict[tuple[int, str], dict[str, Any]] = {}
    with safe_open(path, "pt") as file:
        settings = json.loads(file.metadata()["settings"])
        for key in file.offset_keys():
            layer, projection, name = key.split(".")
            tensors = found.setdefault((int(layer), projection), {"bias": None, "original_bias": None})
            tensors[name] = file.get_tensor(key)
    in_order = sorted(found, key=lambda key: (key[0], list(PROJECTIONS).index(key[1])))
    residuals = [Residual(layer, projection, **found[layer, projection]) for layer, projection in in_order]
    return residuals, settings["alpha"], settings["form"]


def read_selection(path: Path) -> tuple[dict[tuple[int, str], Tensor], Any]:
    """({(layer, projection): selected rows or columns}, alpha) of a residual file, without reading a weight."""
    with safe_open(path, "pt") as file:
        alpha = json.loads(file.metadata()["settings"])["alpha"]
        keys = [key.split(".") for key in file.offset_keys() if key.endswith(".index")]
        index = {(int(layer), name): file.get_tensor(f"{layer}.{name}.index") for layer, name, _ in keys}
    return index, alpha
