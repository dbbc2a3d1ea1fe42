"""The tables of one task: benchmarks beside the paper's figures, every difference tested, and the held-out losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from core.errors import UserError
from evaluation.benchmarks.registry import TRAINED
from evaluation.significance import Estimate, combined, holm, interval, normalised, paired
from evaluation.verdict import notes, seed_notes, verdict

PAPER_COLUMNS = ("base", "fused", "fused + adapted")
# In the order of the columns; `no_hot` and `distill` are controls that the paper's tables do not have.
ARMS = ("base", "fused", "no_hot", "distill", "fused_adapted")
# The row of the mean over benchmarks.
MEAN = "mean"
# Why a benchmark that another arm has is absent.
NOT_RUN = "not run"


def benchmark_rows(arms: Mapping[str, Mapping[str, Any]], paper: Mapping[str, Any]) -> dict[str, Any]:
    """Per benchmark and category the score of every arm (%) and its difference to base, tested; their mean likewise.

    Args:
        arms: arm -> benchmark -> what `evaluation.collect_results.arm_scores` found.
        paper: of the task, in paper_results.json. `benchmarks` names those that the paper's mean is of: any other one
            is `extra` and in no mean. Without that list all benchmarks are in the mean. `counted_once` names groups of
            benchmarks that share one place in the mean.
    Returns:
        {"rows": {benchmark: {"metric", "n", "note", "prompt", "in_place_of", "extra", "arms": {arm: score}, "groups":
        {category: {arm: score}}}}, "mean": {arm: score}, "normalised", "absent"}; a score has `value` and `seeds`, and
        where there is a base `diff`, `ci95`, `p`, `dof` and `p_holm`, which takes all differences of the table as one
        family.
    Raises:
        UserError: arms whose items differ (another limit, another copy of the data).
    """
    base = arms.get("base", {})
    rows: dict[str, dict[str, Any]] = {}
    absent: dict[str, dict[str, str]] = {}
    for name in dict.fromkeys(name for scores in arms.values() for name in scores):
        for arm, scores in arms.items():
            result = scores.get(name, {"absent": NOT_RUN})
            if "absent" in result:
                absent.setdefault(name, {})[arm] = result["absent"]
                continue
            reference = base.get(name, {}) if arm != "base" else {}
            if "runs" in reference and not same_items(reference, result):
                raise UserError(
                    f"{name}: {arm} and base were scored on other items or with other settings; run "
                    "evaluation/run_task.py again for both"
                )
            row = rows.setdefault(name, {key: result[key] for key in ("metric", "n", "note", "prompt", "in_place_of")})
            row.setdefault("extra", is_extra(result, paper))
            everything = range(len(result["ids"]))
            row.setdefault("arms", {})[arm] = compared(result, reference, everything)
            groups = row.setdefault("groups", {})
            for category in sorted(set(result["categories"])):
                members = [n for n in everything if result["categories"][n] == category]
                groups.setdefault(category, {})[arm] = compared(result, reference, members)
    counted = [name for name, row in rows.items() if not row["extra"]]
    complete = [arm for arm in ARMS if counted and all(arm in rows[name]["arms"] for name in counted)]
    places = mean_places(counted, paper.get("counted_once", []))
    mean = {arm: mean_score(places, arms[arm], base if arm != "base" else {}) for arm in complete}
    adjust(rows, mean)
    scale = normalised({arm: score["value"] for arm, score in mean.items()})
    return {"rows": rows, "mean": mean, "normalised": scale, "absent": reasons(absent, rows)}


def same_items(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two arms were scored on the same items in the same way."""
    return bool(one["ids"] == other["ids"] and one["inputs"] == other["inputs"])


def compared(result: Mapping[str, Any], reference: Mapping[str, Any], members: Sequence[int]) -> dict[str, Any]:
    """Score (%) on some items of a benchmark, with its difference to `reference` where that has runs."""
    ours = np.asarray(result["runs"], float)[:, list(members)]  # [S, n]
    score = {"value": 100 * float(ours.mean()), "seeds": len(ours)}
    if "runs" not in reference:
        return score
    base = np.asarray(reference["runs"], float)[:, list(members)].mean(0)
    return {**score, **in_percent(paired(ours.tolist(), base.tolist()))}


def in_percent(estimate: Estimate) -> dict[str, Any]:
    """A difference of shares as one of percentages."""
    found = estimate.record()
    return {**found, "diff": 100 * found["diff"], "ci95": found["ci95"] and [100 * end for end in found["ci95"]]}


