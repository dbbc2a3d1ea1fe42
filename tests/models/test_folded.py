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
    totals = []
    for file in files:
        shard = load_file(tmp_path / file)
        totals.append(sum(tensor.nbytes for tensor in shard.values()))
        assert totals[-1] <= limit or len(shard) == 1
        assert {index["weight_map"][name] for name in shard} == {file}
        assert all(torch.equal(tensor, checkpoint.tensor(name) + 1) for name, tensor in shard.items())
    small = [total for total in totals if total <= limit]
    assert len(totals) - len(small) == 2 and all(a + b > limit for a, b in pairwise(small))
