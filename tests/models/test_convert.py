"""Conversion of GGUF files and folders of .bin weights, once, and the config of a GGUF file."""

import json
import shutil
import subprocess
import sys

import gguf
import numpy as np
import pytest
import torch
from conftest import ROOT, llama, make_tokenizer
from safetensors.torch import load_file

from core.errors import UserError
from core.files import TEMPORARY
from core.models import convert
from core.models.checkpoints import open_checkpoint, open_config

# Name in transformers -> name in GGUF files.
GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(path, model, tokenizer):
    """A pico LLaMA with tied embeddings, as the gguf package writes it."""
    writer = gguf.GGUFWriter(str(path), "llama")
    config = model.config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(8)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(300)
    writer.add_tokenizer_model("gpt2")
    tokens = tokenizer.convert_ids_to_tokens(range(300))
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 300)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(m) if isinstance(m, list) else m for m in merges])
    writer.add_eos_token_id(0)
    for name, value in model.state_dict().items():
        module = name.removesuffix(".weight")
        if module.startswith("model.layers"):
            _, _, layer, part = module.split(".", 3)
            writer.add_tensor(f"blk.{layer}.{GGUF_NAMES[part]}.weight", value.numpy())
        elif module in GGUF_NAMES:  # the embeddings are tied
            writer.add_tensor(f"{GGUF_NAMES[module]}.weight", value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_is_converted_once_to_a_plain_folder(tmp_path, monkeypatch):
    """A real (tiny) GGUF file written with the gguf package, through the real converter."""
    model = llama(vocab_size=300, head_dim=8)
    tokenizer = make_tokenizer(300, 1)
    write_gguf(tmp_path / "m.gguf", model, tokenizer)
    monkeypatch.setenv("MODELS_ROOT", str(tmp_path / "cache"))
    made = open_checkpoint(str(tmp_path / "m.gguf"))
    assert made.folder.parent == tmp_path / "cache" / "converted"
    with monkeypatch.context() as patch:
        patch.setattr(convert, "convert_gguf", lambda *_: pytest.fail("converted already"))
        assert open_checkpoint(str(tmp_path / "m.gguf")).folder == made.folder
    assert open_config(str(tmp_path / "m.gguf"))[1] == made.layout
    check_gguf_config(tmp_path / "m.gguf", monkeypatch)
    assert made.layout.n_layers == 3 and made.load_tokenizer().is_fast
    assert torch.equal(made.weight(1, "v"), model.model.layers[1].self_attn.v_proj.weight.detach())
    assert "quantization_config" not in made.config


def check_gguf_config(path, monkeypatch):
    """The config is what transformers makes of the whole file, and the vocabulary is not read for it: entry by entry
    that took 20 seconds for 150,000 tokens."""
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    expected = load_gguf_checkpoint(str(path), return_tensors=False)["config"]
    reads = []
    get = gguf.GGUFReader._get
    monkeypatch.setattr(gguf.GGUFReader, "_get", lambda *args, **rest: reads.append(1) or get(*args, **rest))
    assert convert.gguf_config(path) == expected and len(reads) < 150
    monkeypatch.undo()


@pytest.mark.parametrize("tied", [True, False])
def test_gguf_config_without_a_vocabulary_size_counts_the_tokens(tied, tmp_path, monkeypatch):
    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "qwen2")
    writer.add_name("pico")
    writer.add_block_count(2)
    writer.add_embedding_length(32)
    writer.add_head_count(4)
    writer.add_rope_freq_base(1e6)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{n}" for n in range(400)])
    writer.add_eos_token_id(3)
    writer.add_tensor("token_embd.weight" if tied else "output.weight", np.zeros((4, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    check_gguf_config(tmp_path / "m.gguf", monkeypatch)
    config = convert.gguf_config(tmp_path / "m.gguf")
    assert config["vocab_size"] == 400 and config["tie_word_embeddings"] == tied and config["eos_token_id"] == 3


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF" + b"x" * 100, b"GGUF\x03\0\0\0" + b"\xff" * 60])
def test_a_config_of_a_broken_gguf_is_told(content, tmp_path):
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(UserError, match=r"m\.gguf is not a GGUF file that transformers can read"):
        convert.gguf_config(tmp_path / "m.gguf")


def test_broken_gguf_is_told_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("MODELS_ROOT", str(tmp_path / "cache"))
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + b"x" * 100)
    with pytest.raises(UserError, match=r"m\.gguf cannot be converted .*give a safetensors copy"):
        open_checkpoint(str(tmp_path / "m.gguf"))
    assert not list((tmp_path / "cache").rglob("*m-*"))


def test_bin_weights_go_through_safe_loading(models, tmp_path, monkeypatch):
    monkeypatch.setenv("MODELS_ROOT", str(tmp_path / "cache"))
    folder = tmp_path / "old"
    shutil.copytree(models["source"], folder)
    state = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    config = json.loads((folder / "config.json").read_text()) | {"dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    made = open_checkpoint(str(folder))
    assert made.folder != folder and made.load_tokenizer().is_fast
    assert made.tensor("model.layers.1.self_attn.k_proj.weight").dtype == torch.bfloat16
    assert all(torch.equal(made.tensor(name), tensor) for name, tensor in state.items())
    for name in (f"{TEMPORARY}lock.json", "rows_read.json"):  # of ours: the model is the same
        (folder / name).write_text("{}")
    assert open_checkpoint(str(folder)).folder == made.folder
    convert.convert_bin(folder, tmp_path / "again", False)
    assert not (tmp_path / "again" / f"{TEMPORARY}lock.json").exists()

    class Trap:
        def __reduce__(self):
            return (print, ("code of a pickle ran",))

    torch.save({"x": Trap()}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be converted"):
        open_checkpoint(str(folder))


def test_converting_twice_at_once_waits_for_the_first(models, tmp_path, monkeypatch):
    """A second process wants the same model while this one converts it; it gets this one's copy."""
    folder, cache = tmp_path / "old", tmp_path / "cache"
    shutil.copytree(models["source"], folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    original, others = convert.convert_bin, []
    command = (
        "from core.models import convert; from pathlib import Path; import sys; a, b = map(Path, sys.argv[1:])\n"
        "convert.convert_bin = lambda *_: sys.exit('converted a second time')\n"
        "import logging; logging.basicConfig(level=logging.INFO)\n"
        "print(convert.converted(a, b))"
    )

    def with_another_meanwhile(*arguments):
        other = subprocess.Popen(
            [sys.executable, "-c", command, str(folder), str(cache)],
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        others.append(other)
        while "waiting for it" not in (line := other.stderr.readline()):
            assert line, "it did not wait"
        original(*arguments)

    monkeypatch.setattr(convert, "convert_bin", with_another_meanwhile)
    made = convert.converted(folder, cache)
    assert others[0].communicate()[0].strip() == str(made) and others[0].returncode == 0
    assert [path.name for path in cache.iterdir()] == [made.name] and (made / "model.safetensors").is_file()
    monkeypatch.setattr(convert, "convert_bin", original)
    config = json.loads((folder / "config.json").read_text()) | {"rms_norm_eps": 0.5}
    (folder / "config.json").write_text(json.dumps(config))
    assert convert.converted(folder, cache) != made  # another config is another model
