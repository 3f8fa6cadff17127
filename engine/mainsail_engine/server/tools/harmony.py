"""Harmony, the format of gpt-oss: an answer is messages, each with a channel that says whom it is for.

    <|channel|>analysis<|message|>…<|end|>                                                     reasoning
    <|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{…}<|call|>   a call
    <|start|>assistant<|channel|>commentary<|message|>…<|end|>                      said before a call: content
    <|start|>assistant<|channel|>final<|message|>…<|return|>                                    content

The prompt ends with <|start|>assistant, so the first message's header is under way. The recipient may also stand before
the channel, as templates write it. <|return|> and <|call|> end the answer. Who is addressed decides: functions.NAME is
a call, and so is the bare name of a tool of the request; anyone else is a tool that the model imagines: reasoning.
What has no header is content. Fed in any pieces, the same comes out; nothing raises.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from typing import Any

from mainsail_engine.server.tools.events import Arguments, CallEnd, CallStart, Content, Event, Reasoning, held_back
from mainsail_engine.server.tools.json_call import SPACE

START, CHANNEL, CONSTRAIN, MESSAGE = "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>"
END, CALL, RETURN = "<|end|>", "<|call|>", "<|return|>"
MARKERS = (START, CHANNEL, CONSTRAIN, MESSAGE, CALL, RETURN)
"""What no message's text contains; beside the end of a message."""
STOPS = (RETURN, CALL)
"""What ends an answer."""
_ENDS = (END, CALL, RETURN, START, CHANNEL)
"""What ends a message's text; where the model forgot the first three, the next header does."""
_HEADER_ENDS = (MESSAGE, END, CALL, RETURN, START)
_RECIPIENT = re.compile(r"\bto=([^\s<]+)")
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w*)")
_ROLE = re.compile(r"\s*([\w.\-]*)")
_NAMESPACE = "functions."
MAX_HEADER = 512
"""Characters, after which it is none."""


class HarmonyParser:
    """header ──<|message|>──▶ text of its kind ──<|end|> …──▶ header …;   a header that is none ──▶ content"""

    def __init__(self, names: Collection[str] | None, prompt_end: str) -> None:
        """names: tools that may be called; None: none, and calls are reasoning. prompt_end: the prompt's last text."""
        self._names = names
        self._buffer = ""
        self._in_text, self._kind = False, "content"
        self._arguments: list[str] = []
        self._blank = ""
        """White space of reasoning or arguments, whose fate depends on what follows."""
        self._shown = False
        """Something of the message was handed out."""
        self._had_content = False
        self._begin(prompt_end)

    @property
    def reasons(self) -> bool:
        """Whether what comes is counted as reasoning: from its channel's name on."""
        return self._kind == "reasoning" if self._in_text else _kind_of(self._buffer, self._names)[0] == "reasoning"

    def feed(self, text: str) -> list[Event]:
        self._buffer += text
        events: list[Event] = []
        while self._buffer and (self._text(events) if self._in_text else self._header(events)):
            pass
        return events

    def finish(self) -> list[Event]:
        """A header without its message has nothing to say."""
        events: list[Event] = []
        rest, self._buffer = self._buffer, ""
        if self._in_text:
            self._show(rest, events)
            self._end(events)
        elif not rest.startswith(START) and "<|" not in rest and rest.strip(SPACE):
            self._show(rest, events)
        return events

    def _begin(self, prompt_end: str) -> None:
        at = prompt_end.rfind(START)
        at = at if at >= 0 else prompt_end.rfind(CHANNEL)
        if at >= 0:
            self.feed(prompt_end[at:])
        else:
            self._in_text = message_is_open(prompt_end)
        self._shown = self._in_text
        if self._in_text and self._kind == "call":
            self._kind = "content"  # the call began in the prompt: nobody was told of it

    # -- headers ------------------------------------------------------------------------------------------------------

    def _header(self, events: list[Event]) -> bool:
        """False: more text is needed."""
        at, marker = _first(self._buffer, _HEADER_ENDS, after=len(START) if self._buffer.startswith(START) else 0)
        header = self._buffer[:at] if marker else self._buffer
        if not _may_begin(header + marker):
            self._buffer = _without_role(self._buffer)
            self._into("content")
            return True
        if len(header) > MAX_HEADER + (0 if marker else len(CONSTRAIN)):
            header, self._buffer = self._buffer[:MAX_HEADER], self._buffer[MAX_HEADER:]
            self._into("content")
            self._show(_without_role(header), events)
            return True
        if not marker:
            return False
        self._buffer = self._buffer[at if marker == START else at + len(marker) :]
        if marker == MESSAGE:
            kind, name = _kind_of(header, self._names)
            self._into(kind)
            if kind == "call":
                events.append(CallStart(name))
        return True

    def _into(self, kind: str) -> None:
        self._in_text, self._kind, self._shown, self._blank, self._arguments = True, kind, False, "", []

    # -- text ---------------------------------------------------------------------------------------------------------

    def _text(self, events: list[Event]) -> bool:
        at, marker = _first(self._buffer, _ENDS)
        if marker:
            text, rest = self._buffer[:at], self._buffer[at:]
            self._buffer = rest if marker in (START, CHANNEL) else rest[len(marker) :]
            self._show(text, events)
            self._end(events)
            return True
        shown = len(self._buffer) - max(held_back(self._buffer, end) for end in _ENDS)
        text, self._buffer = self._buffer[:shown], self._buffer[shown:]
        self._show(text, events)
        return False

    def _show(self, text: str, events: list[Event]) -> None:
        shown = text
        if self._kind != "content":
            whole = self._blank + text
            whole = whole if self._shown else whole.lstrip(SPACE)
            shown = whole.rstrip(SPACE)
            self._blank = whole[len(shown) :]
        if not shown:
            return
        if self._kind == "call":
            self._arguments.append(shown)
            events.append(Arguments(shown))
        elif self._kind == "reasoning":
            events.append(Reasoning(shown))
        else:
            apart = "\n\n" if self._had_content and not self._shown else ""
            events.append(Content(apart + shown))
            self._had_content = True
        self._shown = True

    def _end(self, events: list[Event]) -> None:
        if self._kind == "call":
            text = "".join(self._arguments)
            if not text:
                events += [Arguments("{}"), CallEnd()]
            elif _is_json(text):
                events.append(CallEnd())
        self._in_text, self._kind, self._arguments = False, "content", []


