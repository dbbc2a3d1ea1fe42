"""The one bar: lines where there is no terminal, what is left in the end, and what is never printed twice."""

import logging
import re

import pytest
from conftest import ROOT

from core import progress
from core.progress import Progress, duration
from core.runs.process import OURS
from scripts import write_stages_page


def test_without_a_terminal_a_step_says_seldom_how_far_it_is(caplog, capfd, monkeypatch):
    caplog.set_level(logging.INFO)
    # The screen of a command that an earlier test has called is closed by now.
    monkeypatch.setattr(logging.getLogger(), "handlers", [caplog.handler])
    clock = iter(range(0, 10_000, 7))
    monkeypatch.setattr("tqdm.std.time", lambda: float(next(clock)))
    list(Progress(range(40), desc="plans", unit="pairs"))
    lines = caplog.messages
    assert lines[0].startswith("plans: ") and " of 40 pairs, " in lines[0] and lines[0].endswith(" left")
    assert 2 < len(lines) < 12 and all("|" not in line for line in lines)
    assert lines[-1].startswith("plans: 40 of 40 pairs in ")
    assert not capfd.readouterr().err.strip("\r")


def test_a_short_step_leaves_a_line_in_the_log_file_alone(caplog):
    caplog.set_level(logging.DEBUG)
    list(Progress(range(3), desc="short", unit="texts"))
    assert [(record.levelname, record.message[:25]) for record in caplog.records] == [
        ("DEBUG", "short: 3 of 3 texts in 0.")
    ]


def test_a_bar_that_is_not_the_first_process_says_nothing(caplog):
    caplog.set_level(logging.DEBUG)
    with Progress(total=3, disable=True) as bar:
        bar.update(3)
    assert not caplog.records


def test_bars_that_an_error_leaves_open_are_closed(caplog):
    caplog.set_level(logging.DEBUG)
    bar = Progress(total=3, desc="broken off", unit="texts")
    progress.close_bars()
    assert bar.disable and caplog.messages[0].startswith("broken off: 0 of 3 texts in ")


@pytest.mark.parametrize(("seconds", "words"), [(3.21, "3.2 s"), (200, "3.3 min"), (9000, "2.5 h")])
def test_a_time_in_words(seconds, words):
    assert duration(seconds) == words


def test_every_logger_of_a_command_is_known_as_ours():
    """Of other loggers the screen shows errors alone."""
    texts = [(ROOT / command).read_text("utf-8") for command in write_stages_page.commands()]
    named = {name for text in texts for name in re.findall(r"^log = logging.getLogger\((.*)\)", text, re.MULTILINE)}
    assert named == {f'"{name}"' for name in OURS} - {'"core"', '"evaluation"'}
