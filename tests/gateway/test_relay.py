"""Endpoints that break in every way, and clients that leave: what the other side is told."""

import asyncio
import json
import time

import httpx
import openai
import pytest

from mainsail_gateway.retry import FLOOR_PER_S, RATIO, RetryBudget

BODY = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
CHAT = "/v1/chat/completions"


def dead(kit, up):
    """An endpoint that refuses connections."""
    up._server.close()
    return up.endpoint("dead")


@pytest.mark.parametrize("how", ["refused", "reset", "garbage", "half a head", "draining"])
async def test_broken_before_the_first_byte_goes_elsewhere(kit, how):
    answers = {
        "reset": b"",
        "garbage": b"SSH-2.0-OpenSSH_9.2\r\n",
        "half a head": b"HTTP/1.1 200 OK\r\ncontent-",
        "draining": b"HTTP/1.1 503 X\r\ncontent-length: 0\r\n\r\n",
    }
    good = await kit.upstream()
    bad = await kit.upstream(kit.raw(answers.get(how, b"")))
    end = dead(kit, bad) if how == "refused" else bad.endpoint("bad")
    async with kit.gateway(kit.service(end, good.endpoint())) as gw, httpx.AsyncClient() as client:
        for _ in range(6):
            assert (await client.post(gw.url + CHAT, json=BODY)).status_code == 200
    assert len(good.seen) == 6
    assert len(bad.seen) < 6  # it is left alone after a while


@pytest.mark.parametrize(("answer", "reason"), [(b"", "reset"), (b"nonsense\r\n\r\n", "garbage")])
async def test_alone_and_broken_is_502(kit, answer, reason):
    up = await kit.upstream(kit.raw(answer))
    async with kit.gateway(kit.service(up.endpoint())) as gw, httpx.AsyncClient() as client:
        response = await client.post(gw.url + CHAT, json=BODY)
    assert response.status_code == 502
    assert response.json()["error"]["code"] == "upstream_failed"
    assert gw.metric("mainsail:gateway_upstream_failures_total", namespace="default", service="m", reason=reason) >= 1


async def test_alone_and_refused_is_503(kit):
    up = await kit.upstream()
    async with kit.gateway(kit.service(dead(kit, up))) as gw, httpx.AsyncClient() as client:
        response = await client.post(gw.url + CHAT, json=BODY)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "no_capacity")
    assert response.headers["retry-after"]


