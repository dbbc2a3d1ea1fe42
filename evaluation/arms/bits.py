"""Bits per byte of all arms and of the source, and how much of the way from the target to the source each arm goes."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from evaluation.arms.paired import Paired
from evaluation.arms.spans import ByteSpans
from evaluation.significance import below_zero, interval

# The arm that is the source itself.
SOURCE = "source"


def bits_per_byte(
    per_text: Mapping[str, Sequence[float]], spans: ByteSpans, groups: Sequence[Hashable]
) -> dict[str, Any]:
    """The figures of every arm and of the source in bits per byte: sum of nats / (ln 2 * bytes).

    Args:
        per_text: arm, or `ARM/SEED`, or `source` -> negative log-likelihood of the bytes of every text, in nats.
        spans: the bytes of every text; texts with none are left out.
        groups: group of every text.
    Returns:
        {"texts", "groups", "bytes", "left_out": texts without bytes, "answers": whether the bytes are of answers,
        "arms"}. "arms" is arm -> {"bits_per_byte", then the difference to base as `Paired.minus` gives it, "closed"}.
        "closed" is the share of the gap between base and source that the arm closes, (base - arm) / (base - source);
        it is there only where the source is reliably better than base.
    """
    sizes = spans.sizes
    kept = [number for number, size in enumerate(sizes) if size]
    counts = {
        "texts": len(kept),
        "groups": len({groups[number] for number in kept}),
        "bytes": sum(sizes),
        "left_out": len(sizes) - len(kept),
        "answers": spans.answers,
    }
    if not kept:
        return {**counts, "arms": {}}
    paired = Paired(
        {arm: [sums[number] for number in kept] for arm, sums in per_text.items()},
        [sizes[number] * math.log(2) for number in kept],
        [groups[number] for number in kept],
    )
    arms = {arm: {"bits_per_byte": paired.average(arm), **paired.minus(arm, "base")} for arm in paired.mean}
    if SOURCE in arms and below_zero(arms[SOURCE]):
        for figures in arms.values():
            figures["closed"] = figures["diff"] / arms[SOURCE]["diff"] + 0.0  # not -0.0 for an arm that equals base
    return {**counts, "arms": arms}


def percent(share: float) -> str:
    """A share as text, `12.3 %`; one that rounds to 0 has no sign."""
    return f"{round(100 * share, 1) + 0.0:.1f} %"


def cells(arm: str, counts: Mapping[str, Any]) -> list[str]:
    """Bits per byte of one arm and what it closes of the gap; no cells where no text has bytes."""
    figures = counts.get("bits_per_byte", {}).get("arms", {}).get(arm)
    if figures is None:
        return []
    return [f"{figures['bits_per_byte']:.4f}", percent(figures["closed"]) if "closed" in figures else ""]


def columns(arm: str, counts: Mapping[str, Any]) -> str:
    """`cells` as two columns of the table of arms, or nothing."""
    found = cells(arm, counts)
    return f"  {found[0]:>9} {found[1]:>8}" if found else ""


def heading(counts: Mapping[str, Any]) -> str:
    """The heading of `columns`."""
    return f"  {'bits/byte':>9} {'closed':>8}" if columns("base", counts) else ""


def bit_notes(counts: Mapping[str, Any]) -> list[str]:
    """Sentences on a set of texts: what bits per byte are of, and how far the fused model goes towards the source.

    Args:
        counts: `TextSet.counts`, with "bits_per_byte" as `bits_per_byte` returns it.
    """
    found = counts.get("bits_per_byte")
    if found is None:
        return []
    if not found["texts"]:
        return ["No bits per byte: target and source have no span between token ends in common in any text."]
    left_out = f"; {found['left_out']} more have no span between shared token ends" if found["left_out"] else ""
    what = "the answers in " * found["answers"] + f"{found['texts']} texts"
    source = found["arms"].get(SOURCE)
    size = f"of {found['bytes']} bytes of {what}{left_out}"
    if source is None:
        return [f"Bits per byte are {size}; the source was not measured, so no share of a gap is given."]
    gap = f"In bits per byte ({size}), the source minus base is {interval(source)}"
    if "closed" not in source:
        return [f"{gap}: the source is not shown to be better here, so no share of a gap is given."]
    return [f"{gap}; fused closes {percent(found['arms']['fused']['closed'])} of that gap."]
