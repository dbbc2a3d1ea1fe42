"""What the losses of all arms show: statistics, the table that ends the pipeline, and the sentence below it."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from core.fusion.controls import CONTROLS
from core.fusion.strengths import mean_strength
from evaluation.arms.bits import SOURCE, bit_notes, columns, heading
from evaluation.arms.paired import Paired
from evaluation.arms.run import FUSED_LEARNED, TRAINED
from evaluation.significance import below_zero, interval

# With fewer groups even the estimate of the variance varies so much that intervals are only a rough guide.
FEW_GROUPS = 20
# A diverged model can lose so many nats per token that no float holds its perplexity.
LARGEST_EXPONENT = 700


def statistics(
    per_text: Mapping[str, Sequence[float]], tokens: Sequence[int], groups: Sequence[Hashable]
) -> dict[str, dict[str, Any]]:
    """The figures of every arm: its loss, its difference to base, and the difference of fused to it.

    Args:
        per_text: arm, or `ARM/SEED` -> summed negative log-likelihood of every text, in nats.
        tokens: number of tokens with loss of every text, each at least 1.
        groups: group of every text.
    Returns:
        arm -> {"nll": nats per token, "ppl": perplexity, None where no float holds it, "n": texts, "groups", then the
        difference to base as `Paired.minus` gives it, "fused_minus_arm"}; `fused_adapted` also has "minus_no_hot" and
        "minus_distill" where these were trained.
    """
    paired = Paired(per_text, tokens, groups)
    figures: dict[str, dict[str, Any]] = {}
    for arm in paired.mean:
        nll = paired.average(arm)
        figures[arm] = {
            "nll": nll,
            "ppl": math.exp(nll) if nll < LARGEST_EXPONENT else None,
            "n": len(tokens),
            "groups": len(set(groups)),
            **paired.minus(arm, "base"),
            "fused_minus_arm": paired.minus("fused", arm),
        }
    for rival in TRAINED:
        if rival in paired.mean and rival != "fused_adapted":
            figures["fused_adapted"][f"minus_{rival}"] = paired.minus("fused_adapted", rival)
    return figures


def table(
    arms: Mapping[str, Mapping[str, Any]],
    held_out: Mapping[str, Any],
    general: Mapping[str, Mapping[str, Any]] | None = None,
    general_counts: Mapping[str, Any] | None = None,
) -> str:
    """The table that ends the pipeline: every arm, what the intervals rest on, and the sentence that sums it up.

    Args:
        arms: `statistics` of the held-out texts; that of "fused" has "strength", how its strength was found
            (`core.training.strengths.Choice.record`), where it was not given.
        held_out: `TextSet.counts` of these, with "absent": arm -> why it could not be measured, and "bits_per_byte" as
            `evaluation.arms.bits.bits_per_byte` gives it.
        general: `statistics` of general text, where there is any.
        general_counts: `TextSet.counts` of it, with "bits_per_byte".
    """
    lines = [
        f"held out: {held_out['texts']} texts of {held_out['groups']} groups, {held_out['tokens']} tokens; nats per "
        "token, negative is better",
        f"{'arm':14} {'nll':>8} {'ppl':>8}  {'minus base [95 %]':>27} {'better':>10}  {'fused minus arm [95 %]':>27}"
        + heading(held_out),
    ]
    for arm, figures in arms.items():
        nll, ppl, base, better, versus = arm_cells(arm, figures)
        row = f"{arm:14} {nll:>8} {ppl:>8}  {base:>27} {better:>10}  {versus:>27}"
        lines.append(row + columns(arm, held_out))
    if source := columns(SOURCE, held_out):
        lines.append(f"{SOURCE:14}{'':87}{source}")
    return "\n".join([*lines, *sentences(arms, held_out, general, general_counts)])


def arm_cells(arm: str, figures: Mapping[str, Any]) -> tuple[str, str, str, str, str]:
    """The row of one arm as text: nats per token, perplexity, minus base, texts that are better, fused minus arm."""
    return (
        f"{figures['nll']:.4f}",
        "inf" if figures["ppl"] is None else f"{figures['ppl']:.2f}",
        "" if arm == "base" else interval(figures),
        "" if arm == "base" else f"{figures['better']} of {figures['n']}",
        "" if arm == "fused" else interval(figures["fused_minus_arm"]),
    )


def sentences(
    arms: Mapping[str, Mapping[str, Any]],
    held_out: Mapping[str, Any],
    general: Mapping[str, Mapping[str, Any]] | None = None,
    general_counts: Mapping[str, Any] | None = None,
) -> list[str]:
    """The sentences below the rows of `table`, which explains the arguments; one of them is the `verdict`."""
    found = arms["fused"].get("strength")
    strength = [] if found is None else [f"{found['sentence']}."]
    lines = [*notes(held_out), *seed_notes(arms), verdict(arms), *strength, *bit_notes(held_out)]
    for rival in ("no_hot", "distill"):
        if rival in arms:
            found = arms["fused_adapted"][f"minus_{rival}"]
            lines.append(f"After fine-tuning: fused_adapted minus {rival} = {interval(found)}{by_seed(found)}.")
    if general and general_counts:
        changes = ", ".join(f"{arm} {interval(general[arm])}" for arm in ("fused", *TRAINED) if arm in general)
        count = f"{general_counts['texts']} texts of {general_counts['groups']} groups"
        lines.append(f"On general text ({count}, base {general['base']['nll']:.4f}), minus base: {changes}.")
        lines += [f"General text: {note}" for note in [*notes(general_counts), *bit_notes(general_counts)]]
    return lines


def notes(counts: Mapping[str, Any]) -> list[str]:
    """Sentences on a set of texts: what was left out, what losses include, and how many groups intervals rest on."""
    lines = absent_notes(counts.get("absent", {}))
    if counts.get("left_out"):
        lines.append(f"{counts['left_out']} more texts have no token to score and are left out.")
    if counts.get("end_of_turn"):
        lines.append("Losses are on answers and include the token that ends an answer.")
    groups = counts["groups"]
    if groups == 1:
        lines.append("All texts belong to one group: no interval can be given, and nothing can be shown.")
    elif groups < FEW_GROUPS:
        lines.append(f"The intervals rest on only {groups} groups and are rough.")
    return lines


def absent_notes(absent: Mapping[str, str]) -> list[str]:
    """One sentence per reason why arms are left out, which names all arms that have it.

    Args:
        absent: arm -> why it could not be measured.
    """
    arms_of: dict[str, list[str]] = {}
    for arm, why in absent.items():
        arms_of.setdefault(why, []).append(arm)
    lines = []
    for why, arms in arms_of.items():
        *others, last = arms
        named = f"{', '.join(others)} and {last} are" if others else f"{last} is"
        lines.append(f"{named} left out: {why}.")
    return lines


def strength_notes(strengths: Mapping[str, Any]) -> list[str]:
    """Sentences on the strengths that stage 4 found: those of the controls, and of `fused_learned`.

    Args:
        strengths: arm -> `core.training.strengths.Choice.record`.
    """
    lines = []
    controls = {arm: one for arm, one in strengths.items() if arm in CONTROLS}
    if controls:
        found = ", ".join(f"{control} {mean_strength(one['alpha']):.3f}" for control, one in controls.items())
        how = "in the same way, on the validation rows (means over projections)"
        lines.append(f"Strengths of the controls were found {how}: {found}.")
    if FUSED_LEARNED in strengths:
        mean = mean_strength(strengths[FUSED_LEARNED]["alpha"])
        lines.append(
            f"{FUSED_LEARNED} has learned strengths ({mean:.3f} on average), and no control here has: run stages 2 and "
            "4 with --alpha learned to see whether its gain is transfer."
        )
    return lines


def seed_notes(arms: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A sentence on the arms that were trained with a single seed, where there are any."""
    trained = {arm: len(figures["seeds"]) for arm, figures in arms.items() if "seeds" in figures}
    single = [arm for arm, count in trained.items() if count == 1]
    if not single:
        return []
    if len(single) == len(trained):
        return ["Each training has one seed: what is said after fine-tuning speaks of this seed alone."]
    have, them = ("have one seed each", "them") if len(single) > 1 else ("has one seed", "it")
    return [f"{', '.join(single)} {have}: what is said of {them} after fine-tuning speaks of this seed alone."]


