"""A response's output: reasoning, messages and calls as items, and the events by which a stream tells of them.

added ─▶ (part added ─▶ delta … ─▶ done ─▶ part done) ─▶ item done        one item is open at a time
"""

from __future__ import annotations

import hashlib
from typing import Any

from mainsail_engine.server.tools.events import Arguments, CallEnd, CallStart, Content, Event, Reasoning, joined

Told = tuple[str, dict[str, Any]]
"""An event's type and its fields."""
_PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc"}


class OutputItems:
    def __init__(self, response_id: str) -> None:
        self._response_id = response_id
        self.items: list[dict[str, Any]] = []
        self._text: list[str] = []
        """Of the open item."""
        self._is_open = False

    def feed(self, events: list[Event]) -> list[Told]:
        told: list[Told] = []
        for event in joined(events):
            if isinstance(event, CallStart):
                told += self.close(complete=True) + self._begin("function_call", name=event.name)
            elif isinstance(event, CallEnd):
                told += self.close(complete=True)
            elif isinstance(event, Arguments):
                told += self._delta("response.function_call_arguments.delta", event.text)
            else:
                told += self._text_of(event)
        return told

    def close(self, *, complete: bool) -> list[Told]:
        """The open item is at its end. complete: nothing of it is missing."""
        if not self._is_open:
            return []
        self._is_open = False
        item, text = self.items[-1], "".join(self._text)
        item["status"] = "completed" if complete else "incomplete"
        place = self._place()
        if item["type"] == "function_call":
            item["arguments"] = text
            done = [("response.function_call_arguments.done", {**place, "arguments": text, "name": item["name"]})]
        else:
            done = self._end_part(item, text, place)
        return [*done, ("response.output_item.done", {"output_index": place["output_index"], "item": item})]

    # -- text and reasoning -------------------------------------------------------------------------------------------

    def _text_of(self, event: Content | Reasoning) -> list[Told]:
        kind = "message" if isinstance(event, Content) else "reasoning"
        name = "output_text" if kind == "message" else "reasoning_text"
        told: list[Told] = []
        if not self._is_open or self.items[-1]["type"] != kind:
            told = self.close(complete=True) + self._begin(kind)
            told.append(("response.content_part.added", {**self._place(), "content_index": 0, "part": _part(kind, "")}))
        extra: dict[str, Any] = {"logprobs": []} if kind == "message" else {}
        return told + self._delta(f"response.{name}.delta", event.text, content_index=0, **extra)

    def _end_part(self, item: dict[str, Any], text: str, place: dict[str, Any]) -> list[Told]:
        kind = item["type"]
        name = "output_text" if kind == "message" else "reasoning_text"
        extra: dict[str, Any] = {"logprobs": []} if kind == "message" else {}
        item["content"] = [_part(kind, text)]
        return [
            (f"response.{name}.done", {**place, "content_index": 0, "text": text, **extra}),
            ("response.content_part.done", {**place, "content_index": 0, "part": _part(kind, text)}),
        ]

    # -- what all kinds share -----------------------------------------------------------------------------------------

    def _begin(self, kind: str, name: str = "") -> list[Told]:
        number = len(self.items)
        digest = hashlib.blake2b(f"{self._response_id}/{number}".encode(), digest_size=16).hexdigest()
        item: dict[str, Any] = {"id": f"{_PREFIXES[kind]}_{digest}", "type": kind, "status": "in_progress"}
        if kind == "message":
            item |= {"role": "assistant", "content": []}
        elif kind == "reasoning":
            item |= {"summary": [], "content": []}
        else:
            item |= {"call_id": f"call_{digest}", "name": name, "arguments": ""}
        self.items.append(item)
        self._text, self._is_open = [], True
        return [("response.output_item.added", {"output_index": number, "item": dict(item)})]

    def _delta(self, kind: str, text: str, **fields: Any) -> list[Told]:
        self._text.append(text)
        return [(kind, {**self._place(), **fields, "delta": text})]

    def _place(self) -> dict[str, Any]:
        return {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}


def _part(kind: str, text: str) -> dict[str, Any]:
    if kind == "message":
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    return {"type": "reasoning_text", "text": text}
