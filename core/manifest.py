"""`manifest.json` of an output folder: which stage made it, from which inputs, and whether it is finished."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from core.errors import UserError
from core.files import MANIFEST, TEMPORARY, digest_of, empty_folder, read_json, remove_leftovers, write_json
from core.locks import hold

FORMAT_VERSION = 3
# Stage, by its name in manifests -> the command that makes its folder.
COMMANDS = {
    "plans": "run_activs_and_hot.py",
    "fused": "core/generate_hot_residual.py",
    "adapted": "core/train_hot_residual_sft.py",
    "untrained": "core/train_hot_residual_sft.py --save-untrained-folded",
}
log = logging.getLogger(__name__)


def check_output_folder(folder: Path, *inputs: Path) -> None:
    """Refuse a folder into which a stage must not write. Nothing is written here.

    Raises:
        UserError: `folder` is a file, holds files that no stage of ours made, holds one of the `inputs`, or is inside
            another output (which would remove it when its own stage empties the folder to run again).
    """
    if folder.is_file():
        raise UserError(f"output folder {folder} is a file; give a folder")
    foreign = folder.is_dir() and any(not path.name.startswith(TEMPORARY) for path in folder.iterdir())
    if foreign and not (folder / MANIFEST).is_file():
        raise UserError(f"output folder {folder} is not empty and was not made by this tool; give another folder")
    for parent in folder.resolve().parents:
        if _is_ours(parent):
            raise UserError(
                f"output folder {folder} is inside {parent}, which is an output itself; give another folder"
            )
    for path in inputs:
        if folder.resolve() in (path.resolve(), *path.resolve().parents):
            raise UserError(f"output folder {folder} holds the input {path}; give another folder")


def _is_ours(folder: Path) -> bool:
    """Whether a stage of ours wrote the folder's manifest; other programs have files of that name, too."""
    try:
        record = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(record, dict) and record.get("stage") in COMMANDS


def check_finished(folder: Path) -> None:
    """Refuse a folder that a stage of ours made and that holds no finished model. Any other folder passes.

    Raises:
        UserError: its stage has not finished, makes no model, or was of another version.
    """
    if _is_ours(folder):
        Manifest.read(folder, "fused", "adapted", "untrained")


def check_format(folder: Path, record: Mapping[str, Any]) -> None:
    """Raise UserError for a folder of another format than this version writes, with the command that makes it again."""
    found = record.get("format")
    if found == FORMAT_VERSION:
        return
    stage = record.get("stage")
    command = f"python {COMMANDS[stage]}" if stage in COMMANDS else "the command that made it"
    raise UserError(
        f"{folder} has format {found} and this version reads format {FORMAT_VERSION}, in which splits and digests mean "
        f"something else; run {command} again, which makes it anew"
    )


# The names under which an input was found: only its contents count.
NAMES = ("id", "file")
# What a dry run, which may be made on another machine, decides in another way than the run itself.
OF_THE_MACHINE = ("device", "dtype", "processes")


def _contents(value: Any, left_out: Sequence[str] = NAMES) -> Any:
    """`value` without the entries that are `left_out`, at any depth."""
    if isinstance(value, dict):
        return {key: _contents(item, left_out) for key, item in value.items() if key not in left_out}
    return value


def would_be_emptied(folder: Path, inputs: dict[str, Any]) -> str | None:
    """What a dry run says of an output that the run would make anew; None where there is none, or it would be kept.

    Args:
        inputs: as the run would give them to `Manifest.begin`. Those that depend on the machine are not compared.
    """
    if not (folder / MANIFEST).is_file():
        return None
    record = read_json(folder / MANIFEST)
    old, new = (_contents(found, NAMES + OF_THE_MACHINE) for found in (record.get("inputs"), _as_json(inputs)))
    if record.get("format") == FORMAT_VERSION and old == new:
        return None
    return f"{folder} {_difference({**record, 'inputs': old or {}}, new)} and would be made anew"


