"""The control `random_source`: the source's architecture with fresh weights reads what the source has read.

Its rows and weights take the place of the source's; texts, positions, layers that correspond (the run's own P) and the
regression are the run's. Feature maps that read plans of neurons would need new plans, and have no such control.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.data import divide
from core.errors import UserError
from core.files import TEMPORARY
from core.models.checkpoints import Checkpoint
from core.models.reading import Reading, read_aligned, read_texts
from core.runs.calibration import calibration_again
from core.runs.command_line import RESOLVED, load_experiment
from core.runs.plan_directory import PlanDirectory
from core.runs.plan_files import activations_file, read_tensor
from core.runs.process import process_state
from core.runs.row_recorder import RowRecorder
from core.runs.settings import Experiment
from evaluation.arms.run import Run

# The seed with which the fresh weights are drawn.
SEED = 0


@dataclasses.dataclass(frozen=True)
class FreshWeights(Checkpoint):
    """A checkpoint with new weights, as the class of its model initialises them for training from scratch.

    Attributes:
        drawn: the model, once it has been loaded. It is kept, because no file has its weights.
    """

    drawn: list[Any] = dataclasses.field(default_factory=list)

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> FreshWeights:
        """The same architecture as `checkpoint`."""
        return cls(**{field.name: getattr(checkpoint, field.name) for field in dataclasses.fields(checkpoint)})

    def weight(self, layer: int, projection: str) -> Tensor:
        """The weight [out, in] of one projection of the loaded model, float32, on `device`."""
        return self.layout.linear(self.drawn[0], layer, projection).weight.detach().float()

    def load_model(
        self, dtype: str, device_map: str | dict[str, Any] | None = None, offload_folder: Path | None = None
    ) -> Any:
        """The model in eval mode, on one device: weights that are drawn need no folder and are not spread."""
        import transformers

        self.check_code()
        code = {"trust_remote_code": self.trust_remote_code}
        config = transformers.AutoConfig.from_pretrained(self.folder, **code)
        if dtype == "auto":
            dtype = "float32" if self.device == "cpu" else str(config.dtype).removeprefix("torch.")
        with torch.random.fork_rng():
            torch.manual_seed(SEED)
            loader = getattr(transformers, self.layout.family.auto)
            model = loader.from_config(config, dtype=getattr(torch, dtype), **code).to(self.device).eval()
        self.drawn[:] = [model]
        return model


class OtherSource(PlanDirectory):
    """A plan directory in which the source's rows, means and deviations are those of another folder."""

    def __init__(self, plans: PlanDirectory, rows: Path):
        """Open the folder of `plans` again; `rows` has the source's activations as a plan directory has them."""
        self._rows = rows
        super().__init__(plans.folder, plans.device)

    def _read(self, model: str, key: str) -> Tensor:
        folder = self._rows if model == "source" else self.folder
        return read_tensor(activations_file(folder, model), key).to(self.device)


@contextmanager
def random_source_plans(
    run: Run, target: Checkpoint, source: Checkpoint, experiment: Experiment
) -> Iterator[tuple[PlanDirectory, Checkpoint]]:
    """A source with fresh weights, and the run's plan directory with its rows, which are in a temporary folder.

    Args:
        experiment: of stage 4, whose data is the run's.
    Raises:
        UserError: the calibration texts are not those of stage 1, or the disk has no room for the rows.
    """
    stage1 = Experiment.of(**load_experiment(run.plans.folder / RESOLVED))
    stage1 = stage1.changed(device=experiment.compute.device)
    reading = source_reading(run, (target.load_tokenizer(), source.load_tokenizer()), experiment, stage1)
    aside = read_tensor(activations_file(run.plans.folder, "target"), "kept_aside")
    with tempfile.TemporaryDirectory(prefix=TEMPORARY + "random-source-", dir=run.folder) as folder:
        recorder = RowRecorder(Path(folder), stage1, process_state(experiment.compute.device))
        fresh = FreshWeights.of(source)
        recorder.record("source", fresh, reading, aside)
        yield OtherSource(run.plans, Path(folder)), fresh


def source_reading(run: Run, tokenizers: tuple[Any, Any], experiment: Experiment, stage1: Experiment) -> Reading:
    """What the source read in stage 1.

    Args:
        tokenizers: of target and source.
        stage1: the settings of stage 1.
    Raises:
        UserError: the calibration texts are not those of stage 1.
    """
    calibration = calibration_again(divide(experiment.data.spec), experiment, run.plans.manifest.inputs["data"])
    if calibration is None:
        raise UserError(
            f"random_source: the calibration texts are no longer those of {run.plans.folder}; give the data with which "
            "stage 1 was run, or leave out --controls all"
        )
    settings, seed = stage1.reading, stage1.compute.seed
    if settings.pooling == "text":
        return read_texts(calibration.rows, tokenizers[1], settings.max_tokens)
    return read_aligned(calibration.rows, *tokenizers, settings.max_tokens, settings.max_rows, seed)[1]
