"""`manifest.json` of an output folder: what made it, from what, and whether it is finished."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core.errors import UserError
from core.files import MANIFEST, TEMPORARY, digest_of, empty_folder, read_json, remove_leftovers, write_json
from core.locks import hold

FORMAT_VERSION = 3
# Stage, as manifests name it -> the command that makes its folder.
COMMANDS = {
    "plans": "run_activs_and_hot.py",
    "fused": "core/generate_hot_residual.py",
    "adapted": "core/train_hot_residual_sft.py",
    "untrained": "core/train_hot_residual_sft.py --save-untrained-folded",
}
log = logging.getLogger(__name__)


def check_output_folder(folder: Path, *inputs: Path) -> None:
    """Refuse an output folder that holds files of someone else or one of the inputs, or that is inside another output,
    which is emptied when its stage is made anew (UserError). Writes nothing."""
    if folder.is_file():
        raise UserError(f"output folder {folder} is a file; give a folder")
    foreign = folder.is_dir() and any(not path.name.startswith(TEMPORARY) for path in folder.iterdir())
    if foreign and not (folder / MANIFEST).is_file():
        raise UserError(f"output folder {folder} is not empty and was not made by this tool; give another folder")
    for place in folder.resolve().parents:
        if _is_ours(place):
            raise UserError(f"output folder {folder} is inside {place}, which is an output itself; give another folder")
    for path in inputs:
        if folder.resolve() in (path.resolve(), *path.resolve().parents):
            raise UserError(f"output folder {folder} holds the input {path}; give another folder")


def _is_ours(folder: Path) -> bool:
    """Whether a folder's manifest is one that a stage wrote; other programs have files of that name."""
    try:
        record = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(record, dict) and record.get("stage") in COMMANDS


def check_format(folder: Path, record: Mapping[str, Any]) -> None:
    """Refuse (UserError) to read a folder of another format than this version writes, and say what makes it again."""
    found = record.get("format")
    if found == FORMAT_VERSION:
        return
    stage = record.get("stage")
    command = f"python {COMMANDS[stage]}" if stage in COMMANDS else "the command that made it"
    raise UserError(
        f"{folder} has format {found} and this version reads format {FORMAT_VERSION}, in which splits and digests mean "
        f"something else; run {command} again, which makes it anew"
    )


def _contents(value: Any) -> Any:
    """`value` without the names (`id`, `file`) under which its contents were found."""
    if isinstance(value, dict):
        return {key: _contents(item) for key, item in value.items() if key not in ("id", "file")}
    return value


class Manifest:
    """The manifest of one folder.

    The fingerprint covers every setting and the contents of every input that the stage depends on. Opening a folder
    whose manifest has the same fingerprint continues (or re-uses) it; another one empties the folder first and says so.
    """

    def __init__(self, folder: Path, record: dict[str, Any]):
        self.folder, self.record = folder, record

    @classmethod
    def begin(cls, folder: Path, stage: str, inputs: dict[str, Any]) -> Manifest:
        """Open `folder` for `stage`, and hold its lock.

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
        """Open a finished folder of one of `stages`; UserError when it is absent, unfinished, or of another kind or
        format."""
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


def _difference(record: Mapping[str, Any], inputs: Mapping[str, Any]) -> str:
    """Why what a folder holds cannot be used: its format, or the inputs that changed."""
    if record.get("format") != FORMAT_VERSION:
        return (
            f"has format {record.get('format')} and this version writes format {FORMAT_VERSION}, in which splits and "
            "digests mean something else"
        )
    if record.get("fingerprint") is None:
        return "was being emptied when its process ended"
    old, new = record.get("inputs", {}), json.loads(json.dumps(inputs))
    changed = sorted(key for key in new.keys() | old.keys() if new.get(key) != old.get(key))
    return f"was made with other inputs ({', '.join(changed)})"


def _empty(folder: Path, record: Mapping[str, Any]) -> None:
    """Remove what a folder holds, but its lock and its manifest, by which it is known as ours.

    Before that the manifest says that nothing here is finished, and by its missing fingerprint that nothing can be
    continued: whoever reads the folder meanwhile, or finds it after a kill, is told the truth.
    """
    write_json(folder / MANIFEST, {**record, "status": "incomplete", "fingerprint": None})
    empty_folder(folder)
