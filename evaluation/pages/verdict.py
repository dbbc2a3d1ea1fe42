"""The verdict of a run in words: the sentences of the table that stage 4 prints, and what the gain amounts to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evaluation.arms.bits import SOURCE, cells, percent
from evaluation.arms.verdict import arm_cells, sentences, strength_notes, trial_notes, verdict
from evaluation.significance import interval

NO_RESULTS = "No verdict yet: the losses on held-out texts have not been measured."


def headline(results: Mapping[str, Any] | None) -> str:
    """The one sentence that says whether transfer was shown: the table's own."""
    return NO_RESULTS if results is None else verdict(results["arms"])


def amount(results: Mapping[str, Any]) -> str:
    """By how much the fused model differs from the base, in every unit that was measured."""
    fused = results["arms"]["fused"]
    parts = [f"{interval(fused)} nats per token"]
    bits = results["held_out"].get("bits_per_byte", {}).get("arms", {}).get("fused")
    if bits:
        parts.append(f"{interval(bits)} bits per byte")
        if "closed" in bits:
            parts.append(f"{percent(bits['closed'])} of the way from the base to the source")
    return f"Fused minus base, without training: {', '.join(parts)}. Negative is better; in brackets the 95 % interval."


def rests_on(counts: Mapping[str, Any]) -> str:
    """How many texts and groups the intervals rest on."""
    return (
        f"Measured on {counts['texts']} held-out texts of {counts['groups']} groups, {counts['tokens']} tokens. The "
        "interval is over groups of texts, which resemble each other within a group, and over seeds."
    )


def further_sentences(results: Mapping[str, Any], trials: Mapping[str, int]) -> list[str]:
    """All further sentences of the table, in its order.

    Args:
        trials: trained arm -> its number of trials.
    """
    arms = results["arms"]
    lines = sentences(arms, results["held_out"], results.get("arms_general"), results.get("general"))
    notes = [*strength_notes(results.get("strengths", {})), *trial_notes(trials)]
    return [*(line for line in lines if line != verdict(arms)), *notes]


def arm_rows(results: Mapping[str, Any]) -> list[list[str]]:
    """The table of arms: name, loss, perplexity, minus base, fused minus arm; then bits per byte and the share of the
    gap that is closed, with the source, where these were measured."""
    held_out = results["held_out"]
    rows = [["arm", "nats per token", "perplexity", "minus base [95 %]", "fused minus arm [95 %]"]]
    rows[0] += ["bits per byte", "closed"] if cells("base", held_out) else []
    for arm, found in results["arms"].items():
        nll, ppl, base, _, versus = arm_cells(arm, found)
        rows.append([arm, nll, ppl, base, versus, *cells(arm, held_out)])
    if source := cells(SOURCE, held_out):
        rows.append([SOURCE, "", "", "", "", *source])
    return rows