def _kind_of(header: str, names: Collection[str] | None) -> tuple[str, str]:
    """(content, reasoning or call; the name of what is called)."""
    recipient, channel = _RECIPIENT.search(header), _CHANNEL.search(header)
    role = _ROLE.match(header.removeprefix(START))
    if recipient is not None and recipient[1] != "assistant":
        name = recipient[1].removeprefix(_NAMESPACE)
        called = names is not None and (name != recipient[1] or name in names)
        return ("call", name) if called and name else ("reasoning", "")
    if role is not None and role[1] not in ("", "assistant"):
        return "reasoning", ""  # a tool's answer that the model imagines
    return ("reasoning" if channel is not None and channel[1] == "analysis" else "content"), ""


def _may_begin(header: str) -> bool:
    """Whether a header may begin like this. What more text follows never makes it one again."""
    if START.startswith(header):
        return True
    rest = header.removeprefix(START).lstrip(SPACE)
    if "assistant".startswith(rest):
        return True
    if header.startswith(START) and not rest.startswith("assistant"):
        return True  # another's role
    more = rest.removeprefix("assistant").lstrip(SPACE)
    return any(more.startswith(begin) or begin.startswith(more) for begin in (CHANNEL, "to=", CONSTRAIN, *_HEADER_ENDS))


def _without_role(header: str) -> str:
    return header.removeprefix(START).removeprefix("assistant") if header.startswith(START) else header


def _first(text: str, markers: Sequence[str], after: int = 0) -> tuple[int, str]:
    """(where, which) of the first of the markers; (-1, "") without one."""
    found = [(at, marker) for marker in markers if (at := text.find(marker, after)) >= 0]
    return min(found) if found else (-1, "")


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def message_is_open(prompt_end: str) -> bool:
    """Whether the prompt's last text is the beginning of a message's."""
    last = max((prompt_end.rfind(marker), marker) for marker in (*MARKERS, END))
    return last[1] == MESSAGE if last[0] >= 0 else bool(prompt_end.strip(SPACE))


# -- the conversation --------------------------------------------------------------------------------------------------


def as_harmony(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same conversation as gpt-oss' template reads it: reasoning as `thinking`, one call a message.

    Each is followed by its result: the template takes a result to be that of the call before it.
    """
    told: list[dict[str, Any]] = []
    placed: set[int] = set()
    for at, message in enumerate(messages):
        if at in placed:
            continue
        if message["role"] != "assistant":
            told.append(message)
            continue
        plain = _with_thinking(message)
        calls: list[dict[str, Any]] = plain.pop("tool_calls", None) or []
        results = _results_after(messages, at) if len(calls) > 1 else {}
        if not calls:
            told.append(plain)
        for number, call in enumerate(calls):
            told.append({**(plain if number == 0 else {"role": "assistant", "content": ""}), "tool_calls": [call]})
            place = results.pop(call.get("id"), None)
            if place is not None:
                told.append(messages[place])
                placed.add(place)
    return told


def _results_after(messages: list[dict[str, Any]], at: int) -> dict[Any, int]:
    """Where the results of the calls of messages[at] are, by their ids; other answers' calls may have the same."""
    results: dict[Any, int] = {}
    for place in range(at + 1, len(messages)):
        message = messages[place]
        if message["role"] == "assistant":
            break
        if message["role"] == "tool" and "tool_call_id" in message:
            results.setdefault(message["tool_call_id"], place)
    return results


def _with_thinking(message: dict[str, Any]) -> dict[str, Any]:
    """With a call, the template takes what was thought or what was said: both are one thought then."""
    plain = {key: value for key, value in message.items() if key != "reasoning_content"}
    thought, said = message.get("reasoning_content"), message.get("content") or ""
    if thought and message.get("tool_calls") and said:
        return {**plain, "content": "", "thinking": f"{thought}\n\n{said}"}
    return {**plain, "thinking": thought} if thought else plain
