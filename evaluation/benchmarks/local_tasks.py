"""The harness's tasks whose rows can be read from local files, as local_tasks.yaml lists them."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from core.errors import UserError

TASKS_FILE = Path(__file__).parent / "local_tasks.yaml"


@dataclass(frozen=True)
class LocalTask:
    """One task of local_tasks.yaml, which explains each of these keys (`name` is `task` there)."""

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
        """Role -> its files; None when the data folder does not have this benchmark.

        Raises:
            UserError: the first role has files, but another one has none.
        """
        found = {role: sorted(data_dir.glob(pattern)) for role, pattern in self.files.items()}
        first = next(iter(found.values()))
        if not first:
            return None
        for role, paths in found.items():
            if not paths:
                raise UserError(
                    f"{data_dir / self.files[role]} is missing, which {self.name} needs besides "
                    f"{', '.join(path.name for path in first)}"
                )
        return found


@functools.cache
def local_tasks() -> dict[str, LocalTask]:
    """Name -> task, for every task of local_tasks.yaml."""
    entries = yaml.safe_load(TASKS_FILE.read_text(encoding="utf-8"))
    return {task.name: task for entry in entries for task in _tasks_of(entry)}


def _tasks_of(entry: Mapping[str, Any]) -> Iterator[LocalTask]:
    """The tasks of one entry: one for each combination of the values in its lists `over`."""
    lists = entry.get("over", {})
    for values in itertools.product(*lists.values()):
        given = dict(zip(lists, values, strict=True))
        yield LocalTask(
            name=entry["task"].format(**given),
            include=entry.get("include", entry["task"]).format(**given),
            folder=entry["folder"].format(**given),
            rows=entry["rows"],
            metric=entry["metric"],
            files={role: pattern.format(**given) for role, pattern in entry["files"].items()},
            config=entry.get("config", {}),
            group=entry.get("group"),
            note=entry.get("note", "").format(**given),
        )


def local_files(name: str, data_dir: Path | None) -> dict[str, list[Path]] | None:
    """Role -> the files of a task in the data folder; None where the folder does not have them.

    Raises:
        UserError: the folder has only some of the task's files.
    """
    task = local_tasks().get(name)
    return task.find(data_dir) if task and data_dir else None


def why_not_in_hub(name: str, data_dir: Path | None) -> str | None:
    """Why a task without local files cannot be had from the hub either: the harness has no task of this name.

    None for the harness's own tasks, whose rows the hub may have.
    """
    task = local_tasks().get(name)
    if task is None or task.include == task.name:
        return None
    searched = "BENCHMARK_DATA is not set" if data_dir is None else f"{data_dir} does not have it"
    pattern = next(iter(task.files.values()))
    return f"the harness has no such task and {searched}; put {pattern} below BENCHMARK_DATA"
