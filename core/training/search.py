"""The search of stage 3: one training for every strength and learning rate, of which the best is kept.

What a strength means is defined by `core.fusion.residual.mix` (Eqs. 14-16, 18, 22). Here one is chosen: the trial with
the lowest loss on the validation rows is kept. A training without a search is a search with one trial.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from core.errors import UserError
from core.files import read_json, write_json, write_safetensors
from core.fusion.strengths import Strength, in_words
from core.models.families import TOWERS
from core.training.hot_linear import set_trainable
from core.training.recipe import Recipe, TrainingData
from core.training.settings import TrainingSettings
from core.training.start import Start
from core.training.weights import Diverged

log = logging.getLogger(__name__)

RESULTS = "results.json"
CHECKPOINTS = "checkpoints"
# In the folder of a trial: its weights, and its outcome, which is written last.
WEIGHTS, DONE = "trained.safetensors", "done.json"


@dataclass(frozen=True)
class Trial:
    """One training of a search.

    Attributes:
        alpha: the strength of the residual, or of each projection's; None where the target is trained without one.
        learning_rate: the peak learning rate.
        folder: where its resume points are, and in the end its weights and its outcome.
    """

    alpha: Strength | None
    learning_rate: float
    folder: Path

    @property
    def finished(self) -> bool:
        """Whether its outcome is on disk."""
        return (self.folder / DONE).is_file()

    def outcome(self) -> dict[str, Any]:
        """What a finished trial came to: {"alpha", "learning_rate", "validation", "train"}, with its last losses in
        nats per token. One that diverged has None as its validation loss, and {"diverged": message}."""
        return read_json(self.folder / DONE)["trial"]

    def curve(self) -> dict[str, Any]:
        """The loss curve of a finished trial."""
        return read_json(self.folder / DONE)["curve"]

    def weights(self) -> dict[str, Tensor]:
        """All weights of the unfolded model after training, by its own names. Only the best trial keeps them."""
        return load_file(self.folder / WEIGHTS)


@dataclass(frozen=True)
class SearchResult:
    """The finished trials of a search, what each came to, and the number of the one that is kept."""

    trials: list[Trial]
    outcomes: list[dict[str, Any]]
    chosen: int


def trials_of(start: Start, training: TrainingSettings, folder: Path) -> list[Trial]:
    """The trials of a search below the folder of a checkpoint: every strength with every learning rate."""
    strengths = start.strengths(training) if training.hot else (None,)
    grid = product(strengths, training.lr_search or (training.learning_rate,))
    return [
        Trial(alpha, learning_rate, folder / CHECKPOINTS / f"trial{number}")
        for number, (alpha, learning_rate) in enumerate(grid)
    ]


def search(start: Start, data: TrainingData, recipe: Recipe, folder: Path, process: Any) -> SearchResult:
    """Train with every strength and learning rate that the recipe asks for.

    Every finished trial leaves its outcome on disk, and the best one its weights too, so that a killed search continues
    with the trials that are missing.

    Args:
        folder: of the checkpoint that is being made.
        process: this process among those of `accelerate launch` (accelerate's PartialState).
    Raises:
        UserError: all of several trials diverged.
        Diverged: the only trial diverged.
    """
    trials = trials_of(start, recipe.training, folder)
    outcomes: list[dict[str, Any]] = []
    best = 0
    for number, trial in enumerate(trials):
        if not trial.finished:
            log.info(
                "trial %d of %d: %slearning rate %s",
                number + 1,
                len(trials),
                "" if trial.alpha is None else f"alpha {in_words(trial.alpha)}, ",
                trial.learning_rate,
            )
            run_trial(start, data, recipe, trial, process, alone=len(trials) == 1)
        outcomes.append(trial.outcome())
        better = loss_of(outcomes[number]) < loss_of(outcomes[best])
        worse, best = (best, number) if better else (number, best)
        if process.is_main_process:
            for point in trial.folder.glob("checkpoint-*"):
                shutil.rmtree(point)
            if worse != best:
                (trials[worse].folder / WEIGHTS).unlink(missing_ok=True)
            if len(trials) > 1:
                write_results(folder, outcomes)
    if len(trials) > 1 and loss_of(outcomes[best]) == math.inf:
        reason = outcomes[best].get("diverged", f"the validation loss is {outcomes[best]['validation']}")
        raise UserError(f"every trial diverged; the first: {reason}")
    return SearchResult(trials, outcomes, best)


def write_results(folder: Path, outcomes: list[dict[str, Any]], **chosen: int) -> None:
    """Write what the finished trials came to, and in the end the number of the `chosen` one."""
    write_json(folder / RESULTS, {"metric": "validation loss, nats per token", "trials": outcomes, **chosen})


def loss_of(outcome: dict[str, Any]) -> float:
    """The validation loss by which trials are compared.

    It is infinite where a trial diverged, so that such a trial is never the best, and where there is no validation,
    which a single trial does not need.
    """
    loss = outcome["validation"]
    return loss if loss is not None and math.isfinite(loss) else math.inf


def run_trial(start: Start, data: TrainingData, recipe: Recipe, trial: Trial, process: Any, alone: bool) -> None:
    """Train once, and write the weights and the outcome.

    Raises:
        Diverged: a trial that runs `alone` diverged. Otherwise this is its outcome, and the search goes on.
    """
    outcome: dict[str, Any] = {"alpha": trial.alpha, "learning_rate": trial.learning_rate}
    weights: dict[str, Tensor] = {}
    curve = None
    try:
        weights, curve = train_once(start, data, recipe, trial)
        outcome |= {"validation": curve["final_validation"], "train": curve["train"][-1]["loss"]}
    except Diverged as error:
        if alone:
            raise
        log.warning("the trial diverged: %s", error)
        outcome |= {"validation": None, "diverged": str(error)}
    if process.is_main_process:
        trial.folder.mkdir(parents=True, exist_ok=True)
        write_safetensors(trial.folder / WEIGHTS, unshared(weights))
        write_json(trial.folder / DONE, {"trial": outcome, "curve": curve})
    process.wait_for_everyone()


def train_once(
    start: Start, data: TrainingData, recipe: Recipe, trial: Trial
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """One training from the start.

    Returns:
        (all weights of the unfolded model after it, in float32 on the CPU, by the model's own names; its loss curve).
        Of a model that is sharded over processes only the first process gets the weights.
    Raises:
        Diverged: a loss or a weight became NaN or infinite.
    """
    # The Trainer and peft take many seconds to import, for which neither --help nor a refused command should wait.
    from transformers import set_seed

    from core.training.adapters import add_lora, merge_lora
    from core.training.trainer import train

    # Before adapters are drawn, so that a trial ends with the same weights alone and in a search.
    set_seed(recipe.compute.seed)
    layout, lora = start.checkpoint.layout, recipe.adapters.use_lora
    model = start.load(trial.alpha)
    if lora:
        adapted = add_lora(model, layout.family.tower, recipe.adapters)
        log.info("LoRA of rank %d on %d layers", recipe.adapters.lora_rank, adapted)
    strategy = "frozen_hot" if trial.alpha is None else recipe.training.freeze_strategy
    for part, (trainable, frozen) in set_trainable(model, strategy, lora).items():
        if trainable + frozen:
            log.info("%-8s %12d trainable %12d frozen parameters", part, trainable, frozen)
    recipe = replace(recipe, training=replace(recipe.training, learning_rate=trial.learning_rate))
    strengths = trial.alpha.values() if isinstance(trial.alpha, Mapping) else (trial.alpha,)
    unused_parameters = layout.model_type not in TOWERS or 0 in strengths
    trainer, curve = train(model, data, recipe, trial.folder, unused_parameters)
    if lora:
        merge_lora(model)
    return trainer.all_weights(), curve


def unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with a copy of each that shares memory with one before it, because safetensors refuses shared memory.

    Tied weights share memory.
    """
    seen: set[int] = set()
    out = {}
    for name, value in tensors.items():
        out[name] = value.clone() if value.data_ptr() in seen else value.contiguous()
        seen.add(value.data_ptr())
    return out
