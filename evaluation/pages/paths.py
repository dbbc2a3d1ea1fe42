"""What a page may not show: where things lie on the machine that made it, and tokens."""

from __future__ import annotations

import re

# The folders of an absolute path, or of one below the home folder; a slash after a letter, a colon or another slash
# belongs to an id of the hub or to an address.
_FOLDERS = re.compile(r"(?<![\w:/.])~?/(?:[^\s/'\"]+/)+")
_TOKEN = re.compile(r"\bhf_\w{8,}")


def without_paths(text: str) -> str:
    """The text with the last part alone of every absolute path, and without tokens of the hub."""
    return _TOKEN.sub("hf_(token)", _FOLDERS.sub("", text))
