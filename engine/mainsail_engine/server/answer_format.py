"""How this model writes tool calls and reasoning, and what reads them. Chosen once, from its chat template.

text ──▶ ReasoningSplitter ──content──▶ ToolParser ──▶ events (server/tools/events.py)
text ──▶ HarmonyParser ──▶ events, where one format (gpt-oss') has both
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol

from mainsail_engine.server.reasoning import ReasoningSplitter, Tags, choose_reasoning
from mainsail_engine.server.tools.events import Arguments, CallEnd, CallStart, Content, Event, Reasoning, ToolParser
from mainsail_engine.server.tools.harmony import CHANNEL, MESSAGE, HarmonyParser
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
"""By the names that --tool-call-parser takes; HARMONY is another."""
HARMONY, HARMONY_REASONING = "openai", "openai_gptoss"
"""The names of one format: either of them means both."""
_PYTHONIC = re.compile(r"\[\w+\(\w+=")


@dataclass(frozen=True, slots=True)
class AnswerFormat:
    tool_parser: str
    template_has_tools: bool
    """Otherwise the tools are described in a system message (tools/prompt.py)."""
    mistral_arguments: bool
    """Mistral's newer form, name[ARGS]{…}."""
    reasoning: Tags | None
    harmony: bool = False
    """Reasoning and calls are messages in channels of their own (tools/harmony.py)."""

    @property
    def reads(self) -> bool:
        """Whether something is to be told apart even in an answer without tools."""
        return self.harmony or self.reasoning is not None

    def reader(self, names: Collection[str] | None, prompt_end: str, *, one_call: bool) -> AnswerReader | None:
        """What reads one answer; None: there is nothing to tell apart. names: the tools that may be called."""
        if self.harmony:
            return AnswerReader(HarmonyParser(names, prompt_end), None, one_call=one_call)
        splitter = None if self.reasoning is None else ReasoningSplitter(self.reasoning, prompt_end)
        tools = None if names is None else TOOL_PARSERS[self.tool_parser](names)
        return AnswerReader(splitter, tools, one_call=one_call) if splitter or tools else None


def choose_format(template: str | None, *, tool_parser: str = "auto", reasoning_parser: str = "auto") -> AnswerFormat:
    source = template or ""
    tool_parser = _choose_tools(source) if tool_parser == "auto" else tool_parser
    if reasoning_parser == HARMONY_REASONING or tool_parser == HARMONY:
        return AnswerFormat(HARMONY, "tools" in source, mistral_arguments=False, reasoning=None, harmony=True)
    return AnswerFormat(
        tool_parser=tool_parser,
        template_has_tools="tools" in source,
        mistral_arguments="[ARGS]" in source,
        reasoning=choose_reasoning(reasoning_parser, template),
    )


def _choose_tools(source: str) -> str:
    if CHANNEL in source and MESSAGE in source:
        return HARMONY
    if "[TOOL_CALLS]" in source:
        return "mistral"
    if "<tool_call>" in source:
        return "hermes"
    if _PYTHONIC.search(source):
        return "pythonic"
    if "<|python_tag|>" in source or ("ipython" in source and '"parameters"' in source):
        return "llama3_json"
    return "hermes"


class Splitter(Protocol):
    """What reads an answer's text first."""

    @property
    def reasons(self) -> bool:
        """The model is reasoning right now."""
        ...

    def feed(self, text: str) -> list[Event]: ...

    def finish(self) -> list[Event]: ...


class AnswerReader:
    """One answer's text in, events out."""

    def __init__(self, splitter: Splitter | None, tools: ToolParser | None, *, one_call: bool) -> None:
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
