"""Checkpoints in other formats (a GGUF file, a folder of torch .bin files), converted once to safetensors folders."""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from core.errors import UserError, first_line
from core.files import LOCK, TEMPORARY, read_json
from core.locks import file_lock
from core.models.families import FAMILIES
from core.models.transformers_log import redirect_transformers
from core.models.weight_digest import sample_digest

log = logging.getLogger(__name__)
# Prefix of the folder of a conversion that has not ended. It differs from that of half-written files, because whoever
# holds the lock of a folder removes those, and a conversion has a lock of its own.
CONVERTING = ".converting-"
# What is never copied from a target into a checkpoint that is made from it: indexes of weights, which are written anew
# where they are needed; locks and half-written files of a process that is writing the target now; and what stages and
# scripts of ours wrote about the target.
NOT_COPIED = re.compile(
    rf"{re.escape(TEMPORARY)}.*|.*\.index\.json|manifest\.json|resolved\.yaml|README\.md|fusion_report\.json"
    r"|loss_curve\.json|results\.json|provenance\.json|task\.json|rows_read\.json|log\.txt"
)
BIN_FILES = ["pytorch_model*.bin", "pytorch_model*.bin.index.json"]


def bin_files(folder: Path) -> list[Path]:
    """The files of a folder that hold weights in torch's own format."""
    return sorted(folder.glob("pytorch_model*.bin"))


def converted_folder(source: Path, cache: Path) -> Path:
    """The folder in `cache` for the converted copy of a GGUF file or a folder of .bin files, which is named by their
    contents. It need not exist."""
    small = [path for path in sorted(source.glob("*.json")) if not NOT_COPIED.fullmatch(path.name)]
    files = [source] if source.is_file() else [*bin_files(source), *small]
    return cache / f"{source.stem if source.is_file() else source.name}-{sample_digest(files)[:12]}"


def converted(source: Path, cache: Path, trust_remote_code: bool = False) -> Path:
    """The folder with the safetensors copy of a GGUF file (in float32) or of a folder of .bin files (in its own dtype).

    The copy is made on first use and found again by the contents of the files. Where several processes want it at once,
    one makes it and the others wait. Files in torch's own format are read by transformers' safe loading, which takes
    weights only and runs no pickled code.

    Raises:
        UserError: the files cannot be converted.
    """
    folder = converted_folder(source, cache)
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    work = cache / f"{CONVERTING}{folder.name}"
    with file_lock(cache / f"{LOCK}-{folder.name}", str(folder), wait=True):
        if folder.is_dir():  # the process that held the lock has made it
            return folder
        log.info("converting %s once into %s", source, folder)
        shutil.rmtree(work, ignore_errors=True)  # a process that was killed may have left it
        try:
            if source.is_file():
                convert_gguf(source, work)
            else:
                convert_bin(source, work, trust_remote_code)
            work.rename(folder)
        except (OSError, ValueError, RuntimeError, KeyError, ImportError, AssertionError, UnpicklingError) as error:
            raise UserError(
                f"{source} cannot be converted ({first_line(error)}); give a safetensors copy of the model"
            ) from None
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return folder


def convert_gguf(gguf_file: Path, folder: Path) -> None:
    """Convert a GGUF file to a float32 safetensors folder with tokenizer and chat template."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    redirect_transformers()
    tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    model = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32)
    # The weights are dequantised already, but transformers refuses to save while the quantizer is attached.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def convert_bin(source: Path, folder: Path, trust_remote_code: bool) -> None:
    """Convert a folder of torch .bin files to safetensors; every other file is copied."""
    import transformers

    redirect_transformers()
    family = FAMILIES[read_json(source / "config.json")["model_type"]]
    loader: Any = getattr(transformers, family.auto)
    options = {"use_safetensors": False, "trust_remote_code": trust_remote_code}
    loader.from_pretrained(source, dtype="auto", **options).save_pretrained(folder)
    weights = {path.name for pattern in BIN_FILES for path in source.glob(pattern)}
    for file in source.iterdir():
        of_the_model = file.is_file() and file.name not in weights and not file.name.startswith(TEMPORARY)
        if of_the_model and not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)
