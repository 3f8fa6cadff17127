"""What the client libraries of agents send and look for, as they do it on the wire (docs/clients.md names them)."""

from __future__ import annotations

import json
from typing import Any

import pytest
import xgrammar
from xgrammar.testing import _is_grammar_accept_string

from mainsail_engine.errors import RequestError
from mainsail_engine.server.answer_format import choose_format
from mainsail_engine.server.constraints import chat_grammar
from mainsail_engine.server.reasoning import effort_variables
from mainsail_engine.server.schemas import AllowedChoice, Tool

pytestmark = pytest.mark.model
USER = [{"role": "user", "content": "Weather in Oslo?"}]
CITY = {"type": "object", "properties": {"city": {"enum": ["Oslo", "Paris"]}}, "required": ["city"]}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": CITY}},
    {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}},
]


def allowed(mode: str, *names: str) -> dict[str, Any]:
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


def test_a_history_as_agents_keep_it(engine: Any) -> None:
    """Calls with the index of their delta, an assistant that said nothing, hints for others' caches, labels."""
    call = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    hinted = {"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}
    messages = [
        {"role": "system", "content": [hinted]},
        *USER,
        {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "name": "weather", "content": [{"type": "text", "text": "Rain."}]},
        {"role": "assistant", "content": None, "refusal": None, "annotations": [], "tool_calls": []},
        *USER,
    ]
    told = {
        "metadata": {"run": "1"}, "verbosity": "medium", "prompt_cache_key": "k", "reasoning_effort": "none",
        "prompt_cache_retention": "24h", "prompt_cache_options": {"ttl": "30m"},
    }  # fmt: skip
    answer = engine.chat(messages=messages, tools=TOOLS, max_tokens=2, **told)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("given", "kept"), [("run-7/step:3", True), ("", False), ("two words", False), ("x" * 129, False)]
)
def test_every_answer_names_its_request(engine: Any, given: str, kept: bool) -> None:
    headers, seen = {"x-request-id": given} if given else {}, []
    for body in ({"max_tokens": 1}, {"max_tokens": 1, "stream": True}, {"max_tokens": 0}):
        asked = {"model": "smol", "messages": USER, **body}
        seen += engine.http.post(f"{engine.url}/v1/chat/completions", json=asked, headers=headers).headers.get_list(
            "x-request-id"
        )
    seen.append(engine.http.get(f"{engine.url}/v1/models/nobody", headers=headers).headers["x-request-id"])
    assert len(seen) == 4
    if kept:
        assert set(seen) == {given}
    else:
        assert len(set(seen)) == 4
        assert all(name.startswith("req_") for name in seen)


def test_forced_calls_have_no_arguments_that_nobody_named(engine: Any) -> None:
    """Without `strict` and `additionalProperties`, as most libraries describe their tools."""
    for choice in ("required", allowed("required", "weather", "clock")):
        asked = {"tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": False, "max_tokens": 60, "seed": 4}
        (choice,) = engine.chat(messages=USER, **asked).json()["choices"]
        (call,) = choice["message"]["tool_calls"]
        named = {"weather": {"city"}, "clock": set()}[call["function"]["name"]]
        assert choice["finish_reason"] == "tool_calls"
        assert set(json.loads(call["function"]["arguments"])) == named


def test_only_allowed_tools_are_called(engine: Any) -> None:
    asked = {"tools": TOOLS, "parallel_tool_calls": False, "max_tokens": 60}
    whole = engine.chat(messages=USER, tool_choice=allowed("required", "clock"), **asked).json()
    (call,) = whole["choices"][0]["message"]["tool_calls"]
    assert (call["function"]["name"], call["function"]["arguments"]) == ("clock", "{}")
    every = engine.chat(messages=USER, tool_choice="required", **asked).json()
    assert whole["usage"]["prompt_tokens"] == every["usage"]["prompt_tokens"], "the prompt tells of all"
    flat = [{"type": "function", **tool["function"]} for tool in TOOLS]
    choice = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "clock"}]}
    fields = {"tools": flat, "tool_choice": choice, "parallel_tool_calls": False, "max_output_tokens": 60}
    response = engine.post("/v1/responses", model="smol", input="Hi", **fields).json()
    assert [item["name"] for item in response["output"]] == ["clock"]
    assert response["tool_choice"] == choice


