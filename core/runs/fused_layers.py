"""The residuals of a fused checkpoint while it is being made, layer by layer, so that a killed run continues."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor

from core.errors import UserError
from core.files import read_json, write_json
from core.fusion.residual import Residual, fold_bias, fold_weight
from core.fusion.residual_file import load_residuals, save_residuals
from core.fusion.settings import FusionSettings
from core.fusion.strengths import Strength, strength_of
from core.fusion.transport_weights import Transport, fuse_layer
from core.models.checkpoints import Checkpoint
from core.progress import Progress
from core.runs.plan_directory import PlanDirectory

# While the checkpoint is being made, this folder in it holds the layers that are done.
PARTS = "parts"
# What files of a single layer say of the strength, which is known when all layers are there.
UNKNOWN = 0.0


@dataclass(frozen=True)
class FusedLayers:
    """One file of residuals per layer, for each kind of rows on which W~ is regressed.

    Attributes:
        folder: the checkpoint that is being made.
        n_layers: of the target.
        settings: how they are fused.
    """

    folder: Path
    n_layers: int
    settings: FusionSettings

    def path(self, rows: str, layer: int) -> Path:
        """The file of one layer; its lines of the report stand beside it."""
        return self.folder / PARTS / rows / f"{layer}.safetensors"

    def paths(self, rows: str) -> list[Path]:
        """The files of all layers."""
        return [self.path(rows, layer) for layer in range(self.n_layers)]

    def residuals(self, rows: str) -> Iterator[Residual]:
        """All residuals, of which one layer at a time is read."""
        for path in self.paths(rows):
            yield from load_residuals(path)[0]

    def report(self, rows: str) -> list[dict[str, Any]]:
        """The lines of the report, as `fuse_attention_only_from_hot_dir` gives them."""
        return [line for path in self.paths(rows) for line in read_json(path.with_suffix(".json"))["lines"]]

    def transport(
        self, plans: PlanDirectory, target: Checkpoint, source: Checkpoint, source_base: Checkpoint | None
    ) -> None:
        """Make every file that is missing. Layers that a killed run finished are not computed again.

        Args:
            source_base: the model that the source was tuned from, where their difference is transported.
        Raises:
            UserError: a layer has no corresponding source layer, or a weight is not finite.
        """
        kinds = self.settings.row_kinds
        everything = [(layer, kind) for layer in range(self.n_layers) for kind in kinds]
        missing = [(layer, kind) for layer, kind in everything if not self.path(kind, layer).is_file()]
        transport = Transport(plans, source, self.settings, source_base)
        transports = {kind: transport.with_rows(kind) for kind in kinds}
        with Progress(total=len(missing) * len(self.settings.fused), desc="fusing", unit="projections") as bar:
            for layer, kind in missing:
                try:
                    found = []
                    for one in fuse_layer(transports[kind], target, self.settings, layer):
                        found.append(one)
                        bar.update()
                except ValueError as error:
                    raise UserError(str(error)) from None
                self._write(kind, layer, found)

    def _write(self, rows: str, layer: int, found: Sequence[tuple[Residual, dict[str, Any]]]) -> None:
        residuals, lines = zip(*found, strict=True)
        path = self.path(rows, layer)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path.with_suffix(".json"), {"lines": lines})
        # The residuals are written last: a layer with this file is done.
        save_residuals(path, residuals, UNKNOWN, self.settings.residual_form)

    def fold_from(self, rows: str, target: Checkpoint, alpha: Strength) -> Callable[[str, Tensor], Tensor]:
        """Function (tensor name, tensor) -> folded tensor, which reads the residuals of one layer at a time. Tensors
        that are not fused pass through it unchanged."""
        fused = {
            target.tensor_name(layer, projection): (layer, projection)
            for layer in range(self.n_layers)
            for projection in self.settings.fused
        }
        of_layer = lru_cache(1)(lambda n: {one.projection: one for one in load_residuals(self.path(rows, n))[0]})

        def fold(name: str, tensor: Tensor) -> Tensor:
            module, _, kind = name.rpartition(".")
            if module not in fused or kind not in ("weight", "bias"):
                return tensor
            layer, projection = fused[module]
            residual = of_layer(layer)[projection]
            fold_one = fold_weight if kind == "weight" else fold_bias
            return fold_one(tensor, residual, strength_of(alpha, residual), self.settings.residual_form)

        return fold
