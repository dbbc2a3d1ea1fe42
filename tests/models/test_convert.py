"""Conversion of GGUF files and folders of .bin weights, once."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, llama, make_tokenizer
from gguf_files import write_gguf
from safetensors.torch import load_file
from transformers.utils import logging as transformers_logging

from core.errors import UserError
from core.files import TEMPORARY
from core.models import convert
from core.models.checkpoints import open_checkpoint
from core.models.families import gguf_config, stated_layout
from core.models.gguf_header import read_gguf_header


def test_gguf_is_converted_once_to_a_plain_folder(tmp_path, monkeypatch, capfd):
    """A real (tiny) GGUF file written with the gguf package, through the real converter, which draws no bars."""
    transformers_logging.set_tqdm_hook(None)  # as in a new process
    model = llama(vocab_size=300, head_dim=8)
    tokenizer = make_tokenizer(300, 1)
    write_gguf(tmp_path / "m.gguf", model, tokenizer)
    monkeypatch.setenv("MODELS_ROOT", str(tmp_path / "cache"))
    made = open_checkpoint(str(tmp_path / "m.gguf"))
    assert made.folder.parent == tmp_path / "cache" / "converted"
    assert "Writing model shards" not in capfd.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(convert, "convert_gguf", lambda *_: pytest.fail("converted already"))
        assert open_checkpoint(str(tmp_path / "m.gguf")).folder == made.folder
    with open(tmp_path / "m.gguf", "rb") as file:
        assert stated_layout(gguf_config(read_gguf_header(file))) == made.layout
    assert made.layout.n_layers == 3 and made.load_tokenizer().is_fast
    assert torch.equal(made.weight(1, "v"), model.model.layers[1].self_attn.v_proj.weight.detach())
    assert "quantization_config" not in made.config


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
