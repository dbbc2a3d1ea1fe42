"""The header of a GGUF file: its keys with their values, and where every tensor is and what shape it has.

It is read here, because the gguf package builds several objects for every entry of the vocabulary, which takes seconds.
The format is described at https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from mmap import ACCESS_READ, mmap
from typing import Any, BinaryIO

# Type of a number -> its format for the module struct. Strings and arrays have a length of their own.
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
# Tensors begin at multiples of this number of bytes, unless the file states another one.
ALIGNMENT = 32


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says of its model and its tensors.

    Attributes:
        data: the bytes of the header itself.
        values: key -> number or string; None for an array, such as the vocabulary, which is not read.
        shapes: tensor -> its shape, innermost dimension first.
        starts: tensor -> the position of its first byte in the file.
    """

    data: bytes
    values: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    starts: dict[str, int]


def read_gguf_header(handle: BinaryIO) -> GgufHeader:
    """Read the header of an open GGUF file.

    Raises:
        ValueError: the file is no GGUF file, or is damaged.
    """
    with mmap(handle.fileno(), 0, access=ACCESS_READ) as data:
        try:
            return _read(data)
        except (LookupError, OverflowError, struct.error) as error:
            raise ValueError(f"its header is damaged: {error}") from None


def _read(data: mmap) -> GgufHeader:
    magic, _, n_tensors, n_keys = struct.unpack_from("<4sIQQ", data)
    if magic != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    position = 24
    values: dict[str, Any] = {}
    for _ in range(n_keys):
        key, position = _string(data, position)
        (kind,) = struct.unpack_from("<I", data, position)
        values[key], position = _value(data, position + 4, kind)
    shapes, offsets = {}, {}
    for _ in range(n_tensors):
        name, position = _string(data, position)
        (n_dimensions,) = struct.unpack_from("<I", data, position)
        shapes[name] = struct.unpack_from(f"<{n_dimensions}Q", data, position + 4)
        position += 4 + 8 * n_dimensions + 4  # after the shape comes the type of the numbers
        (offsets[name],) = struct.unpack_from("<Q", data, position)
        position += 8
    alignment = values.get("general.alignment", ALIGNMENT)
    begin = -(-position // alignment) * alignment
    return GgufHeader(data[:position], values, shapes, {name: begin + offset for name, offset in offsets.items()})


def _string(data: mmap, position: int) -> tuple[str, int]:
    """(the string at `position`, the position after it)."""
    (length,) = struct.unpack_from("<Q", data, position)
    end = position + 8 + length
    return data[position + 8 : end].decode(errors="replace"), end


def _value(data: mmap, position: int, kind: int) -> tuple[Any, int]:
    """(the number or string of type `kind` at `position`, the position after it); None in place of an array."""
    if kind == STRING:
        return _string(data, position)
    if kind != ARRAY:
        number = "<" + NUMBERS[kind]
        return struct.unpack_from(number, data, position)[0], position + struct.calcsize(number)
    kind, length = struct.unpack_from("<IQ", data, position)
    position += 12
    if kind in NUMBERS:
        return None, position + length * struct.calcsize("<" + NUMBERS[kind])
    for _ in range(length):
        _, position = _value(data, position, kind)
    return None, position
