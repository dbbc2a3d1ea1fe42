"""The header of a GGUF file, which says where every tensor is and what shape it has.

It is read here, because the gguf package builds several objects for every entry of the vocabulary, which takes seconds.
The format is described at https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from mmap import ACCESS_READ, mmap
from typing import BinaryIO

# Type of a value -> its bytes. Strings and arrays have a length of their own.
VALUE_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
STRING, ARRAY = 8, 9
# Tensors begin at multiples of this number of bytes, unless the file states another one.
ALIGNMENT = 32


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says of its tensors.

    Attributes:
        data: the bytes of the header itself.
        shapes: tensor -> its shape, innermost dimension first.
        starts: tensor -> the position of its first byte in the file.
    """

    data: bytes
    shapes: dict[str, tuple[int, ...]]
    starts: dict[str, int]


def read_gguf_header(handle: BinaryIO) -> GgufHeader:
    """Read the header of an open GGUF file: keys and values, which are passed over, then the list of tensors.

    Raises:
        ValueError, KeyError, IndexError, struct.error: the file is no GGUF file, or is damaged.
    """
    with mmap(handle.fileno(), 0, access=ACCESS_READ) as data:
        magic, _, n_tensors, n_keys = struct.unpack_from("<4sIQQ", data)
        if magic != b"GGUF":
            raise ValueError("no GGUF file")
        position, alignment = 24, ALIGNMENT
        for _ in range(n_keys):
            key, position = _string(data, position)
            (kind,) = struct.unpack_from("<I", data, position)
            if key == b"general.alignment":
                (alignment,) = struct.unpack_from("<I", data, position + 4)
            position = _after_value(data, position + 4, kind)
        shapes, offsets = {}, {}
        for _ in range(n_tensors):
            key, position = _string(data, position)
            (n_dimensions,) = struct.unpack_from("<I", data, position)
            name = key.decode()
            shapes[name] = struct.unpack_from(f"<{n_dimensions}Q", data, position + 4)
            position += 4 + 8 * n_dimensions + 4  # after the shape comes the type of the numbers
            (offsets[name],) = struct.unpack_from("<Q", data, position)
            position += 8
        begin = -(-position // alignment) * alignment
        return GgufHeader(data[:position], shapes, {name: begin + offset for name, offset in offsets.items()})


def _string(data: mmap, position: int) -> tuple[bytes, int]:
    """(the string at `position`, the position after it)."""
    (length,) = struct.unpack_from("<Q", data, position)
    return data[position + 8 : position + 8 + length], position + 8 + length


def _after_value(data: mmap, position: int, kind: int) -> int:
    """The position after the value of type `kind` at `position`."""
    if kind == STRING:
        return position + 8 + struct.unpack_from("<Q", data, position)[0]
    if kind != ARRAY:
        return position + VALUE_BYTES[kind]
    kind, length = struct.unpack_from("<IQ", data, position)
    position += 12
    if kind in VALUE_BYTES:
        return position + length * VALUE_BYTES[kind]
    for _ in range(length):
        position = _after_value(data, position, kind)
    return position
