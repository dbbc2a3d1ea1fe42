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

log = logging.getLogger(__name__)
USAGE = "usage.jsonl"


class Usage(logging.Handler):
    """The time, memory and warnings of the command that this process runs, counted from when this object is made."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.started = time.monotonic()
        self.warnings: list[str] = []

    @property
    def seconds(self) -> float:
        """How long the command has run."""
        return time.monotonic() - self.started

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a warning."""
        self.warnings.append(record.getMessage())

    def write(self, folder: Path, outcome: str) -> None:
        """Append one line to the run's file. Where one launch has several processes, only the first one writes.

        Args:
            folder: the folder of the log.
            outcome: `finished`, or what ended the command.
        """
        if os.environ.get("RANK", "0") != "0":
            return
        largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        record = {
            "command": sys.argv,
            "ended": datetime.now().astimezone().isoformat(timespec="seconds"),
            "seconds": round(self.seconds, 1),
            "peak_memory_bytes": largest if sys.platform == "darwin" else 1024 * largest,
            "outcome": outcome,
            "warnings": self.warnings,
        }
        with (folder / USAGE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def read_usage(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's file, from the first command to the last; empty where there is no file.

    A line that cannot be read, such as the half of one that a killed command left, is skipped with a warning.
    """
    path = folder / USAGE
    found = []
    # Only "\n" ends a line: JSON leaves the other ends of lines that Unicode has, such as U+2028, in its texts.
    for number, line in enumerate(path.read_bytes().split(b"\n") if path.is_file() else [], 1):
        try:
            if line:
                found.append(dict(json.loads(line)))
        except (ValueError, TypeError) as error:
            log.warning("line %d of %s is skipped: %s", number, path, error)
    return found
