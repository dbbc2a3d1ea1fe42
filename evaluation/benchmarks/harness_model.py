"""A model behind the interface of lm-evaluation-harness, and the score of every item by the harness's own rules."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from core.progress import Progress
from evaluation.evaluated_model import check_finite, check_logits

# The harness's own seed, of the solved items that it draws and of sampling.
SEED = 1234
# The types of a score; the harness's metrics return Python's numbers or numpy's.
NUMBER = (int, float, np.number, np.bool_)


@functools.cache
def _budgeted_class() -> type:
    """The harness's HFLM with batches of a number of tokens instead of a number of requests."""
    from lm_eval.models.huggingface import HFLM  # takes seconds, so the class is made at first use

    class Budgeted(HFLM):
        tokens_per_batch: int
        truncated = 0

        def _loglikelihood_tokens(
            self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
        ) -> list[Any]:
            lengths = [len(context) + len(continuation) for _, context, continuation in requests]
            # The model sees all tokens but the last; the harness cuts what does not fit off on the left.
            self.truncated += sum(length > self.max_length + 1 for length in lengths)
            # Contexts of similar length go together. Choices of one item share a context, which is computed once.
            buckets: dict[int, list[int]] = {}
            for number, (_, context, _) in enumerate(requests):
                buckets.setdefault(len(context).bit_length(), []).append(number)
            answers: list[Any] = [None] * len(requests)
            for _, numbers in sorted(buckets.items(), reverse=True):
                self.batch_size_per_gpu = self._rows(max(lengths[number] for number in numbers))
                found = super()._loglikelihood_tokens(
                    [requests[number] for number in numbers], disable_tqdm, override_bs
                )
                check_finite((likelihood for likelihood, _ in found), "the answers of its items")
                for number, answer in zip(numbers, found, strict=True):
                    answers[number] = answer
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
        tokens_per_batch: of one forward pass, padding included; a request that is longer is a batch of its own.
    """
    # A copy, because the harness may add a padding token to it.
    built = _budgeted_class()(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=1)
    built.tokens_per_batch = tokens_per_batch
    return built


def evaluate(
    lm: Any, task: Any, num_fewshot: int | None = None, limit: int | None = None, samples: Sequence[int] | None = None
) -> dict[str, Any]:
    """The harness's results of one task: {"metrics": its values, "samples": one record per item and filter}.

    Args:
        num_fewshot: solved items before each item; None for the task's own number.
        limit: only the first so many items; None for all.
        samples: the numbers of the items to score, ascending, instead of the first `limit`.
    """
    from lm_eval.api import task as harness_task
    from lm_eval.evaluator import evaluate as harness_evaluate  # takes seconds
    from lm_eval.models import huggingface

    # Its bars can be neither switched off nor set.
    harness_task.tqdm = functools.partial(Progress, desc="writing prompts", unit="items")
    huggingface.tqdm = functools.partial(Progress, unit="requests")
    # As the harness's `simple_evaluate` does, which would also ask pip for every installed package.
    random.seed(0)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    set_shots(task, num_fewshot)
    name = task.config.task
    results = harness_evaluate(
        lm=lm,
        task_dict={"tasks": {name: task}},
        limit=limit,
        bootstrap_iters=2,  # for metrics that are no means, whose error we do not report; the others have a formula
        samples=None if samples is None else {name: list(samples)},
    )
    return {"metrics": results["results"][name], "samples": results["samples"][name]}


def set_shots(task: Any, num_fewshot: int | None) -> int:
    """Set the number of solved items before each item, and return it; they are drawn with the harness's seed.

    Args:
        num_fewshot: None for the task's own number. A task that is defined without any keeps none.
    """
    own = task.config.num_fewshot
    shots = own or 0 if num_fewshot is None or own == 0 else num_fewshot
    task.set_config("num_fewshot", shots)
    task.set_fewshot_seed(SEED)
    return shots


def item_scores(results: Mapping[str, Any]) -> tuple[list[int], dict[str, list[float]], dict[str, float]]:
    """(numbers of the items, metric -> score of every item, the harness's value of each metric that is no mean of
    scores).

    Metrics are named as the harness names them, with their filter (`exact_match,strict-match`) unless it is `none`.

    Args:
        results: of `evaluate`.
    """
    by_metric: dict[str, dict[int, Any]] = {}
    for sample in results["samples"]:
        for metric in sample["metrics"]:
            by_metric.setdefault(f"{metric},{sample['filter']}", {})[sample["doc_id"]] = sample[metric]
    numbers = sorted({sample["doc_id"] for sample in results["samples"]})
    means: dict[str, list[float]] = {}
    others: dict[str, float] = {}
    for key, found in by_metric.items():
        name, value = key.removesuffix(",none"), results["metrics"].get(key)
        scores = [found[number] for number in numbers if isinstance(found.get(number), NUMBER)]
        if len(scores) == len(numbers) and isinstance(value, float) and abs(sum(scores) / len(scores) - value) < 1e-9:
            means[name] = [float(score) for score in scores]
        elif isinstance(value, NUMBER):
            others[name] = float(value)
    return numbers, means, others
