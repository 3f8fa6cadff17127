"""The folder that a model is fetched into: one writer at a time, and nothing that looks complete before it is.

FOLDER.partial/     while it is fetched; what is there already is not fetched again
FOLDER/             complete: the partial folder, renamed
.FOLDER.lock        held by the writer; others wait for it, and find the work done. Its time of modification is when the
                    copy was last asked for (see `evict`)
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mainsail_fetch.errors import FetchError

MARGIN = 64 << 20
"""Bytes that are to stay free on the disk."""


@dataclass(frozen=True, slots=True)
class Place:
    folder: Path

    @property
    def partial(self) -> Path:
        return self.folder.with_name(self.folder.name + ".partial")

    @property
    def complete(self) -> bool:
        return self.folder.is_dir()

    @contextmanager
    def locked(self) -> Generator[None]:
        """Waits for whoever writes. Raises FetchError when the disk takes no file."""
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.folder.with_name(f".{self.folder.name}.lock"), os.O_CREAT | os.O_RDWR, 0o666)
        except OSError as error:
            raise of_disk(error, self.folder.parent) from error
        try:
            with contextlib.suppress(PermissionError):  # somebody else's file: it is as old as it looks
                os.utime(lock)
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    def size(self) -> int:
        """Bytes of what has been fetched so far, or of the complete folder."""
        return size_of(self.folder if self.complete else self.partial)

    def check_room(self, total: int) -> None:
        """Raises FetchError when what is missing does not fit on the disk."""
        self.partial.mkdir(exist_ok=True)
        missing = max(0, total - self.size())
        free = shutil.disk_usage(self.partial).free
        if missing + MARGIN > free:
            raise FetchError("DiskFull", f"the model needs {told(missing)} more, and {self.folder.parent} has "
                             f"{told(free)} free: make room, or give the volume more")  # fmt: skip

    def finish(self) -> None:
        self.partial.rename(self.folder)


def size_of(folder: Path) -> int:
    """Bytes on the disk, of what is there at this moment."""
    total = 0
    for where, _, names in os.walk(folder):
        for name in names:
            try:
                status = os.lstat(os.path.join(where, name))
            except FileNotFoundError:  # renamed or finished meanwhile
                continue
            total += min(status.st_size, status.st_blocks * 512 or status.st_size)
    return total


def of_disk(error: OSError, where: Path) -> FetchError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return FetchError("DiskFull", f"{where} is full: make room, or give the volume more")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return FetchError("CacheNotWritable", f"{error.filename or where} cannot be written ({error.strerror}): let "
                          f"user {os.getuid()} write there")  # fmt: skip
    return FetchError("CacheNotWritable", f"{where}: {error}")


def told(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"
