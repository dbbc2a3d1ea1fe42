"""Model checkpoints: open by folder or hub id, read single tensors lazily, write folded weights atomically."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm.auto import tqdm

from core.attention import AttentionLayout, attention_layout
from core.runs import UserError, atomic_file, read_json, write_safetensors

log = logging.getLogger(__name__)

HUB_TIMEOUT_S = 5
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
# Never copied from a target into a checkpoint made from it: weights (written anew) and our own files.
NOT_COPIED = {"manifest.json", "hot_residual.safetensors", "fusion_report.json", "resolved.yaml", "README.md"}
DIGEST_BYTES = 1 << 20


@dataclass(frozen=True)
class Checkpoint:
    """One model on disk. Opening it reads the config and the tensor headers, never the weights."""

    name: str
    folder: Path
    revision: str | None
    config: dict[str, Any]
    layout: AttentionLayout
    trust_remote_code: bool = False
    device: str = "cpu"

    @cached_property
    def files(self) -> dict[str, Path]:
        """Tensor name -> safetensors file. Raises UserError when there are none."""
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            return {name: self.folder / file for name, file in read_json(index)["weight_map"].items()}
        single = self.folder / "model.safetensors"
        if not single.is_file():
            raise UserError(
                f"{self.folder} has no model.safetensors (or its index); save the model with save_pretrained first"
            )
        try:
            with safe_open(single, "pt") as file:
                return dict.fromkeys(file.keys(), single)
        except SafetensorError as error:
            raise UserError(f"{single} is damaged ({error}); download or save the model again") from None

    def tensor(self, name: str) -> Tensor:
        """One tensor in its own dtype."""
        if name not in self.files:
            raise UserError(f"{self.folder} has no tensor {name}")
        with safe_open(self.files[name], "pt") as file:
            return file.get_tensor(name)

    def weight(self, layer: int, projection: str) -> Tensor:
        """Attention weight [out, in], float32, on `device`."""
        return self.tensor(self.layout.name(layer, projection) + ".weight").to(self.device, torch.float32)

    def bias(self, layer: int, projection: str) -> Tensor | None:
        """Attention bias [out], float32, on `device`; None when the model has none."""
        name = self.layout.name(layer, projection) + ".bias"
        return self.tensor(name).to(self.device, torch.float32) if name in self.files else None

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What tells this model from any other: id, revision, hash of the config and of samples of the weights.

        Weights are sampled (size, first, middle and last MiB of every file), so that it takes no time at 70B.
        """
        digest = hashlib.sha256()
        for file in sorted(set(self.files.values())):
            size = file.stat().st_size
            digest.update(f"{file.name}:{size}".encode())
            with open(file, "rb") as handle:
                for start in (0, size // 2, max(0, size - DIGEST_BYTES)):
                    handle.seek(start)
                    digest.update(handle.read(DIGEST_BYTES))
        config = hashlib.sha256((self.folder / "config.json").read_bytes()).hexdigest()
        return {"id": self.name, "revision": self.revision, "config": config, "weights": digest.hexdigest()}

    def same_model(self, identity: dict[str, Any]) -> bool:
        """Whether `identity` (of a manifest) is this model, wherever either was stored."""
        return all(self.identity[key] == identity[key] for key in ("config", "weights"))

    def load_tokenizer(self) -> Any:
        """The model's fast tokenizer; UserError when it has none."""
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(self.folder, trust_remote_code=self.trust_remote_code)
        except (OSError, ValueError) as error:
            raise UserError(f"{self.folder} has no usable tokenizer: {_first_line(error)}") from None
        if not tokenizer("a")["input_ids"]:
            raise UserError(f"{self.folder} has no tokenizer files; copy them beside the weights")
        if not tokenizer.is_fast:
            raise UserError(f"{self.folder} has a slow tokenizer; character offsets need a fast one (tokenizer.json)")
        return tokenizer

    def load_model(self, dtype: str) -> Any:
        """The causal language model on `device`, in eval mode. dtype `auto` is float32 on a CPU, where half types are
        slow, and the checkpoint's own elsewhere."""
        from transformers import AutoModelForCausalLM

        if dtype == "auto" and self.device == "cpu":
            dtype = "float32"
        model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=dtype, trust_remote_code=self.trust_remote_code)
        return model.to(self.device).eval()


