"""Where a model is: a folder, a GGUF file, an id below $MODELS_ROOT, or the hub. Downloads and conversions happen once.

Names are looked up in this order: a path, a folder or file below $MODELS_ROOT, the hub's cache, the hub.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError

from core.errors import UserError, first_line
from core.files import read_json
from core.hub import HUB_TIMEOUT_S, hub_refusal
from core.models.convert import BIN_FILES, bin_files, converted, converted_folder
from core.models.families import attention_layout
from core.progress import Progress

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_ONLY = ["config.json"]
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
# Where a model states its licence. These are downloaded with it, but a cached model without them counts as complete.
CARD_FILES = ["README.md", "LICEN[CS]E*", "NOTICE*", "USE_POLICY*"]
# The folder below $MODELS_ROOT for safetensors copies of models that have other formats.
CONVERTED = "converted"


def models_root() -> Path:
    """Where model ids are looked up before the hub: $MODELS_ROOT, by default `models/` in the working folder."""
    return Path(os.environ.get("MODELS_ROOT", "models"))


def has_safetensors(folder: Path) -> bool:
    """Whether a model folder holds weights that can be read one tensor at a time."""
    return (folder / SINGLE_FILE).is_file() or (folder / INDEX_FILE).is_file()


def model_folder(name: str, revision: str | None, trust_remote_code: bool) -> Path:
    """The folder with the model's safetensors, downloaded or converted first where that is needed.

    Raises:
        UserError: there is no such model, or it cannot be downloaded or converted.
    """
    files = [*HUB_FILES, "*.py"] if trust_remote_code else HUB_FILES
    found = find(name, revision, files)
    if found.is_dir() and not has_safetensors(found) and not bin_files(found) and not Path(name).is_dir():
        found = find(name, revision, [*files, *BIN_FILES])
    return as_safetensors(found, trust_remote_code)


def missing_step(name: str, revision: str | None) -> str | None:
    """What `model_folder` would have to do before the model can be read: "a download" or "a conversion"; None when it
    can be read as it is."""
    found = _local_path(name, revision) or _cached_snapshot(name, revision, HUB_FILES)
    if found is None:
        return "a download"
    if found.is_dir() and (has_safetensors(found) or not bin_files(found)):
        return None
    return None if converted_folder(found, models_root() / CONVERTED).is_dir() else "a conversion"


def find(name: str, revision: str | None, files: list[str]) -> Path:
    """The folder or GGUF file that a name stands for.

    Args:
        files: patterns of the files that are downloaded from the hub.
    Raises:
        UserError: there is no such model.
    """
    found = _local_path(name, revision)
    if found is not None:
        return found
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise UserError(f"model {name} does not exist (looked for {name} and {models_root() / name})")
    return _cached_snapshot(name, revision, files) or _download(name, revision, files)


def config_file(name: str, revision: str | None = None) -> Path:
    """The config.json or GGUF file of a model of which nothing else has to be on this machine.

    Args:
        name: a config.json, a model folder, a GGUF file, or a model of the hub.
    Raises:
        UserError: there is no config of that name.
    """
    if not name:
        raise UserError("no model given; use --target-model and --source-model, or --config")
    path = Path(name).expanduser()
    if path.suffix != ".json":
        path = find(name, revision, CONFIG_ONLY)
        path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"{path} does not exist; give a config.json, a model folder, a GGUF file or a hub id")
    return path


def _local_path(name: str, revision: str | None) -> Path | None:
    """The folder or GGUF file of a model that is on this machine outside the hub's cache.

    Raises:
        UserError: it is another file, or a revision was asked for, which only models of the hub have.
    """
    for candidate in (Path(name).expanduser(), models_root() / name):
        if candidate.is_file() and candidate.suffix != ".gguf":
            raise UserError(f"{candidate} is a file; give a model folder with config.json and safetensors, or a .gguf")
        if candidate.exists():
            if revision is not None:
                raise UserError(
                    f"{candidate} is a local copy, which has no revisions, and {revision} was asked for; leave the "
                    "revision out, or rename the copy, so that the model is taken from the hub"
                )
            return candidate
    return None


def _cached_snapshot(name: str, revision: str | None, files: list[str]) -> Path | None:
    """The copy of a model in the hub's cache, when all of it is there."""
    try:
        snapshot = huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=files, local_files_only=True
        )
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    return Path(snapshot) if files == CONFIG_ONLY or _has_weights(Path(snapshot)) else None


def _download(name: str, revision: str | None, files: list[str]) -> Path:
    try:
        if not huggingface_hub.constants.HF_HUB_OFFLINE:
            # Where there is no hub this fails within seconds, and a download would try for minutes.
            huggingface_hub.HfApi().model_info(name, revision=revision, timeout=HUB_TIMEOUT_S)
        return Path(
            huggingface_hub.snapshot_download(
                name,
                revision=revision,
                allow_patterns=[*files, *CARD_FILES],
                etag_timeout=HUB_TIMEOUT_S,
                tqdm_class=Progress,
            )
        )
    except (HTTPError, HFValidationError, OSError) as error:
        raise UserError(
            hub_refusal(name, revision, error)
            or f"model {name} is neither a folder, nor in {models_root()}, nor to be had from the hub "
            f"({first_line(error)}); put a local copy at {models_root() / name}"
        ) from None


def _has_weights(folder: Path) -> bool:
    """Whether every file of weights is in the folder: a cached snapshot may hold a config alone."""
    if bin_files(folder):
        return True
    if (folder / INDEX_FILE).is_file():
        return all((folder / file).is_file() for file in set(weight_map(folder / INDEX_FILE).values()))
    return (folder / SINGLE_FILE).is_file()


def weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file of a sharded checkpoint. Raises UserError when the index holds no such map."""
    found = read_json(index)
    if not isinstance(found, dict) or not isinstance(found.get("weight_map"), dict):
        raise UserError(f"{index} has no weight_map; download or save the model again")
    return found["weight_map"]


def as_safetensors(found: Path, trust_remote_code: bool) -> Path:
    """A model folder itself, or the converted copy of a GGUF file or of a folder that has .bin weights alone.

    Raises:
        UserError: it is no model folder, its family is not supported, or it cannot be converted.
    """
    cache = models_root() / CONVERTED
    if found.is_file():
        return converted(found, cache)
    if not (found / "config.json").is_file():
        raise UserError(f"{found} is not a model folder: it has no config.json")
    if has_safetensors(found) or not bin_files(found):
        return found
    # An unsupported family is refused now, and not after a conversion that may take minutes.
    attention_layout(read_json(found / "config.json"), str(found))
    return converted(found, cache, trust_remote_code)
