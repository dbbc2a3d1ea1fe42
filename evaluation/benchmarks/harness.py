"""The tasks of lm-evaluation-harness: its index, tasks with local or the hub's rows, the metric that is reported."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from core.errors import UserError, first_line
from core.hub import HUB_TIMEOUT_S
from evaluation.benchmarks.local_rows import READERS
from evaluation.benchmarks.local_tasks import TASKS_FILE, LocalTask, local_tasks

log = logging.getLogger(__name__)
# Environment variable of a folder with further tasks in the harness's YAML form (IndoMMLU, for example).
OWN_TASKS = "LM_EVAL_TASKS"
# Tasks of the experiments that have no local reader -> (their folder among the harness's tasks, which saves reading the
# whole index, and the metric that tables report).
HUB_TASKS = {
    "arc_id": ("okapi/arc_multilingual", "acc"),
    "truthfulqa_id_mc1": ("okapi/truthfulqa_multilingual", "acc"),
    "truthfulqa_id_mc2": ("okapi/truthfulqa_multilingual", "acc"),
    "mmlu_prox_lite_th_other": ("mmlu_prox/th", "exact_match,custom-extract"),
    "social_iqa": ("siqa", "acc"),
}
# Keys by which a group, or an entry of its list of tasks, names and sums up tasks without changing them.
GROUP_KEYS = {"task", "group", "group_alias", "aggregate_metric_list", "metadata"}


@functools.cache
def task_manager(folder: str | None = None) -> Any:
    """The harness's index of all tasks, or only of those in one of its folders.

    Reading one folder takes no time; all of the harness's 14,000 task files take ten seconds.
    """
    import lm_eval.tasks  # takes seconds

    if folder is None:
        return lm_eval.tasks.TaskManager(include_path=os.environ.get(OWN_TASKS))
    path = Path(lm_eval.tasks.__file__).parent / folder
    return lm_eval.tasks.TaskManager(include_defaults=False, include_path=str(path))


class _Splits(dict[str, Any]):
    """Splits by name. A missing one has no rows, because the harness also opens splits that it does not use."""

    def __missing__(self, split: str) -> Any:
        return next(iter(self.values())).select(range(0))


def load_local(task: LocalTask, files: Mapping[str, Sequence[Path]]) -> Any:
    """The harness's task with the rows of local files. Raises UserError for files of another layout."""
    from datasets import Dataset  # takes a second

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
    """The smallest index that has a task, group or tag.

    The harness's folder of the task is tried first where it is known, then the user's own tasks (the folder in
    $LM_EVAL_TASKS), then all tasks.

    Raises:
        UserError: none of them has this name.
    """
    expected = local_tasks().get(name)
    known = HUB_TASKS[name][0] if name in HUB_TASKS else expected.folder if expected else None
    for folder in (known, os.environ.get(OWN_TASKS)):
        if folder and name in (found := task_manager(folder)).all_tasks:
            return found
    if name in (found := task_manager()).all_tasks:
        return found
    raise UserError(
        f"{name} is no task of lm-evaluation-harness, nor a group or tag of it (`lm_eval ls tasks` lists them; local "
        f"ones: {TASKS_FILE.name}; tasks of your own: their folder in ${OWN_TASKS}); correct the name"
    )


def members(name: str) -> list[str]:
    """The tasks that a name stands for: those of a group or tag of the harness, otherwise the task itself.

    Raises:
        UserError: the harness does not know the name, or it is a group that changes settings of its tasks.
    """
    if name in local_tasks() or name in HUB_TASKS:
        return [name]
    entry = manager_of(name).task_index[name]
    if entry.kind.name == "TAG":
        return sorted(entry.tags)
    if entry.kind.name != "GROUP":
        return [name]
    changed = set(entry.cfg) - GROUP_KEYS - {"tag", "version"}
    found: list[str] = []
    children = list(entry.cfg["task"])
    while children:
        child = children.pop(0)
        given = {"task": child} if isinstance(child, str) else child
        inner = given.get("task", [])
        if isinstance(inner, str):
            found += members(inner)
        else:  # a group within the group, with a list of tasks of its own
            children = [*inner, *children]
        changed |= set(given) - GROUP_KEYS - {"task_alias"}
    if changed:
        raise UserError(
            f"the group {name} changes settings of its tasks ({', '.join(sorted(changed))}), which is not supported; "
            "give its tasks by name"
        )
    return list(dict.fromkeys(found))


def load_hub(name: str) -> Any | str:
    """The harness's own task with the hub's rows, or one line that says why it cannot be had.

    Raises:
        UserError: the harness does not know the name.
    """
    manager = manager_of(name)
    try:
        with hub_or_cache():
            return manager.load(name)["tasks"][name]
    except Exception as error:  # what a data set's code and the hub may raise is open-ended
        expected = local_tasks().get(name)
        files = f"put {next(iter(expected.files.values()))} below BENCHMARK_DATA, or " if expected else ""
        return f"its data could not be had ({first_line(error)}); {files}run it where the hub can be reached"


@contextlib.contextmanager
def hub_or_cache() -> Iterator[None]:
    """Inside, the libraries read only their cache if the hub cannot be reached, because their own retries take
    minutes."""
    import datasets  # these two take a second, which tasks with local files need not wait for
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
    """Whether anything at this address answers within `HUB_TIMEOUT_S`, name look-up included; asked once per
    process."""
    answered = threading.Event()

    def ask() -> None:
        with contextlib.suppress(OSError, ValueError):
            with contextlib.suppress(urllib.error.HTTPError):  # a refusal is an answer
                urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=HUB_TIMEOUT_S).close()
            answered.set()

    # In a thread of its own, because a name look-up knows no time limit.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(HUB_TIMEOUT_S)
    if not answered.is_set():
        log.warning("%s does not answer within %d s; only what is cached can be used", address, HUB_TIMEOUT_S)
    return answered.is_set()


def reported_metric(name: str, metrics: Sequence[str]) -> tuple[str, str]:
    """(the metric of a task that tables report, a note for the reader).

    The metric is declared in local_tasks.yaml or `HUB_TASKS`. A task that an experiment names beyond those declares
    none. Of its metrics `acc` is then reported, as in the paper's tables, and the note says so.

    Raises:
        UserError: the task does not have the declared metric, or has several metrics without `acc` and declares none.
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
