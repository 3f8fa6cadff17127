"""A stream that breaks goes on elsewhere: who is asked, with what, how often, and what the client sees."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager

import httpx
import pytest

CHAT = "/v1/chat/completions"
BODY = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": True}
HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
    b"x-mainsail-stream: ids id=c-1 created=5\r\ntransfer-encoding: chunked\r\n\r\n"
)
END = b"0\r\n\r\n"


def piece(kit, notes: bytes, data: bytes) -> bytes:
    return kit.chunk(b":ids %d%b\n%b" % (len(data), notes, data))


def begins(kit, then: bytes = b"", *, cut: bool = True):
    """An engine that delivers two tokens in two pieces, and half of a third."""
    first = HEAD + piece(kit, b" 0=7@3", b"data: one\n\n") + piece(kit, b" 0=8,9", b"data: two\n\n")
    return kit.raw(first + (then or kit.chunk(b":ids 50 0=10\ndata: hal")), cut=cut)


def told(seen) -> tuple[dict, bytes]:
    """What an engine was told in front of the client's body, and that body."""
    size = int(seen.header("x-mainsail-resume"))
    return json.loads(seen.body[:size]), seen.body[size:]


def goes_on(kit):
    rest = piece(kit, b" 0=10.", b"data: three\n\n") + piece(kit, b"", b"data: [DONE]\n\n")

    async def behave(up, seen, reader, writer):
        writer.write(HEAD + rest + END)

    return behave


async def stream(gw, **headers: str) -> str:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    async with httpx.AsyncClient() as client:
        return (await client.post(gw.url + CHAT, json=BODY, headers=named)).text


WHOLE = "data: one\n\ndata: two\n\ndata: three\n\ndata: [DONE]\n\n"


@asynccontextmanager
async def first_alone(kit, behave, *others, **settings):
    """A gateway with one endpoint, whose request is running; the others come, and then the first behaves."""
    pause = asyncio.Event()

    async def paused(up, seen, reader, writer):
        await pause.wait()
        await behave(up, seen, reader, writer)

    first = await kit.upstream(paused)
    async with kit.gateway(kit.service(first.endpoint("first")), **settings) as gw:
        answer = asyncio.create_task(stream(gw))
        await kit.until(lambda: first.seen)
        ends = [up.endpoint(f"other-{n}") for n, up in enumerate(others)]
        gw.gateway.use(kit.table(kit.service(first.endpoint("first"), *ends)))
        pause.set()
        yield gw, answer
        for up in (first, *others):
            up.release.set()


@pytest.mark.parametrize("how", ["cut", "stalled", "handover", "ended early"])
async def test_another_goes_on_from_what_was_delivered(kit, how):
    ends = {
        "cut": (b"", True),
        "stalled": (b"", False),
        "handover": (kit.chunk(b":handover engine_failed\n\n") + END, False),
        "ended early": (END, False),
    }
    then, cut = ends[how]
    second = await kit.upstream(goes_on(kit))
    # Only who is to be taken for stalled is waited for so briefly: a busy machine may look like it.
    soon = {"idle_timeout_s": 0.4} if how == "stalled" else {}
    async with first_alone(kit, begins(kit, then, cut=cut), second, **soon) as (gw, answer):
        assert await answer == WHOLE
    said, body = told(second.seen[0])
    assert said.pop("elapsed_s") >= 0
    assert said == {
        "id": "c-1",
        "created": 5,
        "choices": {"0": {"token_ids": [7, 8, 9], "num_cached_tokens": 3, "finished": False}},
    }
    assert json.loads(body) == BODY
    reason = {"stalled": "stalled", "handover": "handover"}.get(how, "truncated")
    assert gw.metric("mainsail:gateway_failovers_total", namespace="default", service="m", reason=reason) == 1
    assert gw.metric("mainsail:gateway_requests_total", namespace="default", service="m", code="200") == 1


async def test_before_the_first_piece_it_simply_begins_again(kit):
    first = await kit.upstream(kit.raw(HEAD + kit.chunk(b":ids 50 0=1\nhal")))
    second = await kit.upstream(goes_on(kit))
    async with kit.gateway(kit.service(first.endpoint("a"), second.endpoint("b"))) as gw:
        for _ in range(4):
            assert await stream(gw) == "data: three\n\ndata: [DONE]\n\n"
    assert first.seen
    assert all(seen.header("x-mainsail-resume") is None for seen in second.seen)


