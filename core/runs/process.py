"""The process of a command: what it logs and where, its exit code, and its rank among the processes of a launch."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from core.errors import UserError
from core.runs.usage import Usage

LOG_FORMAT = logging.Formatter("%(asctime)s %(message)s")
# The handlers that the current command added to the root logger.
_handlers: list[logging.Handler] = []
# The folder of the log that the current command writes, if it writes one.
_log_folder: list[Path] = []


def run_command(main: Callable[[list[str]], None]) -> None:
    """Run `main(argv)` and turn its errors into one line on stderr and an exit code.

    A UserError gives exit code 2. An error of the operating system (a full disk, a missing permission) or a damaged
    file gives 1. Ctrl-C gives 130.
    """
    usage, outcome = Usage(), "stopped by an error of the program"
    logging.getLogger().addHandler(usage)
    try:
        main(sys.argv[1:])
        outcome = "finished"
    except UserError as error:
        outcome = f"error: {error}"
        print(outcome, file=sys.stderr)
        raise SystemExit(2) from None
    except (OSError, SafetensorError) as error:
        outcome = f"error: {error}"
        print(f"{outcome}; the same command continues from what is finished", file=sys.stderr)
        raise SystemExit(1) from error
    except KeyboardInterrupt:
        outcome = "interrupted"
        print("interrupted; the same command continues from what is finished", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        logging.getLogger().removeHandler(usage)
        if _log_folder:
            usage.write(_log_folder.pop(), outcome)


def setup_logging() -> None:
    """Log messages from INFO on to stderr. An earlier command of the same process no longer logs to its file."""
    root = logging.getLogger()
    _log_folder.clear()
    while _handlers:
        old = _handlers.pop()
        root.removeHandler(old)
        old.close()
    root.setLevel(logging.INFO)
    _add_handler(logging.StreamHandler())
    # These libraries log one INFO line per HTTP request or per file, among which ours would be lost.
    for noisy in ("httpx", "httpcore", "datasets", "accelerate", "filelock", "gguf"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def log_to_file(path: Path | None) -> None:
    """Append the log to `path` as well, from now on, and at the end what the command took to `usage.jsonl` beside it.
    Does nothing when `path` is None.

    Commands call this after they have checked their input, so that bad input leaves no file behind.
    """
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        _add_handler(logging.FileHandler(path, encoding="utf-8"))
        _log_folder[:] = [path.parent]


def _add_handler(handler: logging.Handler) -> None:
    handler.setFormatter(LOG_FORMAT)
    logging.getLogger().addHandler(handler)
    _handlers.append(handler)


def process_state(device: str) -> Any:
    """accelerate's PartialState: the rank of this process among those of `accelerate launch`, and how many they are.

    A process that was started alone has rank 0 of 1. Waiting for the others has no practical time limit, because one
    process can read a model for hours while the others wait.
    """
    from accelerate import PartialState  # imports torch.distributed, which a dry run does not need

    return PartialState(cpu=device == "cpu", timeout=timedelta(days=30))
