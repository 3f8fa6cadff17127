"""The key-value header of a GGUF file, without its tensors.

The `gguf` package maps every array element to a numpy view, which takes seconds for a vocabulary; the API process
needs the header only, and at once. Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2, 3).
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any

from mainsail_engine.errors import UnsupportedModelError

MAGIC = b"GGUF"
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9


class _Cursor:
    """Reads little-endian values one after another."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = 0

    def scalar(self, fmt: str) -> Any:
        (value,) = struct.unpack_from(fmt, self._data, self._at)
        self._at += struct.calcsize(fmt)
        return value

    def string(self) -> str:
        length = self.scalar("<Q")
        start, self._at = self._at, self._at + length
        if self._at > len(self._data):
            raise struct.error("string past the end of the file")
        return self._data[start : self._at].decode("utf-8", errors="replace")

    def array(self) -> list[Any]:
        kind, count = self.scalar("<I"), self.scalar("<Q")
        if kind == _STRING:
            return [self.string() for _ in range(count)]
        if kind == _ARRAY:
            return [self.array() for _ in range(count)]
        fmt = _SCALARS[kind]
        size = struct.calcsize(fmt) * count
        start, self._at = self._at, self._at + size
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
    with path.open("rb") as file:
        if file.read(4) != MAGIC:
            raise UnsupportedModelError(f"{path} is not a GGUF file (it does not begin with 'GGUF')")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read_pairs(_Cursor(data), path)


def _read_pairs(cursor: _Cursor, path: Path) -> dict[str, Any]:
    try:
        cursor.scalar("<I")
        version = cursor.scalar("<I")
        if version not in (2, 3):
            raise UnsupportedModelError(f"{path}: GGUF version {version} is not supported (2 and 3 are)")
        cursor.scalar("<Q")
        return {cursor.string(): cursor.value() for _ in range(cursor.scalar("<Q"))}
    except (struct.error, KeyError) as error:
        raise UnsupportedModelError(f"{path}: the GGUF header is damaged or cut off ({error})") from error
