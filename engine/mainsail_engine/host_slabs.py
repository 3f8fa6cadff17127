"""Pinned host memory: pages taken at the very start, and pinned at its end, while nobody needs CUDA's driver.

    core      imports torch ▶ weights ▶ KV pool ▶ graphs ▶ takes host memory for KV (runner/swap.py) ▶ first token
    threads   touch slab ▶ slab ▶ slab …                  (large pages where there are some; nobody is held up)
    thread                                               └▶ pin ▶ pin ▶ pin … done, or as far as patience goes

The driver pins fast while nobody else needs it, and only then: beside an import, which maps memory all the time, or the
launches of a start, both take several times as long. So pages are taken early and pinned late. Imports no torch itself.
"""

from __future__ import annotations

import atexit
import logging
import mmap
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from mainsail_engine.pages import address_of, touched_pages

log = logging.getLogger(__name__)
SLAB_BYTES = 32 << 20
"""Pinned in one call of the driver, which takes about 1 ms, and up to 13 on machines where it is slow."""
THREADS = 4
"""That touch pages."""
PATIENCE_S = 2.0
"""How long a start waits for pinning: 30 GB take 1 s where the driver is fast. What is missing then comes later."""

Pin = Callable[[int, int], bool]
"""(address, bytes): pinned. False: the driver refuses."""


class HostSlabs:
    """Memory in slabs whose pages are taken from now on, and which are pinned when `take` wants them."""

    def __init__(self, num_bytes: int, pin: Pin) -> None:
        """As many whole slabs as num_bytes have room for, if they can be had."""
        self.num_bytes = num_bytes
        self._pin = pin
        self._slabs: deque[mmap.mmap] = deque()
        self._may_pin, self._ended = threading.Event(), threading.Event()
        self._thread = threading.Thread(
            target=self._fill, args=(num_bytes // SLAB_BYTES,), name="pin-slabs", daemon=True
        )
        self._thread.start()
        atexit.register(self._end)

    def take(self, most: int) -> list[mmap.mmap]:
        """So many slabs at most, pinned, or what the driver can do in PATIENCE_S; the caller unpins them."""
        self._pin_some()
        return [self._slabs.popleft() for _ in range(min(most, len(self._slabs)))]

    def left(self) -> list[mmap.mmap]:
        """Those that nobody took: pinned still."""
        self._pin_some()
        atexit.unregister(self._end)
        slabs, self._slabs = list(self._slabs), deque()
        return slabs

    def _pin_some(self) -> None:
        self._may_pin.set()
        self._thread.join(PATIENCE_S)
        self._end()

    def _end(self) -> None:
        """No more. A process that ends, perhaps before anybody asked, must find no thread in the driver."""
        self._ended.set()
        self._may_pin.set()
        self._thread.join()

    def _fill(self, count: int) -> None:
        seconds = 0.0
        try:
            for slab in touched_slabs(count):
                self._may_pin.wait()
                began_s = time.monotonic()
                if self._ended.is_set() or not self._pin(address_of(slab), SLAB_BYTES):
                    break
                seconds += time.monotonic() - began_s
                self._slabs.append(slab)
        except OSError as error:
            log.warning("host memory: %s", error)
        log.info("host memory: %.1f GB pinned in %.1f s", len(self._slabs) * SLAB_BYTES / 1e9, seconds)


def touched_slabs(count: int) -> Iterator[mmap.mmap]:
    """One after the other, several of them touched at a time. Raises OSError where the system refuses."""
    with ThreadPoolExecutor(THREADS, "touch-slabs") as pool:
        running = [pool.submit(touched_pages, SLAB_BYTES) for _ in range(count)]
        try:
            for slab in running:
                yield slab.result()
        finally:
            for slab in running:
                slab.cancel()
