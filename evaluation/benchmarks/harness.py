"""lm-evaluation-harness in this process: its tasks (on local rows or the hub's), a model behind it, scores of items."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import inspect
import itertools
import logging
import os
import re
import shutil
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from core.errors import UserError, first_line
from core.files import digest_of
from core.hub import HUB_TIMEOUT_S
from evaluation.benchmarks.local_rows import READERS

log = logging.getLogger(__name__)

# Variable of a folder with tasks in the harness's YAML form that the harness does not have (IndoMMLU is one).
OWN_TASKS = "LM_EVAL_TASKS"
TASKS_FILE = Path(__file__).parent / "local_tasks.yaml"


@dataclass(frozen=True)
class LocalTask:
    """One task of tasks.yaml; its keys are explained there."""

    name: str
    include: str
    folder: str
    rows: str
    metric: str
    files: Mapping[str, str]
    config: Mapping[str, Any]
    group: str | None
    note: str

    def find(self, data_dir: Path) -> dict[str, list[Path]] | None:
        """Role -> files; None when the data folder does not have this benchmark.

        Raises:
            UserError: a file that goes with the first one is missing.
        """
        found = {role: sorted(data_dir.glob(pattern)) for role, pattern in self.files.items()}
        if not next(iter(found.values())):
            return None
        for role, paths in found.items():
            if not paths:
                raise UserError(
                    f"{data_dir / self.files[role]} is missing, which {self.name} needs beside "
                    f"{', '.join(path.name for path in next(iter(found.values())))}"
                )
        return found


@functools.cache
def local_tasks() -> dict[str, LocalTask]:
    """Name -> task, of all in tasks.yaml."""
    found = {}
    for entry in yaml.safe_load(TASKS_FILE.read_text(encoding="utf-8")):
        lists = entry.get("over", {})
        for values in itertools.product(*lists.values()):
            given = dict(zip(lists, values, strict=True))

            def fill(text: str, given: Mapping[str, str] = given) -> str:
                for key, value in given.items():
                    text = text.replace("{" + key + "}", value)
                return text

            name = fill(entry["task"])
            found[name] = LocalTask(
                name,
                fill(entry.get("include", entry["task"])),
                fill(entry["folder"]),
                entry["rows"],
                entry["metric"],
                {role: fill(pattern) for role, pattern in entry["files"].items()},
                entry.get("config", {}),
                entry.get("group"),
                fill(entry.get("note", "")),
            )
    return found


# Tasks of the experiments that have no local reader -> the harness's folder of each (its index need not be read), and
# the metric that tables report.
HUB_TASKS = {
    "arc_id": ("okapi/arc_multilingual", "acc"),
    "truthfulqa_id_mc1": ("okapi/truthfulqa_multilingual", "acc"),
    "truthfulqa_id_mc2": ("okapi/truthfulqa_multilingual", "acc"),
    "mmlu_prox_lite_th_other": ("mmlu_prox/th", "exact_match,custom-extract"),
    "social_iqa": ("siqa", "acc"),
}


@functools.cache
def harness_version() -> str:
    """Version of the harness that is imported; in a checkout (LM_EVAL_REPO) its commit and a digest of what was
    changed since, as the installed package's number says nothing of it."""
    import lm_eval

    folder = Path(lm_eval.__file__).resolve().parents[1]
    if (folder / ".git").exists() and shutil.which("git"):
        commit, changes = (
            subprocess.run(["git", "-C", str(folder), *command], capture_output=True, text=True).stdout
            for command in (["rev-parse", "HEAD"], ["diff", "HEAD"])
        )
        return f"commit {commit.strip()}" + (f", changes {digest_of(changes)}" if changes else "")
    return importlib.metadata.version("lm_eval")


@functools.cache
def task_manager(folder: str | None = None) -> Any:
    """The harness's index of all tasks, or of the tasks in one folder, which is read at once; all of the harness's
    14,000 task files take ten seconds."""
    import lm_eval.tasks

    if folder is None:
        return lm_eval.tasks.TaskManager(include_path=os.environ.get(OWN_TASKS))
    place = Path(lm_eval.tasks.__file__).parent / folder
    return lm_eval.tasks.TaskManager(include_defaults=False, include_path=str(place))


class _Splits(dict[str, Any]):
    """Splits by name. One that is not there has no rows: the harness opens splits that it does not use."""

    def __missing__(self, split: str) -> Any:
        return next(iter(self.values())).select(range(0))


def load_local(task: LocalTask, files: Mapping[str, Sequence[Path]]) -> Any:
    """The harness's task with the rows of local files. Raises UserError for files that are not of their layout."""
    from datasets import Dataset

    splits = _Splits({split: Dataset.from_list(rows) for split, rows in READERS[task.rows](files).items()})
    manager = task_manager(task.folder)
    if task.include not in manager.task_index:
        raise UserError(
            f"this version of lm-evaluation-harness has no task {task.include}; install the version of requirements.txt"
        )
    override = {**task.config, "task": task.include, "custom_dataset": lambda **_: splits}
    built = manager.load({"group": "local", "task": [override]})["tasks"][task.include]
    built.set_config("task", task.name)
    return built


