"""The API's forms, on a model of random weights: log-probabilities, echo, embeddings, answers in several ways."""

from __future__ import annotations

import asyncio
import base64
import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import openai
import psutil
import pytest
from tests.engine.server.conftest import ROOT, Engine
from tests.engine.server.streams import Seen, watch
from tests.engine.test_metrics import check_the_field

PROMPT = "the abyss of a quiet sea"
GREEDY: dict[str, Any] = {"model": "smol", "temperature": 0, "max_tokens": 12, "ignore_eos": True}
CHAT: list[Any] = [{"role": "user", "content": PROMPT}]


@pytest.fixture(scope="module")
def client(tiny_engine: Engine) -> openai.OpenAI:
    return openai.OpenAI(base_url=tiny_engine.url + "/v1", api_key="none", max_retries=0, timeout=240)


def events(engine: Engine, path: str, **body: Any) -> list[dict[str, Any]]:
    with engine.http.stream("POST", engine.url + path, json={**body, "stream": True}) as answer:
        assert answer.status_code == 200, answer.read()
        return [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {")]


def joined(lists: Iterable[list[Any]]) -> list[Any]:
    return list(chain.from_iterable(lists))


def same(got: Any, expected: Any) -> bool:
    """Equal but for what float32 makes of batches of different shapes."""
    if isinstance(expected, list):
        return len(got) == len(expected) and all(map(same, got, expected))
    if isinstance(expected, dict):
        return got.keys() == expected.keys() and all(same(got[key], expected[key]) for key in expected)
    return got == pytest.approx(expected, abs=1e-3) if isinstance(expected, float) else got == expected


def complete(engine: Engine, **body: Any) -> dict[str, Any]:
    response = engine.post("/v1/completions", **{**GREEDY, "prompt": PROMPT, **body})
    assert response.status_code == 200, response.text
    return response.json()


# -- log-probabilities -------------------------------------------------------------------------------------------------


def test_chat_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="smol", messages=CHAT, temperature=0, max_tokens=9, logprobs=True, top_logprobs=3,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )  # fmt: skip
    choice = answer.choices[0]
    assert choice.logprobs is not None
    entries = choice.logprobs.content
    assert entries is not None
    assert len(entries) == 9
    spelled = b"".join(bytes(entry.bytes or []) for entry in entries)
    assert spelled.decode(errors="replace").replace("<|im_end|>", "") == choice.message.content
    for entry in entries:
        assert [top.logprob for top in entry.top_logprobs] == sorted(
            (t.logprob for t in entry.top_logprobs), reverse=True
        )
        assert (entry.top_logprobs[0].token, entry.top_logprobs[0].logprob) == (entry.token, entry.logprob)
        assert sum(np.exp(top.logprob) for top in entry.top_logprobs) <= 1


def test_streamed_logprobs_are_those_of_the_whole(tiny_engine: Engine) -> None:
    body = {"messages": CHAT, **GREEDY, "logprobs": True, "top_logprobs": 2, "return_token_ids": True}
    whole = tiny_engine.post("/v1/chat/completions", **body).json()["choices"][0]
    choices = [e["choices"][0] for e in events(tiny_engine, "/v1/chat/completions", **body)]
    assert same(joined(c["logprobs"]["content"] for c in choices if c["logprobs"]), whole["logprobs"]["content"])
    assert joined(c.get("token_ids", []) for c in choices) == whole["token_ids"]
    assert "".join(c["delta"].get("content", "") for c in choices) == whole["message"]["content"]


@pytest.mark.parametrize("logprobs", [None, 0, 2])
@pytest.mark.parametrize("echo", [False, True])
def test_completions_streamed_are_as_whole(tiny_engine: Engine, logprobs: int | None, echo: bool) -> None:
    body = {"prompt": [PROMPT, "x"], **GREEDY, "n": 2, "seed": 3, "temperature": 1, "logprobs": logprobs, "echo": echo}
    whole = tiny_engine.post("/v1/completions", **body).json()
    streamed = events(tiny_engine, "/v1/completions", **body, stream_options={"include_usage": True})
    assert streamed[-1]["usage"]["total_tokens"] == whole["usage"]["total_tokens"]
    for index, expected in enumerate(whole["choices"]):
        mine = [e["choices"][0] for e in streamed if e["choices"] and e["choices"][0]["index"] == index]
        assert "".join(choice["text"] for choice in mine) == expected["text"]
        assert expected["text"].startswith([PROMPT, "x"][index // 2] if echo else "")
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            gathered = joined(choice["logprobs"][name] for choice in mine if choice["logprobs"])
            assert same(gathered, [] if logprobs is None else expected["logprobs"][name])


LONG = [5 + index % 90 for index in range(1300)]
"""Computed in three chunks."""


def test_prompt_logprobs_come_with_an_answers_first_event(tiny_engine: Engine) -> None:
    body = {"prompt": [LONG, [5]], **GREEDY, "n": 2, "prompt_logprobs": 2, "return_token_ids": True}
    whole = tiny_engine.post("/v1/completions", **body).json()["choices"]
    streamed = [event["choices"][0] for event in events(tiny_engine, "/v1/completions", **body)]
    for expected in whole:
        first, *rest = [choice for choice in streamed if choice["index"] == expected["index"]]
        assert len(first["prompt_logprobs"]) == len(expected["prompt_token_ids"])
        assert same(first["prompt_logprobs"], expected["prompt_logprobs"])
        assert first["prompt_token_ids"] == expected["prompt_token_ids"]
        assert not any("prompt_logprobs" in choice or "prompt_token_ids" in choice for choice in rest)
        assert first["text"] + "".join(choice["text"] for choice in rest) == expected["text"]
        assert joined(choice["token_ids"] for choice in rest) == expected["token_ids"]


def test_a_chats_first_event_tells_of_the_prompt(tiny_engine: Engine) -> None:
    long = [{"role": "user", "content": PROMPT * 60}]
    body = {"messages": long, **GREEDY, "n": 2, "prompt_logprobs": 1, "return_token_ids": True}
    whole = tiny_engine.post("/v1/chat/completions", **body).json()
    first, *rest = events(tiny_engine, "/v1/chat/completions", **body)
    assert len(first["prompt_logprobs"]) == whole["usage"]["prompt_tokens"] > 1200
    assert same(first["prompt_logprobs"], whole["prompt_logprobs"])
    assert first["prompt_token_ids"] == whole["prompt_token_ids"]
    assert first["choices"][0]["delta"]["role"] == "assistant"
    assert not any("prompt_logprobs" in event or "prompt_token_ids" in event for event in rest)
    for index, expected in enumerate(whole["choices"]):
        mine = [event["choices"][0] for event in rest if event["choices"][0]["index"] == index]
        assert "".join(choice["delta"].get("content", "") for choice in mine) == expected["message"]["content"]


def test_echo_scores_a_text(tiny_engine: Engine) -> None:
    """As evaluation harnesses ask: nothing generated, the prompt's own log-probabilities."""
    scored = complete(tiny_engine, max_tokens=0, echo=True, logprobs=1)
    choice = scored["choices"][0]
    assert (choice["text"], choice["finish_reason"], scored["usage"]["completion_tokens"]) == (PROMPT, "length", 0)
    logprobs = choice["logprobs"]
    assert "".join(logprobs["tokens"]) == PROMPT
    assert logprobs["token_logprobs"][0] is None
    assert all(value < 0 for value in logprobs["token_logprobs"][1:])
    assert [
        PROMPT[at:][: len(t)] for at, t in zip(logprobs["text_offset"], logprobs["tokens"], strict=True)
    ] == logprobs["tokens"]
    table = complete(tiny_engine, prompt_logprobs=2)["choices"][0]["prompt_logprobs"]
    assert table[0] is None
    ids = tiny_engine.post("/tokenize", prompt=PROMPT).json()["tokens"]
    for token, entry, value in zip(ids[1:], table[1:], logprobs["token_logprobs"][1:], strict=True):
        assert entry[str(token)]["logprob"] == pytest.approx(value, abs=1e-4)
        assert min(e["rank"] for e in entry.values()) == 1


def test_the_models_own_probabilities_whatever_the_parameters(tiny_engine: Engine) -> None:
    plain = complete(tiny_engine, logprobs=1, max_tokens=1, return_token_ids=True)["choices"][0]
    best = plain["token_ids"][0]
    biased = complete(
        tiny_engine, logprobs=1, max_tokens=1, return_token_ids=True, logit_bias={str(best): -100},
        return_tokens_as_token_ids=True,
    )["choices"][0]  # fmt: skip
    assert biased["token_ids"] != [best]
    assert biased["logprobs"]["top_logprobs"][0][f"token_id:{best}"] == plain["logprobs"]["token_logprobs"][0]


# -- parameters --------------------------------------------------------------------------------------------------------


def test_n_is_as_repeated(tiny_engine: Engine) -> None:
    body = {"temperature": 1.0, "max_tokens": 10}
    together = complete(tiny_engine, **body, n=4, seed=11)
    alone = [complete(tiny_engine, **body, seed=11 + index)["choices"][0]["text"] for index in range(4)]
    assert [choice["text"] for choice in together["choices"]] == alone
    assert len(set(alone)) > 1
    assert together["usage"]["prompt_tokens"] * 4 > together["usage"]["prompt_tokens"]


def test_allowed_tokens_and_bad_words(tiny_engine: Engine) -> None:
    letters = tiny_engine.post("/tokenize", prompt="xmkow").json()["tokens"]
    text = complete(tiny_engine, allowed_token_ids=letters, temperature=1.5, max_tokens=60, seed=1)["choices"][0][
        "text"
    ]
    assert set(text) == set("xmkow")
    bad = {"allowed_token_ids": letters, "temperature": 1.5, "max_tokens": 200, "bad_words": ["xm", "kow", "w"]}
    text = complete(tiny_engine, **bad, seed=1)["choices"][0]["text"]
    assert not any(word in text for word in ("xm", "kow", "w"))
    assert {"x", "m", "k", "o"} == set(text)


def test_what_forbids_everything_fails_alone(tiny_engine: Engine) -> None:
    tokens = tiny_engine.post("/tokenize", prompt="x").json()["tokens"]
    refused = tiny_engine.post("/v1/completions", prompt="a", **GREEDY, allowed_token_ids=tokens, bad_words=["x"])
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "allowed_token_ids")
    later = tiny_engine.post("/v1/completions", prompt="a", **GREEDY, allowed_token_ids=tokens, bad_words=["xx"])
    assert (later.status_code, later.json()["error"]["code"]) == (400, "no_token_allowed")
    assert complete(tiny_engine)["choices"][0]["finish_reason"] == "length"


def test_truncated_prompts_and_usage_on_the_way(tiny_engine: Engine) -> None:
    answer = complete(tiny_engine, truncate_prompt_tokens=5, return_token_ids=True)
    ids = tiny_engine.post("/tokenize", prompt=PROMPT).json()["tokens"]
    assert answer["choices"][0]["prompt_token_ids"] == ids[-5:]
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = events(tiny_engine, "/v1/completions", prompt=PROMPT, **GREEDY, stream_options=options)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == 12


# -- embeddings --------------------------------------------------------------------------------------------------------


def test_embeddings(client: openai.OpenAI, tiny_engine: Engine) -> None:
    texts = [PROMPT, "another", PROMPT]
    answer = client.embeddings.create(model="smol", input=texts)
    vectors = np.array([item.embedding for item in answer.data])
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(3), abs=1e-5)
    assert vectors[0] == pytest.approx(vectors[2], abs=1e-6)
    assert vectors[0] @ vectors[1] < 0.999
    assert answer.usage.prompt_tokens == sum(
        tiny_engine.post("/tokenize", prompt=text).json()["count"] for text in texts
    )
    raw = tiny_engine.post("/v1/embeddings", model="smol", input=PROMPT, encoding_format="base64").json()
    decoded = np.frombuffer(base64.b64decode(raw["data"][0]["embedding"]), "<f4")
    assert decoded == pytest.approx(vectors[0], abs=1e-6)
    last = tiny_engine.post("/v1/embeddings", model="smol", input=PROMPT, pooling="last").json()
    assert last["data"][0]["embedding"] != pytest.approx(vectors[0], abs=1e-3)
    refused = tiny_engine.post("/v1/embeddings", model="smol", input=PROMPT, dimensions=8)
    assert refused.json()["error"]["param"] == "dimensions"


# -- metrics against what clients see ----------------------------------------------------------------------------------


def test_metrics_are_the_fields(tiny_engine: Engine) -> None:
    check_the_field(tiny_engine.http.get(tiny_engine.url + "/metrics").text)


PAUSE_S = 0.5


async def test_metrics_are_what_the_clients_waited_for(tiny_engine: Engine, waiting: Callable[..., None]) -> None:
    """Tokens exactly. The core stands still until all have asked, and then for a while: first tokens come later than
    that, all of an answer's time is before its first token or after it, and none ends later than its client saw."""
    times = [f"vllm:{name}_seconds" for name in ("time_to_first_token", "inter_token_latency", "e2e_request_latency")]
    every = [f"{name}_{kind}" for name in times for kind in ("sum", "count")]
    every += ["vllm:generation_tokens_total", "vllm:prompt_tokens_total", "vllm:request_success_total"]
    before = {name: tiny_engine.metric(name) for name in every}
    core = psutil.Process(tiny_engine.core_pid())

    def one(index: int) -> asyncio.Task[Seen]:
        body = {**GREEDY, "prompt": [index + 1] * 1200, "max_tokens": 60, "return_token_ids": True}
        return asyncio.create_task(watch(tiny_engine.url, "/v1/completions", body))

    core.suspend()
    try:
        streams = [one(index) for index in range(24)]
        queued = lambda: tiny_engine.metric("mainsail:queued_requests") == 24  # noqa: E731
        await asyncio.to_thread(waiting, queued, "all to be queued")
        await asyncio.sleep(PAUSE_S)
    finally:
        core.resume()
    seen = await asyncio.gather(*streams)
    grown = {name: tiny_engine.metric(name) - old for name, old in before.items()}
    assert grown["vllm:request_success_total"] == 24
    assert grown["vllm:generation_tokens_total"] == sum(len(stream.arrivals_s()) for stream in seen) == 24 * 60
    assert grown["vllm:prompt_tokens_total"] == 24 * 1200
    assert [grown[f"{name}_count"] for name in times] == [24, 24 * 59, 24]
    first, between, whole = (grown[f"{name}_sum"] for name in times)
    assert first > 24 * PAUSE_S
    assert between > 0
    assert first + between == pytest.approx(whole, abs=1e-6)
    assert whole < sum(stream.ended_s - stream.sent_s for stream in seen)


async def test_what_runs_and_waits_is_what_clients_wait_for(tiny_engine: Engine, waiting: Callable[..., None]) -> None:
    """90 streams at an engine that runs 64 at a time: the gauges say 64 and 26 for as long as nobody is done."""
    body = {**GREEDY, "prompt": [5] * 40, "max_tokens": 1500}
    streams = [asyncio.create_task(watch(tiny_engine.url, "/v1/completions", body)) for _ in range(90)]

    def counts() -> tuple[float, float]:
        return tiny_engine.metric("vllm:num_requests_running"), tiny_engine.metric("vllm:num_requests_waiting")

    try:
        await asyncio.to_thread(waiting, lambda: counts() == (64, 26), "64 to run and 26 to wait")
        for _ in range(5):
            assert await asyncio.to_thread(counts) == (64, 26)
            await asyncio.sleep(0.02)
    finally:
        for stream in streams:
            stream.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
    await asyncio.to_thread(waiting, tiny_engine.idle, "the gauges to come down")


# -- the other commands ------------------------------------------------------------------------------------------------


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHONPATH": f"{ROOT / 'engine'}:{ROOT / 'kernels'}", "PATH": "/usr/bin:/bin"}
    return subprocess.run(
        [sys.executable, "-m", "mainsail_engine.cli", *arguments],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_bench_counts_what_the_server_counts(tiny_engine: Engine) -> None:
    before = tiny_engine.metric("vllm:generation_tokens_total")
    done = command(
        "bench", "--base-url", tiny_engine.url, "--model", "smol", "--num-prompts", "20", "--random-input-len", "40",
        "--random-output-len", "10", "--max-concurrency", "8", "--vocab-size", "200",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert (figures["completed"], figures["failed"], figures["output_tokens"]) == (20, 0, 200)
    assert tiny_engine.metric("vllm:generation_tokens_total") - before == 200


def test_run_batch(tiny_engine: Engine, tiny_model: Path, tmp_path: Path) -> None:
    lines = [
        {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {**GREEDY, "prompt": PROMPT}},
        {"custom_id": "b", "method": "POST", "url": "/v1/chat/completions", "body": {**GREEDY, "messages": CHAT}},
        {"custom_id": "c", "method": "POST", "url": "/v1/completions", "body": {**GREEDY, "prompt": PROMPT, "n": 0}},
        {"custom_id": "d", "method": "GET", "url": "/v1/models", "body": {}},
        {"custom_id": "e", "method": "POST", "url": "/v1/embeddings", "body": {"model": "smol", "input": "x"}},
    ]
    given, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    given.write_text("".join(json.dumps(line) + "\n" for line in lines) + "no json\n")
    done = command(
        "run-batch", "-i", str(given), "-o", str(out), "--model", str(tiny_model), "--served-model-name", "smol",
        "--kv-cache-blocks", "256",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert [answer["custom_id"] for answer in answers] == ["a", "b", "c", "d", "e", None]
    assert answers[0]["response"]["body"]["choices"] == complete(tiny_engine)["choices"]
    assert answers[1]["response"]["body"]["choices"][0]["message"]["role"] == "assistant"
    assert (answers[2]["response"]["status_code"], answers[2]["response"]["body"]["error"]["param"]) == (400, "n")
    assert answers[3]["error"]["code"] == answers[5]["error"]["code"] == "invalid_line"
    assert len(answers[4]["response"]["body"]["data"][0]["embedding"]) == 32
