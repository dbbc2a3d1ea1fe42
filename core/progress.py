"""How far a long step is and how long it will still take: one bar for the whole project."""

from __future__ import annotations

import io
import logging
import sys
from typing import Any

from tqdm import tqdm

log = logging.getLogger(__name__)
# What is told of a step, after its name and its percentage.
AMOUNT = "{n_fmt} of {total_fmt} {unit}, {elapsed} so far, {remaining} left{postfix}"
# Where there is no terminal, a step says every so many seconds how far it is.
LINES_S = 30
# A finished step leaves a line on the screen if it took so many seconds, and else in the log alone.
LONG_S = 5


class Progress(tqdm):
    """A bar that knows where it is shown.

    In a terminal it is drawn again and again in one line, and goes away in the end. Elsewhere, as in a file or a pipe,
    and with `--quiet`, whole lines go to the log instead, the first one after `LINES_S` seconds. When the step ends,
    the log says in both cases how long it took.

    Args:
        iterable, desc, total, unit, disable, ...: as tqdm takes them; the unit in the plural.
    """

    # Set by `--quiet`: nothing is drawn.
    quiet = False

    def __init__(self, *args: Any, **options: Any):
        self.drawn = sys.stderr.isatty() and not Progress.quiet
        words = "{desc}: {percentage:3.0f} %" + (" |{bar:20}| " if self.drawn else ", ") + AMOUNT
        seldom = {"mininterval": LINES_S, "maxinterval": LINES_S, "delay": LINES_S, "file": io.StringIO()}
        where = {"dynamic_ncols": True} if self.drawn else seldom
        super().__init__(*args, **{"unit": "steps", **options, **where, "bar_format": words, "leave": False})

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Draw the bar, or log it as a line."""
        if self.drawn:
            return bool(super().display(msg, pos))
        if msg is None:
            log.info(str(self))
        return True

    def close(self) -> None:
        """Remove the bar and log how long the step took."""
        if self.disable:
            return
        seconds = self.format_dict["elapsed"]
        super().close()
        level = logging.INFO if seconds >= LONG_S else logging.DEBUG
        log.log(level, "%s: %d of %s %s in %s", self.desc, self.n, self.total, self.unit, duration(seconds))


def close_bars() -> None:
    """Remove every bar that is still open, so that what is printed next begins a line of its own."""
    for bar in list(getattr(Progress, "_instances", ())):
        bar.close()


def duration(seconds: float) -> str:
    """A time in words, such as `4.2 min`."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
