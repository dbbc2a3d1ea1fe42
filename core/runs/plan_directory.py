"""A finished plan directory, as later stages read it: plans, rows, means, deviations and the order of neurons."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from core.errors import UserError
from core.fusion.projections import ATTENTION, PROJECTIONS, WIDTHS, parse_projections
from core.fusion.settings import FusionSettings
from core.hot_transport import SinkhornResult, effective_layer_plan
from core.manifest import Manifest
from core.models.checkpoints import Checkpoint
from core.runs.plan_files import STAGE, activations_file, plans_file, read_tensor, selection_file
from core.transport.correlation import correlation_cost_rows, standardize

# How many layers of standardised rows, and how many of centred rows, stay in memory between reads.
ROWS_CACHE = 4


class PlanDirectory:
    """An opened plan directory. Every read opens the file that holds the tensor, and reads no other tensor.

    It is what `core.fusion` takes its plans from (the protocol `Plans` there).

    Attributes:
        shape: (L, M), the numbers of target and of source layers.
        reg: the entropic regularisation epsilon of the feature plans.
    """

    def __init__(self, folder: Path, device: str = "cpu"):
        """Open `folder`; tensors are given on `device`. Raises UserError when the directory is not finished."""
        self.folder, self.device = folder, device
        self.manifest = Manifest.read(folder, STAGE)
        shapes = self.manifest.record["shapes"]
        self.shape = (shapes["target"]["n_layers"], shapes["source"]["n_layers"])
        self.reg = self.manifest.inputs["settings"]["epsilon"]
        self._standardized = lru_cache(ROWS_CACHE)(self._load_standardized)
        self._stored_rows = lru_cache(ROWS_CACHE)(self._load_rows)
        self._layer_plan = lru_cache(len(WIDTHS))(lambda side: read_tensor(plans_file(folder, side), "P"))

    def check_models(self, target: Checkpoint, source: Checkpoint) -> None:
        """Raise UserError for models that the plans were not made from, and say so when the two are swapped."""
        was = {model: self.manifest.inputs[model] for model in ("target", "source")}
        if target.same_model(was["target"]) and source.same_model(was["source"]):
            return
        made = f"{self.folder} was made for target {was['target']['id']} and source {was['source']['id']}"
        got = f"got target {target.name} and source {source.name}"
        if target.same_model(was["source"]) and source.same_model(was["target"]):
            raise UserError(f"target and source are swapped: {made}, {got}")
        raise UserError(f"the plans belong to other models: {made}, {got}; run run_activs_and_hot.py for this pair")

    def layer_plan(self, projection: str) -> Tensor:
        """P_eff [L, M] of a projection (Eq. 13)."""
        return effective_layer_plan(*map(self._layer_plan, PROJECTIONS[projection].layer_sides))

    def feature_result(self, side: str, target_layer: int, source_layer: int) -> SinkhornResult:
        """The plan of one pair of layers as potentials, with its cost recomputed from the stored rows."""
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
        """Dense Q [n, m] of one pair of layers in float32, or only its `rows` [k, m]."""
        result = self.feature_result(side, target_layer, source_layer)
        return result.plan() if rows is None else result.plan_at(rows)

    def rows(self, model: str, side: str, layer: int, part: str) -> Tensor:
        """Rows [T', n] of one layer in float32, centred on their own mean.

        Args:
            part: `fit` for the rows that regressions are fitted on, `aside` for those that are kept out of every fit.
        """
        X, aside = self._stored_rows(model, side, layer), self._read("target", "kept_aside")
        X = X[aside if part == "aside" else ~aside]
        return X - X.mean(0) if len(X) else X

    @property
    def unaligned_weight(self) -> float:
        """How many positions without a partner one of their rows stands for, when an aligned row stands for one."""
        return self.manifest.record.get("unaligned", {"weight": 1.0})["weight"]

    def unaligned(self, side: str, layer: int) -> Tensor:
        """The target's rows [U, n] at positions without a partner, relative to `fit_mean`."""
        if not activations_file(self.folder, "unaligned").is_file():
            return self.rows("target", side, layer, "fit")[:0]
        return self._stored_rows("unaligned", side, layer) + (
            self.mean("unaligned", side, layer) - self.fit_mean(side, layer)
        )

    def fit_mean(self, side: str, layer: int) -> Tensor:
        """The target's mean activation [n] over the rows that regressions are fitted on, with token pooling."""
        X, aside = self._stored_rows("target", side, layer), self._read("target", "kept_aside")
        return self.mean("target", side, layer) + X[~aside].mean(0)

    def check_projections(self, projections: Iterable[str]) -> None:
        """Raise UserError for a projection whose sides stage 1 did not record."""
        # Plans of before --projections have the attention's.
        made = parse_projections(self.manifest.inputs["settings"].get("projections", ",".join(ATTENTION)))
        if missing := [name for name in projections if name not in made]:
            raise UserError(f"{self.folder} has no activations of {', '.join(missing)}; run stage 1 with --projections")

    def rows_of(self, settings: FusionSettings) -> str:
        """`settings.rows`, or `aligned` in place of `auto` where there is nothing to choose: with one kind of rows that
        the settings allow, or with no position without a partner.

        Raises:
            UserError: the settings ask for rows that these plans do not have.
        """
        recorded = self.manifest.record.get("unaligned")
        if settings.rows not in ("auto", "aligned") and recorded is None:
            raise UserError(
                f"{self.folder} has no rows for --rows {settings.rows}: it records no positions without a partner; run "
                "stage 1 with --pooling token, or take --rows aligned"
            )
        chosen = len(settings.row_kinds) > 1 and recorded is not None and recorded["positions"]
        return settings.rows if chosen else settings.row_kinds[0]

    def check_source_inputs(self, projections: Iterable[str]) -> None:
        """Raise UserError for a projection whose inputs stage 1 did not record of the source, as task vectors need."""
        with safe_open(activations_file(self.folder, "source"), "pt") as file:
            found = set(file.keys())
        if missing := [name for name in projections if f"{PROJECTIONS[name].input_side}.0" not in found]:
            raise UserError(
                f"{self.folder} has no inputs of the source's {', '.join(missing)}, which --source-base needs; run "
                "stage 1 with --source-base as well"
            )

    def mean(self, model: str, side: str, layer: int) -> Tensor:
        """Mean activation [n] of each neuron over all rows."""
        return self._read(model, f"{side}.{layer}.mean")

    def std(self, model: str, side: str, layer: int) -> Tensor:
        """Unbiased standard deviation [n] of each neuron over all rows."""
        return self._read(model, f"{side}.{layer}.std")

    def strongest(self, side: str, layer: int) -> Tensor:
        """The numbers [n] of the target's neurons on a side on which neurons are selected, strongest first."""
        return read_tensor(selection_file(self.folder), f"{side}.{layer}.index").to(self.device)

    def _load_rows(self, model: str, side: str, layer: int) -> Tensor:
        return self._read(model, f"{side}.{layer}").float()

    def _load_standardized(self, model: str, side: str, layer: int) -> Tensor:
        return standardize(self._load_rows(model, side, layer))

    def _read(self, model: str, key: str) -> Tensor:
        return read_tensor(activations_file(self.folder, model), key).to(self.device)
