"""Scores of tasks and groups of lm-evaluation-harness, one file each, and what such a score depends on."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import inspect
import logging
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from core.errors import UserError
from core.files import digest_of
from core.progress import Progress
from evaluation.benchmarks.harness import load_hub, load_local, members, reported_metric
from evaluation.benchmarks.harness_model import evaluate, item_scores, language_model, set_shots
from evaluation.benchmarks.local_tasks import local_files, local_tasks, why_not_in_hub
from evaluation.benchmarks.prompts import PLAIN, POLICY_NAMES
from evaluation.evaluated_model import finite_answers
from evaluation.runner import Scoring, data_folder
from evaluation.scores import Score, finished, read_score, write_score

log = logging.getLogger(__name__)
# Settings of a task that name where its rows come from. The rows themselves are part of a score's inputs instead.
OF_ROWS = ("custom_dataset", "metadata", "dataset_path", "dataset_name", "dataset_kwargs")


def score_tasks(
    scoring: Scoring, tasks: Sequence[str], data_dir: Path | None = None, num_fewshot: int | None = None
) -> dict[str, Path | str]:
    """Score each task and write `<output_dir>/<task>.json`; what is finished for the same inputs is not done again.

    Args:
        tasks: tasks, groups or tags of lm-evaluation-harness, or names of local_tasks.yaml. The file of a group has the
            items of all of its tasks, each of which also has a file of its own.
        data_dir: folder of benchmark files; a task that it does not have is read from the hub, or from its cache.
        num_fewshot: solved items before each item; None for the task's own number.
    Returns:
        task -> its file, or one line that says why there is none and what to do.
    Raises:
        UserError: an unknown task, local files that are damaged or incomplete, values out of range. All tasks are
            loaded before the model is.
    """
    if num_fewshot is not None and num_fewshot < 0:
        raise UserError(f"--num-fewshot is {num_fewshot}; expected 0 or more")
    if not tasks:
        raise UserError("no tasks were given; give names with commas between, such as belebele_ind_Latn,xcopa_id")
    data_folder(data_dir)
    # The harness warns of each of its own defaults. What matters (prompts that were cut) is in the score's file.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    members_of = {name: members(name) for name in tasks}
    found: dict[str, Path | str] = {}
    loaded: dict[str, tuple[Any, str]] = {}
    for name in dict.fromkeys(member for names in members_of.values() for member in names):
        task, source = load(name, data_dir)
        reason = task if isinstance(task, str) else too_few_examples(task, num_fewshot)
        if reason is None:
            loaded[name] = task, source
        else:
            log.warning("%s: %s", name, reason)
            found[name] = reason
    for name, (task, source) in Progress(loaded.items(), desc="tasks", unit="tasks"):
        found[name] = score_task(scoring, task, source, num_fewshot)
    for name, names in members_of.items():
        if names != [name]:
            found[name] = score_group(name, {member: found[member] for member in names}, scoring.output_dir)
    return {name: found[name] for name in members_of}


def load(name: str, data_dir: Path | None) -> tuple[Any | str, str]:
    """(the task, or one line that says why it cannot be had; `local` or `hub`, where its rows come from)."""
    if files := local_files(name, data_dir):
        return load_local(local_tasks()[name], files), "local"
    return why_not_in_hub(name, data_dir) or load_hub(name), "hub"


def too_few_examples(task: Any, num_fewshot: int | None) -> str | None:
    """Why a task cannot have so many solved items before each item; None when it can."""
    if not num_fewshot or task.config.num_fewshot == 0:
        return None
    count = len(list(task.fewshot_docs() or []))
    if count >= num_fewshot:
        return None
    return f"there are {count} solved items for --num-fewshot {num_fewshot}; ask for no more than that"


def score_task(scoring: Scoring, task: Any, source: str, num_fewshot: int | None) -> Path | str:
    """Score one task and write its file: its path, or one line that says why its metrics are no scores of items."""
    name, model = task.config.task, scoring.model
    path = scoring.output_dir / f"{name}.json"
    shots = set_shots(task, num_fewshot)
    items = list(task.eval_docs)
    if not items:
        return "it has no items"
    solved = list(task.fewshot_docs() or []) if shots else []
    inputs = {
        "model": model.identity,
        "task": {"name": name, "version": task.VERSION, "config": digest_of(description(task))},
        "data": digest_of(plain([items, solved])),
        "limit": scoring.limit,
        "n_shot": shots,
        "lm_eval": harness_version(),
    }
    if finished(path, inputs):
        return path
    lm = language_model(model.loaded, model.tokenizer, scoring.tokens_per_batch)
    with finite_answers(model, name):
        numbers, metrics, others = item_scores(evaluate(lm, task, num_fewshot, scoring.limit))
    if not metrics:
        return f"its metrics ({', '.join(others) or 'none'}) are no means over items; use the harness's own command"
    metric, metric_note = reported_metric(name, list(metrics))
    known = local_tasks().get(name)
    groups = [str(items[number][known.group]) for number in numbers] if known and known.group in items[0] else []
    details = {
        "task": name,
        "version": task.VERSION,
        "data": source,
        "n_shot": shots,
        "harness": f"lm_eval {harness_version()}",
        "harness_task": known.include if known else name,
        "note": known.note if known and source == "local" else "",
        "other_metrics": others,
        "requests_cut_to_fit": lm.truncated,
        "metric_note": metric_note,
        "prompt_policy": POLICY_NAMES[PLAIN],
    }
    write_score(path, Score(name, [str(number) for number in numbers], metrics, groups, details, metric=metric), inputs)
    return path


def score_group(name: str, parts: Mapping[str, Path | str], output_dir: Path) -> Path | str:
    """Write the score of a group, all items of its tasks with the task as their category.

    The value of a group is a mean over items, so a task counts by its size.

    Args:
        parts: task of the group -> its score file, or why there is none.
    Returns:
        The group's file, or one line that says why there is none.
    """
    if lost := [f"{task}: {reason}" for task, reason in parts.items() if isinstance(reason, str)]:
        return f"{len(lost)} of its {len(parts)} tasks cannot be scored ({lost[0]})"
    scores = {task: read_score(file) for task, file in parts.items() if isinstance(file, Path)}
    reported = {task: score["metric"] for task, score in scores.items()}
    if len(set(reported.values())) > 1:
        listed = ", ".join(f"{task} {metric}" for task, metric in reported.items())
        return f"its tasks are reported by different metrics ({listed}); give its tasks by name"
    first = next(iter(scores.values()))
    shared = [metric for metric in first["metrics"] if all(metric in score["metrics"] for score in scores.values())]
    ids = {task: score["items"]["ids"] for task, score in scores.items()}
    score = Score(
        name,
        [f"{task}/{item}" for task, items in ids.items() for item in items],
        {metric: [value for score in scores.values() for value in score["items"][metric]] for metric in shared},
        [task for task, items in ids.items() for _ in items],
        {
            "prompt_policy": first["details"]["prompt_policy"],
            "metric_note": first["details"]["metric_note"],
            "tasks": {task: score["details"] for task, score in scores.items()},
            "note": f"mean over the items of {len(scores)} tasks",
        },
        metric=first["metric"],
    )
    inputs = {
        "model": first["inputs"]["model"],
        "tasks": {task: {**score["inputs"], "model": None} for task, score in scores.items()},
    }
    path = output_dir / f"{name}.json"
    if not finished(path, inputs):
        write_score(path, score, inputs)
    return path


@functools.cache
def harness_version() -> str:
    """Version of the harness that is imported.

    For a checkout (LM_EVAL_REPO) it is the commit, and a digest of any changes to it, because the version number of the
    installed package says nothing about a checkout.
    """
    import lm_eval  # takes seconds

    folder = Path(lm_eval.__file__).resolve().parents[1]
    if (folder / ".git").exists() and shutil.which("git"):
        commit, changes = (
            subprocess.run(["git", "-C", str(folder), *command], capture_output=True, text=True).stdout
            for command in (["rev-parse", "HEAD"], ["diff", "HEAD"])
        )
        return f"commit {commit.strip()}" + (f", changes {digest_of(changes)}" if changes else "")
    return importlib.metadata.version("lm_eval")


def description(task: Any) -> dict[str, Any]:
    """The task's settings as JSON can hold them, the same in every process and installation."""
    config = task.config.to_dict(keep_callable=True)
    return {key: plain(value) for key, value in config.items() if key not in OF_ROWS}


def plain(value: Any) -> Any:
    """`value` as JSON can hold it, where the source of a function stands for the function."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, functools.partial):
        return {"function": plain(value.func), "args": plain(value.args), "keywords": plain(value.keywords)}
    if callable(value):
        with contextlib.suppress(OSError, TypeError):  # a function without a source
            return inspect.getsource(value)
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))
