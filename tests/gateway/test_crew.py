"""Several workers behind one port: real processes, killed and drained; metrics and limits as of one gateway."""

import asyncio
import contextlib
import os
import signal
import sys
from base64 import b64encode
from collections import Counter
from contextlib import asynccontextmanager

import httpx
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Gauge, Histogram
from prometheus_client import Counter as Count
from prometheus_client.parser import text_string_to_metric_families
from tests.gateway.api_server import ROUTES, SECRETS, SERVICES, SLICES, ApiServer, isvc, kubeconfig, slices

from mainsail_gateway.auth import ApiKey, KeyRing
from mainsail_gateway.errors import GatewayError
from mainsail_gateway.health import exposition
from mainsail_gateway.keys import Charge, Keys
from mainsail_gateway.merge import counted, merged
from mainsail_gateway.sharing import Sharing
from mainsail_gateway.shed import Policy

CHAT = "/v1/chat/completions"
BODY = {"model": "a", "messages": []}
KEY = "sk-" + "k" * 30


def families(text):
    return list(text_string_to_metric_families(text))


def values(found):
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in found for s in family.samples}


@given(st.lists(st.lists(st.integers(0, 5), max_size=5), min_size=1, max_size=4), st.integers(0, 3))
def test_metrics_of_workers_are_one_gateways(requests, dead):
    """Counters and histograms add up over the living and the dead; what all say alike is said once."""
    texts = []
    for worker in requests:
        registry = CollectorRegistry()
        count = Count("mainsail:gateway_x", "x", ("code",), registry=registry)
        took = Histogram("mainsail:gateway_y", "y", buckets=(1, 3), registry=registry)
        Gauge("mainsail:gateway_endpoints", "e", registry=registry).set(7)
        Gauge("mainsail:gateway_running", "r", registry=registry).set(len(worker))
        wanted = Gauge("mainsail:gateway_sessions_kv_tokens", "k", ("state",), registry=registry)
        wanted.labels("held").set(len(worker))
        wanted.labels("live").set(len(worker))
        for request in worker:
            count.labels(str(request)).inc()
            took.observe(request)
        texts.append(families(exposition(registry)([]).decode()))
    gone = counted(texts.pop()) if dead and len(texts) > 1 else {}
    found = values(merged([family for text in texts for family in text], gone))
    whole = [request for worker in requests for request in worker]
    for code, times in Counter(whole).items():
        assert found["mainsail:gateway_x_total", (("code", str(code)),)] == times
    assert found["mainsail:gateway_y_count", ()] == len(whole)
    assert found["mainsail:gateway_y_bucket", (("le", "1.0"),)] == sum(r <= 1 for r in whole)
    assert found["mainsail:gateway_endpoints", ()] == 7
    living = [len(worker) for worker in requests[: len(texts)]]
    assert found["mainsail:gateway_running", ()] == sum(living)
    assert found["mainsail:gateway_sessions_kv_tokens", (("state", "held"),)] == sum(living), "each is held by one"
    assert found["mainsail:gateway_sessions_kv_tokens", (("state", "live"),)] == max(living), "all may know the same"


@given(st.integers(1, 9), st.integers(1, 600), st.integers(0, 600))
def test_parts_of_a_policy_are_the_whole_and_little_more(of, running, queued):
    policy = Policy(max_running=running, max_queued_requests=queued)
    part = policy.part(of)
    assert running <= part.max_running * of < running + of
    assert queued <= part.max_queued_requests * of < queued + of
    assert policy.part(1) is policy


@asynccontextmanager
async def sharing(folder, count, key):
    """So many workers' accounts of one key."""
    async with contextlib.AsyncExitStack() as stack:
        found = []
        for index in range(count):
            found.append(await stack.enter_async_context(_member(folder, index, count, key)))
        yield found


@asynccontextmanager
async def _member(folder, index, count, key):
    keys = Keys()
    keys.use(KeyRing.of([key]), {})
    task = asyncio.create_task(Sharing(keys, folder, index, count).run())
    await asyncio.sleep(0)
    try:
        yield keys
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_the_limits_of_a_key_hold_for_all_workers_together(kit, tmp_path):
    key = ApiKey("k", hashes=(b"h",), requests_per_minute=5, max_concurrency=3)
    async with sharing(tmp_path, 3, key) as workers:

        def all_know(running):
            return lambda: all(sum(w._accounts["k"].elsewhere.values()) + w._accounts["k"].running == running
                               for w in workers)  # fmt: skip

        taken = []
        for worker in workers:
            taken.append(worker.take(key, 10))
            await kit.until(all_know(len(taken)))
        for worker in workers:
            with pytest.raises(GatewayError, match="3 requests at once"):
                worker.take(key, 10)
        for worker, account in zip(workers, taken, strict=True):
            worker.settle(key, account, 10, Charge(None, 200))
        await kit.until(all_know(0))
        for worker in workers[:2]:
            account = worker.take(key, 10)
            worker.settle(key, account, 10, Charge(None, 200))
        await kit.until(lambda: all(w.standing().get("k", (0, 0, 0))[1] == 5 for w in workers))
        for worker in workers:
            with pytest.raises(GatewayError, match="5 requests per minute"):
                worker.take(key, 10)
        async with _member(tmp_path, 0, 3, key) as newcomer:  # in the place of the first
            await kit.until(lambda: newcomer.standing().get("k", (0, 0, 0))[1] == 5)
            with pytest.raises(GatewayError, match="5 requests per minute"):
                newcomer.take(key, 10)