@pytest.mark.parametrize(
    ("text", "auto", "required"),
    [
        ("It is late.", True, False),
        ('<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>', True, True),
        ('So: <tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>', True, False),
        ('<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>', False, False),
    ],
)
def test_a_grammar_leaves_text_free_and_no_other_calls(text: str, auto: bool, required: bool) -> None:
    tools = [Tool.model_validate(tool) for tool in TOOLS]
    for mode, taken in (("auto", auto), ("required", required)):
        choice = AllowedChoice.model_validate(allowed(mode, "clock"))
        grammar = chat_grammar(choose_format("<tool_call>"), None, tools, choice, parallel=True, prompt_end="")
        assert grammar is not None
        compiled = xgrammar.Grammar.from_structural_tag(grammar[0].text)
        assert bool(_is_grammar_accept_string(compiled, text)) == taken, mode


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": TOOLS, "tool_choice": allowed("auto", "nobody")}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": allowed("never", "clock")}, "tool_choice.allowed_tools.mode"),
        ({"tools": TOOLS, "tool_choice": {"type": "custom"}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice"),
        ({"metadata": {str(n): "x" for n in range(17)}}, "metadata"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"verbosity": "high"}, "verbosity"),
        ({"messages": [{"role": "tool", "tool_call_id": "x", "content": None}]}, "messages.0.content"),
    ],
)
def test_what_is_still_refused_is_named(engine: Any, fields: dict[str, Any], param: str) -> None:
    response = engine.chat(**{"messages": USER, **fields})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text


def test_responses_as_agents_ask_for_them(engine: Any) -> None:
    told = {
        "include": ["reasoning.encrypted_content"], "reasoning": {"effort": "none", "summary": "auto"}, "store": False,
        "prompt_cache_retention": "in_memory", "metadata": {"run": "1"}, "client_metadata": {"turn": "1"},
        "max_output_tokens": 2,
    }  # fmt: skip
    answer = engine.post("/v1/responses", model="smol", input="Hi", **told)
    assert answer.status_code == 200, answer.text
    assert answer.json()["reasoning"] == {"effort": "none", "summary": None}
    refused = engine.post("/v1/responses", model="smol", input="Hi", reasoning={"effort": "high"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "reasoning.effort")


QWEN, GLM, OSS = "{% if enable_thinking %}", "{{ reasoning_effort }}{{ enable_thinking }}", "{{ reasoning_effort }}"


@pytest.mark.parametrize(
    ("effort", "template", "harmony", "variables"),
    [
        (None, QWEN, False, {}),
        ("none", QWEN, False, {"enable_thinking": False}),
        ("low", QWEN, False, {"enable_thinking": True}),
        ("high", GLM, False, {"reasoning_effort": "high"}),
        ("none", GLM, False, {"enable_thinking": False}),
        ("none", OSS, False, {"reasoning_effort": "none"}),
        ("minimal", OSS, True, {"reasoning_effort": "low"}),
        ("xhigh", OSS, True, {"reasoning_effort": "high"}),
    ],
)
def test_an_effort_is_what_the_template_makes_of_it(
    effort: str | None, template: str, harmony: bool, variables: dict[str, Any]
) -> None:
    assert effort_variables(effort, template, reasons=True, harmony=harmony) == variables


@pytest.mark.parametrize(
    ("effort", "template", "reasons", "harmony"),
    [("low", "", False, False), ("low", "", True, False), ("none", "", True, False), ("none", OSS, False, True)],
)
def test_an_effort_that_changes_nothing_is_refused(effort: str, template: str, reasons: bool, harmony: bool) -> None:
    with pytest.raises(RequestError, match="reasoning_effort"):
        effort_variables(effort, template, reasons=reasons, harmony=harmony)
    assert effort_variables("none", "", reasons=False, harmony=False) == {}, "there is none to begin with"
