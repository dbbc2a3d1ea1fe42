"""The comparison of all arms on held-out texts: statistics, the table, and the sentence that says what was shown."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from core.fusion.controls import CONTROLS
from evaluation.benchmarks.registry import TRAINED
from evaluation.significance import below_zero, difference, interval

# With fewer groups the estimate of the variance itself varies so much that intervals are a rough guide.
FEW_GROUPS = 20
# A diverged model can lose so many nats per token that no float holds its perplexity.
LARGEST_EXPONENT = 700


def statistics(
    per_text: Mapping[str, Sequence[float]], tokens: Sequence[int], groups: Sequence[Hashable]
) -> dict[str, dict[str, Any]]:
    """Per arm: nll per token, perplexity (None beyond what a float holds), number of texts and of groups, difference to
    base and fused minus arm.

    Trainings `arm/seedN` are one arm: the mean of their losses; `seeds` holds the difference of each, and the seeds'
    spread is part of the interval (`evaluation.significance.difference`).

    Args:
        per_text: arm, or `arm/seedN` -> summed negative log-likelihood of every text, in nats.
        tokens: number of tokens with loss of every text, each at least 1.
        groups: group of every text.
    """
    runs: dict[str, dict[str, Sequence[float]]] = {}
    for name, sums in per_text.items():
        arm, _, run = name.partition("/")
        runs.setdefault(arm, {})[run] = sums
    total = sum(tokens)
    mean = {arm: np.mean(list(found.values()), axis=0) for arm, found in runs.items()}

    def values(found: Mapping[str, Sequence[float]], seeds: Sequence[str]) -> list[Sequence[float]]:
        return [found[""]] if "" in found else [found[run] for run in seeds]

    def paired(a: str, b: str) -> dict[str, Any]:
        """Of arm a minus arm b, each seed against the same one where both have seeds."""
        seeds = [run for run in {**runs[a], **runs[b]} if run]
        estimate = difference(values(runs[a], seeds), values(runs[b], seeds), tokens, groups)
        by_seed = dict(zip(seeds, estimate.by_seed, strict=True)) if seeds else {}
        better = int((mean[a] < mean[b]).sum())
        return {**estimate.record(), "better": better, **({"seeds": by_seed} if by_seed else {})}

    out: dict[str, dict[str, Any]] = {}
    for arm in mean:
        nll = float(mean[arm].sum() / total)
        out[arm] = {
            "nll": nll,
            "ppl": math.exp(nll) if nll < LARGEST_EXPONENT else None,
            "n": len(tokens),
            "groups": len(set(groups)),
            **paired(arm, "base"),
            "fused_minus_arm": paired("fused", arm),
        }
    for rival in TRAINED:
        if rival in mean and rival != "fused_adapted":
            out["fused_adapted"][f"minus_{rival}"] = paired("fused_adapted", rival)
    return out


def table(
    arms: Mapping[str, Mapping[str, Any]],
    held_out: Mapping[str, Any],
    general: Mapping[str, Mapping[str, Any]] | None = None,
    general_counts: Mapping[str, Any] | None = None,
) -> str:
    """The table that ends the pipeline: every arm, what the intervals rest on, and the sentence that it all comes to.

    Args:
        arms: `statistics` of the held-out texts.
        held_out: {"texts", "tokens", "groups", "left_out": texts without a token to score, "end_of_turn": whether
            losses include the token that ends an answer, "absent": arm -> why it could not be measured}.
        general: `statistics` of general text, where there is any.
        general_counts: of general text, as `held_out`.
    """
    head = f"{'arm':14} {'nll':>8} {'ppl':>8}  {'minus base [95 %]':>27} {'better':>10}  {'fused minus arm [95 %]':>27}"
    lines = [
        f"held out: {held_out['texts']} texts of {held_out['groups']} groups, {held_out['tokens']} tokens; nats per "
        "token, negative is better",
        head,
    ]
    for arm, r in arms.items():
        base = "" if arm == "base" else interval(r)
        better = "" if arm == "base" else f"{r['better']} of {r['n']}"
        versus = "" if arm == "fused" else interval(r["fused_minus_arm"])
        ppl = "inf" if r["ppl"] is None else f"{r['ppl']:.2f}"
        lines.append(f"{arm:14} {r['nll']:8.4f} {ppl:>8}  {base:>27} {better:>10}  {versus:>27}")
    lines += [*notes(held_out), *seed_notes(arms), verdict(arms)]
    for rival in ("no_hot", "distill"):
        if rival in arms:
            found = arms["fused_adapted"][f"minus_{rival}"]
            lines.append(f"After fine-tuning: fused_adapted minus {rival} = {interval(found)}{by_seed(found)}.")
    if general and general_counts:
        changes = ", ".join(f"{arm} {interval(general[arm])}" for arm in ("fused", *TRAINED) if arm in general)
        count = f"{general_counts['texts']} texts of {general_counts['groups']} groups"
        lines.append(f"On general text ({count}, base {general['base']['nll']:.4f}), minus base: {changes}.")
        lines += [f"General text: {note}" for note in notes(general_counts)]
    return "\n".join(lines)


def notes(counts: Mapping[str, Any]) -> list[str]:
    """What the intervals on a set of texts rest on, what was left out, and what the losses include."""
    lines = [f"{arm} is left out: {why}." for arm, why in counts.get("absent", {}).items()]
    if counts.get("left_out"):
        lines.append(f"{counts['left_out']} more texts have no token to score and are left out.")
    if counts.get("end_of_turn"):
        lines.append("Losses are on answers and include the token that ends an answer.")
    groups = counts["groups"]
    if groups == 1:
        lines.append("All texts belong to one group: no interval can be given, and nothing can be shown.")
    elif groups < FEW_GROUPS:
        lines.append(f"The intervals rest on {groups} groups only and are rough.")
    return lines


def seed_notes(arms: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A sentence on the arms that were trained with a single seed, where there are any."""
    trained = {arm: len(r["seeds"]) for arm, r in arms.items() if "seeds" in r}
    single = [arm for arm, count in trained.items() if count == 1]
    if not single:
        return []
    whose = "Each training has" if len(single) == len(trained) else f"{', '.join(single)} has"
    return [f"{whose} one seed: what is said after fine-tuning speaks of this seed alone."]


def verdict(arms: Mapping[str, Mapping[str, Any]]) -> str:
    """Whether anything was transferred: fused has to be reliably better than base and than every control.

    All of these tests have to succeed, so the chance of a false alarm is not above that of a single one.
    """
    rivals = [arm for arm in ("base", *CONTROLS) if arm in arms]
    lost = [arm for arm in rivals if not below_zero(arms[arm]["fused_minus_arm"])]
    if lost:
        return f"No transfer shown: fused is not reliably better than {', '.join(lost)}."
    missing = [control for control in CONTROLS if control not in arms]
    controls = f"every control that was measured (without {', '.join(missing)})" if missing else "every control"
    return f"Transfer: without training, fused is better than base and than {controls} (95 % intervals)."


def by_seed(r: Mapping[str, Any]) -> str:
    """`; by seed -0.04, -0.05`; nothing for one seed."""
    found = r.get("seeds", {})
    return "; by seed " + ", ".join(f"{value:+.4f}" for value in found.values()) if len(found) > 1 else ""