def models_root() -> Path:
    """Where model ids are looked up before the hub: $MODELS_ROOT, by default `models/` in the working folder."""
    return Path(os.environ.get("MODELS_ROOT", "models"))


def open_checkpoint(
    name: str, revision: str | None = None, trust_remote_code: bool = False, device: str = "cpu"
) -> Checkpoint:
    """Open a model: a folder, an id below $MODELS_ROOT, or a hub id (downloaded into the hub's cache).

    Raises UserError when nothing of that name exists, it has no config.json or no weights, or its family is not
    supported.
    """
    if not name:
        raise UserError("no model given; use --target-model and --source-model, or --config")
    folder = _find_folder(name, revision, HUB_FILES)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is not a model folder: it has no config.json")
    config = read_json(folder / "config.json")
    layout = attention_layout(config, str(folder))
    checkpoint = Checkpoint(name, folder, revision, config, layout, trust_remote_code, device)
    names = checkpoint.files  # reads the headers: missing weights are told before anything is loaded
    missing = layout.name(layout.n_layers - 1, "o") + ".weight"
    if missing not in names:
        raise UserError(f"{folder} has no tensor {missing}; its config.json and weights do not belong together")
    return checkpoint


def open_config(name: str, revision: str | None = None) -> tuple[dict[str, Any], AttentionLayout]:
    """(config, layout) of a model of which nothing else has to be there: a config.json, a folder, or a hub id.

    Raises UserError as `open_checkpoint`.
    """
    if not name:
        raise UserError("no model given; use --target-model and --source-model, or --config")
    path = Path(name).expanduser()
    if path.suffix != ".json":
        path = _find_folder(name, revision, ["config.json"]) / "config.json"
    if not path.is_file():
        raise UserError(f"{path} does not exist; give a config.json, a model folder or a hub id")
    config = read_json(path)
    return config, attention_layout(config, str(path))


def _find_folder(name: str, revision: str | None, files: list[str]) -> Path:
    for candidate in (Path(name).expanduser(), models_root() / name):
        if candidate.is_dir():
            return candidate
        if candidate.is_file():
            raise UserError(f"{candidate} is a file; give a model folder with config.json and safetensors")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise UserError(f"model {name} does not exist (looked for {name} and {models_root() / name})")
    return _download(name, revision, files)


def _download(name: str, revision: str | None, files: list[str]) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError

    try:
        try:
            return Path(snapshot_download(name, revision=revision, allow_patterns=files, local_files_only=True))
        except LocalEntryNotFoundError:
            HfApi().model_info(name, revision=revision, timeout=HUB_TIMEOUT_S)  # fails fast where there is no hub
        return Path(snapshot_download(name, revision=revision, allow_patterns=files, etag_timeout=HUB_TIMEOUT_S))
    except (HTTPError, HFValidationError, OSError) as error:
        raise UserError(
            f"model {name} is neither a folder, nor in {models_root()}, nor to be had from the hub "
            f"({_first_line(error)}); put a local copy at {models_root() / name}"
        ) from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def write_folded(checkpoint: Checkpoint, folder: Path, fold: Callable[[str, Tensor], Tensor]) -> None:
    """Write a copy of `checkpoint` into `folder` with every tensor passed through `fold(name, tensor)`.

    Same files, same tensor names, same dtypes; one shard in memory at a time; tokenizer, chat template and configs
    are copied. Each file is written atomically.
    """
    for file in sorted(checkpoint.folder.iterdir()):
        if file.is_file() and file.suffix in (".json", ".jinja", ".txt", ".model") and file.name not in NOT_COPIED:
            with atomic_file(folder / file.name) as temporary:
                shutil.copyfile(file, temporary)
    shards: dict[Path, list[str]] = {}
    for name, file in checkpoint.files.items():
        shards.setdefault(file, []).append(name)
    for file, names in tqdm(shards.items(), desc="writing shards", unit="shard", disable=len(shards) < 2):
        tensors = {name: fold(name, checkpoint.tensor(name)) for name in names}
        write_safetensors(folder / file.name, tensors, {"format": "pt"})


def convert_gguf(gguf_file: Path, folder: Path) -> None:
    """Convert a GGUF file once to a float32 safetensors folder with tokenizer and chat template."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    model = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32)
    # The weights are dequantised; transformers still refuses to save while the quantizer is attached.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
