"""The residuals of the controls, and the strengths with which they are fused.

A control gets every choice that the fusion got. Where the strength of the fusion was given, the controls have the same;
where it was chosen or learned, theirs are found on the same rows, by the same search, among the same kinds of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, partial
from typing import Any

import torch

from core.errors import UserError
from core.fusion.controls import CONTROLS, SHUFFLED
from core.fusion.residual import Residual
from core.fusion.residual_file import RESIDUAL_FILE, load_residuals
from core.fusion.settings import LEARNED, FusionSettings
from core.fusion.strengths import Strength
from core.fusion.transport_weights import Transport, fuse_layer
from core.models.checkpoints import Checkpoint
from core.progress import Progress
from core.runs.settings import Experiment
from core.runs.strength_search import search_settings, strength_rows, strength_search
from core.training.strengths import StrengthSearch
from evaluation.arms.run import FUSED_LEARNED, Run
from evaluation.significance import record_of_difference

# The settings beside those of fusion on which a search for strengths depends.
SEARCHING = ("validation_samples", "seed", "tokens_per_batch", "dtype")


class ControlResiduals:
    """The controls of one run.

    Args:
        run: whose controls they are.
        target: the model that was fused into.
        transport_of: control -> the transport from which its W~ is made.
        model: the loaded target, on which strengths are found. Its weights are the same before and after each call.
            Where stage 2 searched the strength of the fusion in another dtype, the target is loaded again in that one.
        experiment: device, dtype, seed and batch size.
    """

    def __init__(
        self,
        run: Run,
        target: Checkpoint,
        transport_of: Callable[[str], Transport],
        model: Any,
        experiment: Experiment,
    ):
        self.run, self.target, self.seed = run, target, experiment.compute.seed
        residuals, self.alpha, _ = load_residuals(run.fused.folder / RESIDUAL_FILE)
        self.fused = [residual.to(target.device) for residual in residuals]
        self.settings = FusionSettings(**run.fused.inputs["settings"])
        self.transport_of = transport_of
        found = run.fused.record.get("strength")
        self.rows = self.settings.row_kinds[0] if found is None else found["rows"]
        self.found: dict[str, dict[str, Any]] = {}  # control -> how its strength was found
        self.search: StrengthSearch | None = None
        if self.settings.finds_alpha:
            self.experiment = as_fused(experiment, run)
            same = self.experiment.compute.dtype == experiment.compute.dtype
            self.model = model if same else target.load_model(self.experiment.compute.dtype)
            self.search = strength_search_of(run, target, self.model, self.experiment)

    def of(self, control: str) -> tuple[Iterable[Residual], Strength]:
        """(the residuals of a control or of the arm `fused_learned`, its strength)."""
        if control == FUSED_LEARNED:
            return self._learned()
        if self.search is None:
            return self._made(control, self.rows), self.alpha
        # The search asks for a kind of rows more than once. One kind at a time is kept, as it has all residuals.
        of_rows = lru_cache(1)(lambda rows: list(self._made(control, rows)))
        candidates = {rows: partial(of_rows, rows) for rows in self.settings.row_kinds}
        choice = self.search.find(control, candidates, search_settings(self.experiment))
        self.found[control] = choice.record()
        return of_rows(choice.candidate), choice.alpha

    def _learned(self) -> tuple[Iterable[Residual], Strength]:
        """(what was fused with one strength for all projections, a strength for each of them that is learned)."""
        experiment = self.experiment.changed(alpha=LEARNED)
        search = strength_search(
            strength_rows(experiment, self.run.plans), self.target, self.model, experiment, record_of_difference
        )
        choice = search.find(FUSED_LEARNED, {self.rows: lambda: self.fused}, search_settings(experiment))
        self.found[FUSED_LEARNED] = choice.record()
        return self.fused, choice.alpha

    def _made(self, control: str, rows: str) -> Iterator[Residual]:
        """The residuals of a control, with W~ regressed on a kind of rows.

        Raises:
            UserError: a weight is not finite, or the control does not exist for this run.
        """
        transport = self.transport_of(control).with_rows(rows)
        generator = torch.Generator().manual_seed(self.seed)
        fused = self._fused(rows, transport) if control in SHUFFLED else self.fused
        bar = Progress(fused, total=len(self.fused), desc=f"building {control}", unit="projections")
        try:
            for residual in bar:
                yield CONTROLS[control](residual, transport, generator)
        except ValueError as error:
            raise UserError(f"{control}: {error}") from None

    def _fused(self, rows: str, transport: Transport) -> Iterator[Residual]:
        """What was fused, or would have been with another kind of rows."""
        if rows == self.rows:
            yield from self.fused
            return
        for layer in range(self.target.layout.n_layers):
            yield from (residual for residual, _ in fuse_layer(transport, self.target, self.settings, layer))


def as_fused(experiment: Experiment, run: Run) -> Experiment:
    """The experiment with the settings by which stage 2 found the strength of the fusion."""
    searching = {name: run.fused.inputs["writing"][name] for name in SEARCHING}
    found = {**run.fused.inputs["settings"], **searching}
    return experiment.changed(**{name: value for name, value in found.items() if value is not None})


def strength_search_of(run: Run, target: Checkpoint, model: Any, experiment: Experiment) -> StrengthSearch:
    """The search for strengths on the rows on which stage 2 found that of the fusion.

    Raises:
        UserError: these rows have changed since.
    """
    rows = strength_rows(experiment, run.plans)
    if rows.identity() != run.fused.inputs["strength_rows"]:
        raise UserError(f"the data of {run.fused.folder} has changed since it was fused; run stage 2 again")
    return strength_search(rows, target, model, experiment, record_of_difference)
