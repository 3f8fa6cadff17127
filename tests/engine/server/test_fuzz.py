"""Requests that are mostly right, any field anything at all: never a server error, no hang, memory flat.

On a model of random weights and a context of 64 tokens. The fields are those of the schemas, so that none is forgotten.
A longer run: MAINSAIL_FUZZ_REQUESTS=100000.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
from pydantic import BaseModel
from tests.engine.server.conftest import Engine, wait_for

from mainsail_engine.server import schemas
from mainsail_engine.server.response_schemas import ResponsesRequest

NUM_FUZZED = int(os.environ.get("MAINSAIL_FUZZ_REQUESTS", "2500"))
BATCH = 500
USER = [{"role": "user", "content": "Hi"}]
HANG_S = 240.0
"""No answer takes nearly so long."""

FUNCTION = {"name": "f", "parameters": {"type": "object", "properties": {"x": {"enum": [1, 2]}}, "required": ["x"]}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer", "maximum": 9, "minimum": 0}}, "required": ["a"]}
PLAUSIBLE: dict[str, list[Any]] = {
    "response_format": [
        {"type": "text"}, {"type": "json_object"},
        {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}},
        {"type": "json_schema", "json_schema": {"name": "s", "strict": True, "schema": {"type": "odd"}}},
        {"type": "structural_tag", "format": {"type": "const_string", "value": "ab"}}, {"type": "structural_tag"},
    ],
    "structured_outputs": [
        {"json": SCHEMA}, {"regex": "[a-c]{3}"}, {"regex": "(("}, {"choice": ["a", "b"]}, {"choice": []},
        {"grammar": 'root ::= "a" | "b"'}, {"grammar": "root ::= root"}, {"json_object": True}, {"json": "{"},
    ],
    "tools": [
        [{"type": "function", "function": FUNCTION}], [{"type": "function", "function": {**FUNCTION, "strict": True}}],
    ],
    "tool_choice": ["none", "auto", "required", {"type": "function", "function": {"name": "f"}}],
    "logprobs": [0, 2, 20, 21], "top_logprobs": [0, 3], "prompt_logprobs": [0, 3], "echo": [True],
    "stream": [True], "stream_options": [{"include_usage": True}, {"continuous_usage_stats": True}],
    "n": [2, 3, 8], "best_of": [1, 2], "stop": ["a", ["b", "the"]], "bad_words": [["a"], ["the", "x y"]],
    "allowed_token_ids": [[5], [1, 2, 3], [9999]], "logit_bias": [{"5": 3.5}, {"9999": 1}, {"5": 101}],
    "temperature": [0, 0.7, 2], "top_p": [0.1, 1], "top_k": [-1, 1, 5], "min_p": [0.2], "seed": [7],
    "repetition_penalty": [1.3], "frequency_penalty": [2], "presence_penalty": [-2], "min_tokens": [3, 64],
    "max_tokens": [0, 5, 60, 65], "timeout": [0.001, 5], "truncate_prompt_tokens": [1, 10],
    "prompt": ["the", ["a", "b"], [5, 6, 7], [[5], [6, 7]], "long " * 40], "input": ["a", ["a", "b"], [5, 6]],
    "messages": [
        [*USER, {"role": "assistant", "content": "H"}], [{"role": "system", "content": "S"}, *USER],
        [*USER, {"role": "assistant", "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{"}}]},
         {"role": "tool", "content": "1", "tool_call_id": "1"}],
    ],
    "continue_final_message": [True], "add_generation_prompt": [True, False], "include_reasoning": [False],
    "parallel_tool_calls": [False], "return_token_ids": [True], "return_tokens_as_token_ids": [True],
    "chat_template_kwargs": [{"enable_thinking": False}, {"messages": 3}], "ignore_eos": [True],
    "encoding_format": ["float", "base64"], "pooling": ["mean", "last"], "cache_salt": ["x"], "priority": [-3],
    "text": [{"format": {"type": "json_schema", "name": "s", "schema": SCHEMA}}, {"format": {"type": "text"}}],
    "reasoning_effort": ["low"], "max_output_tokens": [3, 50], "max_completion_tokens": [3, 64],
    "stop_token_ids": [[5]],
}  # fmt: skip
"""What is in the range of sense, or just beside it, by field."""
ANYTHING: list[Any] = [
    *(None, True, False, 0, 1, -1, 2**31, 2**63, -(2**63), 1e308, 0.5, "", "x", "\ud800", "\x00", [], {}, [[]]),
    *([1, "a"], {"type": "text"}, [{}], [None], {"a": {"b": []}}, "x" * 5000, [[1], [2]], [0.1], {"": 1}),
]
ENDPOINTS: dict[str, tuple[type[BaseModel], dict[str, Any]]] = {
    "/v1/chat/completions": (schemas.ChatCompletionRequest, {"messages": USER, "max_tokens": 4}),
    "/v1/completions": (schemas.CompletionRequest, {"prompt": "Hi", "max_tokens": 4}),
    "/v1/responses": (ResponsesRequest, {"input": "Hi", "max_output_tokens": 4}),
    "/v1/embeddings": (schemas.EmbeddingRequest, {"input": "Hi"}),
    "/tokenize": (schemas.TokenizeRequest, {"prompt": "Hi"}),
    "/detokenize": (schemas.DetokenizeRequest, {"tokens": [5]}),
}
WEIGHTS = (40, 30, 15, 5, 5, 5)


def fields_of(kind: type[BaseModel]) -> list[str]:
    return [*(field.alias or name for name, field in kind.model_fields.items()), "unknown"]


FIELDS = {path: fields_of(kind) for path, (kind, _) in ENDPOINTS.items()}


def random_request(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """One to three fields are changed, each to something plausible or to anything at all."""
    (path,) = rng.choices([*ENDPOINTS], WEIGHTS)
    body: dict[str, Any] = {"model": "smol", **ENDPOINTS[path][1]}
    plausible = [name for name in FIELDS[path] if name in PLAUSIBLE]
    for _ in range(rng.randint(1, 3)):
        if plausible and rng.random() < 0.75:
            name = rng.choice(plausible)
            body[name] = rng.choice(PLAUSIBLE[name])
        else:
            body[rng.choice(FIELDS[path])] = rng.choice(ANYTHING)
    return path, body


def status_of(engine: Engine, request: tuple[str, dict[str, Any]]) -> int:
    """Send it. Whatever the answer, it is no server error, and a refusal says why."""
    path, body = request
    headers = {"content-type": "application/json"}
    response = engine.http.post(engine.url + path, content=json.dumps(body), headers=headers, timeout=HANG_S)
    assert response.status_code in (200, 400, 404, 413, 504), (path, body, response.text)
    if response.status_code != 200:
        assert response.json()["error"]["message"], (path, body)
    elif response.headers["content-type"].startswith("text/event-stream"):
        check_stream(path, body, response)
    return response.status_code


def check_stream(path: str, body: dict[str, Any], response: httpx.Response) -> None:
    """It came to its end; what failed on the way was the client's own doing."""
    events = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
    assert path == "/v1/responses" or events[-1] == "[DONE]", (body, response.text)
    for event in events:
        error = json.loads(event).get("error") if event != "[DONE]" else None
        assert not error or error["code"] in ("deadline_exceeded", "grammar_failed", "no_token_allowed"), (body, error)


