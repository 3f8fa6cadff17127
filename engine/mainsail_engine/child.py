"""How the processes of an engine begin (the core, its ranks, who compiles kernels for a start): with orders, and until
their parent ends.

Standard input carries one line of JSON, and ends when the parent does, however that happens. Signals to the process
group are the parent's to interpret. Imports no torch.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import TypeVar

import msgspec

T = TypeVar("T")


def start_child(
    module: str, orders: msgspec.Struct, *, stdout: int | None = None, **environment: str
) -> subprocess.Popen[bytes]:
    """Run a module whose `main` takes these orders first. Raises OSError where no process can be had.

    It may have ended already when this returns: whoever waits for it sees that.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", module], stdin=subprocess.PIPE, stdout=stdout, env=child_environment() | environment
    )
    if process.stdin is not None:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(msgspec.json.encode(orders) + b"\n")
            process.stdin.flush()
    return process


def child_environment() -> dict[str, str]:
    """Children are started by module name: they must find this very package, also when it is not installed."""
    root = str(Path(__file__).resolve().parent.parent)
    inherited = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": f"{inherited}{os.pathsep}{root}" if inherited else root}


def take_orders(kind: type[T]) -> T:
    """The line on standard input; from now on this process ends with its parent, also while a step hangs."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    orders = msgspec.json.decode(sys.stdin.buffer.readline(), type=kind)
    end_with_parent()
    return orders


def end_with_parent() -> None:
    """From now on: when standard input does."""
    threading.Thread(target=_watch_parent, name="parent-watch", daemon=True).start()


def _watch_parent() -> None:
    """Raw reads: a reader that holds the lock of a Python file keeps the interpreter, or a fork of it, from ending."""
    while os.read(0, 4096):
        pass
    os._exit(1)
