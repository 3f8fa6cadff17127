"""What is told of requests: access log, traces, the reasons of a pick; and what a host may see."""

import asyncio
import json
import logging

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from mainsail_gateway.app import Gateway
from mainsail_gateway.health import HealthServer, checks_of, exposition
from mainsail_gateway.record import tracing
from mainsail_gateway.routes import Endpoint, visible
from mainsail_gateway.server import debugger

BODY = {"model": "m", "messages": [{"role": "user", "content": "a secret"}]}
CHAT = "/v1/chat/completions"
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


async def test_a_line_for_each_request_and_nothing_of_its_content(kit, caplog):
    caplog.set_level(logging.INFO, logger="mainsail.access")
    up = await kit.upstream()
    async with (
        kit.gateway(kit.service(up.endpoint("pod-1")), access_log=True) as gw,
        httpx.AsyncClient(base_url=gw.url) as client,
    ):
        headers = {"authorization": "Bearer very-secret", "x-request-id": "run-7"}
        await client.post(CHAT + "?x=secret", json={**BODY, "stream": True}, headers=headers)
        await client.post(CHAT, json={**BODY, "model": "nope"})
        await client.get("/v1/models")
    lines = [json.loads(r.message) for r in caplog.records if r.name == "mainsail.access"]
    assert [(line["method"], line["path"], line["status"]) for line in lines] == [
        ("POST", CHAT, 200), ("POST", CHAT, 404), ("GET", "/v1/models", 200)
    ]  # fmt: skip
    first = lines[0]
    assert first["request_id"] == "run-7"
    assert (first["model"], first["namespace"], first["service"], first["pod"]) == ("m", "default", "m", "pod-1")
    assert 0 <= first["first_token_ms"] <= first["duration_ms"]
    assert "secret" not in caplog.text


@pytest.mark.parametrize(
    ("given", "kept"), [("run-7/3", True), (None, False), ("two words", False), ("x" * 129, False)]
)
async def test_a_request_has_one_name_from_the_client_to_the_engine(kit, given, kept):
    up = await kit.upstream()
    headers = {} if given is None else {"x-request-id": given}
    async with (
        kit.gateway(kit.service(up.endpoint())) as gw,
        httpx.AsyncClient(base_url=gw.url, headers=headers) as client,
    ):
        answers = [
            await client.post(CHAT, json=BODY),
            await client.post(CHAT, json={**BODY, "stream": True}),
            await client.post(CHAT, json={**BODY, "model": "nope"}),
            await client.get("/v1/models"),
        ]
    told = [name for answer in answers for name in answer.headers.get_list("x-request-id")]
    assert [seen.header("x-request-id") for seen in up.seen] == told[:2]
    assert len(told) == 4
    assert told == [given] * 4 if kept else len({name for name in told if name.startswith("req_")}) == 4


async def test_nothing_is_told_unless_asked_for(kit, caplog):
    caplog.set_level(logging.INFO, logger="mainsail.access")
    up = await kit.upstream()
    async with kit.gateway(kit.service(up.endpoint())) as gw, httpx.AsyncClient(base_url=gw.url) as client:
        await client.post(CHAT, json=BODY, headers={"traceparent": PARENT})
    assert not [r for r in caplog.records if r.name == "mainsail.access"]
    assert up.seen[0].header("traceparent") == PARENT, "a client's trace goes on to the engine"


async def test_a_span_between_the_clients_and_the_engines(kit):
    exporter = InMemorySpanExporter()
    up = await kit.upstream()
    async with (
        kit.gateway(kit.service(up.endpoint("pod-1"))) as gw,
        httpx.AsyncClient(base_url=gw.url) as client,
    ):
        provider = tracing("", 1.0, exporter)
        gw.gateway.recorder = type(gw.gateway.recorder)(provider=provider)
        await client.post(CHAT, json=BODY, headers={"traceparent": PARENT})
        await client.post(CHAT, json={**BODY, "model": "nope"})
        await asyncio.to_thread(provider.force_flush)
    joined, own = exporter.get_finished_spans()
    assert joined.context and joined.parent and joined.attributes and own.attributes  # noqa: PT018
    assert f"{joined.context.trace_id:032x}" == PARENT.split("-")[1]
    assert f"{joined.parent.span_id:016x}" == PARENT.split("-")[2]
    assert up.seen[0].header("traceparent") == f"00-{PARENT.split('-')[1]}-{joined.context.span_id:016x}-01"
    assert joined.attributes["http.response.status_code"] == 200
    assert joined.attributes["gen_ai.request.model"] == "m"
    assert joined.attributes["k8s.pod.name"] == "pod-1"
    assert own.parent is None
    assert own.attributes["http.response.status_code"] == 404
    provider.shutdown()


