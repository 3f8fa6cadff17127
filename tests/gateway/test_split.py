"""Revisions by weight: exact, smooth, sticky."""

import asyncio
from collections import Counter

import httpx
from hypothesis import given
from hypothesis import strategies as st

from mainsail_gateway.fleet import Pool
from mainsail_gateway.routes import Endpoint
from mainsail_gateway.split import Split, Sticky, eligible, placed, position

WEIGHTS = st.lists(st.integers(1, 100), min_size=1, max_size=4).map(
    lambda values: [(f"r{i}", value) for i, value in enumerate(values)]
)


@given(WEIGHTS, st.integers(1, 2000))
def test_every_run_of_requests_is_shared_exactly(weights, count):
    split = Split()
    got = Counter(split.choose(weights) for _ in range(count))
    total = sum(weight for _, weight in weights)
    for name, weight in weights:
        assert abs(got[name] - count * weight / total) < len(weights)


@given(WEIGHTS, st.lists(st.text(max_size=4), max_size=50))
def test_a_session_stays_and_others_make_up_for_it(weights, sessions):
    split = Split()
    for name in sessions:
        if name:
            assert split.choose(weights, Sticky(name)) == placed(weights, position(name))
    got = Counter(split.choose(weights) for _ in range(sum(w for _, w in weights) * 40))
    for name, weight in weights:
        assert abs(got[name] - 40 * weight) <= len(sessions) + 16 * max(w for _, w in weights) + len(weights)


@given(st.integers(0, 100), st.integers(0, 100), st.text(min_size=1))
def test_a_growing_canary_only_takes_sessions(before, after, name):
    before, after = sorted((before, after))
    old = placed([("canary", before), ("stable", 100 - before)], position(name))
    new = placed([("canary", after), ("stable", 100 - after)], position(name))
    assert (old, new) != ("canary", "stable")


def test_sessions_follow_the_weights():
    got = Counter(placed([("canary", 10), ("stable", 90)], position(f"session {i}")) for i in range(10_000))
    assert 850 < got["canary"] < 1150


def test_who_may_get_a_request():
    weights = [("new", 0), ("mid", 10), ("old", 90)]
    assert eligible(weights, {"new": True, "mid": True, "old": True}) == [("mid", 10), ("old", 90)]
    assert eligible(weights, {"new": True, "mid": False, "old": True}) == [("old", 90)]
    assert eligible(weights, {"new": True, "mid": False}) == [("mid", 10)]
    assert eligible(weights, {"new": True}) == []


def _pool(weights, *pods):
    pool = Pool()
    pool.update([Endpoint(name, "h", 1, name, name.rsplit("-", 1)[0]) for name in pods], 0.0, weights)
    return pool


def _picked(pool: Pool, avoid: frozenset[str] | set[str] = frozenset()) -> Endpoint:
    found = pool.pick(1, [], set(avoid), 100.0)
    assert found is not None
    return found.endpoint


def test_ten_thousand_requests_over_unequal_revisions():
    pool = _pool([("c", 7), ("s", 93)], "c-1", "s-1", "s-2", "s-3")
    got = Counter(_picked(pool).revision for _ in range(10_000))
    assert got == {"c": 700, "s": 9300}


def test_weight_zero_serves_only_alone():
    weights = [("c", 0), ("s", 100)]
    pool = _pool(weights, "c-1", "s-1")
    assert {_picked(pool).pod for _ in range(50)} == {"s-1"}
    assert _picked(pool, {"s-1"}).pod == "c-1"
    assert _picked(_pool(weights, "c-1")).pod == "c-1"
    assert _picked(_pool(weights, "unknown-1", "s-1")).pod == "s-1"


async def test_weights_and_sessions_over_sockets(kit):
    ups = {name: await kit.upstream() for name in ("new", "old")}
    ends = [Endpoint(f"{n}:{u.port}", "127.0.0.1", u.port, f"{n}-a-b", n) for n, u in ups.items()]
    service = kit.service(*ends, weights=(("new", 20), ("old", 80)))
    body = {"model": "m", "stream": True}
    async with kit.gateway(service) as gw, httpx.AsyncClient(base_url=gw.url) as client:
        for _ in range(20):
            await asyncio.gather(*(client.post("/v1/completions", json=body) for _ in range(5)))
        assert {n: len(u.seen) for n, u in ups.items()} == {"new": 20, "old": 80}
        labels = {"namespace": "default", "service": "m", "revision": "new", "pod": "new-a-b"}
        assert gw.metric("mainsail:gateway_requests_total", **labels, code="200") == 20
        assert gw.metric("mainsail:gateway_time_to_first_token_seconds_count", **labels) == 20
        for i in range(10):
            before = {n: len(u.seen) for n, u in ups.items()}
            for _ in range(3):
                await client.post("/v1/completions", json=body, headers={"x-user-id": f"u{i}"})
            assert sorted(len(u.seen) - before[n] for n, u in ups.items()) == [0, 3]
