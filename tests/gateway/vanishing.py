"""In a network namespace of its own (`unshare --net`): an engine's address is gone from one moment to the next, as with
a node that lost its power. Its packets go nowhere, and nobody sends a reset. Prints how long the next requests took."""

import json
import subprocess
import time

import httpx
import uvloop
from tests.gateway import conftest as kit

from mainsail_gateway.routes import Endpoint

ADDRESS = "10.9.9.1"
BODY = {"model": "m", "messages": []}


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


async def main() -> None:
    ip("link", "set", "lo", "up")
    ip("address", "add", f"{ADDRESS}/32", "dev", "lo")
    gone, stays = kit.Upstream(kit.answer), await kit.Upstream(kit.answer).start()
    await gone.start(ADDRESS)
    ends = Endpoint("gone", ADDRESS, gone.port, "gone"), stays.endpoint()
    async with (
        kit.gateway(kit.service(*ends), connect_timeout_s=2.0) as gw,
        httpx.AsyncClient(timeout=120) as client,
    ):

        async def ask() -> float:
            began = time.monotonic()
            answer = await client.post(gw.url + "/v1/chat/completions", json=BODY)
            assert answer.status_code == 200, answer.text
            return time.monotonic() - began

        for _ in range(4):
            await ask()
        assert gone.seen, "it has an idle connection, on which the next request is sent"
        ip("address", "del", f"{ADDRESS}/32", "dev", "lo")
        ip("route", "add", "blackhole", f"{ADDRESS}/32")
        print(json.dumps([await ask() for _ in range(4)]))


if __name__ == "__main__":
    uvloop.run(main())
