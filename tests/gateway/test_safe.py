"""What may go wrong on either side, with real sockets: ambiguous framing, slow ends, broken engines, no API server."""

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import cast

import httpx
import httpx2
import pytest
from tests.gateway.api_server import SERVICES, SLICES, ApiServer, isvc, slices

from mainsail_gateway.routes import Routes
from mainsail_gateway.shed import Policy
from mainsail_gateway.watch import Timing

CHAT = "/v1/chat/completions"
BODY = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
DATA = json.dumps(BODY).encode()
HIDDEN = b"GET /hidden HTTP/1.1\r\nHost: x\r\n\r\n"
LENGTH = b"Content-Length: %d\r\n" % len(DATA)
CHUNKED = b"Transfer-Encoding: chunked\r\n"


def post(head: bytes, body: bytes, end: bytes = b"\r\n") -> bytes:
    return b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n" + head + end + body


def chunks(*parts: bytes, size: bytes = b"%x", more: bytes = b"") -> bytes:
    return b"".join((size % len(part)) + more + b"\r\n" + part + b"\r\n" for part in parts) + b"0\r\n\r\n"


SMUGGLERS = {
    "length and chunks": post(LENGTH + CHUNKED, chunks(DATA) + HIDDEN),
    "chunks and length": post(CHUNKED + b"Content-Length: 4\r\n", chunks(DATA) + HIDDEN),
    "two lengths": post(LENGTH + b"Content-Length: 0\r\n", DATA + HIDDEN),
    "two lengths in one": post(b"Content-Length: %d, 0\r\n" % len(DATA), DATA + HIDDEN),
    "a length in hex": post(b"Content-Length: 0x%x\r\n" % len(DATA), DATA + HIDDEN),
    "a length with a sign": post(b"Content-Length: +%d\r\n" % len(DATA), DATA + HIDDEN),
    "a length that overflows": post(b"Content-Length: 18446744073709551617\r\n", DATA + HIDDEN),
    "folded": post(b"X: a\r\n " + LENGTH + b"Transfer-Encoding:\r\n chunked\r\n", DATA + HIDDEN),
    "a space before the colon": post(LENGTH + b"Transfer-Encoding : chunked\r\n", DATA + HIDDEN),
    "a tab before the colon": post(b"Content-Length\t: 0\r\n" + LENGTH, DATA + HIDDEN),
    "chunked twice": post(CHUNKED + CHUNKED, chunks(DATA) + HIDDEN),
    "chunked, not last": post(b"Transfer-Encoding: chunked, identity\r\n", chunks(DATA) + HIDDEN),
    "almost chunked": post(LENGTH + b"Transfer-Encoding: xchunked\r\n", DATA + HIDDEN),
    "chunked with a tail": post(b"Transfer-Encoding: chunked\x0b\r\n", chunks(DATA) + HIDDEN),
    "bare line feeds": post(LENGTH, DATA + HIDDEN, b"\r\n").replace(b"\r\n", b"\n"),
    "a bare line feed in the head": post(b"X: a\n" + LENGTH, DATA + HIDDEN),
    "a bare return in the head": post(b"X: a\rContent-Length: 0\r\n" + LENGTH, DATA + HIDDEN),
    "a zero in a name": post(b"X\x00Y: a\r\n" + LENGTH, DATA + HIDDEN),
    "a zero in a value": post(b"X: a\x00\r\n" + LENGTH, DATA + HIDDEN),
    "a chunk's size with a sign": post(CHUNKED, chunks(DATA, size=b"+%x") + HIDDEN),
    "a chunk's size with 0x": post(CHUNKED, chunks(DATA, size=b"0x%x") + HIDDEN),
    "a chunk's size that overflows": post(CHUNKED, b"10000000000000001\r\n" + DATA + b"\r\n0\r\n\r\n" + HIDDEN),
    "a chunk longer than said": post(CHUNKED, b"%x\r\n" % (len(DATA) - 1) + DATA + b"\r\n0\r\n\r\n" + HIDDEN),
    "a chunk's extension with a bare line feed": post(CHUNKED, chunks(DATA, more=b";a\n0") + HIDDEN),
    "an extension": post(CHUNKED, chunks(DATA, more=b';a="b"') + HIDDEN),
    "a trailer": post(CHUNKED, chunks(DATA)[:-2] + b"Content-Length: 0\r\n\r\n" + HIDDEN),
    "an upgrade": post(b"Upgrade: h2c\r\nConnection: upgrade\r\n" + LENGTH, DATA + HIDDEN),
    "HTTP/1.0 with chunks": post(CHUNKED, chunks(DATA) + HIDDEN).replace(
        b"HTTP/1.1\r\nHost: x\r\nTr", b"HTTP/1.0\r\nTr", 1
    ),
    "HTTP/0.9": b"GET /hidden\r\n\r\n",
    "a line break in the path": b"POST /v1/x\r\nX: y HTTP/1.1\r\n" + LENGTH + b"\r\n" + DATA + HIDDEN,
    "an absolute path": post(LENGTH, DATA + HIDDEN).replace(b" /v1/", b" http://hidden/v1/", 1),
}


