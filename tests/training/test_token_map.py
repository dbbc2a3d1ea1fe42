"""The source's tokens as tokens of the target, against the definition written out token by token."""

import pytest
from conftest import make_tokenizer
from tokenizers import Tokenizer, decoders, normalizers
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from core.training.token_map import UNMAPPED, first_token_map, piece_texts

BYTES = {letter: byte for byte, letter in bytes_to_unicode().items()}


def bytes_of(tokenizer, number):
    """The bytes of a token of a byte-level tokenizer, from its spelling."""
    return bytes(BYTES[letter] for letter in tokenizer.convert_ids_to_tokens(number))


def slowly_mapped(source, target):
    """The map of two byte-level tokenizers with the same special tokens, one token at a time."""
    found = []
    for number in range(len(source)):
        spelling = source.convert_ids_to_tokens(number)
        if spelling.startswith("<|") and spelling.endswith("|>"):  # the special tokens, of which some are the source's
            found.append(target.get_vocab().get(spelling, UNMAPPED))
            continue
        try:
            text = bytes_of(source, number).decode("utf-8")
        except UnicodeDecodeError:
            found.append(target.get_vocab().get(spelling, UNMAPPED))
        else:
            found.append(target(text, add_special_tokens=False)["input_ids"][0])
    return found


def test_every_token_is_the_first_token_of_its_text():
    source, target = make_tokenizer(500, 2), make_tokenizer(400, 1)
    found = first_token_map(source, target).tolist()
    assert found == slowly_mapped(source, target)
    assert first_token_map(target, source).tolist() == slowly_mapped(target, source)
    assert len(set(found)) > 300
    sizes = {n: len(bytes_of(target, token)) for n, token in enumerate(found) if token != UNMAPPED}
    assert any(size < len(bytes_of(source, n)) for n, size in sizes.items())  # a piece of several of its tokens


def test_equal_vocabularies_map_every_token_to_itself():
    tokenizer = make_tokenizer(400, 1)
    assert first_token_map(tokenizer, make_tokenizer(400, 1)).tolist() == list(range(len(tokenizer)))


def test_special_tokens_are_known_by_name_alone():
    """As text, <|user|> would become the target's token for `<`, which no conversation goes on with."""
    source, target = make_tokenizer(400, 1), make_tokenizer(400, 1)
    source.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    source.add_tokens(["<think>"])
    found = first_token_map(source, target).tolist()
    assert found[source.convert_tokens_to_ids("<|tool|>")] == UNMAPPED
    assert found[source.convert_tokens_to_ids("<think>")] == target("<think>", add_special_tokens=False).input_ids[0]
    assert found[source.convert_tokens_to_ids("<|user|>")] == target.convert_tokens_to_ids("<|user|>")


def blank_first_tokenizer():
    """A tokenizer as that of LLaMA 2: a blank is put before every text, and unknown characters become bytes."""
    letters = ["▁", *"modelweightà\n"]
    words = ["▁m", "▁mo", "▁mod", "▁w", "▁we", "mo", "mod", "▁▁", "\n\n"]
    vocabulary = {token: n for n, token in enumerate(dict.fromkeys(["<unk>", *letters, *words]))}
    vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    merges = [("▁", "m"), ("▁m", "o"), ("▁mo", "d"), ("▁", "w"), ("▁w", "e"), ("m", "o"), ("mo", "d")]
    merges += [("▁", "▁"), ("\n", "\n")]
    model = tokenizer_models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    blank = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(blank)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.mark.parametrize(
    ("piece", "first"),
    [(" model", "▁mod"), ("model", "mod"), ("ภาษา", "<0xE0>"), ("w", "w"), (" w", "▁w"), ("   we", "▁▁")],
)
def test_a_blank_that_a_tokenizer_adds_is_no_part_of_a_piece(piece, first):
    source, target = make_tokenizer(300, 2), blank_first_tokenizer()
    source.add_tokens([piece])
    number = source.convert_tokens_to_ids(piece)
    assert piece_texts(source)[number] == piece
    assert first_token_map(source, target)[number] == target.convert_tokens_to_ids(first)


def test_a_text_that_joins_with_the_line_break_before_it_has_no_known_first_token():
    source, target = make_tokenizer(300, 2), blank_first_tokenizer()
    source.add_tokens(["\nw"])
    assert target.tokenize("\n\nw") == ["▁", "\n\n", "w"]
    assert first_token_map(source, target)[source.convert_tokens_to_ids("\nw")] == UNMAPPED


def test_bytes_and_blanks_of_other_spellings_keep_their_meaning():
    """`Ġ` of one tokenizer is `▁` of another; `à` is a byte in one, and a letter in the other."""
    source, target = blank_first_tokenizer(), make_tokenizer(400, 1)
    found = first_token_map(source, target)[source.convert_tokens_to_ids(["▁mod", "mo", "<0x41>", "<0xE0>"])]
    first = [target.tokenize(text)[0] for text in (" mod", "mo", "A")]
    assert target.convert_ids_to_tokens(found[:3].tolist()) == first and first[0].startswith("Ġ")
    assert found[3] == UNMAPPED
    found = first_token_map(target, source)[target.convert_tokens_to_ids(["à", "Ġ"])]
    assert found.tolist() == [UNMAPPED, source.convert_tokens_to_ids("▁")]
