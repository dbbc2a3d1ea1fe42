"""What ran: models, data, settings, versions, time and memory, warnings and commands. All of it from files."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from core.runs.command_line import RESOLVED, RUN_FILE
from core.runs.licences import licence_text
from core.runs.settings import all_settings
from core.runs.usage import read_usage
from evaluation.pages.paths import place_of, without_paths
from evaluation.pages.run_files import RunFiles, own_config

Table = list[list[str]]
# The flag that an argument may begin with, and the folders of a path.
_FLAG, _PATH = re.compile(r"--[\w-]+="), re.compile(r"^~?/.*/")


def models_table(files: RunFiles) -> Table:
    """The two models with their revisions and licences."""
    rows = [["role", "model", "revision", "licence"]]
    for role, model in files.models.items():
        revision = model.get("revision") or "not recorded"
        rows.append([role, model["name"], without_paths(revision), licence_text(model["licence"])])
    return rows


def data_table(files: RunFiles) -> Table:
    """The texts that each stage read."""
    rows = [["read by", "data", "rows", "split seed", "SHA-256"]]
    read: dict[str, Mapping[str, Any]] = {}
    if files.plans is not None:
        read["calibration"] = files.plans.manifest.inputs["data"]
        read["calibration, general"] = read["calibration"].get("general", {})
    if files.trainings:
        read["fine-tuning"] = next(iter(files.trainings.values())).record["data"]
    if files.results is not None:
        inputs = files.results["inputs"]
        read |= {"held out": inputs["data"], "general": inputs["general"]}
    for part, data in read.items():
        if data:
            name = Path(data["file"]).name if data["file"] else data["subset"]
            rows.append([part, name, str(data["rows"]), str(data["split_seed"]), data["sha256"][:12]])
    return rows


def settings_table(files: RunFiles) -> Table:
    """The settings that differ from the defaults, as the stages resolved them. Where stages had another value of the
    same setting, that of the earliest stage is shown."""
    used: dict[str, Any] = {}
    folders = [files.plans.folder] if files.plans else []
    folders += [files.folder / "fused", *(found.folder for found in files.trainings.values())]
    folders += [files.folder] if files.results else []
    for folder in folders:
        path = folder / RESOLVED
        if path.is_file():
            used = {**yaml.safe_load(path.read_text("utf-8")), **used}
    rows = [["setting", "value", "default"]]
    for name, setting in all_settings().items():
        if name in used and name not in ("name", "seed", "training_scenario"):
            value, default = (shown(one) for one in (used[name], setting.default))
            if value != default:
                rows.append([name, without_paths(value), default])
    return rows


def shown(value: Any) -> str:
    """A setting as it is shown; lists, as YAML reads them, like the tuples of the defaults, and nothing for None."""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)


def versions(files: RunFiles) -> str:
    """The libraries and the commit of this code with which the last finished stage ran."""
    manifests = [*files.trainings.values(), *([files.fused] if files.fused else [])]
    manifests += [files.plans.manifest] if files.plans else []
    records = [files.results] if files.results else [manifest.record for manifest in manifests]
    record = next((one for one in records if "versions" in one), None)
    if record is None:
        return "not recorded"
    libraries = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return f"{libraries}; commit {record['commit'] or 'not recorded'}"


def usage_table(usage: Sequence[Mapping[str, Any]], run: Path) -> Table:
    """What every command took; several starts of one command are one line."""
    rows = [["command", "starts", "time, all starts", "peak memory", "last outcome"]]
    by_command: dict[str, list[Mapping[str, Any]]] = {}
    for line in usage:
        by_command.setdefault(command_of(line, run), []).append(line)
    for command, lines in by_command.items():
        seconds = sum(line["seconds"] for line in lines)
        memory = max(line["peak_memory_bytes"] for line in lines) / 2**30
        outcome = without_paths(lines[-1]["outcome"])
        rows.append([command, str(len(lines)), duration(seconds), f"{memory:.2f} GiB", outcome])
    return rows


def command_of(line: Mapping[str, Any], run: Path) -> str:
    """A command as it can be typed again in the repository, without the folders of this machine."""
    script, *arguments = line["command"]
    parts = Path(script).parts
    # core/... and evaluation/... keep their folder, run_activs_and_hot.py has none.
    start = max((number for number, part in enumerate(parts) if part in ("core", "evaluation")), default=-1)
    name = shlex.quote("/".join(parts[start:]))
    return " ".join(["python", name, *(shown_argument(argument, run) for argument in arguments)])


def shown_argument(argument: str, run: Path) -> str:
    """An argument of a command, quoted for the shell.

    A path in the repository or in the folder of results is shown from there, any other path by its last part. The
    experiment file that scripts/run_train_final.sh hands to the stages is gone after it; the run has a copy.
    """
    found = _FLAG.match(argument)
    flag = found[0] if found else ""
    path = argument.removeprefix(flag)
    place = place_of(Path(path)) if path.startswith("/") else None
    if place is None and Path(path).name == RUN_FILE and (run / RUN_FILE).is_file():
        place = own_config(run)
    # A whole argument may be a path with spaces.
    return flag + (place or shlex.quote(without_paths(_PATH.sub("", path))))


def duration(seconds: float) -> str:
    """`42 s` or `12 min 3 s`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def warnings_of(usage: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the commands warned of, each warning once."""
    return list(dict.fromkeys(without_paths(text) for line in usage for text in line["warnings"]))


def facts(files: RunFiles) -> dict[str, Any]:
    """Everything above, as the template takes it."""
    usage = read_usage(files.folder)
    return {
        "tables": [
            (title, rows)
            for title, rows in (
                ("Models", models_table(files)),
                ("Data", data_table(files)),
                ("Settings that differ from the defaults", settings_table(files)),
                ("Commands, time and memory", usage_table(usage, files.folder)),
            )
            if len(rows) > 1
        ],
        "versions": versions(files),
        "warnings": warnings_of(usage),
    }
