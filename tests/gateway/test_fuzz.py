"""Thousands of odd requests: each is refused in OpenAI's form or by closing, none with a 5xx, none takes the gateway
along. And a rollout under load: engines drain and leave, others come, no request is lost."""

import asyncio
import json
import random

import httpx

from mainsail_gateway.request import parse

METHODS = [b"POST", b"GET", b"PUT", b"DELETE", b"OPTIONS", b"HEAD", b"FOO", b"post", b""]
PATHS = [
    b"/v1/chat/completions",
    b"/v1/completions",
    b"/v1/models",
    b"/",
    b"/v1/",
    b"*",
    b"/v1/%00",
    b"/v1/../x",
    b"//",
]
HEADERS = [
    b"Content-Length: 5", b"Content-Length: 0", b"Content-Length: -1", b"Content-Length: 99999999999",
    b"Transfer-Encoding: chunked", b"Transfer-Encoding: gzip, chunked", b"Connection: close", b"Connection: upgrade",
    b"Upgrade: h2c", b"Expect: 100-continue", b"Content-Encoding: gzip", b"Host: a b", b"X: \xff\xfe", b": x", b"x",
    b"Content-Type: application/json", b"Authorization: Bearer " + b"k" * 5000,
]  # fmt: skip
VALUES = [None, True, 1, -1, 1e300, "", "m", "nope", "\u0000", [], {}, [[]], {"model": "m"}, "x" * 5000]


def fuzzed(rng: random.Random) -> bytes:
    names = ["model", "messages", "prompt", "stream", "max_tokens", "user", "tools", "prompt_cache_key"]
    fields = {rng.choice(names): rng.choice(VALUES) for _ in range(rng.randrange(6))}
    if rng.random() < 0.5:
        fields["model"] = "m"
    body = json.dumps(fields).encode()
    if rng.random() < 0.4:
        cut = rng.randrange(len(body) + 1)
        body = body[:cut] + rng.randbytes(rng.randrange(6)) + body[cut + rng.randrange(3) :]
    headers = rng.sample(HEADERS, rng.randrange(3))
    if rng.random() < 0.8:
        headers.append(b"Content-Length: %d" % len(body))
    method = rng.choice(METHODS) if rng.random() < 0.3 else b"POST"
    path = rng.choice(PATHS) if rng.random() < 0.3 else PATHS[0]
    data = b"\r\n".join([method + b" " + path + b" HTTP/1.1", b"Host: x", *headers, b"", b""]) + body
    if rng.random() < 0.1:
        position = rng.randrange(len(data))
        data = data[:position] + rng.randbytes(1) + data[position + 1 :]
    return data


async def send(port: int, data: bytes) -> bytes:
    """The first of what comes back; nothing comes for a request that is unfinished, which is then left."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(data)
        async with asyncio.timeout(1):
            return await reader.read(65536)
    except (ConnectionError, TimeoutError):
        return b""
    finally:
        writer.close()


async def test_two_thousand_odd_requests(kit):
    rng = random.Random(7)
    up = await kit.upstream()
    statuses: dict[bytes, int] = {}
    async with kit.gateway(kit.service(up.endpoint())) as gw, httpx.AsyncClient() as client:
        for _ in range(10):
            batch = [fuzzed(rng) for _ in range(200)]
            for data, got in zip(batch, await asyncio.gather(*(send(gw.port, d) for d in batch)), strict=True):
                status = got.split(b" ")[1] if got else b"none"
                assert not status.startswith(b"5"), (data, got)
                statuses[status] = statuses.get(status, 0) + 1
        await kit.until(lambda: not gw.gateway.relay.calls)
        ok = await client.post(gw.url + "/v1/completions", json={"model": "m"})
        assert ok.status_code == 200
    assert {b"200", b"400", b"404", b"405", b"413"} <= statuses.keys()
    assert len(up.seen) > 10
    for seen in up.seen:
        assert parse(seen.body).model == "m"  # nothing else ever reached the engine


async def test_a_rollout_under_load_loses_nothing(kit):
    old, new = [await kit.upstream() for _ in range(2)], [await kit.upstream() for _ in range(2)]
    draining = kit.raw(b"HTTP/1.1 503 X\r\nretry-after: 1\r\ncontent-length: 0\r\n\r\n")
    done = asyncio.Event()
    codes: list[int] = []

    async def client(http: httpx.AsyncClient, url: str) -> None:
        while not done.is_set():
            response = await http.post(url, json={"model": "m", "stream": True})
            codes.append(response.status_code if response.text.endswith("data: [DONE]\n\n") else -1)

    async def more(count: int) -> None:
        goal = len(codes) + count
        await kit.until(lambda: len(codes) >= goal)

    async with kit.gateway(kit.service(*(u.endpoint(f"old{i}") for i, u in enumerate(old)))) as gw:
        limits = httpx.Limits(max_connections=8)
        async with httpx.AsyncClient(limits=limits, timeout=30) as http, asyncio.TaskGroup() as tasks:
            for _ in range(8):
                tasks.create_task(client(http, gw.url + "/v1/completions"))
            await more(30)
            for i in range(2):
                serving = [u.endpoint(f"old{n}") for n, u in enumerate(old) if n >= i]
                serving += [u.endpoint(f"new{n}") for n, u in enumerate(new) if n <= i]
                gw.gateway.use(kit.table(kit.service(*serving)))
                await more(30)
                old[i].behave = draining
                await more(30)
                gw.gateway.use(kit.table(kit.service(*serving[1:])))
                await more(30)
            done.set()
    assert set(codes) == {200}
    assert all(u.seen for u in new)
