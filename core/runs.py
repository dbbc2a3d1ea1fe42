"""What every command shares: user errors, atomic files, manifests, logging."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file

FORMAT_VERSION = 3
MANIFEST = "manifest.json"
# Prefix of what a killed run may leave behind; removed by the next one.
TEMPORARY = ".tmp-"
# safetensors writes 0600; a checkpoint gets the permissions of any other file.
_UMASK = os.umask(0)
os.umask(_UMASK)
log = logging.getLogger(__name__)


class UserError(Exception):
    """Bad input. Shown as one line (what was got, what was expected, what to do); the command exits with 2."""


def first_line(error: BaseException) -> str:
    """What an error says in one line; its type when it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def run_command(main: Callable[[list[str]], None]) -> None:
    """Run `main(argv)` as a process: a UserError becomes one line on stderr and exit code 2, an error of the operating
    system or a damaged file (disk full, no permission) one line and 1, Ctrl-C 130."""
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except (OSError, SafetensorError) as error:
        print(f"error: {error}; the same command continues from what is finished", file=sys.stderr)
        raise SystemExit(1) from error
    except KeyboardInterrupt:
        print("interrupted; the same command continues from what is finished", file=sys.stderr)
        raise SystemExit(130) from None


_handlers: list[logging.Handler] = []
LOG_FORMAT = logging.Formatter("%(asctime)s %(message)s")


def setup_logging() -> None:
    """Log INFO to stderr, and to no file of an earlier command in this process."""
    root = logging.getLogger()
    while _handlers:
        old = _handlers.pop()
        root.removeHandler(old)
        old.close()
    root.setLevel(logging.INFO)
    _add_handler(logging.StreamHandler())
    # The libraries' own INFO lines (one per HTTP request, per checkpoint) drown ours.
    for noisy in ("httpx", "httpcore", "datasets", "accelerate", "filelock", "gguf"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def log_to_file(path: Path | None) -> None:
    """Append the log to `path` as well, from now on (after the input was checked: bad input leaves no file)."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        _add_handler(logging.FileHandler(path, encoding="utf-8"))


def _add_handler(handler: logging.Handler) -> None:
    handler.setFormatter(LOG_FORMAT)
    logging.getLogger().addHandler(handler)
    _handlers.append(handler)


def process_state(device: str) -> Any:
    """This process among those of `accelerate launch` (accelerate's PartialState); alone, process 0 of 1."""
    from accelerate import PartialState

    return PartialState(cpu=device == "cpu", timeout=timedelta(days=30))  # one waits while another reads a model


def provenance() -> dict[str, Any]:
    """Library versions and the commit of this code (None outside git): recorded, not part of any fingerprint."""
    commit = None
    if shutil.which("git"):
        command = ["git", "rev-parse", "HEAD"]
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
        commit = done.stdout.strip() or None
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "safetensors")}
    return {"versions": versions, "commit": commit}


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path in a folder of its own beside `path`; on success sync it and rename it to `path`.

    The folder goes in any case: it also holds what a library writes beside the file it was given.
    """
    work = path.with_name(TEMPORARY + path.name)
    work.mkdir(exist_ok=True)
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
    with atomic_file(path) as temporary:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, temporary, metadata)


def digest_of(value: Any) -> str:
    """SHA-256 of the canonical JSON of `value`."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def check_output_folder(folder: Path, *inputs: Path) -> None:
    """Refuse an output folder that holds files of someone else, or one of the inputs (UserError). Writes nothing."""
    if folder.is_file():
        raise UserError(f"output folder {folder} is a file; give a folder")
    foreign = folder.is_dir() and any(not path.name.startswith(TEMPORARY) for path in folder.iterdir())
    if foreign and not (folder / MANIFEST).is_file():
        raise UserError(f"output folder {folder} is not empty and was not made by this tool; give another folder")
    for path in inputs:
        if folder.resolve() in (path.resolve(), *path.resolve().parents):
            raise UserError(f"output folder {folder} holds the input {path}; give another folder")


def _contents(value: Any) -> Any:
    """`value` without the names (`id`, `file`) under which its contents were found."""
    if isinstance(value, dict):
        return {key: _contents(item) for key, item in value.items() if key not in ("id", "file")}
    return value


class Manifest:
    """`manifest.json` of an output folder: what made it, from what, and whether it is finished.

    The fingerprint covers every setting and the contents of every input that the stage depends on. Opening a folder
    whose manifest has the same fingerprint continues (or re-uses) it; another one empties the folder first and says so.
    """

    def __init__(self, folder: Path, record: dict[str, Any]):
        self.folder, self.record = folder, record

    @classmethod
    def begin(cls, folder: Path, stage: str, inputs: dict[str, Any]) -> Manifest:
        """Open `folder` for `stage`. Raises UserError when the folder is not empty and not ours."""
        check_output_folder(folder)
        fingerprint = digest_of({"format": FORMAT_VERSION, "stage": stage, **_contents(inputs)})
        path = folder / MANIFEST
        if path.is_file():
            record = read_json(path)
            if record.get("stage") != stage:
                raise UserError(f"{folder} holds the output of stage '{record.get('stage')}', not '{stage}'")
            if record.get("fingerprint") == fingerprint:
                for leftover in folder.rglob(TEMPORARY + "*"):
                    shutil.rmtree(leftover, ignore_errors=True)
                return cls(folder, record)
            old, new = record.get("inputs", {}), json.loads(json.dumps(inputs))
            changed = sorted(key for key in new.keys() | old.keys() if new.get(key) != old.get(key))
            log.info("%s was made with other inputs (%s): starting it anew", folder, ", ".join(changed) or "format")
            for path in folder.iterdir():
                if path.name != MANIFEST:  # the manifest goes last: until then the folder is known as ours
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        folder.mkdir(parents=True, exist_ok=True)
        manifest = cls(folder, {"format": FORMAT_VERSION, "stage": stage, "status": "incomplete",
                                "fingerprint": fingerprint, "inputs": inputs})  # fmt: skip
        manifest.save()
        return manifest

    @classmethod
    def read(cls, folder: Path, *stages: str) -> Manifest:
        """Open a finished folder of one of `stages`; UserError when it is absent, unfinished or of another kind."""
        wanted = " or ".join(f"'{stage}'" for stage in stages)
        if not (folder / MANIFEST).is_file():
            raise UserError(f"{folder} is not an output of stage {wanted} (no {MANIFEST}); run that stage first")
        record = read_json(folder / MANIFEST)
        if record.get("stage") not in stages:
            raise UserError(f"{folder} holds the output of stage '{record.get('stage')}', expected {wanted}")
        if record.get("format") != FORMAT_VERSION:
            raise UserError(f"{folder} has format {record.get('format')}, expected {FORMAT_VERSION}; make it again")
        if record.get("status") != "complete":
            raise UserError(f"{folder} is not finished; run the command of stage {wanted} again to complete it")
        return cls(folder, record)

    @property
    def complete(self) -> bool:
        """Whether the stage has finished."""
        return self.record["status"] == "complete"

    @property
    def inputs(self) -> dict[str, Any]:
        """Settings and input identities the folder was made from."""
        return self.record["inputs"]

    def finish(self, **results: Any) -> None:
        """Record `results` and mark the folder complete: the last write of a stage."""
        self.record.update(results)
        self.record["status"] = "complete"
        self.save()

    def save(self) -> None:
        """Write the manifest, atomically."""
        write_json(self.folder / MANIFEST, self.record)
