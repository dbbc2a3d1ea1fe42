"""Recorded rows, checked against one text at a time; batches that do not fit in memory, and device maps."""

import logging
import random
from types import SimpleNamespace

import pytest
import torch
from conftest import make_tokenizer, qwen2, save
from torch.testing import assert_close

from core.errors import UserError
from core.files import TEMPORARY
from core.fusion.projections import ATTENTION, PROJECTIONS, recorded_sides
from core.models.activations import Recording, extract
from core.models.checkpoints import open_checkpoint
from core.models.families import attention_layout
from core.models.reading import Reading, text_batches
from core.runs.row_recorder import row_memory


@pytest.fixture(scope="module")
def model():
    return qwen2().eval()


def layout_of(model):
    return attention_layout(model.config.to_dict(), "model")


def inputs_and_outputs(model, ids: list[int]) -> dict[tuple[str, int], torch.Tensor]:
    """Every side of one unpadded text, all tokens, by separate hooks."""
    seen = {}
    handles = []
    for layer, block in enumerate(model.model.layers):
        for name, projection in PROJECTIONS.items():

            def hook(_module, args, output, name=name, side=projection.input_side, layer=layer):
                seen[name, layer] = output[0]
                seen[side, layer] = args[0][0]

            handles.append(block.get_submodule(projection.path).register_forward_hook(hook))
    with torch.inference_mode():
        model(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return seen


def test_layout_sizes_follow_the_config(model):
    layout = layout_of(model)
    linear = model.model.layers[2].self_attn
    assert layout.linear(model, 2, "k") is linear.k_proj
    assert [layout.size(side) for side in recorded_sides(ATTENTION)] == [32, 16, 16, 32, 32, 32]
    assert layout.size("o_in") == linear.o_proj.in_features


def test_text_pooling_is_the_mean_over_real_tokens_in_text_order(model):
    ids = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10], [11], [12, 13]]
    sides = recorded_sides(PROJECTIONS)
    got = extract(model, layout_of(model), Reading(ids, None), [[1, 0], [3, 2]], "test", Recording(sides))
    assert set(got) == {(side, layer) for side in sides for layer in range(4)}
    for number, text in enumerate(ids):
        for key, hidden in inputs_and_outputs(model, text).items():
            assert_close(got[key][number], hidden.mean(0), atol=1e-5, rtol=1e-4)


def test_token_pooling_takes_the_picked_tokens_in_text_order(model):
    ids = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10], [11, 3], [12, 13, 14, 15]]
    picks = [[2], [1, 4, 6], [], [0, 3]]
    got = extract(model, layout_of(model), Reading(ids, picks), [[1, 3], [0]], "test")
    assert set(got) == {(side, layer) for side in recorded_sides(ATTENTION) for layer in range(4)}
    for key in got:
        expected = torch.cat([inputs_and_outputs(model, t)[key][p] for t, p in zip(ids, picks, strict=True) if p])
        assert_close(got[key], expected, atol=1e-5, rtol=1e-4)


def test_outputs_are_taken_before_rotary_embedding(model):
    """The recorded q is exactly the linear map of the recorded input, at every position."""
    got = extract(model, layout_of(model), Reading([[5, 6, 7, 8]], [[0, 1, 2, 3]]), [[0]], "test")
    linear = model.model.layers[1].self_attn.q_proj
    assert_close(got["q", 1], linear(got["attn_in", 1]).detach(), atol=1e-5, rtol=1e-4)


def test_hooks_are_gone_afterwards(model):
    extract(model, layout_of(model), Reading([[1, 2]], None), [[0]], "test")
    assert not any(module._forward_hooks for module in model.modules())


@pytest.fixture(scope="module")
def long_reading():
    rng = random.Random(1)
    return Reading([[rng.randrange(500) for _ in range(rng.randint(1, 20))] for _ in range(40)], None)


def memory_for(model, tokens: int, accelerator: bool) -> list[int]:
    """Let the model's backbone run out of memory beyond so many tokens; returns the sizes that it was asked for."""
    asked = []

    def check(_module, _args, keywords):
        asked.append(keywords["input_ids"].numel())
        if asked[-1] > tokens:
            if accelerator:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            torch.empty(1 << 60, dtype=torch.int8)  # what the CPU's allocator really says

    model.model.register_forward_pre_hook(check, with_kwargs=True)
    return asked


