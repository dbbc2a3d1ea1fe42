"""The arms of a run: how the model of each is made, and its losses on the texts."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from safetensors import SafetensorError

from core.errors import UserError
from core.files import digest_of
from core.fusion.controls import CONTROLS, FEW
from core.fusion.feature_maps import FEATURE_MAPS
from core.fusion.settings import AUTO, FusionSettings
from core.fusion.transport_weights import Transport
from core.models.checkpoints import Checkpoint, open_checkpoint, open_source_base
from core.runs.settings import Experiment
from core.training.heldout import text_nll, token_losses
from core.training.hot_linear import fold_in_place, restore_base
from evaluation.arms.bits import SOURCE
from evaluation.arms.control_residuals import ControlResiduals
from evaluation.arms.random_source import random_source_plans
from evaluation.arms.run import FUSED_LEARNED, Run
from evaluation.arms.texts import TextSet

# What a model can raise that is damaged, gives no finite number, or needs more memory than there is
# (torch.OutOfMemoryError is a RuntimeError).
UNUSABLE = (UserError, OSError, SafetensorError, RuntimeError, MemoryError)


class Losses(NamedTuple):
    """Name of a set of texts -> summed negative log-likelihood (nats) of every text.

    Attributes:
        tokens: over the target's tokens with loss; empty for the source, which has other tokens.
        bytes: over the bytes that both models are scored on; 0 for a text without any.
        strength: how the strength of a control was found (`core.training.strengths.Choice.record`); None for an arm of
            which none was.
    """

    tokens: dict[str, list[float]]
    bytes: dict[str, list[float]]
    strength: dict[str, Any] | None = None


@dataclass(frozen=True)
class Arms:
    """The models that are compared.

    `base` and the controls are the target itself, which is loaded once: a control's residual is folded into its
    weights, and afterwards the weights are restored. The other arms are checkpoints on disk. The source is loaded last,
    alone.

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
            found["random_source"] = f"{self.settings.feature_map} reads plans, which would have to be solved anew"
        elif self.experiment.evaluation.controls != "all":
            found["random_source"] = "it takes minutes, with --controls all"
        if self.experiment.evaluation.controls == "few":
            # What a run cannot have in any case, or lacks with the usual controls as well, keeps its own reason.
            found = dict.fromkeys([one for one in CONTROLS if one not in FEW], "few controls were asked for") | found
        if self.source_base is not None:
            found["self"] = "the target has learned nothing over itself, so that this is base"
            found["random_source"] = "a model with fresh weights has learned nothing over the source's base"
        return found

    @property
    def settings(self) -> FusionSettings:
        """How the run was fused."""
        return FusionSettings(**self.run.fused.inputs["settings"])

    @property
    def learns(self) -> bool:
        """Whether there is an arm with learned strengths beside a fusion whose one strength was chosen."""
        return self.experiment.evaluation.learned_arm and self.settings.alpha == AUTO

    @property
    def made_from(self) -> dict[str, str]:
        """Arm, or `ARM/SEED` for a training -> digest of what decides what its model is, in the order of the table:
        a manifest, and the contents of the source."""
        controls = [control for control in CONTROLS if control not in self.absent]
        fused = digest_of(self.run.fused.record)
        trained = {arm: digest_of(found.record) for arm, found in self.run.checkpoints.items()}
        source = {key: found for key, found in self.source.identity.items() if key not in ("id", "revision")}
        learned = (FUSED_LEARNED,) if self.learns else ()
        return {**dict.fromkeys(("base", *controls, *learned), fused), **trained, SOURCE: digest_of(source)}

    def losses(self, arms: Sequence[str], sets: Mapping[str, TextSet]) -> Iterator[tuple[str, Losses]]:
        """(arm, its losses) of each of `arms`, those without a checkpoint first and the source last.

        Raises:
            UserError: a loss that is not finite.
        """
        on_disk = [arm for arm in arms if arm in self.run.checkpoints]
        if in_memory := [arm for arm in arms if arm not in (*on_disk, SOURCE)]:
            with self._transports(in_memory) as transport_of:
                yield from self._losses_in_memory(in_memory, sets, transport_of)
        models, compute = self.experiment.models, self.experiment.compute
        for arm in on_disk:
            folder = str(self.run.checkpoints[arm].folder)
            checkpoint = open_checkpoint(folder, None, models.trust_remote_code, compute.device)
            yield arm, self._losses_of(checkpoint.load_model(compute.dtype), arm, sets)
        if SOURCE in arms:
            gc.collect()  # the source may need all memory that there is
            yield SOURCE, self._losses_of_source(sets)

    @contextmanager
    def _transports(self, arms: Sequence[str]) -> Iterator[Callable[[str], Transport]]:
        """A function from an arm to the transport of its W~: the run's own, but for `random_source`."""
        usual = Transport(self.run.plans, self.source, self.settings, self.source_base)
        if "random_source" not in arms:
            yield lambda _: usual
            return
        with random_source_plans(self.run, self.target, self.source, self.experiment) as (plans, fresh_source):
            fresh = Transport(plans, fresh_source, self.settings)
            yield lambda arm: fresh if arm == "random_source" else usual

    def _losses_in_memory(
        self, arms: Sequence[str], sets: Mapping[str, TextSet], transport_of: Callable[[str], Transport]
    ) -> Iterator[tuple[str, Losses]]:
        """The losses of base, controls and `fused_learned`, whose model is the target, changed in memory."""
        model = self.target.load_model(self.experiment.compute.dtype)
        name_of = self.target.layout.name
        controls = ControlResiduals(self.run, self.target, transport_of, model, self.experiment)
        for arm in arms:
            changed, alpha = ([], 0.0) if arm == "base" else controls.of(arm)
            fold_in_place(model, changed, name_of, alpha, self.settings.residual_form)
            yield arm, self._losses_of(model, arm, sets)._replace(strength=controls.found.get(arm))
            restore_base(model, controls.fused, name_of)  # all residuals of a run have the same selection

    def _losses_of(self, model: Any, arm: str, sets: Mapping[str, TextSet]) -> Losses:
        """The losses of a model that reads the target's tokens, on all texts."""
        found = Losses({}, {})
        for name, texts in sets.items():
            of_tokens, of_bytes = ([0.0] * len(texts.examples) for _ in range(2))
            size = self.experiment.compute.tokens_per_batch
            for batch, losses in token_losses(model, texts.examples, size, f"{arm}, {name}"):
                for number, row, total in zip(batch, losses, losses.sum(1).tolist(), strict=True):
                    of_tokens[number] = total
                    of_bytes[number] = float(row[[token - 1 for token in texts.spans.target[number]]].sum())
            check_losses(of_tokens, arm, name)
            found.tokens[name], found.bytes[name] = of_tokens, of_bytes
        return found

    def _losses_of_source(self, sets: Mapping[str, TextSet]) -> Losses:
        """The losses of the source, whose tokens are its own, so that it has losses on bytes alone."""
        model = self.source.load_model(self.experiment.compute.dtype)
        found = Losses({}, {})
        for name, texts in sets.items():
            per_batch = self.experiment.compute.tokens_per_batch
            measured = iter(text_nll(model, texts.spans.source, per_batch, f"{SOURCE}, {name}"))
            found.bytes[name] = [next(measured) if size else 0.0 for size in texts.spans.sizes]
            check_losses(found.bytes[name], SOURCE, name)
        return found


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