@pytest.mark.parametrize("status", [400, 429, 500])
async def test_an_engines_answer_passes(kit, status):
    body = b'{"error": {"message": "x"}}'
    up = await kit.upstream(kit.raw(b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n" % (status, len(body)) + body))
    other = await kit.upstream(up.behave)
    async with kit.gateway(kit.service(up.endpoint(), other.endpoint())) as gw, httpx.AsyncClient() as client:
        response = await client.post(gw.url + CHAT, json=BODY)
    assert (response.status_code, response.content) == (status, body)
    assert len(up.seen) + len(other.seen) == 1
    assert ("retry-after" in response.headers) == (status == 429)


async def test_the_only_one_draining_passes_its_503(kit):
    up = await kit.upstream(kit.raw(b"HTTP/1.1 503 X\r\nretry-after: 7\r\ncontent-length: 0\r\n\r\n"))
    async with kit.gateway(kit.service(up.endpoint())) as gw, httpx.AsyncClient() as client:
        response = await client.post(gw.url + CHAT, json=BODY)
    assert (response.status_code, response.headers["retry-after"]) == (503, "7")


async def test_an_idle_connection_closed_by_the_engine_is_replaced(kit):
    up = await kit.upstream(kit.answer)
    async with kit.gateway(kit.service(up.endpoint())) as gw, httpx.AsyncClient() as client:
        assert (await client.post(gw.url + CHAT, json=BODY)).status_code == 200
        up.behave = kit.raw(b"")  # the kept connection takes one more request and closes without a byte
        answers = asyncio.create_task(client.post(gw.url + CHAT, json=BODY))
        await kit.until(lambda: len(up.seen) >= 2)
        up.behave = kit.answer
        assert (await answers).status_code in (200, 502)
        assert (await client.post(gw.url + CHAT, json=BODY)).status_code == 200


async def test_broken_between_events_ends_with_an_error_event(kit):
    up = await kit.upstream(kit.raw(kit.sse_head + kit.chunk(b'data: {"choices": []}\n\n')))
    async with (
        kit.gateway(kit.service(up.endpoint())) as gw,
        openai.AsyncOpenAI(base_url=gw.url + "/v1", api_key="x", max_retries=0) as client,
    ):
        stream = await client.chat.completions.create(**BODY, stream=True)
        with pytest.raises(openai.APIError, match="middle of its answer"):
            async for _ in stream:
                pass
    assert gw.metric("mainsail:gateway_requests_total", namespace="default", service="m", code="502") == 1


@pytest.mark.parametrize(
    "data",
    [b"data: {half", b"data: whole\n\ndata: {half"],
)
async def test_broken_elsewhere_cuts_the_client(kit, data):
    up = await kit.upstream(kit.raw(kit.sse_head + kit.chunk(data)))
    async with kit.gateway(kit.service(up.endpoint())) as gw, httpx.AsyncClient() as client:
        with pytest.raises(httpx.RemoteProtocolError):
            await client.post(gw.url + CHAT, json=BODY)


@pytest.mark.parametrize("others", [0, 1])
async def test_half_an_answer_that_is_not_streamed_is_asked_for_again(kit, others):
    half = await kit.upstream(kit.raw(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{"))
    good = [(await kit.upstream()).endpoint("good") for _ in range(others)]
    async with kit.gateway(kit.service(half.endpoint("bad"), *good)) as gw, httpx.AsyncClient() as client:
        for _ in range(4):
            response = await client.post(gw.url + CHAT, json=BODY)
            assert response.status_code == (200 if others else 502), response.text
        refused = await client.post(gw.url + CHAT, json=BODY, headers={"x-mainsail-no-failover": "1"})
    assert half.seen
    assert refused.status_code in (200, 502)  # by where it went: it ran once


async def test_who_refuses_fail_over_runs_once(kit):
    half = await kit.upstream(kit.raw(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{"))
    async with kit.gateway(kit.service(half.endpoint())) as gw, httpx.AsyncClient() as client:
        response = await client.post(gw.url + CHAT, json=BODY, headers={"x-mainsail-no-failover": "1"})
    assert (response.status_code, len(half.seen)) == (502, 1)
    assert half.seen[0].header("x-mainsail-stream") is None


async def test_stalled_stream_ends_with_an_error_event(kit):
    up = await kit.upstream(kit.raw(kit.sse_head + kit.chunk(b"data: 1\n\n"), cut=False))
    async with kit.gateway(kit.service(up.endpoint()), idle_timeout_s=0.1) as gw, httpx.AsyncClient() as client:
        text = (await client.post(gw.url + CHAT, json=BODY)).text
    assert json.loads(text.split("\n\n")[1].removeprefix("data: "))["error"]["code"] == "stream_broken"


async def test_no_answer_is_504(kit):
    up = await kit.upstream(kit.raw(b"", cut=False))
    async with kit.gateway(kit.service(up.endpoint()), response_timeout_s=0.1) as gw, httpx.AsyncClient() as client:
        response = await client.post(gw.url + CHAT, json=BODY)
    assert (response.status_code, response.json()["error"]["code"]) == (504, "upstream_timeout")


async def test_retries_are_a_tenth_where_all_engines_fail(kit):
    """A fleet that breaks every connection gets hardly more requests than clients send."""
    ups = [await kit.upstream(kit.raw(b"")) for _ in range(4)]
    async with kit.gateway(kit.service(*(up.endpoint() for up in ups))) as gw, httpx.AsyncClient() as client:
        began = time.monotonic()
        for _ in range(200):
            assert (await client.post(gw.url + CHAT, json=BODY)).status_code == 502
        allowed = 200 * RATIO + RetryBudget().balance + FLOOR_PER_S * (time.monotonic() - began)
        first = 2 * len(ups)  # until most have failed
        assert sum(len(up.seen) for up in ups) <= 200 + allowed + first + 1


@pytest.mark.parametrize("when", ["before the head", "within the stream"])
async def test_a_client_that_leaves_frees_its_endpoint(kit, when):
    async def silent(up, seen, reader, writer):
        await reader.read(1)
        up.closed_early += 1
        raise ConnectionResetError

    up = await kit.upstream(kit.hold if when == "within the stream" else silent)
    async with kit.gateway(kit.service(up.endpoint())) as gw:
        reader, writer = await asyncio.open_connection("127.0.0.1", gw.port)
        body = json.dumps({**BODY, "stream": True}).encode()
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        if when == "within the stream":
            await reader.readuntil(b"data: first\n\n")
        await kit.until(lambda: len(up.seen) == 1)
        writer.close()
        await kit.until(lambda: up.closed_early == 1)
        load = next(iter(gw.gateway.fleet.pools["default", "m"].loads.values()))
        await kit.until(lambda: (load.requests, load.prefill) == (0, 0) and not gw.gateway.relay.calls)
    assert gw.metric("mainsail:gateway_requests_total", namespace="default", service="m", code="499") == 1


async def test_clients_that_leave_at_once_leave_nothing(kit):
    """On the heels of their request, by a reset or an end, after an answered request or as the first."""
    up = await kit.upstream(kit.hold)
    quick = await kit.upstream()
    async with kit.gateway(kit.service(up.endpoint()), kit.service(quick.endpoint(), name="quick")) as gw:

        def request(model: str) -> bytes:
            body = json.dumps({**BODY, "model": model, "stream": True}).encode()
            return b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body

        for number in range(20):
            reader, writer = await asyncio.open_connection("127.0.0.1", gw.port)
            if number % 2:
                writer.write(request("quick"))
                await reader.readuntil(b"0\r\n\r\n")
            writer.write(request("m"))
            await asyncio.sleep(0.001 * (number % 5))
            writer.transport.abort() if number % 3 else writer.close()
        await kit.until(lambda: not gw.server.server_state.connections and not gw.server.server_state.tasks)
        assert not gw.gateway.relay.calls
        assert gw.gateway.admission.doors["default", "m"].shedder.running == 0
        load = next(iter(gw.gateway.fleet.pools["default", "m"].loads.values()))
        assert (load.requests, load.prefill, load.failures) == (0, 0, 0)


async def test_chunks_pass_at_once_and_a_slow_client_holds_back_the_engine(kit):
    written = 0

    async def flood(up, seen, reader, writer):
        nonlocal written
        writer.write(kit.sse_head)
        while written < 64 * 1024 * 1024:
            writer.write(kit.chunk(b"x" * 65536))
            await writer.drain()
            written += 65536
        writer.write(b"0\r\n\r\n")

    up = await kit.upstream(flood)
    async with kit.gateway(kit.service(up.endpoint()), client_timeout_s=1.0) as gw:
        _, writer = await asyncio.open_connection("127.0.0.1", gw.port)
        body = json.dumps(BODY).encode()
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        await kit.until(lambda: written > 0)
        await kit.until(lambda: not gw.gateway.relay.calls)  # dropped, because it takes nothing
        writer.close()
    assert written < 64 * 1024 * 1024
    assert (
        gw.metric("mainsail:gateway_upstream_failures_total", namespace="default", service="m", reason="client_timeout")
        == 1
    )


async def test_headers_end_at_a_hop(kit):
    up = await kit.upstream(
        kit.raw(b"HTTP/1.1 200 OK\r\nx-e: 1\r\nx-hop: 2\r\nconnection: x-hop\r\ncontent-length: 2\r\n\r\n{}", cut=False)
    )
    headers = {"connection": "x-secret", "x-secret": "1", "te": "trailers", "x-keep": "2", "traceparent": "00-ab-cd-01"}
    async with kit.gateway(kit.service(up.endpoint())) as gw, httpx.AsyncClient() as client:
        response = await client.post(gw.url + CHAT + "?a=b", json=BODY, headers=headers)
    seen = up.seen[0]
    assert seen.head.startswith(b"POST /v1/chat/completions?a=b HTTP/1.1\r\n")
    assert (seen.header("x-keep"), seen.header("traceparent")) == ("2", "00-ab-cd-01")
    assert (seen.header("x-secret"), seen.header("te"), seen.header("connection")) == (None, None, None)
    assert seen.head.lower().count(b"content-length") == 1
    assert response.headers["x-e"] == "1"
    assert "x-hop" not in response.headers


async def test_half_of_an_answer_is_no_whole_one_whatever_else_its_encoding_says(kit):
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: gzip, chunked\r\n\r\n"
    up = await kit.upstream(kit.raw(head + b'5\r\n{"a":\r\n'))
    async with kit.gateway(kit.service(up.endpoint())) as gw, httpx.AsyncClient(base_url=gw.url) as client:
        answer = await client.post("/v1/chat/completions", json={"model": "m"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (502, "upstream_failed")
