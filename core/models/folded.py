"""A copy of a checkpoint whose weights are folded on the way: a plain Hugging Face folder."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor

from core.files import atomic_file, write_json, write_safetensors
from core.models.checkpoints import Checkpoint
from core.models.convert import NOT_COPIED
from core.models.locate import INDEX_FILE
from core.progress import Progress

# The terms of a model, which go with every copy of it.
LICENCE_FILE = re.compile(r"(LICEN[CS]E|NOTICE|USE_POLICY|COPYING)", re.IGNORECASE)


def write_folded(
    checkpoint: Checkpoint, folder: Path, fold: Callable[[str, Tensor], Tensor], max_shard_bytes: int
) -> None:
    """Write a copy of `checkpoint` into `folder`, with every tensor passed through `fold(name, tensor)`.

    Names and dtypes of the tensors stay the same, and tokenizer, chat template and configs are copied. A shard holds at
    most `max_shard_bytes`, unless a single tensor is larger. One shard at a time is in memory; each is written
    atomically, and the index of all comes last.
    """
    for file in sorted(checkpoint.folder.iterdir()):
        known = file.suffix in (".json", ".jinja", ".txt", ".model", ".py") or LICENCE_FILE.match(file.name)
        if file.is_file() and known and not NOT_COPIED.fullmatch(file.name):
            with atomic_file(folder / file.name) as temporary:
                shutil.copyfile(file, temporary)
    split = split_state_dict_into_shards_factory(
        checkpoint.sizes,  # sizes in place of tensors, none of which has to be in memory
        get_storage_size=lambda size: size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    shards = split.filename_to_tensors
    for file_name, names in Progress(shards.items(), desc="writing shards", unit="shards", disable=len(shards) < 2):
        tensors = {name: fold(name, checkpoint.tensor(name)) for name in names}
        write_safetensors(folder / file_name, tensors, {"format": "pt"})
        del tensors  # before the next shard is filled
    if split.is_sharded:
        write_json(folder / INDEX_FILE, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})
