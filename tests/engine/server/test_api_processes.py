"""Several API processes behind one port are one server: metrics, admission, drain and sleep."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
from tests.engine.server.conftest import Engine, start


def stream_body(index: int, max_tokens: int) -> dict[str, Any]:
    return {
        "model": "smol", "prompt": f"Story {index}:", "max_tokens": max_tokens, "stream": True, "ignore_eos": True,
        "temperature": 0, "return_token_ids": True,
    }  # fmt: skip


async def test_500_clients_half_of_them_leave(tiny_engine: Engine, waiting: Callable[..., None]) -> None:
    """At random, in the middle of their streams; afterwards nothing runs, waits or holds a block. All the while the
    engine is alive, and says so."""
    rng = random.Random(5)
    leaves_after = [rng.randint(0, 12) if rng.random() < 0.5 else None for _ in range(500)]
    counted: list[int] = []

    async def one(http: httpx.AsyncClient, index: int) -> None:
        seen, after = 0, leaves_after[index]
        async with http.stream("POST", tiny_engine.url + "/v1/completions", json=stream_body(index, 16)) as answer:
            assert answer.status_code == 200, await answer.aread()
            async for line in answer.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                seen += len(json.loads(line[6:])["choices"][0]["token_ids"])
                if after is not None and seen >= after:
                    return
        counted.append(seen)

    async def probe() -> None:
        async with httpx.AsyncClient(timeout=240) as http:
            while True:
                lives.append((await http.get(tiny_engine.url + "/health/live")).status_code)
                await asyncio.sleep(0.2)

    lives: list[int] = []
    probing = asyncio.create_task(probe())
    before = tiny_engine.metric("vllm:request_success_total")
    async with httpx.AsyncClient(timeout=200, limits=httpx.Limits(max_connections=500)) as http:
        await asyncio.gather(*(one(http, index) for index in range(500)))
    probing.cancel()
    assert set(lives) == {200}
    waiting(tiny_engine.idle, "nothing running, all blocks free", timeout_s=240)
    assert counted == [16] * sum(after is None for after in leaves_after)
    ended = lambda: tiny_engine.metric("vllm:request_success_total") - before  # noqa: E731
    waiting(lambda: ended() == 500, "whoever left to be counted by the process that served it")


def test_a_scrape_of_any_process_shows_all(tiny_engine: Engine, waiting: Callable[..., None]) -> None:
    def handled() -> float:
        return tiny_engine.metric("http_requests_total", handler="/v1/completions", status="2xx")

    before, handled_before = tiny_engine.metric("vllm:generation_tokens_total"), handled()
    for _ in range(12):  # a connection each: the kernel spreads them
        httpx.post(tiny_engine.url + "/v1/completions", json={**stream_body(0, 5), "stream": False}, timeout=240)
    waiting(lambda: handled() - handled_before == 12, "the last of them to be counted: it is when its client has it")
    for _ in range(8):
        text = httpx.get(tiny_engine.url + "/metrics", timeout=240).text
        assert text.count("# TYPE vllm:generation_tokens_total counter") == 1
        assert tiny_engine.metric("vllm:generation_tokens_total") - before == 12 * 5
        assert handled() - handled_before == 12


def test_sleep_and_wake_up(tiny_engine: Engine) -> None:
    body = {"model": "smol", "prompt": "The sea", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    answer = tiny_engine.post("/v1/completions", **body).json()["choices"][0]["text"]
    assert tiny_engine.post("/sleep").json() == {"is_sleeping": True}
    for _ in range(6):
        refused = httpx.post(tiny_engine.url + "/v1/completions", json=body, timeout=240)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "asleep")
        assert httpx.get(tiny_engine.url + "/health/ready", timeout=240).status_code == 503
        assert httpx.get(tiny_engine.url + "/health/live", timeout=240).status_code == 200
    assert tiny_engine.metric("vllm:engine_sleep_state", sleep_state="weights_offloaded") == 1
    assert tiny_engine.post("/wake_up").json() == {"is_sleeping": False}
    again = tiny_engine.post("/v1/completions", **body).json()
    assert again["choices"][0]["text"] == answer
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert tiny_engine.metric("vllm:engine_sleep_state", sleep_state="awake") == 1


def test_admission_counts_over_processes_and_a_drain_is_for_all(
    tiny_model: Path, tmp_path: Path, waiting: Callable[..., None]
) -> None:
    engine = start(
        tmp_path, tiny_model, "--kv-cache-blocks", "512", "--max-num-seqs", "1", "--max-num-queued-reqs", "3",
        "--api-server-count", "3", "--enable-log-requests",
    )  # fmt: skip
    try:
        long = {**stream_body(1, 1500), "stream": True}
        with httpx.Client(timeout=240) as one, one.stream("POST", engine.url + "/v1/completions", json=long) as running:
            lines = running.iter_lines()
            assert next(lines)
            os.kill(engine.core_pid(), signal.SIGSTOP)  # so that nothing leaves the queue meanwhile
            with ThreadPoolExecutor(1) as thread:
                crowded = thread.submit(asyncio.run, crowd(engine.url, 12))
                waiting(lambda: num_queued_or_refused(engine) == 12, "all have been queued or refused")
                num_refused = engine.metric("vllm:admission_rejections_total", reason="max_num_queued_reqs")
                assert 7 <= num_refused <= 9  # three wait; processes that ask at the same moment let in one each
                engine.process.send_signal(signal.SIGTERM)
                waiting(lambda: httpx.get(engine.url + "/health/ready", timeout=240).status_code == 503, "not ready")
                for _ in range(6):
                    assert httpx.post(engine.url + "/v1/completions", json=long, timeout=240).status_code == 503
                os.kill(engine.core_pid(), signal.SIGCONT)
            assert crowded.result().count(429) == num_refused
            assert crowded.result().count(200) == 12 - num_refused
            assert sum(1 for line in lines if line.startswith("data: {")) > 1000
        assert engine.wait() == 0
        assert "Story" not in engine.log.read_text()
        assert "1500 generated" in engine.log.read_text()
    finally:
        engine.close()


def num_queued_or_refused(engine: Engine) -> float:
    return engine.metric("mainsail:queued_requests") + engine.metric("vllm:admission_rejections_total")


async def crowd(url: str, count: int) -> list[int]:
    """So many requests at once, a connection each."""

    async with httpx.AsyncClient(timeout=240) as http:

        async def one(index: int) -> int:
            body = {**stream_body(index, 1), "stream": False}
            return (await http.post(url + "/v1/completions", json=body)).status_code

        return await asyncio.gather(*(one(index) for index in range(count)))
