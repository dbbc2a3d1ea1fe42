"""Command lines of the stages: an experiment file, its settings as flags, and the folders of a run."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml

from core.errors import UserError
from core.files import MANIFEST, read_json, write_text
from core.manifest import COMMANDS
from core.options import Setting, numbers
from core.runs.process import set_verbosity
from core.runs.settings import Experiment, all_settings

# What scripts/run_train_final.sh writes into the folder of a run: all that its stages were asked for.
RUN_FILE = "experiment.yaml"
# What a stage writes beside its output: the settings that it really used.
RESOLVED = "resolved.yaml"
# The flags that every command has, and the log file needs neither.
VERBOSITY = {
    "--quiet": "show results, warnings and errors alone",
    "--verbose": "show everything that the log file has as well",
}
REPOSITORY = Path(__file__).resolve().parents[2]
EXPERIMENTS = REPOSITORY / "scripts" / "experiments"
# Settings that are paths, and settings that may be paths.
PATHS, MODELS = ("data_file", "general_file", "benchmark_data"), ("target_model", "source_model", "source_base")


def load_experiment(path: Path, quick: bool = False) -> dict[str, Any]:
    """Read the settings that an experiment file gives, by their names.

    Relative paths in it are meant from the repository.

    Args:
        quick: let the file's `quick:` section replace what it names, for the same run on less data.
    Raises:
        UserError: the file is missing, has an unknown key, or a value has the wrong type.
    """
    keys = _read_yaml(path)
    quick_keys = keys.pop("quick", None) or {}
    if not isinstance(quick_keys, dict):
        raise UserError(f"{path}: `quick:` must hold `key: value` lines of its own")
    if quick:
        if not quick_keys:
            raise UserError(f"{path} has no `quick:` section")
        keys = {**keys, **quick_keys, "name": f"{keys.get('name', path.stem)}-quick"}
    keys.setdefault("name", path.stem)
    known = all_settings() | {setting.alias: setting for setting in all_settings().values() if setting.alias}
    for key in (*keys, *quick_keys):
        if key not in known:
            near = " or ".join(difflib.get_close_matches(str(key), known))
            meant = f"did you mean {near}?" if near else "no key has a name like this;"
            raise UserError(f"{path}: unknown key {key!r}; {meant} docs/stages.md lists all keys")
    settings = {}
    for key, value in keys.items():
        try:
            settings[known[key].name] = known[key].read(value)
        except ValueError as error:
            raise UserError(f"{path}: {key} is {value!r}; {error}") from None
    make_absolute(settings, REPOSITORY)
    return settings


def make_absolute(settings: dict[str, Any], folder: Path) -> None:
    """Make relative paths absolute, which are meant from `folder`. A model that is no path there is the name of one."""
    for name in (*PATHS, *MODELS):
        if settings.get(name) and (name in PATHS or (folder / settings[name]).exists()):
            settings[name] = str(folder / settings[name])


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        keys = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        raise UserError(f"experiment file {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"experiment file {path} cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(keys, dict):
        raise UserError(f"{path} must hold `key: value` lines")
    return keys


class Parser(argparse.ArgumentParser):
    """A parser whose flags may be written with dashes or underscores; a bad command line is a UserError.

    Every command has the flags of what the screen shows. They take effect here, and are no part of what is parsed.

    Attributes:
        verbosity: the one of these flags that was given, if any.
    """

    def __init__(self, description: str):
        super().__init__(description=description, allow_abbrev=False)
        self.verbosity: list[str] = []
        shown = self.add_mutually_exclusive_group()
        for flag, text in VERBOSITY.items():
            shown.add_argument(flag[1:3], flag, action="store_true", help=text)

    def add_argument(self, *flags: str, **options: Any) -> argparse.Action:
        """As in argparse, but every switch also gets a `--no-` form, which turns off what an experiment file turns
        on."""
        if options.get("action") == "store_true":
            options = {"default": False, **options, "action": argparse.BooleanOptionalAction}
        return super().add_argument(*flags, **options)

    def parse(self, argv: Sequence[str]) -> dict[str, Any]:
        """The values of all flags, by their names with underscores."""
        tokens = [_with_dashes(token) for token in argv]
        for before, token in zip(["", *tokens], tokens, strict=False):
            if not token or re.fullmatch("--[a-z-]+=", token, re.IGNORECASE):
                if not token and not before.startswith("-"):
                    self.error(f"the argument after {before} is empty" if before else "the first argument is empty")
                self.error(f"argument {token.rstrip('=') or before}: it is empty")
        found = vars(self.parse_args(tokens))
        if chosen := [flag for flag in VERBOSITY if found.pop(flag.strip("-"))]:
            self.verbosity = chosen
            set_verbosity(*(flag in chosen for flag in VERBOSITY))
        return found

    def parse_with_config(self, argv: Sequence[str]) -> tuple[dict[str, Any], Experiment | None]:
        """The values of all flags, and the experiment of `--config`, whose settings are the defaults of the flags that
        have their names. Raises UserError for a value of the file that its setting may not have."""
        given = self.parse(argv)
        if given["config"] is None:
            return given, None
        experiment = Experiment.of(**load_experiment(given["config"]))
        values = {name: experiment.value(setting) for name, setting in all_settings().items() if name in given}
        for name, value in values.items():
            all_settings()[name].check(value)
        self.set_defaults(**{name: value for name, value in values.items() if value is not None})
        return self.parse(argv), experiment

    def error(self, message: str) -> NoReturn:
        """Raise a UserError in place of argparse's exit."""
        raise UserError(f"{message} (see {self.prog} --help)")


