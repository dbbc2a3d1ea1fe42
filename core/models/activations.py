"""Model + texts -> activations [T, n] per layer and side (Eqs. 3-6)."""

from __future__ import annotations

import logging
import math
import random
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from core.batching import pad_with_mask, token_batches
from core.data import Row
from core.errors import UserError
from core.fusion.projections import PROJECTIONS, READ_BY, SIDES
from core.models.families import AttentionLayout
from core.texts.tokens import tokenized

log = logging.getLogger(__name__)
# Every eighth text is kept out of the regression, to measure it on.
ASIDE_EVERY = 8


@dataclass(frozen=True)
class Reading:
    """What one model reads: token ids per text, and which tokens become rows.

    `picks` [texts][...] are token positions (token pooling); None means one mean per text.
    """

    ids: list[list[int]]
    picks: list[list[int]] | None

    @property
    def n_rows(self) -> int:
        """Rows T that this reading gives; the same for both models."""
        return sum(map(self.count, range(len(self.ids))))

    def count(self, text: int) -> int:
        """Rows that one text gives."""
        return 1 if self.picks is None else len(self.picks[text])

    def row_numbers(self, texts: Iterable[int]) -> Tensor:
        """Numbers among all T rows of the rows of `texts`, ascending."""
        starts = list(accumulate(map(self.count, range(len(self.ids))), initial=0))
        return torch.tensor([row for n in sorted(texts) for row in range(starts[n], starts[n + 1])], dtype=torch.long)


def read_texts(rows: Sequence[Row], tokenizer: Any, max_tokens: int) -> Reading:
    """Text pooling: rows with roles rendered with this model's chat template, cut at `max_tokens`."""
    ids = []
    for row in rows:
        text, special = row.render(tokenizer)
        ids.append(tokenized(tokenizer, text, add_special_tokens=special)["input_ids"][:max_tokens])
    return Reading(ids, None)


def read_aligned(
    rows: Sequence[Row], target_tokenizer: Any, source_tokenizer: Any, max_tokens: int, max_rows: int, seed: int
) -> tuple[Reading, Reading, Tensor]:
    """Token pooling: the positions after which both models have read exactly the same prefix.

    Both read the identical untemplated string. Positions are sampled down to `max_rows` with the seed.

    Returns:
        (target reading, source reading, [T] bool: row comes from a text kept aside).
    Raises:
        UserError: no aligned position at all.
    """
    encoded = []
    candidates: list[tuple[int, int, int]] = []
    for number, row in enumerate(rows):
        pair = [_ends(tokenizer, row.plain, max_tokens) for tokenizer in (target_tokenizer, source_tokenizer)]
        encoded.append([ids for ids, _ in pair])
        (_, target_ends), (_, source_ends) = pair
        candidates += [(number, target_ends[end], source_ends[end]) for end in target_ends if end in source_ends]
    if len(candidates) < 2:
        raise UserError("the two tokenizations share fewer than 2 positions; use longer texts or --pooling text")
    if len(candidates) > max_rows:
        candidates = sorted(random.Random(seed).sample(candidates, max_rows))
    readings = []
    for model in (0, 1):
        picks: list[list[int]] = [[] for _ in rows]
        for candidate in candidates:
            picks[candidate[0]].append(candidate[1 + model])
        readings.append(Reading([ids[model] for ids in encoded], picks))
    aside = torch.tensor([is_aside(number) for number, _, _ in candidates])
    return readings[0], readings[1], aside


def is_aside(text_number: int) -> bool:
    """Whether a text is kept out of the regression."""
    return text_number % ASIDE_EVERY == ASIDE_EVERY - 1


def _ends(tokenizer: Any, text: str, max_tokens: int) -> tuple[list[int], dict[int, int]]:
    """Token ids cut at `max_tokens`, and character offset -> last token that ends there.

    Special tokens and the first token of the text are left out. The ends are taken before the cut: a cut inside a
    character would otherwise let its first bytes stand for the whole.
    """
    encoding = tokenized(tokenizer, text, return_offsets_mapping=True, return_special_tokens_mask=True)
    ends: dict[int, int] = {}
    first = None
    for token, (span, special) in enumerate(
        zip(encoding["offset_mapping"], encoding["special_tokens_mask"], strict=True)
    ):
        if special or span[0] == span[1]:
            continue
        first = token if first is None else first
        ends[span[1]] = token
    kept = {end: token for end, token in ends.items() if token != first and token < max_tokens}
    return encoding["input_ids"][:max_tokens], kept


def text_batches(reading: Reading, tokens_per_batch: int) -> list[list[int]]:
    """`token_batches` of the texts that give rows. Raises UserError for one without tokens."""
    texts = [n for n in range(len(reading.ids)) if reading.count(n)]
    empty = [n for n in texts if not reading.ids[n]]
    if empty:
        raise UserError(f"text {empty[0] + 1} has no tokens")
    batches = token_batches([len(reading.ids[n]) for n in texts], tokens_per_batch)
    return [[texts[n] for n in batch] for batch in batches]


def row_bytes(layout: AttentionLayout, n_rows: int) -> int:
    """Bytes of the rows of all sides and layers in float32."""
    return 4 * n_rows * layout.n_layers * sum(map(layout.size, SIDES))


