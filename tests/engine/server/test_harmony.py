"""gpt-oss' format through the whole server: its special tokens reach the parser, grammars force its channels."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from tests.engine.server.conftest import Engine, start
from tests.engine.tiny import make_tiny_model

SPECIAL = ["<|constrain|>", "<|channel|>", "<|message|>", "<|end|>", "<|call|>", "<|startoftext|>", "<|start|>",
           "<|return|>"]  # fmt: skip
TEMPLATE = (
    "{% if tools %}{{ '<|start|>developer<|message|>' + tools|tojson + '<|end|>' }}{% endif %}"
    "{% for message in messages %}"
    "{% if message.role == 'tool' %}"
    "{{ '<|start|>functions.f to=assistant<|channel|>commentary<|message|>' + message.content + '<|end|>' }}"
    "{% elif message.role == 'assistant' %}"
    "{% if message.thinking %}{{ '<|start|>assistant<|channel|>analysis<|message|>' + message.thinking + '<|end|>' }}"
    "{% endif %}"
    "{% if message.tool_calls %}"
    "{{ '<|start|>assistant to=functions.' + message.tool_calls[0].function.name }}"
    "{{ '<|channel|>commentary json<|message|>' }}"
    "{{ message.tool_calls[0].function.arguments|tojson + '<|call|>' }}"
    "{% else %}{{ '<|start|>assistant<|channel|>final<|message|>' + message.content + '<|end|>' }}{% endif %}"
    "{% else %}{{ '<|start|>' + message.role + '<|message|>' + message.content + '<|end|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
F = {"name": "f", "strict": True, "parameters": {
    "type": "object", "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}}, "required": ["n"],
    "additionalProperties": False,
}}  # fmt: skip
FORCED: dict[str, Any] = {
    "messages": [{"role": "user", "content": "?"}], "tools": [{"type": "function", "function": F}],
    "tool_choice": "required", "max_tokens": 120, "temperature": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def oss(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = tmp_path_factory.mktemp("harmony")
    model = make_tiny_model(folder / "model", special=SPECIAL, template=TEMPLATE)
    engine = start(folder, model, "--kv-cache-blocks", "256")
    yield engine
    engine.close()


@pytest.fixture
def no_reasoning(oss: Engine) -> dict[str, int]:
    """A bias against the letter with which the channel of reasoning begins, whose text would be random and endless."""
    tokens = oss.post("/tokenize", model="smol", prompt="a", add_special_tokens=False).json()["tokens"]
    return {str(token): -100 for token in tokens}


def test_a_forced_call(oss: Engine, no_reasoning: dict[str, int]) -> None:
    choice = oss.chat(**FORCED, logit_bias=no_reasoning).json()["choices"][0]
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "f"
    assert 0 <= json.loads(call["function"]["arguments"])["n"] <= 9
    assert (choice["message"]["content"], choice["finish_reason"]) == (None, "tool_calls")


def test_a_forced_call_streamed(oss: Engine, no_reasoning: dict[str, int]) -> None:
    client = openai.OpenAI(base_url=oss.url + "/v1", api_key="none", max_retries=0)
    whole = oss.chat(**FORCED, logit_bias=no_reasoning).json()["choices"][0]["message"]["tool_calls"][0]["function"]
    chunks = list(client.chat.completions.create(model="smol", stream=True, logit_bias=no_reasoning, **FORCED))
    calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    assert calls[0].function is not None
    assert calls[0].function.name == "f"
    assert "".join(call.function.arguments or "" for call in calls if call.function) == whole["arguments"]
    assert not any(chunk.choices[0].delta.content for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_a_forced_call_as_a_response(oss: Engine) -> None:
    client = openai.OpenAI(base_url=oss.url + "/v1", api_key="none", max_retries=0)
    tool: Any = {"type": "function", **F}
    done = client.responses.create(
        model="smol", input="?", tools=[tool], tool_choice="required", max_output_tokens=300, temperature=0
    )
    assert {item.type for item in done.output} <= {"reasoning", "function_call"}
    assert not any("<|" in item.model_dump_json() for item in done.output)


def test_content_that_conforms(oss: Engine, no_reasoning: dict[str, int]) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": F["parameters"]}}
    asked = {key: value for key, value in FORCED.items() if not key.startswith("tool")}
    choice = oss.chat(**asked, response_format=form, logit_bias=no_reasoning).json()["choices"][0]
    assert 0 <= json.loads(choice["message"]["content"])["n"] <= 9
    assert choice["finish_reason"] == "stop"


def test_what_a_model_says_freely_has_no_markers(oss: Engine) -> None:
    done = oss.chat(messages=FORCED["messages"], max_tokens=64, temperature=1, seed=3, n=4, ignore_eos=True).json()
    for choice in done["choices"]:
        assert "<|channel|>" not in json.dumps(choice)
    assert "reasoning_tokens" in done["usage"]["completion_tokens_details"]


def test_a_conversation_as_its_template_reads_it(oss: Engine) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"n": 1}'}}
    messages = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": None, "reasoning_content": "Hm.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "3"},
    ]
    ids = oss.post("/tokenize", model="smol", messages=messages, add_generation_prompt=True).json()["tokens"]
    text = oss.post("/detokenize", model="smol", tokens=ids).json()["prompt"]
    assert text == (
        "<|start|>user<|message|>?<|end|><|start|>assistant<|channel|>analysis<|message|>Hm.<|end|>"
        '<|start|>assistant to=functions.f<|channel|>commentary json<|message|>{"n": 1}<|call|>'
        "<|start|>functions.f to=assistant<|channel|>commentary<|message|>3<|end|><|start|>assistant"
    )


def test_the_token_that_ends_a_call_ends_the_answer(oss: Engine) -> None:
    """The model's configuration names <|return|> alone."""
    (call,) = oss.post("/tokenize", model="smol", prompt="<|call|>", add_special_tokens=False).json()["tokens"]
    choice = oss.chat(
        messages=FORCED["messages"], max_tokens=8, logit_bias={str(call): 100.0}, temperature=0
    ).json()["choices"][0]  # fmt: skip
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", call)
