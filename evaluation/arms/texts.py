"""The texts on which arms are compared: held out from every stage, each with at least one token to score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from core.data import Row, divide
from core.errors import UserError
from core.runs.rows_read import check_held_out, check_same_split
from core.runs.settings import Experiment
from core.texts.tokens import special_ids
from core.training.heldout import trained_tokens
from core.training.sft import Example, sft_example
from evaluation.arms.run import Run
from evaluation.arms.spans import ByteSpans, byte_spans


@dataclass(frozen=True)
class TextSet:
    """Texts on which arms are compared.

    Attributes:
        examples: token ids and labels of every text; each has at least one token with loss.
        groups: the group of every text.
        left_out: number of texts that were left out because they have no token with loss.
        end_of_turn: whether losses include a token that ends an answer.
        spans: the bytes of every text that target and source are both scored on.
        identity: where the texts came from, and their digest (`Division.identity`).
        near_duplicates: how many texts were left out because another part has nearly the same text.
        rows: the rows of the texts, from which `samples.json` takes its prompts.
    """

    examples: list[Example]
    groups: list[str]
    left_out: int
    end_of_turn: bool
    spans: ByteSpans
    identity: dict[str, Any] = field(default_factory=dict)
    near_duplicates: dict[str, float] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        """Number of tokens with loss of every text."""
        return trained_tokens(self.examples)

    def counts(self) -> dict[str, Any]:
        """What `results.json` records of the texts."""
        counted = {"texts": len(self.examples), "tokens": sum(self.tokens), "groups": len(set(self.groups))}
        return {**counted, "left_out": self.left_out, "end_of_turn": self.end_of_turn}


def text_sets(experiment: Experiment, run: Run, tokenizers: tuple[Any, Any]) -> dict[str, TextSet]:
    """`held_out`: texts of the run's data that no stage has read; `general`: general ones, where any are set.

    Args:
        tokenizers: of the target, in whose tokens all arms are scored, and of the source.
    Raises:
        UserError: the data is divided otherwise than for the plans, a stage has read a row, or no text has a token
            with loss.
    """
    specs = {"held_out": experiment.data.spec}
    if (general := experiment.evaluation.general_spec(experiment.data.split_seed)) is not None:
        specs["general"] = general
    stages = [run.plans.folder, *(manifest.folder for manifest in run.checkpoints.values())]
    sets = {}
    for name, spec in specs.items():
        division = divide(spec)
        if name == "held_out":
            check_same_split(run.plans.manifest.inputs["data"], division.spec, division.revision)
        check_held_out(division, stages)
        rows = division.rows("held_out", experiment.evaluation.held_out_samples)
        texts = text_set(name, rows, tokenizers, experiment.reading.max_tokens)
        sets[name] = replace(texts, identity=division.identity(rows), near_duplicates=division.near_duplicates)
    return sets


def text_set(name: str, rows: Sequence[Row], tokenizers: tuple[Any, Any], max_tokens: int) -> TextSet:
    """The texts of `rows` that have a token with loss, each cut at `max_tokens`. Raises UserError when none has."""
    tokenizer = tokenizers[0]
    examples = [sft_example(row, tokenizer, max_tokens) for row in rows]
    scored = [number for number, count in enumerate(trained_tokens(examples)) if count]
    if not scored:
        raise UserError(f"the {name} texts have no token with loss within {max_tokens} tokens; raise --max-tokens")
    kept = [examples[number] for number in scored]
    special = special_ids(tokenizer)
    return TextSet(
        examples=kept,
        groups=[rows[number].group for number in scored],
        left_out=len(rows) - len(scored),
        end_of_turn=any(rows[number].has_roles and special & set(examples[number]["labels"]) for number in scored),
        rows=[rows[number] for number in scored],
        spans=byte_spans(name, [rows[number] for number in scored], kept, tokenizers, max_tokens),
    )
