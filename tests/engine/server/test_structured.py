"""Structured output and tools through the API, with the real model and the real `openai` client."""

from __future__ import annotations

import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import httpx
import jsonschema
import openai
import psutil
import pytest
from pydantic import BaseModel, Field
from tests.engine.processes import children

pytestmark = pytest.mark.model
USER: Any = [{"role": "user", "content": "Tell me about a person, as JSON."}]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "kind": {"enum": ["person", "company"]},
    },
    "required": ["name", "age", "kind"],
}
STRICT = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 16}, "unit": {"enum": ["C", "F"]}},
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}


class Person(BaseModel):
    name: str = Field(max_length=20)
    age: int = Field(ge=0, le=120)
    kind: Literal["person", "company"]


@pytest.fixture
def client(engine: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=engine.url + "/v1", api_key="none", max_retries=0, timeout=120)


def content_of(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    choice = response.json()["choices"][0]
    assert choice["finish_reason"] == "stop", choice
    return choice["message"]["content"] if "message" in choice else choice["text"]


def streamed(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    lines = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


FORMS: list[tuple[dict[str, Any], str]] = [
    ({"response_format": STRICT}, "json"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "p", "schema": SCHEMA}}}, "json"),
    ({"structured_outputs": {"json": SCHEMA}}, "json"),
    ({"structured_outputs": {"json": json.dumps(SCHEMA), "disable_any_whitespace": True}}, "json"),
    ({"structured_outputs": {"regex": "[A-Z][a-z]{2,5} [0-9]{4}"}}, r"[A-Z][a-z]{2,5} [0-9]{4}"),
    ({"structured_outputs": {"choice": ["left", "right"]}}, "left|right"),
    ({"structured_outputs": {"grammar": 'root ::= "SELECT " c " FROM t"\nc ::= "a" | "b"'}}, "SELECT [ab] FROM t"),
    ({"response_format": {"type": "structural_tag", "format": {"type": "const_string", "value": "<x>"}}}, "<x>"),
]


@pytest.mark.parametrize(("fields", "form"), FORMS, ids=[str(i) for i in range(len(FORMS))])
def test_every_form_conforms(engine: Any, fields: dict[str, Any], form: str) -> None:
    settings = {"max_tokens": 100, "temperature": 1.0, "seed": 5}
    texts = [content_of(engine.chat(messages=USER, **settings, **fields))]
    texts.append(content_of(engine.post("/v1/completions", model="smol", prompt="A person:", **settings, **fields)))
    chunks = streamed(engine.chat(messages=USER, stream=True, **settings, **fields))
    texts.append("".join(c["choices"][0]["delta"].get("content") or "" for c in chunks))
    assert texts[2] == texts[0]
    for text in texts:
        if form == "json":
            jsonschema.validate(json.loads(text), SCHEMA)
        else:
            assert re.fullmatch(form, text)


def test_json_object(engine: Any) -> None:
    fields = {"response_format": {"type": "json_object"}, "max_tokens": 200, "temperature": 0}
    text = engine.chat(messages=USER, **fields).json()["choices"][0]
    if text["finish_reason"] == "stop":
        assert isinstance(json.loads(text["message"]["content"]), dict)
    else:
        assert text["message"]["content"].startswith("{")


