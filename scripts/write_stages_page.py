#!/usr/bin/env python
"""Rewrite the tables of docs/stages.md from the commands and settings that they describe.

python scripts/write_stages_page.py

The prose of the page is written by hand. A table stands between the lines `<!-- table: NAME -->` and
`<!-- end of table -->` and is made here, so that it cannot say anything else than the commands do; a test fails while
the page and the commands differ.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import re
import sys
import textwrap
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from unittest import mock

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from core.files import write_text
from core.options import Setting
from core.runs.command_line import group_heading
from core.runs.settings import all_settings

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "stages.md"
TABLE = re.compile(r"(<!-- table: ([^\n]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
# The commands that take the settings of an experiment -> their letter in a setting's `stages`.
STAGES = {
    "run_activs_and_hot.py": "1",
    "core/generate_hot_residual.py": "2",
    "core/train_hot_residual_sft.py": "3",
    "evaluation/compare_arms.py": "e",
}
# They take the settings of stages for scripts/run_train_final.sh and scripts/run_pipeline.sh.
RESOLVE, OVERVIEW = "core/runs/resolve.py", "core/runs/overview.py"
# Columns of a line of prose; tables are as wide as they need.
WIDTH = 120
SETTINGS, OTHERS = "settings", "other commands"


def main() -> None:
    argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0]).parse_args()
    write_text(PAGE, page())
    print(f"{PAGE.relative_to(ROOT)} is written")


def page() -> str:
    """docs/stages.md with every table made anew.

    Raises:
        KeyError: the page has a table that nothing here makes.
        ValueError: the page lacks one that it should have.
    """
    tables = {path: f"{flags_of(path)}\n\n{groups_of(path)}" for path in STAGES} | {
        SETTINGS: setting_tables(),
        OTHERS: other_commands(),
    }
    text = PAGE.read_text(encoding="utf-8")
    missing = tables.keys() - {name for _, name, _ in TABLE.findall(text)}
    if missing:
        raise ValueError(f"{PAGE.name} has no place for the table of {', '.join(sorted(missing))}")
    return TABLE.sub(lambda found: f"{found[1]}\n{tables[found[2]]}\n\n{found[3]}", text)


@cache
def commands() -> tuple[str, ...]:
    """Every Python file that is a command, by its path from the root; this one, which has no flags, is left out."""
    places = ("core", "evaluation", "scripts")
    paths = [
        ROOT / "run_activs_and_hot.py",
        *(path for place in places for path in sorted((ROOT / place).rglob("*.py"))),
    ]
    runnable = [path for path in paths if path != Path(__file__).resolve() and "__main__" in path.read_text("utf-8")]
    return tuple(path.relative_to(ROOT).as_posix() for path in runnable)


class _AboutToParse(Exception):
    """Ends a command where it would read its command line."""


@cache
def parser_of(command: str) -> argparse.ArgumentParser:
    """The finished parser of a command: it is started, and stopped when it is about to parse."""
    found: list[argparse.ArgumentParser] = []

    def stop(parser: argparse.ArgumentParser, *_: object) -> None:
        found.append(parser)
        raise _AboutToParse

    start = importlib.import_module(command.removesuffix(".py").replace("/", ".")).main
    with mock.patch.object(argparse.ArgumentParser, "parse_args", stop), contextlib.suppress(_AboutToParse):
        start([]) if inspect.signature(start).parameters else start()
    return found[0]


def flags_of(command: str) -> str:
    """The flags of a command but those that all have. Of a stage those that are no settings: its folders, and what else
    it can be asked."""
    left_out = {"help", "quiet", "verbose", *(all_settings() if command in (*STAGES, RESOLVE, OVERVIEW) else ())}
    shown = [action for action in parser_of(command)._actions if action.help != argparse.SUPPRESS]
    actions = [action for action in shown if action.dest not in left_out]
    rows = [
        (flags_text(action.option_strings or [action.dest.upper()]), action.help % vars(action) if action.help else "")
        for action in actions
    ]
    return markdown_table(("flag", "what it does"), rows)


def groups_of(command: str) -> str:
    """Which groups of settings a stage takes, as a sentence with a link to each."""
    taken = {action.dest for action in parser_of(command)._actions}
    groups = dict.fromkeys(setting.group for name, setting in all_settings().items() if name in taken)
    links = [f"[{title_of(group)}](#{title_of(group).lower().replace(' ', '-')})" for group in groups]
    return textwrap.fill(f"Settings of these groups: {', '.join(links)}.", WIDTH, break_on_hyphens=False)


def title_of(group: str) -> str:
    """The heading of a group of settings."""
    return group_heading(group)[0] if group else "The run"


def other_commands() -> str:
    """The flags of all other commands, each below its name; the benches are described in docs/cost.md."""
    parts = []
    for command in commands():
        if command not in STAGES and not command.startswith("scripts/bench/"):
            what = (parser_of(command).description or "").strip().split("\n")[0]
            parts.append(f"### {command}\n\n{what}\n\n{flags_of(command)}")
    return "\n\n".join(parts)


def setting_tables() -> str:
    """One table per group of settings, in the order of the experiment."""
    groups: dict[str, list[Setting]] = {}
    for setting in all_settings().values():
        groups.setdefault(setting.group, []).append(setting)
    parts = []
    for group, settings in groups.items():
        rows = [
            (flag_text(setting), stages_text(setting), values_text(setting), default_text(setting), setting.help)
            for setting in settings
        ]
        head = ("flag", "stages", "values", "default", "what it does")
        parts.append(f"### {title_of(group)}\n\n{markdown_table(head, rows)}")
    return "\n\n".join(parts)


def flag_text(setting: Setting) -> str:
    """The flag, with the second names that some stages give it; of a key without a flag its name in the file."""
    if not setting.stages:
        return f"`{setting.name}:`"
    own = "--" + setting.name.replace("_", "-")
    names = [own]
    for command in STAGES:
        for action in parser_of(command)._actions:
            if action.dest == setting.name:
                names += [name for name in action.option_strings if name not in names]
    return flags_text(names)


def flags_text(names: Iterable[str]) -> str:
    """Flags as code, without the `--no-` forms that every switch has."""
    return ", ".join(f"`{name}`" for name in names if not name.startswith("--no-"))


def stages_text(setting: Setting) -> str:
    """The stages that take a setting, by number; the comparison is the fourth, and benchmarks have a name."""
    numbers = ", ".join(setting.stages.replace("e", "4"))
    return numbers.replace("b", "benchmarks") or "file only"


def values_text(setting: Setting) -> str:
    """What a setting may be."""
    words = ", ".join(f"`{choice}`" for choice in setting.choices or ())
    numbers = "" if setting.range is None else setting.range.expected.removeprefix("expected ")
    if words or numbers:
        return ", or ".join(filter(None, (numbers, words)))
    return {bool: "on or off", str: "text", int: "whole number", float: "number", tuple: "a list"}[setting.kind]


def default_text(setting: Setting) -> str:
    """The default; empty where there is none, or where the description says it."""
    if isinstance(setting.default, bool):
        return "on" if setting.default else "off"
    return "" if setting.default in (None, "", ()) else f"`{setting.default}`"


def markdown_table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A table as Markdown."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(" ".join(cell.replace("|", "\\|").replace("<", "\\<").split()) for cell in line) + " |"
        for line in lines
    )


if __name__ == "__main__":
    main()
