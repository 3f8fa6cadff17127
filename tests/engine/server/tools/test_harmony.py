"""Harmony (gpt-oss): which channel is what, in any pieces; what models get wrong; conversations for the template."""

from __future__ import annotations

import json
from typing import Any

import pytest
import xgrammar
from hypothesis import given, settings
from hypothesis import strategies as st
from xgrammar.testing import _is_grammar_accept_string

from mainsail_engine.server.answer_format import choose_format
from mainsail_engine.server.constraints import chat_grammar
from mainsail_engine.server.message import MessageDeltas, calls_of
from mainsail_engine.server.schemas import FunctionDefinition, Tool
from mainsail_engine.server.tools.events import CallEnd, Content, Event, Reasoning, joined
from mainsail_engine.server.tools.harmony import MAX_HEADER, HarmonyParser, as_harmony
from mainsail_engine.structured import grammar as g

NAMES = ("f", "get_weather")
PROMPT = "<|end|><|start|>assistant"
A, F, M, E = "<|channel|>analysis<|message|>", "<|channel|>final<|message|>", "<|message|>", "<|end|>"
S = "<|start|>assistant"


def read(text: str, size: int | None = None, *, prompt_end: str = PROMPT, names: Any = NAMES) -> list[Event]:
    parser = HarmonyParser(names, prompt_end)
    pieces = [text] if size is None else [text[i : i + size] for i in range(0, len(text), size)]
    events = [event for piece in pieces for event in parser.feed(piece)]
    return joined(events + parser.finish())


def told(events: list[Event]) -> tuple[str, str, list[tuple[str, Any]]]:
    """(content, reasoning, calls)"""
    content = "".join(event.text for event in events if isinstance(event, Content))
    reasoning = "".join(event.text for event in events if isinstance(event, Reasoning))
    return content, reasoning, [(name, json.loads(arguments)) for name, arguments in calls_of(events)]


