"""Model checkpoints: opened by name, their configs and headers read at once and single tensors when asked for."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import Tensor

from core.errors import UserError, first_line
from core.files import MANIFEST, read_json
from core.models.families import AttentionLayout, attention_layout, projection_in_tower
from core.models.locate import INDEX_FILE, SINGLE_FILE, model_folder, weight_map
from core.models.settings import ModelSettings
from core.models.transformers_log import redirect_transformers
from core.models.weight_digest import sample_digest

# Bytes per number of the dtypes that safetensors headers name; all others take one.
DTYPE_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}


@dataclass(frozen=True)
class Checkpoint:
    """One model on disk. Opening it reads the config and the headers of the tensors, never the weights.

    Implements `core.fusion.inputs.Weights`.

    Attributes:
        name: as the user gave it.
        folder: where its config and safetensors files are.
        revision: of the hub; None for the newest.
        config: its config.json.
        layout: where its projections are and how wide they are.
        trust_remote_code: whether code that comes with it may run.
        device: where tensors and models are put.
    """

    name: str
    folder: Path
    revision: str | None
    config: dict[str, Any]
    layout: AttentionLayout
    trust_remote_code: bool = False
    device: str = "cpu"

    @cached_property
    def files(self) -> dict[str, Path]:
        """Tensor name -> safetensors file. Raises UserError when there is no such file."""
        index = self.folder / INDEX_FILE
        if index.is_file():
            return {name: self.folder / file for name, file in weight_map(index).items()}
        single = self.folder / SINGLE_FILE
        if not single.is_file():
            raise UserError(
                f"{self.folder} has no model.safetensors (or its index); save the model with save_pretrained first"
            )
        try:
            with safe_open(single, "pt") as file:
                return dict.fromkeys(file.keys(), single)
        except SafetensorError as error:
            raise UserError(f"{single} is damaged ({error}); download or save the model again") from None

    @cached_property
    def tower(self) -> str:
        """The path of the text decoder in the names of this checkpoint's tensors. Raises UserError when no tensor of it
        is found."""
        return self.layout.tower_on_disk(self.files, str(self.folder))

    def tensor_name(self, layer: int, projection: str) -> str:
        """Name of one projection on disk, without `.weight`. In the loaded model it may have another: `layout.name`."""
        return f"{self.tower}.{projection_in_tower(layer, projection)}"

    def name_in_model(self, tensor: str) -> str:
        """The name in the loaded model of a tensor on disk. Names outside the text decoder and its head are returned as
        they are."""
        family = self.layout.family
        for on_disk, in_model in ((self.tower, family.tower), *((head, family.head) for head in family.heads_on_disk)):
            if tensor.startswith(on_disk + "."):
                return in_model + tensor.removeprefix(on_disk)
        return tensor

    @cached_property
    def headers(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Tensor name -> (shape, dtype as safetensors spells it), in the order in which the files hold them."""
        found: dict[str, tuple[tuple[int, ...], str]] = {}
        for path in dict.fromkeys(self.files.values()):
            try:
                with safe_open(path, "pt") as file:
                    parts = {name: file.get_slice(name) for name in file.offset_keys()}
                    found |= {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()}
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path} is damaged ({error}); download or save the model again") from None
        return found

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Tensor name -> number of bytes, in the order of `headers`."""
        return {name: math.prod(shape) * DTYPE_BYTES.get(dtype, 1) for name, (shape, dtype) in self.headers.items()}

    def tensor(self, name: str) -> Tensor:
        """One tensor in its own dtype, on the CPU. Raises UserError when the checkpoint has none of that name."""
        if name not in self.files:
            raise UserError(f"{self.folder} has no tensor {name}")
        with safe_open(self.files[name], "pt") as file:
            return file.get_tensor(name)

    def weight(self, layer: int, projection: str) -> Tensor:
        """The weight [out, in] of one projection, float32, on `device`."""
        return self.tensor(self.tensor_name(layer, projection) + ".weight").to(self.device, torch.float32)

    def bias(self, layer: int, projection: str) -> Tensor | None:
        """The bias [out] of one projection, float32, on `device`; None when the model has none."""
        name = self.tensor_name(layer, projection) + ".bias"
        return self.tensor(name).to(self.device, torch.float32) if name in self.files else None

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What tells this model from any other: its id, its revision, a digest of its config, a digest of its weights,
        and for a checkpoint of ours (`made`) the fingerprint in its manifest.

        The digest of the weights covers the headers and a sample of every tensor, so that it takes no time at 70B. A
        sample cannot see that a few rows of a tensor were changed, which is what fusing does; the fingerprint can.
        """
        weights = sample_digest(sorted(set(self.files.values())))
        config = hashlib.sha256((self.folder / "config.json").read_bytes()).hexdigest()
        path = self.folder / MANIFEST
        record = read_json(path) if path.is_file() else None
        made = record.get("fingerprint") if isinstance(record, dict) else None
        return {"id": self.name, "revision": self.revision, "config": config, "weights": weights, "made": made}

    def same_model(self, identity: dict[str, Any]) -> bool:
        """Whether an identity, as manifests hold it, is that of this model, wherever the model is stored."""
        return all(self.identity[key] == identity[key] for key in ("config", "weights", "made"))

    def load_tokenizer(self) -> Any:
        """The model's fast tokenizer. Raises UserError when it has none."""
        from transformers import AutoTokenizer

        redirect_transformers()
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.folder, trust_remote_code=self.trust_remote_code)
        except (OSError, ValueError) as error:
            raise UserError(f"{self.folder} has no usable tokenizer: {first_line(error)}") from None
        if not tokenizer("a")["input_ids"]:
            raise UserError(f"{self.folder} has no tokenizer files; copy them beside the weights")
        if not tokenizer.is_fast:
            raise UserError(f"{self.folder} has a slow tokenizer; character offsets need a fast one (tokenizer.json)")
        return tokenizer

    def check_tokenizer(self) -> None:
        """Raise UserError when there is no usable tokenizer. Where there is a tokenizer.json it is all that is read."""
        path = self.folder / "tokenizer.json"
        if not path.is_file():
            self.load_tokenizer()
            return
        try:
            Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises a bare Exception
            raise UserError(f"{path} cannot be read ({first_line(error)}); copy it again") from None

    def check_code(self) -> None:
        """Raise UserError when the model's classes are not part of transformers and may not run, or are missing."""
        if not self.layout.family.needs_code:
            return
        kind, remote = self.layout.model_type, "auto_map" in self.config
        if not self.trust_remote_code:
            raise UserError(
                f"{self.name} is a {kind} model, whose classes are not part of transformers; read the code "
                f"that comes with it, then allow it with --trust-remote-code"
            )
        if not remote and find_spec(kind) is None:
            raise UserError(
                f"{self.folder} brings no code of its own (no auto_map in config.json) and the package "
                f"{kind} is not installed; install it (pip install {kind}) or take a copy of the model "
                f"that has its modeling files"
            )
        if not remote:
            import_module(kind)  # the package registers its classes with transformers

    def load_model(
        self, dtype: str, device_map: str | dict[str, Any] | None = None, offload_folder: Path | None = None
    ) -> Any:
        """The causal language model in eval mode.

        Args:
            dtype: a torch dtype, or `auto`: float32 on a CPU, where half types are slow, and elsewhere the
                checkpoint's own.
            device_map: one of accelerate's, which says where the parts of the model go in place of `device`; `disk`
                leaves all weights in the checkpoint until they are used.
            offload_folder: where weights go that stay on disk and have to be converted first.
        Raises:
            UserError: the model's classes may not run, or are missing.
        """
        import transformers

        self.check_code()
        if dtype == "auto" and self.device == "cpu":
            dtype = "float32"
        redirect_transformers()
        loader = getattr(transformers, self.layout.family.auto)
        options = {"dtype": dtype, "trust_remote_code": self.trust_remote_code}
        if device_map is None:
            return loader.from_pretrained(self.folder, **options).to(self.device).eval()
        where = {"": "disk"} if device_map == "disk" else device_map
        return loader.from_pretrained(self.folder, **options, device_map=where, offload_folder=offload_folder).eval()