def mean_places(names: Sequence[str], counted_once: Sequence[Sequence[str]]) -> list[list[str]]:
    """The places of the mean, which all weigh the same: one per benchmark, or per group of `counted_once`."""
    together = {name: group[0] for group in counted_once for name in group}
    places: dict[str, list[str]] = {}
    for name in names:
        places.setdefault(together.get(name, name), []).append(name)
    return list(places.values())


def mean_score(
    places: Sequence[Sequence[str]], scores: Mapping[str, Mapping[str, Any]], base: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """The mean of an arm over the places, with its difference to base.

    Places have different items, so the variances of their differences add up; seeds are the same in all of them.
    Benchmarks that share a place ask the same questions (TruthfulQA's mc1 and mc2): their scores are averaged item by
    item first. Where their items differ, each of them counts as a part of the place for itself.
    """
    parts: list[tuple[float, list[str]]] = []
    for names in places:
        same = all(scores[name]["ids"] == scores[names[0]]["ids"] for name in names)
        groups = [list(names)] if same else [[name] for name in names]
        parts += [(1 / len(places) / len(groups), group) for group in groups]
    ours = [np.mean([scores[name]["runs"] for name in names], axis=0) for _, names in parts]  # [S, n] each
    value = 100 * sum(weight * float(runs.mean()) for (weight, _), runs in zip(parts, ours, strict=True))
    mean = {"value": value, "seeds": max(len(runs) for runs in ours)}
    if not all("runs" in base.get(name, {}) for _, names in parts for name in names):
        return mean
    estimates, weights = {}, {}
    for (weight, names), runs in zip(parts, ours, strict=True):
        reference = np.mean([np.mean(base[name]["runs"], axis=0) for name in names], axis=0)
        estimates[names[0]], weights[names[0]] = paired(runs.tolist(), reference.tolist()), weight
    return {**mean, **in_percent(combined(estimates, weights))}


def adjust(rows: Mapping[str, Mapping[str, Any]], mean: Mapping[str, dict[str, Any]]) -> None:
    """Add to every difference of a table its p-value by Holm's correction over all of them.

    The mean of a single benchmark, and a category that is all of its benchmark, are not tests of their own.
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
    """Why benchmarks are absent, for all arms or for some of them.

    Where no arm has a benchmark, a reason that a run recorded is given before that of an arm that never asked for it.
    """
    out: dict[str, str] = {}
    for name, by_arm in absent.items():
        if name in rows:
            out |= {f"{name} ({arm})": why for arm, why in by_arm.items()}
        else:
            out[name] = next((why for why in by_arm.values() if why != NOT_RUN), NOT_RUN)
    return out


def is_extra(result: Mapping[str, Any], paper: Mapping[str, Any]) -> bool:
    """Whether a benchmark was named beyond those that the paper's mean of the task is of."""
    return "benchmarks" in paper and result["in_place_of"] not in paper["benchmarks"]


def markdown(found: Mapping[str, Any]) -> str:
    """The tables of one task."""
    paper = found["paper"]
    lines = [f"## {found['task']}", ""]
    for name, run in found["runs"].items():
        lines += [f"### {name}", "", heading(run["models"]), ""]
        for kind, rows in run["sets"].items():
            own = kind == found["task"]
            title = paper.get("title", kind) if own else "General abilities (Figure 6), accuracy (%)"
            lines += [f"{title}. {caption(rows)}", "", *benchmark_table(rows, paper if own else {}), ""]
    lines += held_out_table({name: run["held_out"] for name, run in found["runs"].items() if "held_out" in run})
    return "\n".join(lines) + "\n"


def heading(used: Mapping[str, Any] | None) -> str:
    """Models and settings of a run: both strengths where training has one of its own."""
    if used is None:
        return "This run cannot be read; the reason is below."
    trained = [alpha for alpha in used["train_alpha"] if alpha != used["alpha"]]
    training = f" ({', '.join(map(str, trained))} while training)" if trained else ""
    models = f"{used['target_model']} <- {used['source_model']}, {used['feature_map']}"
    return f"{models}, alpha {used['alpha']}{training}, k {used['top_k'] or 'all'}"


def caption(found: Mapping[str, Any]) -> str:
    """What the differences in a table of benchmarks rest on."""
    of_rows = [row["arms"] for row in found["rows"].values()]
    of_rows += [arms for row in found["rows"].values() for arms in row["groups"].values()]
    scores = [(arm, score) for arms in (*of_rows, found["mean"]) for arm, score in arms.items()]
    tests = sum("p_holm" in score for _, score in scores)
    told = "The paper's figures are of its own models."
    if tests:
        told += (
            " In brackets the difference to base, its own 95 % interval over items (taken as independent) and seeds, "
            f"and p after Holm's correction over the {tests} differences of this table."
        )
    single = dict.fromkeys(arm for arm, score in scores if arm in TRAINED and score["seeds"] == 1)
    if single:
        told += f" Trained with one seed, so that their differences speak of this seed alone: {', '.join(single)}."
    return told


def benchmark_table(found: Mapping[str, Any], paper: Mapping[str, Any]) -> list[str]:
    """Rows: benchmarks, their categories, the mean. Columns: the paper's, then ours with differences to base.

    Args:
        found: what `benchmark_rows` gives.
        paper: of the task, in paper_results.json; empty where the paper has no such table.
    """
    theirs = paper.get("rows", {})
    arms = [arm for arm in ARMS if any(arm in row["arms"] for row in found["rows"].values())]
    columns = ["benchmark", *(f"paper: {column}" for column in PAPER_COLUMNS), *arms, "n"]
    lines = [f"| {' | '.join(columns)} |", "|" + " --- |" * len(columns)]
    used = set()

    def line(name: str, scores: Mapping[str, Any], n: Any, comparable: bool = True) -> None:
        key = next((row for row in theirs if comparable and row.lower() == name.strip().lower()), None)
        used.add(key)
        figures = [f"{value:.2f}" for value in theirs[key]] if key else [""] * len(PAPER_COLUMNS)
        cells = [cell(scores.get(arm)) for arm in arms]
        lines.append("| " + " | ".join([name, *figures, *cells, str(n)]) + " |")

    for name, row in found["rows"].items():
        note = f" ({row['note']})" if row["note"] else ""
        prompt = f", {row['prompt']}" if row["prompt"] else ""
        line(f"{name}, {row['metric']}{prompt}{note}", row["arms"], row["n"], not row["extra"])
        for group, scores in row["groups"].items():
            line(group, scores, "", not row["extra"])
    if found["mean"]:
        own = {row["in_place_of"]: row["note"] for row in found["rows"].values() if not row["extra"]}
        # The paper's mean is over all of its benchmarks, each in full.
        whole = set(paper.get("benchmarks", ())) <= own.keys() and not any(own.values())
        line(MEAN if whole else "mean of those above", found["mean"], "")
    for key in theirs:
        if key not in used:
            line(key, {}, "")
    if extra := [name for name, row in found["rows"].items() if row["extra"]]:
        lines += ["", f"Not among the paper's benchmarks, and in no mean: {', '.join(extra)}."]
    if found["normalised"]:
        told = ", ".join(f"{arm} {each['z']:+.2f} / {each['min_max']:.2f}" for arm, each in found["normalised"].items())
        lines += ["", f"Arms on a common scale (z-score / min-max, as in Figure 1): {told}."]
    lines += ["", *(f"Absent: {name}: {why}" for name, why in found["absent"].items())] if found["absent"] else []
    return lines


def cell(score: Mapping[str, Any] | None) -> str:
    """`46.10 (+1.20 [-0.30, +2.70], p 0.034)`."""
    if score is None:
        return ""
    value = f"{score['value']:.2f}"
    if "diff" not in score:
        return value
    p = score.get("p_holm")
    told = "" if p is None else ", p < 0.001" if p < 0.001 else f", p {p:.3f}"
    return f"{value} ({interval(score, 2)}{told})"


def held_out_table(runs: Mapping[str, Any]) -> list[str]:
    """Loss on held-out rows, all arms and controls, the runs side by side, each with its verdict."""
    told = [f"Absent: {name}: {run['absent']}" for name, run in runs.items() if "absent" in run]
    runs = {name: run for name, run in runs.items() if "absent" not in run}
    if not runs:
        return told
    arms = list(dict.fromkeys(arm for run in runs.values() for arm in run["arms"]))
    lines = [
        "Loss on held-out texts, nats per token: base, then minus base [95 % over groups of texts and seeds]; negative "
        "is better",
        "",
        f"| arm | {' | '.join(runs)} |",
        "|" + " --- |" * (len(runs) + 1),
    ]
    for arm in arms:
        found = [run["arms"].get(arm) for run in runs.values()]
        cells = ["" if r is None else f"{r['nll']:.4f}" if arm == "base" else interval(r) for r in found]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    lines.append("")
    for name, run in runs.items():
        counts = run["texts"]
        size = f"{counts['texts']} texts of {counts['groups']} groups, {counts['tokens']} tokens"
        lines.append(f"{name}: {size}. {' '.join([*notes(counts), *seed_notes(run['arms']), verdict(run['arms'])])}")
    return [*lines, *told, ""]
