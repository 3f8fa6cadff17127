"""A clock to judge others' silence by: it stands still while this process does.

A process that is stopped, or starved, or whose whole machine stands still for a while (a virtual one that is moved),
finds the others silent for as long as that when it goes on, though what they said meanwhile is about to be read. So a
turn of whoever listens counts as a moment, however long it took: what is left is the time that was spent listening.
"""

from __future__ import annotations

import time
from collections.abc import Callable


class AwakeClock:
    """`tick` once a turn, on the thread that listens; any thread may read `now_s`."""

    def __init__(self, longest_turn_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """longest_turn_s: what a turn counts for at most; several times what one takes while all is well."""
        self._longest_turn_s, self._clock = longest_turn_s, clock
        self._ticked_s = clock()
        self.now_s = 0.0
        """Seconds of listening until the last tick."""

    def tick(self) -> float:
        """A turn begins. Returns the time by now."""
        before, self._ticked_s = self._ticked_s, self._clock()
        self.now_s += min(self._ticked_s - before, self._longest_turn_s)
        return self.now_s
