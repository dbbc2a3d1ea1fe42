"""What training starts from, and that what was trained is what is written."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from core.errors import UserError
from core.files import TEMPORARY
from core.models.checkpoints import open_checkpoint
from core.models.folded import write_folded
from core.training.start import Start, save_folded

HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture
def trained(models):
    """(the start, all weights of its loaded model after every one of them has moved)."""
    start = Start(open_checkpoint(str(models["target"])), None, [], 0.0, "interpolate")
    state = start.load(None).state_dict()
    return start, {name: value + 1 for name, value in state.items()}


def written(start, folder, state):
    folder.mkdir()
    save_folded(start, folder, state, None, 10**9)
    return load_file(folder / "model.safetensors")


def test_every_trained_weight_is_written(trained, tmp_path):
    start, state = trained
    assert HEAD in state and HEAD not in start.checkpoint.sizes  # tied, and stored once
    found = written(start, tmp_path / "a", state)
    assert found.keys() == start.checkpoint.sizes.keys()
    assert all(torch.equal(found[name], state[name]) for name in found)


@pytest.mark.parametrize("change", ["renamed", "lost", "added", "untied"])
def test_a_trained_name_that_is_not_written_is_an_error_and_nothing_is_written(trained, tmp_path, change):
    """The names of a wrapped or compiled model, of one that lost a weight, or of adapters that were not merged."""
    start, state = trained
    name = "model.layers.1.mlp.up_proj.weight"
    if change == "renamed":
        state = {name.replace("mlp.", "mlp._orig_mod."): value for name, value in state.items()}
    elif change == "lost":
        del state[name]
    elif change == "added":
        state["model.layers.1.mlp.up_proj.lora_A.weight"] = torch.ones(2, 2)
    else:
        name, state[HEAD] = HEAD, state[HEAD] + 1
    with pytest.raises(
        UserError, match=r"cannot be written: the names of the trained weights are not those of"
    ) as raised:
        written(start, tmp_path / "a", state)
    assert (name if change in ("lost", "untied") else "layers.1.mlp.") in str(raised.value) or change == "renamed"
    assert not list((tmp_path / "a").iterdir())


@pytest.mark.parametrize("lost", [HEAD, EMBEDDINGS])
def test_of_tied_weights_that_are_stored_twice_one_is_enough(models, trained, tmp_path, lost):
    """A sharded state dict may hold one of the two: the other must not keep its untrained values."""
    folder = shutil.copytree(models["target"], tmp_path / "twice")
    tensors = load_file(folder / "model.safetensors")
    tensors |= {HEAD: tensors[EMBEDDINGS].clone(), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    start = Start(open_checkpoint(str(folder)), None, [], 0.0, "interpolate")
    _, state = trained
    found = written(start, tmp_path / "a", {name: value for name, value in state.items() if name != lost})
    assert torch.equal(found[HEAD], state[HEAD]) and torch.equal(found[EMBEDDINGS], state[HEAD])
    assert torch.equal(found["model.layers.0.self_attn.rotary_emb.inv_freq"], torch.ones(3))  # no model's weight


def test_untied_embeddings_are_both_needed(models, tmp_path):
    start = Start(open_checkpoint(str(models["source"])), None, [], 0.0, "interpolate")
    state = start.load(None).state_dict()
    del state[HEAD]
    with pytest.raises(UserError, match=rf"{HEAD} \(1 in all\) cannot be written"):
        written(start, tmp_path / "a", state)


def test_files_that_describe_a_target_are_not_copied_from_it(models, tmp_path):
    """The target may be a checkpoint of ours with results, or have an index of weights in another format."""
    folder = shutil.copytree(models["target"], tmp_path / "ours")
    of_the_model = {path.name for path in folder.iterdir()} | {"vocab.json", "LICENSE", "special_tokens_map.json"}
    ours = [
        "manifest.json",
        "resolved.yaml",
        "README.md",
        "results.json",
        "loss_curve.json",
        "loss_curve.png",
        "fusion_report.json",
        "hot_residual.safetensors",
        "source_answers.jsonl",
        "task.json",
        "log.txt",
        "provenance.json",
        "pytorch_model.bin.index.json",
        "rows_read.json",
        f"{TEMPORARY}lock.json",
    ]
    for name in [*of_the_model, *ours]:
        if not (folder / name).exists():
            (folder / name).write_text("{}")
    (tmp_path / "new").mkdir()
    write_folded(open_checkpoint(str(folder)), tmp_path / "new", lambda _, tensor: tensor, 10**9)
    assert {path.name for path in (tmp_path / "new").iterdir()} == of_the_model
