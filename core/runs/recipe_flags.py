"""What scripts/run_train_final.sh can be asked for: its flags, and the variables that say the same."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from core.errors import UserError
from core.runs.command_line import EXPERIMENTS, Parser, add_settings
from core.runs.settings import all_settings

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
# The flags that can also be given by variables. In this script MAX_SAMPLES and --max-samples mean calibration texts; in
# the stages' own commands --max-samples is an older name of --max-rows-read.
VARIABLES = (
    *("tasks", "steps", "seeds", "num_gpus", "dry_run", "data_dir", *FOLDERS),
    *("target_model", "source_model", "feature_map", "alpha", "max_samples", "max_tokens", "sft_samples"),
    *("held_out_samples", "limit", "prompt", "benchmark_data"),
)
# Settings that the script decides itself. It trains with and without the residual, and never distils. It pushes nothing
# to the hub, because all tasks and seeds would go to one repository.
SET_BY_SCRIPT = ("training_scenario", "distill_by", "distill_weight", "distill_temperature", "push_to_hub")
# What run_train_final.sh hands to a script of its own before it comes here.
VARIANTS = ("source_size", "source_family", "alpha")


def make_parser(description: str) -> Parser:
    """The flags of the script: its own, and the settings of all stages but those that it sets itself."""
    parser = Parser(description.format(variables=" ".join(name.upper() for name in VARIABLES)))
    parser.prog, parser.formatter_class = "run_train_final.sh", argparse.RawDescriptionHelpFormatter
    parser.add_argument("--started-in", type=Path, required=True, help=argparse.SUPPRESS)
    parser.add_argument("--work-dir", type=Path, required=True, help=argparse.SUPPRESS)
    own = parser.add_argument_group("The script", "what is run, and where things are")
    experiments = sorted(path.stem for path in EXPERIMENTS.glob("*.yaml"))
    texts = {
        "tasks": f"files of scripts/experiments/, as in TASKS='malay thai' (default {' '.join(TASKS)})",
        "steps": "what is done: plans, fuse, train, eval, and general for the paper's Figure 6 (default all but that)",
        "seeds": "trainings to average, as in SEEDS='0 1 2' (default: the seed of the run)",
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
        if not found:
            raise argparse.ArgumentTypeError("it is empty")
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
        if flag == "dry_run" and value not in ("", "0", "1"):
            raise UserError(f"{name}={value}: expected 0 or 1")
        if not value or (flag, value) == ("dry_run", "0"):
            continue
        try:
            said = parser.parse([*required, f"--{flag}" if flag == "dry_run" else f"--{flag}={value}"])
        except UserError as error:
            raise UserError(f"{name}={value}: {error}") from None
        found |= {key: value for key, value in said.items() if value is not None}
    if variant := environment.get("VARIANT"):
        raise UserError(f"VARIANT={variant}: expected one of: {' '.join(VARIANTS)}")
    return found | {key: value for key, value in given.items() if value is not None}
