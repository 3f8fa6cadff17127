"""`mainsail-engine bench`: load on a running server of any make, and what its clients saw.

Prompts are random token ids, so that every request is of the length asked for and nothing is cached by chance; answers
stream, ignore the end of text, and are exactly as long as asked. Times are the client's own: TTFT from sending to the
first token's arrival, ITL between two arrivals of one stream. Requests start as a Poisson process (--request-rate) or
all at once, at most --max-concurrency at a time.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from mainsail_engine.errors import StartupError


@dataclass(frozen=True, slots=True)
class Load:
    base_url: str
    model: str
    num_prompts: int
    input_len: int
    output_len: int
    max_concurrency: int
    request_rate: float
    """Per second; 0: all at once."""
    vocab_size: int
    seed: int = 0
    api_key: str | None = None


@dataclass(slots=True)
class Course:
    """What one request's client saw; seconds on the monotonic clock."""

    sent_s: float
    arrivals_s: list[float] = field(default_factory=list[float])
    num_tokens: int = 0
    error: str | None = None


def percentiles(values: list[float]) -> dict[str, float]:
    """Mean, p50, p90, p99 in milliseconds; empty for no values."""
    if not values:
        return {}
    ordered = sorted(values)
    at = {f"p{p}": ordered[min(len(ordered) - 1, len(ordered) * p // 100)] for p in (50, 90, 99)}
    return {name: round(1000 * value, 3) for name, value in {"mean": sum(ordered) / len(ordered), **at}.items()}


def summary(courses: list[Course], elapsed_s: float, input_len: int) -> dict[str, Any]:
    done = [course for course in courses if course.error is None and course.arrivals_s]
    tokens = sum(course.num_tokens for course in done)
    gaps = [b - a for course in done for a, b in zip(course.arrivals_s, course.arrivals_s[1:], strict=False)]
    return {
        "completed": len(done),
        "failed": len(courses) - len(done),
        "errors": sorted({course.error for course in courses if course.error})[:5],
        "duration_s": round(elapsed_s, 3),
        "requests_per_s": round(len(done) / elapsed_s, 3),
        "input_tokens_per_s": round(len(done) * input_len / elapsed_s, 1),
        "output_tokens_per_s": round(tokens / elapsed_s, 1),
        "output_tokens": tokens,
        "ttft_ms": percentiles([course.arrivals_s[0] - course.sent_s for course in done]),
        "itl_ms": percentiles(gaps),
        "e2e_ms": percentiles([course.arrivals_s[-1] - course.sent_s for course in done]),
    }


async def run(load: Load) -> dict[str, Any]:
    """Apply the load. Raises StartupError when the server cannot be reached at all."""
    rng = random.Random(load.seed)
    turns, began_s = asyncio.Semaphore(load.max_concurrency), time.monotonic()
    tasks: list[asyncio.Task[Course]] = []
    for _ in range(load.num_prompts):
        prompt = [rng.randrange(load.vocab_size) for _ in range(load.input_len)]
        tasks.append(asyncio.create_task(_one(load, prompt, turns)))
        if load.request_rate:
            await asyncio.sleep(rng.expovariate(load.request_rate))
    courses = await asyncio.gather(*tasks)
    return summary(courses, time.monotonic() - began_s, load.input_len)


async def _one(load: Load, prompt: list[int], turns: asyncio.Semaphore) -> Course:
    async with turns:
        course = Course(time.monotonic())
        body = {
            "model": load.model, "prompt": prompt, "max_tokens": load.output_len, "temperature": 0.0,
            "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        try:
            await _stream(load, json.dumps(body).encode(), course)
        except (OSError, asyncio.IncompleteReadError, ValueError) as error:
            course.error = f"{type(error).__name__}: {error}"
        return course


async def _stream(load: Load, content: bytes, course: Course) -> None:
    """POST /v1/completions on a connection of its own; notes when each event with text arrives."""
    url = urlsplit(load.base_url)
    host, port = url.hostname or "127.0.0.1", url.port or 80
    reader, writer = await asyncio.open_connection(host, port, limit=2**20)
    key = f"authorization: Bearer {load.api_key}\r\n" if load.api_key else ""
    path = url.path.rstrip("/").removesuffix("/v1") + "/v1/completions"
    head = (
        f"POST {path} HTTP/1.1\r\nhost: {host}:{port}\r\n{key}content-type: application/json\r\n"
        f"content-length: {len(content)}\r\nconnection: close\r\n\r\n"
    )
    try:
        writer.write(head.encode() + content)
        status = (await reader.readuntil(b"\r\n")).split()
        await reader.readuntil(b"\r\n\r\n")
        if status[1] != b"200":
            raise ValueError(f"{status[1].decode()}: {(await reader.read(400)).decode(errors='replace')}")
        while (line := await reader.readline()) != b"":
            if line.startswith(b"data: {"):
                _note(course, json.loads(line[6:]))
    finally:
        writer.close()


def _note(course: Course, event: dict[str, Any]) -> None:
    if "error" in event:
        raise ValueError(str(event["error"].get("message")))
    if event.get("usage"):
        course.num_tokens = event["usage"]["completion_tokens"]
    if event.get("choices"):
        course.arrivals_s.append(time.monotonic())


def check_reachable(base_url: str) -> None:
    """Raises StartupError."""
    import socket

    url = urlsplit(base_url)
    try:
        socket.create_connection((url.hostname or "127.0.0.1", url.port or 80), timeout=10).close()
    except OSError as error:
        raise StartupError(f"--base-url {base_url} cannot be reached: {error}") from error
