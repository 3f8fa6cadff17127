"""What the balancer remembers, and that it reaches the wire."""

from contextlib import AsyncExitStack

import httpx
import pytest

from mainsail_gateway.balance import ANSWERING_TOKENS, SLOW_START_FLOOR, SLOW_START_S, burden, share
from mainsail_gateway.fleet import Picked, Pool
from mainsail_gateway.routes import Endpoint

CHAT = "/v1/chat/completions"


def endpoint(key: str) -> Endpoint:
    return Endpoint(key=key, host="127.0.0.1", port=1, pod=key)


def picked(pool: Pool, prompt: int, now: float, avoid: set[str] | None = None) -> Picked:
    found = pool.pick(prompt, [], avoid or set(), now)
    assert found is not None
    return found


def test_the_first_endpoints_start_warm_and_later_ones_slowly():
    pool = Pool()
    pool.update([endpoint("a"), endpoint("b")], 100.0)
    pool.update([endpoint("a"), endpoint("c")], 200.0)
    assert set(pool.loads) == {"a", "c"}
    assert share(pool.loads["a"], 200.0) == 1
    assert share(pool.loads["c"], 200.0) == SLOW_START_FLOOR
    assert share(pool.loads["c"], 200.0 + SLOW_START_S) == 1


def test_load_in_flight_survives_a_new_table_and_ends_with_its_request():
    pool = Pool()
    pool.update([endpoint("a"), endpoint("b")], 0.0)
    first, load, _ = found = picked(pool, 10, 50.0)
    with pool.in_flight(found, []):
        pool.update([endpoint("a"), endpoint("b"), endpoint("c")], 60.0)
        assert pool.loads[first.key].prefill == 10
        assert picked(pool, 1, 100.0, {first.key}).endpoint.key != first.key
    assert (load.prefill, load.requests) == (0, 0)
    assert pool.pick(1, [], {"a", "b", "c"}, 100.0) is None


@pytest.mark.parametrize("prefill", [1, 5000])
def test_a_request_weighs_less_once_it_answers_but_never_nothing(prefill):
    pool = Pool()
    pool.update([endpoint("a")], 0.0)
    load = pool.loads["a"]
    with pool.in_flight(picked(pool, prefill, 0.0), []) as flight:
        assert burden(load, 0.0) == prefill + ANSWERING_TOKENS
        flight.answering()
        flight.answering()
        assert burden(load, 0.0) == ANSWERING_TOKENS
    assert (load.requests, load.prefill, burden(load, 0.0)) == (0, 0, 0)


async def test_one_conversation_stays_and_others_spread(kit):
    ups = [await kit.upstream() for _ in range(4)]
    async with (
        kit.gateway(kit.service(*(up.endpoint(f"p{i}") for i, up in enumerate(ups)))) as gw,
        httpx.AsyncClient(base_url=gw.url) as client,
    ):
        turns = [{"role": "system", "content": "You are of much help. " * 50}]
        for turn in range(8):
            turns.append({"role": "user", "content": f"Question {turn}. " * 40})
            assert (await client.post(CHAT, json={"model": "m", "messages": turns})).status_code == 200
        assert sorted(len(up.seen) for up in ups) == [0, 0, 0, 8]
        for number in range(40):
            await client.post(CHAT, json={"model": "m", "messages": [], "prompt_cache_key": f"session {number % 10}"})
        homes: dict[str, set[int]] = {}
        for i, up in enumerate(ups):
            for seen in up.seen:
                if b"prompt_cache_key" in seen.body:
                    homes.setdefault(seen.body.decode(), set()).add(i)
        assert len(homes) == 10
        assert all(len(home) == 1 for home in homes.values())
        assert len(set.union(*homes.values())) > 1


async def test_short_prompts_go_round(kit):
    ups = [await kit.upstream() for _ in range(3)]
    async with (
        kit.gateway(kit.service(*(up.endpoint(f"p{i}") for i, up in enumerate(ups)))) as gw,
        httpx.AsyncClient(base_url=gw.url) as client,
    ):
        for _ in range(9):
            await client.post(CHAT, json={"model": "m", "messages": [{"role": "user", "content": "hi"}]})
    assert [len(up.seen) for up in ups] == [3, 3, 3]


@pytest.mark.parametrize("named", [{}, {"user": "somebody"}], ids=["unnamed", "one user"])
async def test_short_streams_that_are_alike_spread_over_equal_engines(kit, named):
    """Fifty at once, of 200 tokens and answers of 8, which a cache draws to one engine."""
    ups = [await kit.upstream(kit.hold) for _ in range(2)]
    service = kit.service(*(up.endpoint(f"p{i}") for i, up in enumerate(ups)))
    body = {"model": "m", "stream": True, "max_tokens": 8, **named}
    body["messages"] = [{"role": "user", "content": "Say it again. " * 60}]
    async with (
        kit.gateway(service) as gw,
        httpx.AsyncClient(base_url=gw.url, timeout=None) as client,
        AsyncExitStack() as open,
    ):
        for _ in range(50):
            stream = await open.enter_async_context(client.stream("POST", CHAT, json=body))
            assert await anext(stream.aiter_lines()) == "data: first"
        assert [len(up.seen) for up in ups] == [25, 25]


async def test_an_endpoint_that_leaves_the_table_gets_nothing_more(kit):
    ups = [await kit.upstream() for _ in range(2)]
    ends = [up.endpoint(f"p{i}") for i, up in enumerate(ups)]
    async with kit.gateway(kit.service(*ends)) as gw, httpx.AsyncClient(base_url=gw.url) as client:
        for _ in range(4):
            await client.post(CHAT, json={"model": "m"})
        gw.gateway.use(kit.table(kit.service(ends[1])))
        for _ in range(4):
            await client.post(CHAT, json={"model": "m"})
        assert [len(up.seen) for up in ups] == [2, 6]
        gw.gateway.use(kit.table())
        assert (await client.post(CHAT, json={"model": "m"})).status_code == 404
        assert gw.metric("mainsail:gateway_endpoints", namespace="default", service="m") == 0