CALL = '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a": 1}<|call|>'
CASES: dict[str, tuple[str, str, str, list[tuple[str, Any]]]] = {
    "an answer": (f"{A}Hm.{E}{S}{F}Yes.<|return|>", "Yes.", "Hm.", []),
    "the engine drops what it stopped at": (f"{A}Hm.{E}{S}{F}Yes.", "Yes.", "Hm.", []),
    "a call": (f"{A}Look.{E}{S}{CALL}", "", "Look.", [("f", {"a": 1})]),
    "a call by the role": (f'{A}x{E}{S} to=functions.f<|channel|>commentary json<|message|>{{"a": 1}}<|call|>', "", "x",
                           [("f", {"a": 1})]),
    "the role already given, then the recipient": (' to=functions.f<|channel|>commentary<|message|>{"a": 1}', "", "",
                                                   [("f", {"a": 1})]),
    "said before a call": (f"{A}x{E}{S}<|channel|>commentary<|message|>I look.{E}{S}{CALL}", "I look.", "x",
                           [("f", {"a": 1})]),
    "two calls": (f"{CALL}{S}{CALL}", "", "", [("f", {"a": 1})] * 2),
    "two messages": (f"{F}One.{E}{S}{F}Two.", "One.\n\nTwo.", "", []),
    "a call in the analysis channel": ('<|channel|>analysis to=functions.f code<|message|>{"a": 1}<|call|>', "", "",
                                       [("f", {"a": 1})]),
    "a bare name of the request": ('<|channel|>commentary to=f<|message|>{"a": 1}', "", "", [("f", {"a": 1})]),
    "a tool that nobody has": (f"<|channel|>analysis to=python code<|message|>1 + 1<|call|>{S}{F}2", "2", "1 + 1", []),
    "an imagined result": (f"{CALL}<|start|>functions.f to=assistant<|channel|>commentary<|message|>3{E}{S}{F}Three",
                           "Three", "3", [("f", {"a": 1})]),
    "no arguments": ("<|channel|>commentary to=functions.f<|message|><|call|>", "", "", [("f", {})]),
    "no header at all": ("Hello\n", "Hello\n", "", []),
    "the end of a message is missing": (f"{A}Hm.{S}{F}Yes.", "Yes.", "Hm.", []),
    "the next header alone": (f"{A}Hm.{F}Yes.", "Yes.", "Hm.", []),
    "the start is missing": (f"{A}Hm.{E}assistant{F}Yes.", "Yes.", "Hm.", []),
    "white space between messages": (f"{A}\nHm.\n{E}\n{S}{F} Yes.\n", " Yes.\n", "Hm.", []),
    "a header without a message": (f"<|channel|>analysis{E}{S}{F}Yes.", "Yes.", "", []),
    "a header that is cut off": (f"{A}Hm.{E}{S}<|channel|>fin", "", "Hm.", []),
    "no channel": (f"{M}Yes.", "Yes.", "", []),
    "less than a marker": (f"{F}a <| b <|endless", "a <| b <|endless", "", []),
    "an endless header": ("<|channel|>" + "x" * MAX_HEADER + M, "<|channel|>" + "x" * MAX_HEADER + M, "", []),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_models_write(case: str) -> None:
    text, *expected = CASES[case]
    for size in (None, 1, 3, 7):
        assert told(read(text, size)) == tuple(expected), size


def test_every_cut_gives_the_same() -> None:
    text = f"{A}Hm <| so.{E}{S}<|channel|>commentary<|message|>I look.{E}{S}{CALL}{S}{F}Yes.<|return|>"
    whole = read(text)
    for at in range(len(text)):
        parser = HarmonyParser(NAMES, PROMPT)
        assert joined(parser.feed(text[:at]) + parser.feed(text[at:]) + parser.finish()) == whole, at


def test_arguments_come_as_they_are_written_and_the_call_ends_where_they_are_whole() -> None:
    parser = HarmonyParser(NAMES, PROMPT)
    events = parser.feed('<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a":')
    assert calls_of(events) == [("f", '{"a":')]
    assert CallEnd() not in parser.feed(" 1")
    assert parser.feed("}<|call|>")[-1] == CallEnd()
    cut = read('<|channel|>commentary to=functions.f<|message|>{"a": ')
    assert calls_of(cut) == [("f", '{"a":')]
    assert CallEnd() not in cut


def test_without_tools_nothing_is_a_call() -> None:
    assert told(read(CALL, names=None)) == ("", '{"a": 1}', [])


@pytest.mark.parametrize(
    ("prompt_end", "text", "expected"),
    [
        ("<|end|>", f"{S}{A}Hm.{E}{S}{F}Yes.", ("Yes.", "Hm.", [])),
        (f"{E}{S}{F}The answer", " is 3.", (" is 3.", "", [])),
        ("long text of a message that goes on", " and on.", (" and on.", "", [])),
        (f"{E}{S}{A}", f"Hm.{E}{S}{F}Yes.", ("Yes.", "Hm.", [])),
        (f"{E}{S}<|channel|>", f"analysis{M}Hm.{E}{S}{F}Yes.", ("Yes.", "Hm.", [])),
    ],
)
def test_the_answer_begins_where_the_prompt_ends(prompt_end: str, text: str, expected: Any) -> None:
    for size in (None, 1):
        assert told(read(text, size, prompt_end=prompt_end)) == expected


def test_reasoning_is_counted_while_it_is_written() -> None:
    parser = HarmonyParser(NAMES, PROMPT)
    seen = []
    for piece in ("<|channel|>", "analysis", M, "Hm.", E, S, "<|channel|>", "final", M, "Yes."):
        parser.feed(piece)
        seen.append(parser.reasons)
    assert seen == [False, True, True, True, False, False, False, False, False, False]


PIECES = st.lists(
    st.sampled_from([
        A, F, E, S, M, CALL, "<|call|>", "<|return|>", "<|start|>", "<|channel|>", "commentary", "assistant",
        " to=functions.f", "<|constrain|>json", "{", '"a": 1}', "text ", "\n", "<|", "|>", "x" * 200, "é",
    ]),
    max_size=12,
).map("".join)  # fmt: skip


@given(text=PIECES, size=st.integers(1, 9), prompt_end=st.sampled_from([PROMPT, E, "", f"{S}{F}Hi", f"{S}{A}"]))
@settings(max_examples=300, deadline=None)
def test_the_pieces_do_not_matter_and_nothing_raises(text: str, size: int, prompt_end: str) -> None:
    assert read(text, size, prompt_end=prompt_end) == read(text, prompt_end=prompt_end)


# -- grammars --------------------------------------------------------------------------------------------------------

FORM = choose_format("tools <|channel|> <|message|>")
STRICT = Tool(type="function", function=FunctionDefinition(
    name="f", strict=True, parameters={"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"],
                                       "additionalProperties": False}))  # fmt: skip
ARGUMENTS = '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a": 1}'


def accepts(text: str, *, choice: Any = "none", content: bool = False, prompt_end: str = PROMPT) -> bool:
    grammar = chat_grammar(
        FORM, (g.json_object(), "response_format") if content else None, [STRICT], choice, parallel=True,
        prompt_end=prompt_end,
    )  # fmt: skip
    assert grammar is not None
    compiled = xgrammar.Grammar.from_structural_tag(grammar[0].text)
    return bool(_is_grammar_accept_string(compiled, text))


