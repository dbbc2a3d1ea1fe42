#!/usr/bin/env python
"""Resolve what scripts/run_train_final.sh was asked for: experiment files, variables and flags -> one YAML per run.

A flag can also be given by the variable of its name: `TARGET_MODEL=X` means `--target-model X`. A flag wins over a
variable, and a variable wins over the experiment file. The variables are: {variables}.

Relative paths are meant from the folder in which the script is started. A run is named after its experiment, and after
what was asked to differ from it: malay, malay-alpha0.3, malay-regression, or malay-TARGET-from-SOURCE for another pair,
so that a second pair never empties the folder of the first one. Runs of one pair that differ in strength or feature map
use the same plans; only the regression map has plans of its own, because it is fitted on token rows.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import yaml

from core.errors import UserError
from core.files import write_text
from core.fusion.feature_maps import FEATURE_MAPS
from core.runs.command_line import EXPERIMENTS, RUN_FILE, Parser, add_settings, load_experiment
from core.runs.process import run_command
from core.runs.settings import Experiment, all_settings

TASKS = ("medical", "thai", "finance", "cantonese", "indonesian", "malay")
STEPS = ("plans", "fuse", "train", "eval", "general")
# The folders that the authors' script reads from variables, and one for tasks of one's own.
FOLDERS = {
    "workspace_root": "where the folders below are looked for (default: the repository)",
    "models_root": "where models are looked for before the hub (default WORKSPACE_ROOT/models)",
    "transport_results_root": "where runs and tables are written (default WORKSPACE_ROOT/runs)",
    "lm_eval_repo": "clone of lm-evaluation-harness (default WORKSPACE_ROOT/lm-evaluation-harness, else the package)",
    "malay_repo": "clone of MalayMMLU (default WORKSPACE_ROOT/MalayMMLU)",
    "yue_benchmark_root": "clone of Yue-Benchmark (default WORKSPACE_ROOT/Yue-Benchmark)",
    "lm_eval_tasks": "folder with tasks of your own for lm-evaluation-harness",
}
# The flags that can also be given by variables. MAX_SAMPLES means calibration texts here, as it does in the authors'
# script; in the stages' own commands --max-samples is an older name of --max-rows-read.
VARIABLES = (
    *("tasks", "steps", "seeds", "num_gpus", "dry_run", "data_dir", *FOLDERS),
    *("target_model", "source_model", "feature_map", "alpha", "max_samples", "max_tokens", "sft_samples"),
    *("held_out_samples", "limit", "prompt", "benchmark_data"),
)
# Settings that the script decides itself: it trains with and without the residual, and never distils.
SET_BY_SCRIPT = ("training_scenario", "distill_weight", "distill_temperature")
# What VARIANT chose in earlier versions, and the script that runs it now.
VARIANTS = {"source_size": "scripts/table7.sh", "source_family": "scripts/figure4.sh", "alpha": "scripts/figure5.sh"}
PATHS = ("data_dir", *FOLDERS, "data_file", "general_file", "benchmark_data")
# What comes with a map that is fitted on rows, where an experiment has another one: token rows, all neurons, and the
# strength that was best where we measured it.
FITTED_MAPS = {"pooling": "token", "top_k": 0, "alpha": 0.1, "train_alpha": 0.1}

# What the script itself reads of what is asked for; the rest are settings of its stages.
RECIPE_DEFAULTS: dict[str, Any] = {
    "tasks": TASKS,
    "steps": STEPS[:-1],
    "seeds": None,
    "num_gpus": 0,
    "data_dir": None,
    "dry_run": False,
    "quick": False,
}


def main(argv: list[str]) -> None:
    parser = make_parser()
    given = read_flags(parser, argv, os.environ)
    started_in, work = given.pop("started_in"), given.pop("work_dir")
    make_absolute(given, started_in)
    recipe = {name: given.pop(name, default) for name, default in RECIPE_DEFAULTS.items()}
    folders = script_folders({name: given.pop(name, None) for name in FOLDERS})
    if recipe["num_gpus"]:
        given.setdefault("device", "cuda")
    results = Path(folders["TRANSPORT_RESULTS_ROOT"])
    recipe["seeds"] = recipe["seeds"] or (str(given.get("seed", 0)),)
    runs = [resolve_task(task, given, recipe["data_dir"], recipe["quick"]) for task in recipe["tasks"]]
    for run in runs:  # all of them before the first file is written
        check(run, results, recipe["dry_run"])
    configs = [(work if recipe["dry_run"] else results) / run["name"] / RUN_FILE for run in runs]
    for config, run in zip(configs, runs, strict=True):
        config.parent.mkdir(parents=True, exist_ok=True)
        write_text(config, as_yaml(run))
    write_text(work / "settings.sh", shell_settings(recipe, configs, folders))


def make_parser() -> Parser:
    """The flags of the script: its own, and the settings of all stages but those that it sets itself."""
    parser = Parser((__doc__ or "").format(variables=" ".join(name.upper() for name in VARIABLES)))
    parser.prog, parser.formatter_class = "run_train_final.sh", argparse.RawDescriptionHelpFormatter
    parser.add_argument("--started-in", type=Path, required=True, help=argparse.SUPPRESS)
    parser.add_argument("--work-dir", type=Path, required=True, help=argparse.SUPPRESS)
    own = parser.add_argument_group("The script", "what is run, and where things are")
    experiments = sorted(path.stem for path in EXPERIMENTS.glob("*.yaml"))
    texts = {
        "tasks": f"experiments, as in TASKS='malay thai', of {' '.join(experiments)} (default {' '.join(TASKS)})",
        "steps": "what is done: plans, fuse, train, eval, and general for the paper's Figure 6 (default all but that)",
        "seeds": "trainings to average, as in SEEDS='0 1 2' (default 0)",
        "num_gpus": "read and train on so many GPUs (default 0: on the CPU)",
        "data_dir": "folder with your own texts of each task: TASK.jsonl, or a folder TASK",
    }
    own.add_argument("--tasks", type=words(experiments), metavar="NAMES", help=texts["tasks"])
    own.add_argument("--steps", type=words(STEPS), metavar="NAMES", help=texts["steps"])
    own.add_argument("--seeds", type=words(None), metavar="NUMBERS", help=texts["seeds"])
    own.add_argument("--num-gpus", type=count, metavar="INT", help=texts["num_gpus"])
    own.add_argument("--data-dir", type=Path, metavar="FOLDER", help=texts["data_dir"])
    switch: dict[str, Any] = {"action": argparse.BooleanOptionalAction, "default": None}
    own.add_argument("--dry-run", **switch, help="say what would be read, made and written, and what is missing")
    own.add_argument("--quick", **switch, help="apply the `quick:` section of the experiment files")
    for name, text in FOLDERS.items():
        own.add_argument(f"--{name.replace('_', '-')}", type=Path, metavar="FOLDER", help=text)
    settings = [setting for name, setting in all_settings().items() if setting.stages and name not in SET_BY_SCRIPT]
    add_settings(parser, settings, {"max_samples": "calibration_samples"})
    return parser


def words(known: Sequence[str] | None) -> Callable[[str], tuple[str, ...]]:
    """A reader of words with blanks between them, each of which has to be `known`; None: each has to be a number."""

    def read(text: str) -> tuple[str, ...]:
        found = tuple(text.split())
        for word in found:
            if known is None and not word.isdecimal():
                raise argparse.ArgumentTypeError(f"{word!r}; expected whole numbers")
            if known is not None and word not in known:
                raise argparse.ArgumentTypeError(f"{word!r}; expected one of: {' '.join(known)}")
        return found

    return read


def count(text: str) -> int:
    """A number of things, 0 or more."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}; expected a whole number")
    return int(text)


