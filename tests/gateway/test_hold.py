"""A service at zero: requests wait, hear of it, wake it, and are served in order; whoever leaves is forgotten."""

import asyncio
import json
from datetime import UTC, datetime

import httpx
import httpx2
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mainsail_gateway import hold
from mainsail_gateway.hold import WAKE_EVERY_S, annotation, due
from mainsail_gateway.shed import Policy

BODY = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
CHAT = "/v1/chat/completions"
ASLEEP = Policy(hold_requests=20, hold_for_s=60.0)


@pytest.fixture
def beats(monkeypatch):
    monkeypatch.setattr(hold, "BEAT_S", 0.05)


@given(st.sets(st.tuples(st.just("ns"), st.sampled_from("abc"))), st.floats(0, 20))
def test_a_service_is_woken_at_most_every_five_seconds(wanted, step):
    last: dict[tuple[str, str], float] = {}
    for i in range(10):
        now = i * step
        for key in due(wanted, last, now):
            assert now - last.get(key, -100) >= WAKE_EVERY_S
            last[key] = now
    assert set(last) == wanted


def test_the_annotation_is_a_time():
    patch = json.loads(annotation(datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)))
    assert patch == {"metadata": {"annotations": {"mainsail.dev/wake": "2026-01-02T03:04:05Z"}}}


async def test_held_requests_are_served_in_order_when_a_replica_comes(kit):
    up = await kit.upstream()
    async with kit.gateway(kit.service(policy=ASLEEP)) as gw, httpx.AsyncClient(timeout=30) as client:
        woken = []
        gw.gateway.wake = lambda: woken.append(1)
        tasks = []
        for i in range(20):
            tasks.append(asyncio.create_task(client.post(gw.url + CHAT, json={**BODY, "seed": i})))
            await kit.until(lambda n=i: gw.metric("mainsail:gateway_held_requests") == n + 1)
        refused = await client.post(gw.url + CHAT, json=BODY)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "no_capacity")
        assert refused.headers["retry-after"]
        one = Policy(hold_requests=20, hold_for_s=60.0, max_running=1)
        gw.gateway.use(kit.table(kit.service(up.endpoint(), policy=one)))
        answers = await asyncio.gather(*tasks)
        assert woken
        assert {answer.status_code for answer in answers} == {200}
        assert [json.loads(seen.body)["seed"] for seen in up.seen] == list(range(20))
        assert gw.metric("mainsail:gateway_held_requests") == 0


async def test_streams_hear_that_they_wait_and_go_on_as_usual(kit, beats):
    up = await kit.upstream()
    async with (
        kit.gateway(kit.service(policy=ASLEEP)) as gw,
        openai.AsyncOpenAI(base_url=gw.url + "/v1", api_key="x", max_retries=0) as client,
    ):
        stream = await client.chat.completions.create(**BODY, stream=True)  # the head is there before any replica
        assert gw.metric("mainsail:gateway_held_requests") == 1
        gw.gateway.use(kit.table(kit.service(up.endpoint(), policy=ASLEEP)))
        assert [e.choices[0].delta.content async for e in stream] == ["Hello", " world"]


async def test_what_goes_wrong_after_a_heartbeat_is_an_event(kit, beats):
    body = b'{"error": {"message": "no\\nway"}}\n'
    up = await kit.upstream(kit.raw(b"HTTP/1.1 400 X\r\ncontent-length: %d\r\n\r\n" % len(body) + body))
    async with (
        kit.gateway(kit.service(policy=ASLEEP)) as gw,
        openai.AsyncOpenAI(base_url=gw.url + "/v1", api_key="x", max_retries=0) as client,
    ):
        stream = await client.chat.completions.create(**BODY, stream=True)
        gw.gateway.use(kit.table(kit.service(up.endpoint(), policy=ASLEEP)))
        with pytest.raises(openai.APIError, match="no\nway"):
            [e async for e in stream]


async def test_holding_has_an_end(kit, beats):
    short = Policy(hold_requests=5, hold_for_s=0.2)
    async with (
        kit.gateway(kit.service(policy=ASLEEP), idle_timeout_s=0.4) as gw,
        httpx.AsyncClient(timeout=30) as client,
    ):
        whole = asyncio.create_task(client.post(gw.url + CHAT, json=BODY))
        async with client.stream("POST", gw.url + CHAT, json={**BODY, "stream": True}) as streamed:
            assert streamed.status_code == 200, "it has heard that it waits"
            await kit.until(lambda: gw.metric("mainsail:gateway_held_requests") == 2)
            gw.gateway.use(kit.table(kit.service(policy=short)))
            lines = [line async for line in streamed.aiter_lines()]
        assert '"code":"no_capacity"' in lines[-2]
        refused = await whole
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "no_capacity")


