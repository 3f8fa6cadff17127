"""Virtual models: which rule, whom, in which order; and over sockets, what a client gets when somebody cannot."""

import asyncio
import base64
import json
from collections import Counter

import httpx
import msgspec
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mainsail_gateway import request, schema
from mainsail_gateway.auth import Secret, ring
from mainsail_gateway.routes import InferenceService, Table, build
from mainsail_gateway.shed import Policy
from mainsail_gateway.split import Split, Sticky
from mainsail_gateway.virtual import Facts, ModelRoute, Rule, Target, choose, matching, order
from mainsail_gateway.watch import Metadata

CHAT = "/v1/chat/completions"
BODY = {"model": "smart", "messages": [{"role": "user", "content": "hi"}]}
SCHEMA = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
STRUCTURED = {**BODY, "response_format": {"type": "json_schema", "json_schema": {"name": "p", "schema": SCHEMA}}}


def route(*rules, name="smart", names=(), created="2026-01-01T00:00:00Z") -> ModelRoute:
    meta = {"name": name, "namespace": "default", "creationTimestamp": created}
    return msgspec.convert({"metadata": meta, "spec": {"rules": list(rules), "names": list(names)}}, ModelRoute)


def rule(**fields) -> Rule:
    return msgspec.convert(fields, Rule)


def facts(tokens=10, tools=False, structured=False, bulk=False, headers=()) -> Facts:
    return Facts(tokens, tools, structured, bulk, list(headers))


@pytest.mark.parametrize(
    ("when", "yes", "no"),
    [
        ({"minPromptTokens": 100}, facts(100), facts(99)),
        ({"maxPromptTokens": 100}, facts(100), facts(101)),
        ({"tools": True}, facts(tools=True), facts()),
        ({"tools": False}, facts(), facts(tools=True)),
        ({"structured": True}, facts(structured=True), facts()),
        ({"profile": "Bulk"}, facts(bulk=True), facts()),
        ({"profile": "Latency"}, facts(), facts(bulk=True)),
        ({"header": {"name": "X-Tier", "value": "big"}}, facts(headers=[(b"x-tier", b"big")]), facts()),
        ({"minPromptTokens": 5, "tools": True}, facts(5, tools=True), facts(5)),
    ],
)
def test_when_a_rule_fits(when, yes, no):
    rules = [rule(when=when, to=[{"service": "a"}]), rule(to=[{"service": "b"}])]
    assert (matching(rules, yes), matching(rules, no)) == (0, 1)
    assert matching(rules[:1], no) is None


def test_targets_by_weight_and_fallbacks_in_order():
    found = rule(
        to=[{"service": "a", "weight": 3}, {"service": "b", "weight": 1}, {"service": "off", "weight": 0}],
        fallback=[{"service": "b"}, {"service": "c"}],
    )
    split = Split()
    plans = [tuple(target.name for target in choose(found, split, None)) for _ in range(400)]
    assert Counter(plans) == {("a", "b", "c"): 300, ("b", "c"): 100}
    assert len({tuple(t.name for t in choose(found, split, Sticky("session"))) for _ in range(20)}) == 1


@given(
    st.lists(st.sampled_from("abcdef"), unique=True, min_size=1),
    st.dictionaries(st.sampled_from("abcdef"), st.sampled_from(["ready", "busy", "down"])),
    st.sets(st.sampled_from(["Overloaded", "Down"])),
)
def test_who_cannot_is_asked_last_and_the_order_is_kept_otherwise(names, states, on):
    targets = [Target(service=name) for name in names]
    found = order(targets, states, on)
    assert sorted(t.name for t in found) == sorted(names)
    rank = {"ready": 0, "busy": int("Overloaded" in on), "down": 2 * ("Down" in on)}
    expected = [(rank[states.get(t.name, "ready")], names.index(t.name)) for t in found]
    assert expected == sorted(expected)


def test_names_of_routes_and_services_go_to_the_older():
    item = {"metadata": {"name": "a", "namespace": "default", "creationTimestamp": "2026-01-02T00:00:00Z"}}
    service = msgspec.convert(item | {"spec": {"model": {"servedNames": ["x", "y"]}}}, InferenceService)
    older = route({"to": [{"service": "a"}]}, name="r", names=["x", "z"])
    table = build([service], [], [older])
    assert set(table.models) == {"y"}
    assert set(table.virtual) == {"x", "z"}
    assert table.conflicts == (("x", ("default", "r"), ("default", "a")),)


