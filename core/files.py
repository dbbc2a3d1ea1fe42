"""Files that are either complete or absent: written under a temporary name, synced to disk, then renamed."""

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

# Prefix of half-written files. A killed run may leave some behind, and the next run that writes into the folder removes
# them. The folder may be one of the user's own, so the prefix is one that no other program gives to its files.
TEMPORARY = ".tmp-transport-merge-"
# A folder with this file is an output of one of our commands (core/manifest.py).
MANIFEST = "manifest.json"
# The lock of a folder is a file inside it. Its name begins with the temporary prefix, so nobody takes it for content.
LOCK = f"{TEMPORARY}lock"
# safetensors creates its files with mode 0600. Ours get the permissions that the user's umask gives to any other file.
_UMASK = os.umask(0)
os.umask(_UMASK)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to `path`; when the block succeeds, sync the file and rename it to `path`.

    The temporary file is in a folder of its own, because some libraries write further files next to the one that they
    are given. The folder's name is unique to this process, and it is removed whether the block succeeds or not.
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
    """Remove the half-written files that killed runs left in a folder. Lock files stay.

    The caller must hold the folder's lock (core/locks.py), so that nobody else is writing there.

    Args:
        below: also look in the folders inside, except in those that are outputs of their own.
    """
    for path in list(folder.iterdir()):
        if path.name.startswith(LOCK):
            continue
        if path.name.startswith(TEMPORARY):
            _remove(path)
        elif below and path.is_dir() and not path.is_symlink() and not _is_output(path):
            remove_leftovers(path, below)


def empty_folder(folder: Path) -> None:
    """Remove everything in a folder except its lock, its manifest, and other outputs inside it."""
    for path in list(folder.iterdir()):
        if path.name == MANIFEST or path.name.startswith(LOCK):
            continue
        if not path.is_dir() or path.is_symlink() or not any(map(_is_output, (path, *path.rglob("*")))):
            _remove(path)
        elif not _is_output(path):
            empty_folder(path)


def _is_output(folder: Path) -> bool:
    """Whether a folder is an output with a manifest of its own, or is locked by a process that writes it."""
    return (folder / MANIFEST).is_file() or (folder / LOCK).is_file()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8; the file is complete or absent (`atomic_file`)."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON; the file is complete or absent (`atomic_file`)."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises UserError, naming the file, when it is missing or is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error})") from None


def write_safetensors(path: Path, tensors: Mapping[str, Any], metadata: dict[str, str] | None = None) -> None:
    """Write tensors to one safetensors file; the file is complete or absent (`atomic_file`)."""
    from safetensors.torch import save_file  # imports torch, which commands that only write text do not need

    with atomic_file(path) as temporary:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, temporary, metadata)


def digest_of(value: Any) -> str:
    """SHA-256, in hexadecimal, of `value` written as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