def trial_notes(trials: Mapping[str, int]) -> list[str]:
    """A sentence where some arm was chosen among several trials, because it then had more chances than the others.

    Args:
        trials: trained arm -> its number of trials.
    """
    if set(trials.values()) <= {1}:
        return []
    counts = ", ".join(f"{arm} {count}" for arm, count in trials.items())
    return [f"Each training is the best of several trials, chosen on validation rows: {counts}."]


def verdict(arms: Mapping[str, Mapping[str, Any]]) -> str:
    """Whether anything was transferred: fused has to be reliably better than base and than every control.

    Each of these tests has to succeed, so the chance of a false alarm is not above that of a single test. A gain that
    `filtered_self` shares, being reliably better than base itself, is called denoising, because that control has seen
    the source's spectrum alone. Where the search for the strength left the target alone, no control has to be named.
    """
    if arms["fused"].get("strength", {}).get("alpha") == 0:
        return "No transfer shown. The strength is 0: fused is the base."
    rivals = [arm for arm in ("base", *CONTROLS) if arm in arms]
    unbeaten = [arm for arm in rivals if not below_zero(arms[arm]["fused_minus_arm"])]
    if unbeaten:
        shown = f"No transfer shown: fused is not reliably better than {', '.join(unbeaten)}."
        if "filtered_self" not in unbeaten or "base" in unbeaten or not below_zero(arms["filtered_self"]):
            return shown
        left = interval(arms["filtered_self"]["fused_minus_arm"])
        return f"{shown} filtered_self shares its gain (fused minus filtered_self = {left}): that is denoising."
    missing = [control for control in CONTROLS if control not in arms]
    controls = f"every control that was measured (without {', '.join(missing)})" if missing else "every control"
    return f"Transfer: without training, fused is better than base and than {controls} (95 % intervals)."


def by_seed(found: Mapping[str, Any]) -> str:
    """The difference of each seed as text, `; by seed -0.04, -0.05`; empty for a single seed."""
    seeds = found.get("seeds", {})
    return "; by seed " + ", ".join(f"{value:+.4f}" for value in seeds.values()) if len(seeds) > 1 else ""
