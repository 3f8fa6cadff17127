"""A ModelRoute's status: whether everybody exists whom it names."""

from __future__ import annotations

import asyncio

import httpx2
import pytest
from pydantic import ValidationError

from mainsail_operator.apply import Writer
from mainsail_operator.lease import Lease
from mainsail_operator.model_routes import ModelRoutes, status_of
from mainsail_operator.types.route import ModelRouteSpec

SPEC = {
    "rules": [
        {"when": {"minPromptTokens": 1000}, "to": [{"service": "big"}]},
        {"to": [{"service": "small"}], "fallback": [{"external": {"url": "https://x/v1", "model": "y"}}]},
    ]
}


def told(services: set[tuple[str, str]], **more):
    return status_of(("ns", "smart"), ModelRouteSpec.model_validate(SPEC | more), 3, services, [], 0.0)


def test_ready_when_everybody_exists() -> None:
    status = told({("ns", "big"), ("ns", "small")})
    assert (status.observed_generation, status.names) == (3, ["smart"])
    assert [(c.type, c.status, c.reason) for c in status.conditions] == [("Ready", "True", "Resolved")]
    assert told(set(), names=["a", "b", "a"]).names == ["a", "b"]


def test_a_missing_service_is_named_and_one_of_another_namespace_is_no_help() -> None:
    (condition,) = told({("ns", "small"), ("other", "big")}).conditions
    assert (condition.status, condition.reason) == ("False", "ServiceNotFound")
    assert "big" in condition.message


@pytest.mark.parametrize("spec", [{}, {"rules": []}, {"rules": [{"to": []}]}, {"rules": [{"to": [{"sevice": "x"}]}]}])
def test_what_is_no_route(spec) -> None:
    with pytest.raises(ValidationError):
        ModelRouteSpec.model_validate(spec)


@pytest.mark.parametrize("code", [404, 409, 422])
async def test_a_route_that_is_gone_or_refused_is_no_matter_of_others(code: int) -> None:
    """Deleted between the list and the write, say: the next one is told, and who tells goes on."""
    routes = [
        {"metadata": {"namespace": "ns", "name": name, "generation": 1}, "spec": SPEC} for name in ("gone", "there")
    ]
    written: list[str] = []
    told = asyncio.Event()

    def answer(request: httpx2.Request) -> httpx2.Response:
        if request.method == "GET":
            return httpx2.Response(200, json={"items": routes})
        name = request.url.path.split("/")[-2]
        written.append(name)
        if written.count("there") == 2:
            told.set()
        return httpx2.Response(code if name == "gone" else 200, json={"message": "no"})

    async with httpx2.AsyncClient(transport=httpx2.MockTransport(answer), base_url="http://api") as client:
        lease = Lease(client, "system", "me")
        lease.acquired.set()
        keeper = ModelRoutes(client, Writer(client, lambda: True), lease, [], set)
        running = asyncio.create_task(keeper.run())
        while not told.is_set() and not running.done():
            keeper.wake()
            await asyncio.sleep(0)
        assert not running.done()
        running.cancel()
    assert written[:3] == ["gone", "there", "gone"]