def test_a_body_for_another_model_is_the_same_otherwise():
    body = b'{"messages": [ {"a":1.0} ],\n "model" : "smart", "seed": 12345678901234567890123}'
    renamed = request.renamed(body, "big/one")
    assert json.loads(renamed) == {**json.loads(body), "model": "big/one"}
    assert b'[ {"a":1.0} ]' in renamed
    assert b"12345678901234567890123" in renamed


def _answer(content=None, *calls) -> bytes:
    tools = [{"type": "function", "function": {"name": n, "arguments": a}} for n, a in calls]
    return json.dumps({"choices": [{"message": {"content": content, "tool_calls": tools or None}}]}).encode()


@pytest.mark.parametrize(
    ("answer", "good"),
    [
        (_answer('{"age": 3}'), True),
        (_answer('{"age": "3"}'), False),
        (_answer('{"age": 3'), False),
        (_answer(None), False),
        (b"nonsense", False),
        (_answer(None, ("f", '{"age": 1}')), True),
        (_answer(None, ("f", "{}")), False),
        (_answer(None, ("g", "{}")), False),
    ],
)
def test_whether_an_answer_is_what_was_asked_for(answer, good):
    tools = [{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}]
    check = schema.check(json.dumps({**STRUCTURED, "tools": tools}).encode())
    assert check is not None
    assert check(answer) is good


