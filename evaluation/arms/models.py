"""The arms of a run: how the model of each is made, and its losses on the texts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from core.errors import UserError
from core.files import digest_of
from core.fusion.controls import CONTROLS
from core.fusion.feature_maps import FEATURE_MAPS
from core.fusion.settings import FusionSettings
from core.fusion.transport_weights import Transport
from core.models.checkpoints import Checkpoint, open_checkpoint, open_source_base
from core.runs.settings import Experiment
from core.training.heldout import text_nll
from core.training.hot_linear import fold_in_place, restore_base
from evaluation.arms.control_residuals import ControlResiduals
from evaluation.arms.run import Run
from evaluation.arms.texts import TextSet

# Name of a set of texts -> summed negative log-likelihood (nats) of every text.
Losses = dict[str, list[float]]
# `core.training.strengths.Choice.record` of a control; None for an arm that no strength was found for.
Strength = dict[str, Any] | None


@dataclass(frozen=True)
class Arms:
    """The models that are compared.

    `base` and the controls are the target itself, which is loaded once: a control's residual is folded into its
    weights, and afterwards the weights are restored. The other arms are checkpoints on disk.

    Attributes:
        run: the stages whose results are compared.
        target, source: the pair of models from which the run was made.
        experiment: device, dtype, seed and batch size.
        source_base: the model that the source was tuned from, where the run transported their difference.
    """

    run: Run
    target: Checkpoint
    source: Checkpoint
    experiment: Experiment
    source_base: Checkpoint | None = None

    @property
    def absent(self) -> dict[str, str]:
        """Control that this run cannot have -> why."""
        found = {}
        if self.run.plans.shape[0] == 1:
            found["wrong_layer"] = "the target has one layer, so that W~ of another layer does not exist"
        if FEATURE_MAPS[self.settings.feature_map].reads_feature_plans:
            found["filtered_self"] = f"{self.settings.feature_map} regresses nothing whose spectrum could be taken"
        if self.source_base is not None:
            found["self"] = "the target has learned nothing over itself, so that this is base"
        return found

    @property
    def settings(self) -> FusionSettings:
        """How the run was fused."""
        return FusionSettings(**self.run.fused.inputs["settings"])

    @property
    def made_from(self) -> dict[str, str]:
        """Arm, or `ARM/SEED` for a training -> digest of the manifest that decides what its model is, in the order of
        the table."""
        controls = [control for control in CONTROLS if control not in self.absent]
        fused = dict.fromkeys(("base", *controls), digest_of(self.run.fused.record))
        return fused | {arm: digest_of(found.record) for arm, found in self.run.checkpoints.items()}

    def losses(self, arms: Sequence[str], sets: Mapping[str, TextSet]) -> Iterator[tuple[str, Losses, Strength]]:
        """(arm, its losses, how its strength was found) of each of `arms`, those without a checkpoint first.

        Raises:
            UserError: a loss that is not finite.
        """
        on_disk = [arm for arm in arms if arm in self.run.checkpoints]
        if len(on_disk) < len(arms):
            yield from self._losses_in_memory([arm for arm in arms if arm not in on_disk], sets)
        models, compute = self.experiment.models, self.experiment.compute
        for arm in on_disk:
            folder = str(self.run.checkpoints[arm].folder)
            checkpoint = open_checkpoint(folder, None, models.trust_remote_code, compute.device)
            yield arm, self._losses_of(checkpoint.load_model(compute.dtype), arm, sets), None

    def _losses_in_memory(
        self, arms: Sequence[str], sets: Mapping[str, TextSet]
    ) -> Iterator[tuple[str, Losses, Strength]]:
        """Of base and controls, whose model is the target, changed in memory."""
        model = self.target.load_model(self.experiment.compute.dtype)
        name_of = self.target.layout.name
        transport = Transport(self.run.plans, self.source, self.settings, self.source_base)
        controls = ControlResiduals(self.run, self.target, transport, model, self.experiment)
        for arm in arms:
            changed, alpha = ([], 0.0) if arm == "base" else controls.of(arm)
            fold_in_place(model, changed, name_of, alpha, self.settings.residual_form)
            yield arm, self._losses_of(model, arm, sets), controls.found.get(arm)
            restore_base(model, controls.fused, name_of)  # all residuals of a run have the same selection

    def _losses_of(self, model: Any, arm: str, sets: Mapping[str, TextSet]) -> Losses:
        size = self.experiment.compute.tokens_per_batch
        losses = {name: text_nll(model, texts.examples, size, f"{arm}, {name}") for name, texts in sets.items()}
        for name, values in losses.items():
            check_losses(values, arm, name)
        return losses


def open_base_of(run: Run, experiment: Experiment, source: Checkpoint) -> Checkpoint | None:
    """The model that the source was tuned from, where the run transported their difference; the controls need it.

    Raises:
        UserError: the settings name another model than stage 2 had, or one where it had none.
    """
    made_from, given = run.fused.inputs.get("source_base"), experiment.models.source_base
    if made_from is None and given is None:
        return None
    if made_from is not None and given is None:
        experiment = experiment.changed(source_base=made_from["id"], source_base_revision=made_from["revision"])
    base = open_source_base(experiment.models, source, FusionSettings(**run.fused.inputs["settings"]).fused)
    if made_from is None or base is None or not base.same_model(made_from):
        before = "without a source base" if made_from is None else f"with the source base {made_from['id']}"
        raise UserError(
            f"{run.fused.folder} was fused {before}, got {given}; run core/generate_hot_residual.py again, or leave "
            "--source-base out"
        )
    return base


def check_losses(losses: Sequence[float], arm: str, name: str) -> None:
    """Refuse losses that are not finite: a single NaN would make every mean NaN.

    Raises:
        UserError: names the arm, how many texts are affected, and the first of them.
    """
    bad = [number for number, loss in enumerate(losses, 1) if not math.isfinite(loss)]
    if bad:
        raise UserError(
            f"{arm}: the loss of {len(bad)} of {len(losses)} {name} texts is not finite, first that of text {bad[0]} "
            f"({losses[bad[0] - 1]}); the model is damaged or overflows: look for NaN in its weights, make it again "
            "with a smaller alpha or learning rate, or compute with --dtype float32"
        )