def read_flags(parser: Parser, argv: Sequence[str], environment: Mapping[str, str]) -> dict[str, Any]:
    """What the variables and the flags say, by the names of the flags; what neither says is left out.

    Raises:
        UserError: a value that its flag does not take, which names the variable where it comes from one.
    """
    given = parser.parse(argv)
    required = [f"--{name.replace('_', '-')}={given[name]}" for name in ("started_in", "work_dir")]
    found: dict[str, Any] = {}
    for flag in VARIABLES:
        name, value = flag.upper(), environment.get(flag.upper(), "")
        if not value or (flag, value) == ("dry_run", "0"):
            continue
        try:
            said = parser.parse([*required, f"--{flag}" if flag == "dry_run" else f"--{flag}={value}"])
        except UserError as error:
            raise UserError(f"{name}={value}: {error}") from None
        found |= {key: value for key, value in said.items() if value is not None}
    if variant := environment.get("VARIANT"):
        scripts = VARIANTS.get(variant) or "one of " + ", ".join(f"{s} ({name})" for name, s in VARIANTS.items())
        raise UserError(f"VARIANT={variant}: each variant is a script of its own; unset VARIANT and run {scripts}")
    return found | {key: value for key, value in given.items() if value is not None}


def make_absolute(given: dict[str, Any], started_in: Path) -> None:
    """Make relative paths absolute. A model that is no path there is the name of one."""
    for name in PATHS:
        if name in given:
            given[name] = str(started_in / given[name])
    for name in ("target_model", "source_model"):
        if name in given and (started_in / given[name]).exists():
            given[name] = str(started_in / given[name])


