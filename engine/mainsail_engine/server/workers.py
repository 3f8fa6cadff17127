"""The leader's hold on the further API processes: start them, wait until they serve, notice an end, end them."""

from __future__ import annotations

import asyncio
import contextlib
import sys

import msgspec

from mainsail_engine.child import child_environment
from mainsail_engine.errors import StartupError
from mainsail_engine.server.board import Board
from mainsail_engine.server.worker import WorkerStart

END_S = 10.0
"""After SIGTERM; then SIGKILL."""
POLL_S = 0.02


class Workers:
    def __init__(self, board: Board) -> None:
        self._board = board
        self._processes: list[asyncio.subprocess.Process] = []

    async def start(self, starts: list[WorkerStart]) -> None:
        for start in starts:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "mainsail_engine.server.worker",
                stdin=asyncio.subprocess.PIPE, env=child_environment(),
            )  # fmt: skip
            self._processes.append(process)
            if process.stdin is not None:
                process.stdin.write(msgspec.json.encode(start) + b"\n")

    async def serving(self) -> None:
        """Returns when all of them serve. Raises StartupError when one ends before."""
        while self._board.total("serving") < len(self._processes):
            self._check()
            await asyncio.sleep(POLL_S)

    async def ended(self) -> None:
        """Returns when one of them has ended; never, where there is none."""
        if not self._processes:
            await asyncio.Event().wait()
        waits = [asyncio.create_task(process.wait()) for process in self._processes]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    def _check(self) -> None:
        for number, process in enumerate(self._processes, 1):
            if process.returncode is not None:
                raise StartupError(f"API process {number} ended with {process.returncode}; its log has more")

    def failure(self) -> StartupError:
        try:
            self._check()
        except StartupError as error:
            return error
        return StartupError("an API process ended")

    async def close(self) -> None:
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
        for process in self._processes:
            try:
                await asyncio.wait_for(process.wait(), END_S)
            except TimeoutError:
                process.kill()
                await process.wait()
