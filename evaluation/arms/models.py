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
from core.models.checkpoints import Checkpoint, open_checkpoint
from core.runs.settings import Experiment
from core.training.heldout import text_nll
from core.training.hot_linear import fold_in_place, restore_base
from evaluation.arms.control_residuals import ControlResiduals
from evaluation.arms.run import Run
from evaluation.arms.texts import TextSet

# Name of a set of texts -> summed negative log-likelihood (nats) of every text.
Losses = dict[str, list[float]]


@dataclass(frozen=True)
class Arms:
    """The models that are compared.

    `base` and the controls are the target itself, which is loaded once: a control's residual is folded into its
    weights, and afterwards the weights are restored. The other arms are checkpoints on disk.

    Attributes:
        run: the stages whose results are compared.
        target, source: the pair of models from which the run was made.
        experiment: device, dtype, seed and batch size.
    """

    run: Run
    target: Checkpoint
    source: Checkpoint
    experiment: Experiment

    @property
    def absent(self) -> dict[str, str]:
        """Control that this run cannot have -> why."""
        found = {}
        if self.run.plans.shape[0] == 1:
            found["wrong_layer"] = "the target has one layer, so that W~ of another layer does not exist"
        if FEATURE_MAPS[self.settings.feature_map].reads_feature_plans:
            found["filtered_self"] = f"{self.settings.feature_map} regresses nothing whose spectrum could be taken"
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

    def losses(self, arms: Sequence[str], sets: Mapping[str, TextSet]) -> Iterator[tuple[str, Losses]]:
        """(arm, its losses) of each of `arms`, those without a checkpoint first.

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
            yield arm, self._losses_of(checkpoint.load_model(compute.dtype), arm, sets)

    def _losses_in_memory(self, arms: Sequence[str], sets: Mapping[str, TextSet]) -> Iterator[tuple[str, Losses]]:
        """Of base and controls, whose model is the target, changed in memory."""
        model = self.target.load_model(self.experiment.compute.dtype)
        name_of = self.target.layout.name
        controls = ControlResiduals(self.run, self.target, self.source, model, self.experiment)
        for arm in arms:
            changed, alpha = ([], 0.0) if arm == "base" else controls.of(arm)
            fold_in_place(model, changed, name_of, alpha, self.settings.residual_form)
            yield arm, self._losses_of(model, arm, sets)
            restore_base(model, controls.fused, name_of)  # all residuals of a run have the same selection

    def _losses_of(self, model: Any, arm: str, sets: Mapping[str, TextSet]) -> Losses:
        size = self.experiment.compute.tokens_per_batch
        losses = {name: text_nll(model, texts.examples, size, f"{arm}, {name}") for name, texts in sets.items()}
        for name, values in losses.items():
            check_losses(values, arm, name)
        return losses


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
