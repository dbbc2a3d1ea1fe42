"""Opening, identity, and damaged files."""

import json
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file

from core.errors import UserError
from core.models.checkpoints import open_checkpoint
from core.models.families import attention_layout
from core.models.locate import missing_step


def test_weights_are_read_one_at_a_time_in_float32(models):
    checkpoint = open_checkpoint(str(models["source"]))
    state = load_file(models["source"] / "model.safetensors")
    assert torch.equal(checkpoint.weight(2, "k"), state["model.layers.2.self_attn.k_proj.weight"])
    assert torch.equal(checkpoint.bias(2, "k"), state["model.layers.2.self_attn.k_proj.bias"])
    assert checkpoint.bias(2, "o") is None
    with pytest.raises(UserError, match=r"has no tensor model\.layers\.9"):
        checkpoint.weight(9, "k")


def test_identity_tells_models_of_one_shape_apart_but_not_copies(models, tmp_path):
    target, other = open_checkpoint(str(models["target"])), open_checkpoint(str(models["other"]))
    shutil.copytree(models["target"], tmp_path / "copy")
    assert open_checkpoint(str(tmp_path / "copy")).same_model(target.identity)
    assert not other.same_model(target.identity)


def test_a_checkpoint_of_ours_is_told_apart_by_its_manifest(fused, tmp_path):
    """A sample of weights cannot see that some rows were fused with another strength."""
    copy = shutil.copytree(fused, tmp_path / "copy")
    identity = open_checkpoint(str(fused)).identity
    assert open_checkpoint(str(copy)).same_model(identity)
    manifest = json.loads((copy / "manifest.json").read_text()) | {"fingerprint": "another"}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert not open_checkpoint(str(copy)).same_model(identity)


def test_models_root_is_searched(models, monkeypatch):
    monkeypatch.setenv("MODELS_ROOT", str(models["target"].parent))
    assert open_checkpoint("target").folder == models["target"]


def test_a_revision_of_a_local_copy_is_refused(models, monkeypatch):
    """It would be ignored, and recorded as if it had been read."""
    monkeypatch.setenv("MODELS_ROOT", str(models["target"].parent))
    for name in ("target", str(models["target"])):
        for read in (open_checkpoint, missing_step):
            with pytest.raises(UserError, match="target is a local copy, which has no revisions, and v9 was asked for"):
                read(name, "v9")


def test_no_hub_gives_up_within_seconds():
    start = time.monotonic()
    with pytest.raises(UserError, match="put a local copy at"):
        open_checkpoint("nobody/nothing")
    assert time.monotonic() - start < 15


def test_damaged_weights_and_config_are_named(models, tmp_path):
    shutil.copytree(models["target"], tmp_path / "m")
    weights = tmp_path / "m/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:50])
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        open_checkpoint(str(tmp_path / "m")).weight(0, "q")
    (tmp_path / "m/config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is not valid JSON"):
        open_checkpoint(str(tmp_path / "m"))


def test_config_without_head_dim_or_kv_heads():
    layout = attention_layout(
        {"model_type": "llama", "hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 1}, "x"
    )
    assert (layout.head_dim, layout.n_kv_heads, layout.size("k")) == (8, 3, 24)


def test_tokenizer_that_is_not_there_is_noticed(models, tmp_path):
    shutil.copytree(models["source"], tmp_path / "m")
    for path in (tmp_path / "m").glob("tokenizer*"):
        path.unlink()
    with pytest.raises(UserError, match="tokenizer"):
        open_checkpoint(str(tmp_path / "m")).load_tokenizer()


def test_shard_sizes_are_bytes_in_any_spelling():
    from core.runs.settings import Experiment

    sizes = {"5GB": 5 * 10**9, "5gb": 5 * 10**9, "5GiB": 5 * 2**30, "5gib": 5 * 2**30, "500MB": 5 * 10**8}
    assert {text: Experiment.of(max_shard_size=text).output.max_shard_bytes for text in sizes} == sizes
