"""Mistral: [TOOL_CALLS] and either a JSON list of calls, or (since 2025) name[ARGS]{…}, once for each call.

[TOOL_CALLS][{"name": "f", "arguments": {…}}, …]
[TOOL_CALLS]f[ARGS]{…}[TOOL_CALLS]g[CALL_ID]abc123[ARGS]{…}
"""

from __future__ import annotations

import re
from collections.abc import Callable

from mainsail_engine.server.tools.content import ContentGate
from mainsail_engine.server.tools.events import Arguments, CallEnd, CallStart, Event, up_to
from mainsail_engine.server.tools.json_call import SPACE, JsonCall, ValueScanner

MARKER = "[TOOL_CALLS]"
_HEADER = re.compile(r"\s*([\w.\-]+)\s*(?:\[CALL_ID\][^\[\]{}]*)?(?:\[ARGS\])?\s*")
_MAX_HEADER = 256


class MistralParser:
    def __init__(self) -> None:
        self._gate = ContentGate()
        self._buffer: str = ""
        self._step: Callable[[list[Event]], bool] = self._in_text
        self._call = JsonCall()
        self._scanner = ValueScanner()
        self._list_text = ""
        """What the list's beginning looked like, should it turn out to be none."""

    def feed(self, text: str) -> list[Event]:
        self._buffer += text
        events: list[Event] = []
        while self._buffer and self._step(events):
            pass
        return events

    def finish(self) -> list[Event]:
        events: list[Event] = []
        if self._step == self._in_call and self._call.named:
            self._call.finish()
            events += self._call.take_events()
        elif self._step == self._in_call:
            events += self._gate.text(self._list_text + self._call.text)
        elif self._step == self._after_marker:
            events += self._gate.text(MARKER + self._buffer)
        elif self._step == self._in_text:
            events += self._gate.text(self._buffer)
        self._buffer = ""
        return events + self._gate.finish()

    # -- the states: each consumes from the buffer; False: more text is needed -----------------------------------------

    def _in_text(self, events: list[Event]) -> bool:
        before, found, self._buffer = up_to(self._buffer, MARKER)
        events += self._gate.text(before)
        if found:
            self._step = self._after_marker
        return found

    def _after_marker(self, events: list[Event]) -> bool:
        """A list, an object, or a name up to the arguments."""
        stripped = self._buffer.lstrip(SPACE)
        if not stripped:
            return False
        if stripped[0] in "[{":
            self._list_text = MARKER + ("[" if stripped[0] == "[" else "")
            self._buffer = stripped.removeprefix("[")
            self._begin_call()
            return True
        end = stripped.find("{")
        header = _HEADER.fullmatch(stripped[:end]) if end >= 0 else None
        if header is not None:
            self._gate.call()
            events.append(CallStart(header[1]))
            self._buffer, self._step, self._scanner = stripped[end:], self._in_arguments, ValueScanner()
            return True
        if end < 0 and len(stripped) <= _MAX_HEADER and "\n" not in stripped:
            return False
        events += self._gate.text(MARKER)
        self._step = self._in_text
        return True

    def _in_arguments(self, events: list[Event]) -> bool:
        for index, char in enumerate(self._buffer):
            self._scanner.takes(char)
            if self._scanner.done:
                events += [Arguments(self._buffer[: index + 1]), CallEnd()]
                self._buffer, self._step = self._buffer[index + 1 :], self._in_text
                return True
        events.append(Arguments(self._buffer))
        self._buffer = ""
        return False

    def _begin_call(self) -> None:
        self._call, self._step = JsonCall(), self._in_call

    def _in_call(self, events: list[Event]) -> bool:
        call = self._call
        for index, char in enumerate(self._buffer):
            was_named = call.named
            call.feed(char)
            if call.named and not was_named:
                self._gate.call()
            events += call.take_events()
            if call.broken or call.complete:
                self._buffer = self._buffer[index + 1 :]
                if call.broken:  # no list of calls: plain text
                    events += self._gate.text(self._list_text)
                    self._buffer = call.text + self._buffer
                self._step = self._in_text if call.broken else self._between_calls
                return True
        self._buffer = ""
        return False

    def _between_calls(self, events: list[Event]) -> bool:
        """A comma and the next call, or the list's end."""
        stripped = self._buffer.lstrip(SPACE)
        if not stripped:
            self._buffer = ""
            return False
        self._buffer = stripped.removeprefix("]") if stripped[0] == "]" else stripped
        if stripped[0] == ",":
            self._buffer, self._list_text = stripped[1:], ""
            self._begin_call()
        else:
            self._step = self._in_text
        return True
