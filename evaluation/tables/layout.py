"""The tables of one task in Markdown, in the layout of the paper's Tables 1-6."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from core.fusion.strengths import in_words
from evaluation import markdown
from evaluation.arms.bits import bit_notes
from evaluation.arms.run import TRAINED
from evaluation.arms.verdict import notes, seed_notes, verdict
from evaluation.significance import interval
from evaluation.tables.rows import ARMS, MEAN

PAPER_COLUMNS = ("base", "fused", "fused + adapted")


def task_tables(found: Mapping[str, Any]) -> str:
    """The tables of one task, run by run, and the held-out losses of all runs.

    Args:
        found: as `evaluation.collect_results.collect` returns it.
    """
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
    """Models and settings of a run, with the strength while training where it differs from that of fusion."""
    if used is None:
        return "This run cannot be read; the reason is below."
    trained = [alpha for alpha in used["train_alpha"] if alpha != used["alpha"]]
    training = f" ({', '.join(map(in_words, trained))} while training)" if trained else ""
    models = f"{used['target_model']} <- {used['source_model']}, {used['feature_map']}"
    return f"{models}, alpha {used['alpha']}{training}, k {used['top_k'] or 'all'}"


def caption(found: Mapping[str, Any]) -> str:
    """What the differences in a table of benchmarks rest on."""
    by_arm = [row["arms"] for row in found["rows"].values()]
    by_arm += [arms for row in found["rows"].values() for arms in row["groups"].values()]
    scores = [(arm, score) for arms in (*by_arm, found["mean"]) for arm, score in arms.items()]
    tests = sum("p_holm" in score for _, score in scores)
    text = "The paper's figures are of its own models."
    if tests:
        text += (
            " In brackets: the difference to base, its own 95 % interval over items (taken as independent) and seeds, "
            f"and p after Holm's correction over the {tests} differences of this table."
        )
    single = dict.fromkeys(arm for arm, score in scores if arm in TRAINED and score["seeds"] == 1)
    if single:
        text += f" Trained with one seed, so that their differences speak of this seed alone: {', '.join(single)}."
    return text


def benchmark_table(found: Mapping[str, Any], paper: Mapping[str, Any]) -> list[str]:
    """Lines of a table with a row per benchmark and category, and their mean. Columns: the paper's, then ours.

    Args:
        found: as `benchmark_rows` returns it.
        paper: the entry of the task in paper_results.json; empty where the paper has no such table.
    """
    theirs = paper.get("rows", {})
    arms = [arm for arm in ARMS if any(arm in row["arms"] for row in found["rows"].values())]
    rows = [["benchmark", *(f"paper: {column}" for column in PAPER_COLUMNS), *arms, "n"]]
    used = set()

    def add(name: str, scores: Mapping[str, Any], n: Any = "", comparable: bool = True) -> None:
        key = next((row for row in theirs if comparable and row.lower() == name.strip().lower()), None)
        used.add(key)
        figures = [f"{value:.2f}" for value in theirs[key]] if key else [""] * len(PAPER_COLUMNS)
        rows.append([name, *figures, *(cell(scores.get(arm)) for arm in arms), str(n)])

    for name, row in found["rows"].items():
        note = f" ({row['note']})" if row["note"] else ""
        prompt = f", {row['prompt']}" if row["prompt"] else ""
        add(f"{name}, {row['metric']}{prompt}{note}", row["arms"], row["n"], not row["extra"])
        for category, scores in row["groups"].items():
            add(category, scores, comparable=not row["extra"])
    if found["mean"]:
        own = {row["in_place_of"]: row["note"] for row in found["rows"].values() if not row["extra"]}
        # The paper's mean is over all of its benchmarks, each in full.
        whole = set(paper.get("benchmarks", ())) <= own.keys() and not any(own.values())
        add(MEAN if whole else "mean of those above", found["mean"])
    for key in theirs:
        if key not in used:
            add(key, {})
    lines = markdown.table(rows)
    if extra := [name for name, row in found["rows"].items() if row["extra"]]:
        lines += ["", f"Not among the paper's benchmarks, and in no mean: {', '.join(extra)}."]
    if found["normalised"]:
        scale = (f"{arm} {each['z']:+.2f} / {each['min_max']:.2f}" for arm, each in found["normalised"].items())
        lines += ["", f"Arms on a common scale (z-score / min-max, as in Figure 1): {', '.join(scale)}."]
    if found["absent"]:
        lines += ["", *(f"Absent: {name}: {why}" for name, why in found["absent"].items())]
    return lines


def cell(score: Mapping[str, Any] | None) -> str:
    """A score with its difference to base: `46.10 (+1.20 [-0.30, +2.70], p 0.034)`."""
    if score is None:
        return ""
    value = f"{score['value']:.2f}"
    if "diff" not in score:
        return value
    p = score.get("p_holm")
    p_value = "" if p is None else ", p < 0.001" if p < 0.001 else f", p {p:.3f}"
    return f"{value} ({interval(score, 2)}{p_value})"


def held_out_table(runs: Mapping[str, Any]) -> list[str]:
    """Lines of a table of the losses on held-out texts, all arms by all runs, with the verdict of each run below."""
    absent = [f"Absent: {name}: {run['absent']}" for name, run in runs.items() if "absent" in run]
    runs = {name: run for name, run in runs.items() if "absent" not in run}
    if not runs:
        return absent
    rows = [["arm", *runs]]
    for arm in dict.fromkeys(arm for run in runs.values() for arm in run["arms"]):
        figures = [run["arms"].get(arm) for run in runs.values()]
        rows.append([arm, *("" if f is None else f"{f['nll']:.4f}" if arm == "base" else interval(f) for f in figures)])
    lines = [
        "Loss on held-out texts in nats per token: of base, then of every other arm minus base [95 % over groups of "
        "texts and seeds]; negative is better",
        "",
        *markdown.table(rows),
        "",
    ]
    for name, run in runs.items():
        counts = run["texts"]
        size = f"{counts['texts']} texts of {counts['groups']} groups, {counts['tokens']} tokens"
        said = [*notes(counts), *seed_notes(run["arms"]), verdict(run["arms"]), *bit_notes(counts)]
        lines.append(f"{name}: {size}. {' '.join(said)}")
    return [*lines, *absent, ""]
