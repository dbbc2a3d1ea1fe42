"""What a run has so far, whatever is finished, and which command makes what is missing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from core.errors import UserError
from core.files import MANIFEST, read_json
from core.fusion.residual_file import RESIDUAL_FILE
from core.manifest import COMMANDS, Manifest
from core.runs.command_line import EXPERIMENTS, RUN_FILE, load_experiment
from core.runs.plan_directory import PlanDirectory
from core.training.curve import CURVE
from evaluation.arms.run import RESULTS, TRAINED, training_folders
from evaluation.arms.samples import SAMPLES
from evaluation.pages.paths import place_of, without_paths
from evaluation.tables.current import check_losses

# What reading a file raises that is missing or damaged.
UNREADABLE = (UserError, OSError, SafetensorError)


@dataclass(frozen=True)
class Missing:
    """Something that a report would show and cannot: what, why, and the command that makes it."""

    what: str
    why: str
    command: str


@dataclass
class RunFiles:
    """The outputs of a run that can be read.

    Attributes:
        folder: of the run.
        plans: the plan directory; None until stage 1 has finished.
        fused: the manifest of the fused checkpoint; None until stage 2 has finished.
        report: contents of its fusion_report.json.
        trainings: `ARM/SEED` -> manifest of every finished training.
        curves: `ARM/SEED` -> its loss curve.
        results: contents of results.json; None until stage 4 has finished for the models that are there.
        samples: contents of samples.json; empty where stage 4 has written none.
        missing: what is not there.
    """

    folder: Path
    plans: PlanDirectory | None = None
    fused: Manifest | None = None
    report: Mapping[str, Any] = field(default_factory=dict)
    trainings: dict[str, Manifest] = field(default_factory=dict)
    curves: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    results: Mapping[str, Any] | None = None
    samples: Mapping[str, Any] = field(default_factory=dict)
    missing: list[Missing] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path) -> RunFiles:
        """Read whatever is finished in a run's folder.

        Raises:
            UserError: nothing of a run is there.
        """
        if not is_run(folder):
            raise UserError(
                f"{folder} is no run: it has none of plans, fused, adapted and {RESULTS}; give the folder of a run, "
                "such as runs/demo, or one that holds runs"
            )
        files = cls(folder)
        files._read_plans()
        files._read_fused()
        files._read_trainings()
        files._read_results()
        return files

    @property
    def residual_file(self) -> Path:
        """The residuals of the fused checkpoint."""
        return self.folder / "fused" / RESIDUAL_FILE

    @property
    def models(self) -> Mapping[str, Mapping[str, Any]]:
        """Role -> description of the two models, as far as a stage has recorded them."""
        if self.fused is not None:
            return self.fused.record["lineage"]["models"]
        if self.plans is None:
            return {}
        inputs = self.plans.manifest.inputs
        return {role: {"name": without_paths(inputs[role]["id"]), "licence": {}} for role in ("target", "source")}

    @property
    def trials(self) -> dict[str, int]:
        """Trained arm -> its number of trials, as `evaluation.arms.run.Run.trials` has it of a complete run."""
        counts: dict[str, int] = {}
        for name, training in self.trainings.items():
            arm = name.partition("/")[0]
            counts[arm] = max(counts.get(arm, 0), len(training.record["trials"]))
        return counts

    def lacks(self, what: str, why: str, command: str) -> None:
        """Note that something is not there, or cannot be read, and which script makes it."""
        self.missing.append(Missing(what, without_paths(why), f"python {command} {config_of(self.folder)}"))

    def _read_plans(self) -> None:
        try:
            self.plans = PlanDirectory(plans_folder(self.folder))
        except UserError as error:
            self.lacks("layer and neuron plans", str(error), COMMANDS["plans"])

    def _read_fused(self) -> None:
        try:
            self.fused = Manifest.read(self.folder / "fused", "fused")
            self.report = read_json(self.folder / "fused" / "fusion_report.json")
        except UserError as error:
            self.lacks("the fused model", str(error), COMMANDS["fused"])

    def _read_trainings(self) -> None:
        for arm, subfolder in TRAINED.items():
            command = f"{COMMANDS['adapted']} --training-scenario {Path(subfolder).name}"
            folders = training_folders(self.folder, arm)
            if not folders and arm != "distill":
                self.lacks(f"the training {arm}", f"there is no {subfolder}", command)
            for folder in folders:
                try:
                    self.trainings[f"{arm}/{folder.name}"] = Manifest.read(folder, "adapted")
                    self.curves[f"{arm}/{folder.name}"] = read_json(folder / CURVE)
                except UserError as error:
                    seed = folder.name.removeprefix("seed")
                    self.lacks(f"the training {arm}/{folder.name}", str(error), f"{command} --seed {seed}")

    def _read_results(self) -> None:
        command = "evaluation/compare_arms.py"
        try:
            record = read_json(self.folder / RESULTS)
            check_losses(self.folder, record)
            self.results = record
        except UserError as error:
            self.lacks("the verdict", str(error), command)
        try:
            self.samples = read_samples(self.folder / SAMPLES)
        except UserError as error:
            self.lacks("text samples", str(error), command)


def read_samples(path: Path) -> Mapping[str, Any]:
    """The contents of samples.json. Raises UserError where some model does not continue every prompt."""
    record = read_json(path)
    if any(len(told["continuations"]) != len(record["prompts"]) for told in record["texts"].values()):
        raise UserError(f"{path} does not fit its prompts; remove it")
    return record


def is_run(folder: Path) -> bool:
    """Whether a stage has begun to write into a folder."""
    adapted = any((folder / "adapted").glob(f"*/*/{MANIFEST}"))
    return adapted or any((folder / name).is_file() for name in (f"plans/{MANIFEST}", f"fused/{MANIFEST}", RESULTS))


def plans_folder(run: Path) -> Path:
    """The plan directory of a run, which may be that of another run beside it (`plans_from`)."""
    if not (run / "plans").is_dir() and (run / RUN_FILE).is_file():
        other = load_experiment(run / RUN_FILE).get("plans_from")
        return run.with_name(other) / "plans" if other else run / "plans"
    return run / "plans"


def config_of(run: Path) -> str:
    """The flags that give a stage the settings of a run: the experiment file that lies in it, or the one of the
    project with its name, or one that the reader has to name."""
    if (run / RUN_FILE).is_file():
        return f"--config {own_config(run)}"
    name = run.name.removesuffix("-quick")
    if (EXPERIMENTS / f"{name}.yaml").is_file():
        return f"--config scripts/experiments/{name}.yaml" + (" --quick" if run.name != name else "")
    return "--config YOURS.yaml"


def own_config(run: Path) -> str:
    """The experiment file that lies in a run, as a command takes it; RUN stands for a folder that cannot be named."""
    return place_of((run / RUN_FILE).absolute()) or f"RUN/{RUN_FILE}"
