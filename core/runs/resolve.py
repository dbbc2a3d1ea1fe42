#!/usr/bin/env python
"""Resolve what scripts/run_train_final.sh was asked for: experiment files, variables and flags -> one YAML per run.

A flag can also be given by the variable of its name: `TARGET_MODEL=X` means `--target-model X`. A flag wins over a
variable, and a variable wins over the experiment file. The variables are: {variables}.

Relative paths are meant from the folder in which the script is started, and those of an experiment file from the
repository. A run is named after its experiment, and after
what was asked to differ from it: malay, malay-alpha0.3, malay-regression, or malay-TARGET-from-SOURCE for another pair,
so that a second pair never empties the folder of the first one; a revision that is not the experiment's own stands
there as well (TARGET-from-SOURCE@REVISION). Runs of one pair that differ in strength or feature map use the same plans;
only the regression map has plans of its own, because it is fitted on token rows.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import yaml

from core.errors import UserError
from core.files import MANIFEST, read_json, write_text
from core.fusion.feature_maps import FEATURE_MAPS
from core.runs.command_line import EXPERIMENTS, REPOSITORY, RESOLVED, RUN_FILE, load_experiment, make_absolute
from core.runs.process import run_command
from core.runs.recipe_flags import FOLDERS, STEPS, TASKS, make_parser, read_flags
from core.runs.settings import Experiment

# A model by its name, and its revision of the hub; None for the newest.
Model = tuple[str, str | None]
# What comes with a feature map that is fitted on rows, where the experiment's own map reads plans instead: token rows,
# all neurons, and the strength that was best where we measured it.
FITTED_MAPS = {"pooling": "token", "top_k": 0, "alpha": 0.1, "train_alpha": 0.1}

# What the script itself reads of what is asked for; the rest are settings of its stages.
RECIPE_DEFAULTS: dict[str, Any] = {
    "tasks": TASKS,
    "steps": STEPS[:-1],
    "seeds": (),
    "num_gpus": 0,
    "data_dir": None,
    "dry_run": False,
    "quick": False,
}


def main(argv: list[str]) -> None:
    """Write one experiment file per run, and `settings.sh` with what the script itself reads."""
    parser = make_parser(__doc__ or "")
    given = read_flags(parser, argv, os.environ)
    started_in, work = given.pop("started_in"), given.pop("work_dir")
    for name in ("data_dir", *FOLDERS):
        if name in given:
            given[name] = str(started_in / given[name])
    make_absolute(given, started_in)
    recipe = {name: given.pop(name, default) for name, default in RECIPE_DEFAULTS.items()}
    recipe["verbosity"] = parser.verbosity
    if recipe["data_dir"] and not Path(recipe["data_dir"]).is_dir():
        raise UserError(f"DATA_DIR={recipe['data_dir']} is no folder; give one that has TASK.jsonl, or a folder TASK")
    folders = script_folders({name: given.pop(name, None) for name in FOLDERS})
    if recipe["num_gpus"]:
        given.setdefault("device", "cuda")
    results = Path(folders["TRANSPORT_RESULTS_ROOT"])
    runs = [resolve_task(task, given, recipe["data_dir"], recipe["quick"]) for task in recipe["tasks"]]
    for run in runs:  # all of them before the first file is written
        check(run, results, Path(folders["MODELS_ROOT"]), recipe)
    # The stages read files of this start alone, so that another start of the same run cannot change what this one does.
    # The file in the run folder is for people: it says what the last start asked for.
    configs = [work / run["name"] / RUN_FILE for run in runs]
    for config, run in zip(configs, runs, strict=True):
        for path in (config,) if recipe["dry_run"] else (config, results / run["name"] / RUN_FILE):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, as_yaml(run))
    write_text(work / "settings.sh", shell_settings(recipe, configs, folders))


def script_folders(given: Mapping[str, str | None]) -> dict[str, str]:
    """The variables by which commands find models, results and benchmarks.

    Raises:
        UserError: a clone of lm-evaluation-harness was given and is none.
    """
    workspace = Path(given["workspace_root"] or REPOSITORY)
    found = {
        "MODELS_ROOT": given["models_root"] or str(workspace / "models"),
        "TRANSPORT_RESULTS_ROOT": given["transport_results_root"] or str(workspace / "runs"),
        "MALAY_REPO": given["malay_repo"] or str(workspace / "MalayMMLU"),
        "YUE_BENCHMARK_ROOT": given["yue_benchmark_root"] or str(workspace / "Yue-Benchmark"),
    }
    if given["lm_eval_tasks"]:
        found["LM_EVAL_TASKS"] = given["lm_eval_tasks"]
    harness = Path(given["lm_eval_repo"] or workspace / "lm-evaluation-harness")
    if given["lm_eval_repo"] and not (harness / "lm_eval").is_dir():
        raise UserError(f"LM_EVAL_REPO={harness} is no clone of lm-evaluation-harness")
    if harness.is_dir():
        found["PYTHONPATH"] = os.pathsep.join(filter(None, (str(harness), os.environ.get("PYTHONPATH"))))
    return found


def resolve_task(task: str, given: Mapping[str, Any], data_dir: str | None, quick: bool) -> dict[str, Any]:
    """The settings of a task's run: those that are not left at their defaults, and the names of its folders.

    Args:
        given: the settings that flags and variables ask for.
        data_dir: a folder with the texts of every task.
    """
    file = load_experiment(EXPERIMENTS / f"{task}.yaml", quick)
    asked = {**strengths(given), **given}
    if data_dir is not None:
        folder, rows = Path(data_dir, task), Path(data_dir, f"{task}.jsonl")
        asked.setdefault("data_file", str(folder if folder.exists() and not rows.exists() else rows))
    file_map = Experiment.of(**file).fusion.feature_map
    other_map = asked.get("feature_map", file_map) != file_map
    fitted_before = not FEATURE_MAPS[file_map].reads_feature_plans
    fitted = other_map and not fitted_before and not FEATURE_MAPS[asked["feature_map"]].reads_feature_plans
    own = file | (FITTED_MAPS if fitted else {})
    before, after = Experiment.of(**own), Experiment.of(**own | asked)
    pair = base = f"{task}-quick" if quick else task
    if pair_of(after) != pair_of(before):
        pair += "-" + "-from-".join(map(model_in_name, pair_of(before), pair_of(after)))
    if after.models.source_base not in (None, before.models.source_base):
        pair += f"-since-{Path(after.models.source_base).name}"
    name = pair + strengths_in_name(before, after) + (f"-{after.fusion.feature_map}" if other_map else "")
    same_target = pair_of(after)[0] == pair_of(before)[0]
    names = {
        "name": name,
        "task": task,
        "plans_from": f"{pair}-{after.fusion.feature_map}" if fitted else pair,
        # Scores of other items or prompts must not take the place of those that other runs of the task share.
        "base_from": name if after.scoring != before.scoring else base if same_target else pair,
    }
    return names | {key: value for key, value in (own | asked).items() if key not in names}


def strengths(given: Mapping[str, Any]) -> dict[str, Any]:
    """The strength in training that goes with what is asked for: the one of fusion, which stage 2 may have to find, or
    none where several are tried."""
    if "alpha_search" in given:
        return {"train_alpha": None}
    alpha = given.get("alpha")
    return {} if alpha is None else {"train_alpha": None if isinstance(alpha, str) else alpha}


def strengths_in_name(before: Experiment, after: Experiment) -> str:
    """What the name of a run says of its strengths; nothing where they are those of the experiment.

    The strength in training is named where it is not that of fusion.
    """

    def both(experiment: Experiment) -> tuple[float | str, tuple[float | str, ...]]:
        training, alpha = experiment.training, experiment.fusion.alpha
        return alpha, training.alpha_search or (alpha if training.train_alpha is None else training.train_alpha,)

    alpha, in_training = both(after)
    if (alpha, in_training) == both(before):
        return ""
    return f"-alpha{alpha}" + ("" if in_training == (alpha,) else f"-train{'+'.join(map(str, in_training))}")


def model_in_name(before: Model, after: Model) -> str:
    """What the name of a run says of one of its models; its revision where that is not the one of the experiment."""
    (_, own_revision), (model, revision) = before, after
    return Path(model).name + ("" if revision == own_revision else "@" + re.sub(r"[^\w.-]", "-", str(revision)))


def pair_of(experiment: Experiment) -> tuple[Model, Model]:
    """The two models that a run is of: the target and the source."""
    models = experiment.models
    return (models.target_model, models.target_revision), (models.source_model, models.source_revision)


def check(run: Mapping[str, Any], results: Path, models_root: Path, recipe: Mapping[str, Any]) -> None:
    """Refuse (UserError) settings that no stage would take, and a start that would empty what another run has made.

    A dry run may be made on a machine without the device of the run.
    """
    experiment = Experiment.of(**run)
    (experiment.changed(device="cpu") if recipe["dry_run"] else experiment).check()
    check_pair(experiment, results, models_root)
    if "plans" in recipe["steps"] and experiment.shared.plans_from != experiment.name:
        check_shared_plans(experiment, results / experiment.shared.plans_from / "plans")


def check_pair(experiment: Experiment, results: Path, models_root: Path) -> None:
    """Refuse (UserError) folders that hold a run or plans of another pair, which would be emptied."""
    found = {}  # folder -> the pair that it is of
    earlier = results / experiment.name / RUN_FILE
    if earlier.is_file():
        found[earlier.parent] = pair_of(Experiment.of(**load_experiment(earlier)))
    plans = results / experiment.shared.plans_from / "plans" / MANIFEST
    if plans.is_file():
        found[plans.parent] = pair_of_plans(plans)

    def place(model: Model) -> tuple[str | Path, str | None]:
        """The folder of a model that is on this machine, whose name may be spelled in several ways, and its name
        elsewhere; and its revision."""
        paths = (Path(model[0]).expanduser(), models_root / model[0])
        return next((path.resolve() for path in paths if path.exists()), model[0]), model[1]

    def words(pair: tuple[Model, Model]) -> str:
        return " and ".join(name if revision is None else f"{name}@{revision}" for name, revision in pair)

    wanted = pair_of(experiment)
    for folder, pair in found.items():
        if [*map(place, pair)] != [*map(place, wanted)]:
            raise UserError(
                f"{folder} is of {words(pair)}, and would be emptied for {words(wanted)}; rename it, or give another "
                "folder for results (TRANSPORT_RESULTS_ROOT)"
            )


def pair_of_plans(manifest: Path) -> tuple[Model, Model]:
    """The two models that plans were made from. Raises UserError for a manifest that does not say so."""
    record = read_json(manifest)
    try:
        target, source = (record["inputs"][role] for role in ("target", "source"))
        return (target["id"], target["revision"]), (source["id"], source["revision"])
    except (KeyError, TypeError):
        raise UserError(f"{manifest} is damaged: it does not name a pair of models; rename {manifest.parent}") from None


def check_shared_plans(experiment: Experiment, plans: Path) -> None:
    """Refuse (UserError) to use the plans of another run with settings by which stage 1 would make them anew."""
    if not (plans / RESOLVED).is_file():
        return
    made_with, wanted = (
        {**vars(e.data), "calibration_samples": e.reading.calibration_samples, **e.deciding("1"), "epsilon": e.epsilon}
        for e in (Experiment.of(**load_experiment(plans / RESOLVED)), experiment)
    )
    differences = [f"{key} {made_with[key]}, not {wanted[key]}" for key in wanted if wanted[key] != made_with[key]]
    if differences:
        raise UserError(
            f"{plans} was made with {'; '.join(differences)}, and would be emptied, though other runs use it; make it "
            f"anew with STEPS=plans and these settings but no other strength or feature map, leave them out, or give "
            "another folder for results (TRANSPORT_RESULTS_ROOT)"
        )


def as_yaml(run: Mapping[str, Any]) -> str:
    """A run as an experiment file, which the commands of all stages take as `--config`."""
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in run.items()}
    heading = f"# Resolved from scripts/experiments/{run['task']}.yaml, variables and flags by core/runs/resolve.py.\n"
    return heading + yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


def shell_settings(recipe: Mapping[str, Any], configs: Sequence[Path], folders: Mapping[str, str]) -> str:
    """What the script itself reads, as lines of bash."""
    tables = ("tables",) if {"eval", "general"} & set(recipe["steps"]) and not recipe["dry_run"] else ()
    several = ("accelerate", "launch", "--num_processes", str(recipe["num_gpus"]))
    lists = {
        "CONFIGS": map(str, configs),
        "TASKS": recipe["tasks"],
        "STEPS": (*recipe["steps"], *tables),
        "SEEDS": recipe["seeds"],
        "LAUNCH": several if recipe["num_gpus"] > 1 else ("python",),
        "VERBOSITY": recipe["verbosity"],
        "DRY_RUN": ("--dry-run", "--device", "cpu") if recipe["dry_run"] else (),
    }
    lines = [f"{name}=({shlex.join(words)})" for name, words in lists.items()]
    return "\n".join([*lines, *(f"export {name}={shlex.quote(value)}" for name, value in folders.items()), ""])


if __name__ == "__main__":
    run_command(main)