async def test_a_client_that_leaves_is_forgotten(kit):
    up = await kit.upstream()
    async with kit.gateway(kit.service(policy=ASLEEP)) as gw:
        tasks = []
        async with httpx.AsyncClient() as client:
            for _ in range(5):
                tasks.append(asyncio.create_task(client.post(gw.url + CHAT, json=BODY)))
            await kit.until(lambda: gw.metric("mainsail:gateway_held_requests") == 5)
            for task in tasks[:3]:
                task.cancel()
            await kit.until(lambda: gw.metric("mainsail:gateway_held_requests") == 2)
            gw.gateway.use(kit.table(kit.service(up.endpoint(), policy=ASLEEP)))
            await asyncio.gather(*tasks, return_exceptions=True)
        assert len(up.seen) == 2
        assert gw.metric("mainsail:gateway_requests_total", code="499") == 3


@pytest.mark.parametrize("how", ["draining", "refused"])
async def test_a_request_that_meets_the_last_replica_on_its_way_out_is_held_too(kit, how):
    old, new = await kit.upstream(kit.raw(b"HTTP/1.1 503 X\r\ncontent-length: 0\r\n\r\n")), await kit.upstream()
    if how == "refused":
        old._server.close()
    async with (
        kit.gateway(kit.service(old.endpoint("old"), policy=ASLEEP)) as gw,
        httpx.AsyncClient(timeout=30) as client,
    ):
        task = asyncio.create_task(client.post(gw.url + CHAT, json=BODY))
        await kit.until(lambda: gw.metric("mainsail:gateway_requests_total", pod="old", code="503") > 0)
        gw.gateway.use(kit.table(kit.service(policy=ASLEEP)))
        await kit.until(lambda: gw.metric("mainsail:gateway_held_requests") == 1)
        gw.gateway.use(kit.table(kit.service(new.endpoint("new"), policy=ASLEEP)))
        assert (await task).status_code == 200


async def test_a_service_deleted_while_requests_wait(kit):
    async with kit.gateway(kit.service(policy=ASLEEP)) as gw, httpx.AsyncClient() as client:
        task = asyncio.create_task(client.post(gw.url + CHAT, json=BODY))
        await kit.until(lambda: gw.metric("mainsail:gateway_held_requests") == 1)
        gw.gateway.use(kit.table())
        assert (await task).status_code == 503


async def test_overload_is_refused_at_once_and_running_requests_are_not_harmed(kit):
    up = await kit.upstream(kit.hold)
    policy = Policy(max_running=2, max_queued_requests=1)
    async with kit.gateway(kit.service(up.endpoint(), policy=policy)) as gw, httpx.AsyncClient(timeout=30) as client:
        ask = {**BODY, "stream": True}
        running = [asyncio.create_task(client.post(gw.url + CHAT, json=ask)) for _ in range(2)]
        await kit.until(lambda: len(up.seen) == 2)
        waiting = asyncio.create_task(client.post(gw.url + CHAT, json=ask))
        await kit.until(lambda: gw.metric("mainsail:gateway_queued_requests") == 1)
        refused = await client.post(gw.url + CHAT, json=BODY)
        assert (refused.status_code, refused.json()["error"]["type"]) == (429, "rate_limit_error")
        assert int(refused.headers["retry-after"]) >= 1
        assert gw.metric("mainsail:gateway_shed_total", reason="queue_full") == 1
        first = asyncio.create_task(client.post(gw.url + CHAT, json=BODY, headers={"x-mainsail-priority": "high"}))
        late = await waiting
        assert late.status_code == 429, "the queue's only place went to a higher priority"
        up.release.set()
        assert {(await task).status_code for task in (*running, first)} == {200}


@pytest.mark.parametrize(
    ("header", "value"),
    [("x-mainsail-priority", "royal"), *(("x-request-timeout", value) for value in ("soon", "-1", "nan"))],
)
async def test_odd_headers_are_named(kit, header, value):
    up = await kit.upstream()
    async with kit.gateway(kit.service(up.endpoint())) as gw, httpx.AsyncClient() as client:
        answer = await client.post(gw.url + CHAT, json=BODY, headers={header: value})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"].lower() == header


async def test_a_timeout_that_passes_before_an_answer(kit):
    up = await kit.upstream(kit.raw(b"", cut=False))
    async with kit.gateway(kit.service(up.endpoint())) as gw, httpx.AsyncClient(timeout=30) as client:
        answer = await client.post(gw.url + CHAT, json={**BODY, "timeout": 0.2})
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")


async def test_the_operator_is_asked_for_a_replica(kit, monkeypatch):
    monkeypatch.setattr(hold, "WAKE_EVERY_S", 600.0)  # once, however long this takes
    api = await kit.upstream(kit.raw(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}", cut=False))
    wanted: set[tuple[str, str]] = set()
    async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{api.port}") as client:
        waker = hold.Waker(client, lambda: wanted)
        task = asyncio.create_task(waker.run())
        wanted.add(("ns", "m"))
        waker.woken.set()
        waker.woken.set()
        await kit.until(lambda: api.seen)
        await asyncio.sleep(0.1)
        task.cancel()
    assert len(api.seen) == 1
    assert api.seen[0].head.startswith(b"PATCH /apis/mainsail.dev/v1alpha1/namespaces/ns/inferenceservices/m HTTP/1.1")
    assert api.seen[0].header("content-type") == "application/merge-patch+json"
    assert json.loads(api.seen[0].body)["metadata"]["annotations"]["mainsail.dev/wake"].endswith("Z")
