"""Model + texts -> activations [T, n] per layer and side (Eqs. 3-6)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from core.attention import SIDES, AttentionLayout
from core.data import Row
from core.fusion import INPUT_SIDE, PROJECTIONS
from core.runs import UserError

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
        return len(self.ids) if self.picks is None else sum(map(len, self.picks))


def read_texts(rows: Sequence[Row], tokenizer: Any, max_tokens: int) -> Reading:
    """Text pooling: rows with roles rendered with this model's chat template, cut at `max_tokens`."""
    ids = []
    for row in rows:
        text, special = row.render(tokenizer)
        ids.append(tokenizer(text, add_special_tokens=special)["input_ids"][:max_tokens])
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
    encoding = tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True)
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


@torch.no_grad()
def extract(
    model: nn.Module, layout: AttentionLayout, reading: Reading, batch_size: int, desc: str
) -> dict[tuple[str, int], Tensor]:
    """Run the backbone (no LM head) over the texts and record input and output of every attention projection.

    Outputs are those of the linear layers, before rotary embedding. Texts run in batches of similar length, padded on
    the right; rows come back in text order.

    Args:
        model: causal language model on its device.
        reading: token ids and picked positions.
        desc: label of the progress bar.
    Returns:
        {(side, layer): [T, n] float32 on the CPU}: the mean over the text's tokens, or the picked tokens.
    Raises:
        UserError: a text without tokens.
    """
    starts = [0]
    for number in range(len(reading.ids)):
        starts.append(starts[-1] + (1 if reading.picks is None else len(reading.picks[number])))
    out = {
        (side, layer): torch.empty(starts[-1], layout.size(side)) for side in SIDES for layer in range(layout.n_layers)
    }
    order = [n for n in range(len(reading.ids)) if starts[n + 1] > starts[n]]
    order.sort(key=lambda n: -len(reading.ids[n]))
    if any(not reading.ids[n] for n in order):
        raise UserError(f"text {order[-1] + 1} has no tokens")
    device = next(model.parameters()).device
    recorder = _Recorder(model, layout)
    backbone: Any = model.base_model
    try:
        with tqdm(total=len(order), desc=desc, unit="text") as bar:
            for start in range(0, len(order), batch_size):
                batch = order[start : start + batch_size]
                ids, mask = _pad([reading.ids[n] for n in batch])
                recorder.pool = _pooling(batch, reading, mask, device)
                backbone(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
                rows = torch.cat([torch.arange(starts[n], starts[n + 1]) for n in batch])
                for key, pooled in recorder.taken.items():
                    out[key][rows] = pooled.float().cpu()
                recorder.taken.clear()
                bar.update(len(batch))
    finally:
        recorder.remove()
    return out


def _pad(ids: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Right-padded token ids [B, S] and mask [B, S]; the padding token is masked, so any id serves."""
    longest = max(map(len, ids))
    padded = torch.tensor([text + [0] * (longest - len(text)) for text in ids])
    return padded, torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in ids])


def _pooling(batch: list[int], reading: Reading, mask: Tensor, device: torch.device):
    """Function [B, S, n] -> rows of this batch: masked mean in float32 (Eq. 4), or the picked tokens."""
    if reading.picks is None:
        weights = (mask / mask.sum(1, keepdim=True)).unsqueeze(1).to(device)  # [B, 1, S]
        return lambda hidden: torch.bmm(weights, hidden.float()).squeeze(1)  # [B, 1, S] @ [B, S, n] -> [B, n]
    texts = torch.tensor([b for b, n in enumerate(batch) for _ in reading.picks[n]], device=device)
    tokens = torch.tensor([token for n in batch for token in reading.picks[n]], device=device)
    return lambda hidden: hidden[texts, tokens]


class _Recorder:
    """Forward hooks on the attention projections; `taken` holds the pooled rows of the last batch."""

    def __init__(self, model: nn.Module, layout: AttentionLayout):
        self.taken: dict[tuple[str, int], Tensor] = {}
        self.pool: Any = None
        self.handles = [
            layout.linear(model, layer, projection).register_forward_hook(self._hook(projection, layer))
            for layer in range(layout.n_layers)
            for projection in PROJECTIONS
        ]

    def _hook(self, projection: str, layer: int):
        def record(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            self.taken[projection, layer] = self.pool(output)
            if projection in "qo":  # k and v read what q reads
                self.taken[INPUT_SIDE[projection], layer] = self.pool(args[0])

        return record

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
