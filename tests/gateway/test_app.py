"""The gateway as a client sees it: real sockets, real clients, engines on loopback."""

import asyncio
import json
import os
from typing import Any

import httpx
import openai
import pytest

from mainsail_gateway import server

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # or it asks the network when it is imported
import litellm as _litellm

litellm: Any = _litellm
BODY: Any = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
CHAT = "/v1/chat/completions"


async def test_openai_client_streams_and_not(kit):
    up = await kit.upstream()
    async with (
        kit.gateway(kit.service(up.endpoint())) as gw,
        openai.AsyncOpenAI(base_url=gw.url + "/v1", api_key="x", max_retries=0) as client,
    ):
        whole = await client.chat.completions.create(**BODY)
        assert whole.choices[0].message.content == "Hello world"
        stream = await client.chat.completions.create(**BODY, stream=True)
        assert [e.choices[0].delta.content async for e in stream] == ["Hello", " world"]
        assert [m.id for m in (await client.models.list()).data] == ["m"]
    assert up.connections == 1  # kept alive, used twice
    assert json.loads(up.seen[0].body) == BODY
    assert gw.metric("mainsail:gateway_requests_total", namespace="default", service="m", code="200") == 2
    assert gw.metric("mainsail:gateway_time_to_first_token_seconds_count", namespace="default", service="m") == 1


async def test_litellm_and_curl_unchanged(kit):
    up = await kit.upstream()
    async with kit.gateway(kit.service(up.endpoint())) as gw:
        ask = {"model": "openai/m", "messages": BODY["messages"], "api_base": gw.url + "/v1", "api_key": "x"}
        whole = await litellm.acompletion(**ask, num_retries=0)
        assert whole.choices[0].message.content == "Hello world"
        chunks = [chunk async for chunk in await litellm.acompletion(**ask, num_retries=0, stream=True)]
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Hello world"
        with pytest.raises(litellm.NotFoundError):
            await litellm.acompletion(**{**ask, "model": "openai/nobody"}, num_retries=0)
        curl = await asyncio.create_subprocess_exec(
            "curl", "-sSN", "--fail-with-body", gw.url + CHAT, "-H", "Content-Type: application/json",
            "-d", json.dumps({**BODY, "stream": True}), stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        said, _ = await curl.communicate()
        assert (curl.returncode, said.count(b"data: ")) == (0, 3)


async def test_models_of_all_services(kit):
    one = kit.service(name="a", served_names=("a", "alias"), max_model_len=2048)
    async with kit.gateway(one, kit.service(name="b")) as gw, httpx.AsyncClient(base_url=gw.url) as client:
        listed = (await client.get("/v1/models")).json()
        assert listed["object"] == "list"
        assert listed["data"][0] == {
            "id": "a", "object": "model", "created": 1700000000, "owned_by": "mainsail", "max_model_len": 2048
        }  # fmt: skip
        assert [m["id"] for m in listed["data"]] == ["a", "alias", "b"]
        assert (await client.get("/v1/models/b")).json()["id"] == "b"
        assert (await client.get("/v1/models/c")).status_code == 404


@pytest.mark.parametrize(
    ("content", "status", "param", "code"),
    [
        (b"", 400, None, "invalid_value"),
        (b"{", 400, None, "invalid_value"),
        (b"[1]", 400, None, "invalid_value"),
        (b"[" * 200_000, 400, None, "invalid_value"),
        (b'{"model": "\xff"}', 400, None, "invalid_value"),
        (b"{}", 400, "model", "missing_required_parameter"),
        (b'{"model": null}', 400, "model", "missing_required_parameter"),
        (b'{"model": 7}', 400, "model", "invalid_type"),
        (b'{"model": ""}', 400, "model", "invalid_type"),
        (b'{"model": "nope"}', 404, "model", "model_not_found"),
        (b'{"model": "m"}', 503, "model", "no_capacity"),
        (b"x" * 2000_000, 413, None, "request_too_large"),
    ],
)
async def test_refusals(kit, content, status, param, code):
    async with (
        kit.gateway(kit.service(), max_body_bytes=1_000_000) as gw,
        httpx.AsyncClient(base_url=gw.url) as client,
    ):
        response = await client.post(CHAT, content=content)
        error = response.json()["error"]
        assert (response.status_code, error["param"], error["code"]) == (status, param, code)
        assert set(error) == {"message", "type", "param", "code"}
        assert ("retry-after" in response.headers) == (status == 503)
        assert (await client.get("/v1/models")).status_code == 200


async def test_chunked_body_over_the_limit(kit):
    async def parts():
        for _ in range(64):
            yield b"x" * 65536

    async with kit.gateway(kit.service(), max_body_bytes=100_000) as gw, httpx.AsyncClient() as client:
        assert (await client.post(gw.url + CHAT, content=parts())).status_code == 413


async def test_ten_megabytes_pass_unchanged(kit):
    up = await kit.upstream()
    async with kit.gateway(kit.service(up.endpoint())) as gw, httpx.AsyncClient(timeout=60) as client:
        body = json.dumps({"model": "m", "prompt": "x" * (10 * 1024 * 1024 - 100)}).encode()
        assert (await client.post(gw.url + "/v1/completions", content=body)).status_code == 200
        assert up.seen[0].body == body


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", CHAT, 405), ("POST", "/metrics", 404), ("POST", "/v1/%2e%2e/metrics", 404), ("POST", "/v1//x", 404),
     ("POST", "/v1/load_lora_adapter", 404), ("POST", "/v1/unload_lora_adapter", 404)],
)  # fmt: skip
async def test_paths(kit, method, path, status):
    up = await kit.upstream()
    async with kit.gateway(kit.service(up.endpoint())) as gw, httpx.AsyncClient() as client:
        body = b'{"model": "m", "lora_name": "x", "lora_path": "/x"}' if method == "POST" else None
        response = await client.request(method, gw.url + path, content=body)
        assert response.status_code == status
        assert response.json()["error"]["message"]
        assert not up.seen


