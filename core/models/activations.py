"""Model + texts -> activations [T, n] of every side of every layer (Eqs. 3-6)."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from core.batching import pad_with_mask
from core.errors import UserError
from core.fusion.projections import ATTENTION, PROJECTIONS, first_reader, recorded_sides
from core.models.families import AttentionLayout
from core.models.reading import Reading
from core.progress import Progress

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recording:
    """What is recorded, and where it goes.

    Attributes:
        sides: recorded in every layer; those of attention unless said otherwise.
        allocate: (rows, neurons) -> float32 tensor on the CPU, which is filled.
    """

    sides: Sequence[str] = recorded_sides(ATTENTION)
    allocate: Callable[[int, int], Tensor] = torch.empty


def row_bytes(layout: AttentionLayout, n_rows: int, sides: Iterable[str]) -> int:
    """Bytes of the rows of some sides of all layers in float32."""
    return 4 * n_rows * layout.n_layers * sum(map(layout.size, sides))


@torch.no_grad()
def extract(
    model: nn.Module,
    layout: AttentionLayout,
    reading: Reading,
    batches: Sequence[list[int]],
    desc: str,
    recording: Recording | None = None,
) -> dict[tuple[str, int], Tensor]:
    """Run the backbone (no LM head) over batches of texts and record what every projection reads and gives.

    The outputs are those of the linear layers, before rotary embedding. A batch that does not fit in memory is halved,
    and so is every later one of more than half its size.

    Args:
        model: causal language model on its device, or on those of a device map.
        reading: token ids and picked positions.
        batches: the numbers of the texts to read, batch by batch.
        desc: label of the progress bar.
        recording: what is recorded in every layer, and where it goes; by default the sides of attention, in memory.
    Returns:
        {(side, layer): [rows, n]}: the mean over each text's tokens, or the picked tokens, in the order of the texts.
    Raises:
        UserError: a text does not fit in memory on its own.
    """
    recording = recording or Recording()
    texts = sorted(n for batch in batches for n in batch)
    *starts, total = accumulate(map(reading.count, texts), initial=0)
    start = dict(zip(texts, starts, strict=True))
    out = {
        (side, layer): recording.allocate(total, layout.size(side))
        for side in recording.sides
        for layer in range(layout.n_layers)
    }
    recorder = _Recorder(model, layout, out)
    try:
        with Progress(total=len(texts), desc=desc, unit="texts") as bar:
            _read_all(recorder, reading, batches, start, bar)
    finally:
        recorder.remove()
    return out


def _read_all(
    recorder: _Recorder, reading: Reading, batches: Sequence[list[int]], start: dict[int, int], bar: Any
) -> None:
    """Let a recorder read every batch, in halves where the memory does not suffice.

    Args:
        start: number of a text -> its first row.
        bar: Progress's, which counts texts.
    """
    waiting, limit = deque(batches), math.inf
    while waiting:
        batch = waiting.popleft()
        half, longest = (len(batch) + 1) // 2, max(len(reading.ids[n]) for n in batch)
        if len(batch) > 1 and len(batch) * longest > limit:
            waiting.extendleft((batch[half:], batch[:half]))
            continue
        rows = torch.cat([torch.arange(start[n], start[n] + reading.count(n)) for n in batch])
        if recorder.read(batch, reading, rows):
            bar.update(len(batch))
        elif len(batch) == 1:
            raise _too_long(batch[0], longest)
        else:
            log.warning("out of memory at %d x %d tokens: halving the batch", len(batch), longest)
            limit = half * longest
            waiting.appendleft(batch)


def _too_long(text: int, tokens: int) -> UserError:
    return UserError(
        f"text {text + 1} ({tokens} tokens) does not fit in memory on its own; cut texts with a lower --max-tokens, or "
        "use --device-map auto or --dtype bfloat16"
    )


def _pooling(batch: list[int], reading: Reading, mask: Tensor) -> Callable[[Tensor], Tensor]:
    """Function [B, S, n] -> rows of this batch: the mean over real tokens in float32 (Eq. 4), or the picked tokens."""
    if reading.picks is None:
        weights = cache((mask / mask.sum(1, keepdim=True)).unsqueeze(1).to)  # device -> [B, 1, S]
        # [B, 1, S] @ [B, S, n] -> [B, n]
        return lambda hidden: torch.bmm(weights(hidden.device), hidden.float()).squeeze(1)
    longest = mask.shape[1]
    picked = [b * longest + token for b, n in enumerate(batch) for token in reading.picks[n]]
    picked_on = cache(torch.tensor(picked).to)  # device -> [rows], numbers of tokens among all B S of the batch
    return lambda hidden: hidden.flatten(0, 1).index_select(0, picked_on(hidden.device))


class _Recorder:
    """The backbone with forward hooks on its projections, which fill `out`."""

    def __init__(self, model: nn.Module, layout: AttentionLayout, out: dict[tuple[str, int], Tensor]):
        self.backbone: Any = layout.decoder(model)
        self.out = out
        self.on_device: dict[tuple[str, int], Tensor] = {}
        self.pool: Any = None
        self.rows: Any = None
        self.handles = [
            layout.linear(model, layer, projection).register_forward_hook(self._hook(projection, layer))
            for layer in range(layout.n_layers)
            for projection, one in PROJECTIONS.items()
            if (projection, layer) in out or (one.input_side, layer) in out
        ]

    def read(self, batch: list[int], reading: Reading, rows: Tensor) -> bool:
        """Fill the `rows` of `out` that the batch gives; False when the memory does not suffice."""
        ids, mask = pad_with_mask([reading.ids[n] for n in batch])
        self.pool, self.rows = _pooling(batch, reading, mask), rows
        device = _input_device(self.backbone)
        try:
            self.backbone(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
            for key, pooled in self.on_device.items():
                self.out[key].index_copy_(0, rows, pooled.float().cpu())
            return True
        except RuntimeError as error:
            # Here, because accelerate takes a while to import and memory rarely runs out.
            from accelerate.utils.memory import should_reduce_batch_size

            if not should_reduce_batch_size(error):
                raise
            return False
        finally:
            self.on_device.clear()

    def _hook(self, projection: str, layer: int):
        """A forward hook that records the output of a projection, and its input where no earlier one reads the same."""

        def record(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            side = PROJECTIONS[projection].input_side
            if (projection, layer) in self.out:
                self._keep((projection, layer), self.pool(output))
            if (side, layer) in self.out and first_reader(side) == projection:
                self._keep((side, layer), self.pool(args[0]))

        return record

    def _keep(self, key: tuple[str, int], pooled: Tensor) -> None:
        if pooled.device.type == "cpu":
            self.out[key].index_copy_(0, self.rows, pooled.float())  # now, while it is in the processor's cache
        else:
            self.on_device[key] = pooled  # copied after the pass: a copy now would make the device wait at every layer

    def remove(self) -> None:
        """Take the hooks off again."""
        for handle in self.handles:
            handle.remove()


def _input_device(backbone: Any) -> torch.device:
    """The device on which the backbone expects token ids. An offloaded embedding is on none; its hook knows where it
    computes."""
    embedding = backbone.get_input_embeddings()
    device = getattr(getattr(embedding, "_hf_hook", None), "execution_device", None)
    return embedding.weight.device if device is None else torch.device(device)
