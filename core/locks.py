"""One writer per output folder: a lock that dies with its process, and the name of who holds it."""

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
# Lock file -> what this process holds, until `outputs_held` ends.
_held: dict[Path, contextlib.ExitStack] = {}


@contextlib.contextmanager
def outputs_held() -> Iterator[None]:
    """What `hold` locks inside is free again afterwards. Also a decorator, of every command that writes a folder."""
    before = set(_held)
    try:
        yield
    finally:
        for path in _held.keys() - before:
            _held.pop(path).close()


def hold(folder: Path, wait: bool = False) -> None:
    """Make `folder` where it is not there, and lock it for this process; what killed runs left in it is removed.

    The lock is held until the enclosing `outputs_held` ends, else until the process does. Holding a folder twice is
    holding it once. A folder that was made here and got no file is removed again.

    Args:
        wait: wait for another process that holds it, instead of refusing.
    Raises:
        UserError: another process holds it; says which one.
    """
    path = folder.resolve() / LOCK
    if path in _held:
        return
    with contextlib.ExitStack() as stack:
        made = [place for place in (path.parent, *path.parent.parents) if not place.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        stack.callback(_remove_empty, made)
        stack.enter_context(file_lock(path, str(folder), wait))
        remove_leftovers(path.parent)
        _held[path] = stack.pop_all()


@contextlib.contextmanager
def file_lock(path: Path, what: str, wait: bool) -> Iterator[None]:
    """Hold the lock file `path`, by which `what` is written; its folder has to be there.

    The operating system frees it when the process ends in whatever way, so a lock file that is left over stops nobody.

    Raises:
        UserError: another process holds it, and not `wait`.
    """
    lock, holder = FileLock(path), path.with_name(f"{path.name}.json")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        told = f"{what} is being written by {_told(holder)}"
        if not wait:
            raise UserError(f"{told}; wait for it or give another output folder") from None
        log.info("%s; waiting for it", told)
        lock.acquire()
    try:
        record = {"pid": os.getpid(), "host": socket.gethostname(), "command": shlex.join(sys.argv)}
        holder.write_text(json.dumps(record), encoding="utf-8")
        yield
    finally:
        # Both go while the lock is held: who waits with the removed file open begins anew (filelock looks).
        holder.unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        lock.release()


def _told(holder: Path) -> str:
    """`process 123 on host H (command ...)`."""
    try:
        record = json.loads(holder.read_text(encoding="utf-8"))
        return f"process {record['pid']} on host {record['host']} (command {record['command']})"
    except (OSError, ValueError, KeyError):  # it has only just begun, or has just ended
        return "another process"


def _remove_empty(folders: list[Path]) -> None:
    with contextlib.suppress(OSError):  # not empty, or gone
        for folder in folders:
            folder.rmdir()
