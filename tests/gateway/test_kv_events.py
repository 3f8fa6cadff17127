"""Engines' events about their KV: numbered batches in order, gaps, snapshots; and real engines that are followed."""

from __future__ import annotations

import asyncio
import random
import time
from contextlib import asynccontextmanager
from dataclasses import replace

import httpx
import msgspec
from hypothesis import given
from hypothesis import strategies as st

from mainsail_engine.config import KVEventsConfig
from mainsail_engine.kv.events import AllBlocksCleared, BlockStored, EventBatch, Publisher
from mainsail_gateway import balance, request
from mainsail_gateway.fleet import Fleet
from mainsail_gateway.kv_events import Change, Feed, Listener, apply
from mainsail_gateway.kv_index import SAMPLE, KVIndex
from mainsail_gateway.routes import Endpoint

CHAT = "/v1/chat/completions"


def batch(*events: list) -> bytes:
    return msgspec.msgpack.encode([1.0, list(events), None])


def stored(*blocks: int) -> list:
    return ["BlockStored", [SAMPLE * b for b in blocks], None, [1, 2, 3], 16, None, "GPU"]


def removed(*blocks: int) -> list:
    return ["BlockRemoved", [SAMPLE * b for b in blocks], "GPU"]


def picture(feeds: list[list[Change]]) -> set[int] | None:
    index = KVIndex()
    for change in (change for found in feeds for change in found):
        apply(index, "a", change)
    return index._has.get("a")


def test_what_came_before_the_snapshot_is_dropped_and_what_came_after_it_is_kept():
    feed = Feed()
    found = [feed.live(5, batch(stored(1))), feed.live(6, batch(stored(2))), feed.live(7, batch(removed(9)))]
    assert found == [[], [], []]
    found.append(feed.snapshot(6, batch(["AllBlocksCleared"], stored(1, 2, 9))))
    assert picture(found) == {SAMPLE, 2 * SAMPLE}
    assert feed.next == 8


def test_a_gap_makes_it_unknown_until_the_next_snapshot():
    feed = Feed(next=3)
    found = [[Change("begin", [])], feed.live(3, batch(stored(1))), feed.live(5, batch(stored(5)))]
    assert picture(found) is None
    assert feed.next is None
    found.append(feed.snapshot(4, batch(["AllBlocksCleared"], stored(1, 4))))
    assert picture(found) == {SAMPLE, 4 * SAMPLE, 5 * SAMPLE}


def test_an_engine_that_began_anew_is_empty():
    feed = Feed(next=7)
    found = [[Change("begin", []), Change("stored", [SAMPLE])], feed.live(0, batch(["AllBlocksCleared"]))]
    assert picture(found) == set()
    assert feed.next == 1


def test_blocks_in_host_memory_are_not_on_the_device():
    host = ["BlockStored", [SAMPLE], None, [], 16, None, "CPU"]
    assert Feed(next=1).live(1, batch(host, stored(2))) == [Change("stored", [2 * SAMPLE])]


events = st.lists(st.tuples(st.booleans(), st.integers(1, 9)), min_size=1, max_size=3)


@given(st.lists(events, min_size=1, max_size=30), st.data())
def test_whatever_is_lost_the_picture_is_right_or_missing(history: list, data: st.DataObject):
    """An engine's batches, of which some get lost, and snapshots whenever one is needed (or late)."""
    truth: set[int] = set()
    feed, found = Feed(), []
    for number, batched in enumerate(history):
        told = [["AllBlocksCleared"]] if number == 0 else []
        for comes, block in batched:
            told.append(stored(block) if comes else removed(block))
            truth = truth | {SAMPLE * block} if comes else truth - {SAMPLE * block}
        if data.draw(st.booleans(), label="arrives"):
            found.append(feed.live(number, batch(*told)))
        if feed.next is None and data.draw(st.booleans(), label="snapshot"):
            everything = ["BlockStored", sorted(truth), None, [], 16, None, "GPU"]
            found.append(feed.snapshot(number, batch(["AllBlocksCleared"], everything)))
        if feed.next == number + 1:
            assert picture(found) == truth
    if feed.next is None:
        assert picture(found) is None


# -- real sockets ------------------------------------------------------------------------------------------------------


def tell(publisher: Publisher, first: int, *blocks: int) -> None:
    """One batch for each block; an engine's first one clears all."""
    batches = [[BlockStored([SAMPLE * block], None, [], 16)] for block in blocks]
    for number, told in enumerate(batches, first):
        publisher.publish(EventBatch(1.0, [AllBlocksCleared(), *told] if number == 0 else list(told)))


async def test_an_engine_that_restarts_is_forgotten_and_then_known_again(kit):
    """Under the same address, as a container in its pod; nobody hears the new one's first batches."""
    ports = kit.free_ports()
    service = kit.service(Endpoint("a", "127.0.0.1", 1, "a", kv_events=ports))
    fleet = Fleet()
    fleet.update(kit.table(service), 0.0)
    index, listener = fleet.pools[service.key].kv, Listener(fleet)
    where = [f"tcp://127.0.0.1:{port}" for port in ports]
    config = KVEventsConfig(endpoint=where[0], replay_endpoint=where[1])
    engine = Publisher(config)
    tell(engine, 0, 1, 2, 3, 4)
    following = asyncio.create_task(listener.run())
    try:
        await kit.until(lambda: index.num_blocks("a") == 4)
        tell(engine, 4, 5)
        await kit.until(lambda: index.num_blocks("a") == 5)
        engine.close()
        await kit.until(lambda: "a" not in index.known)
        engine = Publisher(config)
        tell(engine, 0, 11, 12, 13, 14)
        await kit.until(lambda: index.num_blocks("a") == 4)
        tell(engine, 4, 15)  # the number that would have come next from the old one
        await kit.until(lambda: index._has["a"] == {SAMPLE * block for block in (11, 12, 13, 14, 15)})
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        engine.close()
    assert list(index.known) == [], "nobody listens any more"
    counts = {s.labels["event"]: s.value for s in list(listener.collect())[-1].samples}
    assert counts["lost"] == 1
    assert counts["begun"] >= 2


