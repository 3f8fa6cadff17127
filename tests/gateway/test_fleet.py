"""What the balancer remembers, and that it reaches the wire."""

import httpx

from mainsail_gateway.balance import ANSWERING_TOKENS, SLOW_START_FLOOR, SLOW_START_S, share
from mainsail_gateway.fleet import Pool, in_flight
from mainsail_gateway.routes import Endpoint

CHAT = "/v1/chat/completions"


def endpoint(key: str) -> Endpoint:
    return Endpoint(key=key, host="127.0.0.1", port=1, pod=key)


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
    first, load, _ = pool.pick(10, [], set(), 50.0)
    with in_flight(load, 10):
        pool.update([endpoint("a"), endpoint("b"), endpoint("c")], 60.0)
        assert pool.loads[first.key].tokens == 10
        assert pool.pick(1, [], {first.key}, 100.0).endpoint.key != first.key
    assert (load.tokens, load.requests) == (0, 0)
    assert pool.pick(1, [], {"a", "b", "c"}, 100.0) is None


def test_a_request_weighs_less_once_it_answers():
    pool = Pool()
    pool.update([endpoint("a")], 0.0)
    load = pool.loads["a"]
    with in_flight(load, 5000) as flight:
        assert (load.requests, load.tokens) == (1, 5000)
        flight.answering()
        flight.answering()
        assert (load.requests, load.tokens) == (1, ANSWERING_TOKENS)
    assert (load.requests, load.tokens) == (0, 0)


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
