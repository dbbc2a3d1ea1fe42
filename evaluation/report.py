#!/usr/bin/env python
"""Show what a run found on one page, RUN/report.html; of a folder with several runs, a page that lists them as well.

In place of RUN it takes the experiment of the run. The other flags of evaluation/compare_arms.py are accepted as well,
so that a script can call both in one way; they change nothing here.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from core.errors import UserError
from core.locks import hold, outputs_held
from core.runs.command_line import Parser, flag, load_experiment
from core.runs.process import end_of_stage, run_command, setup_logging
from core.runs.settings import Experiment, all_settings


@outputs_held()
def main(argv: list[str]) -> None:
    setup_logging()
    given = command_line().parse(argv)
    folder = run_folder(given)
    if given["dry_run"]:
        waiting = "" if folder.is_dir() else f"{folder} does not exist yet; once the stages have run, "
        print(f"{waiting}would write {folder / 'report.html'}")
        return
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist; give the folder of a run, such as runs/demo")
    # Drawing takes a second to import, which --help need not wait for.
    from evaluation.pages.index_page import runs_in, write_index
    from evaluation.pages.report_page import write_report
    from evaluation.pages.run_files import is_run

    hold(folder, wait=True)
    write = write_report if is_run(folder) or not runs_in(folder) else write_index
    page = write(folder)
    print(f"report: {page}")
    end_of_stage(f"{page} is written")


def command_line() -> Parser:
    """The flags that name a run, and those of stage 4, which `--help` leaves out because they change nothing here."""
    parser = Parser(__doc__ or "")
    parser.add_argument("run", type=Path, nargs="?", help="folder of a run, such as runs/demo, or one that holds runs")
    parser.add_argument("--config", type=Path, help="experiment file, whose run is shown")
    parser.add_argument("--quick", action="store_true", help="show the run of its `quick:` section")
    parser.add_argument("--run-dir", type=Path, help="folder of the run, as evaluation/compare_arms.py takes it")
    parser.add_argument("--dry-run", action="store_true", help="say which page would be written, and stop")
    parser.add_argument("--hot-dir", help=argparse.SUPPRESS)
    for setting in (one for one in all_settings().values() if "e" in one.stages):
        names = [flag(name) for name in (setting.name, setting.alias) if name]
        kind = {"action": argparse.BooleanOptionalAction} if setting.kind is bool else {}
        parser.add_argument(*names, help=argparse.SUPPRESS, **kind)
    return parser


def run_folder(given: Mapping[str, Any]) -> Path:
    """The folder that the command line names. Raises UserError where it names none, or two."""
    named = [folder for folder in (given["run"], given["run_dir"]) if folder is not None]
    if len(named) > 1 or (given["run"] and given["config"]):
        raise UserError("more than one run is given; give RUN, or --config FILE.yaml, or --run-dir")
    if given["quick"] and given["config"] is None:
        raise UserError("--quick needs --config")
    if named:
        return named[0]
    if given["config"] is None:
        raise UserError("no run is given; give its folder, such as runs/demo, or --config FILE.yaml")
    return Experiment.of(**load_experiment(given["config"], given["quick"])).run_dir


if __name__ == "__main__":
    run_command(main)