async def test_an_engine_that_does_not_speak_so_is_not_known(kit):
    """Something else listens on those ports: no error, no memory, and the others are known."""
    strange = await asyncio.start_server(lambda reader, writer: writer.write(b"HTTP/1.1 400\r\n\r\n"), "127.0.0.1", 0)
    port = strange.sockets[0].getsockname()[1]
    ports = kit.free_ports()
    live, replay = (f"tcp://127.0.0.1:{port}" for port in ports)
    engine = Publisher(KVEventsConfig(endpoint=live, replay_endpoint=replay))
    tell(engine, 0, 1)
    ends = Endpoint("odd", "127.0.0.1", 1, "a", kv_events=(port, port)), Endpoint("b", "127.0.0.1", 1, "b", "", ports)
    fleet = Fleet()
    fleet.update(kit.table(service := kit.service(*ends)), 0.0)
    following = asyncio.create_task(Listener(fleet).run())
    await kit.until(lambda: fleet.pools[service.key].kv.num_blocks("b") == 1)
    assert list(fleet.pools[service.key].kv.known) == ["b"]
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)
    strange.close()
    engine.close()


# -- real engines ------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def following(kit, *endpoints: Endpoint):
    async with kit.gateway(kit.service(*endpoints, name="smol")) as gw:
        listening = asyncio.create_task(Listener(gw.gateway.fleet).run())
        pool = gw.gateway.fleet.pools["default", "smol"]
        try:
            await kit.until(lambda: set(pool.kv.known) == {e.key for e in endpoints})
            yield gw, pool
        finally:
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)


def talk(seed: int, turns: int) -> dict:
    rng, things = random.Random(seed), ["sea", "sky", "fish", "boat", "wind"]
    roles = [("user", "assistant")[n % 2] for n in range(2 * turns - 1)]
    words = [120 if n == 0 else 30 for n in range(len(roles))]
    messages = [
        {"role": role, "content": " ".join(rng.choices(things, k=count))}
        for role, count in zip(roles, words, strict=True)
    ]
    return {"model": "smol", "messages": messages, "max_tokens": 4, "ignore_eos": True}


async def ask(gw, body: dict) -> dict:
    async with httpx.AsyncClient(timeout=120) as client:
        answer = await client.post(gw.url + CHAT, json=body)
    assert answer.status_code == 200, answer.text
    assert "x-mainsail-blocks" not in answer.headers
    return answer.json()["usage"]


def prefixes(body: dict) -> list[balance.Prefix]:
    parsed = request.parse(msgspec.json.encode(body))
    return balance.prefix_keys(parsed.prompt, None, parsed.anchor)


async def test_the_gateway_knows_what_real_engines_have_cached(kit, small_engines):
    ends = small_engines
    async with following(kit, *ends) as (gw, pool):
        first, second = talk(1, 2), talk(1, 3)
        usage = await ask(gw, first)
        keys = prefixes(second)
        # Blocks come as the prompt is computed, chunk after chunk.
        await kit.until(lambda: max(pool.kv.cached(keys).values(), default=0) >= usage["prompt_tokens"] - 20 * 16)
        cached = pool.kv.cached(keys)
        home = max(cached, key=lambda key: cached[key])
        assert sorted(count > 0 for count in cached.values()) == [False, True]
        assert cached[home] <= usage["prompt_tokens"]
        later = await ask(gw, second)
        really = later["prompt_tokens_details"]["cached_tokens"]
        assert cached[home] <= really <= cached[home] + 20 * 16
        session = pool.sessions.arrive(request.parse(msgspec.json.encode(second)).chain(None), 0.0)
        assert abs(session.tokens - later["prompt_tokens"]) < 200, "sizes are the engine's, not guessed from bytes"

        for seed in range(10, 40):  # other conversations push it out
            await ask(gw, talk(seed, 2))
        await kit.until(lambda: pool.kv.cached(keys)[home] == 0)


async def test_who_comes_later_gets_a_snapshot_and_who_goes_is_forgotten(kit, small_engines):
    ends = small_engines
    async with following(kit, *ends) as (gw, pool):
        await ask(gw, talk(50, 2))
        await kit.until(lambda: any(pool.kv.num_blocks(end.key) for end in ends))
        async with following(kit, *ends) as (late, other):
            await kit.until(
                lambda: [other.kv.num_blocks(e.key) for e in ends] == [pool.kv.num_blocks(e.key) for e in ends]
            )
            late.gateway.use(kit.table(kit.service(ends[0], name="smol")))
            await kit.until(lambda: set(other.kv.known) == {ends[0].key})
        silent = replace(ends[1], key="silent", kv_events=None)
        gw.gateway.use(kit.table(kit.service(silent, name="smol")))
        assert (await ask(gw, talk(51, 2)))["prompt_tokens"] > 0, "it works without"


async def test_who_has_nobody_to_hear_rests():
    """A gateway whose engines tell nothing, or that has none yet, keeps no core busy."""
    listening = asyncio.create_task(Listener(Fleet()).run())
    shares = []
    for _ in range(3):
        began, before = time.monotonic(), time.process_time()
        await asyncio.sleep(0.4)
        shares.append((time.process_time() - before) / (time.monotonic() - began))
    assert min(shares) < 0.5, "processor time, of all threads; a collection of garbage may fall into one of them"
    listening.cancel()
    await asyncio.gather(listening, return_exceptions=True)
