"""A folder of things that are slow to make, each named by the hash of everything that decides its content.

An entry is made in a folder beside its final name and renamed when it is whole, under a lock: a killed run leaves
no half entry, and of two checkouts that want the same one, the second waits and finds it there.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path


def key_of(*parts: str | bytes) -> str:
    """The name's hash: of the parts and of where each ends."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(f"{len(data)}:".encode())
        digest.update(data)
    return digest.hexdigest()[:16]


@contextmanager
def lock(path: Path) -> Generator[None]:
    """An exclusive lock between processes, held as long as the block runs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def entry(cache: Path, name: str, make: Callable[[Path], None]) -> Path:
    """The folder `cache/name`, made by `make(folder)` when it is not there."""
    final = cache / name
    if final.exists():
        return final
    with lock(cache / "locks" / name):
        if final.exists():
            return final
        draft = Path(tempfile.mkdtemp(prefix=f"{name}.", dir=_made(cache / "drafts")))
        draft.chmod(0o755)
        try:
            make(draft)
            draft.rename(final)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    return final


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
