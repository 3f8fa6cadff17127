"""Parsers of tool calls and reasoning: what each form means, and that neither the pieces nor the nonsense matter."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mainsail_engine.server.answer_format import TOOL_PARSERS, AnswerFormat, AnswerReader, choose_format
from mainsail_engine.server.message import MessageDeltas, calls_of, message_of
from mainsail_engine.server.reasoning import MISTRAL_THINK, THINK, ReasoningSplitter
from mainsail_engine.server.tools.events import Content, Event, Reasoning, joined

NAMES = ("f", "get_weather")


def read(parser: str, text: str, size: int | None = None) -> list[Event]:
    made = TOOL_PARSERS[parser](NAMES)
    pieces = [text] if size is None else [text[i : i + size] for i in range(0, len(text), size)]
    events = [event for piece in pieces for event in made.feed(piece)]
    return joined(events + made.finish())


def content(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Content))


ONE: list[tuple[str, object]] = [("f", {"a": 1})]
CASES: list[tuple[str, str, str, list[tuple[str, object]]]] = [
    ("hermes", 'Sure.\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>', "Sure.", ONE),
    ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>\n\nDone', "Done", ONE),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1}}', "", ONE),
    ("hermes", '<tool_call>\n{"name": "f"}\n</tool_call>', "", [("f", {})]),
    ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", ONE),
    ("hermes", '<tool_call>{"name": "f", "arguments": null}</tool_call>', "", [("f", {})]),
    ("hermes", '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>\n<tool_call>\n'
     '{"name": "other", "arguments": {"s": "</tool_call> \\" {"}}\n</tool_call>', "",
     [*ONE, ("other", {"s": '</tool_call> " {'})]),
    ("hermes", "<tool_call>no JSON</tool_call>", "<tool_call>no JSON</tool_call>", []),
    ("hermes", '<tool_call><tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>', "<tool_call>", ONE),
    ("hermes", "a < b <tool", "a < b <tool", []),
    ("hermes", "  plain text \n", "  plain text \n", []),
    ("llama3_json", '{"name": "f", "parameters": {"a": 1}}', "", ONE),
    ("llama3_json", '<|python_tag|>{"name": "f", "parameters": {"a": 1}}; {"name": "f", "parameters": {"a": 1}}', "",
     ONE * 2),
    ("llama3_json", '{"type": "function", "name": "f", "parameters": {"a": 1}}', "", ONE),
    ("llama3_json", '{"name": "Bob", "age": 3}', '{"name": "Bob", "age": 3}', []),
    ("llama3_json", '{"answer": [1, 2]}', '{"answer": [1, 2]}', []),
    ("llama3_json", "Hello {}", "Hello {}", []),
    ("llama3_json", "Hello <|python_tag|>print(1)", "Hello <|python_tag|>print(1)", []),
    ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]', "",
     [*ONE, ("g", {})]),
    ("mistral", 'Well: [TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]g[CALL_ID]abc123[ARGS]{"s": "}"}', "Well:",
     [*ONE, ("g", {"s": "}"})]),
    ("mistral", '[TOOL_CALLS]f{"a": 1}', "", ONE),
    ("mistral", "[TOOL_CALLS]of course\nnot", "[TOOL_CALLS]of course\nnot", []),
    ("mistral", "[TOOL_CALLS][1, 2]", "[TOOL_CALLS][1, 2]", []),
    ("pythonic", "[f(a=1)]", "", ONE),
    ("pythonic", "[f(a=1), get_weather(city='Paris, (FR)', days=[1, 2], ok=True, no=None)]", "",
     [*ONE, ("get_weather", {"city": "Paris, (FR)", "days": [1, 2], "ok": True, "no": None})]),
    ("pythonic", '[f(a=true, b=null, c={"x": [1]}, d=word)]', "",
     [("f", {"a": True, "b": None, "c": {"x": [1]}, "d": "word"})]),
    ("pythonic", "[f()]", "", [("f", {})]),
    ("pythonic", "[1, 2, 3]", "[1, 2, 3]", []),
    ("pythonic", "[unknown(a=1)]", "[unknown(a=1)]", []),
]  # fmt: skip


@pytest.mark.parametrize(("parser", "text", "expected", "calls"), CASES, ids=[str(i) for i in range(len(CASES))])
def test_what_models_write(parser: str, text: str, expected: str, calls: list[tuple[str, object]]) -> None:
    for size in (None, 1, 3):
        events = read(parser, text, size)
        assert content(events) == expected
        assert [(name, json.loads(arguments)) for name, arguments in calls_of(events)] == calls


def test_arguments_come_as_they_are_written() -> None:
    parser = TOOL_PARSERS["hermes"](NAMES)
    assert parser.feed('<tool_call>{"name": "f", "arguments": {"a": ') != []
    assert "".join(e.text for e in parser.feed('"some long text') if not isinstance(e, Content)) == '"some long text'  # type: ignore[union-attr]


FRAGMENTS = st.sampled_from([
    "<tool_call>", "</tool_call>", "<tool", '{"name": "f"', '"arguments": ', '"parameters": {', "{", "}", "[", "]", ":",
    ",", '"', "\\", '"f"', "f", "(", ")", "f(", "a=", "'", "1", " ", "\n", ";", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]",
    "<|python_tag|>", "<think>", "</think>", "[THINK]", "text", "ß🙂", "null", "true",
    '{"name": "f", "arguments": {"a": 1}}', "[f(a=1", "get_weather",
])  # fmt: skip
TEXTS = st.lists(FRAGMENTS | st.text(max_size=3), max_size=14).map("".join)


@settings(max_examples=300, deadline=None)
@given(parser=st.sampled_from(sorted(TOOL_PARSERS)), text=TEXTS, size=st.integers(1, 7))
def test_the_pieces_do_not_matter_and_nothing_raises(parser: str, text: str, size: int) -> None:
    whole = read(parser, text)
    assert read(parser, text, 1) == whole
    assert read(parser, text, size) == whole


@settings(max_examples=200, deadline=None)
@given(text=TEXTS, size=st.integers(1, 7), opened=st.booleans(), mistral=st.booleans())
def test_reasoning_is_split_the_same_way_in_any_pieces(text: str, size: int, opened: bool, mistral: bool) -> None:
    tags = MISTRAL_THINK if mistral else THINK

    def split(step: int) -> list[Event]:
        splitter = ReasoningSplitter(tags, tags.opening + "\n" if opened else "")
        events = [e for i in range(0, len(text), step) for e in splitter.feed(text[i : i + step])]
        return joined(events + splitter.finish())

    assert split(1) == split(size) == split(len(text) or 1)


@settings(max_examples=100, deadline=None)
@given(text=TEXTS, parser=st.sampled_from(sorted(TOOL_PARSERS)), one_call=st.booleans())
def test_streamed_deltas_add_up_to_the_message(text: str, parser: str, one_call: bool) -> None:
    form = AnswerFormat(parser, True, False, THINK)
    whole, streamed = (form.reader(NAMES, "", one_call=one_call) for _ in range(2))
    assert whole is not None
    assert streamed is not None
    message = message_of(whole.feed(text) + whole.finish(), "id", 0, with_reasoning=True)
    deltas = MessageDeltas("id", 0, with_reasoning=True)
    shown = [delta for char in text for delta in deltas.of(streamed.feed(char))] + deltas.of(streamed.finish())
    assert "".join(d.get("content", "") for d in shown) == (message["content"] or "")
    assert "".join(d.get("reasoning_content", "") for d in shown) == message.get("reasoning_content", "")
    calls: list[dict[str, str]] = []
    for part in (part for delta in shown for part in delta.get("tool_calls", ())):
        if "id" in part:
            assert part["index"] == len(calls)
            calls.append({"id": part["id"], "name": part["function"]["name"], "arguments": ""})
        calls[part["index"]]["arguments"] += part["function"]["arguments"]
    expected = [
        {"id": c["id"], "name": c["function"]["name"], "arguments": c["function"]["arguments"]}
        for c in message.get("tool_calls", ())
    ]
    assert calls == expected
    assert not one_call or len(calls) <= 1


def test_reasoning_then_answer_then_call() -> None:
    form = AnswerFormat("hermes", True, False, THINK)
    reader = form.reader(NAMES, "<|im_start|>assistant\n", one_call=False)
    assert isinstance(reader, AnswerReader)
    text = '<think>\nLet me see.\n</think>\n\nI ask.\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    message = message_of(reader.feed(text) + reader.finish(), "id", 0, with_reasoning=True)
    assert (message["reasoning_content"], message["content"]) == ("Let me see.", "I ask.")
    assert message["reasoning"] == message["reasoning_content"]
    assert message["tool_calls"][0]["function"] == {"name": "f", "arguments": "{}"}


def test_reasoning_that_the_prompt_opened() -> None:
    splitter = ReasoningSplitter(THINK, "assistant\n<think>\n")
    assert joined(splitter.feed("hm </think> yes <think>") + splitter.finish()) == [
        Reasoning("hm"),
        Content("yes <think>"),
    ]


@pytest.mark.parametrize(
    ("template", "parser", "reasons"),
    [
        ("{% if tools %}<tool_call>{% endif %}", "hermes", False),
        ("{% if tools %}<tool_call>{% endif %}{{ content.split('</think>') }}", "hermes", True),
        ("{% if tools %}[TOOL_CALLS]{% endif %}", "mistral", False),
        ('{% if tools %}ipython {"name": f, "parameters": x}{% endif %}', "llama3_json", False),
        ("{% if tools %}[func(param=1)]{% endif %}", "pythonic", False),
        ("{% if tools %}<|channel|>analysis<|message|>{% endif %}", "openai", False),
        ("{{ messages }}", "hermes", False),
        (None, "hermes", False),
    ],
)
def test_the_template_tells(template: str | None, parser: str, reasons: bool) -> None:
    form = choose_format(template)
    assert form.tool_parser == parser
    assert (form.reasoning is not None) == reasons
    assert form.template_has_tools == ("tools" in (template or ""))
    assert form.harmony == (parser == "openai")
    assert choose_format(template, tool_parser="mistral", reasoning_parser="none").tool_parser == "mistral"
    assert choose_format(template, reasoning_parser="openai_gptoss").harmony
