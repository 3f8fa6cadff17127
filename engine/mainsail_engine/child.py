"""What the core and its ranks do first: they take their orders, and from then on end when their parent does.

Standard input carries one line of JSON, and ends when the parent does, however that happens. Signals to the process
group are the parent's to interpret.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import TypeVar

import msgspec

T = TypeVar("T")


def take_orders(kind: type[T]) -> T:
    """The line on standard input; from now on this process ends with its parent, also while a step hangs."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    orders = msgspec.json.decode(sys.stdin.buffer.readline(), type=kind)
    threading.Thread(target=_end_with_parent, name="parent-watch", daemon=True).start()
    return orders


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(1)
