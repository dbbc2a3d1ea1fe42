"""Where a model is: a folder, a GGUF file, an id below $MODELS_ROOT, or the hub; downloaded or converted once."""

from __future__ import annotations

import os
import re
from pathlib import Path

from core.errors import UserError, first_line
from core.files import read_json
from core.hub import HUB_TIMEOUT_S, hub_refusal
from core.models.convert import BIN_FILES, bin_files, converted, converted_folder
from core.models.families import attention_layout

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_ONLY = ["config.json"]
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
# Where a model states its licence: downloaded with it, but a cached model without them is complete.
CARD_FILES = ["README.md", "LICEN[CS]E*", "NOTICE*", "USE_POLICY*"]


# Below the models: copies of what was not safetensors.
CONVERTED = "converted"


def models_root() -> Path:
    """Where model ids are looked up before the hub: $MODELS_ROOT, by default `models/` in the working folder."""
    return Path(os.environ.get("MODELS_ROOT", "models"))


def has_safetensors(folder: Path) -> bool:
    """Whether a model folder holds weights that can be read one tensor at a time."""
    return (folder / SINGLE_FILE).is_file() or (folder / INDEX_FILE).is_file()


def model_folder(name: str, revision: str | None, trust_remote_code: bool) -> Path:
    """The model's folder with safetensors, downloaded or converted where it has to be. Raises UserError."""
    files = [*HUB_FILES, "*.py"] if trust_remote_code else HUB_FILES
    found = find(name, revision, files)
    if found.is_dir() and not has_safetensors(found) and not bin_files(found) and not Path(name).is_dir():
        found = find(name, revision, [*files, *BIN_FILES])
    return as_safetensors(found, trust_remote_code)


def waits_for(name: str, revision: str | None) -> str | None:
    """What `model_folder` would have to do first, "a download" or "a conversion"; None: the model can be read."""
    found = _here(name) or _cached(name, revision, HUB_FILES)
    if found is None:
        return "a download"
    if found.is_dir() and (has_safetensors(found) or not bin_files(found)):
        return None
    return None if converted_folder(found, models_root() / CONVERTED).is_dir() else "a conversion"


def find(name: str, revision: str | None, files: list[str]) -> Path:
    """The folder or GGUF file that a name stands for. Raises UserError when there is none."""
    found = _here(name)
    if found is not None:
        return found
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise UserError(f"model {name} does not exist (looked for {name} and {models_root() / name})")
    return _download(name, revision, files)


def _here(name: str) -> Path | None:
    for candidate in (Path(name).expanduser(), models_root() / name):
        if candidate.is_file() and candidate.suffix != ".gguf":
            raise UserError(f"{candidate} is a file; give a model folder with config.json and safetensors, or a .gguf")
        if candidate.exists():
            return candidate
    return None


def _cached(name: str, revision: str | None, files: list[str]) -> Path | None:
    """The hub cache's copy of a model, when all of it is there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        found = Path(snapshot_download(name, revision=revision, allow_patterns=files, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    return found if files == CONFIG_ONLY or _has_weights(found) else None


def _download(name: str, revision: str | None, files: list[str]) -> Path:
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import HFValidationError, HTTPError

    if (cached := _cached(name, revision, files)) is not None:
        return cached
    try:
        if not constants.HF_HUB_OFFLINE:
            HfApi().model_info(name, revision=revision, timeout=HUB_TIMEOUT_S)  # fails fast where there is no hub
        wanted = [*files, *CARD_FILES]
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted, etag_timeout=HUB_TIMEOUT_S))
    except (HTTPError, HFValidationError, OSError) as error:
        raise UserError(
            hub_refusal(name, revision, error)
            or f"model {name} is neither a folder, nor in {models_root()}, nor to be had from the hub "
            f"({first_line(error)}); put a local copy at {models_root() / name}"
        ) from None


def _has_weights(folder: Path) -> bool:
    """Whether every file of weights is there (a cached snapshot may hold a config alone)."""
    if bin_files(folder):
        return True
    if (folder / INDEX_FILE).is_file():
        return all((folder / file).is_file() for file in set(weight_map(folder / INDEX_FILE).values()))
    return (folder / SINGLE_FILE).is_file()


def weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file of a sharded checkpoint."""
    found = read_json(index)
    if not isinstance(found, dict) or not isinstance(found.get("weight_map"), dict):
        raise UserError(f"{index} has no weight_map; download or save the model again")
    return found["weight_map"]


def as_safetensors(found: Path, trust_remote_code: bool) -> Path:
    """The folder itself, or the converted copy of a GGUF file or of a folder with .bin weights alone."""
    cache = models_root() / CONVERTED
    if found.is_file():
        return converted(found, cache)
    if not (found / "config.json").is_file():
        raise UserError(f"{found} is not a model folder: it has no config.json")
    if has_safetensors(found) or not bin_files(found):
        return found
    attention_layout(read_json(found / "config.json"), str(found))  # an unsupported family is told at once
    return converted(found, cache, trust_remote_code)