@pytest.mark.parametrize("how", SMUGGLERS)
async def test_nothing_is_smuggled(kit, how):
    """An engine sees the one request, framed anew with one length, or nothing; `/hidden` is the gateway's to refuse."""
    up = await kit.upstream()
    async with kit.gateway(kit.service(up.endpoint())) as gw:
        reader, writer = await asyncio.open_connection("127.0.0.1", gw.port)
        writer.write(SMUGGLERS[how])
        with contextlib.suppress(TimeoutError, ConnectionError):
            async with asyncio.timeout(0.2):
                while b"/hidden" not in (said := await reader.read(65536)) and said:
                    pass
        writer.close()
        await kit.until(lambda: not gw.server.server_state.connections and not gw.gateway.relay.calls)
        async with httpx.AsyncClient() as client:
            assert (await client.post(gw.url + CHAT, json=BODY)).status_code == 200
        assert gw.metric("mainsail:gateway_requests_total", code="500") == 0
    *found, last = up.seen
    assert json.loads(last.body) == BODY
    assert len(found) <= 1
    for seen in found:
        assert seen.body == DATA
        assert seen.head.startswith((b"POST /v1/completions HTTP/1.1\r\n", b"POST /v1/x HTTP/1.1\r\n"))
        assert seen.head.lower().count(b"content-length") == 1
        assert b"transfer-encoding" not in seen.head.lower()
        assert b"hidden" not in seen.head


async def test_a_body_that_does_not_come_is_given_up(kit):
    up = await kit.upstream()
    async with kit.gateway(kit.service(up.endpoint()), body_timeout_s=0.2) as gw:
        reader, writer = await asyncio.open_connection("127.0.0.1", gw.port)
        writer.write(post(LENGTH, DATA[:-1]))
        assert (await reader.readuntil(b"\r\n")).split(b" ")[1] == b"408"
        writer.close()
    assert not up.seen


async def test_a_client_that_vanishes_is_noticed_by_the_kernel(kit):
    """No packet can be lost on loopback, so what the kernel was told is looked at."""
    async with kit.gateway(kit.service(), client_timeout_s=30.0) as gw:
        _, writer = await asyncio.open_connection("127.0.0.1", gw.port)
        await kit.until(lambda: gw.server.server_state.connections)
        (connection,) = gw.server.server_state.connections
        sock = connection.transport.get_extra_info("socket")
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        names = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT, socket.TCP_USER_TIMEOUT)
        assert [sock.getsockopt(socket.IPPROTO_TCP, name) for name in names] == [10, 10, 3, 40_000]
        writer.close()


