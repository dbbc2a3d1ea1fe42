"""All runs -> one table per task in the layout of the paper's Tables 1-6, beside the paper's figures."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import yaml

from core.errors import UserError
from core.files import MANIFEST, digest_of, read_json, write_json, write_text
from core.locks import hold, outputs_held
from core.manifest import FORMAT_VERSION, check_format
from core.runs.command_line import RUN_FILE, Parser, load_experiment
from core.runs.process import run_command, setup_logging
from core.runs.settings import results_root
from evaluation.benchmarks.registry import EXPERIMENTS, TASK_FILE, TRAINED
from evaluation.scores import read_score
from evaluation.tables import ARMS, benchmark_rows, markdown

log = logging.getLogger("collect")
PAPER = Path(__file__).with_name("paper_results.json")


@outputs_held()
def main(argv: list[str]) -> None:
    setup_logging()
    parser = Parser(__doc__ or "")
    parser.add_argument(
        "--results-dir",
        type=Path,
        default=results_root(),
        help="holds the runs (default $TRANSPORT_RESULTS_ROOT, or runs)",
    )
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
        collected = collect(task, {name: results / name for name in names})
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
        # A run is named like its task, or with a dash and more behind it; the name of a task may have dashes itself.
        task = max((task for task in tasks if f"{place.name}-".startswith(f"{task}-")), key=len, default=None)
        # A folder without a fused model holds the base's scores for the runs beside it.
        if (place / "fused" / MANIFEST).is_file() and task is not None:
            runs.setdefault(task, []).append(place.name)
    if not runs:
        raise UserError(f"{results} has no run of any task; run scripts/run_train_final.sh")
    return runs


def base_run(place: Path, task: str) -> Path:
    """The run that holds the base's scores where `place` has none of its own: the one that its experiment file names,
    else that of the experiment's own pair."""
    path = place / RUN_FILE
    settings = load_experiment(path) if path.is_file() else {}
    return place.with_name(settings.get("base_from") or task)


def collect(task: str, runs: Mapping[str, Path]) -> dict[str, Any]:
    """All figures of one task.

    Args:
        runs: name -> folder of each run of the task.
    Returns:
        {"task", "paper", "runs": {name: {"models", "sets": {set: {"rows", "mean", "normalised", "absent"}},
        "held_out": arms of results.json, or {"absent"}}}}.
    """
    paper = read_json(PAPER)
    found: dict[str, Any] = {"task": task, "paper": paper.get(task.removesuffix("_paper"), {}), "runs": {}}
    for name, place in runs.items():
        run: dict[str, Any] = {"sets": {}}
        try:
            run["models"] = models(place)
        except UserError as error:  # an older run does not hide the others
            log.warning("%s: %s", name, error)
            run |= {"models": None, "held_out": {"absent": str(error)}}
            found["runs"][name] = run
            continue
        for kind in (task, "general"):
            try:
                arms = {arm: scores for arm in ARMS if (scores := arm_scores(place, base_run(place, task), kind, arm))}
                check_current(place, arms)
                if set(arms) - {"base"}:
                    run["sets"][kind] = benchmark_rows(arms, paper.get(kind.removesuffix("_paper"), {}))
            except UserError as error:  # one run that has to be scored again does not hide the others
                log.warning("%s, %s: %s", name, kind, error)
                run["sets"][kind] = {"rows": {}, "mean": {}, "normalised": {}, "absent": {"all": str(error)}}
        path = place / "results.json"
        if path.is_file():
            try:
                record = read_json(path)
                check_held_out(place, record)
                run["held_out"] = {"texts": record["held_out"], "arms": record["arms"]}
            except UserError as error:
                run["held_out"] = {"absent": str(error)}
                log.warning("%s: %s", name, error)
        found["runs"][name] = run
    return found


def check_held_out(place: Path, record: Mapping[str, Any]) -> None:
    """Refuse (UserError) losses on held-out texts that are of an earlier version, or not of the models that are there
    now."""
    if record.get("format") != FORMAT_VERSION:
        raise UserError(f"{place / 'results.json'} is of an earlier version; run evaluation/compare_arms.py again")
    if "arms" not in record:
        raise UserError(f"{place / 'results.json'} is not finished; run evaluation/compare_arms.py again to finish it")
    made_from = record.get("made_from", {})
    trained = {
        f"{arm}/{path.name}": digest_of(manifest(path))
        for arm, folder in TRAINED.items()
        for path in (place / folder).glob("seed*[0-9]")
        if (path / MANIFEST).is_file()
    }
    fused = manifest(place / "fused").get("fingerprint")
    if (record.get("inputs", {}).get("fused"), {arm: made for arm, made in made_from.items() if "/" in arm}) != (
        fused,
        trained,
    ):
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
    """Target, source, feature map and alpha of a run; `train_alpha`: the strengths of its trainings with a residual."""
    path = place / "fused" / "resolved.yaml"
    used = yaml.safe_load(path.read_text("utf-8")) if path.is_file() else {}
    trainings = sorted((place / TRAINED["fused_adapted"]).glob(f"seed*[0-9]/{MANIFEST}"))
    chosen = {manifest(path.parent).get("chosen", {}).get("alpha") for path in trainings} - {None}
    named = {key: used.get(key) for key in ("target_model", "source_model", "feature_map", "alpha", "top_k")}
    return {**named, "train_alpha": sorted(chosen)}