def test_fuzz(small_engine: Engine) -> None:
    engine, rng = small_engine, random.Random(20)
    greedy = {"model": "smol", "prompt": "the abyss", "temperature": 0, "max_tokens": 20, "ignore_eos": True}
    before = engine.post("/v1/completions", **greedy).json()["choices"]
    statuses: Counter[int] = Counter()
    memory_kib: list[int] = []
    began_s = time.monotonic()
    with ThreadPoolExecutor(16) as threads:
        for _ in range(-(-NUM_FUZZED // BATCH)):
            requests = [random_request(rng) for _ in range(BATCH)]
            statuses.update(threads.map(status_of, itertools.repeat(engine), requests))
            memory_kib.append(engine.memory_kib())
    rate = statuses.total() / (time.monotonic() - began_s)
    half, every = len(memory_kib) // 2, max(1, len(memory_kib) // 20)
    print(f"{statuses.total()} requests, {rate:.0f}/s: {dict(statuses)}; MiB after each {every * BATCH}: "
          f"{[kib // 1024 for kib in memory_kib[every - 1 :: every]]}")  # fmt: skip
    assert memory_kib[-1] - memory_kib[half] < 64 * 1024, memory_kib
    assert statuses[200] > 0.2 * statuses.total()
    assert statuses[400] > 0.2 * statuses.total()
    wait_for(engine.idle, "nothing to be left of any request")
    assert engine.post("/v1/completions", **greedy).json()["choices"] == before