@pytest.mark.parametrize("accelerator", [True, False])
def test_out_of_memory_halves_the_batch_and_loses_nothing(long_reading, accelerator, caplog):
    model = qwen2().eval()
    batches = text_batches(long_reading, 200)
    expected = extract(model, layout_of(model), long_reading, batches, "test")
    asked = memory_for(model, 60, accelerator)
    with caplog.at_level(logging.WARNING):
        got = extract(model, layout_of(model), long_reading, batches, "test")
    assert got.keys() == expected.keys()
    for key, rows in expected.items():
        assert_close(got[key], rows, atol=1e-5, rtol=1e-4)
    failed = [size for size in asked if size > 60]
    assert failed == sorted(failed, reverse=True) and 2 <= len(failed) <= 3  # 200, 100, 60
    assert sum("halving the batch" in r.getMessage() for r in caplog.records) == len(failed)


def test_text_that_does_not_fit_alone_is_named(long_reading):
    model = qwen2().eval()
    longest = max(range(40), key=lambda n: len(long_reading.ids[n]))
    memory_for(model, len(long_reading.ids[longest]) - 1, True)
    with pytest.raises(UserError, match=rf"text {longest + 1} \(20 tokens\) does not fit .*--max-tokens.*--device-map"):
        extract(model, layout_of(model), long_reading, text_batches(long_reading, 200), "test")
    assert not any(module._forward_hooks for module in model.modules())


def test_other_errors_of_the_model_are_not_taken_for_memory(long_reading):
    model = qwen2().eval()
    with pytest.raises(IndexError):
        extract(model, layout_of(model), Reading([[10**6]], None), [[0]], "test")


def test_rows_beyond_the_budget_are_the_same_and_leave_nothing(model, long_reading, tmp_path):
    arguments = model, layout_of(model), long_reading, text_batches(long_reading, 100), "test"
    expected = extract(*arguments)
    with row_memory(tmp_path, 100, 99) as allocate:
        got = extract(*arguments, Recording(allocate=allocate))
        assert all(torch.equal(got[key], rows) for key, rows in expected.items())
        (place,) = tmp_path.iterdir()
        assert place.name.startswith(TEMPORARY) and len(list(place.iterdir())) == len(expected)
    assert not list(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt), row_memory(tmp_path, 100, 99):
        raise KeyboardInterrupt
    with row_memory(tmp_path, 100, 100):
        assert not list(tmp_path.iterdir())


def test_rows_that_the_disk_cannot_hold_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=2**31 - 1))
    with pytest.raises(UserError, match=r"2\.0 GiB free.* need 2\.0 GiB"), row_memory(tmp_path, 2**30, 0):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("where", ["auto", "cpu", "disk", "layers"])
def test_device_maps_give_the_same_rows(long_reading, tmp_path, where, dtype):
    """`layers`: every second layer and the embedding stay on disk."""
    folder = save(qwen2().to(torch.bfloat16), make_tokenizer(500, 2), tmp_path / "model")
    checkpoint = open_checkpoint(str(folder))
    layers = {f"model.layers.{n}": "disk" if n % 2 else "cpu" for n in range(4)}
    rest = {"model.embed_tokens": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}
    model = checkpoint.load_model(dtype, {**layers, **rest} if where == "layers" else where, tmp_path / "offload")
    on_disk = [name for name, parameter in model.named_parameters() if parameter.device.type == "meta"]
    assert ("model.layers.1.self_attn.q_proj.weight" in on_disk) == (where in ("disk", "layers"))
    assert ("model.layers.0.self_attn.q_proj.weight" in on_disk) == (where == "disk")
    batches = text_batches(long_reading, 100)
    expected = extract(checkpoint.load_model(dtype), checkpoint.layout, long_reading, batches, "test")
    got = extract(model, checkpoint.layout, long_reading, batches, "test")
    assert all(torch.equal(got[key], rows) for key, rows in expected.items())
