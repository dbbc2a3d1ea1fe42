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
from pathlib import Path
from typing import BinaryIO

from core.models.gguf_header import read_gguf_header

# Read of every tensor at its beginning, in its middle and at its end.
SAMPLE_BYTES = 4096
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
    header = read_gguf_header(handle)
    return header.data, list(pairwise([*sorted(header.starts.values()), size]))
