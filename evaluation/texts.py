"""The texts on which arms are compared: held out from every stage, each with a token to score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from core.data import DataSpec, Row, divide
from core.errors import UserError
from core.runs.rows_read import check_held_out, check_same_split
from core.runs.settings import Experiment
from core.training.heldout import trained_tokens
from core.training.sft import Example, sft_example


@dataclass(frozen=True)
class TextSet:
    """Texts on which arms are compared, each with at least one token to score.

    Attributes:
        examples: token ids and labels of every text.
        groups: the group of every text.
        left_out: number of texts that have no token to score.
        end_of_turn: whether losses include a token that ends an answer.
        identity: where the texts came from, and their digest (`Division.identity`).
        near_duplicates: how many were not held out because another part has nearly the same text.
    """

    examples: list[Example]
    groups: list[str]
    left_out: int
    end_of_turn: bool
    identity: dict[str, Any] = field(default_factory=dict)
    near_duplicates: dict[str, float] = field(default_factory=dict)

    @property
    def tokens(self) -> list[int]:
        """Tokens with loss of every text."""
        return trained_tokens(self.examples)

    def counts(self) -> dict[str, Any]:
        """What the results say of the texts."""
        counted = {"texts": len(self.examples), "tokens": sum(self.tokens), "groups": len(set(self.groups))}
        return {**counted, "left_out": self.left_out, "end_of_turn": self.end_of_turn}


def text_sets(
    experiment: Experiment, plans_data: Mapping[str, Any], stages: Sequence[Path], tokenizer: Any
) -> dict[str, TextSet]:
    """The held-out texts, and general ones where the experiment names a file of them.

    Args:
        plans_data: `Division.identity` of the rows that the plans were made with.
        stages: the folders of the stages that are compared; no row that they read is held out.
    Raises:
        UserError: another split than that of the plans, rows that were read, or no text with a token to score.
    """
    specs = {"held_out": experiment.data.spec}
    if experiment.evaluation.general_file is not None:
        specs["general"] = DataSpec("file", experiment.evaluation.general_file, experiment.data.split_seed)
    sets = {}
    for name, spec in specs.items():
        division = divide(spec)
        if name == "held_out":
            check_same_split(plans_data, division.spec, division.revision)
        check_held_out(division, stages)
        rows = division.rows("held_out", experiment.evaluation.held_out_samples)
        texts = text_set(name, rows, tokenizer, experiment.reading.max_tokens)
        sets[name] = replace(texts, identity=division.identity(rows), near_duplicates=division.near_duplicates)
    return sets


def text_set(name: str, rows: Sequence[Row], tokenizer: Any, max_tokens: int) -> TextSet:
    """The texts of `rows` that have a token to score. Raises UserError when none has."""
    examples = [sft_example(row, tokenizer, max_tokens) for row in rows]
    scored = [number for number, count in enumerate(trained_tokens(examples)) if count]
    if not scored:
        raise UserError(f"the {name} texts have no token with loss within {max_tokens} tokens; raise --max-tokens")
    kept = [examples[number] for number in scored]
    groups = [rows[number].group for number in scored]
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    ends = any(rows[number].has_roles and special & set(examples[number]["labels"]) for number in scored)
    return TextSet(kept, groups, len(rows) - len(kept), ends)
