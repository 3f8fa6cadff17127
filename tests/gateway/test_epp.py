"""The endpoint picker as Envoy speaks to it: a real gRPC client, both ways of sending bodies, refusals, accounts."""

import asyncio
import json
from contextlib import asynccontextmanager

import grpc
import grpc.aio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mainsail_gateway import ext_proc
from mainsail_gateway.epp import DESTINATION, PIECE_BYTES, Picker
from mainsail_gateway.routes import Endpoint
from mainsail_gateway.shed import Policy

BODY = json.dumps({"model": "m", "stream": True, "messages": [{"role": "user", "content": "hi"}]}).encode()
ENDS = [Endpoint(f"k{i}", f"10.0.0.{i}", 8000, f"pod-{i}", "r") for i in range(2)]


def headers(*more: tuple[str, str], **config):
    pairs = [(":method", "POST"), (":path", "/v1/chat/completions"), (":authority", "x"), *more]
    values = [{"key": key, "raw_value": value.encode()} for key, value in pairs]
    return ext_proc.Request(request_headers={"headers": {"headers": values}}, **config)


def body(data: bytes, end: bool = True):
    return ext_proc.Request(request_body={"body": data, "end_of_stream": end})


def status(code: int):
    header = {"key": ":status", "raw_value": str(code).encode()}
    return ext_proc.Request(response_headers={"headers": {"headers": [header]}})


class Envoy:
    """One HTTP request's stream."""

    def __init__(self, call) -> None:
        self._call = call

    async def tell(self, message):
        await self._call.write(message)
        return await self.hear()

    async def say(self, message) -> None:
        await self._call.write(message)

    async def hear(self):
        async with asyncio.timeout(120):
            return await self._call.read()

    async def end(self) -> None:
        await self._call.done_writing()
        assert await self.hear() == grpc.aio.EOF  # pyright: ignore[reportAttributeAccessIssue]


@asynccontextmanager
async def picking(kit, *services, **settings):
    async with kit.gateway(*services, **settings) as gw:
        picker = Picker(gw.gateway, "127.0.0.1", 0)
        await picker.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{picker.port}") as channel:
            method = channel.stream_stream(
                "/" + "/".join(ext_proc.METHOD),
                request_serializer=ext_proc.Request.SerializeToString,
                response_deserializer=ext_proc.Response.FromString,
            )
            yield gw, lambda: Envoy(method())
        await picker.stop(1.0)


def chosen(common, metadata) -> str:
    (option,) = common.header_mutation.set_headers
    assert option.header.key == DESTINATION
    address = option.header.raw_value.decode()
    assert metadata["envoy.lb"][DESTINATION] == address
    return address


async def test_a_buffered_body_and_the_whole_life_of_a_request(kit):
    async with picking(kit, kit.service(*ENDS)) as (gw, envoy):
        stream = envoy()
        assert (await stream.tell(headers())).WhichOneof("kind") == "request_headers"
        answer = await stream.tell(body(BODY))
        address = chosen(answer.request_body.response, answer.dynamic_metadata)
        assert answer.request_body.response.clear_route_cache
        assert address in {f"{e.host}:{e.port}" for e in ENDS}
        loads = gw.gateway.fleet.pools["default", "m"].loads
        assert sum(load.requests for load in loads.values()) == 1
        other = envoy()
        await other.tell(headers())
        second = await other.tell(body(BODY))
        assert chosen(second.request_body.response, second.dynamic_metadata) != address, "the least loaded one"
        to_compute = sum(load.prefill for load in loads.values())
        assert (await stream.tell(status(200))).WhichOneof("kind") == "response_headers"
        assert 0 < sum(load.prefill for load in loads.values()) < to_compute, "its prompt is computed"
        end = ext_proc.Request(response_body={"body": b"data: x\n\n", "end_of_stream": True})
        assert (await stream.tell(end)).WhichOneof("kind") == "response_body"
        await stream.end()
        await kit.until(lambda: sum(load.requests for load in loads.values()) == 1)
        assert gw.metric("mainsail:gateway_requests_total", service="m", code="200") == 1
        await other.end()  # a client that left
        await kit.until(lambda: gw.metric("mainsail:gateway_requests_total", service="m", code="499") == 1)
        assert gw.metric("mainsail:gateway_admitted_requests", service="m") == 0


