"""Ports for processes that a test starts."""

from __future__ import annotations

import contextlib
import random
import socket
from pathlib import Path


def free_ports(count: int = 2) -> tuple[int, ...]:
    """So many different ones of 127.0.0.1, below those that the kernel gives to whoever connects or asks for any:
    nobody takes one of them before its process has started."""
    ephemeral = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    if ephemeral < 20_000:  # there are none below that nobody else asks for
        ephemeral = 65_536
    found: set[int] = set()
    while len(found) < count:
        port = random.SystemRandom().randrange(10_000, ephemeral)  # tests seed the other
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.add(port)
    return tuple(found)