def manager_of(name: str) -> Any:
    """The smallest index that has a task, group or tag: that of the harness's folder where it is known to be, that of
    the user's own tasks (the folder in $LM_EVAL_TASKS), else that of all tasks.

    Raises:
        UserError: nothing has this name.
    """
    expected = local_tasks().get(name)
    folder = HUB_TASKS[name][0] if name in HUB_TASKS else expected.folder if expected else None
    for place in (folder, os.environ.get(OWN_TASKS)):
        if place and name in (found := task_manager(place)).all_tasks:
            return found
    if name in (found := task_manager()).all_tasks:
        return found
    raise UserError(
        f"{name} is no task of lm-evaluation-harness, nor a group or tag of it (`lm_eval ls tasks` lists them; local "
        f"ones: {TASKS_FILE.name}; tasks of your own: their folder in ${OWN_TASKS}); correct the name"
    )


def members(name: str) -> list[str]:
    """The tasks that a name stands for: those of a group or a tag of the harness, else the task itself.

    Raises:
        UserError: a name that the harness does not know, or a group that changes settings of its tasks.
    """
    if name in local_tasks() or name in HUB_TASKS:
        return [name]
    entry = manager_of(name).task_index[name]
    if entry.kind.name == "TAG":
        return sorted(entry.tags)
    if entry.kind.name != "GROUP":
        return [name]
    changed = set(entry.cfg) - {"group", "group_alias", "task", "tag", "aggregate_metric_list", "metadata", "version"}
    found: list[str] = []
    children = list(entry.cfg["task"])
    while children:
        child = children.pop(0)
        given = {"task": child} if isinstance(child, str) else child
        inner = given.get("task", [])
        if isinstance(inner, str):
            found += members(inner)
        else:  # a group within the group, with tasks of its own
            children = [*inner, *children]
        changed |= set(given) - {"task", "task_alias", "group", "group_alias", "aggregate_metric_list", "metadata"}
    if changed:
        raise UserError(
            f"the group {name} changes settings of its tasks ({', '.join(sorted(changed))}), which is not supported; "
            "give its tasks by name"
        )
    return list(dict.fromkeys(found))


def load_hub(name: str) -> Any | str:
    """The harness's own task with the hub's rows, or why it cannot be had, in one line.

    Raises:
        UserError: a name that the harness does not know.
    """
    manager = manager_of(name)
    expected = local_tasks().get(name)
    files = f"put {next(iter(expected.files.values()))} below --data-dir, or " if expected else ""
    try:
        with hub_or_cache():
            return manager.load(name)["tasks"][name]
    except Exception as error:  # what a data set's code and the hub may raise is open-ended
        return f"its data could not be had ({first_line(error)}); {files}run it where the hub can be reached"


@contextlib.contextmanager
def hub_or_cache() -> Iterator[None]:
    """Inside, the libraries read only their cache if the hub cannot be reached: their own retries take minutes."""
    import datasets
    import huggingface_hub.constants as constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    if not any(before) and not reachable(constants.ENDPOINT):
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


@functools.cache
def reachable(address: str) -> bool:
    """Whether anything answers there within `HUB_TIMEOUT_S`, name look-up included; asked once per process."""
    answered = threading.Event()

    def ask() -> None:
        with contextlib.suppress(OSError, ValueError):
            with contextlib.suppress(urllib.error.HTTPError):  # a refusal is an answer
                urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=HUB_TIMEOUT_S).close()
            answered.set()

    asking = threading.Thread(target=ask, daemon=True)  # a look-up of a name knows no time limit
    asking.start()
    asking.join(HUB_TIMEOUT_S)
    if not answered.is_set():
        log.warning("%s does not answer within %d s; only what is cached can be used", address, HUB_TIMEOUT_S)
    return answered.is_set()


def reported_metric(name: str, metrics: Sequence[str]) -> tuple[str, str]:
    """(the metric of a task that tables report, note for the reader): the one declared in tasks.yaml or `HUB_TASKS`.

    A task that the experiment names beyond those declares none: of several metrics `acc` is taken, which is what the
    paper's tables hold; the note says so.

    Raises:
        UserError: the task does not have the metric that is declared, or has several, none declared, and no `acc`.
    """
    local = local_tasks().get(name)
    declared = local.metric if local else HUB_TASKS[name][1] if name in HUB_TASKS else None
    if declared is None:
        if len(metrics) == 1:
            return metrics[0], ""
        if "acc" in metrics:
            return "acc", f"acc of {', '.join(metrics)}: none is declared"
        raise UserError(
            f"{name} has the metrics {', '.join(metrics)}, and none is declared as the one to report; add a row with "
            "its folder and its metric to HUB_TASKS in evaluation/benchmarks/harness.py"
        )
    if declared not in metrics:
        raise UserError(
            f"{name} is to be reported by {declared}, but this version of lm-evaluation-harness gives "
            f"{', '.join(metrics)}; install the version of requirements.txt"
        )
    return declared, ""


def description(task: Any) -> dict[str, Any]:
    """What the task's figures depend on, rows apart: the same in every process and installation."""
    config = task.config.to_dict(keep_callable=True)
    left_out = ("custom_dataset", "metadata", "dataset_path", "dataset_name", "dataset_kwargs")
    return {key: plain(value) for key, value in config.items() if key not in left_out}


def plain(value: Any) -> Any:
    """`value` as JSON can hold it; a function is its source."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, functools.partial):
        return {"function": plain(value.func), "args": plain(value.args), "keywords": plain(value.keywords)}
    if isinstance(value, Callable):  # type: ignore[arg-type]
        with contextlib.suppress(OSError, TypeError):
            return inspect.getsource(value)
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))
