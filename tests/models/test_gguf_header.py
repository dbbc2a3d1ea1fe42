"""The header of a GGUF file, read without the gguf package, and the layout that it states."""

import gguf
import numpy as np
import pytest

from core.models.families import attention_layout, gguf_config, stated_layout
from core.models.gguf_header import read_gguf_header


def header_of(path):
    with open(path, "rb") as file:
        return read_gguf_header(file)


def save_gguf(path, architecture, kv_heads=None, alignment=None):
    """A file of one layer with 4 heads of 8, hidden size 32 and 400 tokens; other keys are of every type."""
    writer = gguf.GGUFWriter(str(path), architecture)
    if alignment:
        writer.add_custom_alignment(alignment)
    writer.add_name("pico")
    writer.add_block_count(1)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    if kv_heads:
        writer.add_head_count_kv(kv_heads)
    writer.add_key_length(8)
    writer.add_rope_freq_base(1e6)
    writer.add_token_list([f"t{n}" for n in range(400)])
    writer.add_token_types([1] * 400)
    writer.add_int8("a.i8", -3)
    writer.add_uint16("a.u16", 60000)
    writer.add_uint64("a.u64", 2**40)
    writer.add_float64("a.f64", 0.1)
    writer.add_bool("a.bool", True)
    writer.add_eos_token_id(3)
    for name, shape in (("token_embd", (400, 32)), ("blk.0.attn_q", (32, 32)), ("output_norm", (32,))):
        writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("alignment", [None, 256])
def test_the_header_is_what_the_package_reads(tmp_path, alignment):
    path = save_gguf(tmp_path / "m.gguf", "qwen2", alignment=alignment)
    header, reader = header_of(path), gguf.GGUFReader(path)
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert header.values.keys() == fields.keys()
    for name, value in header.values.items():
        assert value is None if fields[name].types[0] == gguf.GGUFValueType.ARRAY else value == fields[name].contents()
    assert header.shapes == {tensor.name: tuple(map(int, tensor.shape)) for tensor in reader.tensors}
    assert header.starts == {tensor.name: int(tensor.data_offset) for tensor in reader.tensors}
    assert path.read_bytes().startswith(header.data) and len(header.data) <= min(header.starts.values())


@pytest.mark.parametrize("kv_heads", [None, 2])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma3"])
def test_the_layout_is_that_of_the_config_that_transformers_makes(tmp_path, architecture, kv_heads):
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    path = save_gguf(tmp_path / "m.gguf", architecture, kv_heads)
    config = gguf_config(header_of(path))
    expected = load_gguf_checkpoint(str(path), return_tensors=False)["config"]
    assert config["model_type"] == expected["model_type"]
    expected = attention_layout({"num_key_value_heads": 4, "head_dim": 8, **expected}, "m.gguf")
    assert stated_layout(config) == attention_layout(config, "m.gguf") == expected
