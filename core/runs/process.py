"""The process of a command: what it logs and where, its exit code, and its rank among the processes of a launch."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from core.errors import UserError
from core.progress import Progress, close_bars, duration
from core.runs.usage import Usage

LOG_FORMAT = "%(asctime)s %(message)s"
# The loggers of commands, and the first part of the names of all loggers of this project.
COMMANDS = ("stage1", "stage2", "stage3", "compare", "run_task", "collect", "yue_mmlu", "agreement")
OURS = ("core", "evaluation", "fetch", "download", *COMMANDS)
# What is in the log file alone, because the screen has it already, as a table or as the last line of a command.
KEPT: dict[str, Any] = {"extra": {"kept": True}}
# The variable by which a script says that it runs one stage after the other.
SCRIPT = "RUN_BY_SCRIPT"
log = logging.getLogger(__name__)
# When the current command began to log, in seconds of `time.monotonic`.
_started = [time.monotonic()]
# The handlers that the current command added to the root logger; the first one is that of the screen.
_handlers: list[logging.Handler] = []
# What a command says before its input is checked, and so before there is a log file. It is never full.
_early: list[MemoryHandler] = []
# The folder of the log that the current command writes, if it writes one.
_log_folder: list[Path] = []


def run_command(main: Callable[[list[str]], None]) -> None:
    """Run `main(argv)` and turn its errors into one line on stderr and an exit code.

    A UserError gives exit code 2. An error of the operating system (a full disk, a missing permission) or a damaged
    file gives 1. Ctrl-C gives 130.
    """
    usage, outcome = Usage(), "stopped by an error of the program"
    usage.addFilter(is_ours)
    logging.getLogger().addHandler(usage)
    try:
        main(sys.argv[1:])
        outcome = "finished"
    except UserError as error:
        outcome = f"error: {error}"
        _last_line(outcome)
        raise SystemExit(2) from None
    except (OSError, SafetensorError) as error:
        outcome = f"error: {error}"
        _last_line(f"{outcome}; the same command continues from what is finished")
        raise SystemExit(1) from error
    except KeyboardInterrupt:
        outcome = "interrupted"
        _last_line("interrupted; the same command continues from what is finished")
        raise SystemExit(130) from None
    finally:
        logging.getLogger().removeHandler(usage)
        unexpected = isinstance(sys.exc_info()[1], Exception)
        log.info("%s after %s", outcome, duration(usage.seconds), exc_info=unexpected, **KEPT)
        if _log_folder:
            usage.write(_log_folder.pop(), outcome)


def _last_line(text: str) -> None:
    """What a command ends with when it fails, in a line of its own."""
    close_bars()
    print(text, file=sys.stderr)


def is_ours(record: logging.LogRecord) -> bool:
    """Whether a message is this project's own, or an error of another library, which nobody should miss."""
    return record.name.partition(".")[0] in OURS or record.levelno >= logging.ERROR


class Screen(logging.StreamHandler):
    """Log messages on stderr, above any progress bar.

    What other libraries warn of is for the log file, and shown with `--verbose` alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.has_bars = self.stream.isatty()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a message is shown."""
        return not hasattr(record, "kept") and (is_ours(record) or self.level <= logging.DEBUG)

    def emit(self, record: logging.LogRecord) -> None:
        """Write a message."""
        if self.has_bars:
            Progress.write(self.format(record), file=self.stream)
        else:
            super().emit(record)


def setup_logging() -> None:
    """Log messages from INFO on to stderr. An earlier command of the same process no longer logs to its file."""
    _log_folder.clear()
    _early.clear()
    _started[:] = [time.monotonic()]
    while _handlers:
        _remove_handler(_handlers[-1])
    # Of other libraries only warnings are worth keeping, such as those of deprecated functions.
    logging.getLogger().setLevel(logging.WARNING)
    logging.captureWarnings(True)
    for name in OURS:
        logging.getLogger(name).setLevel(logging.DEBUG)
    screen = Screen()
    screen.setLevel(logging.INFO)
    _add_handler(screen, "%H:%M:%S")
    Progress.quiet = False
    _early.append(MemoryHandler(sys.maxsize, sys.maxsize, flushOnClose=False))
    _add_handler(_early[0])
    first = {"name": log.name, "levelno": logging.INFO, "msg": f"command: {shlex.join(sys.argv)}"}
    _early[0].handle(logging.makeLogRecord(first))  # for the file alone


def set_verbosity(quiet: bool, verbose: bool) -> None:
    """What the screen shows: with `quiet` no progress and no message that is not a warning, with `verbose` all that the
    log file has."""
    if _handlers:
        _handlers[0].setLevel(logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO)
        Progress.quiet = quiet


def log_to_file(path: Path | None) -> None:
    """Append the log to `path` as well, and at the end what the command took to `usage.jsonl` beside it. Does nothing
    when `path` is None.

    The file has all messages since `setup_logging`, also those that the screen does not show. Commands call this after
    they have checked their input, so that bad input leaves no file behind.
    """
    early = _early.pop() if _early else None
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(path, encoding="utf-8")
        _add_handler(file)
        _log_folder[:] = [path.parent]
        if early is not None:
            early.setTarget(file)
            early.flush()
    if early is not None:
        _remove_handler(early)


def show(table: str) -> None:
    """Print what a command is asked for, and keep it in the log."""
    print(table)
    log.info(table, **KEPT)


def end_of_stage(finished: str, following: str | None = None) -> None:
    """Say what is finished, how long it took, and what to do next.

    Args:
        following: the command line of the next stage, which a script that runs all stages needs not say.
    """
    log.info("%s, after %s", finished, duration(time.monotonic() - _started[0]))
    if following is not None and SCRIPT not in os.environ:
        log.info("next:\n%s", following)


def _add_handler(handler: logging.Handler, times: str | None = None) -> None:
    handler.setFormatter(logging.Formatter(LOG_FORMAT, times))
    logging.getLogger().addHandler(handler)
    _handlers.append(handler)


def _remove_handler(handler: logging.Handler) -> None:
    logging.getLogger().removeHandler(handler)
    _handlers.remove(handler)
    handler.close()


def process_state(device: str) -> Any:
    """accelerate's PartialState: the rank of this process among those of `accelerate launch`, and how many they are.

    A process that was started alone has rank 0 of 1. Waiting for the others has no practical time limit, because one
    process can read a model for hours while the others wait.
    """
    from accelerate import PartialState  # imports torch.distributed, which a dry run does not need

    return PartialState(cpu=device == "cpu", timeout=timedelta(days=30))
