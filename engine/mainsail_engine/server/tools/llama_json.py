"""Llama 3: the answer is {"name": "f", "parameters": {…}}, several separated by ";", maybe behind <|python_tag|>.

There is no marker that must be there, so only an object that names one of the request's tools is a call; any other
JSON is an answer in JSON.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from mainsail_engine.server.tools.content import ContentGate
from mainsail_engine.server.tools.events import Event, up_to
from mainsail_engine.server.tools.json_call import SPACE, JsonCall

TAG = "<|python_tag|>"


class LlamaJsonParser:
    """between ──"{"──▶ call ──"}"──▶ between;  anything else than ";" between calls is text to the end (or a tag)"""

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._gate = ContentGate()
        self._buffer: str = ""
        self._skipped: str = ""
        """White space and separators that a call may follow; text, if none does."""
        self._step: Callable[[list[Event]], bool] = self._between
        self._call = JsonCall(names)

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
            events += self._gate.text(self._skipped + self._call.text)
        else:
            events += self._gate.text(self._skipped + self._buffer)
        self._buffer = self._skipped = ""
        return events + self._gate.finish()

    def _between(self, events: list[Event]) -> bool:
        if self._buffer.startswith(TAG):
            self._skip(len(TAG))
        elif TAG.startswith(self._buffer):
            return False
        elif self._buffer[0] in SPACE or (self._buffer[0] == ";" and self._call.complete):
            self._skip(1)
        elif self._buffer[0] == "{":
            self._call, self._step = JsonCall(self._names), self._in_call
        else:
            self._to_text(events)
        return True

    def _skip(self, count: int) -> None:
        self._skipped += self._buffer[:count]
        self._buffer = self._buffer[count:]

    def _to_text(self, events: list[Event]) -> None:
        """What was skipped is text after all."""
        events += self._gate.text(self._skipped)
        self._skipped, self._step = "", self._in_text

    def _in_text(self, events: list[Event]) -> bool:
        before, found, self._buffer = up_to(self._buffer, TAG)
        events += self._gate.text(before)
        if found:
            self._skipped, self._step = TAG, self._between
        return found

    def _in_call(self, events: list[Event]) -> bool:
        call = self._call
        for index, char in enumerate(self._buffer):
            was_named = call.named
            call.feed(char)
            if call.named and not was_named:
                self._gate.call()
                self._skipped = ""
            events += call.take_events()
            if call.broken or call.complete:
                self._buffer = self._buffer[index + 1 :]
                self._step = self._between
                if call.broken:
                    self._buffer = call.text + self._buffer
                    self._to_text(events)
                return True
        self._buffer = ""
        return False
