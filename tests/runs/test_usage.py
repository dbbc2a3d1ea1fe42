"""What is recorded of a command: its time, memory, warnings and outcome, beside the log."""

import json
import logging
import sys

import pytest

from core.errors import UserError
from core.runs.process import log_to_file, run_command, setup_logging
from core.runs.usage import USAGE, read_usage


def command(folder, ending=None):
    def main(argv):
        setup_logging()
        if folder is not None:
            log_to_file(folder / "run/log.txt")
        logging.getLogger("core.x").info("not a warning")
        logging.getLogger("core.x").warning("look at %s", "this")
        logging.getLogger("other_library").warning("this will change in version 9")
        if ending is not None:
            raise ending

    return main


@pytest.mark.parametrize(
    ("ending", "outcome"),
    [
        (None, "finished"),
        (UserError("no rows"), "error: no rows"),
        (OSError("disk is full"), "error: disk is full"),
        (KeyboardInterrupt(), "interrupted"),
        (ZeroDivisionError(), "stopped by an error of the program"),
    ],
)
def test_every_ending_is_recorded(tmp_path, monkeypatch, ending, outcome):
    monkeypatch.setattr(sys, "argv", ["stage.py", "--alpha", "0.1"])
    for _ in range(2):
        try:
            run_command(command(tmp_path, ending))
        except (SystemExit, ZeroDivisionError):
            assert ending is not None
    first, second = read_usage(tmp_path / "run")
    assert first["outcome"] == second["outcome"] == outcome and first["command"] == ["stage.py", "--alpha", "0.1"]
    assert first["warnings"] == ["look at this"]
    assert 0 <= first["seconds"] < 600 and 2**20 < first["peak_memory_bytes"] < 2**40


def test_a_command_without_a_log_records_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["stage.py"])
    run_command(command(tmp_path))
    run_command(command(None))
    assert len(read_usage(tmp_path / "run")) == 1
    monkeypatch.setenv("RANK", "1")
    run_command(command(tmp_path))
    assert len(read_usage(tmp_path / "run")) == 1


def test_a_line_that_cannot_be_read_is_skipped(tmp_path, caplog):
    """A killed process leaves half a line, and the next command writes on in the same line; reports go on without."""
    assert read_usage(tmp_path) == []
    whole = [{"warnings": ["a\u2028b\x85c"]}, {"warnings": ["d"]}]
    lines = [json.dumps(line, ensure_ascii=False) for line in whole]
    (tmp_path / USAGE).write_bytes(
        ("\n".join([lines[0], '{"warn' + lines[1], lines[1]]) + "\n").encode() + b"\xe2\n3\n"
    )
    assert read_usage(tmp_path) == whole
    assert "line 2 of" in caplog.text and "line 4 of" in caplog.text and "line 5 of" in caplog.text
