"""/v1/responses with the real model and the real `openai` client: whole, streamed, parsed, with tools."""

from __future__ import annotations

import json
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel, Field

from mainsail_engine.server.output_items import OutputItems
from mainsail_engine.server.tools.events import Arguments, CallEnd, CallStart, Content, Reasoning

pytestmark = pytest.mark.model
WEATHER = {
    "type": "function", "name": "get_weather", "description": "The weather in a city.", "strict": True,
    "parameters": {
        "type": "object", "properties": {"city": {"type": "string", "maxLength": 12}}, "required": ["city"],
        "additionalProperties": False,
    },
}  # fmt: skip


class Person(BaseModel):
    name: str = Field(max_length=16)
    kind: Literal["person", "company"]


@pytest.fixture
def client(engine: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=engine.url + "/v1", api_key="none", max_retries=0)


def test_text_and_usage(client: openai.OpenAI, engine: Any) -> None:
    done = client.responses.create(
        model="smol", instructions="You are brief.", input="Say hello.", max_output_tokens=6, temperature=0,
        metadata={"run": "7"},
    )  # fmt: skip
    messages = [{"role": "system", "content": "You are brief."}, {"role": "user", "content": "Say hello."}]
    chat = engine.chat(messages=messages, max_tokens=6, temperature=0).json()
    assert done.output_text == chat["choices"][0]["message"]["content"]
    assert done.status == "incomplete"
    assert done.incomplete_details is not None
    assert done.incomplete_details.reason == "max_output_tokens"
    assert done.usage is not None
    assert (done.usage.input_tokens, done.usage.output_tokens) == (chat["usage"]["prompt_tokens"], 6)
    assert done.metadata == {"run": "7"}


def test_the_stream_in_the_order_that_clients_expect(client: openai.OpenAI) -> None:
    ask = {"model": "smol", "input": "Say hello.", "max_output_tokens": 6, "temperature": 0}
    whole = client.responses.create(**ask)  # type: ignore[call-overload]
    events = list(client.responses.create(**ask, stream=True))  # type: ignore[call-overload]
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
    ]  # fmt: skip
    assert kinds[-4:] == [
        "response.output_text.done", "response.content_part.done", "response.output_item.done", "response.incomplete",
    ]  # fmt: skip
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    assert events[-1].response.output_text == whole.output_text
    assert events[-1].response.usage.output_tokens == 6


def test_parse_and_streamed_parse(client: openai.OpenAI) -> None:
    done = client.responses.parse(model="smol", input="A person.", text_format=Person, max_output_tokens=80)
    assert isinstance(done.output_parsed, Person)
    with client.responses.stream(model="smol", input="A person.", text_format=Person, max_output_tokens=80) as stream:
        for _ in stream:
            pass
        assert isinstance(stream.get_final_response().output_parsed, Person)


def test_the_raw_response_streams(client: openai.OpenAI) -> None:
    with client.responses.with_streaming_response.create(model="smol", input="Hi", max_output_tokens=4) as response:
        body = json.loads("".join(response.iter_text()))
    assert body["object"] == "response"
    assert body["output"][0]["content"][0]["type"] == "output_text"


def test_a_call_its_result_and_the_answer(client: openai.OpenAI) -> None:
    conversation: list[Any] = [{"role": "user", "content": "Weather in Oslo?"}]
    ask: dict[str, Any] = {"model": "smol", "tools": [WEATHER], "temperature": 0, "max_output_tokens": 80}
    done = client.responses.create(input=conversation, tool_choice="required", parallel_tool_calls=False, **ask)
    (call,) = done.output
    assert (call.type, call.name) == ("function_call", "get_weather")
    assert set(json.loads(call.arguments)) == {"city"}
    conversation += [*done.output, {"type": "function_call_output", "call_id": call.call_id, "output": "Rain."}]
    text = {"format": {"type": "json_schema", "name": "a", "strict": True, "schema": Person.model_json_schema()}}
    final = client.responses.create(input=conversation, text=text, model="smol", max_output_tokens=80)  # type: ignore[arg-type]
    Person.model_validate_json(final.output_text)


def test_a_streamed_call(client: openai.OpenAI) -> None:
    choice: Any = {"type": "function", "name": "get_weather"}
    with client.responses.stream(
        model="smol",
        input="Weather?",
        tools=[WEATHER],
        tool_choice=choice,
        max_output_tokens=80,  # type: ignore[list-item]
    ) as stream:
        events = list(stream)
    deltas = "".join(event.delta for event in events if event.type == "response.function_call_arguments.delta")
    (done,) = [event for event in events if event.type == "response.function_call_arguments.done"]
    assert deltas == done.arguments
    assert set(json.loads(deltas)) == {"city"}
    assert events[-1].type == "response.completed"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"store": True}, "store"),
        ({"background": True}, "background"),
        ({"input": []}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content.0.type"),
        ({"max_output_tokens": 100000}, "max_output_tokens"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "strict": True, "schema": {"not": {}}}}},
         "text.format"),
        ({"odd": 1}, "odd"),
    ],
)  # fmt: skip
def test_refusals_name_the_field(engine: Any, fields: dict[str, Any], param: str) -> None:
    response = engine.post("/v1/responses", **({"model": "smol", "input": "Hi"} | fields))
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param, response.text


def test_items_of_reasoning_text_and_calls() -> None:
    items = OutputItems("resp_1")
    told = items.feed([Reasoning("hm"), Content("Hello"), Content(" you"), CallStart("f"), Arguments("{}"), CallEnd()])
    told += items.feed([Content("more")]) + items.close(complete=False)
    assert [item["type"] for item in items.items] == ["reasoning", "message", "function_call", "message"]
    assert [item["status"] for item in items.items] == ["completed"] * 3 + ["incomplete"]
    assert items.items[1]["content"][0]["text"] == "Hello you"
    added = [fields["output_index"] for kind, fields in told if kind == "response.output_item.added"]
    done = [fields["output_index"] for kind, fields in told if kind == "response.output_item.done"]
    assert added == done == [0, 1, 2, 3]
