"""What one training is given: the data that it reads, and the recipe that it follows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from core.models.settings import ComputeSettings
from core.training.distill import Teacher
from core.training.settings import AdapterSettings, DistillSettings, TrainingSettings
from core.training.sft import Example
from core.training.soft_targets import StoredTeacher


@dataclass(frozen=True)
class TrainingData:
    """What one training reads.

    Attributes:
        examples: the rows to train on, as token ids and labels.
        validation: the rows whose loss is recorded before, during and after training; none of them is trained on.
        teacher: what has a next-token distribution that is learned together with the labels, where there is one.
    """

    examples: Sequence[Example]
    validation: Sequence[Example] = ()
    teacher: Teacher | StoredTeacher | None = None


@dataclass(frozen=True)
class Recipe:
    """How one training goes.

    Attributes:
        run_name: the name of the run in logging services.
        training: among others the freeze strategy, the learning rate and the number of epochs.
        adapters: the LoRA adapters, if they are what trains.
        compute: device, dtype of the passes, seed, and tokens per batch of validation and of the teacher.
        distill: how a teacher takes part, if there is one.
    """

    run_name: str
    training: TrainingSettings
    adapters: AdapterSettings
    compute: ComputeSettings
    distill: DistillSettings
