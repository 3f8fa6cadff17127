"""Hermes, Qwen2.5, Qwen3: <tool_call>{"name": "f", "arguments": {…}}</tool_call>, once for each call, among text."""

from __future__ import annotations

from mainsail_engine.server.tools.content import ContentGate
from mainsail_engine.server.tools.events import Event, up_to
from mainsail_engine.server.tools.json_call import SPACE, JsonCall

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class HermesParser:
    """text ──<tool_call>──▶ call ──"}"──▶ after ──</tool_call>, or anything else──▶ text"""

    def __init__(self) -> None:
        self._gate = ContentGate()
        self._buffer = ""
        self._call: JsonCall | None = None
        self._after = False

    def feed(self, text: str) -> list[Event]:
        self._buffer += text
        events: list[Event] = []
        while self._buffer and self._advance(events):
            pass
        return events

    def finish(self) -> list[Event]:
        events: list[Event] = []
        rest, self._buffer = self._buffer, ""
        if self._call is not None and self._call.named:
            self._call.finish()
            events += self._call.take_events()
        elif self._call is not None:
            events += self._gate.text(OPEN + self._call.text)
        elif not (self._after and CLOSE.startswith(rest)):
            events += self._gate.text(rest)
        return events + self._gate.finish()

    def _advance(self, events: list[Event]) -> bool:
        """One move. False: more text is needed."""
        if self._call is not None:
            return self._in_call(self._call, events)
        if self._after:
            return self._after_call()
        return self._in_text(events)

    def _in_text(self, events: list[Event]) -> bool:
        before, found, self._buffer = up_to(self._buffer, OPEN)
        events += self._gate.text(before)
        if found:
            self._call = JsonCall()
        return found

    def _in_call(self, call: JsonCall, events: list[Event]) -> bool:
        for index, char in enumerate(self._buffer):
            was_named = call.named
            call.feed(char)
            if call.named and not was_named:
                self._gate.call()
            events += call.take_events()
            if call.broken or call.complete:
                self._call, self._after = None, call.complete
                self._buffer = self._buffer[index + 1 :]
                if call.broken:  # no call: plain text, in which a marker may yet follow
                    events += self._gate.text(OPEN)
                    self._buffer = call.text + self._buffer
                return True
        self._buffer = ""
        return False

    def _after_call(self) -> bool:
        self._buffer = self._buffer.lstrip(SPACE)
        if CLOSE.startswith(self._buffer) and self._buffer != CLOSE:
            return False
        self._buffer = self._buffer.removeprefix(CLOSE)
        self._after = False
        return True