def open_checkpoint(
    name: str, revision: str | None = None, trust_remote_code: bool = False, device: str = "cpu"
) -> Checkpoint:
    """Open a model: a folder, a GGUF file, an id below $MODELS_ROOT, or a hub id (downloaded into the hub's cache).

    GGUF files and .bin weights are converted once, into $MODELS_ROOT/converted.

    Raises:
        UserError: nothing of that name exists, it has no config.json or no weights, or its family is not supported.
    """
    if not name:
        raise UserError("no model given; use --target-model and --source-model, or --config")
    folder = model_folder(name, revision, trust_remote_code)
    config = read_json(folder / "config.json")
    layout = attention_layout(config, str(folder))
    checkpoint = Checkpoint(name, folder, revision, config, layout, trust_remote_code, device)
    _ = checkpoint.tower  # this reads the names of the tensors, so that missing weights are an error now
    return checkpoint


def open_pair(models: ModelSettings, device: str) -> tuple[Checkpoint, Checkpoint]:
    """(target, source), opened on a device. Raises UserError where `open_checkpoint` does."""
    code = models.trust_remote_code
    return (
        open_checkpoint(models.target_model, models.target_revision, code, device),
        open_checkpoint(models.source_model, models.source_revision, code, device),
    )


def open_source_base(models: ModelSettings, source: Checkpoint, projections: Iterable[str]) -> Checkpoint | None:
    """The model that the source was tuned from, on the source's device; None where the settings name none.

    Args:
        projections: those of which the difference is transported.
    Raises:
        UserError: as `open_checkpoint`; or it is the source itself, of another family, or a weight has another shape.
    """
    if models.source_base is None:
        return None
    base = open_checkpoint(models.source_base, models.source_base_revision, models.trust_remote_code, source.device)
    if base.same_model(source.identity):
        raise UserError(
            f"source base {base.name} is the source {source.name} itself, which has learned nothing over it; give the "
            "model that the source was tuned from, or leave --source-base out"
        )
    check_same_shapes(source, base, projections)
    return base


def check_same_shapes(source: Checkpoint, base: Checkpoint, projections: Iterable[str]) -> None:
    """Raise UserError where the weights of some projections cannot be subtracted; the message names the tensor."""
    kinds = [f"{model.layout.model_type} model of {model.layout.n_layers} layers" for model in (base, source)]
    problem = f"it is a {kinds[0]}, and the source a {kinds[1]}" if kinds[0] != kinds[1] else None
    pairs = [(layer, name) for name in projections for layer in range(source.layout.n_layers)]
    for layer, name in [] if problem else pairs:
        tensor, in_source = (f"{model.tensor_name(layer, name)}.weight" for model in (base, source))
        shape, expected = base.headers.get(tensor, ("missing",))[0], source.headers.get(in_source, ("missing",))[0]
        if shape != expected:
            problem = f"{tensor} is {shape}, and in the source {expected}"
            break
    if problem:
        raise UserError(
            f"source base {base.name} is not what {source.name} was tuned from: {problem}; give another --source-base"
        )
