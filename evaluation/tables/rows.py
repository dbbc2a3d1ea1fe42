"""The figures of a table of benchmarks: the score of every arm, its difference to base with a test, and their mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from core.errors import UserError
from evaluation.significance import Estimate, combined, holm, normalised, paired
from evaluation.tables.arm_scores import ArmScore, ArmScores, present

# In the order of the columns; `no_hot` and `distill` are controls that the paper's tables do not have.
ARMS = ("base", "fused", "no_hot", "distill", "fused_adapted")
# Name of the row of the mean over benchmarks.
MEAN = "mean"
# Why a benchmark is absent that was run for another arm.
NOT_RUN = "not run"


def benchmark_rows(arms: Mapping[str, ArmScores], paper: Mapping[str, Any]) -> dict[str, Any]:
    """Per benchmark and category the score of every arm (%) and its difference to base, tested; their mean likewise.

    Args:
        arms: arm -> its scores by benchmark.
        paper: the entry of the task in paper_results.json. Its `benchmarks` are those that the paper's mean is of; any
            other one is `extra` and in no mean. Without that list all benchmarks are in the mean. Its `counted_once`
            lists groups of benchmarks that count as one in the mean.
    Returns:
        {"rows": {benchmark: {"metric", "n", "note", "prompt", "in_place_of", "extra", "arms": {arm: score}, "groups":
        {category: {arm: score}}}}, "mean": {arm: score}, "normalised", "absent"}. A score has `value` and `seeds`, and
        where there is a base `diff`, `ci95`, `p`, `dof`, and `p_holm`, in which all differences of the table are one
        family of tests.
    Raises:
        UserError: arms were scored on different items (another limit, another copy of the data).
    """
    base = present(arms.get("base", {}))
    rows: dict[str, dict[str, Any]] = {}
    absent: dict[str, dict[str, str]] = {}
    for name in dict.fromkeys(name for scores in arms.values() for name in scores):
        for arm, scores in arms.items():
            score = scores.get(name, NOT_RUN)
            if isinstance(score, str):
                absent.setdefault(name, {})[arm] = score
                continue
            reference = base.get(name) if arm != "base" else None
            if reference and not reference.same_items(score):
                raise UserError(
                    f"{name}: {arm} and base were scored on other items or with other settings; run "
                    "evaluation/run_task.py again for both"
                )
            row = rows.setdefault(name, _row(score, paper))
            row["arms"][arm] = compared(score, reference, range(len(score.ids)))
            for category in sorted(set(score.categories)):
                items = [item for item, of_item in enumerate(score.categories) if of_item == category]
                row["groups"].setdefault(category, {})[arm] = compared(score, reference, items)
    mean = means(arms, rows, paper.get("counted_once", []))
    adjust(rows, mean)
    scale = normalised({arm: score["value"] for arm, score in mean.items()})
    return {"rows": rows, "mean": mean, "normalised": scale, "absent": reasons(absent, rows)}


def _row(score: ArmScore, paper: Mapping[str, Any]) -> dict[str, Any]:
    """A row without figures, from the first arm that has the benchmark."""
    return {
        "metric": score.metric,
        "n": len(score.ids),
        "note": score.note,
        "prompt": score.prompt,
        "in_place_of": score.in_place_of,
        "extra": "benchmarks" in paper and score.in_place_of not in paper["benchmarks"],
        "arms": {},
        "groups": {},
    }


def compared(score: ArmScore, reference: ArmScore | None, items: Sequence[int]) -> dict[str, Any]:
    """The score (%) on some items of a benchmark, with its difference to `reference` where there is one.

    Args:
        items: positions of the items.
    """
    ours = np.asarray(score.runs, float)[:, list(items)]  # [S, n]
    found = {"value": 100 * float(ours.mean()), "seeds": len(ours)}
    if reference is None:
        return found
    base = np.asarray(reference.runs, float)[:, list(items)].mean(0)
    return {**found, **in_percent(paired(ours.tolist(), base.tolist()))}


def in_percent(estimate: Estimate) -> dict[str, Any]:
    """The record of a difference of shares, as a difference of percentages."""
    found = estimate.record()
    return {**found, "diff": 100 * found["diff"], "ci95": found["ci95"] and [100 * end for end in found["ci95"]]}


def means(
    arms: Mapping[str, ArmScores], rows: Mapping[str, Any], counted_once: Sequence[Sequence[str]]
) -> dict[str, dict[str, Any]]:
    """Arm -> its mean over benchmarks (`mean_score`), for each arm that has all benchmarks that are in the mean."""
    counted = [name for name, row in rows.items() if not row["extra"]]
    parts = mean_parts(counted, counted_once)
    complete = [arm for arm in ARMS if counted and all(arm in rows[name]["arms"] for name in counted)]
    base = present(arms.get("base", {}))
    return {arm: mean_score(parts, present(arms[arm]), base if arm != "base" else {}) for arm in complete}


def mean_parts(names: Sequence[str], counted_once: Sequence[Sequence[str]]) -> list[list[str]]:
    """The parts of the mean, which all have the same weight: one per benchmark, or per group of `counted_once`."""
    together = {name: group[0] for group in counted_once for name in group}
    parts: dict[str, list[str]] = {}
    for name in names:
        parts.setdefault(together.get(name, name), []).append(name)
    return list(parts.values())


def mean_score(
    parts: Sequence[Sequence[str]], scores: Mapping[str, ArmScore], base: Mapping[str, ArmScore]
) -> dict[str, Any]:
    """The mean of an arm over the parts, with its difference to base where base has all benchmarks as well.

    Different parts have different items, so the variances of their differences add up; the seeds are the same in all of
    them. Benchmarks in one part ask the same questions (TruthfulQA's mc1 and mc2), so their scores are averaged item by
    item first. Where their items differ nevertheless, each of them is a share of the part by itself.
    """
    weighted: list[tuple[float, list[str]]] = []
    for names in parts:
        same = all(scores[name].ids == scores[names[0]].ids for name in names)
        groups = [list(names)] if same else [[name] for name in names]
        weighted += [(1 / len(parts) / len(groups), group) for group in groups]
    ours = [np.mean([scores[name].runs for name in names], axis=0) for _, names in weighted]  # [S, n] each
    value = 100 * sum(weight * float(runs.mean()) for (weight, _), runs in zip(weighted, ours, strict=True))
    mean = {"value": value, "seeds": max(len(runs) for runs in ours)}
    if not all(name in base for _, names in weighted for name in names):
        return mean
    estimates, weights = {}, {}
    for (weight, names), runs in zip(weighted, ours, strict=True):
        reference = np.mean([np.mean(base[name].runs, axis=0) for name in names], axis=0)
        estimates[names[0]], weights[names[0]] = paired(runs.tolist(), reference.tolist()), weight
    return {**mean, **in_percent(combined(estimates, weights))}


def adjust(rows: Mapping[str, Mapping[str, Any]], mean: Mapping[str, dict[str, Any]]) -> None:
    """Add to every difference of a table its p-value by Holm's correction over all of them.

    The mean of a single benchmark, and a category that is all of its benchmark, are no tests of their own.
    """
    scores: dict[Any, dict[str, Any]] = {}
    for name, row in rows.items():
        scores |= {(name, "", arm): score for arm, score in row["arms"].items()}
        if len(row["groups"]) > 1:
            for group, found in row["groups"].items():
                scores |= {(name, group, arm): score for arm, score in found.items()}
    if sum(not row["extra"] for row in rows.values()) > 1:
        scores |= {("", MEAN, arm): score for arm, score in mean.items()}
    adjusted = holm({key: score["p"] for key, score in scores.items() if "p" in score})
    for key, p in adjusted.items():
        scores[key]["p_holm"] = p


def reasons(absent: Mapping[str, Mapping[str, str]], rows: Mapping[str, Any]) -> dict[str, str]:
    """Benchmark, or `BENCHMARK (ARM)` where only some arms lack it -> why it is absent.

    Where no arm has a benchmark, a reason that a run recorded comes before that of an arm for which it was never run.
    """
    out: dict[str, str] = {}
    for name, by_arm in absent.items():
        if name in rows:
            out |= {f"{name} ({arm})": why for arm, why in by_arm.items()}
        else:
            out[name] = next((why for why in by_arm.values() if why != NOT_RUN), NOT_RUN)
    return out
