from __future__ import annotations

import asyncio

from mainsail_engine.server.drain import Drain


class Requests:
    def __init__(self, count: int) -> None:
        self.count = count
        self.began = 0

    def begin(self) -> None:
        self.began += 1


def make(requests: Requests, timeout_s: float) -> Drain:
    return Drain(timeout_s=timeout_s, num_running=lambda: requests.count, on_begin=requests.begin)


async def test_ends_when_the_last_request_has() -> None:
    requests = Requests(2)
    drain = make(requests, 60)
    waiting = asyncio.create_task(drain.wait())
    drain.begin()
    await asyncio.sleep(0)
    assert drain.has_begun
    assert not waiting.done()
    requests.count = 0
    assert await asyncio.wait_for(waiting, 10) == 0
    assert requests.began == 1


async def test_ends_at_the_bound() -> None:
    drain = make(Requests(3), 0.01)
    drain.begin()
    assert await asyncio.wait_for(drain.wait(), 10) == 3


async def test_a_second_signal_cuts_it_short() -> None:
    requests = Requests(1)
    drain = make(requests, 3600)
    drain.begin()
    drain.begin()
    assert await asyncio.wait_for(drain.wait(), 10) == 1
    assert requests.began == 1
