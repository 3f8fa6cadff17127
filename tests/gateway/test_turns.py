"""Turns that are held at the gateway, over real sockets."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import replace

import httpx

from mainsail_gateway.shed import Policy
from mainsail_gateway.split import SOFT_TURNS

CHAT = "/v1/chat/completions"
LONG = "tell me more about it, please. " * 60  # some 480 tokens


def body(name: str, turns: int = 1, **more) -> dict:
    talk = [{"role": ("user", "assistant")[n % 2], "content": f"{name} {n}: {LONG}"} for n in range(2 * turns - 1)]
    return {"model": "m", "messages": talk, "stream": True, **more}


def full(gw, kit, *, kv_tokens: int = 2000, resident: float = 1.0) -> None:
    """Every engine says that its pool is full, and that it has enough to do."""
    pool = gw.gateway.fleet.pools["default", "m"]
    for key in pool.loads:
        pool.observe(key, running=2, waiting=2, kv_usage=resident, now=time.monotonic(), kv_tokens=kv_tokens)


def room(gw) -> None:
    pool = gw.gateway.fleet.pools["default", "m"]
    for key in pool.loads:
        pool.observe(key, running=0, waiting=0, kv_usage=0.0, now=time.monotonic(), kv_tokens=2000)


async def post(gw, what: dict, **options) -> httpx.Response:
    async with httpx.AsyncClient(timeout=20) as client:
        return await client.post(gw.url + CHAT, json=what, **options)


async def test_a_turn_is_held_until_there_is_room(kit):
    up = await kit.upstream()
    async with kit.gateway(kit.service(up.endpoint())) as gw:
        full(gw, kit)
        held = asyncio.create_task(post(gw, body("x")))
        await kit.until(lambda: gw.metric("mainsail:gateway_held_sessions", service="m") == 1)
        assert gw.metric("mainsail:gateway_sessions_kv_tokens", service="m", state="held") > 400
        assert gw.metric("mainsail:gateway_queued_requests", service="m") == 0, "it takes no place of others"
        short = await post(gw, {"model": "m", "messages": [{"role": "user", "content": "hi"}]})
        assert short.status_code == 200, "a request without a conversation's KV passes"
        assert len(up.seen) == 1
        room(gw)
        answer = await held
        assert answer.status_code == 200
        assert answer.text.endswith("data: [DONE]\n\n")
        assert gw.metric("mainsail:gateway_held_sessions", service="m") == 0


async def test_paused_conversations_go_before_new_ones(kit):
    up = await kit.upstream()
    async with kit.gateway(kit.service(up.endpoint())) as gw:
        room(gw)
        assert (await post(gw, body("old"))).status_code == 200
        pool = gw.gateway.fleet.pools["default", "m"]
        pool.sessions.advance(pool.loads, time.monotonic() + 1000)
        full(gw, kit)
        new = asyncio.create_task(post(gw, body("new")))
        await kit.until(lambda: len(pool.sessions.held) == 1)
        old = asyncio.create_task(post(gw, body("old", turns=2)))
        await kit.until(lambda: len(pool.sessions.held) == 2)
        room(gw)
        await asyncio.gather(old, new)
        first = [json.loads(seen.body)["messages"][0]["content"][:3] for seen in up.seen[1:]]
        assert first == ["old", "new"]


async def test_a_client_that_leaves_is_forgotten(kit):
    up = await kit.upstream()
    async with kit.gateway(kit.service(up.endpoint())) as gw:
        full(gw, kit)
        pool = gw.gateway.fleet.pools["default", "m"]
        held = asyncio.create_task(post(gw, body("x")))
        await kit.until(lambda: len(pool.sessions.held) == 1)
        held.cancel()
        await kit.until(lambda: not pool.sessions.held)
        room(gw)
        assert (await post(gw, body("y"))).status_code == 200
        assert len(up.seen) == 1


async def test_a_timeout_that_ends_while_it_is_held_is_a_429(kit):
    up = await kit.upstream()
    async with kit.gateway(kit.service(up.endpoint())) as gw:
        full(gw, kit)
        refused = await post(gw, body("x") | {"stream": False}, headers={"x-request-timeout": "0.3"})
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "deadline_exceeded"
        assert int(refused.headers["retry-after"]) >= 1
        assert not up.seen


async def test_no_more_are_held_than_may_wait(kit):
    up = await kit.upstream()
    async with kit.gateway(kit.service(up.endpoint(), policy=Policy(max_queued_requests=2))) as gw:
        full(gw, kit)
        pool = gw.gateway.fleet.pools["default", "m"]
        held = [asyncio.create_task(post(gw, body(name) | {"stream": False})) for name in "xy"]
        await kit.until(lambda: len(pool.sessions.held) == 2)
        late = await post(gw, body("z") | {"stream": False})
        assert (late.status_code, late.json()["error"]["code"]) == (429, "overloaded")
        room(gw)
        assert [answer.status_code for answer in await asyncio.gather(*held)] == [200, 200]


async def test_a_live_conversation_goes_on_where_it_is(kit):
    first, second = await kit.upstream(), await kit.upstream()
    async with kit.gateway(kit.service(first.endpoint("1"), second.endpoint("2"))) as gw:
        room(gw)
        await post(gw, body("x"))
        full(gw, kit, kv_tokens=200_000, resident=0.96)  # for others; its own growth is no reason to pause it
        for turns in (2, 3, 4):
            assert (await post(gw, body("x", turns))).status_code == 200
        assert sorted((len(first.seen), len(second.seen))) == [0, 4]


async def test_the_endpoints_may_all_go_while_turns_are_held(kit):
    up = await kit.upstream()
    async with kit.gateway(kit.service(up.endpoint())) as gw:
        full(gw, kit)
        held = asyncio.create_task(post(gw, body("x") | {"stream": False}))
        await kit.until(lambda: len(gw.gateway.fleet.pools["default", "m"].sessions.held) == 1)
        gw.gateway.use(kit.table(kit.service()))
        assert (await held).status_code == 503


async def test_an_anonymous_conversation_stays_with_its_revision(kit):
    old, new = await kit.upstream(), await kit.upstream()

    ends = [replace(up.endpoint(pod), revision=pod[0]) for up, pod in ((old, "o-1"), (new, "n-1"))]
    weighted = kit.service(*ends, weights=(("n", 50), ("o", 50)))
    async with kit.gateway(weighted) as gw:
        for name in "abcdef":
            before = len(old.seen), len(new.seen)
            for turns in range(2, 8):
                assert (await post(gw, body(name, turns))).status_code == 200
            assert sorted((len(old.seen) - before[0], len(new.seen) - before[1])) == [0, 6]
    before = len(old.seen)
    async with kit.gateway(weighted) as gw:
        for _ in range(40):
            await post(gw, body("the same for everybody"))
    assert abs(len(old.seen) - before - 20) <= SOFT_TURNS + 1, "equal first turns are split"


async def test_who_leaves_at_the_moment_of_being_let_in_keeps_no_room(kit):
    """Its turn had been given its room, and nobody was left to give it back."""
    up = await kit.upstream()
    async with kit.gateway(kit.service(up.endpoint())) as gw:
        pool, key = gw.gateway.fleet.pools["default", "m"], ("default", "m")
        full(gw, kit)
        never = asyncio.Event()
        scope = {"type": "http", "method": "POST", "path": CHAT, "raw_path": CHAT.encode(), "query_string": b"",
                 "headers": []}  # fmt: skip

        async def picked() -> None:
            async with gw.gateway.picked(scope, json.dumps(body("x")).encode(), never.wait, ()):
                pass

        turn = asyncio.create_task(picked())
        await kit.until(lambda: len(pool.sessions.held) == 1)
        room(gw)
        gw.gateway.turns.of(key).tick(time.monotonic() + 1)
        assert not pool.sessions.held
        turn.cancel()
        await asyncio.gather(turn, return_exceptions=True)
        pool.sessions.advance(pool.loads, time.monotonic() + 1000)
        assert pool.sessions.kv_tokens()["live"] == 0
