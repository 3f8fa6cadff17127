"""Counts of pods: what is observed, and when it is forgotten."""

import asyncio

import httpx
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram

from mainsail_gateway.pod_metrics import LINGER_S, Buckets, PodsCollector

BOUNDS = (0.1, 1.0, 10.0)
KEY = ("ns", "svc", "rev", "pod")


@given(st.lists(st.floats(0, 20) | st.sampled_from(BOUNDS), max_size=50))
def test_buckets_are_prometheus_own(values):
    mine, registry = Buckets(BOUNDS), CollectorRegistry()
    theirs = Histogram("h", "h", buckets=BOUNDS, registry=registry)
    for value in values:
        mine.observe(value)
        theirs.observe(value)
    for bound, count in mine.cumulative():
        assert registry.get_sample_value("h_bucket", {"le": bound}) == count
    assert registry.get_sample_value("h_sum") == mine.sum


def test_a_stream_is_one_first_token_and_its_gaps():
    pod = PodsCollector("x_").of(KEY)
    stream = pod.stream(10.0)
    for now in (10.3, 10.4, 10.6):
        stream.arrived(now)
    assert sum(pod.first_token.counts) == 1
    assert abs(pod.first_token.sum - 0.3) < 1e-9
    assert sum(pod.inter_token.counts) == 2
    assert abs(pod.inter_token.sum - 0.3) < 1e-9


def test_a_pod_that_went_is_forgotten_after_a_while():
    registry = CollectorRegistry()
    pods = PodsCollector("x_")
    registry.register(pods)

    def value() -> float | None:
        names = dict(zip(("namespace", "service", "revision", "pod"), KEY, strict=True))
        return registry.get_sample_value("x_requests_total", {**names, "code": "200"})

    pods.of(KEY).count(200)
    service = {("ns", "svc")}
    pods.retain({KEY}, service, 0.0)
    pods.retain(set(), service, 1.0)
    pods.retain(set(), service, LINGER_S)
    assert value() == 1
    pods.retain({KEY}, service, LINGER_S)  # it is back
    pods.retain(set(), service, 2 * LINGER_S)
    assert value() == 1
    pods.retain(set(), service, 3 * LINGER_S)
    assert value() is None
    pods.of(KEY).count(200)
    pods.retain({KEY}, set(), 0.0)  # with its service, at once
    assert value() is None


async def test_the_gaps_of_a_stream_are_observed(kit):
    """Each event is sent a moment after the one before it has reached the client, so none can arrive together."""
    arrived = asyncio.Event()

    async def paced(up, seen, reader, writer):
        writer.write(kit.sse_head)
        for i in range(4):
            writer.write(kit.chunk(b"data: %d\n\n" % i))
            await arrived.wait()
            arrived.clear()
            await asyncio.sleep(0.03)
        writer.write(b"0\r\n\r\n")

    up = await kit.upstream(paced)
    async with kit.gateway(kit.service(up.endpoint("pod"))) as gw, httpx.AsyncClient(timeout=30) as client:
        ask = {"model": "m", "stream": True}
        async with client.stream("POST", gw.url + "/v1/completions", json=ask) as answer:
            async for line in answer.aiter_lines():
                if line:
                    arrived.set()
        assert gw.metric("mainsail:gateway_time_to_first_token_seconds_count", pod="pod") == 1
        assert gw.metric("mainsail:gateway_inter_token_seconds_count", pod="pod") == 3
        assert gw.metric("mainsail:gateway_inter_token_seconds_sum", pod="pod") > 0.05


async def test_a_failure_that_a_retry_hides_is_counted_at_its_pod(kit):
    bad, good = await kit.upstream(kit.raw(b"")), await kit.upstream()
    service = kit.service(bad.endpoint("bad"), good.endpoint("good"))
    async with kit.gateway(service) as gw, httpx.AsyncClient() as client:
        for _ in range(4):
            answer = await client.post(gw.url + "/v1/completions", json={"model": "m"})
            assert answer.status_code == 200
        labels = {"namespace": "default", "service": "m", "revision": ""}
        assert gw.metric("mainsail:gateway_requests_total", **labels, pod="bad", code="502") == len(bad.seen) > 0
        assert gw.metric("mainsail:gateway_requests_total", **labels, pod="good", code="200") == 4