async def _raw(port: int, data: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    try:
        async with asyncio.timeout(120):
            return await reader.read()
    finally:
        writer.close()


SMUGGLED = json.dumps(BODY).encode()


@pytest.mark.parametrize(
    "head",
    [
        b"Content-Length: %d\r\nTransfer-Encoding: chunked\r\n",
        b"Content-Length: %d\r\nContent-Length: 3\r\n",
        b"Content-Length: %d\r\nTransfer-Encoding : chunked\r\n",
        b"Content-Length: %d\r\nX: a\rb\r\n",
        b"Content-Length: +%d\r\n",
    ],
)
async def test_ambiguous_framing_is_refused(kit, head):
    up = await kit.upstream()
    async with kit.gateway(kit.service(up.endpoint())) as gw:
        data = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n" + head % len(SMUGGLED) + b"\r\n" + SMUGGLED
        assert (await _raw(gw.port, data)).startswith(b"HTTP/1.1 400 ")
        assert not up.seen


async def test_path_climbing_is_refused(kit):
    up = await kit.upstream()
    async with kit.gateway(kit.service(up.endpoint())) as gw:
        data = b"POST /v1/../metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}"
        assert (await _raw(gw.port, data)).startswith(b"HTTP/1.1 404 ")
        assert not up.seen


async def test_endless_head_is_refused(kit):
    async with kit.gateway(kit.service()) as gw:
        _, writer = await asyncio.open_connection("127.0.0.1", gw.port)
        writer.write(b"GET /v1/models HTTP/1.1\r\nX: ")
        sent = 0
        with pytest.raises(ConnectionError):  # noqa: PT012
            while sent < 100_000_000:
                writer.write(b"a" * 65536)
                await writer.drain()
                sent += 65536
        assert sent < 100_000_000


async def test_large_head_is_refused(kit):
    async with kit.gateway(kit.service(), max_header_bytes=1000) as gw, httpx.AsyncClient() as client:
        response = await client.post(gw.url + CHAT, content=b"{}", headers={"x": "a" * 1000})
        assert (response.status_code, response.json()["error"]["code"]) == (431, "headers_too_large")


async def test_slow_head_is_closed(kit):
    async with kit.gateway(kit.service(), head_timeout_s=0.1) as gw:
        assert await _raw(gw.port, b"GET /v1/mod") == b""


async def test_drain_finishes_streams_and_closes_keep_alive(kit):
    up = await kit.upstream(kit.hold)
    async with kit.gateway(kit.service(up.endpoint()), drain_delay_s=3.0) as gw, httpx.AsyncClient() as client:
        async with client.stream("POST", gw.url + CHAT, json={**BODY, "stream": True}) as stream:
            lines = stream.aiter_lines()
            assert await anext(lines) == "data: first"
            gw.server.handle_exit(15, None)
            assert not gw.gateway.health.ready(0)[0]
            during = await client.get(gw.url + "/v1/models")
            assert (during.status_code, during.headers["connection"]) == (200, "close")
            await kit.until(lambda: not gw.server.servers[0].is_serving())
            up.release.set()
            assert [line async for line in lines if line] == ["data: [DONE]"]
        await gw.task


async def test_a_drain_closes_no_connection_whose_client_was_answered_just_now(kit, monkeypatch):
    async with kit.gateway(kit.service()) as gw, httpx.AsyncClient(base_url=gw.url) as client:
        monkeypatch.setattr(server, "SETTLED_S", 600.0)
        assert gw.server._are_settled(), "there is no client"
        assert (await client.get("/v1/models")).status_code == 200
        assert not gw.server._are_settled()
        monkeypatch.setattr(server, "SETTLED_S", -1.0)  # not 0: uvloop's clock and its timers differ by a millisecond
        assert gw.server._are_settled()
