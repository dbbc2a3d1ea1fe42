"""What every command shares: how it ends, what it logs and where, what is recorded of this code."""

from __future__ import annotations

import importlib.metadata
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from core.errors import UserError


def run_command(main: Callable[[list[str]], None]) -> None:
    """Run `main(argv)` as a process: a UserError becomes one line on stderr and exit code 2, an error of the operating
    system or a damaged file (disk full, no permission) one line and 1, Ctrl-C 130."""
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except (OSError, SafetensorError) as error:
        print(f"error: {error}; the same command continues from what is finished", file=sys.stderr)
        raise SystemExit(1) from error
    except KeyboardInterrupt:
        print("interrupted; the same command continues from what is finished", file=sys.stderr)
        raise SystemExit(130) from None


_handlers: list[logging.Handler] = []
LOG_FORMAT = logging.Formatter("%(asctime)s %(message)s")


def setup_logging() -> None:
    """Log INFO to stderr, and to no file of an earlier command in this process."""
    root = logging.getLogger()
    while _handlers:
        old = _handlers.pop()
        root.removeHandler(old)
        old.close()
    root.setLevel(logging.INFO)
    _add_handler(logging.StreamHandler())
    # The libraries' own INFO lines (one per HTTP request, per checkpoint) drown ours.
    for noisy in ("httpx", "httpcore", "datasets", "accelerate", "filelock", "gguf"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def log_to_file(path: Path | None) -> None:
    """Append the log to `path` as well, from now on (after the input was checked: bad input leaves no file)."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        _add_handler(logging.FileHandler(path, encoding="utf-8"))


def _add_handler(handler: logging.Handler) -> None:
    handler.setFormatter(LOG_FORMAT)
    logging.getLogger().addHandler(handler)
    _handlers.append(handler)


def process_state(device: str) -> Any:
    """This process among those of `accelerate launch` (accelerate's PartialState); alone, process 0 of 1."""
    from accelerate import PartialState

    return PartialState(cpu=device == "cpu", timeout=timedelta(days=30))  # one waits while another reads a model


def provenance() -> dict[str, Any]:
    """Library versions and the commit of this code (None outside git): recorded, not part of any fingerprint."""
    commit = None
    if shutil.which("git"):
        command = ["git", "rev-parse", "HEAD"]
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
        commit = done.stdout.strip() or None
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "safetensors")}
    return {"versions": versions, "commit": commit}
