"""The loss of a model on texts that it was not trained on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from core.batching import token_batches
from core.progress import Progress
from core.training.sft import IGNORED, Example, padded_batch


def trained_tokens(examples: Sequence[Example]) -> list[int]:
    """The number of tokens with loss of every example."""
    return [sum(label != IGNORED for label in example["labels"][1:]) for example in examples]


def text_nll(
    model: Any, examples: Sequence[Example], tokens_per_batch: int, desc: str, show: bool = True
) -> list[float]:
    """The negative log-likelihood of every text: the sum over its tokens with loss, in nats.

    Dividing the sum over all texts by the sum of `trained_tokens` gives the loss per token. It does not depend on how
    the texts were batched.

    Args:
        model: a causal language model in eval mode.
        tokens_per_batch: tokens of one forward pass, padding included.
        desc: what the progress bar says is evaluated.
        show: whether there is a progress bar.
    Returns:
        One number per example, in the order of the examples.
    """
    nll = [0.0] * len(examples)
    for batch, losses in token_losses(model, examples, tokens_per_batch, desc, show):
        for n, loss in zip(batch, losses.sum(1).tolist(), strict=True):
            nll[n] = loss
    return nll


@torch.no_grad()
def token_losses(
    model: Any, examples: Sequence[Example], tokens_per_batch: int, desc: str, show: bool = True
) -> Iterator[tuple[list[int], Tensor]]:
    """The negative log-likelihood of every token in nats, batch by batch; the arguments are those of `text_nll`.

    Yields:
        (numbers of the B examples of a batch, losses [B, S-1] in float32). Column s - 1 holds token s, because nothing
        predicts token 0; a token without loss, or of the padding, has 0.
    """
    batches = token_batches([len(example["input_ids"]) for example in examples], tokens_per_batch)
    for batch in Progress(batches, desc=f"evaluating {desc}", unit="batches", disable=not show):
        inputs = padded_batch([examples[n] for n in batch], model.device)
        labels = inputs.pop("labels")[:, 1:]
        logits = model(**inputs, use_cache=False).logits[:, :-1].float()  # [B, S-1, V]
        # This is `cross_entropy`, which takes four times as long where the vocabulary is not the last dimension.
        chosen = logits.gather(-1, labels.clamp_min(0).unsqueeze(-1)).squeeze(-1)
        yield batch, (logits.logsumexp(-1) - chosen).masked_fill(labels == IGNORED, 0.0)