@asynccontextmanager
async def crew(tmp_path, kit, upstream, *flags):
    """`mainsail-gateway --workers 2`, ready; its base URL, its health port's, the process, and the API server."""
    api = ApiServer((SERVICES, SLICES, SECRETS, ROUTES))
    api.put(SERVICES, isvc("a"))
    api.put(SLICES, slices("a", "127.0.0.1", port=upstream.port))
    secret = {"key": KEY, "requestsPerMinute": "6"}
    api.put(SECRETS, {"metadata": {"name": "team", "namespace": "default", "labels": {"mainsail.dev/api-key": "true"}},
                      "data": {name: b64encode(text.encode()).decode() for name, text in secret.items()}})  # fmt: skip
    await api.start()
    port, health = kit.free_ports()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "mainsail_gateway", "--workers", "2", "--host", "127.0.0.1", "--port", str(port),
        "--health-port", str(health), "--kubeconfig", kubeconfig(tmp_path / "config", api.port),
        "--connect-timeout-s", "120", *flags,
    )  # fmt: skip
    url, probe = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{health}"
    try:
        async with httpx.AsyncClient(timeout=30) as http:
            await ready(http, probe)
            yield url, probe, process, http
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        await api.away()


async def ready(http, probe):
    async with asyncio.timeout(120):
        while True:
            with contextlib.suppress(httpx.TransportError):
                if (await http.get(probe + "/health/ready")).status_code == 200:
                    return
            await asyncio.sleep(0.05)


def workers_of(process):
    return [child for child in psutil.Process(process.pid).children() if "mainsail_gateway.worker" in child.cmdline()]


async def ask(url, times, headers=None):
    """Each on a connection of its own, so that the kernel spreads them."""
    codes = []
    for _ in range(times):
        async with httpx.AsyncClient(timeout=30) as client:
            codes.append((await client.post(url + CHAT, json=BODY, headers=headers)).status_code)
    return codes


async def total(http, probe, name, **labels):
    found = families((await http.get(probe + "/metrics")).text)
    return sum(s.value for f in found for s in f.samples if s.name == name and labels.items() <= s.labels.items())


async def until_total(wanted, http, probe, **name):
    """A request is counted when its answer has been sent: its client may be quicker to ask."""
    async with asyncio.timeout(120):
        while (found := await total(http, probe, **name)) != wanted:
            assert found < wanted
            await asyncio.sleep(0.05)


async def test_two_workers_are_one_gateway(kit, tmp_path):
    up = await kit.upstream(kit.answer)
    async with crew(tmp_path, kit, up, "--drain-delay-s", "0.5") as (url, probe, process, http):
        assert await ask(url, 40) == [200] * 40
        requests = {"name": "mainsail:gateway_requests_total", "service": "a", "code": "200"}
        await until_total(40, http, probe, **requests)
        await until_total(2, http, probe, name="mainsail:gateway_workers")
        await until_total(1, http, probe, name="mainsail:gateway_endpoints")
        only = await http.get(probe + "/metrics", params={"name[]": "mainsail:gateway_held_requests"})
        assert {f.name for f in families(only.text)} == {"mainsail:gateway_held_requests"}
        told = [(await http.get(probe + f"/debug/routes?model=a&worker={n}")).json() for n in range(2)]
        assert all(found["model"] == "a" for found in told)
        assert (await http.get(probe + "/debug/routes?worker=7")).status_code == 404

        first, _ = workers_of(process)
        first.kill()
        assert await ask(url, 20) == [200] * 20, "its queue waits for the one that takes its place"
        await ready(http, probe)
        assert len({worker.pid for worker in workers_of(process)} - {first.pid}) == 2
        await until_total(60, http, probe, **requests)  # what the dead one had counted stays

        up.behave = kit.hold
        async with contextlib.AsyncExitStack() as stack:
            streams = []
            for _ in range(8):
                client = await stack.enter_async_context(httpx.AsyncClient(timeout=30))
                answer = await stack.enter_async_context(
                    client.stream("POST", url + CHAT, json={**BODY, "stream": True})
                )
                lines = answer.aiter_lines()
                assert await anext(lines) == "data: first"
                streams.append(lines)
            process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(120):
                while (await http.get(probe + "/health/ready")).status_code != 503:  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
            up.release.set()
            for lines in streams:
                assert [line async for line in lines if line] == ["data: [DONE]"]
        async with asyncio.timeout(120):
            assert await process.wait() == 0


async def test_a_keys_limit_over_two_workers_and_a_crew_that_is_killed(kit, tmp_path):
    up = await kit.upstream(kit.answer)
    flags = ("--auth", "keys", "--keys-namespace", "default", "--drain-delay-s", "0")
    async with crew(tmp_path, kit, up, *flags) as (url, probe, process, http):
        # One worker hears of what another lets in by a datagram, and until then may let in one in its place.
        codes = Counter(await ask(url, 20, {"authorization": f"Bearer {KEY}"}))
        passed = codes.pop(200)
        assert 6 <= passed < 12, "each by itself would let in six"
        assert codes == {429: 20 - passed}
        await until_total(passed, http, probe, name="mainsail:gateway_key_requests_total", key="team", code="200")
        workers = workers_of(process)
        os.kill(process.pid, signal.SIGKILL)
        await process.wait()
        async with asyncio.timeout(120):
            while any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