def test_n_answers_each_conform_and_logprobs_come_along(engine: Any) -> None:
    body = engine.chat(messages=USER, n=3, seed=3, logprobs=True, max_tokens=80, response_format=STRICT).json()
    for choice in body["choices"]:
        jsonschema.validate(json.loads(choice["message"]["content"]), SCHEMA)
        assert choice["logprobs"]["content"]


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"structured_outputs": {"regex": "("}}, "structured_outputs", "parenthesis"),
    ({"structured_outputs": {"grammar": "root ::= nothing"}}, "structured_outputs", "not defined"),
    ({"structured_outputs": {"grammar": "root ::= root"}}, "structured_outputs", "no text"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs", "choice"),
    ({"structured_outputs": {"json": "{"}}, "structured_outputs", "JSON"),
    ({"structured_outputs": {"json": {"type": "array", "uniqueItems": True}}}, "structured_outputs", "uniqueItems"),
    ({"structured_outputs": {}}, "structured_outputs", "exactly one"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "exactly one"),
    ({"structured_outputs": {"whitespace_pattern": "x", "regex": "a"}}, "structured_outputs.whitespace_pattern", "not"),
    ({"structured_outputs": {"regex": "a"}, "response_format": STRICT}, "structured_outputs", "not both"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "required"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x y", "schema": {}}}},
     "response_format.json_schema.name", "pattern"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": {"not": {}}}}},
     "response_format", "not"),
    ({"guided_json": SCHEMA}, "guided_json", "structured_outputs.json"),
    ({"guided_regex": "a"}, "guided_regex", "structured_outputs.regex"),
    ({"tools": [WEATHER, WEATHER]}, "tools", "same name"),
    ({"tools": [{"type": "function", "function": {"name": "no spaces"}}]}, "tools.0.function.name", "pattern"),
    ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice", "not among"),
    ({"tool_choice": "required"}, "tool_choice", "no tools"),
    ({"tools": [{"type": "function", "function": {"name": "f", "strict": True, "parameters": {"type": "odd"}}}]},
     "tools", "odd"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param", "why"), BAD, ids=[str(i) for i in range(len(BAD))])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_bad_grammars_are_the_requests_400(
    engine: Any, fields: dict[str, Any], param: str, why: str, stream: bool
) -> None:
    response = engine.chat(messages=USER, stream=stream, **fields)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert why in error["message"]


def deep(levels: int) -> dict[str, Any]:
    names = {f"n{i}": {"type": "array", "items": {"$ref": f"#/$defs/n{i + 1}"}} for i in range(levels)}
    return {"$defs": names | {f"n{levels}": {"type": "integer"}}, "$ref": "#/$defs/n0"}


def test_a_hanging_grammar_costs_only_its_request(engine: Any) -> None:
    """Levels of references that only the compiler unfolds: its deadline, and others are served meanwhile."""
    with ThreadPoolExecutor(2) as pool:
        slow = pool.submit(
            engine.chat, messages=USER, structured_outputs={"json": deep(1200)}, timeout=0.01, max_tokens=1
        )
        assert content_of(engine.chat(messages=USER, max_tokens=60, response_format=STRICT))
        response = slow.result()
    assert response.status_code in (400, 504), response.text
    assert content_of(engine.chat(messages=USER, max_tokens=60, response_format=STRICT))


def test_when_the_grammar_process_is_killed_nobody_else_notices(engine: Any) -> None:
    """Under way: streams that need no grammar go on, and the next grammar is compiled by another process."""

    def constrained(number: int) -> httpx.Response:
        form = {"structured_outputs": {"regex": f"[a-c]{{{number}}}"}}
        return engine.chat(messages=USER, max_tokens=40, temperature=0, **form)

    def free() -> httpx.Response:
        return engine.chat(messages=USER, max_tokens=60, temperature=0, ignore_eos=True, stream=True)

    assert constrained(3).status_code == 200
    before = grammar_processes(engine)
    assert len(before) == 1
    with ThreadPoolExecutor(6) as threads:
        streams = [threads.submit(free) for _ in range(3)]
        for process in before:
            process.kill()
        deadline = time.monotonic() + 240
        while (answer := constrained(4)).status_code != 200:
            assert answer.status_code == 503, answer.text
            assert int(answer.headers["retry-after"]) >= 1
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert re.fullmatch("[a-c]{4}", answer.json()["choices"][0]["message"]["content"])
        for stream in streams:
            assert streamed(stream.result())[-1]["choices"][0]["finish_reason"] == "length"
    assert grammar_processes(engine) != before


def grammar_processes(engine: Any) -> set[psutil.Process]:
    """Those that compile are forked from it, and not counted."""
    return children("mainsail_engine.structured.worker", psutil.Process(engine.core_pid()), recursive=False)


def test_a_client_that_leaves_while_its_grammar_is_compiled(engine: Any) -> None:
    with pytest.raises(httpx.TimeoutException):
        httpx.post(
            engine.url + "/v1/chat/completions",
            json={"model": "smol", "messages": USER, "structured_outputs": {"json": deep(1500)}},
            timeout=0.1,
        )
    assert content_of(engine.chat(messages=USER, max_tokens=60, structured_outputs={"choice": ["a", "b"]}))


# -- tools ------------------------------------------------------------------------------------------------------------


def check_weather(arguments: str) -> None:
    jsonschema.validate(json.loads(arguments), WEATHER["function"]["parameters"])  # type: ignore[index]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_forced_calls(engine: Any, choice: Any) -> None:
    asked = {"tools": [WEATHER, CLOCK], "tool_choice": choice, "max_tokens": 150, "temperature": 1.0, "seed": 1}
    body = engine.chat(messages=USER, parallel_tool_calls=False, **asked).json()
    (answer,) = body["choices"]
    (call,) = answer["message"]["tool_calls"]
    assert answer["message"]["content"] is None
    assert answer["finish_reason"] == ("tool_calls" if choice == "required" else "stop")
    assert call["id"].startswith("call_")
    if call["function"]["name"] == "get_weather":
        check_weather(call["function"]["arguments"])
    else:
        assert choice == "required"


def test_streamed_calls_add_up(engine: Any) -> None:
    choice = {"type": "function", "function": {"name": "get_weather"}}
    chunks = streamed(engine.chat(messages=USER, tools=[WEATHER], tool_choice=choice, stream=True, max_tokens=150))
    parts = [p for c in chunks for p in c["choices"][0]["delta"].get("tool_calls", ())]
    assert parts[0]["id"]
    assert parts[0]["function"]["name"] == "get_weather"
    assert len(parts) > 3, "arguments come in pieces"
    assert all("id" not in part for part in parts[1:])
    check_weather("".join(part["function"]["arguments"] for part in parts))


def test_tools_that_need_not_be_called(engine: Any) -> None:
    body = engine.chat(messages=USER, tools=[WEATHER], max_tokens=20, temperature=0).json()
    choice = body["choices"][0]
    assert choice["message"]["content"] or choice["message"]["tool_calls"]
    plain = engine.chat(messages=USER, tools=[WEATHER], tool_choice="none", max_tokens=20, temperature=0).json()
    assert "tool_calls" not in plain["choices"][0]["message"]
    assert plain["usage"]["prompt_tokens"] < body["usage"]["prompt_tokens"], "with none the tools are not in the prompt"


def test_a_conversation_with_calls_and_results(engine: Any) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}
    messages = [
        *USER,
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "hm"},
        {"role": "tool", "tool_call_id": "call_1", "content": "Rain."},
    ]
    assert content_of(engine.chat(messages=messages, structured_outputs={"choice": ["Rain", "Sun"]}))


