"""The scraper against real HTTP servers: what it asks, how often, and that bad ones harm nobody."""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager

import httpx2
import pytest

from mainsail_operator import scrape
from mainsail_operator.scrape import Scraper, Target
from mainsail_operator.signals import (
    DEMAND,
    FINISHED,
    HELD_SESSIONS,
    KV_USAGE,
    QUEUED,
    RUNNING,
    SESSIONS_KV,
    WAITING,
    Queue,
    Signals,
)

HANG_S = 120.0
ENGINE_PAGE = """# HELP vllm:num_requests_waiting w
vllm:num_requests_waiting{model_name="m"} 3.0
vllm:num_requests_running{model_name="m"} 1.0
vllm:kv_cache_usage_perc{model_name="m"} 0.25
vllm:request_success_total{model_name="m",finished_reason="stop"} 7.0
python_gc_objects_collected_total{generation="0"} 100.0
"""


class Pod:
    """Answers GET with a page; counts; may hang or be broken."""

    def __init__(self, page: str) -> None:
        self.page = page
        self.paths: list[str] = []
        self.hang = False
        self.status = "200 OK"
        self.url = ""

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line = await reader.readline()
        self.paths.append(line.split()[1].decode())
        while (await reader.readline()).strip():
            pass
        if self.hang:
            await asyncio.sleep(HANG_S)
        body = self.page.encode()
        head = f"HTTP/1.1 {self.status}\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        writer.write(head.encode() + body)
        await writer.drain()
        writer.close()


@asynccontextmanager
async def running(*pods: Pod):
    servers = []
    for pod in pods:
        server = await asyncio.start_server(pod.answer, "127.0.0.1", 0)
        pod.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/metrics"
        servers.append(server)
    yield
    for server in servers:
        server.close()


async def rounds(scraper: Scraper, ahead_s: float = 0.0) -> None:
    """One round of scrapes, to its end."""
    scraper.round(time.monotonic() + ahead_s)
    await asyncio.gather(*scraper._tasks)


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """Scraper and pods stand still together, where this process does."""
    monkeypatch.setattr(scrape, "TIMEOUT_S", HANG_S)


@pytest.fixture
async def client():
    async with httpx2.AsyncClient(trust_env=False) as client:
        yield client


async def test_engines_of_wanted_services_only(client) -> None:
    pod, signals = Pod(ENGINE_PAGE), Signals()
    async with running(pod):
        scraper = Scraper(client, signals, gateways=list)
        await rounds(scraper)
        assert pod.paths == []
        scraper.want(("d", "s"), [Target("u", pod.url)])
        await rounds(scraper)
        await rounds(scraper)  # not due again
        assert pod.paths == ["/metrics"]
        window = signals.engines["u"].window(0)
        assert window is not None
        assert (window.last(WAITING), window.last(RUNNING), window.last(KV_USAGE)) == (3.0, 1.0, 0.25)
        await rounds(scraper, scrape.INTERVAL_S + 1)
        assert len(pod.paths) == 2
        scraper.want(("d", "s"), [])
        await rounds(scraper, 60)
        assert len(pod.paths) == 2
        assert signals.engines == {}


async def test_a_dead_and_a_hanging_pod_hold_up_nobody(client) -> None:
    good, hanging, broken = Pod(ENGINE_PAGE), Pod(ENGINE_PAGE), Pod("vllm:num_requests_waiting{")
    hanging.hang = True
    signals = Signals()
    async with running(good, hanging, broken):
        scraper = Scraper(client, signals, gateways=list)
        dead = Target("dead", "http://127.0.0.1:9/metrics")
        pods = [Target(name, pod.url) for name, pod in (("hang", hanging), ("broken", broken), ("good", good))]
        scraper.want(("d", "s"), [dead, *pods])
        began = time.monotonic()
        scraper.round(began)
        async with asyncio.timeout(HANG_S):
            while len(scraper._tasks) > 1 or not hanging.paths:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert set(signals.engines) == {"good"}
        assert scraper._due["dead"].at - began >= scrape.INTERVAL_S * 2, "asked less often from now on"
        scraper.round(scraper._due["good"].at + 0.1)
        await asyncio.wait(scraper._tasks, return_when=asyncio.FIRST_COMPLETED)
        assert (len(good.paths), len(broken.paths), len(hanging.paths)) == (2, 1, 1)
        (asked,) = scraper._tasks
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)


async def test_a_hanging_pod_is_given_up_and_asked_less_often(client, monkeypatch) -> None:
    monkeypatch.setattr(scrape, "TIMEOUT_S", 0.1)
    hanging, signals = Pod(ENGINE_PAGE), Signals()
    hanging.hang = True
    async with running(hanging):
        scraper = Scraper(client, signals, gateways=list)
        scraper.want(("d", "s"), [Target("hang", hanging.url)])
        began = time.monotonic()
        await rounds(scraper)
        assert signals.engines == {}
        assert scraper._due["hang"].at - began >= scrape.INTERVAL_S * 2


async def test_requests_that_wait_wake_their_service(client) -> None:
    gateway = Pod(
        f'{QUEUED}{{namespace="d",service="s"}} 2\n{QUEUED}{{namespace="d",service="t"}} 0\n'
        f'{HELD_SESSIONS}{{namespace="d",service="u"}} 3\n'
        f'{SESSIONS_KV}{{namespace="d",service="u",state="held"}} 900\n'
        f'{SESSIONS_KV}{{namespace="d",service="u",state="live"}} 5000\n'
        'mainsail:gateway_requests_total{namespace="d",service="s",revision="r",pod="p",code="200"} 9\n'
        'mainsail:gateway_requests_total{namespace="d",service="t",revision="r",pod="q",code="200"} 9\n'
    )
    woken, signals = [], Signals()
    async with running(gateway):
        scraper = Scraper(client, signals, gateways=lambda: [Target("g", gateway.url)], on_queued=woken.append)
        await rounds(scraper)
        names = "&".join(f"name[]={name}" for name in DEMAND)
        assert gateway.paths == [f"/metrics?{names}"], "nobody wants to know more"
        assert woken == [("d", "s"), ("d", "u")]
        assert signals.queue("d", "u", time.time()) == Queue(0.0, 0.0, 3.0, 5900.0)
        assert signals.queue("d", "s", time.time()).length == 2
        scraper.want(("d", "s"), [Target("u", gateway.url)])
        await rounds(scraper)
        (window,) = signals.gateway_windows(0)
        assert window.last("mainsail:gateway_requests_total", service="s", pod="p") == 9
        assert window.series("mainsail:gateway_requests_total", service="t") == []


async def test_a_restarted_pod_keeps_its_sums(client) -> None:
    pod, signals = Pod(ENGINE_PAGE), Signals()
    async with running(pod):
        scraper = Scraper(client, signals, gateways=list)
        scraper.want(("d", "s"), [Target("u", pod.url, restarts=0)])
        await rounds(scraper)
        scraper.want(("d", "s"), [Target("u", pod.url, restarts=1)])
        await rounds(scraper, scrape.INTERVAL_S + 1)
        window = signals.engines["u"].window(0)
        assert window is not None
        assert window.increase(FINISHED) == 7