@pytest.mark.parametrize(
    "body",
    [BODY, {**BODY, "response_format": {"type": "text"}}, {**BODY, "response_format": 7},
     {**BODY, "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 3}}}},
     {**BODY, "response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "http://127.0.0.1:9/x"}}}}],
)  # fmt: skip
def test_what_cannot_be_checked_is_not(body):
    assert schema.check(json.dumps(body).encode()) is None


def routed(kit, *services, rules) -> Table:
    base = kit.table(*services)
    built = build([], [], [route(*rules)])
    return Table(base.models, base.services, built.virtual)


async def test_weights_cheap_first_and_who_answered(kit):
    small, big = await kit.upstream(), await kit.upstream()
    services = (kit.service(small.endpoint("s"), name="small"), kit.service(big.endpoint("b"), name="big"))
    rules = [
        {"when": {"minPromptTokens": 1000}, "to": [{"service": "big"}]},
        {"when": {"tools": True}, "to": [{"service": "big"}]},
        {"when": {"header": {"name": "x-tier", "value": "big"}}, "to": [{"service": "big"}]},
        {"when": {"profile": "Bulk"}, "to": [{"service": "big"}]},
        {"to": [{"service": "small", "weight": 4}, {"service": "big"}]},
    ]
    async with (
        kit.gateway(*services) as gw,
        openai.AsyncOpenAI(base_url=gw.url + "/v1", api_key="x", max_retries=0) as client,
    ):
        gw.gateway.use(routed(kit, *services, rules=rules))
        assert [m.id for m in (await client.models.list()).data] == ["big", "small", "smart"]
        got = Counter([(await client.chat.completions.create(**BODY)).model for _ in range(20)])
        assert got == {"small": 16, "big": 4}
        long = [{"role": "user", "content": "word " * 1000}]
        tool = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
        for more in (
            {"messages": long},
            {"tools": tool},
            {"extra_headers": {"X-Tier": "big"}},
            {"extra_headers": {"X-Mainsail-Priority": "batch"}},
        ):
            raw = await client.chat.completions.with_raw_response.create(**{**BODY, **more})
            assert raw.headers["x-mainsail-answered-by"] == "default/big"
            assert raw.parse().model == "big"


@pytest.mark.parametrize("trouble", ["down", "refused", "429", "503", "500", "queue full"])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_fallback_takes_over(kit, trouble, stream):
    status = {"429": 429, "503": 503, "500": 500}.get(trouble, 500)
    bad = await kit.upstream(kit.raw(b"HTTP/1.1 %d X\r\ncontent-length: 2\r\n\r\n{}" % status))
    good = await kit.upstream()
    ends = () if trouble == "down" else (bad.endpoint("bad"),)
    if trouble == "refused":
        bad._server.close()
    if trouble == "queue full":
        bad.behave = kit.hold
    first = kit.service(*ends, name="first", policy=Policy(max_running=1, max_queued_requests=0))
    services = (first, kit.service(good.endpoint("good"), name="second"))
    rules = [{"to": [{"service": "first"}], "fallback": [{"service": "missing"}, {"service": "second"}]}]
    async with kit.gateway(*services) as gw, httpx.AsyncClient(base_url=gw.url) as client:
        gw.gateway.use(routed(kit, *services, rules=rules))
        holding = None
        if trouble == "queue full":
            holding = asyncio.create_task(client.post(CHAT, json={**BODY, "model": "first"}))
            await kit.until(lambda: bad.seen)
        answer = await client.post(CHAT, json={**BODY, "stream": stream})
        assert answer.status_code == 200
        assert answer.headers["x-mainsail-answered-by"] == "default/second"
        assert answer.text.endswith("data: [DONE]\n\n") == stream
        if holding is not None:
            bad.release.set()
            await holding


async def test_nobody_can_and_what_is_no_reason_to_ask_another(kit):
    bad = await kit.upstream(kit.raw(b"HTTP/1.1 400 X\r\ncontent-length: 2\r\n\r\n{}"))
    good = await kit.upstream()
    services = (kit.service(bad.endpoint("bad"), name="first"), kit.service(good.endpoint("good"), name="second"))
    rules = [
        {"when": {"tools": True}, "to": [{"service": "missing"}], "fallback": [{"service": "gone"}]},
        {"when": {"maxPromptTokens": 100}, "to": [{"service": "first"}], "fallback": [{"service": "second"}]},
    ]
    async with kit.gateway(*services) as gw, httpx.AsyncClient(base_url=gw.url) as client:
        gw.gateway.use(routed(kit, *services, rules=rules))
        assert (await client.post(CHAT, json=BODY)).status_code == 400
        assert (await client.post(CHAT, json={**BODY, "tools": [{}]})).status_code == 503
        long = {**BODY, "messages": [{"role": "user", "content": "word " * 1000}]}
        assert (await client.post(CHAT, json=long)).status_code == 404
    assert not good.seen


async def test_an_answer_that_fails_its_schema_is_asked_for_again(kit):
    def says(content: str):
        async def behave(up, seen, reader, writer):
            body = _answer(content)
            head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
            writer.write(head % len(body) + body)

        return behave

    small, big = await kit.upstream(says('{"age": "old"}')), await kit.upstream(says('{"age": 99}'))
    services = (kit.service(small.endpoint("s"), name="small"), kit.service(big.endpoint("b"), name="big"))
    on = ["Overloaded", "Down", "SchemaFailure"]
    rules = [{"to": [{"service": "small"}], "fallback": [{"service": "big"}], "fallbackOn": on}]
    async with kit.gateway(*services) as gw, httpx.AsyncClient(base_url=gw.url) as client:
        gw.gateway.use(routed(kit, *services, rules=rules))
        answer = await client.post(CHAT, json=STRUCTURED)
        assert json.loads(answer.json()["choices"][0]["message"]["content"]) == {"age": 99}
        assert answer.headers["x-mainsail-answered-by"] == "default/big"
        small.behave = says('{"age": 7}')
        answer = await client.post(CHAT, json=STRUCTURED)
        assert answer.headers["x-mainsail-answered-by"] == "default/small"
        assert len(big.seen) == 1
        labels = {"route": "smart", "target": "small"}
        assert gw.metric("mainsail:gateway_route_requests_total", **labels, outcome="SchemaFailure") == 1
        assert gw.metric("mainsail:gateway_route_requests_total", **labels, outcome="answered") == 1


@pytest.mark.parametrize("allowed", [True, False])
async def test_an_endpoint_outside_is_the_last_resort(kit, allowed):
    outside = await kit.upstream()
    url = f"http://127.0.0.1:{outside.port}/v1"
    external = {"url": url, "model": "other-model", "secretRef": {"name": "key"}}
    rules = [{"to": [{"service": "gone"}], "fallback": [{"external": external}]}]
    namespaces = ("default",) if allowed else ()
    async with kit.gateway(external_namespaces=namespaces) as gw, httpx.AsyncClient(base_url=gw.url) as client:
        gw.gateway.use(routed(kit, rules=rules))
        data = {"key": base64.b64encode(b"sk-outside").decode()}
        secret = Secret(metadata=Metadata(name="key", namespace="default"), data=data)
        gw.gateway.outside._secrets = {"default": {("default", "key"): secret}}
        headers = {"authorization": "Bearer own", "cookie": "a=b"}
        answer = await client.post(CHAT, json={**BODY, "stream": True}, headers=headers)
        if not allowed:
            assert answer.status_code == 503
            assert not outside.seen
            return
        assert answer.text.endswith("data: [DONE]\n\n")
        assert answer.headers["x-mainsail-answered-by"] == f"external/127.0.0.1:{outside.port}"
        assert outside.seen[0].head.startswith(b"POST /v1/chat/completions HTTP/1.1")
        assert outside.seen[0].header("authorization") == "Bearer sk-outside"
        assert outside.seen[0].header("cookie") is None
        assert json.loads(outside.seen[0].body)["model"] == "other-model"


async def test_a_key_that_may_use_the_name_only(kit):
    up = await kit.upstream()
    services = (kit.service(up.endpoint(), name="small"),)
    async with kit.gateway(*services, auth="keys") as gw, httpx.AsyncClient(base_url=gw.url) as client:
        gw.gateway.use(routed(kit, *services, rules=[{"to": [{"service": "small"}]}]))
        data = {"key": b"sk-" + b"a" * 30, "models": b"smart"}
        secret = Secret(
            metadata=Metadata(name="k", namespace="ns"), data={k: base64.b64encode(v).decode() for k, v in data.items()}
        )
        gw.gateway.keys.use(*ring({("ns", "k"): secret}))
        headers = {"authorization": "Bearer sk-" + "a" * 30}
        assert (await client.post(CHAT, json=BODY, headers=headers)).status_code == 200
        assert (await client.post(CHAT, json={**BODY, "model": "small"}, headers=headers)).status_code == 403
        assert gw.metric("mainsail:gateway_key_requests_total", key="k", code="200") == 1


async def test_what_an_endpoint_outside_answers_is_charged_to_the_key(kit):
    outside = await kit.upstream()
    url = f"http://127.0.0.1:{outside.port}/v1"
    rules = [{"to": [{"external": {"url": url, "model": "other-model"}}]}]
    async with (
        kit.gateway(auth="keys", external_namespaces=("default",)) as gw,
        httpx.AsyncClient(base_url=gw.url) as client,
    ):
        gw.gateway.use(routed(kit, rules=rules))
        key = "sk-" + "a" * 30
        data = {"key": base64.b64encode(key.encode()).decode()}
        secret = Secret(metadata=Metadata(name="k", namespace="ns"), data=data)
        gw.gateway.keys.use(*ring({("ns", "k"): secret}))
        headers = {"authorization": f"Bearer {key}"}
        answer = await client.post(CHAT, json={**BODY, "stream": True}, headers=headers)
        events = answer.text.count("data: ")
        assert events > 0
        assert gw.metric("mainsail:gateway_key_tokens_total", key="k", kind="completion") == events


async def test_a_fallback_that_was_deleted_meanwhile_is_no_failure_of_the_gateway(kit):
    """The routing table changes while the first target is asked."""
    small, big = await kit.upstream(), await kit.upstream()
    services = kit.service(small.endpoint(), name="small"), kit.service(big.endpoint(), name="big")
    rules = [{"to": [{"service": "small"}], "fallback": [{"service": "big"}], "fallbackOn": ["Down"]}]
    async with kit.gateway(*services) as gw, httpx.AsyncClient(base_url=gw.url) as client:
        gw.gateway.use(routed(kit, *services, rules=rules))

        async def stop(up, seen, reader, writer) -> None:
            gw.gateway.use(routed(kit, services[0], rules=rules))
            writer.write(b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 2\r\n\r\n{}")
            await writer.drain()

        small.behave = stop
        answer = await client.post(CHAT, json=BODY)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_capacity")
        assert not big.seen