async def test_an_engine_that_vanishes_is_noticed_by_the_kernel(kit):
    """Whether it was silent or had just been sent a request."""
    up = await kit.upstream()
    async with kit.gateway(kit.service(up.endpoint())) as gw, httpx.AsyncClient() as client:
        assert (await client.post(gw.url + CHAT, json=BODY)).status_code == 200
        (connection,) = gw.gateway.connections._open
        sock = connection._transport.get_extra_info("socket")
        names = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT, socket.TCP_USER_TIMEOUT)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert [sock.getsockopt(socket.IPPROTO_TCP, name) for name in names] == [8, 4, 3, 20_000]


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="makes a network namespace")
def test_an_engine_that_vanishes_costs_one_request_twenty_seconds():
    """And no answer: it is asked of another."""
    command = ["unshare", "--net", sys.executable, "-m", "tests.gateway.vanishing"]
    done = subprocess.run(command, check=True, capture_output=True, timeout=120, cwd=Path(__file__).parents[2])
    took = json.loads(done.stdout)
    print(took)
    assert max(took) < 60, "not the time that an answer may take"


MIDDLES = {
    "no size of a chunk": b"zz\r\n",
    "a size that overflows": b"fffffffffffffffff\r\nx",
    "half a chunk": b"40\r\ndata: ha",
    "a chunk without its end": b"5\r\ndata:XX",
    "another answer": b"HTTP/1.1 200 OK\r\n\r\n",
    "nothing": b"",
}


@pytest.mark.parametrize("silent", [False, True])
@pytest.mark.parametrize("how", MIDDLES)
async def test_an_engine_that_breaks_in_the_middle_is_said_or_cut(kit, how, silent):
    """No half event is passed for a whole one; the next request is served."""
    up = await kit.upstream(kit.raw(kit.sse_head + kit.chunk(b"data: one\n\n") + MIDDLES[how], cut=not silent))
    async with kit.gateway(kit.service(up.endpoint()), idle_timeout_s=0.2) as gw, httpx.AsyncClient() as client:
        text = b""
        with contextlib.suppress(httpx.RemoteProtocolError):
            async with client.stream("POST", gw.url + CHAT, json={**BODY, "stream": True}) as answer:
                async for part in answer.aiter_raw():
                    text += part
        if text.endswith(b"\n\n"):
            assert json.loads(text.split(b"\n\n")[-2].removeprefix(b"data: "))["error"]["code"] == "stream_broken"
        await kit.until(lambda: not gw.gateway.relay.calls)
        up.release.set()
        up.behave = kit.answer
        assert (await client.post(gw.url + CHAT, json=BODY)).status_code == 200


HEADS = {
    "an endless head": b"HTTP/1.1 200 OK\r\nx: " + b"a" * 200_000,
    "two lengths": b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\n{}",
    "length and chunks": b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n",
    "a line break in a header": b"HTTP/1.1 200 OK\r\nx: a\rset-cookie: b\r\ncontent-length: 2\r\n\r\n{}",
    "no status": b"HTTP/1.1 OK\r\n\r\n",
    "TLS": b"\x15\x03\x01\x00\x02\x02\x50",
}


@pytest.mark.parametrize("how", HEADS)
async def test_an_engine_with_an_odd_head_is_no_answer(kit, how):
    up = await kit.upstream(kit.raw(HEADS[how]))
    async with kit.gateway(kit.service(up.endpoint())) as gw, httpx.AsyncClient() as client:
        answer = await client.post(gw.url + CHAT, json=BODY)
        assert (answer.status_code, answer.json()["error"]["code"]) == (502, "upstream_failed")
        assert "set-cookie" not in answer.headers


async def test_more_than_was_asked_for_is_in_nobodys_answer(kit):
    """Bytes behind an answer would be the head of the next one on that connection."""
    two = b'HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}HTTP/1.1 200 OK\r\ncontent-length: 8\r\n\r\n"hidden"'
    up = await kit.upstream(kit.raw(two, cut=False))
    up.release.set()
    async with kit.gateway(kit.service(up.endpoint())) as gw, httpx.AsyncClient() as client:
        for _ in range(4):
            answer = await client.post(gw.url + CHAT, json=BODY)
            assert answer.status_code in (200, 502)
            assert "hidden" not in answer.text
    assert up.connections == len(up.seen)


