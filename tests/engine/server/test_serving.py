"""The whole server with the real model, seen through the `openai` package and plain HTTP."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest

pytestmark = pytest.mark.model
FRANCE: Any = [{"role": "user", "content": "What is the capital of France?"}]
COUNT: Any = [{"role": "user", "content": "Count from one to one hundred in words."}]
GREEDY: dict[str, Any] = {"temperature": 0}
SEEDED: dict[str, Any] = {"temperature": 0.8, "seed": 4}


@pytest.fixture(scope="module")
def client(engine: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=engine.url + "/v1", api_key="none", max_retries=0, timeout=240)


@pytest.fixture
def async_client(engine: Any) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=engine.url + "/v1", api_key="none", max_retries=0, timeout=240)


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="smol", messages=FRANCE, temperature=0, max_tokens=20)
    assert answer.choices[0].message.content == "The capital of France is Paris."
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (37, 8)


@pytest.mark.parametrize("settings", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_streamed_is_not_streamed(client: openai.OpenAI, settings: dict[str, Any]) -> None:
    whole = client.chat.completions.create(model="smol", messages=COUNT, max_tokens=30, **settings)
    stream = client.chat.completions.create(
        model="smol", messages=COUNT, max_tokens=30, stream=True, stream_options={"include_usage": True}, **settings
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
    usage, whole_usage = chunks[-1].usage, whole.usage
    assert usage is not None
    assert whole_usage is not None
    assert usage.total_tokens == whole_usage.total_tokens
    assert usage.prompt_tokens_details is not None
    assert (usage.prompt_tokens_details.cached_tokens or 0) > 0


async def test_async_many_at_once(async_client: openai.AsyncOpenAI) -> None:
    answers = await asyncio.gather(
        *(
            async_client.chat.completions.create(model="other", messages=FRANCE, temperature=0, max_tokens=12)
            for _ in range(12)
        )
    )
    assert {answer.choices[0].message.content for answer in answers} == {"The capital of France is Paris."}


async def test_async_stream(async_client: openai.AsyncOpenAI) -> None:
    stream = await async_client.completions.create(model="smol", prompt="One two three", max_tokens=5, stream=True)
    pieces = [chunk.choices[0].text async for chunk in stream]
    assert "".join(pieces)


def test_an_answer_that_is_begun_goes_on(client: openai.OpenAI, engine: Any) -> None:
    """continue_final_message and echo, whole and streamed; the prompt ends where the message does."""
    begun: Any = [*FRANCE, {"role": "assistant", "content": "The capital of"}]
    ask: dict[str, Any] = {"model": "smol", "messages": begun, "temperature": 0, "max_tokens": 10}
    extra = {"continue_final_message": True, "add_generation_prompt": False, "return_token_ids": True}
    plain = client.chat.completions.create(**ask, extra_body=extra)
    assert plain.choices[0].message.content == " France is Paris."
    prompt = engine.post("/detokenize", tokens=plain.to_dict()["prompt_token_ids"]).json()["prompt"]
    assert prompt.endswith("<|im_start|>assistant\nThe capital of")
    echoed = client.chat.completions.create(**ask, extra_body={**extra, "echo": True})
    assert echoed.choices[0].message.content == "The capital of France is Paris."
    stream = client.chat.completions.create(**ask, extra_body={**extra, "echo": True}, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "The capital of France is Paris."
    for fields, param in (
        ({"messages": begun, "continue_final_message": True, "add_generation_prompt": True}, "add_generation_prompt"),
        ({"messages": [{"role": "user", "content": ""}], "continue_final_message": True}, "continue_final_message"),
    ):
        refused = engine.chat(**fields)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)


def test_an_error_is_the_clients_class(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="nobody", messages=FRANCE)
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="smol", messages=FRANCE, max_tokens=0)
    assert caught.value.param == "max_tokens"


def test_stop_strings_never_leak(engine: Any) -> None:
    whole = engine.chat(messages=FRANCE, temperature=0, max_tokens=20).json()["choices"][0]["message"]["content"]
    for stop in ("France", "l of F", "Paris", "is", "."):
        body: dict[str, Any] = {"messages": FRANCE, "temperature": 0, "max_tokens": 20, "stop": [stop, "never"]}
        choice = engine.chat(**body).json()["choices"][0]
        assert choice["message"]["content"] == whole[: whole.index(stop)]
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
        assert streamed_text(engine, body) == whole[: whole.index(stop)]
    included = engine.chat(messages=FRANCE, temperature=0, stop="France", include_stop_str_in_output=True).json()
    assert included["choices"][0]["message"]["content"].endswith("France")


def streamed_text(engine: Any, body: dict[str, Any]) -> str:
    text = ""
    with engine.http.stream(
        "POST", f"{engine.url}/v1/chat/completions", json={"model": "smol", **body, "stream": True}
    ) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                text += json.loads(line[6:])["choices"][0]["delta"].get("content", "")
    return text


def test_min_tokens_hold_stop_strings_back(engine: Any) -> None:
    body = {"messages": FRANCE, "temperature": 0, "max_tokens": 8, "stop": "capital", "return_token_ids": True}
    assert len(engine.chat(**body).json()["choices"][0]["token_ids"]) == 2
    assert len(engine.chat(**body, min_tokens=4).json()["choices"][0]["token_ids"]) > 4


def test_prompts_of_every_kind(engine: Any) -> None:
    ids = engine.post("/tokenize", prompt="Hello there").json()["tokens"]
    texts = []
    for prompt in ("Hello there", ids, ["Hello there"], [ids]):
        body = engine.post("/v1/completions", model="smol", prompt=prompt, temperature=0, max_tokens=6).json()
        assert body["usage"]["prompt_tokens"] == len(ids)
        texts.append(body["choices"][0]["text"])
    assert len(set(texts)) == 1


def test_several_prompts_and_answers(engine: Any) -> None:
    body = {"prompt": ["Hello", "Once upon"], "n": 2, "seed": 5, "max_tokens": 5, "temperature": 1.0}
    one = engine.post("/v1/completions", model="smol", **body, return_token_ids=True).json()
    two = engine.post("/v1/completions", model="smol", **body, return_token_ids=True).json()
    assert [choice["index"] for choice in one["choices"]] == [0, 1, 2, 3]
    assert [choice["token_ids"] for choice in one["choices"]] == [choice["token_ids"] for choice in two["choices"]]
    assert one["choices"][0]["prompt_token_ids"] == one["choices"][1]["prompt_token_ids"]
    assert one["choices"][0]["text"] != one["choices"][1]["text"]
    assert one["usage"]["completion_tokens"] == sum(len(choice["token_ids"]) for choice in one["choices"])
    answers = engine.post("/v1/completions", model="smol", **body, stream=True).text
    indexes = {
        json.loads(line[6:])["choices"][0]["index"] for line in answers.splitlines() if line.startswith("data: {")
    }
    assert indexes == {0, 1, 2, 3}


def test_seeds_differ_and_repeat(engine: Any) -> None:
    def text(seed: int) -> str:
        body = engine.post("/v1/completions", model="smol", prompt="The weather", seed=seed, max_tokens=12)
        return body.json()["choices"][0]["text"]

    assert text(1) == text(1)
    assert len({text(seed) for seed in range(4)}) > 1


def test_content_parts_and_roles(engine: Any) -> None:
    parts = [{"type": "text", "text": "What is the capital"}, {"type": "text", "text": "of France?"}]
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]
    tokens = engine.post("/tokenize", messages=messages).json()["tokens"]
    text = engine.post("/detokenize", tokens=tokens).json()["prompt"]
    assert "<|im_start|>system\nBe brief.<|im_end|>" in text
    assert "What is the capital\nof France?" in text


def test_eos_can_be_ignored(engine: Any) -> None:
    answer = engine.chat(messages=FRANCE, temperature=0, max_tokens=14, ignore_eos=True).json()
    assert answer["usage"]["completion_tokens"] == 14
    assert answer["choices"][0]["finish_reason"] == "length"


def test_a_client_that_goes_is_aborted(engine: Any, waiting: Callable[..., None]) -> None:
    def running() -> float:
        return engine.metric("vllm:num_requests_running")

    aborted = engine.metric("vllm:request_success_total", finished_reason="abort")
    body = {"model": "smol", "messages": COUNT, "max_tokens": 4000, "ignore_eos": True, "stream": True}
    with (
        httpx.Client(timeout=240) as http,
        http.stream("POST", engine.url + "/v1/chat/completions", json=body) as answer,
    ):
        lines = answer.iter_lines()  # kept: letting go of it would close the stream
        assert next(lines)
        waiting(lambda: running() == 1, "it alone to run")
    waiting(engine.idle, "nothing running, all blocks free")
    content = json.dumps({**body, "stream": False}).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: "
    address = urlsplit(engine.url)
    with socket.create_connection((address.hostname, address.port)) as client:
        client.sendall(head.encode() + b"%d\r\n\r\n" % len(content) + content)
        waiting(lambda: running() == 1, "the one that is not streamed to run")
    waiting(engine.idle, "nothing running, all blocks free")
    waiting(
        lambda: engine.metric("vllm:request_success_total", finished_reason="abort") == aborted + 2,
        "two aborts counted",
    )


def test_a_deadline_ends_a_request(engine: Any, waiting: Callable[..., None]) -> None:
    response = engine.chat(messages=COUNT, max_tokens=4000, ignore_eos=True, timeout=0.3)
    assert response.status_code == 504, response.text
    assert response.json()["error"]["type"] == "timeout_error"
    waiting(engine.idle, "nothing running, all blocks free")


@pytest.mark.parametrize(("body", "header"), [({}, "0.3"), ({"timeout": 60}, "0.3"), ({"timeout": 0.3}, "60")])
def test_the_shorter_of_body_and_header_is_the_deadline(engine: Any, body: dict[str, float], header: str) -> None:
    asked = {"model": "smol", "messages": COUNT, "max_tokens": 4000, "ignore_eos": True, **body}
    url, headers = engine.url + "/v1/chat/completions", {"X-Request-Timeout": header}
    assert engine.http.post(url, json=asked, headers=headers).status_code == 504
    with engine.http.stream("POST", url, json={**asked, "stream": True}, headers=headers) as answer:
        *_, last, done = [line for line in answer.iter_lines() if line]
    assert done == "data: [DONE]"
    assert json.loads(last[6:])["error"]["code"] == "deadline_exceeded"


@pytest.mark.parametrize("header", ["soon", "0", "-1", "inf", "nan"])
def test_a_timeout_that_is_none_is_named(engine: Any, header: str) -> None:
    asked = {"model": "smol", "prompt": "x", "max_tokens": 1}
    refused = engine.http.post(engine.url + "/v1/completions", json=asked, headers={"x-request-timeout": header})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "X-Request-Timeout")


def test_metrics_count_what_happened(engine: Any) -> None:
    names = ("vllm:prompt_tokens_total", "vllm:generation_tokens_total", "vllm:time_to_first_token_seconds_count")
    more = (*names, "vllm:inter_token_latency_seconds_count", "vllm:e2e_request_latency_seconds_count")
    before = [engine.metric(name) for name in more]
    usage = engine.chat(messages=FRANCE, temperature=0, max_tokens=20).json()["usage"]
    grown = [engine.metric(name) - old for name, old in zip(more, before, strict=True)]
    tokens = usage["completion_tokens"]
    assert grown == [usage["prompt_tokens"], tokens, 1, tokens - 1, 1]


def test_models_version_and_description(engine: Any) -> None:
    models = engine.http.get(engine.url + "/v1/models").json()["data"]
    assert [model["id"] for model in models] == ["smol", "other"]
    assert models[0]["max_model_len"] == 8192
    assert engine.http.get(engine.url + "/version").json()["version"]
    paths = engine.http.get(engine.url + "/openapi.json").json()["paths"]
    assert {"/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize", "/drain"} <= set(paths)
    for probe in ("", "/live", "/ready", "/startup"):
        assert engine.http.get(f"{engine.url}/health{probe}").status_code == 200


def test_the_api_process_has_no_torch(engine: Any) -> None:
    mapped = Path(f"/proc/{engine.process.pid}/maps").read_text()
    assert "tokenizers" in mapped
    assert "torch" not in mapped
    assert "triton" not in mapped
