"""What every kind of store offers: the list of a model's files, and each of them into a folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True, slots=True)
class RemoteFile:
    path: str
    """Relative to the model; of an image, the layer's digest."""
    size: int
    """Bytes; 0 where the store does not tell."""


class Remote(Protocol):
    def files(self) -> list[RemoteFile]:
        """Raises FetchError."""
        ...

    def fetch(self, file: RemoteFile, folder: Path) -> None:
        """Puts the file below the folder, unless it is there already. Raises FetchError, OSError for the disk."""
        ...