def test_content_or_calls_when_both_are_constrained(engine: Any) -> None:
    answer = engine.chat(messages=USER, tools=[WEATHER], response_format=STRICT, max_tokens=150, seed=2).json()
    message = answer["choices"][0]["message"]
    if message.get("tool_calls"):
        check_weather(message["tool_calls"][0]["function"]["arguments"])
    else:
        jsonschema.validate(json.loads(message["content"]), SCHEMA)


# -- the openai client ------------------------------------------------------------------------------------------------


def test_openai_parse_gives_the_model(client: openai.OpenAI) -> None:
    done = client.chat.completions.parse(model="smol", messages=USER, response_format=Person, max_tokens=100, seed=1)
    assert isinstance(done.choices[0].message.parsed, Person)


def test_openai_parse_gives_arguments(client: openai.OpenAI) -> None:
    tool = openai.pydantic_function_tool(Person, name="save")
    done = client.chat.completions.parse(
        model="smol",
        messages=USER,
        tools=[tool],
        tool_choice="required",
        max_tokens=150,
        seed=1,  # type: ignore[arg-type]
        parallel_tool_calls=False,  # any number of calls may be longer than max_tokens
    )
    calls = done.choices[0].message.tool_calls
    assert calls
    assert isinstance(calls[0].function.parsed_arguments, Person)


def test_openai_stream_gives_events_and_arguments(client: openai.OpenAI) -> None:
    tool = openai.pydantic_function_tool(Person, name="save")
    with client.chat.completions.stream(
        model="smol", messages=USER, tools=[tool], tool_choice="required", max_tokens=150, seed=1,  # type: ignore[arg-type]
        parallel_tool_calls=False,
    ) as stream:  # fmt: skip
        kinds = [event.type for event in stream]
        done = stream.get_final_completion()
    assert "tool_calls.function.arguments.delta" in kinds
    assert "tool_calls.function.arguments.done" in kinds
    assert isinstance(done.choices[0].message.tool_calls[0].function.parsed_arguments, Person)  # type: ignore[index]


def test_openai_stream_parses_content(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model="smol", messages=USER, response_format=Person, max_tokens=100) as stream:  # type: ignore[arg-type]
        done = stream.get_final_completion()
    assert isinstance(done.choices[0].message.parsed, Person)
