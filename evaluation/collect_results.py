"""All runs -> one table per task in the layout of the paper's Tables 1-6, beside the paper's figures."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import yaml

from core.command import Parser
from core.experiment import results_root
from core.runs import (
    MANIFEST,
    UserError,
    check_format,
    digest_of,
    hold,
    outputs_held,
    read_json,
    run_command,
    setup_logging,
    write_json,
    write_text,
)
from evaluation.significance import normalised, paired
from evaluation.tasks import EXPERIMENTS, TASK_FILE, TRAINED

log = logging.getLogger("collect")
PAPER = Path(__file__).with_name("paper_results.json")
PAPER_COLUMNS = ("base", "fused", "fused + adapted")
# In the order of the columns; `no_hot` and `distill` are controls that the paper's tables do not have.
ARMS = ("base", "fused", "no_hot", "distill", "fused_adapted")


@outputs_held()
def main(argv: list[str]) -> None:
    setup_logging()
    parser = Parser(__doc__ or "")
    parser.add_argument("--results-dir", type=Path, default=results_root(),
                        help="holds the runs (default $TRANSPORT_RESULTS_ROOT, or runs)")  # fmt: skip
    parser.add_argument("--tasks", nargs="+", help="print only these (default: every task that has a run)")
    parser.add_argument("--output-dir", type=Path, help="default RESULTS_DIR/tables")
    given = parser.parse(argv)
    results, wanted = given["results_dir"], given["tasks"]
    runs = find_runs(results)
    shown = [task for task in wanted or runs if task in runs]
    if lost := [task for task in wanted or () if task not in runs]:  # a task that failed hides no other's table
        log.warning("%s has no run of %s", results, ", ".join(lost))
    if not shown:
        raise UserError(f"{results} has no run of {', '.join(lost)}; run scripts/run_train_final.sh")
    folder = given["output_dir"] or results / "tables"
    hold(folder, wait=True)
    told = {}
    for task, names in runs.items():  # all, whichever are asked for: all.md holds no section of an earlier state
        collected = collect(task, {name: results / name for name in names}, results / task)
        write_json(folder / f"{task}.json", collected)
        told[task] = markdown(collected)
        write_text(folder / f"{task}.md", told[task])
    write_text(folder / "all.md", "\n".join(told.values()))
    print("\n".join(told[task] for task in shown))


def find_runs(results: Path) -> dict[str, list[str]]:
    """Task -> names of its run folders: `malay`, `malay-regression`, ... Raises UserError when there is none."""
    tasks = [file.stem for file in sorted(EXPERIMENTS.glob("*.yaml"))]
    runs: dict[str, list[str]] = {}
    for place in sorted(results.glob("*/")):
        task = place.name.split("-")[0]
        # A folder without a fused model holds the base's scores for the runs beside it.
        if (place / "fused" / MANIFEST).is_file() and task in tasks:
            runs.setdefault(task, []).append(place.name)
    if not runs:
        raise UserError(f"{results} has no run of any task; run scripts/run_train_final.sh")
    return runs


def collect(task: str, runs: Mapping[str, Path], shared: Path) -> dict[str, Any]:
    """All figures of one task.

    Args:
        runs: name -> folder of each run of the task.
        shared: the run that holds the scores of the base where a run has none of its own.
    Returns:
        {"task", "paper", "runs": {name: {"models", "sets": {set: {"rows", "mean", "normalised", "absent"}},
        "held_out": arms of results.json, or {"absent"}}}}.
    """
    paper = read_json(PAPER)
    found: dict[str, Any] = {"task": task, "paper": paper.get(task.removesuffix("_paper"), {}), "runs": {}}
    for name, place in runs.items():
        run: dict[str, Any] = {"models": models(place), "sets": {}}
        for kind in (task, "general"):
            try:
                arms = {arm: scores for arm in ARMS if (scores := arm_scores(place, shared, kind, arm))}
                check_current(place, arms)
                if set(arms) - {"base"}:
                    run["sets"][kind] = benchmark_rows(arms, paper.get(kind, {}).get("counted_once", []))
            except UserError as error:  # one run that has to be scored again does not hide the others
                log.warning("%s, %s: %s", name, kind, error)
                run["sets"][kind] = {"rows": {}, "mean": {}, "normalised": {}, "absent": {"all": str(error)}}
        path = place / "results.json"
        if path.is_file() and "arms" in (record := read_json(path)):
            try:
                check_held_out(place, record)
                run["held_out"] = {"texts": record["held_out"], "arms": record["arms"]}
            except UserError as error:
                run["held_out"] = {"absent": str(error)}
                log.warning("%s: %s", name, error)
        found["runs"][name] = run
    return found


def check_held_out(place: Path, record: Mapping[str, Any]) -> None:
    """Refuse (UserError) losses on held-out texts that are not of the models that are there now."""
    made_from = record.get("made_from", {})
    trained = {f"{arm}/{path.name}": digest_of(manifest(path)) for arm, folder in TRAINED.items()
               for path in (place / folder).glob("seed*[0-9]") if (path / MANIFEST).is_file()}  # fmt: skip
    fused = manifest(place / "fused").get("fingerprint")
    if (record.get("inputs", {}).get("fused"), {arm: made for arm, made in made_from.items() if "/" in arm}) != (
        fused, trained
    ):  # fmt: skip
        raise UserError(f"{place / 'results.json'} is of earlier models; run evaluation/compare_arms.py again")


def manifest(folder: Path) -> dict[str, Any]:
    """The manifest of what is in a folder of ours now; empty where there is nothing. Raises UserError for another
    format."""
    path = folder / MANIFEST
    if not path.is_file():
        return {}
    record = read_json(path)
    check_format(folder, record)
    return record


def models(place: Path) -> dict[str, Any]:
    """Target, source, feature map and alpha of a run."""
    path = place / "fused" / "resolved.yaml"
    used = yaml.safe_load(path.read_text("utf-8")) if path.is_file() else {}
    return {key: used.get(key) for key in ("target_model", "source_model", "feature_map", "alpha", "top_k")}


def arm_scores(place: Path, shared: Path, kind: str, arm: str) -> dict[str, Any]:
    """Benchmark -> {"metric", "ids", "items" (mean over trainings), "groups", "note"}, or {"absent"}; {}: not run.

    Trainings of several seeds are averaged item by item; all of them have to be there.
    """
    folder = place / "benchmarks" / kind / arm
    if arm == "base" and not folder.is_dir():
        folder = shared / "benchmarks" / kind / arm
    files = sorted(folder.glob(f"seed*[0-9]/{TASK_FILE}" if arm in TRAINED else TASK_FILE))
    out: dict[str, Any] = {}
    for file in files:
        record = read_json(file)
        for name, result in record["benchmarks"].items():
            if "absent" in result:
                out[name] = result
                continue
            if "absent" in out.get(name, {}):  # for another seed: a mean over some of them is none
                continue
            score = read_json(file.parent / result["file"])
            metric = next(iter(score["metrics"]))
            note = "; ".join(part for part in (
                f"in place of {result['stands_in_for']}" if "stands_in_for" in result else "",
                f"first {record['limit']} items of each file" if record["limit"] else "") if part)  # fmt: skip
            one = out.setdefault(name, {"metric": metric, "ids": score["items"]["ids"], "runs": [], "note": note,
                                        "groups": score["groups"], "n": score["metrics"][metric]["n"],
                                        "model": score["inputs"]["model"], "made": {},
                                        "inputs": comparable(score["inputs"])})  # fmt: skip
            if (one["ids"], one["inputs"]) != (score["items"]["ids"], comparable(score["inputs"])):
                raise UserError(f"{file.parent / result['file']} has other items than another seed's; run it again")
            one["made"][file.parent.name] = score["inputs"]["model"].get("made")
            one["runs"].append(score["items"][metric])
            one.setdefault("by_group", []).append({g: v[metric]["value"] for g, v in score["groups"].items()})
    return out


def check_current(place: Path, arms: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse (UserError) scores of a base that is not the run's target, or of models that were made anew since."""
    fused = manifest(place / "fused")
    target = fused.get("inputs", {}).get("target", {})
    for arm, scores in arms.items():
        for name, result in scores.items():
            model = result.get("model", {})
            if arm == "base" and any(key in model and key in target and model[key] != target[key]
                                     for key in ("config", "weights", "made")):  # fmt: skip
                raise UserError(f"{name}: the base that was scored is not the target of {place}; run "
                                "evaluation/run_task.py again for the base")  # fmt: skip
            for run, made in result.get("made", {}).items() if arm != "base" else ():
                folder = place / "fused" if arm == "fused" else place / TRAINED[arm] / run
                found = manifest(folder)
                if made != found.get("fingerprint"):
                    raise UserError(f"{name}: {folder} is not the model that was scored, it was made anew since or is "
                                    "gone; run evaluation/run_task.py again for it, or remove its scores")  # fmt: skip
                start = found.get("inputs", {}).get("made_by")  # of a training: the fused checkpoint it began with
                if arm != "fused" and start != fused.get("fingerprint"):
                    raise UserError(f"{name}: {folder} was trained from another fused model ({start}); run stage 3 and "
                                    "evaluation/run_task.py again for it, or remove its scores")  # fmt: skip


