"""Real engines of a real model behind the gateway; one is killed in the middle of its streams, and nobody notices."""

from __future__ import annotations

import asyncio
import json
import os
import signal
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

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
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


@dataclass
class Answer:
    """What a client makes of a stream."""

    ids: set[str] = field(default_factory=set)
    texts: dict[int, str] = field(default_factory=dict)
    roles: int = 0
    finish: dict[int, str] = field(default_factory=dict)
    usage: dict | None = None
    done: int = 0

    def take(self, line: str) -> None:
        if line == "data: [DONE]":
            self.done += 1
            return
        assert line.startswith("data: "), line
        event = json.loads(line[6:])
        assert "error" not in event, event
        self.ids.add(event["id"])
        for choice in event["choices"]:
            index, delta = choice["index"], choice.get("delta", {})
            self.roles += "role" in delta
            self.texts[index] = self.texts.get(index, "") + (choice.get("text") or delta.get("content") or "")
            if choice["finish_reason"]:
                assert index not in self.finish
                self.finish[index] = choice["finish_reason"]
        if event.get("usage"):
            assert self.usage is None, "usage is told once"
            self.usage = {name: event["usage"][name] for name in ("prompt_tokens", "completion_tokens")}

    @property
    def said(self) -> tuple:
        return self.texts, self.roles, self.finish, self.usage, self.done


async def stream(client: httpx.AsyncClient, url: str, path: str, body: dict, started: asyncio.Queue) -> Answer:
    answer, lines = Answer(), 0
    async with client.stream("POST", url + path, json={"model": "smol", "stream": True, **body}) as response:
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


async def test_an_engine_killed_in_the_middle_of_its_streams(kit, engines) -> None:
    async with httpx.AsyncClient(timeout=120) as client:
        nowhere: asyncio.Queue = asyncio.Queue()
        undisturbed = await asyncio.gather(*(stream(client, engines[1].url, *r, nowhere) for r in REQUESTS))
        ends = [endpoint(engine, name) for engine, name in zip(engines, "ab", strict=True)]
        async with kit.gateway(kit.service(*ends, name="smol")) as gw:
            begun: asyncio.Queue = asyncio.Queue()
            running = [asyncio.create_task(stream(client, gw.url, *r, begun)) for r in REQUESTS]
            whole = asyncio.create_task(client.post(gw.url + CHAT, json={"model": "smol", **REQUESTS[0][1], **PLAIN}))
            async with asyncio.timeout(120):
                for _ in REQUESTS:
                    await begun.get()
            loads = gw.gateway.fleet.pools["default", "smol"].loads
            assert loads["a"].requests > 0
            engines[0].process.send_signal(signal.SIGKILL)
            answers = await asyncio.gather(*running)
            assert (await whole).status_code == 200
        labels = {"namespace": "default", "service": "smol", "reason": "truncated"}
        assert gw.metric("mainsail:gateway_failovers_total", **labels) > 0
    for (_, body), want, got in zip(REQUESTS, undisturbed, answers, strict=True):
        assert got.said == want.said, body
