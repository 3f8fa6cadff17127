"""What an answer's text turns out to be: content, reasoning, tool calls; in pieces, as they come.

A parser is fed text in whatever pieces the tokens make, and gives back events. Two promises, both tested with random
texts: the pieces do not matter (one character at a time gives what the whole gives, once adjacent pieces are joined),
and nothing raises, whatever a model writes. What is not a well-formed beginning of a call is content; once a call's
name is known it is a call, however it ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Content:
    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A call begins. Calls are numbered by the order of these."""

    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """A piece of the newest call's arguments (JSON text)."""

    text: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    """The newest call's arguments are complete."""


Event = Content | Reasoning | CallStart | Arguments | CallEnd


class ToolParser(Protocol):
    def feed(self, text: str) -> list[Event]:
        """What this piece of text completes."""
        ...

    def finish(self) -> list[Event]:
        """The end of the text: what was held back."""
        ...


def tell_of_call(events: list[Event]) -> bool:
    return any(isinstance(event, CallStart | Arguments | CallEnd) for event in events)


def joined(events: list[Event]) -> list[Event]:
    """Adjacent pieces of the same kind as one."""
    merged: list[Event] = []
    for event in events:
        last = merged[-1] if merged else None
        if isinstance(event, Content) and isinstance(last, Content):
            merged[-1] = Content(last.text + event.text)
        elif isinstance(event, Reasoning) and isinstance(last, Reasoning):
            merged[-1] = Reasoning(last.text + event.text)
        elif isinstance(event, Arguments) and isinstance(last, Arguments):
            merged[-1] = Arguments(last.text + event.text)
        else:
            merged.append(event)
    return merged


def up_to(text: str, marker: str) -> tuple[str, bool, str]:
    """(the text before the marker, whether it is there, what follows it).

    Without it, what follows is the longest end of the text that may be the marker's beginning: wait for more.
    """
    before, found, rest = text.partition(marker)
    if found:
        return before, True, rest
    shown = len(text) - held_back(text, marker)
    return text[:shown], False, text[shown:]


def held_back(text: str, marker: str) -> int:
    """Length of the longest end of the text that may be the beginning of the marker."""
    for length in range(min(len(text), len(marker) - 1), 0, -1):
        if marker.startswith(text[-length:]):
            return length
    return 0
