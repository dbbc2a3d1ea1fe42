"""A sample of every tensor tells models apart, in each format, without reading the weights."""

import json
import struct
from pathlib import Path

import gguf
import pytest
import torch
from conftest import llama, make_tokenizer
from safetensors.torch import save_file

from core.models.checkpoints import Checkpoint, open_checkpoint
from core.models.weight_digest import sample_digest

# More than the first, middle and last MiB of a file: no part of it that is read by chance holds every tensor.
TENSORS = {f"layer.{n}.weight": torch.full((64, 1024), float(n)) for n in range(24)}


def save_safetensors(tensors: dict[str, torch.Tensor], path: Path) -> Path:
    save_file(tensors, path.with_suffix(".safetensors"))
    return path.with_suffix(".safetensors")


def save_torch(tensors: dict[str, torch.Tensor], path: Path) -> Path:
    torch.save(tensors, path.with_suffix(".bin"))
    return path.with_suffix(".bin")


def save_gguf(tensors: dict[str, torch.Tensor], path: Path) -> Path:
    writer = gguf.GGUFWriter(str(path.with_suffix(".gguf")), "llama")
    writer.add_token_list([f"token{n}" for n in range(50)])
    writer.add_token_types([1] * 50)
    writer.add_layer_norm_rms_eps(1e-5)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.with_suffix(".gguf")


@pytest.mark.parametrize("save", [save_safetensors, save_torch, save_gguf])
def test_a_change_of_any_one_tensor_is_seen_and_a_copy_is_the_same(tmp_path, save):
    tmp_path.joinpath("copy").mkdir()
    seen = {sample_digest([save(TENSORS, tmp_path / "m")]), sample_digest([save(TENSORS, tmp_path / "copy/m")])}
    assert len(seen) == 1
    for number, name in enumerate(TENSORS):
        changed = {**TENSORS, name: TENSORS[name] + 0.5}
        seen.add(sample_digest([save(changed, tmp_path / "m")]))
        assert len(seen) == number + 2, name


def test_gguf_offsets_are_those_of_the_package(tmp_path):
    """One byte at a sampled place of each tensor, found by the package that defines the format."""
    path = save_gguf(TENSORS, tmp_path / "m")
    content, before = path.read_bytes(), sample_digest([path])
    for tensor in gguf.GGUFReader(path).tensors:
        for place in (0, int(tensor.n_bytes) // 2, int(tensor.n_bytes) - 1):
            at = int(tensor.data_offset) + place
            path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
            assert sample_digest([path]) != before, (tensor.name, place)


def test_files_in_no_known_format_are_told_apart_by_their_ends_and_middle(tmp_path):
    for name in ("a.safetensors", "a.gguf", "a.bin", "a.json"):
        seen = set()
        for content in (b"x" * 40000, b"x" * 39999 + b"y", b"x" * 20000 + b"y" + b"x" * 19999, b"x", b""):
            (tmp_path / name).write_bytes(content)
            seen.add(sample_digest([tmp_path / name]))
        assert len(seen) == 5, name


def bytes_read() -> int:
    """What this process has read by system calls, from a cache or a disk."""
    counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counts["rchar"])


@pytest.mark.skipif(not Path("/proc/self/io").is_file(), reason="only Linux counts what a process reads")
def test_a_70b_model_is_opened_without_its_weights_being_read(tmp_path, monkeypatch):
    """140 GB of weights in 30 sparse files, which take no room: 3 samples of 720 tensors, and the small files."""
    config = llama().config.to_dict() | {
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "head_dim": 128,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    make_tokenizer(400, 1).save_pretrained(tmp_path)
    shapes = {
        "self_attn.q_proj": (8192, 8192),
        "self_attn.k_proj": (1024, 8192),
        "self_attn.v_proj": (1024, 8192),
        "self_attn.o_proj": (8192, 8192),
        "mlp.gate_proj": (28672, 8192),
        "mlp.up_proj": (28672, 8192),
        "mlp.down_proj": (8192, 28672),
        "input_layernorm": (8192,),
        "post_attention_layernorm": (8192,),
    }
    tensors = {f"model.layers.{layer}.{name}.weight": shape for layer in range(80) for name, shape in shapes.items()}
    where = {
        name: f"model-{number * 30 // len(tensors) + 1:05}-of-00030.safetensors" for number, name in enumerate(tensors)
    }
    for file in dict.fromkeys(where.values()):
        header, end = {}, 0
        for name in (name for name in tensors if where[name] == file):
            begin, end = end, end + 2 * torch.Size(tensors[name]).numel()
            header[name] = {"dtype": "BF16", "shape": tensors[name], "data_offsets": [begin, end]}
        head = json.dumps(header).encode()
        with open(tmp_path / file, "wb") as handle:
            handle.write(struct.pack("<Q", len(head)) + head)
            handle.truncate(8 + len(head) + end)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    # What safetensors maps into memory is in no count of the system.
    monkeypatch.setattr(Checkpoint, "tensor", lambda _, name: pytest.fail(f"{name} is read"))
    before = bytes_read()
    checkpoint = open_checkpoint(str(tmp_path))
    identity = checkpoint.identity
    # Nine MB of samples, of which a buffered file may read the rest of its block as well.
    assert bytes_read() - before < 20e6
    assert sum(checkpoint.sizes.values()) > 130e9 and len(checkpoint.sizes) == 720
    path = tmp_path / where["model.layers.41.mlp.down_proj.weight"]
    with open(path, "r+b") as handle:  # the last byte of a tensor in the middle
        handle.seek(-1, 2)
        handle.write(b"\1")
    assert open_checkpoint(str(tmp_path)).identity["weights"] != identity["weights"]
