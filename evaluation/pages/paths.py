"""What a page may not show: where things lie on the machine that made it, and tokens. How it shows paths instead."""

from __future__ import annotations

import os
import re
import shlex
from getpass import getuser
from pathlib import Path

from core.runs.command_line import REPOSITORY

# The folders of an absolute path, or of one below the home folder, or of a file: address; a slash after a letter, a
# colon or another slash belongs to an id of the hub or to an address. In quotes a path may have spaces.
_FOLDERS = re.compile(r"(?:\bfile:(?://)?|(?<![\w:/.]))~?/(?:[^\s/'\"]+/)+")
_QUOTED = re.compile(r"(?<=['\"])(?:file:(?://)?)?~?/[^'\"\n]*/")
_TOKEN = re.compile(r"\bhf_\w{8,}")


def without_paths(text: str) -> str:
    """The text with the last part alone of every absolute path, without the home folder, the folders of results and
    models, and the user's name wherever they stand, and without tokens of the hub."""
    for root in known_folders():
        text = re.sub(re.escape(root) + r"(?![\w-])", "~", text)
    text = re.sub(rf"\b{re.escape(user())}\b", "(user)", _FOLDERS.sub("", _QUOTED.sub("", text)))
    return _TOKEN.sub("hf_(token)", text.replace(":~/", ":"))


def place_of(path: Path) -> str | None:
    """An absolute path as a command that is started in the repository takes it on any machine, quoted for the shell:
    from the repository on, or from $TRANSPORT_RESULTS_ROOT on; None for a path elsewhere."""
    results = os.environ.get("TRANSPORT_RESULTS_ROOT")
    for found in (path, path.resolve()):
        if found.is_relative_to(REPOSITORY):
            return shlex.quote(without_paths(str(found.relative_to(REPOSITORY))))
        if results and found.is_relative_to(Path(results).absolute()):
            inside = without_paths(str(found.relative_to(Path(results).absolute())))
            return f'"$TRANSPORT_RESULTS_ROOT"/{shlex.quote(inside)}'
    return None


def known_folders() -> list[str]:
    """The folders whose names a text may hold in any form, the longest first."""
    roots = {str(Path.home()), *(os.environ.get(name, "") for name in ("MODELS_ROOT", "TRANSPORT_RESULTS_ROOT"))}
    absolute = (root.rstrip("/") for root in roots if root.startswith("/"))
    return sorted(filter(None, absolute), key=len, reverse=True)


def user() -> str:
    """The user's name; where it is a container's common word, or there is none, a text that occurs nowhere."""
    try:
        name = getuser()
    except (KeyError, OSError):  # a container may run a number without a name
        return "\0"
    return "\0" if name in ("root", "user") else name
