"""One writer per output folder: a lock that the operating system frees when its process ends, and who holds it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from core.errors import UserError
from core.files import LOCK, remove_leftovers

log = logging.getLogger(__name__)
# Lock file -> the lock that this process holds on it, until `outputs_held` ends.
_held: dict[Path, contextlib.ExitStack] = {}


@contextlib.contextmanager
def outputs_held() -> Iterator[None]:
    """Release, at the end of the block, the folders that were locked inside it with `hold`.

    Every command that writes a folder has it as a decorator.
    """
    before = set(_held)
    try:
        yield
    finally:
        for path in _held.keys() - before:
            _held.pop(path).close()


def hold(folder: Path, wait: bool = False) -> None:
    """Lock `folder` for this process, making it if it does not exist, and remove what killed runs left in it.

    The lock is held until the enclosing `outputs_held` ends, or without one until the process ends. Holding a folder
    twice is the same as holding it once. A folder that was made here and received no file is removed again.

    Args:
        wait: wait for another process that holds the folder, instead of refusing.
    Raises:
        UserError: another process holds the folder; the message says which one.
    """
    path = folder.resolve() / LOCK
    if path in _held:
        return
    with contextlib.ExitStack() as stack:
        made = [parent for parent in (path.parent, *path.parent.parents) if not parent.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        stack.callback(_remove_empty, made)
        stack.enter_context(file_lock(path, str(folder), wait))
        remove_leftovers(path.parent)
        _held[path] = stack.pop_all()


@contextlib.contextmanager
def file_lock(path: Path, what: str, wait: bool) -> Iterator[None]:
    """Hold the lock file `path`, whose folder must exist, while this process writes `what`.

    The operating system frees the lock when the process ends, in whatever way it ends, so a lock file that was left
    behind stops nobody. Beside it a small JSON file says which process holds the lock.

    Raises:
        UserError: another process holds the lock, and `wait` is false.
    """
    lock, holder = FileLock(path), path.with_name(f"{path.name}.json")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        message = f"{what} is being written by {_describe_holder(holder)}"
        if not wait:
            raise UserError(f"{message}; wait for it or give another output folder") from None
        log.info("%s; waiting for it", message)
        lock.acquire()
    try:
        record = {"pid": os.getpid(), "host": socket.gethostname(), "command": shlex.join(sys.argv)}
        holder.write_text(json.dumps(record), encoding="utf-8")
        yield
    finally:
        # Both files are removed while the lock is still held. A process that waits with the removed file open notices
        # that it is gone, because filelock compares the open file with the one on disk, and starts over.
        holder.unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        lock.release()


def _describe_holder(holder: Path) -> str:
    """The process that holds a lock, as `process 123 on host H (command ...)`."""
    try:
        record = json.loads(holder.read_text(encoding="utf-8"))
        return f"process {record['pid']} on host {record['host']} (command {record['command']})"
    except (OSError, ValueError, KeyError):  # the other process has only just taken the lock, or has just released it
        return "another process"


def _remove_empty(folders: list[Path]) -> None:
    """Remove folders, innermost first, up to the first one that is not empty."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()