def arm_scores(place: Path, shared: Path, kind: str, arm: str) -> dict[str, Any]:
    """Benchmark -> {"metric", "ids", "runs": scores of every item, one list per seed, "categories" of the items, "n",
    "note", "prompt", "in_place_of", and what is needed to see that two arms can be compared}, or {"absent"}.

    Of several seeds all have to be there, those of the trainings in the run's folder: a mean over some of them would
    stand beside one over all. Empty where the arm was not run.
    """
    folder = place / "benchmarks" / kind / arm
    if arm == "base" and not folder.is_dir():
        folder = shared / "benchmarks" / kind / arm
    files = sorted(folder.glob(f"seed*[0-9]/{TASK_FILE}" if arm in TRAINED else TASK_FILE))
    records = {file: read_json(file) for file in files}
    trainings = {path.parent.name for path in (place / TRAINED.get(arm, "")).glob(f"seed*[0-9]/{MANIFEST}")}
    unscored = sorted(trainings - {file.parent.name for file in files}) if arm in TRAINED else []
    out: dict[str, Any] = {}
    for name in dict.fromkeys(name for record in records.values() for name in record["benchmarks"]):
        lacking = [
            *unscored,
            *(file.parent.name for file, record in records.items() if name not in record["benchmarks"]),
        ]
        if lacking:
            out[name] = {"absent": f"not run for {', '.join(lacking)}"}
    for file, record in records.items():
        for name, result in record["benchmarks"].items():
            if "absent" in result:
                out[name] = result
            if "absent" in out.get(name, {}):  # for this seed, or another one
                continue
            score = read_score(file.parent / result["file"])
            metric = score["metric"]
            note = "; ".join(
                part
                for part in (
                    f"in place of {result['stands_in_for']}" if "stands_in_for" in result else "",
                    f"first {record['limit']} items of each file" if record["limit"] else "",
                    score["details"].get("metric_note"),
                )
                if part
            )
            one = out.setdefault(
                name,
                {
                    "metric": metric,
                    "ids": score["items"]["ids"],
                    "runs": [],
                    "note": note,
                    "prompt": score["details"].get("prompt_policy"),
                    "in_place_of": result.get("stands_in_for", name),
                    "categories": score["item_groups"],
                    "n": score["metrics"][metric]["n"],
                    "model": score["inputs"]["model"],
                    "made": {},
                    "inputs": comparable(score["inputs"]),
                },
            )
            if (one["ids"], one["inputs"]) != (score["items"]["ids"], comparable(score["inputs"])):
                raise UserError(f"{file.parent / result['file']} has other items than another seed's; run it again")
            one["made"][file.parent.name] = score["inputs"]["model"].get("made")
            one["runs"].append(score["items"][metric])
    return out


def check_current(place: Path, arms: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse (UserError) scores of a base that is not the run's target, or of models that were made anew since."""
    fused = manifest(place / "fused")
    target = fused.get("inputs", {}).get("target", {})
    for arm, scores in arms.items():
        for name, result in scores.items():
            model = result.get("model", {})
            if arm == "base" and any(
                key in model and key in target and model[key] != target[key] for key in ("config", "weights", "made")
            ):
                raise UserError(
                    f"{name}: the base that was scored is not the target of {place}; run "
                    "evaluation/run_task.py again for the base"
                )
            for run, made in result.get("made", {}).items() if arm != "base" else ():
                folder = place / "fused" if arm == "fused" else place / TRAINED[arm] / run
                found = manifest(folder)
                if made != found.get("fingerprint"):
                    raise UserError(
                        f"{name}: {folder} is not the model that was scored, it was made anew since or is "
                        "gone; run evaluation/run_task.py again for it, or remove its scores"
                    )
                start = found.get("inputs", {}).get("made_by")  # of a training: the fused checkpoint it began with
                if arm != "fused" and start != fused.get("fingerprint"):
                    raise UserError(
                        f"{name}: {folder} was trained from another fused model ({start}); run stage 3 and "
                        "evaluation/run_task.py again for it, or remove its scores"
                    )


def comparable(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What two models have to share for their scores to be compared: everything but the model itself."""
    computed = {key: inputs["model"].get(key) for key in ("dtype", "device")}
    return {**{key: value for key, value in inputs.items() if key != "model"}, **computed}


if __name__ == "__main__":
    run_command(main)
