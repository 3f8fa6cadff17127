"""The header of a GGUF file: its key-value pairs, and where its tensors lie.

The `gguf` package maps every array element to a numpy view, which takes seconds for a vocabulary; every process that
starts needs the header at once. Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2, 3).
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mainsail_engine.errors import UnsupportedModelError

MAGIC = b"GGUF"
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_ALIGNMENT = 32
"""Of tensors, in bytes, where `general.alignment` says nothing else."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    name: str
    shape: tuple[int, ...]
    """Rows first, as everywhere here; the file has them the other way round."""
    type: int
    """GGML's number of it."""
    offset: int
    """Bytes from the beginning of the file."""


class _Cursor:
    """Reads little-endian values one after another."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self.at = 0

    def scalar(self, fmt: str) -> Any:
        (value,) = struct.unpack_from(fmt, self._data, self.at)
        self.at += struct.calcsize(fmt)
        return value

    def string(self) -> str:
        length = self.scalar("<Q")
        start, self.at = self.at, self.at + length
        if self.at > len(self._data):
            raise struct.error("string past the end of the file")
        return self._data[start : self.at].decode("utf-8", errors="replace")

    def array(self) -> list[Any]:
        kind, count = self.scalar("<I"), self.scalar("<Q")
        if kind == _STRING:
            return [self.string() for _ in range(count)]
        if kind == _ARRAY:
            return [self.array() for _ in range(count)]
        fmt = _SCALARS[kind]
        size = struct.calcsize(fmt) * count
        start, self.at = self.at, self.at + size
        return list(struct.unpack_from(f"<{count}{fmt[1]}", self._data, start))

    def value(self) -> Any:
        kind = self.scalar("<I")
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array()
        return self.scalar(_SCALARS[kind])


def read_metadata(path: Path) -> dict[str, Any]:
    """All key-value pairs of the header. Raises UnsupportedModelError when the file is no GGUF or is cut off."""
    return read_header(path)[0]


def read_header(path: Path) -> tuple[dict[str, Any], list[TensorInfo]]:
    """(key-value pairs, tensors). Raises as read_metadata."""
    with path.open("rb") as file:
        if file.read(4) != MAGIC:
            raise UnsupportedModelError(f"{path} is not a GGUF file (it does not begin with 'GGUF')")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _read_header(_Cursor(data), path)
            except (struct.error, KeyError, OverflowError) as error:
                raise UnsupportedModelError(f"{path}: the GGUF header is damaged or cut off ({error})") from error


def _read_header(cursor: _Cursor, path: Path) -> tuple[dict[str, Any], list[TensorInfo]]:
    cursor.scalar("<I")
    version = cursor.scalar("<I")
    if version not in (2, 3):
        raise UnsupportedModelError(f"{path}: GGUF version {version} is not supported (2 and 3 are)")
    num_tensors, num_pairs = cursor.scalar("<Q"), cursor.scalar("<Q")
    pairs = {cursor.string(): cursor.value() for _ in range(num_pairs)}
    found = [_read_tensor(cursor) for _ in range(num_tensors)]
    alignment = int(pairs.get("general.alignment", _ALIGNMENT))
    start = -(-cursor.at // alignment) * alignment
    return pairs, [TensorInfo(name, shape, kind, start + offset) for name, shape, kind, offset in found]


def _read_tensor(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.string()
    sizes = [int(cursor.scalar("<Q")) for _ in range(cursor.scalar("<I"))]
    return name, tuple(reversed(sizes)), cursor.scalar("<I"), cursor.scalar("<Q")