def script_folders(given: Mapping[str, str | None]) -> dict[str, str]:
    """The variables by which commands find models, results and benchmarks.

    Raises:
        UserError: a clone of lm-evaluation-harness was given and is none.
    """
    workspace = Path(given["workspace_root"] or EXPERIMENTS.parents[1])
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
    fitted = other_map and not FEATURE_MAPS[asked["feature_map"]].reads_feature_plans
    own = file | (FITTED_MAPS if fitted else {})
    before, after = Experiment.of(**own), Experiment.of(**own | asked)
    pair = base = f"{task}-quick" if quick else task
    if pair_of(after) != pair_of(before):
        pair += f"-{Path(after.models.target_model).name}-from-{Path(after.models.source_model).name}"
    same_target = pair_of(after)[:2] == pair_of(before)[:2]
    strength = f"-alpha{after.fusion.alpha:g}" if after.fusion.alpha != before.fusion.alpha else ""
    names = {
        "name": pair + strength + (f"-{after.fusion.feature_map}" if other_map else ""),
        "task": task,
        "plans_from": f"{pair}-{after.fusion.feature_map}" if fitted else pair,
        "base_from": base if same_target else pair,
    }
    return names | {key: value for key, value in (own | asked).items() if key not in names}


def strengths(given: Mapping[str, Any]) -> dict[str, Any]:
    """The strength in training that goes with what is asked for: the one of fusion, or none where several are tried."""
    if "alpha_search" in given:
        return {"train_alpha": None}
    return {"train_alpha": given["alpha"]} if "alpha" in given else {}


def pair_of(experiment: Experiment) -> tuple[Any, ...]:
    """What says which two models a run is of."""
    models = experiment.models
    return models.target_model, models.target_revision, models.source_model, models.source_revision


def check(run: Mapping[str, Any], results: Path, dry_run: bool) -> None:
    """Refuse (UserError) settings that no stage would take, and a folder that holds a run of another pair.

    A dry run may be made on a machine without the device of the run.
    """
    experiment = Experiment.of(**run)
    (experiment.changed(device="cpu") if dry_run else experiment).check()
    earlier = results / experiment.name / RUN_FILE
    if earlier.is_file():
        before = Experiment.of(**load_experiment(earlier))
        if pair_of(before) != pair_of(experiment):
            raise UserError(
                f"{earlier.parent} is a run of {before.models.target_model} and {before.models.source_model}, and "
                f"would be emptied for {experiment.models.target_model} and {experiment.models.source_model}; rename "
                "it, or give another folder for results (TRANSPORT_RESULTS_ROOT)"
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
        "DRY_RUN": ("--dry-run", "--device", "cpu") if recipe["dry_run"] else (),
    }
    lines = [f"{name}=({shlex.join(words)})" for name, words in lists.items()]
    return "\n".join([*lines, *(f"export {name}={shlex.quote(value)}" for name, value in folders.items()), ""])


if __name__ == "__main__":
    run_command(main)
