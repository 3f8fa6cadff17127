"""Which copies of models make room for a new one: a pure decision (`victims`), and its carrying out.

A copy is kept for as long as any revision may use it. That is known from two sides:

    keep, decided_at   the copies that services and pods used when the operator decided to fetch, and when that was
    .NAME.lock         beside each copy; its time of modification is when a pod last asked for the copy

What was asked for since the decision is kept too, so a decision may be old: a fetch that is tried again for days never
takes away what somebody began to use meanwhile. Of the rest the least recently used go first, and no more of them than
the limit and the disk ask for. So going back to an earlier model usually fetches nothing.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mainsail_fetch.place import MARGIN, Place, size_of, told

log = logging.getLogger(__name__)

SKEW_S = 600.0
"""Clocks of nodes, of a file server and of the operator may differ by this much."""


@dataclass(frozen=True, slots=True)
class Copy:
    name: str
    size: int
    """Bytes, complete or not."""
    used: float
    """Unix seconds at which a pod last asked for it."""


@dataclass(frozen=True, slots=True)
class Rules:
    keep: Collection[str] = ()
    """Names of copies that were in use at `decided_at`."""
    decided_at: float = 0.0
    """Unix seconds."""
    limit: int | None = None
    """Bytes that all copies may take together; None: as much as fits on the disk."""


def victims(copies: Sequence[Copy], rules: Rules, *, total: int, missing: int, free: int) -> list[Copy]:
    """The copies to delete before a model of `total` bytes is whole, of which `missing` are to be fetched.

    copies: all the others. free: bytes free on the disk.

    Empty when nothing is in the way; fewer than needed when the rest is in use, and the disk says so then."""
    excess = missing + MARGIN - free
    if rules.limit is not None:
        excess = max(excess, sum(copy.size for copy in copies) + total - rules.limit)
    found: list[Copy] = []
    for copy in sorted(copies, key=lambda copy: (copy.used, copy.name)):
        if excess <= 0:
            break
        if copy.name not in rules.keep and copy.used < rules.decided_at - SKEW_S:
            found.append(copy)
            excess -= copy.size
    return found


def make_room(place: Place, total: int, rules: Rules) -> list[str]:
    """Delete what has to make room for the model of `total` bytes; the names of what went."""
    root = place.folder.parent
    for rest in root.glob(".*.evicted"):  # of one that was killed
        shutil.rmtree(rest, ignore_errors=True)
    others = [copy for copy in _copies(root) if copy.name != place.folder.name]
    missing = max(0, total - place.size())
    free = shutil.disk_usage(root).free
    gone: list[str] = []
    for copy in victims(others, rules, total=total, missing=missing, free=free):
        if _delete(root, copy.name):
            log.info("%s made room: %s, last used at %.0f", copy.name, told(copy.size), copy.used)
            gone.append(copy.name)
    return gone


def _copies(root: Path) -> Iterator[Copy]:
    """Only what has a lock file is ours: a claim may hold other things too."""
    for lock in root.glob(".*.lock"):
        name = lock.name[1 : -len(".lock")]
        folders = [folder for folder in (root / name, root / f"{name}.partial") if folder.is_dir()]
        if folders:
            yield Copy(name, sum(size_of(folder) for folder in folders), lock.stat().st_mtime)


def _delete(root: Path, name: str) -> bool:
    """Unless somebody is writing it. First renamed, so that at no moment half a copy looks like a whole one.

    The lock file stays: whoever waits for it must wait for the same file as whoever comes next."""
    lock = os.open(root / f".{name}.lock", os.O_RDWR)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for folder in (root / name, root / f"{name}.partial"):
            if folder.is_dir():
                doomed = folder.rename(root / f".{folder.name}.evicted")
                shutil.rmtree(doomed)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(lock)
