"""Files that are whole or not there: written under a temporary name, synced, then renamed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from core.errors import UserError

# Prefix of what a killed run may leave behind; removed by the next one that writes into the folder, which may be one
# of the user's own: no other program may name its files like that.
TEMPORARY = ".tmp-transport-merge-"
# By this file an output folder is known as ours (core/manifest.py).
MANIFEST = "manifest.json"
# The lock of a folder is a file in it whose name begins like that: nobody takes it for content.
LOCK = f"{TEMPORARY}lock"
# safetensors writes 0600; a checkpoint gets the permissions of any other file.
_UMASK = os.umask(0)
os.umask(_UMASK)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path in a folder of its own beside `path`; on success sync it and rename it to `path`.

    The folder has a name that no other process has, and it goes in any case: it also holds what a library writes beside
    the file it was given.
    """
    work = Path(tempfile.mkdtemp(prefix=f"{TEMPORARY}{path.name}-", dir=path.parent))
    temporary = work / path.name
    try:
        yield temporary
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        os.chmod(temporary, 0o666 & ~_UMASK)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def remove_leftovers(folder: Path, below: bool = False) -> None:
    """Remove what killed runs left half-written in a folder, or everywhere `below` it but in other outputs.

    Only for who holds the folder's lock (core/locks.py): nobody else may be writing there. Lock files stay.
    """
    for path in list(folder.iterdir()):
        if path.name.startswith(LOCK):
            continue
        if path.name.startswith(TEMPORARY):
            _remove(path)
        elif below and path.is_dir() and not path.is_symlink() and not _is_output(path):
            remove_leftovers(path, below)


def empty_folder(folder: Path) -> None:
    """Remove all that a folder holds but its lock, its manifest, and other outputs in it."""
    for path in list(folder.iterdir()):
        if path.name == MANIFEST or path.name.startswith(LOCK):
            continue
        if not path.is_dir() or path.is_symlink() or not any(map(_is_output, (path, *path.rglob("*")))):
            _remove(path)
        elif not _is_output(path):
            empty_folder(path)


def _is_output(folder: Path) -> bool:
    """Whether a folder is an output of its own, or is being written by a process of its own."""
    return (folder / MANIFEST).is_file() or (folder / LOCK).is_file()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file; a missing or damaged one is a UserError that names it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error})") from None


def write_safetensors(path: Path, tensors: Mapping[str, Any], metadata: dict[str, str] | None = None) -> None:
    """Write tensors to one safetensors file, atomically."""
    from safetensors.torch import save_file  # with torch, which who only locks or writes text does not need

    with atomic_file(path) as temporary:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, temporary, metadata)


def digest_of(value: Any) -> str:
    """SHA-256 of the canonical JSON of `value`."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
