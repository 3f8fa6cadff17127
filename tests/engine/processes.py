"""Processes that a test looks for while others come and go."""

from __future__ import annotations

import psutil


def children(module: str, of: psutil.Process | None = None, *, recursive: bool = True) -> set[psutil.Process]:
    """Those of that process, or this one, whose command names the module; and theirs."""
    found: set[psutil.Process] = set()
    for process in (of or psutil.Process()).children(recursive=recursive):
        try:
            if module in " ".join(process.cmdline()):
                found.add(process)
        except psutil.Error:  # it has ended
            continue
    return found


def has_ended(process: psutil.Process) -> bool:
    """Also one that whoever has inherited it has not noticed yet."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
