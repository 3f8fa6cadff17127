"""What the operator's process does when a part of it fails."""

from __future__ import annotations

import asyncio

from mainsail_operator.__main__ import end, start


async def test_a_part_that_fails_ends_the_process_and_the_others_tidy_up() -> None:
    """Alive without its Lease's keeper, it would do nothing for ever, and no probe would notice."""
    stop, tidied = asyncio.Event(), asyncio.Event()

    async def keeps() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            tidied.set()

    async def fails() -> None:
        raise KeyError("spec")

    tasks = start(stop, keeps(), fails())
    await stop.wait()
    assert not tidied.is_set()
    assert isinstance(await end(tasks), KeyError)
    assert tidied.is_set()


async def test_a_part_that_is_done_or_stopped_is_no_failure() -> None:
    stop = asyncio.Event()

    async def done() -> None:
        pass

    tasks = start(stop, done(), asyncio.sleep(3600))
    await tasks[0]
    assert await end(tasks) is None
    assert not stop.is_set()
