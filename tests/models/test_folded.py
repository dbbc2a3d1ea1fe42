"""Copies of checkpoints: every tensor once, in shards of the right size, and the files that go with the weights."""

import json
from itertools import pairwise

import torch
from safetensors.torch import load_file

from core.models.checkpoints import open_checkpoint
from core.models.folded import write_folded


def test_folding_with_nothing_copies_bit_for_bit(models, tmp_path):
    write_folded(open_checkpoint(str(models["source"])), tmp_path, lambda _, tensor: tensor, 10**9)
    for name in ("config.json", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / name).read_bytes() == (models["source"] / name).read_bytes()
    before, after = load_file(models["source"] / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_files_get_ordinary_permissions(models, tmp_path):
    write_folded(open_checkpoint(str(models["target"])), tmp_path, lambda _, tensor: tensor, 10**9)
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_a_shard_is_full_or_holds_one_tensor_that_is_larger(models, tmp_path):
    checkpoint = open_checkpoint(str(models["source"]))
    limit = max(checkpoint.sizes.values()) // 2  # the embeddings of input and output are larger
    write_folded(checkpoint, tmp_path, lambda _, tensor: tensor + 1, limit)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(checkpoint.sizes.values())}
    assert index["weight_map"].keys() == checkpoint.sizes.keys()
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == [f"model-{n:05}-of-{len(files):05}.safetensors" for n in range(1, len(files) + 1)]
    shards = [[name for name, where in index["weight_map"].items() if where == file] for file in files]
    for file, names in zip(files, shards, strict=True):
        written = load_file(tmp_path / file)
        assert written.keys() == set(names)
        assert all(torch.equal(tensor, checkpoint.tensor(name) + 1) for name, tensor in written.items())
    totals = [sum(checkpoint.sizes[name] for name in names) for names in shards]
    assert sum(len(names) == 1 and total > limit for names, total in zip(shards, totals, strict=True)) == 2
    small = [(names, total) for names, total in zip(shards, totals, strict=True) if total <= limit]
    assert len(small) == len(files) - 2
    assert all(total + checkpoint.sizes[later[0]] > limit for (_, total), (later, _) in pairwise(small))
