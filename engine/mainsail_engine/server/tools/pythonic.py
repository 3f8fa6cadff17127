"""Pythonic calls (Llama 3.2 and 4): the answer is [f(a=1, b="x"), g()], maybe behind <|python_tag|>.

Only a list whose first name is one of the request's tools is calls; anything else is content. Each argument is handed
out as JSON as soon as its text is complete: a Python literal, or JSON's own true, false and null. What is neither
becomes a string: the caller sees what the model wrote.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Collection

from mainsail_engine.server.tools.content import ContentGate
from mainsail_engine.server.tools.events import Arguments, CallEnd, CallStart, Event
from mainsail_engine.server.tools.json_call import SPACE

TAG = "<|python_tag|>"
_KEYWORD = re.compile(r"\s*([A-Za-z_]\w*)\s*=(?!=)", re.ASCII)
_NAME_CHARS = re.compile(r"[\w.\-]", re.ASCII)
MAX_NESTING = 100


class PythonicParser:
    """start ──"[" and a known name──▶ arguments ──")"──▶ between ──","──▶ name …  "]" or anything else──▶ content"""

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._gate = ContentGate()
        self._step: Callable[[str, list[Event]], None] = self._at_start
        self._held = ""
        """The beginning, until it is known to be a call."""
        self._name = ""
        self._argument = ""
        self._num_arguments = 0
        self._quote = ""
        self._escaped = False
        self._depth = 0

    def feed(self, text: str) -> list[Event]:
        events: list[Event] = []
        for char in text:
            self._step(char, events)
        return events

    def finish(self) -> list[Event]:
        """An argument that was cut off is not handed out: it would not be the one that was meant."""
        return self._gate.text(self._held) + self._gate.finish()

    # -- the states: each takes one character -----------------------------------------------------------------------

    def _at_start(self, char: str, events: list[Event]) -> None:
        self._held += char
        seen = self._held.lstrip(SPACE)
        seen = seen.removeprefix(TAG).lstrip(SPACE) if seen.startswith(TAG) else seen
        if seen == "[":
            self._step = self._in_name
        elif seen and not TAG.startswith(seen):
            self._to_content(events)

    def _in_name(self, char: str, events: list[Event]) -> None:
        if self._held:
            self._held += char
        if char == "(" and self._name in self._names:
            self._gate.call()
            self._held = ""
            events.append(CallStart(self._name))
            self._argument, self._num_arguments, self._step = "", 0, self._in_argument
        elif _NAME_CHARS.match(char):
            self._name += char
        elif not (char in SPACE and not self._name):
            self._to_content(events)

    def _in_argument(self, char: str, events: list[Event]) -> None:
        if self._quote:
            self._argument += char
            self._in_quotes(char)
        elif char in ",)" and self._depth == 0:
            self._end_argument(events)
            if char == ")":
                events += [Arguments("}" if self._num_arguments else "{}"), CallEnd()]
                self._name, self._step = "", self._between
        else:
            self._argument += char
            self._quote = char if char in "\"'" else ""
            self._depth = max(0, self._depth + (char in "([{") - (char in ")]}"))

    def _in_quotes(self, char: str) -> None:
        if self._escaped:
            self._escaped = False
        elif char == "\\":
            self._escaped = True
        elif char == self._quote:
            self._quote = ""

    def _between(self, char: str, events: list[Event]) -> None:
        if char == ",":
            self._step = self._in_name
        elif char == "]":
            self._step = self._in_content
        elif char not in SPACE:
            self._to_content(events)
            events += self._gate.text(char)

    def _in_content(self, char: str, events: list[Event]) -> None:
        events += self._gate.text(char)

    def _to_content(self, events: list[Event]) -> None:
        events += self._gate.text(self._held)
        self._held, self._step = "", self._in_content

    def _end_argument(self, events: list[Event]) -> None:
        text, self._argument = self._argument.strip(SPACE), ""
        if not text:
            return
        keyword = _KEYWORD.match(text)
        key = keyword[1] if keyword else str(self._num_arguments)
        value = as_json(text[keyword.end() :].strip(SPACE) if keyword else text)
        events.append(Arguments(f"{', ' if self._num_arguments else '{'}{json.dumps(key)}: {value}"))
        self._num_arguments += 1


def as_json(text: str) -> str:
    """A Python literal, or JSON, as JSON; anything else as a string."""
    if sum(text.count(bracket) for bracket in "([{") > MAX_NESTING:
        return json.dumps(text)
    for read in (json.loads, ast.literal_eval):
        try:
            return json.dumps(read(text), ensure_ascii=False, allow_nan=False)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
    return json.dumps(text)
