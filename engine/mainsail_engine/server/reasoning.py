"""Reasoning split from the answer: <think> … </think>, at the beginning of what the model writes.

Some templates end the prompt with the opening tag: then the answer begins inside. A tag anywhere else is text.
White space around reasoning belongs to the format. Fed in any pieces, the same comes out; nothing raises.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mainsail_engine.errors import RequestError
from mainsail_engine.server.tools.events import Content, Event, Reasoning, up_to
from mainsail_engine.server.tools.json_call import SPACE


@dataclass(frozen=True, slots=True)
class Tags:
    opening: str
    closing: str


THINK, MISTRAL_THINK = Tags("<think>", "</think>"), Tags("[THINK]", "[/THINK]")
PARSERS: dict[str, Tags | None] = {
    "none": None, "think": THINK, "deepseek_r1": THINK, "qwen3": THINK, "mistral": MISTRAL_THINK,
}  # fmt: skip
"""By the names that --reasoning-parser takes."""


def choose_reasoning(name: str, template: str | None) -> Tags | None:
    """auto: by what the chat template knows."""
    if name != "auto":
        return PARSERS[name]
    for tags in (THINK, MISTRAL_THINK):
        if template is not None and tags.closing in template:
            return tags
    return None


def effort_variables(effort: str | None, template: str, *, reasons: bool, harmony: bool) -> dict[str, Any]:
    """How much to think, as the template's variables have it: by levels, or on and off.

    reasons: the model's answers may begin with reasoning. Raises RequestError where the template takes no such wish."""
    if effort is None or (effort == "none" and not (reasons or harmony)):
        return {}
    if harmony and effort != "none":  # it knows three levels
        return {"reasoning_effort": {"minimal": "low", "xhigh": "high", "max": "high"}.get(effort, effort)}
    if "enable_thinking" in template and (effort == "none" or "reasoning_effort" not in template):
        return {"enable_thinking": effort != "none"}
    if "reasoning_effort" in template and not harmony:
        return {"reasoning_effort": effort}
    message = f"{effort!r} is nothing that this model's chat template can be told; leave it out"
    raise RequestError(f"reasoning_effort: {message}", param="reasoning_effort", code="unsupported")


class ReasoningSplitter:
    """start ──opening tag──▶ reasoning ──closing tag──▶ answer;   start ──anything else──▶ answer"""

    def __init__(self, tags: Tags, prompt_end: str) -> None:
        """prompt_end: the last characters of the prompt's text."""
        self._tags = tags
        self._buffer = ""
        self.reasons = prompt_end.rstrip(SPACE).endswith(tags.opening)
        """The model is reasoning right now."""
        self._at_start = not self.reasons
        self._blank = ""
        """White space whose fate depends on what follows."""
        self._shown = False
        """Something of the part that it is in was handed out."""

    def feed(self, text: str) -> list[Event]:
        self._buffer += text
        events: list[Event] = []
        if self._at_start:
            self._start()
        if self.reasons:
            self._reason(events)
        if not self._at_start and not self.reasons and self._buffer:
            self._answer(events)
        return events

    def finish(self) -> list[Event]:
        rest, self._buffer = self._buffer, ""
        if self.reasons:
            return self._reasoning(rest)
        return [Content(rest)] if rest else []

    def _start(self) -> None:
        seen = self._buffer.lstrip(SPACE)
        opening = self._tags.opening
        if seen.startswith(opening):
            self._buffer = seen.removeprefix(opening)
            self._at_start, self.reasons = False, True
        elif seen and not opening.startswith(seen):
            self._at_start, self._shown = False, True  # no reasoning: the answer as it is

    def _reason(self, events: list[Event]) -> None:
        before, found, self._buffer = up_to(self._buffer, self._tags.closing)
        events += self._reasoning(before)
        if found:
            self.reasons, self._shown, self._blank = False, False, ""

    def _reasoning(self, text: str) -> list[Event]:
        whole = self._blank + text
        whole = whole if self._shown else whole.lstrip(SPACE)
        shown = whole.rstrip(SPACE)
        self._blank = whole[len(shown) :]
        self._shown = self._shown or bool(shown)
        return [Reasoning(shown)] if shown else []

    def _answer(self, events: list[Event]) -> None:
        text, self._buffer = self._buffer, ""
        text = text if self._shown else text.lstrip(SPACE)
        if text:
            self._shown = True
            events.append(Content(text))