async def test_why_an_endpoint_would_be_picked(kit):
    ends = [Endpoint(f"k{i}", "127.0.0.1", 1, f"pod-{i}", f"r{i}") for i in range(2)]
    service = kit.service(*ends, weights=(("r0", 0), ("r1", 100)))
    async with kit.gateway(service, kit.service(name="asleep")) as gw:
        app: Gateway = gw.gateway
        debug = debugger(app, asyncio.get_running_loop())
        health = HealthServer(("127.0.0.1", 0), checks_of(app.health), exposition(app.metrics.registry), debug)
        health.start()
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{health.port}") as client:
            overview = (await client.get("/debug/routes")).json()
            assert overview["models"] == ["asleep", "m"]
            assert overview["services"]["default/asleep"]["endpoints"] == []
            before = dict(app.fleet.pools["default", "m"].split._credits)
            found = (await client.get("/debug/routes", params={"model": "m", "session": "s", "prompt": "x"})).json()
            assert found["pick"]["pod"] == "pod-1"
            assert "belongs to revision r1" in found["pick"]["because"][0]
            assert {e["pod"]: e["requests"] for e in found["endpoints"]} == {"pod-0": 0, "pod-1": 0}
            assert app.fleet.pools["default", "m"].split._credits == before, "asking changes nothing"
            nobody = (await client.get("/debug/routes", params={"model": "asleep"})).json()
            assert nobody["pick"] == {"pod": None, "because": ["no endpoint is ready"]}
            assert (await client.get("/debug/routes", params={"model": "nope"})).status_code == 404
        await asyncio.to_thread(health.stop)


@pytest.mark.parametrize(
    ("host", "sees"),
    [
        ("a.ns.llm.example.com", {"a", "a2"}),
        ("A.ns.LLM.example.com:8443", {"a", "a2"}),
        ("nope.ns.llm.example.com", set()),
        ("a.llm.example.com", set()),
        ("llm.example.com", {"a", "a2", "b"}),
        ("10.0.0.1:80", {"a", "a2", "b"}),
        ("", {"a", "a2", "b"}),
    ],
)
def test_what_a_host_sees(kit_table, host, sees):
    assert set(visible(kit_table, host, ("llm.example.com",)).models) == sees


@given(st.text(max_size=30))
def test_no_host_sees_more_than_there_is(host):
    from tests.gateway.conftest import service, table

    whole = table(service(name="a", namespace="ns"))
    assert set(visible(whole, host, ("x", "example.com")).models) <= {"a"}


@pytest.fixture
def kit_table():
    from tests.gateway.conftest import service, table

    return table(
        service(name="a", namespace="ns", served_names=("a", "a2")), service(name="b", namespace="other")
    )  # fmt: skip


async def test_a_service_by_its_host(kit):
    up = await kit.upstream()
    services = (kit.service(up.endpoint(), name="a"), kit.service(up.endpoint(), name="b"))
    async with (
        kit.gateway(*services, host_suffixes=("llm.test",)) as gw,
        httpx.AsyncClient(base_url=gw.url, headers={"host": "a.default.llm.test"}) as client,
    ):
        assert [m["id"] for m in (await client.get("/v1/models")).json()["data"]] == ["a"]
        assert (await client.post(CHAT, json={**BODY, "model": "a"})).status_code == 200
        assert (await client.post(CHAT, json={**BODY, "model": "b"})).status_code == 404
