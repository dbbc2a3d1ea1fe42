"""Held-out rows whose text nearly equals the text of a row in another part of the split."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence

import numpy as np

from core.progress import Progress
from core.texts.rows import Row, normalised
from core.texts.split import prompt_threshold

# Rows whose sets of word sequences have at least this Jaccard similarity are near duplicates.
SIMILARITY = 0.8
SHINGLE_WORDS = 5
PERMUTATIONS = 128
# (bands, rows per band) of the MinHash index. It misses 1 of 20,000 pairs of similarity 0.8.
BANDS = (25, 5)
# A word. In scripts that put no space between words (Thai, Lao, Burmese, Khmer, Chinese, Japanese) every character is
# one.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")


def near_duplicates(held_out: Sequence[Row], others: Sequence[Row]) -> list[Row]:
    """The held-out rows that nearly equal one of the other rows.

    Two texts are compared by their sets of all sequences of SHINGLE_WORDS words, without the sequences that a template
    puts into many rows. They are near duplicates when the sets' Jaccard similarity, |a and b| / |a or b|, is at least
    SIMILARITY. A MinHash index finds the pairs that may be similar, and the exact sets decide.
    """
    from datasketch import MinHash, MinHashLSH  # imports scipy, and only held-out rows need it

    held_out_hashes, other_hashes = _shingle_hashes(held_out, others)
    options = {"num_perm": PERMUTATIONS, "hashfunc": int}
    index = MinHashLSH(num_perm=PERMUTATIONS, params=BANDS)
    for number, sketch in enumerate(MinHash.generator(held_out_hashes, **options)):
        if len(held_out_hashes[number]):
            index.insert(number, sketch)
    found: set[int] = set()
    sketches = zip(other_hashes, MinHash.generator(other_hashes, **options), strict=True)
    for hashes, sketch in Progress(sketches, "finding near duplicates", len(other_hashes), unit="texts", delay=1):
        if len(hashes):
            candidates = set(index.query(sketch)) - found
            found |= {number for number in candidates if _jaccard(held_out_hashes[number], hashes) >= SIMILARITY}
    return [held_out[number] for number in sorted(found)]


def _shingle_hashes(*parts: Sequence[Row]) -> list[list[np.ndarray]]:
    """The sorted hashes of each row's word sequences, without those that a template puts into many rows."""
    hashes = [[_hashes(row.own_text) for row in rows] for rows in parts]
    every = [found for rows in hashes for found in rows]
    values, counts = np.unique(np.concatenate([np.empty(0, np.uint32), *every]), return_counts=True)
    common = values[counts > prompt_threshold(len(every))]
    return [[np.setdiff1d(found, common, assume_unique=True) for found in rows] for rows in hashes]


def _hashes(text: str) -> np.ndarray:
    """Sorted hashes of all sequences of SHINGLE_WORDS words; a shorter text is one sequence."""
    words = WORD.findall(normalised(text))
    ends = range(min(SHINGLE_WORDS, len(words)), len(words) + 1) if words else ()
    sequences = {" ".join(words[max(0, end - SHINGLE_WORDS) : end]) for end in ends}
    return np.array(sorted({zlib.crc32(sequence.encode()) for sequence in sequences}), dtype=np.uint32)


def _jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Jaccard similarity of two sets, given as sorted arrays."""
    both = len(np.intersect1d(a, b, assume_unique=True))
    return both / (len(a) + len(b) - both)