@pytest.mark.parametrize("trailers", [False, True])
async def test_pieces_are_sent_back_as_they_came(kit, trailers):
    duplex = {"request_body_mode": ext_proc.FULL_DUPLEX_STREAMED, "response_body_mode": ext_proc.FULL_DUPLEX_STREAMED}
    whole = json.dumps({"model": "m", "prompt": "x" * (2 * PIECE_BYTES)}).encode()
    async with picking(kit, kit.service(*ENDS)) as (_, envoy):
        stream = envoy()
        await stream.say(headers(protocol_config=duplex))
        for start in range(0, len(whole), 50_000):
            await stream.say(body(whole[start : start + 50_000], end=not trailers and start + 50_000 >= len(whole)))
        if trailers:
            await stream.say(ext_proc.Request(request_trailers={}))
        first = await stream.hear()
        assert chosen(first.request_headers.response, first.dynamic_metadata)
        back, ended = b"", False
        while len(back) < len(whole):
            piece = (await stream.hear()).request_body.response.body_mutation.streamed_response
            assert len(piece.body) <= PIECE_BYTES
            back, ended = back + piece.body, piece.end_of_stream
        assert (back, ended) == (whole, not trailers)
        if trailers:
            assert (await stream.hear()).WhichOneof("kind") == "request_trailers"
        await stream.tell(status(200))
        answer = await stream.tell(ext_proc.Request(response_body={"body": b"abc", "end_of_stream": True}))
        echoed = answer.response_body.response.body_mutation.streamed_response
        assert (echoed.body, echoed.end_of_stream) == (b"abc", True)
        await stream.end()


@pytest.mark.parametrize(
    ("data", "code", "status_code"),
    [
        (b"{", "invalid_value", 400),
        (b'{"model": "nope"}', "model_not_found", 404),
        (b'{"model": "m"}', "no_capacity", 503),
        (b"x" * 2000, "request_too_large", 413),
    ],
)
async def test_refusals_are_immediate_and_in_openais_form(kit, data, code, status_code):
    async with picking(kit, kit.service(), max_body_bytes=1000) as (_, envoy):
        stream = envoy()
        await stream.tell(headers())
        answer = (await stream.tell(body(data))).immediate_response
        assert answer.status.code == status_code
        assert json.loads(answer.body)["error"]["code"] == code
        found = {option.header.key: option.header.raw_value for option in answer.headers.set_headers}
        assert ("retry-after" in found) == (status_code == 503)
        await stream.end()


async def test_overload_and_who_waits(kit):
    policy = Policy(max_running=1, max_queued_requests=1)
    async with picking(kit, kit.service(ENDS[0], policy=policy)) as (gw, envoy):
        streams = [envoy() for _ in range(3)]
        for stream in streams:
            await stream.tell(headers())
        assert (await streams[0].tell(body(BODY))).WhichOneof("kind") == "request_body"
        await streams[1].say(body(BODY))
        await kit.until(lambda: gw.metric("mainsail:gateway_queued_requests") == 1)
        assert (await streams[2].tell(body(BODY))).immediate_response.status.code == 429
        await streams[0].end()
        assert (await streams[1].hear()).WhichOneof("kind") == "request_body"
        await streams[1].end()


@pytest.mark.parametrize("hint", [["10.0.0.1:8000"], "10.0.0.1:8000, 10.9.9.9:1"])
async def test_a_subset(kit, hint):
    async with picking(kit, kit.service(*ENDS)) as (_, envoy):
        for _ in range(4):
            stream = envoy()
            value = {"x-gateway-destination-endpoint-subset": hint}
            subset = {"filter_metadata": [{"key": "envoy.lb.subset_hint", "value": value}]}
            await stream.tell(headers(metadata_context=subset))
            answer = await stream.tell(body(BODY))
            assert chosen(answer.request_body.response, answer.dynamic_metadata) == "10.0.0.1:8000"
            await stream.end()


async def test_a_subset_bounds_who_came_while_the_request_waited(kit):
    asleep = kit.service(policy=Policy(hold_requests=10))
    async with picking(kit, asleep) as (gw, envoy):
        stream = envoy()
        value = {"x-gateway-destination-endpoint-subset": "10.0.0.1:8000"}
        subset = {"filter_metadata": [{"key": "envoy.lb.subset_hint", "value": value}]}
        await stream.tell(headers(metadata_context=subset))
        await stream.say(body(BODY))
        await kit.until(lambda: gw.metric("mainsail:gateway_held_requests", service="m") == 1)
        gw.gateway.use(kit.table(kit.service(*ENDS, policy=asleep.policy)))
        answer = await stream.hear()
        assert chosen(answer.request_body.response, answer.dynamic_metadata) == "10.0.0.1:8000"
        await stream.end()


@given(st.binary(max_size=200))
def test_what_envoy_may_send_beside_is_no_matter(data):
    try:
        message = ext_proc.Request.FromString(data)
    except Exception:
        return
    assert message.WhichOneof("kind") in (None, *(f.name for f in ext_proc.Request.DESCRIPTOR.fields))
