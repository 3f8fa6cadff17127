"""The way out: readiness fails first, new requests are sent elsewhere, running ones finish within the bound.

    serving ──SIGTERM, SIGINT or POST /drain──▶ draining ──all finished, the bound, or a second signal──▶ ended

What still runs at the bound gets an error that says so; the process exits with 0.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from mainsail_engine.errors import RequestError

POLL_S = 0.02


class Drain:
    """Waits for the running requests, once somebody asked for it."""

    def __init__(self, *, timeout_s: float, num_running: Callable[[], int], on_begin: Callable[[], None]) -> None:
        self._timeout_s = timeout_s
        self._num_running = num_running
        self._on_begin = on_begin
        self._begun = asyncio.Event()
        self._at_once = asyncio.Event()

    @property
    def has_begun(self) -> bool:
        return self._begun.is_set()

    def begin(self) -> None:
        """The first call begins the drain, a second one cuts it short."""
        if self._begun.is_set():
            self._at_once.set()
            return
        self._begun.set()
        self._on_begin()

    async def wait(self) -> int:
        """Returns when the process may end: how many requests did not finish."""
        await self._begun.wait()
        watching = asyncio.create_task(self._until_idle())
        cut_short = asyncio.create_task(self._at_once.wait())
        tasks = (watching, cut_short)
        await asyncio.wait(tasks, timeout=self._timeout_s, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        return self._num_running()

    async def _until_idle(self) -> None:
        while self._num_running():  # noqa: ASYNC110 (the number falls in many places; a drain happens once)
            await asyncio.sleep(POLL_S)


def unfinished() -> RequestError:
    return RequestError("the server shut down before the answer was finished", status=503, code="shutting_down")
