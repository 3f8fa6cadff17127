"""LiteLLM, as it is, against the server with the real model."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # or it asks the network when it is imported
import litellm as _litellm

litellm: Any = _litellm

pytestmark = pytest.mark.model
FRANCE = [{"role": "user", "content": "What is the capital of France?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"enum": ["Oslo"]}}, "required": ["city"]},
    },
}


@pytest.fixture
def to(engine: Any) -> dict[str, Any]:
    return {"model": "hosted_vllm/smol", "api_base": engine.url + "/v1", "api_key": "none", "num_retries": 0}


def test_whole_and_streamed(to: dict[str, Any]) -> None:
    ask = {**to, "messages": FRANCE, "temperature": 0, "max_tokens": 20}
    whole = litellm.completion(**ask)
    assert whole.choices[0].message.content == "The capital of France is Paris."
    assert whole.usage.completion_tokens == 8
    chunks = list(litellm.completion(**ask, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "The capital of France is Paris."
    generic = litellm.completion(**{**ask, "model": "openai/smol"})
    assert generic.choices[0].message.content == "The capital of France is Paris."


async def test_async_and_structured(to: dict[str, Any]) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["a", "b"]}}}
    answer = await litellm.acompletion(**to, messages=FRANCE, max_tokens=20, response_format=form)
    assert json.loads(answer.choices[0].message.content) in ("a", "b")


def test_tools_text_and_embeddings(to: dict[str, Any]) -> None:
    called = litellm.completion(**to, messages=FRANCE, max_tokens=60, tools=[WEATHER], tool_choice="required")
    (call, *_) = called.choices[0].message.tool_calls
    assert call.function.name == "get_weather"
    assert call.function.arguments == '{"city": "Oslo"}', "LiteLLM drops additionalProperties"
    text = litellm.text_completion(
        **{**to, "model": "text-completion-openai/smol"}, prompt="One two three", max_tokens=5, temperature=0
    )
    assert text.choices[0].text
    vectors = litellm.embedding(**to, input=["Hi", "there"])
    assert [len(item["embedding"]) for item in vectors.data] == [576, 576]


def test_a_refusal_is_its_class(to: dict[str, Any]) -> None:
    with pytest.raises(litellm.BadRequestError, match="max_tokens"):
        litellm.completion(**to, messages=FRANCE, max_tokens=0)
    for provider in ("hosted_vllm", "openai"):
        with pytest.raises(litellm.ContextWindowExceededError):
            litellm.completion(
                **{**to, "model": f"{provider}/smol"}, messages=[{"role": "user", "content": "a " * 9000}]
            )
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(**{**to, "model": "hosted_vllm/nobody"}, messages=FRANCE)
