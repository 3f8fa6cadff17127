"""Stop strings in a stream: the stop text never leaks, however the stream is cut into pieces.

Text that could be the beginning of a stop string is held back until it is or is not one. Of several matches the one
that ends first wins (the longest, where two end together), which is what feeding one character at a time would find.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Feed text; get back what may be shown. After a match (`matched`), nothing more is to be fed."""

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self.stops = tuple(stops)
        self._include = include
        self._held = ""
        self.matched: str | None = None

    def feed(self, text: str) -> str:
        """Add text and return what is certain not to belong to a stop string."""
        if not self.stops:
            return text
        self._held += text
        found = self._first_match()
        if found is None:
            return self._release(self._longest_possible_beginning())
        start, self.matched = found
        shown = self._held[: start + len(self.matched)] if self._include else self._held[:start]
        self._held = ""
        return shown

    def flush(self) -> str:
        """The end of the stream: what was held back is plain text after all."""
        return self._release(0)

    def _release(self, keep: int) -> str:
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def _first_match(self) -> tuple[int, str] | None:
        places = ((self._held.find(stop), stop) for stop in self.stops)
        matches = [(start + len(stop), start, stop) for start, stop in places if start >= 0]
        if not matches:
            return None
        _, start, stop = min(matches)
        return start, stop

    def _longest_possible_beginning(self) -> int:
        """Length of the longest end of the held text with which some stop string begins."""
        longest = min(len(self._held), max(len(stop) for stop in self.stops) - 1)
        for length in range(longest, 0, -1):
            tail = self._held[-length:]
            if any(stop.startswith(tail) for stop in self.stops):
                return length
        return 0
