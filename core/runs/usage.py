"""`usage.jsonl` of a run: what every command took and what it warned of.

It lies beside the log, in no output folder, so that outputs have the same bytes however long they took.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from core.errors import UserError

USAGE = "usage.jsonl"


class Usage(logging.Handler):
    """The time, memory and warnings of the command of this process, from now on."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.started = time.monotonic()
        self.warnings: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a warning."""
        self.warnings.append(record.getMessage())

    def write(self, folder: Path, outcome: str) -> None:
        """Append one line to the run's file. Of several processes of one launch only the first writes.

        Args:
            folder: of the log.
            outcome: `finished`, or what ended the command.
        """
        if os.environ.get("RANK", "0") != "0":
            return
        largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        record = {
            "command": sys.argv,
            "ended": datetime.now().astimezone().isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - self.started, 1),
            "peak_memory_bytes": largest if sys.platform == "darwin" else 1024 * largest,
            "outcome": outcome,
            "warnings": self.warnings,
        }
        with (folder / USAGE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def read_usage(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's file, from the first command to the last; empty where there is no file.

    Raises:
        UserError: a line is not JSON.
    """
    path = folder / USAGE
    try:
        return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.is_file() else []
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON lines ({error}); remove it") from None