async def test_an_only_endpoint_is_asked_again(kit):
    async def behave(up, seen, reader, writer):
        again = seen.header("x-mainsail-resume") is not None
        await (goes_on(kit) if again else begins(kit))(up, seen, reader, writer)

    up = await kit.upstream(behave)
    async with kit.gateway(kit.service(up.endpoint())) as gw:
        answer = asyncio.create_task(stream(gw))
        await kit.until(lambda: len(up.seen) == 2)
        up.release.set()
        assert await answer == WHOLE


async def test_who_broke_is_asked_again_when_the_other_breaks_too(kit):
    """Of two replicas one lost a connection in the middle, the other before it answered: neither need be gone."""
    times = 0

    async def twice(up, seen, reader, writer):
        nonlocal times
        times += 1
        await (begins(kit) if times == 1 else goes_on(kit))(up, seen, reader, writer)

    other = await kit.upstream(kit.raw(b"HTTP/1.1 200 OK\r\nconte"))
    async with first_alone(kit, twice, other) as (gw, answer):
        assert await answer == WHOLE
    assert (times, len(other.seen)) == (2, 1)
    assert gw.metric("mainsail:gateway_failovers_total", service="m") == 2


async def test_a_request_that_breaks_engine_after_engine_is_not_let_loose_on_all(kit):
    ups = [await kit.upstream(begins(kit)) for _ in range(8)]
    async with kit.gateway(kit.service(*(up.endpoint(str(n)) for n, up in enumerate(ups)))) as gw:
        text = await stream(gw)
    assert sum(len(up.seen) for up in ups) == 4
    assert text.count("data: one") == 4  # these engines all say that they go on with their own beginning
    assert json.loads(text.split("\n\n")[-2].removeprefix("data: "))["error"]["code"] == "stream_broken"


@pytest.mark.parametrize("status", [200, 400, 429, 500])
async def test_who_cannot_go_on_is_passed_over(kit, status):
    refusal = b"HTTP/1.1 %d X\r\ncontent-length: 2\r\n\r\n{}" % status
    refuses = await kit.upstream(kit.raw(refusal, cut=False))
    async with first_alone(kit, begins(kit), refuses) as (_, answer):
        text = await answer
    assert text.startswith("data: one\n\ndata: two\n\ndata: {")
    assert json.loads(text.split("\n\n")[2].removeprefix("data: "))["error"]["code"] == "stream_broken"


async def test_a_break_after_the_last_event_is_no_break(kit):
    done = HEAD + piece(kit, b" 0=1@0.", b"data: x\n\n") + piece(kit, b"", b"data: [DONE]\n\n")
    up = await kit.upstream(kit.raw(done))
    async with kit.gateway(kit.service(up.endpoint())) as gw:
        assert await stream(gw) == "data: x\n\ndata: [DONE]\n\n"
    assert len(up.seen) == 1


async def test_refused_fail_over_ends_with_an_error(kit):
    ups = [await kit.upstream(kit.raw(kit.sse_head + kit.chunk(b"data: one\n\n"))) for _ in range(2)]
    async with kit.gateway(*[kit.service(*(up.endpoint(str(n)) for n, up in enumerate(ups)))]) as gw:
        text = await stream(gw, x_mainsail_no_failover="1")
    assert sum(len(up.seen) for up in ups) == 1
    assert "stream_broken" in text
    assert all(seen.header("x-mainsail-stream") is None for up in ups for seen in up.seen)


async def test_what_a_client_says_of_it_is_not_passed_on(kit):
    up = await kit.upstream()
    async with kit.gateway(kit.service(up.endpoint())) as gw, httpx.AsyncClient() as client:
        headers = {"x-mainsail-resume": "5", "x-mainsail-stream": "ids"}
        response = await client.post(gw.url + CHAT, json={**BODY, "stream": False}, headers=headers)
    assert response.status_code == 200
    assert up.seen[0].header("x-mainsail-resume") is None
    assert up.seen[0].header("x-mainsail-stream") is None
