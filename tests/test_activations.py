"""Pooling, alignment and row order, checked against one text at a time."""

import pytest
import torch
from conftest import make_tokenizer, qwen2, sentences
from torch.testing import assert_close

from core.activations import ASIDE_EVERY, Reading, extract, read_aligned, read_texts
from core.attention import SIDES, attention_layout
from core.data import Row
from core.runs import UserError


def rows_of(texts: list[str]) -> list[Row]:
    return [Row(((None, text),)) for text in texts]


@pytest.fixture(scope="module")
def model():
    return qwen2().eval()


@pytest.fixture(scope="module")
def tokenizers():
    return make_tokenizer(400, 1), make_tokenizer(500, 2)


def layout_of(model):
    return attention_layout(model.config.to_dict(), "model")


def inputs_and_outputs(model, ids: list[int]) -> dict[tuple[str, int], torch.Tensor]:
    """Every side of one unpadded text, all tokens, by separate hooks."""
    seen = {}
    handles = []
    for layer, block in enumerate(model.model.layers):
        for c in "qkvo":

            def hook(_module, args, output, c=c, layer=layer):
                seen[c, layer] = output[0]
                seen["o_in" if c == "o" else "attn_in", layer] = args[0][0]

            handles.append(getattr(block.self_attn, f"{c}_proj").register_forward_hook(hook))
    with torch.inference_mode():
        model(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return seen


def test_layout_sizes_follow_the_config(model):
    layout = layout_of(model)
    linear = model.model.layers[2].self_attn
    assert layout.linear(model, 2, "k") is linear.k_proj
    assert [layout.size(side) for side in SIDES] == [32, 16, 16, 32, 32, 32]
    assert layout.size("o_in") == linear.o_proj.in_features


def test_text_pooling_is_the_mean_over_real_tokens_in_text_order(model):
    ids = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10], [11], [12, 13]]
    got = extract(model, layout_of(model), Reading(ids, None), 3, "test")
    assert set(got) == {(side, layer) for side in SIDES for layer in range(4)}
    for number, text in enumerate(ids):
        for key, hidden in inputs_and_outputs(model, text).items():
            assert_close(got[key][number], hidden.mean(0), atol=1e-5, rtol=1e-4)


def test_token_pooling_takes_the_picked_tokens_in_text_order(model):
    ids = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10], [11, 3], [12, 13, 14, 15]]
    picks = [[2], [1, 4, 6], [], [0, 3]]
    got = extract(model, layout_of(model), Reading(ids, picks), 2, "test")
    for key in got:
        expected = torch.cat([inputs_and_outputs(model, t)[key][p] for t, p in zip(ids, picks, strict=True) if p])
        assert_close(got[key], expected, atol=1e-5, rtol=1e-4)


def test_outputs_are_taken_before_rotary_embedding(model):
    """The recorded q is exactly the linear map of the recorded input, at every position."""
    got = extract(model, layout_of(model), Reading([[5, 6, 7, 8]], [[0, 1, 2, 3]]), 1, "test")
    linear = model.model.layers[1].self_attn.q_proj
    assert_close(got["q", 1], linear(got["attn_in", 1]).detach(), atol=1e-5, rtol=1e-4)


def test_hooks_are_gone_afterwards(model):
    extract(model, layout_of(model), Reading([[1, 2]], None), 1, "test")
    assert not any(module._forward_hooks for module in model.modules())


def test_text_without_tokens_is_refused(model):
    with pytest.raises(UserError, match="has no tokens"):
        extract(model, layout_of(model), Reading([[1], []], None), 1, "test")


def test_aligned_positions_end_the_same_prefix(tokenizers):
    small, large = tokenizers
    texts = sentences(30, 9)
    to_small, to_large, aside = read_aligned(rows_of(texts), small, large, 500, 10**6, 0)
    count = 0
    for text, ids_a, ids_b, a, b in zip(texts, to_small.ids, to_large.ids, to_small.picks, to_large.picks, strict=True):
        assert len(a) == len(b) and 0 not in a and 0 not in b
        for i, j in zip(a, b, strict=True):
            prefix = small.decode(ids_a[: i + 1])
            assert prefix == large.decode(ids_b[: j + 1]) and text.startswith(prefix)
            count += 1
    assert count == len(aside) == to_small.n_rows > 200


def test_every_shared_token_end_is_found(tokenizers):
    """Against a direct search over decoded prefixes of one ASCII text."""
    small, large = tokenizers
    text = "model layer neuron target source plan weight transport"
    ends = []
    for tokenizer in tokenizers:
        ids = tokenizer(text)["input_ids"]
        ends.append({len(tokenizer.decode(ids[: i + 1])): i for i in range(1, len(ids))})
    shared = sorted(ends[0].keys() & ends[1].keys())
    to_small, to_large, _ = read_aligned(rows_of([text]), small, large, 500, 10**6, 0)
    assert to_small.picks == [[ends[0][e] for e in shared]] and to_large.picks == [[ends[1][e] for e in shared]]


def test_of_the_bytes_of_a_letter_the_last_counts_and_a_cut_letter_does_not():
    letters = make_tokenizer(259, 1)  # bytes only: a Thai letter is three tokens
    other = make_tokenizer(259, 2)
    whole, _, _ = read_aligned(rows_of(["กขค"]), letters, other, 9, 100, 0)
    assert whole.picks == [[2, 5, 8]]
    cut, _, _ = read_aligned(rows_of(["กขค"]), letters, other, 8, 100, 0)
    assert cut.picks == [[2, 5]]


def test_row_sample_is_seeded_sorted_and_the_same_in_both_models(tokenizers):
    rows = rows_of(sentences(40, 4))
    everything, _, _ = read_aligned(rows, *tokenizers, 500, 10**6, 0)
    a, b, aside = read_aligned(rows, *tokenizers, 500, 50, 7)
    again, _, _ = read_aligned(rows, *tokenizers, 500, 50, 7)
    other, _, _ = read_aligned(rows, *tokenizers, 500, 50, 8)
    assert a.n_rows == b.n_rows == 50 and a.picks == again.picks != other.picks
    assert all(set(x) <= set(y) and x == sorted(x) for x, y in zip(a.picks, everything.picks, strict=True))
    owners = [number for number, picked in enumerate(a.picks) for _ in picked]
    assert aside.tolist() == [number % ASIDE_EVERY == ASIDE_EVERY - 1 for number in owners]


def test_roles_take_each_models_own_template_with_text_pooling_only(tokenizers):
    small, large = tokenizers
    rows = [Row((("user", "plan"), ("assistant", "weight")))]
    reading = read_texts(rows, small, 100)
    assert small.decode(reading.ids[0]) == "<|user|>plan<|end|><|assistant|>weight<|end|>"
    aligned, _, _ = read_aligned(rows, small, large, 100, 100, 0)
    assert small.decode(aligned.ids[0]) == "plan\nweight"
    assert len(read_texts(rows, small, 4).ids[0]) == 4