@dataclass(frozen=True)
class Command:
    """A parsed command line of a stage.

    Attributes:
        experiment: its settings, from the experiment file and the flags.
        paths: the folders that were given as flags; None for one that was not.
        modes: the switches that were given, such as `dry_run`.
        file_flags: `--config FILE`, and `--quick` where it was given.
        given: the settings that were given as flags.
    """

    experiment: Experiment
    paths: dict[str, Path | None]
    modes: frozenset[str]
    file_flags: tuple[str, ...]
    given: Mapping[str, Any]

    @property
    def from_config(self) -> bool:
        """Whether there is an experiment file, and so a run folder."""
        return bool(self.file_flags)

    def path(self, name: str, default: str) -> Path:
        """The folder that the flag `name` gives, else `default` in the run folder."""
        given = self.paths[name]
        if given is not None:
            return given
        if not self.from_config:
            raise UserError(f"--{name} is missing (or give --config FILE.yaml)")
        return self.experiment.folder(default)

    def not_ready_yet(self, name: str, default: str, stage: str) -> str | None:
        """What a dry run says while an earlier stage of the run has not finished its folder; None when it has.

        A folder that a flag gives is not waited for: if it is not there, the stage itself says what is wrong.

        Args:
            stage: the earlier stage, as manifests name it.
        """
        if self.paths[name] is not None or not self.from_config:
            return None
        return unfinished(self.path(name, default), stage)

    def log_file(self, name: str, default: str) -> Path | None:
        """The log, which stands beside the results: in X where the output `path(name, default)` is X/<default>, else
        in the run folder. Commands without `--config` log to the screen only."""
        if not self.from_config:
            return None
        folder, depth = self.path(name, default), len(Path(default).parts)
        run = [folder, *folder.parents][depth] if depth < len(folder.parts) else Path()
        is_in_run = run.name and run / default == folder
        return (run if is_in_run else self.experiment.run_dir) / "log.txt"


def unfinished(folder: Path, stage: str) -> str | None:
    """What a dry run says of a folder that an earlier stage has not finished; None when it has."""
    if (folder / MANIFEST).is_file() and read_json(folder / MANIFEST).get("status") == "complete":
        return None
    return f"{folder} is not finished yet; what depends on it can be checked after {COMMANDS[stage]}"


