"""Files of weights told apart in no time: a digest of their headers and of a sample of every tensor."""

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

# Read of every tensor at its beginning, in its middle and at its end.
SAMPLE_BYTES = 4096
# GGUF: bytes of a value of each type, but for strings and arrays; and the alignment of a file that states none.
GGUF_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
GGUF_STRING, GGUF_ARRAY, GGUF_ALIGNMENT = 8, 9, 32
Spans = list[tuple[int, int]]


def sample_digest(files: Iterable[Path]) -> str:
    """SHA-256 of files by name, size, header and samples of every tensor, so that it takes no time at 70B.

    A change that leaves every sampled byte alone is not seen: some rows of a large tensor, say.
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
    """(header, where each tensor is); of a file in another or damaged format nothing, and the whole as one tensor."""
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
    """A zip archive, one entry per tensor, uncompressed; its directory has a checksum of each."""
    with zipfile.ZipFile(handle) as archive:
        entries = archive.infolist()
    header = "\n".join(f"{entry.filename} {entry.file_size} {entry.CRC}" for entry in entries)
    starts = [entry.header_offset for entry in entries]
    return header.encode(), list(pairwise([*starts, size]))


def _gguf(handle: BinaryIO, size: int) -> tuple[bytes, Spans]:
    """Keys and values, then a list of tensors with their offsets; read here because the package for it takes seconds
    for the vocabulary."""
    with mmap(handle.fileno(), 0, access=ACCESS_READ) as data:
        magic, _, n_tensors, n_keys = struct.unpack_from("<4sIQQ", data)
        if magic != b"GGUF":
            raise ValueError("no GGUF file")
        place, alignment = 24, GGUF_ALIGNMENT
        for _ in range(n_keys):
            key, place = _gguf_string(data, place)
            (kind,) = struct.unpack_from("<I", data, place)
            if key == b"general.alignment":
                (alignment,) = struct.unpack_from("<I", data, place + 4)
            place = _after_gguf_value(data, place + 4, kind)
        offsets = []
        for _ in range(n_tensors):
            _, place = _gguf_string(data, place)
            (n_dimensions,) = struct.unpack_from("<I", data, place)
            place += 4 + 8 * n_dimensions + 4
            offsets.append(struct.unpack_from("<Q", data, place)[0])
            place += 8
        begin = -(-place // alignment) * alignment
        return data[:place], list(pairwise([*sorted(begin + offset for offset in offsets), size]))


def _gguf_string(data: mmap, place: int) -> tuple[bytes, int]:
    """(string, where the next value begins)."""
    (length,) = struct.unpack_from("<Q", data, place)
    return data[place + 8 : place + 8 + length], place + 8 + length


def _after_gguf_value(data: mmap, place: int, kind: int) -> int:
    """Where what follows a value begins."""
    if kind == GGUF_STRING:
        return place + 8 + struct.unpack_from("<Q", data, place)[0]
    if kind != GGUF_ARRAY:
        return place + GGUF_SIZES[kind]
    kind, length = struct.unpack_from("<IQ", data, place)
    place += 12
    if kind in GGUF_SIZES:
        return place + length * GGUF_SIZES[kind]
    for _ in range(length):
        place = _after_gguf_value(data, place, kind)
    return place
