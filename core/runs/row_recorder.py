"""The first half of stage 1: each model reads the texts, and its rows of activations are stored."""

from __future__ import annotations

import gc
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.errors import UserError
from core.files import TEMPORARY, write_safetensors
from core.fusion.projections import recorded_sides, source_sides
from core.models.activations import Recording, extract, row_bytes
from core.models.checkpoints import Checkpoint
from core.models.families import AttentionLayout
from core.models.reading import Reading, text_batches
from core.runs.plan_files import activations_file, read_tensor, selection_file, write_activations, write_selection
from core.runs.settings import Experiment

log = logging.getLogger(__name__)

# (rows, neurons) -> a float32 tensor of this shape that is to be filled.
Allocate = Callable[[int, int], Tensor]
# (side, layer) -> rows [T, n].
Rows = dict[tuple[str, int], Tensor]


@dataclass(frozen=True)
class RowRecorder:
    """Reads texts with one model after the other and stores the rows in a plan directory.

    Several processes of one launch share the batches, which are the same as those of a single process, so that the rows
    are the same to the last bit. Each process writes the rows of its batches to a file, and the first process joins
    them.

    Attributes:
        folder: the plan directory.
        experiment: the settings.
        state: accelerate's PartialState of this process.
    """

    folder: Path
    experiment: Experiment
    state: Any

    def record(self, model: str, checkpoint: Checkpoint, reading: Reading, aside: Tensor) -> None:
        """Read the texts with one model and store its rows, unless they are on disk already.

        Of the target the order of the neurons by strength is stored as well.

        Args:
            model: `target`, `source`, or `unaligned`, which is the target again at positions without a partner.
            reading: what the model reads.
            aside: [T] bool, the rows that are kept out of regressions.
        Raises:
            UserError: an activation is not finite, or the disk has no room for rows that are kept on it.
        """
        selected = model != "target" or selection_file(self.folder).is_file()
        if selected and activations_file(self.folder, model).is_file():
            return
        shared = self.state.num_processes > 1
        if shared:
            self._write_share(model, checkpoint, reading)
            self.state.wait_for_everyone()
        if not self.state.is_main_process:
            return
        with self._memory(model, checkpoint, reading.n_rows) as allocate:
            if shared:
                rows = self._join_shares(model, checkpoint.layout, allocate)
            else:
                rows = self._read(model, checkpoint, reading, self._batches(reading), allocate)
            half = self.experiment.reading.pooling == "token"
            strengths = write_activations(self.folder, model, rows, aside, half)
        if model == "target":
            write_selection(self.folder, strengths, self.experiment.fusion.fused)
        self.remove_shares(model)

    def _write_share(self, model: str, checkpoint: Checkpoint, reading: Reading) -> None:
        """Read this process's batches and write their rows, unless an earlier run has done so."""
        path = self._share_file(model, self.state.process_index)
        if path.is_file():
            return
        batches = self._batches(reading)[self.state.process_index :: self.state.num_processes]
        numbers = reading.row_numbers(n for batch in batches for n in batch)
        with self._memory(model, checkpoint, len(numbers)) as allocate:
            rows = self._read(model, checkpoint, reading, batches, allocate)
            path.parent.mkdir(parents=True, exist_ok=True)
            tensors = {f"{side}.{layer}": X for (side, layer), X in rows.items()}
            write_safetensors(path, tensors | {"numbers": numbers})

    def _join_shares(self, model: str, layout: AttentionLayout, allocate: Allocate) -> Rows:
        """The rows of all processes, in the order of the texts."""
        paths = [self._share_file(model, process) for process in range(self.state.num_processes)]
        numbers = [read_tensor(path, "numbers") for path in paths]
        joined = {}
        for side in self.sides(model):
            for layer in range(layout.n_layers):
                joined[side, layer] = X = allocate(sum(map(len, numbers)), layout.size(side))
                for path, rows in zip(paths, numbers, strict=True):
                    X[rows] = read_tensor(path, f"{side}.{layer}")
        return joined

    def remove_shares(self, model: str) -> None:
        """Remove the files of the processes, which nobody needs when the model's rows are stored."""
        shutil.rmtree(self._share_file(model, 0).parent, ignore_errors=True)

    def _read(
        self, model: str, checkpoint: Checkpoint, reading: Reading, batches: list[list[int]], allocate: Allocate
    ) -> Rows:
        """Load a model, read batches of texts with it, and free it again.

        A device map may put weights on disk; the folder for them is temporary.
        """
        experiment = self.experiment
        with tempfile.TemporaryDirectory(prefix=TEMPORARY + "offload-", dir=self.folder) as offload:
            loaded = checkpoint.load_model(experiment.compute.dtype, experiment.reading.device_map, Path(offload))
            recording = Recording(self.sides(model), allocate)
            rows = extract(loaded, checkpoint.layout, reading, batches, f"{model} activations", recording)
            del loaded
            gc.collect()
        return rows

    def _batches(self, reading: Reading) -> list[list[int]]:
        return text_batches(reading, self.experiment.compute.tokens_per_batch)

    def sides(self, model: str) -> tuple[str, ...]:
        """What is recorded of a model in every layer."""
        projections = self.experiment.fusion.fused
        if model != "source":
            return recorded_sides(projections)
        return source_sides(projections, all_inputs=self.experiment.models.source_base is not None)

    def _memory(self, model: str, checkpoint: Checkpoint, n_rows: int) -> AbstractContextManager[Allocate]:
        budget = self.experiment.reading.activations_budget_mb * 2**20
        return row_memory(self.folder, row_bytes(checkpoint.layout, n_rows, self.sides(model)), budget)

    def _share_file(self, model: str, process: int) -> Path:
        """The file of the rows that one process reads. Its name holds the number of processes, too."""
        name = f"{process}-of-{self.state.num_processes}.safetensors"
        return self.folder / "activations" / f"{model}-shares" / name


@contextmanager
def row_memory(folder: Path, needed: int, budget: int) -> Iterator[Allocate]:
    """Yield a function that allocates tensors for rows of `needed` bytes in all.

    The tensors are in memory if they are within `budget` bytes. Otherwise they are files, mapped into memory, in a
    temporary folder in `folder` that is removed at the end.

    Raises:
        UserError: the disk has no room for the files.
    """
    if needed <= budget:
        yield torch.empty
        return
    free = shutil.disk_usage(folder).free
    # The files, and the file of activations that is made of them. The system kills a process that writes to a mapped
    # file on a full disk, without an error that could be caught.
    if free < 2 * needed:
        raise UserError(
            f"{folder} has {free / 2**30:.1f} GiB free; rows beyond --activations-budget-mb need "
            f"{2 * needed / 2**30:.1f} GiB there: make room or raise the budget"
        )
    with tempfile.TemporaryDirectory(prefix=TEMPORARY + "rows-", dir=folder) as files:
        log.info("%.1f GiB of rows are kept on disk (--activations-budget-mb)", needed / 2**30)
        names = map(str, count())
        yield lambda rows, n: torch.from_numpy(np.memmap(Path(files) / next(names), np.float32, "w+", shape=(rows, n)))
