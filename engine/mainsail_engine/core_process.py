"""The core process as others see it: how it is started, and where its sockets are.

    this process   starts the core ─▶ imports what it serves HTTP with ─▶ binds its sockets ─▶ …
    core                └▶ takes its orders ─▶ imports torch, loads the model ····························▶ ready

It is started as soon as the flags are understood: what it imports takes longest of all that a start waits for. Sockets
are ipc files in a folder that only this user can enter; the core connects to them, before or after they are bound.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from mainsail_engine.child import start_child
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
    orders = CoreStart(
        config=config,
        commands_addresses=[address(folder, "commands", number) for number in range(num_processes)],
        outputs_addresses=[address(folder, "outputs", number) for number in range(num_processes)],
        started_s=started_s,
    )
    try:
        return CoreProcess(start_child("mainsail_engine.core", orders), folder, started_s)
    except OSError as error:
        folder.rmdir()
        raise StartupError(f"the core process cannot be started: {error}") from error


def address(folder: Path, what: str, process: int) -> str:
    """Of the socket that carries commands to the core, or outputs from it, for that API process."""
    return f"ipc://{folder}/{what}.{process}"
