"""What the stages have left in the folder of a run, and whether it belongs together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from core.errors import UserError
from core.manifest import Manifest
from core.runs.plan_directory import PlanDirectory
from core.runs.settings import of_one_scenario

# What stage 4 writes into a run: the losses of all arms, and the figures made of them.
RESULTS = "results.json"
# The arm of what was fused, with a learned strength for each projection in place of the one that stage 2 chose for all.
FUSED_LEARNED = "fused_learned"
# Arm -> the folder in a run that holds its trainings, one folder below it per seed.
TRAINED = {"no_hot": "adapted/no_hot", "distill": "adapted/distill", "fused_adapted": "adapted/hot"}


def training_folders(run: Path, arm: str) -> list[Path]:
    """The folders of an arm's trainings in a run, one per seed.

    What `--save-untrained-folded` writes beside them (`seed0-untrained`) is no training and is not among them.
    """
    return sorted((run / TRAINED[arm]).glob("seed*[0-9]"))


@dataclass(frozen=True)
class Run:
    """The finished stages of one run.

    Attributes:
        folder: the folder of the run, in which stage 4 writes its results.
        plans: the plan directory of stage 1, which may be elsewhere.
        fused: manifest of the fused checkpoint.
        trainings: arm -> the manifests of its trainings, one per seed; empty when nothing was trained.
    """

    folder: Path
    plans: PlanDirectory
    fused: Manifest
    trainings: Mapping[str, Sequence[Manifest]]

    @classmethod
    def open(cls, folder: Path, plans: PlanDirectory) -> Run:
        """Read the manifests of a run.

        Raises:
            UserError: a stage is missing or unfinished, or the stages do not belong together (`check_chain`).
        """
        run = cls(folder, plans, Manifest.read(folder / "fused", "fused"), trainings_of(folder))
        run.check_chain()
        return run

    @property
    def checkpoints(self) -> dict[str, Manifest]:
        """Arm, or `ARM/SEED` for a training -> manifest of its checkpoint."""
        trained = {f"{arm}/{found.folder.name}": found for arm, seeds in self.trainings.items() for found in seeds}
        return {"fused": self.fused, **trained}

    @property
    def trials(self) -> dict[str, int]:
        """Trained arm -> the number of trials among which the best was chosen; the largest number of its seeds."""
        return {arm: max(len(found.record["trials"]) for found in seeds) for arm, seeds in self.trainings.items()}

    def check_chain(self) -> None:
        """Refuse to compare stages that do not belong together.

        Trainings may differ in what they start from, in their teacher, in their seed, and in settings that only their
        scenario has. Anything else would be compared along with the start.

        Raises:
            UserError: a stage was not made from the one before it, or trainings differ in other settings or data.
        """
        if self.fused.inputs["plans"] != self.plans.manifest.record["fingerprint"]:
            raise UserError(f"{self.fused.folder} was made from other plans; run core/generate_hot_residual.py again")
        names_of_scenario = {"training_scenario", *of_one_scenario()}
        shared = []
        for seeds in self.trainings.values():
            of_scenario = []
            for training in seeds:
                if training.inputs["made_by"] != self.fused.record["fingerprint"]:
                    raise UserError(f"{training.folder} was made from another fused checkpoint; run stage 3 again")
                settings = {name: value for name, value in training.inputs["settings"].items() if name != "seed"}
                of_scenario.append({name: settings.pop(name) for name in names_of_scenario & settings.keys()})
                shared.append((settings, training.inputs["data"], training.inputs["validation"]))
            if any(one != of_scenario[0] for one in of_scenario) or any(one != shared[0] for one in shared):
                raise UserError(
                    f"the trainings in {self.folder / 'adapted'} had other settings or data; run all with the same"
                )


def folders_to_compare(run: Path) -> dict[str, list[Path]]:
    """Arm -> folders of its trainings in a run, in the order of the seeds' names, whether or not they are there.

    All arms need the same seeds, because each seed is compared with the same seed of another arm. Only distillation may
    be missing as a whole. The result is empty when nothing was trained.
    """
    seeds = {arm: {folder.name for folder in training_folders(run, arm)} for arm in TRAINED}
    names = sorted(set().union(*seeds.values()))
    return {
        arm: [run / subfolder / name for name in names]
        for arm, subfolder in TRAINED.items()
        if names and (seeds[arm] or arm != "distill")
    }


def trainings_of(run: Path) -> dict[str, list[Manifest]]:
    """Arm -> manifests of its trainings in a run (`folders_to_compare`).

    Raises:
        UserError: a training is missing or not finished.
    """
    return {
        arm: [Manifest.read(folder, "adapted") for folder in folders]
        for arm, folders in folders_to_compare(run).items()
    }