class Manifest:
    """The manifest of one output folder.

    The fingerprint is a digest of every setting and of the contents of every input that the stage depends on. When a
    stage begins in a folder whose manifest has the same fingerprint, it continues what is there, or uses it again when
    it is complete. When the fingerprint is another one, the folder is emptied first, and the log says why.
    """

    def __init__(self, folder: Path, record: dict[str, Any]):
        self.folder, self.record = folder, record

    @classmethod
    def begin(cls, folder: Path, stage: str, inputs: dict[str, Any]) -> Manifest:
        """Open `folder` for `stage` to write into, and hold its lock.

        Args:
            inputs: JSON values by name: the settings, and the identity of every model and data set that is read.
        Raises:
            UserError: the folder is not empty and not ours, or another process is writing it.
        """
        check_output_folder(folder)
        hold(folder)
        fingerprint = digest_of({"format": FORMAT_VERSION, "stage": stage, **_contents(inputs)})
        if (folder / MANIFEST).is_file():
            record = read_json(folder / MANIFEST)
            if record.get("stage") != stage:
                raise UserError(f"{folder} holds the output of stage '{record.get('stage')}', not '{stage}'")
            if record.get("fingerprint") == fingerprint:
                remove_leftovers(folder, below=True)
                return cls(folder, record)
            log.info("%s %s: making it anew", folder, _difference(record, inputs))
            _empty(folder, record)
        begun = {"format": FORMAT_VERSION, "stage": stage, "status": "incomplete"}
        manifest = cls(folder, {**begun, "fingerprint": fingerprint, "inputs": inputs})
        manifest.save()
        return manifest

    @classmethod
    def read(cls, folder: Path, *stages: str) -> Manifest:
        """Open a finished folder of one of `stages` to read from.

        Raises:
            UserError: the folder is absent, unfinished, of another stage, or of another format.
        """
        wanted = " or ".join(f"'{stage}'" for stage in stages)
        if not (folder / MANIFEST).is_file():
            raise UserError(f"{folder} is not an output of stage {wanted} (no {MANIFEST}); run that stage first")
        record = read_json(folder / MANIFEST)
        if record.get("stage") not in stages:
            raise UserError(f"{folder} holds the output of stage '{record.get('stage')}', expected {wanted}")
        check_format(folder, record)
        if record.get("status") != "complete":
            raise UserError(f"{folder} is not finished; run the command of stage {wanted} again to complete it")
        return cls(folder, record)

    @property
    def complete(self) -> bool:
        """Whether the stage has finished."""
        return self.record["status"] == "complete"

    @property
    def inputs(self) -> dict[str, Any]:
        """The settings and the identities of the inputs that the folder was made from."""
        return self.record["inputs"]

    def finish(self, **results: Any) -> None:
        """Record `results` and mark the folder complete. This is the last file that a stage writes."""
        self.record.update(results)
        self.record["status"] = "complete"
        self.save()

    def save(self) -> None:
        """Write the manifest to the folder."""
        write_json(self.folder / MANIFEST, self.record)


def _as_json(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """`inputs` as a manifest holds them, with lists in place of tuples."""
    return json.loads(json.dumps(inputs))


def _difference(record: Mapping[str, Any], inputs: Mapping[str, Any]) -> str:
    """Why the contents of a folder cannot be used: they have another format, or some inputs have changed."""
    if record.get("format") != FORMAT_VERSION:
        return (
            f"has format {record.get('format')} and this version writes format {FORMAT_VERSION}, in which splits and "
            "digests mean something else"
        )
    if record.get("fingerprint") is None:
        return "was being emptied when its process ended"
    old, new = record.get("inputs", {}), _as_json(inputs)
    changed = sorted(key for key in new.keys() | old.keys() if new.get(key) != old.get(key))
    return f"was made with other inputs ({', '.join(changed)})"


def _empty(folder: Path, record: Mapping[str, Any]) -> None:
    """Remove the contents of a folder, except its lock and its manifest, which marks the folder as ours.

    Before anything is removed, the manifest is marked incomplete and loses its fingerprint. So a stage that reads the
    folder meanwhile sees that it is not finished, and a run that finds it after a kill does not continue from it.
    """
    write_json(folder / MANIFEST, {**record, "status": "incomplete", "fingerprint": None})
    empty_folder(folder)


def provenance() -> dict[str, Any]:
    """The versions of the libraries, and the git commit of this code (None outside a repository).

    They are recorded in manifests for the reader. No fingerprint depends on them.
    """
    commit = None
    if shutil.which("git"):
        command = ["git", "rev-parse", "HEAD"]
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
        commit = done.stdout.strip() or None
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "safetensors")}
    return {"versions": versions, "commit": commit}
