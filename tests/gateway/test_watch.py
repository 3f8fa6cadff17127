"""The watch loop against an API server that is away, forgets versions, drops connections and loses events; and the
whole process on top of it."""

import asyncio
import os
import signal
import sys

import httpx
import httpx2
import pytest
from tests.gateway.api_server import SERVICES, SLICES, ApiServer, isvc, kubeconfig, slices

from mainsail_gateway.routes import Routes
from mainsail_gateway.watch import Timing

QUICK = Timing(relist_s=600, silence_s=30, backoff_s=(0.01, 0.05))


class World:
    def __init__(self, api, routes, task):
        self.api, self.routes, self.task = api, routes, task

    def models(self):
        return {name: [e.host for e in s.endpoints] for name, s in self.routes.table.models.items()}


@pytest.fixture
async def world(request):
    """An API server with one service of one endpoint, mirrored."""
    api = ApiServer()
    api.put(SERVICES, isvc("a"))
    api.put(SLICES, slices("a", "10.0.0.1"))
    await api.start()
    client = httpx2.AsyncClient(base_url=f"http://127.0.0.1:{api.port}")
    routes = Routes(client, [], lambda table: None, timing=getattr(request, "param", QUICK))
    task = asyncio.create_task(routes.run())
    world = World(api, routes, task)
    async with asyncio.timeout(120):
        while world.models() != {"a": ["10.0.0.1"]} or len(api.watches) < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    yield world
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await client.aclose()
    await api.away()


async def test_events_change_the_table(kit, world):
    before = world.routes.table
    for name in "bcde":
        world.api.put(SERVICES, isvc(name))
    world.api.put(SLICES, slices("a", "10.0.0.1", "10.0.0.2"))
    await kit.until(lambda: len(world.models()) == 5 and world.models()["a"] == ["10.0.0.1", "10.0.0.2"])
    world.api.delete(SERVICES, "b")
    await kit.until(lambda: "b" not in world.models())
    assert set(before.models) == {"a"}  # an old reading never changes
    assert world.api.lists == {SERVICES: 1, SLICES: 1}


async def test_odd_objects_and_odd_characters_break_nothing(kit, world):
    world.api.put(SERVICES, {"metadata": {"name": "odd", "namespace": "default"}, "spec": {"model": 7}})
    fine = isvc("fine")
    fine["metadata"]["annotations"] = {"note": "next\u0085line\u2028here"}
    world.api.put(SERVICES, fine)
    await kit.until(lambda: set(world.models()) == {"a", "fine"})


async def test_a_dropped_watch_goes_on_from_its_last_version(kit, world):
    world.api.say(SERVICES, "BOOKMARK", {"metadata": {"resourceVersion": "77"}})
    world.api.put(SERVICES, isvc("b"), silently=True)
    await kit.until(lambda: world.routes.services[0]._version == "77")
    world.api.drop()
    await kit.until(lambda: len(world.api.watches) == 2)
    assert "77" in [query["resourceVersion"] for query in world.api.asked[2:]]
    assert all(query["allowWatchBookmarks"] == "true" for query in world.api.asked)
    assert world.api.lists == {SERVICES: 1, SLICES: 1}


async def test_a_version_that_is_gone_is_listed_anew(kit, world):
    world.api.put(SERVICES, isvc("b"), silently=True)
    world.api.delete(SERVICES, "a", silently=True)
    world.api.expired = True
    world.api.say(SERVICES, "ERROR", {"kind": "Status", "code": 410, "message": "too old resource version"})
    await kit.until(lambda: set(world.models()) == {"b"})


@pytest.mark.parametrize("world", [Timing(relist_s=0.5, silence_s=30, backoff_s=(0.01, 0.05))], indirect=True)
async def test_a_lost_event_is_found_by_the_next_list(kit, world):
    world.api.delete(SERVICES, "a", silently=True)
    await kit.until(lambda: world.models() == {})


@pytest.mark.parametrize("world", [Timing(relist_s=600, silence_s=0.2, backoff_s=(0.01, 0.05))], indirect=True)
async def test_a_silent_watch_is_made_anew(kit, world):
    await kit.until(lambda: len(world.api.asked) >= 4)
    assert world.models() == {"a": ["10.0.0.1"]}


async def test_with_the_api_server_away_it_goes_on_with_what_it_knows(kit, world):
    await world.api.away()
    await kit.until(lambda: all(r.failures > 3 for r in (*world.routes.services, *world.routes.slices)))
    assert world.models() == {"a": ["10.0.0.1"]}
    assert world.routes.synced
    world.api.put(SERVICES, isvc("b"), silently=True)
    world.api.expired = True
    await world.api.start()
    await kit.until(lambda: len(world.api.watches) == 2)
    world.api.put(SERVICES, isvc("c"))
    await kit.until(lambda: "c" in world.models())


async def _get(client, url):
    try:
        return (await client.get(url)).status_code
    except httpx.TransportError:
        return 0


async def test_the_process_serves_drains_and_exits_with_0(kit, world, tmp_path):
    up = await kit.upstream(kit.hold)
    world.api.put(SLICES, slices("a", "127.0.0.1", port=up.port))
    port, health = kit.free_ports()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "mainsail_gateway", "--host", "127.0.0.1", "--port", str(port),
        "--health-port", str(health), "--drain-delay-s", "0.5", "--connect-timeout-s", "120",
        "--kubeconfig", kubeconfig(tmp_path / "config", world.api.port),
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    url, probe = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{health}"
    try:
        async with httpx.AsyncClient(timeout=30) as client:
            async with asyncio.timeout(120):
                while await _get(client, probe + "/health/ready") != 200 or await _get(client, url + "/health") != 200:  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            assert [m["id"] for m in (await client.get(url + "/v1/models")).json()["data"]] == ["a"]
            body = {"model": "a", "messages": [], "stream": True}
            async with client.stream("POST", url + "/v1/chat/completions", json=body) as stream:
                lines = stream.aiter_lines()
                assert await anext(lines) == "data: first"
                assert (
                    'mainsail:gateway_endpoints{namespace="default",service="a"} 1.0'
                    in (await client.get(probe + "/metrics")).text
                )
                process.send_signal(signal.SIGTERM)
                async with asyncio.timeout(120):
                    while await _get(client, probe + "/health/ready") != 503:  # noqa: ASYNC110
                        await asyncio.sleep(0.02)
                assert await _get(client, probe + "/health/live") == 200
                up.release.set()
                assert [line async for line in lines if line] == ["data: [DONE]"]
        async with asyncio.timeout(120):
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_a_bad_kubeconfig_is_said(tmp_path):
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "mainsail_gateway", "--kubeconfig", str(tmp_path / "none"), stderr=asyncio.subprocess.PIPE
    )
    _, said = await process.communicate()
    assert process.returncode == 1
    assert said.decode().startswith("error: ")
