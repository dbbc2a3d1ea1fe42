"""Command lines of the stages: an experiment file, its keys as flags, the folders."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml

from core.errors import UserError
from core.files import write_text
from core.options import numbers
from core.runs.settings import Experiment, all_settings


def load_experiment(path: Path, quick: bool = False) -> dict[str, Any]:
    """Read the keys of an experiment YAML; `quick` applies its `quick:` section (same run on less data).

    Raises UserError for a missing file, an unknown key (with the known ones) or a value of the wrong type.
    """
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
    less = keys.pop("quick", None) or {}
    if not isinstance(less, dict):
        raise UserError(f"{path}: `quick:` must hold `key: value` lines of its own")
    if quick:
        if not less:
            raise UserError(f"{path} has no `quick:` section")
        keys = {**keys, **less, "name": f"{keys.get('name', path.stem)}-quick"}
    keys.setdefault("name", path.stem)
    known = all_settings() | {setting.alias: setting for setting in all_settings().values() if setting.alias}
    for key in (*keys, *less):
        if key not in known:
            raise UserError(f"{path}: unknown key {key!r}; known keys: {', '.join(all_settings())}")
    read = {}
    for key, value in keys.items():
        try:
            read[known[key].name] = known[key].read(value)
        except ValueError as error:
            raise UserError(f"{path}: {key} is {value!r}; {error}") from None
    return read


class Parser(argparse.ArgumentParser):
    """Flags with dashes or underscores, and a `--no-` form of every one that takes no value; a bad one is a
    UserError."""

    def __init__(self, description: str):
        super().__init__(description=description, allow_abbrev=False)

    def add_argument(self, *flags: str, **options: Any) -> argparse.Action:
        """As in argparse, but every switch gets a `--no-` form, which turns off what the experiment file turns on."""
        if options.get("action") == "store_true":
            options = {"default": False, **options, "action": argparse.BooleanOptionalAction}
        return super().add_argument(*flags, **options)

    def parse(self, argv: Sequence[str]) -> dict[str, Any]:
        """Flag (with underscores) -> value."""
        return vars(self.parse_args([_flag_of(token) for token in argv]))

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


@dataclass(frozen=True)
class Command:
    """A parsed command line: the experiment, the folders given as flags (None where not given), and the modes."""

    experiment: Experiment
    paths: dict[str, Path | None]
    from_config: bool
    modes: frozenset[str] = frozenset()

    def log_file(self, name: str, default: str) -> Path | None:
        """Log beside the results: in X, where the output `path(name, default)` is X/<default>, else in the run
        directory. Commands without --config log to the screen only."""
        if not self.from_config:
            return None
        folder, depth = self.path(name, default), len(Path(default).parts)
        run = [folder, *folder.parents][depth] if depth < len(folder.parts) else Path()
        beside = run.name and run / default == folder
        return (run if beside else self.experiment.run_dir) / "log.txt"

    def path(self, name: str, default: str) -> Path:
        """A folder given by flag, else its place in the run directory."""
        given = self.paths[name]
        if given is not None:
            return given
        if not self.from_config:
            raise UserError(f"--{name} is missing (or give --config FILE.yaml)")
        return self.experiment.run_dir / default


def parse_command(
    argv: Sequence[str],
    stage: str,
    description: str,
    paths: dict[str, str],
    aliases: dict[str, str] | None = None,
    modes: dict[str, str] | None = None,
) -> Command:
    """Parse a stage's command line: its experiment keys as flags, `--config`, `--quick` and its folders.

    Dashes and underscores are interchangeable in every flag; flags override the YAML.

    Args:
        stage: `1`, `2`, `3` or `e`.
        paths: folder flag -> help.
        aliases: extra flag -> experiment key (the seed README's spellings).
        modes: flag -> help, of switches that make the command do something else with the same settings.
    Raises:
        UserError: unknown flag or key, wrong type, value out of range.
    """
    parser = Parser(description)
    parser.add_argument("--config", type=Path, help="experiment file; flags override it")
    parser.add_argument("--quick", action="store_true", help="apply the experiment's `quick:` section")
    for name, text in paths.items():
        parser.add_argument(_flag(name), dest=name, type=Path, help=text)
    for name, text in (modes or {}).items():
        parser.add_argument(_flag(name), dest=name, action="store_true", help=text)
    add_settings(parser, stage, aliases or {})
    given = parser.parse(argv)
    config, quick = given.pop("config"), given.pop("quick")
    folders = {name: given.pop(name) for name in paths}
    chosen = {name for name in modes or {} if given.pop(name)}
    if quick and config is None:
        raise UserError("--quick needs --config")
    keys = load_experiment(config, quick) if config else {}
    keys |= {key: value for key, value in given.items() if value is not None}
    experiment = Experiment.of(**keys)
    experiment.check()
    return Command(experiment, folders, config is not None, frozenset(chosen))


def add_settings(parser: Parser, stage: str, aliases: Mapping[str, str]) -> None:
    """Give a parser the settings of a stage as flags, in the groups of the experiment; None where one is not given.

    Args:
        aliases: extra flag -> setting.
    """
    groups: dict[str, Any] = {}
    for setting in all_settings().values():
        if stage not in setting.stages:
            continue
        if setting.group not in groups:
            group = getattr(Experiment(), setting.group)
            groups[setting.group] = parser.add_argument_group(group.__doc__)
        names = [setting.name, *(alias for alias, name in aliases.items() if name == setting.name)]
        names += [setting.alias] if setting.alias else []
        choices = f" {{{','.join(setting.choices)}}}" if setting.choices else ""
        shown = setting.default not in (None, "", ()) and "default" not in setting.help + choices
        text = setting.help + choices + (f" (default {setting.default})" if shown else "")
        options: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
        if setting.kind is tuple:
            options = {"type": numbers, "metavar": "FLOAT,FLOAT"}
        elif setting.kind is not bool:
            options = {"type": setting.kind, "choices": setting.choices, "metavar": setting.kind.__name__.upper()}
        flags = map(_flag, names)
        groups[setting.group].add_argument(
            *flags, dest=setting.name, default=None, help=text.replace("%", "%%"), **options
        )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _flag_of(token: str) -> str:
    if not token.startswith("--"):
        return token
    flag, equals, value = token.partition("=")
    return flag.replace("_", "-") + equals + value


def save_resolved(experiment: Experiment, stage: str, folder: Path) -> None:
    """Write the settings a stage really used beside its output."""
    used = {name: experiment.value(setting) for name, setting in all_settings().items() if stage in setting.stages}
    write_text(folder / "resolved.yaml", yaml.safe_dump({"name": experiment.name, **used}, sort_keys=False))