def parse_command(
    argv: Sequence[str],
    stage: str,
    description: str,
    paths: dict[str, str],
    aliases: dict[str, str] | None = None,
    modes: dict[str, str] | None = None,
) -> Command:
    """Parse a stage's command line: `--config`, `--quick`, the stage's settings, its folders and its switches.

    Flags override the experiment file.

    Args:
        stage: `1`, `2`, `3`, or `e` for the comparison on held-out texts.
        paths: folder flag -> help.
        aliases: further flag -> setting (the spellings of the authors' README).
        modes: switch -> help; a switch makes the command do something else with the same settings.
    Raises:
        UserError: unknown flag or key, wrong type, value out of range.
    """
    parser = Parser(description)
    parser.add_argument("--config", type=Path, help="experiment file; flags override it")
    parser.add_argument("--quick", action="store_true", help="apply the `quick:` section of the experiment file")
    for name, text in paths.items():
        parser.add_argument(flag(name), dest=name, type=Path, help=text)
    for name, text in (modes or {}).items():
        parser.add_argument(flag(name), dest=name, action="store_true", help=text)
    add_settings(parser, [s for s in all_settings().values() if stage in s.stages], aliases or {})
    given = parser.parse(argv)
    config, quick = given.pop("config"), given.pop("quick")
    folders = {name: given.pop(name) for name in paths}
    chosen = {name for name in modes or {} if given.pop(name)}
    if quick and config is None:
        raise UserError("--quick needs --config")
    settings = load_experiment(config, quick) if config else {}
    asked = {name: value for name, value in given.items() if value is not None}
    experiment = Experiment.of(**settings | asked)
    experiment.check()
    file_flags = ("--config", str(config), *(["--quick"] if quick else [])) if config else ()
    return Command(experiment, folders, frozenset(chosen), file_flags, asked)


def add_settings(parser: Parser, settings: Sequence[Setting], aliases: Mapping[str, str]) -> None:
    """Give a parser settings as flags, in the groups of the experiment. A flag that is not used has the value None.

    Args:
        aliases: further flag -> setting. One that is also the alias of another setting stands for this one here.
    """
    groups: dict[str, Any] = {}
    for setting in settings:
        if setting.group not in groups:
            groups[setting.group] = parser.add_argument_group(*group_heading(setting.group))
        names = [setting.name, *(alias for alias, name in aliases.items() if name == setting.name)]
        if setting.alias and setting.alias not in aliases:
            names.append(setting.alias)
        options: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
        if setting.kind is tuple:
            options = {"type": numbers, "metavar": "FLOAT,FLOAT"}
        elif setting.kind is not bool:
            options = {"type": setting.kind, "choices": setting.choices, "metavar": setting.kind.__name__.upper()}
        if setting.words:
            options |= {"type": _number_or(setting), "choices": None}
        groups[setting.group].add_argument(
            *map(flag, names), dest=setting.name, default=None, help=_help(setting), **options
        )


def group_heading(group: str) -> tuple[str, str]:
    """The title of a group of settings, and what it is about: its docstring says `Title: what it is about.`"""
    title, _, text = (getattr(Experiment(), group).__doc__ or group).rstrip(".").partition(": ")
    return title[:1].upper() + title[1:], text


def _help(setting: Setting) -> str:
    choices = f" {{{','.join(setting.choices)}}}" if setting.choices else ""
    text = setting.help + choices
    if setting.default not in (None, "", ()) and "default" not in text:
        text += f" (default {setting.default})"
    return text.replace("%", "%%")


def _number_or(setting: Setting) -> Callable[[str], Any]:
    """A reader of a flag that is a number or a word."""

    def read(text: str) -> Any:
        try:
            return setting.read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r}; {error}") from None

    return read


def flag(name: str) -> str:
    """The flag of a setting or a folder."""
    return "--" + name.replace("_", "-")


def _with_dashes(token: str) -> str:
    if not token.startswith("--"):
        return token
    flag, equals, value = token.partition("=")
    return flag.replace("_", "-") + equals + value


def save_resolved(experiment: Experiment, stage: str, folder: Path) -> None:
    """Write the settings that a stage really used beside its output."""
    used = {name: experiment.value(setting) for name, setting in all_settings().items() if stage in setting.stages}
    write_text(folder / RESOLVED, yaml.safe_dump({"name": experiment.name, **used}, sort_keys=False))
