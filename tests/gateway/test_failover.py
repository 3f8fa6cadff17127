"""Real engines of a real model behind the gateway; one is killed in the middle of its streams, and nobody notices."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from tests.engine.conftest import DEFAULT_MODEL
from tests.engine.server.conftest import Engine, start

from mainsail_gateway.routes import Endpoint

pytestmark = pytest.mark.model

CHAT, TEXT, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
USAGE = {"stream_options": {"include_usage": True}}
LONG = {"max_tokens": 64, "ignore_eos": True}
PLAIN = {"stream": False, "stream_options": None}


def ask(text: str, **more) -> tuple[str, dict]:
    return CHAT, {"messages": [{"role": "user", "content": text}], **LONG, **more}


# top_k: drawn from a whole vocabulary, a token changes with the last bit of a logit, and that depends on the batch.
REQUESTS = [
    ask("Tell me about the sea.", temperature=0, **USAGE),
    ask("Tell me about the sky.", temperature=1.2, seed=1, top_k=40, **USAGE),
    ask("Write a poem with emojis.", temperature=1.0, seed=2, top_k=40),
    ask("Count to a hundred.", temperature=0, min_tokens=40, **USAGE),
    (TEXT, {"prompt": "日本語の文章：", "temperature": 0.9, "seed": 3, "top_k": 40, **LONG}),
    (TEXT, {"prompt": "1, 2, 3, 4,", "temperature": 0, "stop": [" 16"], **LONG, **USAGE}),
    (TEXT, {"prompt": ["The sea", "The sky"], "n": 2, "temperature": 1.1, "seed": 4, "top_k": 40, **LONG, **USAGE}),
    ask("Name some fish.", temperature=0, return_token_ids=True),
]

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer", "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
TOOL = {"name": "meet", "parameters": PERSON}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
PENALTIES = {"presence_penalty": 0.7, "frequency_penalty": 0.9, "repetition_penalty": 1.2}
CONSTRAINED = [
    ask("Who is it?", temperature=0.8, seed=9, top_k=40, **PENALTIES, **USAGE),
    ask("What do you see?", temperature=0, logit_bias={"260": 4, "288": -50}, **USAGE),
    ask("Is it far?", temperature=0, logprobs=True, top_logprobs=2, **USAGE),
    (TEXT, {"prompt": "One, two,", "temperature": 0, "logprobs": 1, **LONG, **USAGE}),
    ask("Who comes?", temperature=0.9, seed=10, top_k=40, response_format=SCHEMA, ignore_eos=None, **USAGE),
    (TEXT, {"prompt": "Call", "temperature": 1.0, "seed": 6, "structured_outputs": {"regex": "[0-9]{24} [a-z ]{40}"},
            "max_tokens": 64, **USAGE}),
    ask("Who is there?", temperature=0, tools=[{"type": "function", "function": TOOL}], ignore_eos=None,
        tool_choice={"type": "function", "function": {"name": "meet"}}, **USAGE),
    ask("Say two things.", n=2, temperature=1.0, seed=8, top_k=40, **USAGE),
    (RESPONSES, {"input": "Tell me about the sea.", "temperature": 0, "max_output_tokens": 48}),
    (RESPONSES, {"input": "Who comes?", "temperature": 0, "max_output_tokens": 64,
                 "tools": [{"type": "function", **TOOL}], "tool_choice": {"type": "function", "name": "meet"}}),
]  # fmt: skip


@dataclass
class Answer:
    """What a client makes of a stream."""

    ids: set[str] = field(default_factory=set)
    texts: dict[int, str] = field(default_factory=dict)
    roles: int = 0
    finish: dict[int, str] = field(default_factory=dict)
    usage: dict | None = None
    done: int = 0
    logprobs: int = 0

    def take(self, line: str) -> None:
        if line.startswith("event: "):
            return
        if line == "data: [DONE]":
            self.done += 1
            return
        assert line.startswith("data: "), line
        event = json.loads(line[6:])
        if "sequence_number" in event:
            self._take_response(event)
            return
        assert "error" not in event, event
        self.ids.add(event["id"])
        for choice in event["choices"]:
            index, delta = choice["index"], choice.get("delta", {})
            self.roles += "role" in delta
            called = [call["function"]["arguments"] for call in delta.get("tool_calls") or ()]
            text = choice.get("text") or delta.get("content") or "".join(called)
            self.texts[index] = self.texts.get(index, "") + text
            self.logprobs += len((choice.get("logprobs") or {}).get("content") or ())
            if choice["finish_reason"]:
                assert index not in self.finish
                self.finish[index] = choice["finish_reason"]
        if event.get("usage"):
            assert self.usage is None, "usage is told once"
            self.usage = {name: event["usage"][name] for name in ("prompt_tokens", "completion_tokens")}

    def _take_response(self, event: dict) -> None:
        """An event of /v1/responses: numbered upwards; the last has all that the deltas said."""
        assert event["sequence_number"] >= self.roles
        self.roles = event["sequence_number"] + 1
        self.texts[0] = self.texts.get(0, "") + event.get("delta", "")
        whole = event.get("response", {})
        self.ids |= {whole["id"]} if whole else set()
        if whole.get("status") in ("completed", "incomplete"):
            self.done += 1
            self.roles = 0
            self.finish[0] = whole["status"]
            said = [item.get("arguments") or item["content"][0]["text"] for item in whole["output"]]
            assert "".join(said) == self.texts[0]
            self.usage = {name: whole["usage"][name] for name in ("input_tokens", "output_tokens")}

    @property
    def said(self) -> tuple:
        return self.texts, self.roles, self.finish, self.usage, self.done, self.logprobs


async def stream(
    client: httpx.AsyncClient, url: str, request: tuple[str, dict], started: asyncio.Queue, number: int = 0
) -> Answer:
    (path, body), answer, lines = request, Answer(), 0
    sent, headers = {"model": "smol", "stream": True, **body}, {"x-number": str(number)}
    async with client.stream("POST", url + path, json=sent, headers=headers) as response:
        assert response.status_code == 200, await response.aread()
        assert "x-mainsail-stream" not in response.headers
        async for line in response.aiter_lines():
            if line:
                answer.take(line)
                lines += 1
                if lines == 2:
                    started.put_nowait(None)
    assert len(answer.ids) == 1
    return answer


def endpoint(engine: Engine, name: str) -> Endpoint:
    port = urlsplit(engine.url).port
    assert port is not None
    return Endpoint(key=name, host="127.0.0.1", port=port, pod=name)


class Cutter:
    """A way to an engine that breaks: connections are cut after a random number of the answer's bytes."""

    def __init__(self, engine: Engine, rng: random.Random, times: Counter[bytes]) -> None:
        """times: how often each request was cut, by whichever way."""
        self._port = urlsplit(engine.url).port
        self._rng = rng
        self._times = times
        self.cuts = 0

    async def start(self, name: str) -> Endpoint:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=1 << 22)
        return Endpoint(key=name, host="127.0.0.1", port=self._server.sockets[0].getsockname()[1], pod=name)

    def stop(self) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One exchange. Each request is cut at most twice, whatever came of it."""
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            head = await reader.readuntil(b"\r\n\r\n")
            number = head.lower().partition(b"x-number: ")[2].partition(b"\r\n")[0]
            length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
            there, away = await asyncio.open_connection("127.0.0.1", self._port)
            body = await reader.readexactly(length)
            away.write(head.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n") + body)
            left = 1 << 30
            if self._times[number] < 2:
                left = self._rng.randrange(1, 9000)
            while data := await there.read(65536):
                writer.write(data[:left])
                left -= len(data)
                if left < 0:
                    self.cuts += 1
                    self._times[number] += 1
                    break
            away.transport.abort()
        writer.close()


@pytest.mark.slow
async def test_streams_cut_at_random_points(kit, tmp_path: Path) -> None:
    seed = random.randrange(1 << 30)
    rng = random.Random(seed)
    path = Path(os.environ.get("MAINSAIL_MODEL", DEFAULT_MODEL))
    engine = await asyncio.to_thread(start, tmp_path, path, "--kv-cache-blocks", "1024", "--max-num-seqs", "32")
    requests = REQUESTS + CONSTRAINED
    try:
        async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=None)) as client:
            nowhere: asyncio.Queue = asyncio.Queue()
            undisturbed = await asyncio.gather(*(stream(client, engine.url, r, nowhere) for r in requests))
            times: Counter[bytes] = Counter()
            cutters = [Cutter(engine, rng, times) for _ in range(2)]
            ends = [await cutter.start(name) for cutter, name in zip(cutters, "ab", strict=True)]
            async with kit.gateway(kit.service(*ends, name="smol")) as gw:
                answers = await asyncio.gather(
                    *(stream(client, gw.url, r, nowhere, number=n) for n, r in enumerate(requests))
                )
                assert gw.metric("mainsail:gateway_failovers_total", service="smol") > len(requests) / 3
                assert gw.metric("mainsail:gateway_requests_total", service="smol", code="200") == len(requests)
            for cutter in cutters:
                cutter.stop()
    finally:
        engine.close()
    assert sum(cutter.cuts for cutter in cutters) > len(requests) / 3
    for (_, body), want, got in zip(requests, undisturbed, answers, strict=True):
        assert got.said == want.said, f"seed {seed}: {body}"


@pytest.fixture
def engines(tmp_path: Path) -> Iterator[list[Engine]]:
    path = Path(os.environ.get("MAINSAIL_MODEL", DEFAULT_MODEL))
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        folder.mkdir()
    with ThreadPoolExecutor() as threads:  # at the same time
        flags = ("--kv-cache-blocks", "512", "--max-num-seqs", "16")
        started = list(threads.map(lambda folder: start(folder, path, *flags), folders))
    yield started
    for engine in started:
        engine.close()


async def spell(pids: tuple[int, ...]) -> None:
    """An engine's processes run for a moment and then stand still while what they said is read: so it does not come to
    the end of its streams before anybody has heard of their beginning."""
    for number, pause in ((signal.SIGCONT, 0.05), (signal.SIGSTOP, 0.1)):
        for pid in pids:
            os.kill(pid, number)
        await asyncio.sleep(pause)


async def test_an_engine_killed_in_the_middle_of_its_streams(kit, engines) -> None:
    async with httpx.AsyncClient(timeout=120) as client:
        nowhere: asyncio.Queue = asyncio.Queue()
        undisturbed = await asyncio.gather(*(stream(client, engines[1].url, r, nowhere) for r in REQUESTS))
        ends = [endpoint(engine, name) for engine, name in zip(engines, "ab", strict=True)]
        async with kit.gateway(kit.service(*ends, name="smol")) as gw:
            running = [asyncio.create_task(stream(client, gw.url, r, nowhere)) for r in REQUESTS]
            whole = asyncio.create_task(client.post(gw.url + CHAT, json={"model": "smol", **REQUESTS[0][1], **PLAIN}))
            pids = engines[0].process.pid, engines[0].core_pid()
            try:
                async with asyncio.timeout(120):
                    while gw.metric("mainsail:gateway_time_to_first_token_seconds_count", pod="a") < 2:
                        await spell(pids)
                assert gw.gateway.fleet.pools["default", "smol"].loads["a"].requests > 0
            finally:
                engines[0].process.send_signal(signal.SIGKILL)
                os.kill(pids[1], signal.SIGCONT)
            answers = await asyncio.gather(*running)
            assert (await whole).status_code == 200
        labels = {"namespace": "default", "service": "smol", "reason": "truncated"}
        assert gw.metric("mainsail:gateway_failovers_total", **labels) > 0
    for (_, body), want, got in zip(REQUESTS, undisturbed, answers, strict=True):
        assert got.said == want.said, body
