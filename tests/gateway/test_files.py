"""More clients than files: what fits is served, the rest is refused and blames no engine; many idle streams at once."""

import asyncio
import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from tests.gateway.api_server import ROUTES, SERVICES, SLICES, ApiServer, isvc, kubeconfig, slices

from mainsail_gateway.server import makes_room, reserved, room

CHAT = "/v1/chat/completions"
BODY = {"model": "a", "messages": []}
FILES = 200
ROOM = 75
ROOT = Path(__file__).parents[2]


@asynccontextmanager
async def short_of_files(tmp_path, kit, upstream, log):
    """The real process, allowed so many files."""
    api = ApiServer((SERVICES, SLICES, ROUTES))
    api.put(SERVICES, isvc("a", admission={"maxConcurrency": 1000}))
    api.put(SLICES, slices("a", "127.0.0.1", port=upstream.port))
    await api.start()
    port, health = kit.free_ports()
    process = await asyncio.create_subprocess_exec(
        "sh", "-c", f'ulimit -n {FILES}; exec "$@"', "sh",
        sys.executable, "-m", "mainsail_gateway", "--host", "127.0.0.1", "--port", str(port),
        "--health-port", str(health), "--drain-delay-s", "0", "--connect-timeout-s", "120",
        "--kubeconfig", kubeconfig(tmp_path / "config", api.port), stderr=log,
    )  # fmt: skip
    try:
        async with httpx.AsyncClient(limits=httpx.Limits(max_connections=None), timeout=30) as http:
            async with asyncio.timeout(120):
                while True:
                    with contextlib.suppress(httpx.TransportError):
                        if (await http.get(f"http://127.0.0.1:{health}/health/ready")).status_code == 200:
                            break
                    await asyncio.sleep(0.05)
            yield f"http://127.0.0.1:{port}", f"http://127.0.0.1:{health}", http
    finally:
        process.send_signal(signal.SIGTERM)
        await process.wait()
        await api.away()


async def test_more_clients_than_files(kit, tmp_path):
    """As many streams as have files run; others get a 503 to try elsewhere, and no engine is taken for broken. Clients
    that ask for nothing make room."""
    up = await kit.upstream(kit.hold)
    log = (tmp_path / "log").open("wb")
    async with short_of_files(tmp_path, kit, up, log) as (url, health, http):
        idle = [await asyncio.open_connection(*url.removeprefix("http://").split(":")) for _ in range(60)]
        for _, writer in idle:
            writer.write(b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n")
        for reader, _ in idle:
            await reader.readuntil(b"\r\n\r\n")
        async with contextlib.AsyncExitStack() as stack:
            lines = []

            async def begin():
                answer = await stack.enter_async_context(http.stream("POST", url + CHAT, json={**BODY, "stream": True}))
                if answer.status_code == 200:
                    lines.append(answer.aiter_lines())
                    assert await anext(lines[-1]) == "data: first"
                return answer

            async with asyncio.timeout(120):
                while len(lines) < ROOM:
                    if (await begin()).status_code == 503:
                        await asyncio.sleep(0.2)
            for reader, _ in idle:
                await reader.read()  # to its end: it made room
            for _ in range(20):
                answer = await begin()
                assert answer.status_code == 503
                error = json.loads(await answer.aread())["error"]
                assert error["code"] == "too_many_connections"
                assert (answer.headers["retry-after"], answer.headers["connection"]) == ("1", "close")
            assert (await http.get(health + "/health/ready")).status_code == 200
            up.release.set()
            for line in lines:
                assert "data: [DONE]" in [text async for text in line]
        up.behave = kit.answer
        # A connection of its own: the old ones, idle now, are closed to make room, whenever that is.
        async with httpx.AsyncClient(timeout=30) as later, asyncio.timeout(120):
            while (await later.post(url + CHAT, json=BODY)).status_code != 200:  # noqa: ASYNC110
                await asyncio.sleep(0.2)
        metrics = (await http.get(health + "/metrics")).text
        assert not [x for x in metrics.splitlines() if x.startswith("mainsail:gateway_upstream_failures_total")]
    assert f"only {FILES} open files are allowed" in (tmp_path / "log").read_text()


async def test_a_gateway_without_a_socket_left_blames_no_engine(kit):
    """Files are taken away while it runs; its engines stay in service, and are asked again when there are files."""
    up = await kit.upstream()
    async with kit.gateway(kit.service(up.endpoint())) as gw, httpx.AsyncClient() as client:
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        await client.get(gw.url + "/v1/models")  # connected, before there are none left
        in_use = max(map(int, os.listdir("/proc/self/fd")))
        resource.setrlimit(resource.RLIMIT_NOFILE, (in_use + 1, limits[1]))
        taken: list[int] = []
        try:
            with contextlib.suppress(OSError):
                while True:
                    taken.append(os.open("/dev/null", os.O_RDONLY))
            for _ in range(4):
                answer = await client.post(gw.url + CHAT, json={**BODY, "model": "m"})
                assert (answer.status_code, answer.json()["error"]["code"]) == (503, "too_many_connections")
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            for number in taken:
                os.close(number)
        load = gw.gateway.fleet.pools["default", "m"].loads[up.endpoint().key]
        assert (load.failures, load.ejected_until) == (0, 0.0)
        assert (await client.post(gw.url + CHAT, json={**BODY, "model": "m"})).status_code == 200


async def test_idle_connections_to_engines_make_room(kit):
    """Ten engines, each left with an idle connection; never more are open than there is room for."""
    ups = [await kit.upstream() for _ in range(10)]
    services = [kit.service(up.endpoint(), name=f"m{i}", served_names=(f"m{i}",)) for i, up in enumerate(ups)]
    async with kit.gateway(*services) as gw, httpx.AsyncClient() as client:
        gw.gateway.connections._most = 3
        for i in range(10):
            assert (await client.post(gw.url + CHAT, json={**BODY, "model": f"m{i}"})).status_code == 200
            assert len(gw.gateway.connections._open) <= 4


def test_the_longest_idle_make_room_and_no_more_than_needed():
    asking = [None] * 50
    assert makes_room([*asking, *map(float, range(1, 41))], 100) == []
    assert makes_room([*asking, *map(float, range(1, 42))], 100) == list(range(90, 74, -1))
    assert makes_room([*asking, *[0.5] * 48, 3.0, 2.0], 100) == [98, 99]


def test_most_of_the_files_are_for_clients_and_their_engines():
    for files in (16, 256, 1024, 20_000, 1 << 20):
        assert 2 * room(files, 1) + reserved(files) <= files
        assert 2 * room(files, 1) >= files * 0.7 or files > 1024


def idle_streams(tmp_path, streams: int, workers: int) -> dict:
    out = tmp_path / "figures.json"
    command = [sys.executable, "benchmarks/gateway_idle.py", "--streams", str(streams), "--workers", str(workers)]
    more = ["--requests", "50", "--idle-s", "1", "--json", out]
    subprocess.run([*command, *more], check=True, timeout=560, cwd=ROOT)
    (found,) = json.loads(out.read_text())["rows"]
    print(found)
    assert found["begun"] == found["ended_whole"] == streams
    assert 0 < found["kib_per_stream"] < 64
    return found


def test_a_thousand_idle_streams(tmp_path):
    """Through one process, with one thread; each ends whole when its engine goes on."""
    idle_streams(tmp_path, 1000, workers=1)


@pytest.mark.slow
def test_ten_thousand_idle_streams(tmp_path):
    idle_streams(tmp_path, 10_000, workers=2)