async def test_slow_clients_and_slow_engines_bound_nothing_else(kit):
    """Fifty clients that take nothing from engines that flood them, fifty engines that say nothing, and one request."""

    async def flood(up, seen, reader, writer):
        writer.write(kit.sse_head)
        while True:
            writer.write(kit.chunk(b"data: %b\n\n" % (b"x" * 65536)))
            await writer.drain()

    flooding, silent, good = (
        await kit.upstream(flood),
        await kit.upstream(kit.raw(b"", cut=False)),
        await kit.upstream(),
    )
    many = Policy(max_running=1000)
    services = [kit.service(up.endpoint(), name=name, served_names=(name,), policy=many)
                for name, up in (("flood", flooding), ("silent", silent), ("m", good))]  # fmt: skip
    async with kit.gateway(*services) as gw, httpx.AsyncClient() as client:
        for door in gw.gateway.admission.doors.values():
            door.shedder.gradient.limit = 1000
        writers = []
        for name in ("flood", "silent"):
            body = json.dumps({**BODY, "model": name, "stream": True}).encode()
            for _ in range(50):
                _, writer = await asyncio.open_connection("127.0.0.1", gw.port)
                cast(asyncio.Transport, writer.transport).pause_reading()
                writer.write(post(b"Content-Length: %d\r\n" % len(body), body))
                writers.append(writer)
        await kit.until(lambda: len(gw.gateway.relay.calls) == 100 and len(silent.seen) == 50)
        for _ in range(20):
            assert (await client.post(gw.url + CHAT, json=BODY, timeout=60)).status_code == 200
        for writer in writers:
            writer.transport.abort()
        await kit.until(lambda: not gw.gateway.relay.calls)
        silent.release.set()


async def test_ten_minutes_without_an_api_server(kit):
    """Five hundred times as fast as the gateway's own times: it serves by what it knows, also when an engine fails, and
    knows the rest within moments of the API server's return."""
    speed = 500
    timing = Timing(relist_s=300 / speed, silence_s=90 / speed, backoff_s=(0.2 / speed, 15 / speed))
    up, other, late = await kit.upstream(), await kit.upstream(), await kit.upstream()
    api = ApiServer()
    api.put(SERVICES, isvc("m"))
    api.put(SLICES, {**slices("m", "127.0.0.1", port=up.port)})
    api.put(SLICES, _renamed(slices("m", "127.0.0.1", port=other.port), "m-2"))
    await api.start()
    async with (
        kit.gateway() as gw,
        httpx.AsyncClient(timeout=60) as client,
        httpx2.AsyncClient(base_url=f"http://127.0.0.1:{api.port}") as kubernetes,
    ):
        routes = Routes(kubernetes, [], gw.gateway.use, timing=timing)
        mirror = asyncio.create_task(routes.run())
        await kit.until(
            lambda: len(gw.gateway.table.models) == 1 and len(gw.gateway.fleet.pools["default", "m"].loads) == 2
        )
        await api.away()
        loop = asyncio.get_running_loop()
        back = loop.time() + 600 / speed
        served = 0
        up.behave = kit.raw(b"")  # an engine dies meanwhile
        lost = (*routes.services, *routes.slices)
        while loop.time() < back or served <= 20 or min(reflector.failures for reflector in lost) <= 10:
            assert (await client.post(gw.url + CHAT, json=BODY)).status_code == 200
            served += 1
        assert gw.gateway.health.ready(gw.gateway.health.beat)[0], "it is not taken out of service for that"
        api.put(SERVICES, isvc("new"), silently=True)
        api.put(SLICES, slices("new", "127.0.0.1", port=late.port), silently=True)
        api.delete(SLICES, "m-1", silently=True)
        await api.start()
        await kit.until(lambda: "new" in gw.gateway.table.models)
        await kit.until(lambda: len(gw.gateway.fleet.pools["default", "m"].loads) == 1)
        assert (await client.post(gw.url + CHAT, json={**BODY, "model": "new"})).status_code == 200
        mirror.cancel()
        await asyncio.gather(mirror, return_exceptions=True)
    await api.away()


def _renamed(item, name):
    return {**item, "metadata": {**item["metadata"], "name": name}}
