"""What a search for strengths needs: its texts, none of which is held out, and the loaded target."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from core.data import Division, Row, divide
from core.errors import UserError
from core.fusion.settings import LEARNED
from core.models.checkpoints import Checkpoint
from core.runs.calibration import Calibration, calibration_again
from core.runs.plan_directory import PlanDirectory
from core.runs.rows_read import check_same_split, rows_read, with_data_of
from core.runs.settings import Experiment
from core.training.heldout import trained_tokens
from core.training.sft import Example, sft_example
from core.training.strengths import StrengthSearch, StrengthSettings, StrengthTexts

# (losses, losses of the target, tokens, groups) of texts -> their difference as `Estimate.record` gives it.
Difference = Callable[[Sequence[float], Sequence[float], Sequence[int], Sequence[str]], dict[str, Any]]


@dataclass(frozen=True)
class StrengthRows:
    """The rows on which strengths are found.

    Attributes:
        division: the data set of the plans, divided as it was for them.
        calibration: the rows that the plans were made from; None where no strength is learned.
        validation: rows of groups from which nothing was made.
        max_tokens: rows are cut at so many tokens.
    """

    division: Division
    calibration: Calibration | None
    validation: list[Row]
    max_tokens: int

    def identity(self) -> dict[str, Any]:
        """What the manifest says of them."""
        calibration = self.division.identity([]) if self.calibration is None else self.calibration.identity()
        return {
            "calibration": calibration,
            "validation": self.division.identity(self.validation),
            "max_tokens": self.max_tokens,
        }

    def marks(self) -> dict[str, set[str]]:
        """What later stages must not hold out, as `core.runs.rows_read.write_rows_read` takes it."""
        found = {"validation": self.division.marks(self.validation)}
        return found if self.calibration is None else {"calibration": self.calibration.marks(), **found}


def strength_rows(experiment: Experiment, plans: PlanDirectory) -> StrengthRows:
    """The rows for the strengths of an experiment.

    Raises:
        UserError: there are no validation rows, or the data is divided otherwise than for the plans, or has changed
            since, so that rows to choose on may be rows that the plans were made from.
    """
    made_from = plans.manifest.inputs["data"]
    if not experiment.training.validation_samples:
        raise UserError("alpha auto and learned are chosen on validation rows; give --validation-samples")
    division = divide(with_data_of(experiment, made_from).data.spec)
    check_same_split(made_from, division.spec, division.revision)
    calibration = calibration_again(division, experiment, made_from)
    if calibration is None:
        raise UserError(
            f"{division.name}: the calibration rows are not those that {plans.folder} was made from, so that strengths "
            "could be chosen on rows of the plans; run stage 1 again with this data, or give the data of the plans"
        )
    validation = division.rows("validation", experiment.training.validation_samples)
    if read := division.marks(validation) & rows_read([plans.folder]).get("calibration", set()):
        raise UserError(
            f"{division.name}: validation rows have {len(read)} texts, passages or questions that were calibration "
            f"rows of {plans.folder}; run all stages again with this data"
        )
    learned = experiment.fusion.alpha == LEARNED
    max_tokens = plans.manifest.inputs["settings"]["max_tokens"]
    return StrengthRows(division, calibration if learned else None, validation, max_tokens)


def strength_search(
    rows: StrengthRows, target: Checkpoint, model: Any, experiment: Experiment, difference: Difference
) -> StrengthSearch:
    """The search on these rows with a loaded target.

    Raises:
        UserError: no validation row has a token with loss, the tokenizer refuses a row, or a loss of the target is not
            finite.
    """
    tokenizer = target.load_tokenizer()

    def examples_of(texts: Sequence[Row]) -> list[tuple[Example, str]]:
        found = [(sft_example(row, tokenizer, rows.max_tokens), row.group) for row in texts]
        return [one for one in found if trained_tokens([one[0]]) != [0]]

    calibration = [] if rows.calibration is None else examples_of(rows.calibration.rows)
    validation = examples_of(rows.validation)
    if not validation or (rows.calibration is not None and not calibration):
        raise UserError(f"no text has a token with loss within {rows.max_tokens} tokens; run stage 1 with --max-tokens")
    examples, groups = zip(*validation, strict=True)
    tokens = trained_tokens(examples)
    search = StrengthSearch(
        model,
        target.layout.name,
        experiment.fusion.residual_form,
        StrengthTexts([example for example, _ in calibration], examples, groups),
        experiment.compute.tokens_per_batch,
        lambda ours, base: difference(ours, base, tokens, groups),
    )
    if bad := sum(not math.isfinite(loss) for loss in search.base):
        raise UserError(
            f"{target.name}: the loss of {bad} of {len(search.base)} validation texts is not finite; the model is "
            "damaged or overflows: look for NaN in its weights, or compute with --dtype float32"
        )
    return search


def search_settings(experiment: Experiment) -> StrengthSettings:
    """How the strengths of an experiment are found."""
    fusion = experiment.fusion
    return StrengthSettings(fusion.alpha == LEARNED, fusion.alpha_steps, fusion.free_alpha, experiment.compute.seed)
