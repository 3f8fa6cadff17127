"""Whatever a client sends: the right status, OpenAI's error form, the field's name; and the next request is served."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

pytestmark = pytest.mark.model
USER = [{"role": "user", "content": "Hi"}]

BAD_CHATS: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": "Hi"}, "messages"),
    ({"messages": [{"role": "user"}]}, "messages.0.content"),
    ({"messages": [{"role": "nobody", "content": "x"}]}, "messages.0.role"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": "x", "mood": "good"}]}, "messages.0.mood"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0.type"),
    ({"messages": [{"role": "user", "content": "word " * 9000}]}, "messages"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": "5"}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"max_tokens": 100000}, "max_tokens"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"max_completion_tokens": 100000}, "max_completion_tokens"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"n": 0}, "n"),
    ({"n": 1000}, "n"),
    ({"seed": "x"}, "seed"),
    ({"seed": 2**70}, "seed"),
    ({"stop": ""}, "stop.0"),
    ({"stop": 5}, "stop"),
    ({"stop": ["x"] * 100}, "stop"),
    ({"stop_token_ids": [-1]}, "stop_token_ids.0"),
    ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"nothing": 1}}, "stream_options.nothing"),
    ({"cache_salt": "\udfff"}, "cache_salt"),
    ({"surprise": 1}, "surprise"),
    ({"timeout": 0}, "timeout"),
    ({"user": "\ud800"}, "user"),
    ({"frequency_penalty": 2.5}, "frequency_penalty"),
    ({"response_format": {"type": "nonsense"}}, "response_format"),
    ({"audio": {"voice": "x"}}, "audio"),
    ({"store": True}, "store"),
    ({"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
]


def check(response: httpx.Response, status: int, param: str | None) -> None:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param, error
    assert error["message"]


@pytest.mark.parametrize(("fields", "param"), BAD_CHATS, ids=[f"{p}-{i}" for i, (_, p) in enumerate(BAD_CHATS)])
def test_bad_chats(engine: Any, fields: dict[str, Any], param: str) -> None:
    body = {"model": "smol", "messages": USER, **fields}
    headers = {"content-type": "application/json"}
    response = engine.http.post(engine.url + "/v1/chat/completions", content=json.dumps(body), headers=headers)
    check(response, 400, param)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [49152]}, "prompt"),
        ({"prompt": [2**40]}, "prompt.0"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "x", "best_of": 2}, "best_of"),
        ({"prompt": "x", "suffix": "y"}, "suffix"),
        ({"prompt": "x", "messages": USER}, "messages"),
        ({"prompt": ["x"] * 100, "n": 100}, "n"),
        ({"prompt": "x", "min_tokens": 17}, "min_tokens"),
        ({"prompt": [1] * 8192}, "prompt"),
    ],
)
def test_bad_completions(engine: Any, fields: dict[str, Any], param: str) -> None:
    check(engine.post("/v1/completions", model="smol", **fields), 400, param)


@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        (b"{", {"content-type": "application/json"}, 400),
        (b"", {"content-type": "application/json"}, 400),
        (b"[]", {"content-type": "application/json"}, 400),
        (b"null", {"content-type": "application/json"}, 400),
        (b"\xff\xfe", {"content-type": "application/json"}, 400),
        (b"[" * 100_000, {"content-type": "application/json"}, 400),
        (b'{"model": "smol"}', {"content-type": "text/plain"}, 400),
        (b'{"x": "' + b"x" * 10_000_000 + b'"}', {"content-type": "application/json"}, 413),
    ],
    ids=["half", "empty", "list", "null", "no text", "deep", "plain", "10 MB"],
)
def test_bad_bodies(engine: Any, content: bytes, headers: dict[str, str], status: int) -> None:
    response = engine.http.post(engine.url + "/v1/chat/completions", content=content, headers=headers)
    assert response.status_code == status, response.text
    assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("depth", [800, 950, 1000, 100_000])
def test_calls_whose_arguments_are_deep(tiny_engine: Any, depth: int) -> None:
    """They are shown to the model as they are, or refused: nothing breaks."""
    for arguments in ("[" * depth, "[" * depth + "]" * depth, "1" * depth):
        call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": arguments}}
        result = {"role": "tool", "tool_call_id": "call_1", "content": ""}
        told = [*USER, {"role": "assistant", "tool_calls": [call]}, result]
        response = tiny_engine.chat(messages=told, max_tokens=1)
        assert response.status_code == 200 or response.json()["error"]["param"] == "messages", response.text


def test_a_large_body_of_unknown_length(engine: Any) -> None:
    pieces = (b"x" * 100_000 for _ in range(100))
    headers = {"content-type": "application/json"}
    response = engine.http.post(engine.url + "/v1/chat/completions", content=pieces, headers=headers)
    assert response.status_code == 413


def test_unknown_model_and_path(engine: Any) -> None:
    check(engine.post("/v1/chat/completions", model="nobody", messages=USER), 404, "model")
    check(engine.http.get(engine.url + "/v1/models/nobody"), 404, "model")
    assert engine.http.get(engine.url + "/nothing").json()["error"]["type"] == "not_found_error"
    assert engine.http.get(engine.url + "/v1/chat/completions").status_code == 405


def test_tokenize_refuses_too(engine: Any) -> None:
    check(engine.post("/tokenize"), 400, "prompt")
    check(engine.post("/tokenize", prompt="x", messages=USER), 400, "prompt")
    check(engine.post("/detokenize", tokens=[10**6]), 400, "tokens")
