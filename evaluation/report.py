#!/usr/bin/env python
"""Show what a run found on one page, RUN/report.html; of a folder with several runs, a page that lists them as well.

In place of RUN it takes the command line of evaluation/compare_arms.py, of which it reads the run's folder alone.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from core.errors import UserError
from core.locks import hold, outputs_held
from core.runs.command_line import VERBOSITY, Parser, parse_command
from core.runs.process import end_of_stage, run_command, setup_logging

MODES = {"dry_run": "say which page would be written, and stop"}
FOLDERS = {"run_dir": "run directory (default runs/<name>)"}


@outputs_held()
def main(argv: list[str]) -> None:
    setup_logging()
    folder, dry_run = run_folder(argv)
    if dry_run:
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


def run_folder(argv: list[str]) -> tuple[Path, bool]:
    """(the folder that is given, or else the run of the experiment that the flags of stage 4 describe; whether this is
    a dry run)."""
    first = next((word for word in argv if word not in ("-q", "-v", *VERBOSITY)), "")
    if not first.startswith("-"):
        parser = Parser(__doc__ or "")
        parser.add_argument("run", type=Path, help="folder of a run, such as runs/demo, or one that holds runs")
        parser.add_argument("--dry-run", action="store_true", help=MODES["dry_run"])
        given = parser.parse(argv)
        return given["run"], given["dry_run"]
    command = parse_command(argv, "e", __doc__ or "", FOLDERS, modes=MODES)
    return command.path("run_dir", "."), "dry_run" in command.modes


if __name__ == "__main__":
    run_command(main)
