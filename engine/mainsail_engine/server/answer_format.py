"""How this model writes tool calls and reasoning, and what reads them. Chosen once, from its chat template.

text ──▶ ReasoningSplitter ──content──▶ ToolParser ──▶ events (server/tools/events.py)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass

from mainsail_engine.server.reasoning import ReasoningSplitter, Tags, choose_reasoning
from mainsail_engine.server.tools.events import Arguments, CallEnd, CallStart, Content, Event, Reasoning, ToolParser
from mainsail_engine.server.tools.hermes import HermesParser
from mainsail_engine.server.tools.llama_json import LlamaJsonParser
from mainsail_engine.server.tools.mistral import MistralParser
from mainsail_engine.server.tools.pythonic import PythonicParser

TOOL_PARSERS: dict[str, Callable[[Collection[str]], ToolParser]] = {
    "hermes": lambda _: HermesParser(),
    "llama3_json": LlamaJsonParser,
    "mistral": lambda _: MistralParser(),
    "pythonic": PythonicParser,
}
"""By the names that --tool-call-parser takes."""
_PYTHONIC = re.compile(r"\[\w+\(\w+=")


@dataclass(frozen=True, slots=True)
class AnswerFormat:
    tool_parser: str
    template_has_tools: bool
    """Otherwise the tools are described in a system message (tools/prompt.py)."""
    mistral_arguments: bool
    """Mistral's newer form, name[ARGS]{…}."""
    reasoning: Tags | None

    def reader(self, names: Collection[str] | None, prompt_end: str, *, one_call: bool) -> AnswerReader | None:
        """What reads one answer; None: there is nothing to tell apart. names: the tools that may be called."""
        splitter = None if self.reasoning is None else ReasoningSplitter(self.reasoning, prompt_end)
        tools = None if names is None else TOOL_PARSERS[self.tool_parser](names)
        return AnswerReader(splitter, tools, one_call=one_call) if splitter or tools else None


def choose_format(template: str | None, *, tool_parser: str = "auto", reasoning_parser: str = "auto") -> AnswerFormat:
    source = template or ""
    return AnswerFormat(
        tool_parser=_choose_tools(source) if tool_parser == "auto" else tool_parser,
        template_has_tools="tools" in source,
        mistral_arguments="[ARGS]" in source,
        reasoning=choose_reasoning(reasoning_parser, template),
    )


def _choose_tools(source: str) -> str:
    if "[TOOL_CALLS]" in source:
        return "mistral"
    if "<tool_call>" in source:
        return "hermes"
    if _PYTHONIC.search(source):
        return "pythonic"
    if "<|python_tag|>" in source or ("ipython" in source and '"parameters"' in source):
        return "llama3_json"
    return "hermes"


class AnswerReader:
    """One answer's text in, events out."""

    def __init__(self, splitter: ReasoningSplitter | None, tools: ToolParser | None, *, one_call: bool) -> None:
        """one_call: what comes after the first call is dropped."""
        self._splitter, self._tools = splitter, tools
        self._one_call = one_call
        self._over = False
        self.num_calls = 0

    @property
    def reasons(self) -> bool:
        return self._splitter is not None and self._splitter.reasons

    def feed(self, text: str) -> list[Event]:
        return self._bounded(self._parsed(self._splitter.feed(text) if self._splitter else [Content(text)]))

    def finish(self) -> list[Event]:
        events = self._parsed(self._splitter.finish()) if self._splitter else []
        return self._bounded(events + (self._tools.finish() if self._tools else []))

    def _parsed(self, events: list[Event]) -> list[Event]:
        if self._tools is None:
            return events
        parsed: list[Event] = []
        for event in events:
            parsed += self._tools.feed(event.text) if isinstance(event, Content) else [event]
        return parsed

    def _bounded(self, events: list[Event]) -> list[Event]:
        kept: list[Event] = []
        for event in events:
            if self._over:
                break
            self.num_calls += isinstance(event, CallStart)
            self._over = self._one_call and isinstance(event, CallEnd)
            if not (isinstance(event, Content | Reasoning | Arguments) and not event.text):
                kept.append(event)
        return kept
