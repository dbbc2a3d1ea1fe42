"""Token ids and aligned positions of two tokenizers, and the texts that are read."""

from itertools import accumulate

import pytest
import torch
from conftest import make_tokenizer, sentences

from core.data import Row
from core.errors import UserError
from core.models.reading import ASIDE_EVERY, Reading, read_aligned, read_texts, text_batches, token_ends


def rows_of(texts: list[str]) -> list[Row]:
    return [Row(((None, text),)) for text in texts]


@pytest.fixture(scope="module")
def tokenizers():
    return make_tokenizer(400, 1), make_tokenizer(500, 2)


def test_text_without_tokens_is_refused():
    with pytest.raises(UserError, match="text 2 has no tokens"):
        text_batches(Reading([[1], []], None), 10)


def test_only_texts_that_give_rows_are_read():
    reading = Reading([[1, 2], [3], [4, 5, 6]], [[0], [], [1, 2]])
    assert text_batches(reading, 100) == [[2, 0]]
    assert reading.row_numbers([2, 0]).tolist() == [0, 1, 2] and reading.row_numbers([2]).tolist() == [1, 2]
    assert reading.row_numbers([]).dtype == torch.long


def test_aligned_positions_end_the_same_prefix(tokenizers):
    small, large = tokenizers
    texts = sentences(30, 9)
    to_small, to_large, aside, _ = read_aligned(rows_of(texts), small, large, 500, 10**6, 0)
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
    to_small, to_large, _, _ = read_aligned(rows_of([text]), small, large, 500, 10**6, 0)
    assert to_small.picks == [[ends[0][e] for e in shared]] and to_large.picks == [[ends[1][e] for e in shared]]


def test_a_token_that_holds_the_first_bytes_of_the_next_letter_ends_with_neither(tokenizers):
    """Each character of a token's name stands for one byte, so the ends are known without the tokenizer's offsets."""
    crossing = 0
    for tokenizer in tokenizers:
        for text in ("ภาษาโมเดล語言 model", "ภาษาขนาดโมเดล", "模型 naïve 語言"):
            encoding = tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True)
            reached = accumulate(map(len, tokenizer.convert_ids_to_tokens(encoding["input_ids"])))
            letters = {end: n for n, end in enumerate(accumulate(len(letter.encode()) for letter in text), 1)}
            exact = {letters[end]: token for token, end in enumerate(reached) if end in letters}
            assert token_ends(encoding) == exact
            crossing += len({end for _, end in encoding["offset_mapping"]} - exact.keys())
    assert crossing  # these tokenizers have such tokens


def test_of_the_bytes_of_a_letter_the_last_counts_and_a_cut_letter_does_not():
    letters = make_tokenizer(259, 1)  # bytes only: a Thai letter is three tokens
    other = make_tokenizer(259, 2)
    whole, _, _, _ = read_aligned(rows_of(["กขค"]), letters, other, 9, 100, 0)
    assert whole.picks == [[2, 5, 8]]
    cut, _, _, _ = read_aligned(rows_of(["กขค"]), letters, other, 8, 100, 0)
    assert cut.picks == [[2, 5]]


def test_row_sample_is_seeded_sorted_and_the_same_in_both_models(tokenizers):
    rows = rows_of(sentences(40, 4))
    everything, _, _, _ = read_aligned(rows, *tokenizers, 500, 10**6, 0)
    a, b, aside, _ = read_aligned(rows, *tokenizers, 500, 50, 7)
    again, _, _, _ = read_aligned(rows, *tokenizers, 500, 50, 7)
    other, _, _, _ = read_aligned(rows, *tokenizers, 500, 50, 8)
    assert a.n_rows == b.n_rows == 50 and a.picks == again.picks != other.picks
    assert all(set(x) <= set(y) and x == sorted(x) for x, y in zip(a.picks, everything.picks, strict=True))
    owners = [number for number, picked in enumerate(a.picks) for _ in picked]
    assert aside.tolist() == [number % ASIDE_EVERY == ASIDE_EVERY - 1 for number in owners]


def test_roles_take_each_models_own_template_with_text_pooling_only(tokenizers):
    small, large = tokenizers
    rows = [Row((("user", "plan"), ("assistant", "weight")))]
    reading = read_texts(rows, small, 100)
    assert small.decode(reading.ids[0]) == "<|user|>plan<|end|><|assistant|>weight<|end|>"
    aligned, _, _, _ = read_aligned(rows, small, large, 100, 100, 0)
    assert small.decode(aligned.ids[0]) == "plan\nweight"
    assert len(read_texts(rows, small, 4).ids[0]) == 4