def comparable(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What two models have to share for their scores to be compared: everything but the model itself."""
    computed = {key: inputs["model"].get(key) for key in ("dtype", "device")}
    return {**{key: value for key, value in inputs.items() if key != "model"}, **computed}


def benchmark_rows(arms: Mapping[str, Mapping[str, Any]], counted_once: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Per benchmark and category the score of every arm (%), its difference to base with interval and p-value; the
    mean over benchmarks, in which those of `counted_once` share one place.

    Raises:
        UserError: arms whose items differ (another limit, another copy of the data).
    """
    base = arms.get("base", {})
    rows: dict[str, dict[str, Any]] = {}
    absent: dict[str, dict[str, str]] = {}
    for name in dict.fromkeys(name for scores in arms.values() for name in scores):
        for arm, scores in arms.items():
            result = scores.get(name, {"absent": "not run"})
            if "absent" in result:
                absent.setdefault(name, {})[arm] = result["absent"]
                continue
            items = np.mean(result["runs"], axis=0)
            row = rows.setdefault(name, {"metric": result["metric"], "n": result["n"], "note": result["note"],
                                         "arms": {}, "groups": {}})  # fmt: skip
            row["arms"][arm] = {"value": 100 * float(items.mean())}
            for group in result["groups"]:
                value = 100 * float(np.mean([each[group] for each in result["by_group"]]))
                row["groups"].setdefault(group, {})[arm] = value
            if arm != "base" and "runs" in base.get(name, {}):
                reference = base[name]
                if (reference["ids"], reference["inputs"]) != (result["ids"], result["inputs"]):
                    raise UserError(f"{name}: {arm} and base were scored on other items or with other settings; run "
                                    "evaluation/run_task.py again for both")  # fmt: skip
                versus = paired(items.tolist(), np.mean(reference["runs"], axis=0).tolist())
                versus |= {key: (100 * np.array(versus[key])).tolist() for key in ("diff", "ci95")}
                row["arms"][arm] |= versus
    reasons: dict[str, str] = {}
    for name, by_arm in absent.items():
        if name in rows:
            reasons |= {f"{name} ({arm})": why for arm, why in by_arm.items()}
        else:
            reasons[name] = next(iter(by_arm.values()))
    complete = [arm for arm in arms if rows and all(arm in row["arms"] for row in rows.values())]
    mean = {arm: mean_score({name: row["arms"][arm]["value"] for name, row in rows.items()}, counted_once)
            for arm in complete}  # fmt: skip
    return {"rows": rows, "mean": mean, "normalised": normalised(mean) if len(mean) > 1 else {}, "absent": reasons}


def mean_score(values: Mapping[str, float], counted_once: Sequence[Sequence[str]]) -> float:
    """Mean over benchmarks; those of one group of `counted_once` are averaged first."""
    together = {name: group[0] for group in counted_once for name in group}
    places: dict[str, list[float]] = {}
    for name, value in values.items():
        places.setdefault(together.get(name, name), []).append(value)
    return float(np.mean([np.mean(found) for found in places.values()]))


def markdown(found: Mapping[str, Any]) -> str:
    """The tables of one task."""
    paper = found["paper"]
    lines = [f"## {found['task']}", ""]
    for name, run in found["runs"].items():
        used = run["models"]
        lines += [f"### {name}", "", f"{used['target_model']} <- {used['source_model']}, {used['feature_map']}, alpha "
                  f"{used['alpha']}, k {used['top_k'] or 'all'}", ""]  # fmt: skip
        for kind, rows in run["sets"].items():
            title = paper.get("title", kind) if kind == found["task"] else "General abilities (Figure 6), accuracy (%)"
            lines += [f"{title}; intervals and p over items; the paper's figures are of its own models", "",
                      *benchmark_table(rows, paper.get("rows", {}) if kind == found["task"] else {}), ""]  # fmt: skip
    lines += held_out_table({name: run["held_out"] for name, run in found["runs"].items() if "held_out" in run})
    return "\n".join(lines) + "\n"


def benchmark_table(found: Mapping[str, Any], paper: Mapping[str, Sequence[float]]) -> list[str]:
    """Rows: benchmarks, their categories, the mean. Columns: the paper's, then ours with differences to base."""
    arms = [arm for arm in ARMS if any(arm in row["arms"] for row in found["rows"].values())]
    columns = ["benchmark", *(f"paper: {column}" for column in PAPER_COLUMNS), *arms, "n"]
    lines = [f"| {' | '.join(columns)} |", "|" + " --- |" * len(columns)]
    used = set()

    def line(name: str, cells: Sequence[str], n: Any) -> None:
        key = next((row for row in paper if row.lower() == name.strip().lower()), None)
        used.add(key)
        theirs = [f"{value:.2f}" for value in paper[key]] if key else [""] * len(PAPER_COLUMNS)
        lines.append("| " + " | ".join([name, *theirs, *cells, str(n)]) + " |")

    for name, row in found["rows"].items():
        note = f" ({row['note']})" if row["note"] else ""
        line(f"{name}, {row['metric']}{note}", [cell(row["arms"].get(arm)) for arm in arms], row["n"])
        for group, values in row["groups"].items():
            line(group, [f"{values[arm]:.2f}" if arm in values else "" for arm in arms], "")
    if found["mean"]:  # the paper's mean is over all benchmarks
        part = found["absent"] or any(row["note"] for row in found["rows"].values())
        label = "mean of those above" if part else "mean"
        line(label, [f"{found['mean'][arm]:.2f}" if arm in found["mean"] else "" for arm in arms], "")
    for key in paper:
        if key not in used:
            line(key, [""] * len(arms), "")
    if found["normalised"]:
        told = ", ".join(f"{arm} {each['z']:+.2f} / {each['min_max']:.2f}" for arm, each in found["normalised"].items())
        lines += ["", f"Arms on a common scale (z-score / min-max, as in Figure 1): {told}."]
    lines += ["", *(f"Absent: {name}: {why}" for name, why in found["absent"].items())] if found["absent"] else []
    return lines


def cell(score: Mapping[str, Any] | None) -> str:
    """`46.10 (+1.20, p 0.034)`."""
    if score is None:
        return ""
    p = "" if "p" not in score else "p < 0.001" if score["p"] < 0.001 else f"p {score['p']:.3f}"
    versus = f" ({score['diff']:+.2f}, {p})" if "diff" in score else ""
    return f"{score['value']:.2f}{versus}"


def held_out_table(runs: Mapping[str, Any]) -> list[str]:
    """Loss on held-out rows, all arms and controls, the runs side by side."""
    told = [f"Absent: {name}: {run['absent']}" for name, run in runs.items() if "absent" in run]
    runs = {name: run for name, run in runs.items() if "absent" not in run}
    if not runs:
        return told
    arms = list(dict.fromkeys(arm for run in runs.values() for arm in run["arms"]))
    lines = ["Loss on held-out texts, nats per token: base, then minus base [95 % over texts]; negative is better", "",
             f"| arm | {' | '.join(runs)} |", "|" + " --- |" * (len(runs) + 1)]  # fmt: skip
    for arm in arms:
        cells = []
        for run in runs.values():
            found = run["arms"].get(arm)
            if found is None:
                cells.append("")
            elif arm == "base":
                cells.append(f"{found['nll']:.4f}")
            else:
                cells.append(f"{found['diff']:+.4f} [{found['ci95'][0]:+.4f}, {found['ci95'][1]:+.4f}]")
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    counts = ", ".join(f"{name} {run['texts']['texts']} texts, {run['texts']['tokens']} tokens"
                       for name, run in runs.items())  # fmt: skip
    return [*lines, "", f"Held out: {counts}.", *told, ""]


if __name__ == "__main__":
    run_command(main)
