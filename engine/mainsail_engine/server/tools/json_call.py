"""One tool call as a JSON object, read as it is written: {"name": "f", "arguments": {…}}, keys in any order.

A scanner, not a checker: it follows strings and brackets to know where a value ends, and passes the arguments' own
text through unchanged, because clients get it as text. The call is known once the name is; what came of the arguments
before that is handed out then.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection

from mainsail_engine.server.tools.events import Arguments, CallEnd, CallStart, Event

SPACE = " \t\r\n"
ARGUMENT_KEYS = ("arguments", "parameters")


class ValueScanner:
    """Finds the end of one JSON value, character by character."""

    __slots__ = ("_depth", "_escaped", "_first", "_in_string", "done")

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = self._escaped = False
        self._first = ""
        self.done = False
        """The last character taken was the value's last."""

    def takes(self, char: str) -> bool:
        """Whether the character belongs to the value. A number or a word ends before the first that does not."""
        if not self._first:
            self._first = char
        if self._in_string:
            self._inside_string(char)
            return True
        if char == '"':
            if self._first not in '{["':
                return False
            self._in_string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            if self._depth == 0:
                return False
            self._depth -= 1
            self.done = self._depth == 0
        elif self._depth == 0:
            return char != "," and char not in SPACE
        return True

    def _inside_string(self, char: str) -> None:
        if self._escaped:
            self._escaped = False
        elif char == "\\":
            self._escaped = True
        elif char == '"':
            self._in_string = False
            self.done = self._depth == 0


class JsonCall:
    """Feed the characters of one object. `state` tells how it stands; `events` has what is certain.

    open ──name and arguments known──▶ open ──"}"──▶ complete
      └──────── not of this form, or another name ──▶ broken      (`text` is what was taken)
    """

    def __init__(self, names: Collection[str] | None = None) -> None:
        """names: the only ones that make a call. None: any does."""
        self._names = names
        self._step: Callable[[str], None] = self._before_object
        self._scanner = ValueScanner()
        self._key = ""
        self._value: list[str] = []
        self._name: str | None = None
        self._early: str | None = None
        """Arguments that came before the name."""
        self._has_arguments = False
        self.text = ""
        self.events: list[Event] = []
        self.complete = self.broken = False

    @property
    def named(self) -> bool:
        """The call's name is known: it has started."""
        return self._name is not None

    def feed(self, char: str) -> None:
        if not self.named:
            self.text += char
        self._step(char)

    def take_events(self) -> list[Event]:
        events, self.events = self.events, []
        return events

    def finish(self) -> None:
        """The text ended inside the object. A double-encoded argument text that was held back is handed out."""
        if self.named and self._step == self._in_value and self._is_arguments and self._value[:1] == ['"']:
            self._emit("".join(self._value))

    # -- the states: each takes one character -----------------------------------------------------------------------

    def _before_object(self, char: str) -> None:
        if char == "{":
            self._step = self._before_key
        elif char not in SPACE:
            self.broken = True

    def _before_key(self, char: str) -> None:
        if char == '"':
            self._begin_value(char)
            self._step = self._in_key
        elif char == "}":
            self._end()
        elif char not in SPACE and char != ",":
            self._reject()

    def _in_key(self, char: str) -> None:
        self._scanner.takes(char)
        self._value.append(char)
        if self._scanner.done:
            self._key = _string("".join(self._value)) or ""
            self._step = self._before_colon

    def _before_colon(self, char: str) -> None:
        if char == ":":
            self._step = self._before_value
        elif char not in SPACE:
            self._reject()

    def _before_value(self, char: str) -> None:
        if char in SPACE:
            return
        if char in ",:}]":
            self._reject()
            return
        self._begin_value(char)
        self._step = self._in_value
        if self._is_streamed:
            self._emit(char)

    def _in_value(self, char: str) -> None:
        if not self._scanner.takes(char):
            self._end_value()
            self._step = self._before_key
            if not self.broken:
                self._before_key(char)
            return
        self._value.append(char)
        if self._is_streamed:
            self._emit(char)
        if self._scanner.done:
            self._end_value()
            self._step = self._before_key

    # -- what they share --------------------------------------------------------------------------------------------

    @property
    def _is_arguments(self) -> bool:
        return self._key in ARGUMENT_KEYS and not self._has_arguments

    @property
    def _is_streamed(self) -> bool:
        return self.named and self._is_arguments and self._value[0] == "{"

    def _begin_value(self, char: str) -> None:
        self._scanner, self._value = ValueScanner(), [char]
        self._scanner.takes(char)

    def _end_value(self) -> None:
        text = "".join(self._value)
        if self._key == "name" and not self.named:
            self._begin_call(_string(text))
        elif self._is_arguments and self.named:
            if not self._is_streamed:
                self._emit(as_arguments(text))
            self._has_arguments = True
        elif self._is_arguments and self._early is None:
            self._early = text

    def _begin_call(self, name: str | None) -> None:
        if not name or (self._names is not None and name not in self._names):
            self.broken = True
            return
        self._name = name
        self.events.append(CallStart(name))
        if self._early is not None:
            self._emit(as_arguments(self._early))
            self._has_arguments = True

    def _end(self) -> None:
        if not self.named:
            self.broken = True
            return
        if not self._has_arguments:
            self._emit("{}")
        self.complete = True
        self.events.append(CallEnd())

    def _reject(self) -> None:
        """Not JSON. Before the name the text is no call; after it, the call ends here."""
        if self.named:
            self._end()
        else:
            self.broken = True

    def _emit(self, text: str) -> None:
        if text:
            self.events.append(Arguments(text))


def as_arguments(text: str) -> str:
    """The value's text as arguments: an object as it stands; a string that holds one, unpacked; null as none."""
    if text == "null":
        return "{}"
    inner = _string(text) if text.startswith('"') else None
    return inner if inner is not None and inner.lstrip(SPACE).startswith("{") else text


def _string(text: str) -> str | None:
    """The string that this JSON text is, None if it is none."""
    try:
        value = json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, str) else None
