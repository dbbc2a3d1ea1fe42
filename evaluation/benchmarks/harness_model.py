"""A model behind the interface of lm-evaluation-harness, and the scores of items that it makes of its answers."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from evaluation.scores import check_finite, check_logits

# The harness's own, of solved items and of sampling.
SEED = 1234


@functools.cache
def _budgeted_class() -> type:
    """HFLM with batches of so many tokens; made at first use, the harness takes seconds to import."""
    from lm_eval.models.huggingface import HFLM

    class Budgeted(HFLM):
        tokens_per_batch: int
        truncated = 0

        def _loglikelihood_tokens(
            self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
        ) -> list[Any]:
            lengths = [len(context) + len(continuation) for _, context, continuation in requests]
            # The model sees all but the last token; the harness cuts the rest off on the left.
            self.truncated += sum(length > self.max_length + 1 for length in lengths)
            # Contexts of about one length together; choices of one item share a context, which is computed once.
            buckets: dict[int, list[int]] = {}
            for place, (_, context, _) in enumerate(requests):
                buckets.setdefault(len(context).bit_length(), []).append(place)
            answers: list[Any] = [None] * len(requests)
            for _, places in sorted(buckets.items(), reverse=True):
                self.batch_size_per_gpu = self._rows(max(lengths[place] for place in places))
                found = super()._loglikelihood_tokens([requests[place] for place in places], disable_tqdm, override_bs)
                check_finite((likelihood for likelihood, _ in found), "the answers of its items")
                for place, answer in zip(places, found, strict=True):
                    answers[place] = answer
            return answers

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            lengths = [len(self.tok_encode(request.args[0])) for request in requests]
            new = max(request.args[1].get("max_gen_toks", self.max_gen_toks) for request in requests)
            self.truncated += sum(length + new > self.max_length for length in lengths)
            self.batch_size_per_gpu = self._rows(max(lengths) + new)
            return super().generate_until(requests, disable_tqdm)

        def _model_generate(self, *given: Any, **options: Any) -> torch.Tensor:
            return super()._model_generate(*given, logits_processor=[check_logits], **options)

        def _rows(self, longest: int) -> int:
            return max(1, self.tokens_per_batch // min(longest, self.max_length))

    return Budgeted


def language_model(model: Any, tokenizer: Any, tokens_per_batch: int) -> Any:
    """A loaded model behind the harness's interface.

    Args:
        tokens_per_batch: of one forward pass, padding included; at least one request is computed.
    """
    # A copy: the harness may give it a padding token.
    built = _budgeted_class()(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=1)
    built.tokens_per_batch = tokens_per_batch
    return built


def evaluate(
    lm: Any, task: Any, num_fewshot: int | None = None, limit: int | None = None, samples: Sequence[int] | None = None
) -> dict[str, Any]:
    """The harness's results of one task, with its logged samples.

    Args:
        num_fewshot: None for the task's own.
        samples: places of the items, ascending; None for all (or the first `limit`).
    """
    from lm_eval.evaluator import evaluate as harness_evaluate

    # As its `simple_evaluate` does, which besides asks pip for every installed package.
    random.seed(0)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    set_shots(task, num_fewshot)
    name = task.config.task
    results = harness_evaluate(
        lm=lm,
        task_dict={"tasks": {name: task}},
        limit=limit,
        bootstrap_iters=2,  # of metrics that are no means, whose error is not reported; the others have a formula
        samples=None if samples is None else {name: list(samples)},
    )
    return {"metrics": results["results"][name], "samples": results["samples"][name]}


def set_shots(task: Any, num_fewshot: int | None) -> int:
    """Set the number of solved items before each item, None for the task's own, and return it; they are drawn by the
    harness's seed. A task that is defined with none keeps none."""
    own = task.config.num_fewshot
    shots = own or 0 if num_fewshot is None or own == 0 else num_fewshot
    task.set_config("num_fewshot", shots)
    task.set_fewshot_seed(SEED)
    return shots


def item_scores(results: Mapping[str, Any]) -> tuple[list[int], dict[str, list[float]], dict[str, float]]:
    """Places of the items, metric -> score of every item, and the harness's value of metrics that no mean of scores is.

    A metric is named as the harness does, `exact_match,strict-match`, without `,none`.
    """
    scores: dict[str, dict[int, Any]] = {}
    for sample in results["samples"]:
        for metric in sample["metrics"]:
            scores.setdefault(f"{metric},{sample['filter']}", {})[sample["doc_id"]] = sample[metric]
    places = sorted({sample["doc_id"] for sample in results["samples"]})
    means: dict[str, list[float]] = {}
    others: dict[str, float] = {}
    for key, found in scores.items():
        name, value = key.removesuffix(",none"), results["metrics"].get(key)
        numbers = [found[place] for place in places if isinstance(found.get(place), (int, float, np.number, np.bool_))]
        if len(numbers) == len(places) and isinstance(value, float) and abs(sum(numbers) / len(numbers) - value) < 1e-9:
            means[name] = [float(number) for number in numbers]
        elif isinstance(value, (int, float, np.number)):
            others[name] = float(value)
    return places, means, others
