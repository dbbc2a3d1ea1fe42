"""The tokens of one vocabulary as tokens of another: with which of its tokens the target begins to write a piece."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from core.texts.tokens import special_ids, tokenized

# In a map of tokens: this token of the source says nothing about the target's next token.
UNMAPPED = -1
# What bytes decode to that are only a part of a character.
INCOMPLETE = "\ufffd"


def first_token_map(source_tokenizer: Any, target_tokenizer: Any) -> Tensor:
    """For every token id of the source the token with which the target begins to write the same text.

    A target that has read the same characters as the source, and is to go on with the text of one of the source's
    tokens, reads the first token of that text next. It may be a shorter piece than the source's. Where the source's own
    piece is the shorter one, the target might have joined it with what follows; the map cannot know that.

    Two kinds of tokens have no text of their own. A special token becomes the target's special token of the same name.
    A token that ends inside a character, as the first byte of a Thai letter does, becomes the target's token of the
    same spelling, if that one ends inside a character as well. Others of both kinds are UNMAPPED.

    Returns:
        [number of the source's token ids] int64 on the CPU.
    Raises:
        UserError: the target's tokenizer gives no character offsets.
    """
    pieces, own_pieces = (piece_texts(tokenizer) for tokenizer in (source_tokenizer, target_tokenizer))
    source_special, target_special = special_ids(source_tokenizer), special_ids(target_tokenizer)
    vocabulary = target_tokenizer.get_vocab()
    spellings = source_tokenizer.convert_ids_to_tokens(range(len(pieces)))
    found = first_tokens(pieces, target_tokenizer, own_pieces)
    for number, (piece, spelling) in enumerate(zip(pieces, spellings, strict=True)):
        same = vocabulary.get(spelling, UNMAPPED)
        if number in source_special:
            found[number] = same if same in target_special else UNMAPPED
        elif INCOMPLETE in piece:
            found[number] = same if same != UNMAPPED and own_pieces[same] == piece else UNMAPPED
    return torch.tensor(found, dtype=torch.long)


def piece_texts(tokenizer: Any) -> list[str]:
    """The text of every token id, as it stands after other text; empty for an id that no token has.

    A token is not decoded alone, because many decoders drop the blank with which it begins.
    """
    size = max(tokenizer.get_vocab().values()) + 1
    before = tokenized(tokenizer, "a", add_special_tokens=False)["input_ids"][-1:]
    options = {"clean_up_tokenization_spaces": False}
    start = tokenizer.decode(before, **options)
    texts = tokenizer.batch_decode([[*before, number] for number in range(size)], **options)
    return [text.removeprefix(start) for text in texts]


def first_tokens(texts: list[str], tokenizer: Any, pieces: list[str]) -> list[int]:
    """The first token of every text; UNMAPPED for a text without one.

    Some tokenizers put a blank before what they read. They read each text after a line break, and of a text that they
    join with the line break the first token is unknown.

    Args:
        pieces: `piece_texts` of the tokenizer.
    """
    alone = tokenized(tokenizer, "a", add_special_tokens=False)["input_ids"][0]
    before = "" if pieces[alone] == "a" else "\n"
    encoded = tokenized(tokenizer, [before + t for t in texts], add_special_tokens=False, return_offsets_mapping=True)
    found = []
    for ids, spans in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        own = [token for token, (begin, _) in zip(ids, spans, strict=True) if begin >= len(before)]
        joined = any(begin < len(before) < end for begin, end in spans)
        found.append(own[0] if own and not joined else UNMAPPED)
    return found
