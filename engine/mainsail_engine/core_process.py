"""The core process as others see it: how it is started, and where its sockets are.

    this process   starts the core ─▶ imports what it serves HTTP with ─▶ binds its sockets ─▶ …
    core                └▶ takes its orders ─▶ imports torch, loads the model ····························▶ ready

It is started as soon as the flags are understood: what it imports takes longest of all that a start waits for. Sockets
are ipc files in a folder that only this user can enter; the core connects to them, before or after they are bound.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import msgspec

from mainsail_engine.config import EngineConfig
from mainsail_engine.errors import StartupError
from mainsail_engine.protocol import CoreStart


@dataclass(frozen=True, slots=True)
class CoreProcess:
    process: subprocess.Popen[bytes]
    """It ends when its standard input does."""
    folder: Path
    started_s: float
    """Monotonic time."""

    def end(self) -> None:
        """Whatever it is doing; may be called twice."""
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()
            self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def start_core(config: EngineConfig, num_processes: int = 1) -> CoreProcess:
    """num_processes: API processes that will talk to it. Raises StartupError."""
    folder, started_s = Path(tempfile.mkdtemp(prefix="mainsail-")), time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "mainsail_engine.core"], stdin=subprocess.PIPE, env=child_environment()
    )
    if process.stdin is None:
        raise StartupError("the core process has no standard input")
    orders = CoreStart(
        config=config,
        commands_addresses=[address(folder, "commands", number) for number in range(num_processes)],
        outputs_addresses=[address(folder, "outputs", number) for number in range(num_processes)],
        started_s=started_s,
    )
    with contextlib.suppress(BrokenPipeError):  # it has ended already: whoever waits for it will see
        process.stdin.write(msgspec.json.encode(orders) + b"\n")
        process.stdin.flush()
    return CoreProcess(process, folder, started_s)


def address(folder: Path, what: str, process: int) -> str:
    """Of the socket that carries commands to the core, or outputs from it, for that API process."""
    return f"ipc://{folder}/{what}.{process}"


def child_environment() -> dict[str, str]:
    """Other processes are started by module name: they must find this very package, also when it is not installed."""
    root = str(Path(__file__).resolve().parent.parent)
    inherited = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": f"{inherited}{os.pathsep}{root}" if inherited else root}
