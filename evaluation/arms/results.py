"""`results.json` of a run: the losses of every arm, kept while arms are measured, and the figures made from them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core.files import read_json, write_json
from core.manifest import FORMAT_VERSION, provenance
from evaluation.arms.bits import SOURCE, bits_per_byte
from evaluation.arms.models import Losses
from evaluation.arms.texts import TextSet
from evaluation.arms.verdict import statistics


class Results:
    """The results of one run, which a later command continues.

    The losses of an arm are on disk before the next arm is measured, so a run that was killed continues with the arm
    at which it stopped.

    Attributes:
        path: of `results.json`.
        sets: the texts by name.
        record: the contents of the file.
    """

    def __init__(
        self, path: Path, inputs: Mapping[str, Any], made_from: Mapping[str, str], sets: Mapping[str, TextSet]
    ):
        """Begin the results, with the losses that an earlier command measured on the same inputs and the same models.

        Its figures are not taken over: they would describe other arms until the missing ones are measured.

        Args:
            inputs: everything that the losses of all arms depend on: texts, fused checkpoint, settings.
            made_from: arm -> digest of what decides its model (`Arms.made_from`).
        """
        before = read_json(path) if path.is_file() else {}
        same = (before.get("format"), before.get("inputs")) == (FORMAT_VERSION, inputs)
        # A file of an earlier version has no losses on bytes, so that everything is measured again.
        of_tokens, of_bytes = (before.get(kind, {}) if same else {} for kind in ("per_text", "per_text_bytes"))
        measured = [arm for arm in of_bytes if arm in of_tokens or arm == SOURCE]
        kept = [arm for arm in measured if arm in made_from and before["made_from"].get(arm) == made_from[arm]]
        self.path, self.sets = path, sets
        self.record: dict[str, Any] = {
            "format": FORMAT_VERSION,
            "metric": "negative log-likelihood per token (nats)",
            "inputs": inputs,
            "made_from": made_from,
            "per_text": {arm: of_tokens[arm] for arm in kept if arm in of_tokens},
            "per_text_bytes": {arm: of_bytes[arm] for arm in kept},
            "strengths": {arm: found for arm, found in before.get("strengths", {}).items() if arm in kept},
            "near_duplicates": {name: texts.near_duplicates for name, texts in sets.items()},
        }

    @property
    def missing(self) -> list[str]:
        """The arms that have not been measured, in the order of the table."""
        return [arm for arm in self.record["made_from"] if arm not in self.record["per_text_bytes"]]

    def add(self, arm: str, losses: Losses) -> None:
        """Record the losses of one arm, on disk as well."""
        if losses.tokens:
            self.record["per_text"][arm] = losses.tokens
        self.record["per_text_bytes"][arm] = losses.bytes
        if losses.strength is not None:
            self.record["strengths"][arm] = losses.strength
        write_json(self.path, self.record)

    def finish(self, absent: Mapping[str, str], strength: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Compare all arms, write the figures to the file and return its contents.

        Args:
            absent: arm that could not be measured -> why.
            strength: how that of the fusion was found (`core.training.strengths.Choice.record`), where it was not
                given.
        """
        for name, texts in self.sets.items():
            losses, of_bytes = (
                {arm: self.record[kind][arm][name] for arm in self.record["made_from"] if arm in self.record[kind]}
                for kind in ("per_text", "per_text_bytes")
            )
            bits = bits_per_byte(of_bytes, texts.spans, texts.groups)
            self.record[name] = {**texts.counts(), "bits_per_byte": bits}
            figures = "arms" if name == "held_out" else f"arms_{name}"
            self.record[figures] = statistics(losses, texts.tokens, texts.groups)
        self.record["held_out"]["absent"] = absent
        if strength is not None:
            self.record["arms"]["fused"]["strength"] = strength
        write_json(self.path, {**self.record, **provenance()})
        return self.record
