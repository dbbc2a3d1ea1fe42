"""The strength alpha of fusion, chosen on validation rows or learned on calibration texts, from residuals alone.

Nothing of the target or of W~ trains. `auto` tries one strength for all projections on a grid. `learned` gives every
projection a strength of its own, by a few steps of Adam that begin at 0, which is the target itself. Either is taken
only where it is better than the target on the validation rows beyond the chance of other groups of texts; elsewhere the
strength is 0, and the model stays as it is. Controls go through the same functions, so that they get every choice that
the fusion gets.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.batching import token_batches
from core.fusion.projections import ROWS
from core.fusion.residual import Residual
from core.fusion.strengths import Strength, in_words
from core.models.families import linear_at
from core.progress import Progress
from core.training.heldout import text_nll, trained_tokens
from core.training.hot_linear import fold_in_place, restore_base
from core.training.sft import IGNORED, Example, padded_batch

# What `auto` tries, in ascending order. A candidate whose loss has risen is not tried with a larger strength, but once
# more where the parabola through its best strength and the two beside it is lowest.
GRID = (0.02, 0.05, 0.1, 0.2)
# `learned`: texts per step, the step size of Adam, and after how many steps the validation loss is measured.
TEXTS_PER_STEP, STEP_SIZE, STEPS_PER_CHECK = 8, 0.02, 7
# Residuals of one kind, made or read anew for each use, so that those of all kinds need not be in memory together.
Candidate = Callable[[], Iterable[Residual]]


@dataclass(frozen=True)
class StrengthSettings:
    """How strengths are found.

    Attributes:
        learned: whether each projection gets its own, after one for all has been chosen.
        steps: of Adam.
        free: whether learned strengths may leave [0, 1].
        seed: of the order of the calibration texts.
    """

    learned: bool
    steps: int
    free: bool
    seed: int


@dataclass(frozen=True)
class StrengthTexts:
    """The texts on which strengths are found.

    Attributes:
        calibration: examples to learn from; empty where nothing is learned.
        validation: examples to choose on.
        groups: the group of each of `validation`.
    """

    calibration: Sequence[Example]
    validation: Sequence[Example]
    groups: Sequence[str]


@dataclass(frozen=True)
class Tried:
    """A strength that was tried: of which candidate, and the loss of every validation text in nats."""

    candidate: str
    alpha: Strength
    losses: list[float]

    @property
    def total(self) -> float:
        """The summed loss; infinite where a loss is not finite, so that such a strength is never the best."""
        total = sum(self.losses)
        return total if math.isfinite(total) else math.inf

    def record(self, tokens: int) -> dict[str, Any]:
        """What files say of it, with the loss in nats per token; None where it is not finite."""
        loss = self.total / tokens if math.isfinite(self.total) else None
        return {"candidate": self.candidate, "alpha": self.alpha, "validation": loss}


@dataclass(frozen=True)
class Choice:
    """What was found.

    Attributes:
        alpha: the strength; 0 where none is reliably better than the target.
        candidate: the name of the candidate that it is of.
        gain: the difference of the best strength to the target on the validation rows, in nats per token, as
            `evaluation.significance.Estimate.record` gives it.
        tried: `Tried.record` of every strength but 0.
    """

    alpha: Strength
    candidate: str
    gain: dict[str, Any]
    tried: list[dict[str, Any]] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """What files say of it."""
        found = {"alpha": self.alpha, "rows": self.candidate, "gain": self.gain, "tried": self.tried}
        return {**found, "sentence": self.sentence("Fusion")}

    def sentence(self, what: str) -> str:
        """What the log and the card say, of `what` was fused."""
        interval = "no interval" if self.gain["ci95"] is None else "[{:+.4f}, {:+.4f}]".format(*self.gain["ci95"])
        found = f"{self.gain['diff']:+.4f} {interval} nats per token on the validation rows"
        if self.alpha == 0:
            return f"{what} does not reliably help on this text ({found} at best): strength 0 leaves the target alone"
        return f"{what}: strength {in_words(self.alpha)}, {self.candidate} rows, {found}"


class StrengthSearch:
    """The search for strengths, with a loaded target whose weights are the same before and after each call.

    Args:
        model: the target, in eval mode.
        name_of: (layer, projection) -> module name, for example `AttentionLayout.name`.
        form: how residuals are mixed with weights.
        texts: what strengths are found on.
        tokens_per_batch: tokens of one forward pass, padding included.
        gain: (losses, losses of the target), one sum per validation text in nats -> their difference as
            `evaluation.significance.Estimate.record` gives it.
    """

    def __init__(
        self,
        model: Any,
        name_of: Callable[[int, str], str],
        form: str,
        texts: StrengthTexts,
        tokens_per_batch: int,
        gain: Callable[[Sequence[float], Sequence[float]], dict[str, Any]],
    ):
        self.model, self.name_of, self.form, self.texts = model, name_of, form, texts
        self.tokens_per_batch, self.gain = tokens_per_batch, gain
        self.tokens = sum(trained_tokens(texts.validation))
        self.base = self._validate("target")

    def find(self, what: str, candidates: Mapping[str, Candidate], settings: StrengthSettings) -> Choice:
        """The strength of the best candidate, by the loss on the validation rows.

        A single candidate whose strengths are learned needs no grid, which would choose among candidates.

        Args:
            what: the name of what is fused, which the progress bars show.
            candidates: name -> residuals; the candidates to choose between.
        """
        tried = []
        if settings.learned and len(candidates) == 1:
            best = self._target(*candidates)
        else:
            tried = [one for name, residuals in candidates.items() for one in self._on_grid(what, name, residuals)]
            best = min(tried, key=lambda one: one.total)
            if not best.total < sum(self.base):  # nothing helps: the target itself, with the rows that harm least
                first = [one for one in tried if one.alpha == GRID[0]]
                best = self._target(min(first, key=lambda one: one.total).candidate)
        if settings.learned:
            residuals = list(candidates[best.candidate]())
            learned = list(self._learn(what, best.candidate, residuals, settings))
            best = min([self._target(best.candidate), *learned], key=lambda one: one.total)
            tried += learned
        gain = self.gain(best.losses, self.base)
        alpha = best.alpha if helps(gain) else 0.0
        return Choice(alpha, best.candidate, gain, [one.record(self.tokens) for one in tried])

    def _target(self, candidate: str) -> Tried:
        """The target itself, which is every candidate at strength 0."""
        return Tried(candidate, 0.0, self.base)

    def _on_grid(self, what: str, name: str, residuals: Candidate) -> Iterator[Tried]:
        """Each strength of the grid, for all projections, as long as the loss falls; then the `lowest` between them."""
        points = [(0.0, sum(self.base))]
        for alpha in GRID:
            found = Tried(name, alpha, self._losses(what, residuals(), alpha))
            yield found
            points.append((alpha, found.total))
            if not points[-1][1] < points[-2][1]:
                break
        between = lowest(points[-3:])
        if between is not None:
            yield Tried(name, between, self._losses(what, residuals(), between))

    def _validate(self, what: str) -> list[float]:
        return text_nll(self.model, self.texts.validation, self.tokens_per_batch, f"{what} on validation rows")

    def _losses(self, what: str, residuals: Iterable[Residual], alpha: Strength) -> list[float]:
        """Of the validation texts, with the residuals folded into the target meanwhile."""
        used = list(residuals)
        fold_in_place(self.model, used, self.name_of, alpha, self.form)
        try:
            return self._validate(what)
        finally:
            restore_base(self.model, used, self.name_of)

    def _learn(
        self, what: str, candidate: str, residuals: Sequence[Residual], settings: StrengthSettings
    ) -> Iterator[Tried]:
        """Learn a strength for every residual, and yield what they come to at every check."""
        order = random.Random(settings.seed)
        strengths = torch.zeros(len(residuals), device=self.model.device, requires_grad=True)
        adam = torch.optim.Adam([strengths], lr=STEP_SIZE)
        waiting: list[Example] = []
        with learnable(self.model, residuals, self.name_of, self.form, strengths):
            for step in Progress(range(1, settings.steps + 1), desc=f"learning strengths of {what}", unit="steps"):
                if len(waiting) < TEXTS_PER_STEP:
                    waiting += order.sample(list(self.texts.calibration), len(self.texts.calibration))
                batch, waiting = waiting[:TEXTS_PER_STEP], waiting[TEXTS_PER_STEP:]
                adam.zero_grad()
                self._backward(batch)
                adam.step()
                if not settings.free:
                    strengths.data.clamp_(0, 1)
                if step % STEPS_PER_CHECK == 0 or step == settings.steps:
                    alpha = {one.name: value for one, value in zip(residuals, strengths.tolist(), strict=True)}
                    yield Tried(candidate, alpha, self._losses(what, residuals, alpha))

    def _backward(self, examples: Sequence[Example]) -> None:
        """Add the gradient of the mean loss per token."""
        total = sum(trained_tokens(examples))
        for batch in token_batches([len(one["input_ids"]) for one in examples], self.tokens_per_batch):
            inputs = padded_batch([examples[n] for n in batch], self.model.device)
            labels = inputs.pop("labels")[:, 1:]
            logits = self.model(**inputs, use_cache=False).logits[:, :-1].float()
            loss = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="sum")
            (loss / total).backward()


def lowest(points: Sequence[tuple[float, float]]) -> float | None:
    """The strength at which the parabola through three points (strength, loss) is lowest, rounded to four decimals.

    Returns:
        None where that tells nothing: with fewer than three points, where the middle point has not the lowest loss, or
        where a loss is not finite.
    """
    if len(points) < 3:
        return None
    (x_before, y_before), (x, y), (x_after, y_after) = points
    if not y < min(y_before, y_after) or not math.isfinite(y_before + y_after):
        return None
    before, after = (x - x_before) * (y - y_after), (x - x_after) * (y - y_before)
    return round(x - ((x - x_before) * before - (x - x_after) * after) / (2 * (before - after)), 4)


def helps(gain: Mapping[str, Any]) -> bool:
    """Whether a gain is beyond the chance of other groups of texts."""
    return gain["ci95"] is not None and gain["ci95"][1] < 0


@contextmanager
def learnable(
    model: nn.Module,
    residuals: Sequence[Residual],
    name_of: Callable[[int, str], str],
    form: str,
    strengths: Tensor,
) -> Iterator[None]:
    """Let the strengths of residuals be part of the forward pass of a target, so that they get gradients.

    A fused projection gives W x + s (W~ - W) x on the selection (`interpolate`), or W x + s W~ x (`additive`), and the
    same for biases. Only passes that record gradients are changed, so that the strengths can be folded into the weights
    meanwhile to measure a loss. Weights get no gradient.

    Args:
        strengths: [number of residuals], s of each.
    """
    wanted_gradients = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in wanted_gradients:
        parameter.requires_grad_(False)
    handles = []
    for number, residual in enumerate(residuals):
        linear = linear_at(model, name_of(residual.layer, residual.projection))
        hook = _adding(residual, form, strengths, number, linear.weight)
        handles.append(linear.register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter in wanted_gradients:
            parameter.requires_grad_(True)


def _adding(
    residual: Residual, form: str, strengths: Tensor, number: int, like: Tensor
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    """A forward hook that adds strengths[number] times what the residual changes to the output of a projection.

    Args:
        like: a weight of the device and dtype in which the projection computes.
    """
    weight, bias, index = residual.weight.to(like), residual.bias, residual.index.to(like.device)
    bias = None if bias is None else bias.to(like)
    if form == "interpolate":
        weight = weight - residual.original_weight.to(like)
        bias = None if bias is None or residual.original_bias is None else bias - residual.original_bias.to(like)

    def add(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return output
        read = args[0] if residual.axis == ROWS else args[0].index_select(-1, index)
        added = strengths[number].to(output) * F.linear(read, weight, bias)
        return output.index_add(-1, index, added) if residual.axis == ROWS else output + added

    return add