@torch.no_grad()
def extract(
    model: nn.Module,
    layout: AttentionLayout,
    reading: Reading,
    batches: Sequence[list[int]],
    desc: str,
    allocate: Callable[[int, int], Tensor] = torch.empty,
) -> dict[tuple[str, int], Tensor]:
    """Run the backbone (no LM head) over batches of texts and record input and output of every attention projection.

    Outputs are those of the linear layers, before rotary embedding. Texts are padded on the right. A batch that does
    not fit in memory is halved, and so is every later one of more than half its size.

    Args:
        model: causal language model on its device, or on those of a device map.
        reading: token ids and picked positions.
        batches: numbers of the texts to read.
        desc: label of the progress bar.
        allocate: (rows, neurons) -> float32 tensor on the CPU, filled here.
    Returns:
        {(side, layer): [T', n]}: the mean over each text's tokens, or the picked tokens, in the order of the texts.
    Raises:
        UserError: a text that does not fit in memory on its own.
    """
    texts = sorted(n for batch in batches for n in batch)
    starts = dict(zip(texts, accumulate(map(reading.count, texts), initial=0), strict=False))
    total = sum(map(reading.count, texts))
    out = {(side, layer): allocate(total, layout.size(side)) for side in SIDES for layer in range(layout.n_layers)}
    recorder = _Recorder(model, layout, out)
    left, limit = deque(batches), math.inf
    try:
        with tqdm(total=len(texts), desc=desc, unit="text") as bar:
            while left:
                batch = left.popleft()
                half, longest = (len(batch) + 1) // 2, max(len(reading.ids[n]) for n in batch)
                if len(batch) > 1 and len(batch) * longest > limit:
                    left.extendleft((batch[half:], batch[:half]))
                    continue
                rows = torch.cat([torch.arange(starts[n], starts[n] + reading.count(n)) for n in batch])
                if not recorder.read(batch, reading, rows):
                    _check_halvable(batch, reading)
                    limit = half * longest
                    log.warning("out of memory at %d x %d tokens: halving the batch", len(batch), longest)
                    left.appendleft(batch)
                    continue
                bar.update(len(batch))
    finally:
        recorder.remove()
    return out


def _check_halvable(batch: list[int], reading: Reading) -> None:
    if len(batch) == 1:
        raise UserError(
            f"text {batch[0] + 1} ({len(reading.ids[batch[0]])} tokens) does not fit in memory on its own; cut texts "
            "with a lower --max-tokens, or use --device-map auto or --dtype bfloat16"
        )


def _out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def _pooling(batch: list[int], reading: Reading, mask: Tensor) -> Callable[[Tensor], Tensor]:
    """Function [B, S, n] -> rows of this batch: masked mean in float32 (Eq. 4), or the picked tokens."""
    if reading.picks is None:
        weights = cache((mask / mask.sum(1, keepdim=True)).unsqueeze(1).to)  # device -> [B, 1, S]
        return lambda hidden: torch.bmm(weights(hidden.device), hidden.float()).squeeze(1)
    longest = mask.shape[1]
    picked = [b * longest + token for b, n in enumerate(batch) for token in reading.picks[n]]
    places = cache(torch.tensor(picked).to)  # device -> [rows], into [B S, n]
    return lambda hidden: hidden.flatten(0, 1).index_select(0, places(hidden.device))


class _Recorder:
    """The backbone with forward hooks on its attention projections, which fill `out`."""

    def __init__(self, model: nn.Module, layout: AttentionLayout, out: dict[tuple[str, int], Tensor]):
        self.backbone: Any = layout.decoder(model)
        self.out = out
        self.taken: dict[tuple[str, int], Tensor] = {}
        self.pool: Any = None
        self.rows: Any = None
        self.handles = [
            layout.linear(model, layer, projection).register_forward_hook(self._hook(projection, layer))
            for layer in range(layout.n_layers)
            for projection in PROJECTIONS
        ]

    def read(self, batch: list[int], reading: Reading, rows: Tensor) -> bool:
        """Fill the `rows` of `out` that the batch gives; False when memory does not suffice."""
        ids, mask = pad_with_mask([reading.ids[n] for n in batch])
        self.pool, self.rows = _pooling(batch, reading, mask), rows
        device = _input_device(self.backbone)
        try:
            self.backbone(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
            for key, pooled in self.taken.items():
                self.out[key].index_copy_(0, rows, pooled.float().cpu())
            return True
        except RuntimeError as error:
            if not _out_of_memory(error):
                raise
            return False
        finally:
            self.taken.clear()

    def _hook(self, projection: str, layer: int):
        def record(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            self._take((projection, layer), self.pool(output))
            side = PROJECTIONS[projection].input_side
            if READ_BY[side] == projection:
                self._take((side, layer), self.pool(args[0]))

        return record

    def _take(self, key: tuple[str, int], pooled: Tensor) -> None:
        if pooled.device.type == "cpu":
            self.out[key].index_copy_(0, self.rows, pooled.float())  # now, while it is in the cache
        else:
            self.taken[key] = pooled  # after the pass: a copy would make the device wait for every layer

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def _input_device(backbone: Any) -> torch.device:
    """Where token ids go: an embedding that is offloaded has no device of its own, but a hook that knows it."""
    embedding = backbone.get_input_embeddings()
    device = getattr(getattr(embedding, "_hf_hook", None), "execution_device", None)
    return embedding.weight.device if device is None else torch.device(device)
