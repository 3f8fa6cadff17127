"""Content around tool calls: the white space between text and calls belongs to the format, not to the answer."""

from __future__ import annotations

from mainsail_engine.server.tools.events import Content, Event
from mainsail_engine.server.tools.json_call import SPACE


class ContentGate:
    """Holds white space back until it is known what follows: text keeps it, a call drops it."""

    def __init__(self) -> None:
        self._pending = ""
        self._after_call = self._had_call = False

    def text(self, text: str) -> list[Event]:
        whole = self._pending + text
        if self._after_call:
            whole = whole.lstrip(SPACE)
        shown = whole.rstrip(SPACE)
        self._pending = whole[len(shown) :]
        if not shown:
            return []
        self._after_call = False
        return [Content(shown)]

    def call(self) -> None:
        """A call begins here."""
        self._pending = ""
        self._after_call = self._had_call = True

    def finish(self) -> list[Event]:
        pending, self._pending = self._pending, ""
        return [Content(pending)] if pending and not self._had_call else []