@pytest.mark.parametrize("thought", ["", f"{A}Hm. <| so{E}{S}"])
def test_grammars_allow_reasoning_and_then_what_was_asked_for(thought: str) -> None:
    assert accepts(thought + ARGUMENTS, choice="required")
    assert not accepts(f"{thought}{F}Yes.", choice="required")
    assert not accepts(thought + ARGUMENTS.replace("1", '"x"'), choice="required")
    assert accepts(thought + F + '{"b": [1]}', content=True)
    assert not accepts(f"{thought}{F}Yes.", content=True)
    assert accepts(thought + ARGUMENTS, content=True, choice="auto")
    assert accepts(thought + F + "{}", content=True, choice="auto")


def test_grammars_of_calls_that_need_not_be() -> None:
    assert accepts(f"{A}Hm.{E}{S}{F}Yes.", choice="auto")
    assert accepts(f"{A}Hm.{E}{S}{ARGUMENTS}", choice="auto")
    assert not accepts(f"{A}Hm.{E}{S}" + ARGUMENTS.replace('"a"', '"b"'), choice="auto")


def test_reasoning_in_a_grammar_is_one_message() -> None:
    assert not accepts(f"{A}Hm.{S}{F}" + "{}", content=True)
    assert not accepts(f"{A}Hm.{E}{F}" + "{}", content=True)


def test_grammars_begin_where_the_prompt_ends() -> None:
    assert accepts('{"b": 1}', content=True, prompt_end=f"{E}{S}{F}")
    assert accepts('{"b": 1}', content=True, prompt_end="text of a message that goes on")
    assert accepts(f"{S}{F}" + '{"b": 1}', content=True, prompt_end=f"<|start|>user{M}?{E}")


# -- the conversation --------------------------------------------------------------------------------------------------


def call(name: str, number: int) -> dict[str, Any]:
    return {"id": f"call_{number}", "type": "function", "function": {"name": name, "arguments": {"n": number}}}


def result(number: int) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": f"call_{number}", "content": str(number)}


def test_each_call_is_followed_by_its_result() -> None:
    messages = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "", "reasoning_content": "Hm.", "tool_calls": [call("f", 1), call("g", 2)]},
        result(2), result(1), {"role": "assistant", "content": "Done."},
    ]  # fmt: skip
    told = as_harmony(messages)
    assert [m["role"] for m in told] == ["user", "assistant", "tool", "assistant", "tool", "assistant"]
    assert [m.get("content") for m in told if m["role"] == "tool"] == ["1", "2"]
    assert told[1] == {"role": "assistant", "content": "", "thinking": "Hm.", "tool_calls": [call("f", 1)]}
    assert told[3] == {"role": "assistant", "content": "", "tool_calls": [call("g", 2)]}


def test_reasoning_goes_by_the_templates_name() -> None:
    thought = {"role": "assistant", "content": "Yes.", "reasoning_content": "Hm."}
    assert as_harmony([thought]) == [{"role": "assistant", "content": "Yes.", "thinking": "Hm."}]
    called = as_harmony([{**thought, "tool_calls": [call("f", 1)]}, result(1)])
    assert called[0]["thinking"] == "Hm.\n\nYes."
    assert called[0]["content"] == ""
    assert called[1] == result(1)


def test_ids_that_come_again_are_those_of_their_own_turn() -> None:
    """Some clients count the calls of each answer anew."""
    turn = {"role": "assistant", "content": "", "tool_calls": [call("f", 1), call("g", 2)]}
    results = [{**result(id_), "content": content} for id_, content in ((1, "a"), (2, "b"), (2, "d"), (1, "c"))]
    told = as_harmony([turn, *results[:2], {"role": "user", "content": "again"}, turn, *results[2:]])
    assert [m["content"] if m["role"] == "tool" else m["role"] for m in told] == [
        "assistant", "a", "assistant", "b", "user", "assistant", "c", "assistant", "d",
    ]  # fmt: skip


def test_what_the_prompt_has_opened_is_no_call_of_the_answer() -> None:
    """Its name was never told: a client could not tell whose arguments these are."""
    parser = HarmonyParser(NAMES, '<|start|>assistant<|channel|>commentary to=functions.f<|message|>{"a":')
    deltas = MessageDeltas("id", 0, with_reasoning=True)
    told = [delta for piece in (" 1}", E, S + CALL) for delta in deltas.of(parser.feed(piece))]
    assert told[0] == {"content": " 1}"}
    assert [call["index"] for delta in told for call in delta.get("tool_calls", ())] == [0, 0]
