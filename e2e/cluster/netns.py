"""The network namespace of one cluster: made and removed from the host, entered by whoever must talk to the inside."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from e2e.cluster.packages import Packages
from e2e.steps import run

NAMESPACES = Path("/run/netns")
CLONE_NEWNET = 0x40000000
DO = "run it as root on a kernel with network namespaces; a container needs --privileged"


def path_of(name: str) -> Path:
    """The file that stands for a namespace."""
    return NAMESPACES / name


def make(name: str, packages: Packages, log: Path) -> None:
    """A new, empty namespace."""
    run([packages.program("ip"), "netns", "add", name], log=log, env=packages.environment(), do=DO)


def remove(name: str) -> bool:
    """Remove a namespace, if it is there, with every interface and rule in it; whether it was there."""
    path = path_of(name)
    if not path.exists():
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    libc.umount2(os.fsencode(path), 2)  # MNT_DETACH; fails on the leftover of a reboot, which is a plain file
    path.unlink()
    return True


def enter(name: str) -> None:
    """Move the calling thread into the namespace: sockets made before stay outside, later ones are inside."""
    handle = os.open(path_of(name), os.O_RDONLY)  # os.setns came with Python 3.12
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(handle, CLONE_NEWNET):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), str(path_of(name)))
    finally:
        os.close(handle)
