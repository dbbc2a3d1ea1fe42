"""A digest of files of weights that takes no time at any size: of their headers and a sample of every tensor.

Three formats are read far enough to find where every tensor begins and ends: safetensors, torch's own and GGUF.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zipfile
from collections.abc import Iterable
from itertools import pairwise
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import BinaryIO

# So many bytes are read at the beginning of every tensor, in its middle and at its end.
SAMPLE_BYTES = 4096
# GGUF: type of a value -> its number of bytes, for those of a fixed size; the types of strings and arrays; and the
# alignment of a file that states none.
GGUF_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
GGUF_STRING, GGUF_ARRAY, GGUF_ALIGNMENT = 8, 9, 32
# Where tensors begin and end in a file, in bytes.
Spans = list[tuple[int, int]]


def sample_digest(files: Iterable[Path]) -> str:
    """SHA-256 of the names, sizes and headers of files and of samples of every tensor in them.

    A change that leaves every sampled byte alone is not seen, such as one of a few rows of a large tensor.
    """
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        with open(file, "rb") as handle:
            header, spans = _tensors(file, handle, size)
            digest.update(header)
            for begin, end in spans:
                for start in sorted({begin, (begin + end - SAMPLE_BYTES) // 2, end - SAMPLE_BYTES}):
                    handle.seek(max(begin, start))
                    digest.update(handle.read(min(SAMPLE_BYTES, end - begin)))
    return digest.hexdigest()


def _tensors(file: Path, handle: BinaryIO, size: int) -> tuple[bytes, Spans]:
    """(header, where each tensor is). A file that is damaged or has another format counts as one tensor without a
    header."""
    readers = {".safetensors": _safetensors, ".gguf": _gguf, ".bin": _torch}
    try:
        return readers[file.suffix](handle, size)
    except (KeyError, ValueError, IndexError, TypeError, struct.error, zipfile.BadZipFile):
        return b"", [(0, size)]


def _safetensors(handle: BinaryIO, size: int) -> tuple[bytes, Spans]:
    length = struct.unpack("<Q", handle.read(8))[0]
    if length > size:
        raise ValueError("no header")
    header = handle.read(length)
    entries = [entry["data_offsets"] for name, entry in json.loads(header).items() if name != "__metadata__"]
    return header, sorted((8 + length + begin, 8 + length + end) for begin, end in entries)


def _torch(handle: BinaryIO, size: int) -> tuple[bytes, Spans]:
    """An uncompressed zip archive with one entry per tensor, whose directory has a checksum of each."""
    with zipfile.ZipFile(handle) as archive:
        entries = archive.infolist()
    header = "\n".join(f"{entry.filename} {entry.file_size} {entry.CRC}" for entry in entries)
    starts = [entry.header_offset for entry in entries]
    return header.encode(), list(pairwise([*starts, size]))


def _gguf(handle: BinaryIO, size: int) -> tuple[bytes, Spans]:
    """Keys and values, then a list of tensors with their offsets. It is read here because the package for the format
    takes seconds for the vocabulary alone."""
    with mmap(handle.fileno(), 0, access=ACCESS_READ) as data:
        magic, _, n_tensors, n_keys = struct.unpack_from("<4sIQQ", data)
        if magic != b"GGUF":
            raise ValueError("no GGUF file")
        position, alignment = 24, GGUF_ALIGNMENT
        for _ in range(n_keys):
            key, position = _gguf_string(data, position)
            (kind,) = struct.unpack_from("<I", data, position)
            if key == b"general.alignment":
                (alignment,) = struct.unpack_from("<I", data, position + 4)
            position = _after_gguf_value(data, position + 4, kind)
        offsets = []
        for _ in range(n_tensors):
            _, position = _gguf_string(data, position)
            (n_dimensions,) = struct.unpack_from("<I", data, position)
            position += 4 + 8 * n_dimensions + 4
            offsets.append(struct.unpack_from("<Q", data, position)[0])
            position += 8
        begin = -(-position // alignment) * alignment  # rounded up
        return data[:position], list(pairwise([*sorted(begin + offset for offset in offsets), size]))


def _gguf_string(data: mmap, position: int) -> tuple[bytes, int]:
    """(the string at `position`, the position after it)."""
    (length,) = struct.unpack_from("<Q", data, position)
    return data[position + 8 : position + 8 + length], position + 8 + length


def _after_gguf_value(data: mmap, position: int, kind: int) -> int:
    """The position after the value of type `kind` at `position`."""
    if kind == GGUF_STRING:
        return position + 8 + struct.unpack_from("<Q", data, position)[0]
    if kind != GGUF_ARRAY:
        return position + GGUF_SIZES[kind]
    kind, length = struct.unpack_from("<IQ", data, position)
    position += 12
    if kind in GGUF_SIZES:
        return position + length * GGUF_SIZES[kind]
    for _ in range(length):
        position = _after_gguf_value(data, position, kind)
    return position
