"""A chat answer as OpenAI writes it: events to a message, or to the deltas of a stream."""

from __future__ import annotations

import hashlib
from typing import Any

from mainsail_engine.server.tools.events import Arguments, CallEnd, CallStart, Content, Event, Reasoning, joined


def call_id(answer_id: str, choice: int, call: int) -> str:
    """The same for the same call of the same answer: another engine that finishes it gives the same."""
    digest = hashlib.blake2b(f"{answer_id}/{choice}/{call}".encode(), digest_size=12).hexdigest()
    return f"call_{digest}"


def message_of(events: list[Event], answer_id: str, choice: int, *, with_reasoning: bool) -> dict[str, Any]:
    """The whole message. Content is null where there are calls only."""
    content = "".join(event.text for event in events if isinstance(event, Content))
    reasoning = "".join(event.text for event in events if isinstance(event, Reasoning))
    calls = calls_of(events)
    message: dict[str, Any] = {"role": "assistant", "content": content or (None if calls else "")}
    if reasoning and with_reasoning:
        message |= {"reasoning_content": reasoning, "reasoning": reasoning}
    if calls:
        message["tool_calls"] = [
            {"id": call_id(answer_id, choice, n), "type": "function", "function": {"name": name, "arguments": text}}
            for n, (name, text) in enumerate(calls)
        ]
    return message


def calls_of(events: list[Event]) -> list[tuple[str, str]]:
    """(name, arguments) of every call."""
    calls: list[tuple[str, str]] = []
    for event in events:
        if isinstance(event, CallStart):
            calls.append((event.name, ""))
        elif isinstance(event, Arguments) and calls:
            name, text = calls[-1]
            calls[-1] = (name, text + event.text)
    return calls


class MessageDeltas:
    """The deltas of one streamed answer."""

    def __init__(self, answer_id: str, choice: int, *, with_reasoning: bool) -> None:
        self._answer_id, self._choice, self._with_reasoning = answer_id, choice, with_reasoning
        self._num_calls = 0

    def of(self, events: list[Event]) -> list[dict[str, Any]]:
        """One for each event that has something to show."""
        return [delta for event in joined(events) if (delta := self._delta(event)) is not None]

    def _delta(self, event: Event) -> dict[str, Any] | None:
        if isinstance(event, Content):
            return {"content": event.text}
        if isinstance(event, Reasoning):
            return {"reasoning_content": event.text, "reasoning": event.text} if self._with_reasoning else None
        if isinstance(event, CallStart):
            self._num_calls += 1
            index = self._num_calls - 1
            function = {"name": event.name, "arguments": ""}
            call = {"index": index, "id": call_id(self._answer_id, self._choice, index), "type": "function"}
            return {"tool_calls": [{**call, "function": function}]}
        if isinstance(event, CallEnd):
            return None
        return {"tool_calls": [{"index": self._num_calls - 1, "function": {"arguments": event.text}}]}
