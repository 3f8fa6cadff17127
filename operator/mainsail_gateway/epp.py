"""An endpoint picker for gateways built on Envoy: our admission and balance behind the Gateway API Inference Extension.

With `--epp-port`, the gateway also serves Envoy's external processing protocol. Envoy sends a request's headers and
body; the answer names the pod, in the header and the metadata that the extension's endpoint picker protocol defines
(`x-gateway-destination-endpoint`). Refusals (429, 503, …) are immediate answers in OpenAI's form. What Envoy then
tells of the response ends the request's account, as does the end of the stream, so that load, limits and metrics are
those of the requests that went this way too.

Bodies come whole (BUFFERED) or in pieces that are sent back (FULL_DUPLEX_STREAMED), as Envoy says at the beginning.
grpcio is an optional part (`mainsail[epp]`), imported only then.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

from mainsail_gateway import ext_proc
from mainsail_gateway.asgi import Headers, Message, Scope
from mainsail_gateway.errors import GatewayError, too_large

if TYPE_CHECKING:
    from mainsail_gateway.app import Gateway
    from mainsail_gateway.relay import Call
    from mainsail_gateway.routes import Endpoint

log = logging.getLogger(__name__)

DESTINATION = "x-gateway-destination-endpoint"
METADATA = "envoy.lb"
SUBSET_METADATA, SUBSET = "envoy.lb.subset_hint", "x-gateway-destination-endpoint-subset"
PIECE_BYTES = 62 * 1024
"""Below the size of message that Envoy takes by default."""
_OVERWRITE = 2


class Stream:
    """One HTTP request, as Envoy tells of it."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._headers: Headers = []
        self._body: list[bytes] = []
        self._size = 0
        self._subset: frozenset[str] = frozenset()
        self._duplex = (False, False)
        """Whether pieces of the request's and of the response's body have to be sent back."""
        self._call: Call | None = None
        self._open = AsyncExitStack()

    async def close(self) -> None:
        await self._open.aclose()

    async def answers(self, message: Any) -> AsyncGenerator[Any]:
        """What to answer to one message."""
        try:
            async for answer in self._answers(message):
                yield answer
        except GatewayError as error:
            yield immediate(error)

    async def _answers(self, message: Any) -> AsyncGenerator[Any]:
        kind: str = message.WhichOneof("kind") or ""
        if kind == "request_headers":
            self._begin(message)
            if message.request_headers.end_of_stream:
                raise GatewayError(404, "The endpoint picker serves POST requests only.", code="not_found")
            if not self._duplex[0]:
                yield ext_proc.Response(request_headers={})
        elif kind == "request_body":
            self._collect(message.request_body.body)
            if message.request_body.end_of_stream:
                async for answer in self._picked(ends=True):
                    yield answer
            elif not self._duplex[0]:
                yield ext_proc.Response(request_body={})
        elif kind == "request_trailers":
            if self._call is None:
                async for answer in self._picked(ends=False):
                    yield answer
            yield ext_proc.Response(request_trailers={})
        else:
            for answer in self._response(kind, message):
                yield answer

    def _begin(self, message: Any) -> None:
        self._headers = [
            (header.key.lower().encode("latin-1", "replace"), header.raw_value or header.value.encode())
            for header in message.request_headers.headers.headers
        ]
        config = message.protocol_config
        duplex = ext_proc.FULL_DUPLEX_STREAMED
        self._duplex = (config.request_body_mode == duplex, config.response_body_mode == duplex)
        for entry in message.metadata_context.filter_metadata:
            if entry.key == SUBSET_METADATA and SUBSET in entry.value.fields:
                self._subset = frozenset(_texts(entry.value.fields[SUBSET]))

    def _collect(self, piece: bytes) -> None:
        self._size += len(piece)
        if self._size > self._gateway.settings.max_body_bytes:
            raise too_large(self._gateway.settings.max_body_bytes)
        self._body.append(piece)

    async def _picked(self, *, ends: bool) -> AsyncGenerator[Any]:
        """The request is here: choose, and send it on."""
        body = b"".join(self._body)
        picked = self._gateway.picked(self._scope(), body, _silence, self._subset)
        endpoint, self._call = await self._open.enter_async_context(picked)
        mutation, metadata = destination(endpoint)
        common = {"header_mutation": mutation, "clear_route_cache": True}
        if not self._duplex[0]:
            yield ext_proc.Response(request_body={"response": common}, dynamic_metadata=metadata)
            return
        yield ext_proc.Response(request_headers={"response": common}, dynamic_metadata=metadata)
        for start in range(0, max(1, len(body)), PIECE_BYTES):
            last = ends and start + PIECE_BYTES >= len(body)
            piece = {"body": body[start : start + PIECE_BYTES], "end_of_stream": last}
            yield ext_proc.Response(request_body=_streamed(piece))

    def _scope(self) -> Scope:
        path = next((value for name, value in self._headers if name == b":path"), b"/v1/completions")
        host = next((value for name, value in self._headers if name == b":authority"), b"")
        headers = [(name, value) for name, value in self._headers if not name.startswith(b":")]
        raw, _, query = path.partition(b"?")
        return {"type": "http", "method": "POST", "path": raw.decode("latin-1"), "raw_path": raw,
                "query_string": query, "headers": [(b"host", host), *headers]}  # fmt: skip

    def _response(self, kind: str, message: Any) -> list[Any]:
        """What the pod answered is let through; only what becomes of it is noted."""
        call = self._call
        if kind == "response_headers":
            status = next((_text(h) for h in message.response_headers.headers.headers if h.key == ":status"), "")
            if call is not None and status.isdigit():
                call.code = int(status)
                if call.on_first is not None and call.stream and call.code == 200:
                    call.on_first(time.monotonic() - call.sent)
            return [ext_proc.Response(response_headers={})]
        if kind == "response_body":
            body = message.response_body
            if self._duplex[1]:
                piece = {"body": body.body, "end_of_stream": body.end_of_stream}
                return [ext_proc.Response(response_body=_streamed(piece))]
            return [ext_proc.Response(response_body={})]
        return [ext_proc.Response(response_trailers={})] if kind == "response_trailers" else []


def destination(endpoint: Endpoint) -> tuple[dict[str, Any], dict[str, Any]]:
    """The header mutation and the metadata that name a pod."""
    host = f"[{endpoint.host}]" if ":" in endpoint.host else endpoint.host
    address = f"{host}:{endpoint.port}"
    header = {"key": DESTINATION, "raw_value": address.encode()}
    return {"set_headers": [{"header": header, "append_action": _OVERWRITE}]}, {METADATA: {DESTINATION: address}}


def immediate(error: GatewayError) -> Any:
    """A refusal as Envoy sends it to the client."""
    body = error.body()
    headers = [{"header": {"key": name.decode(), "raw_value": value}, "append_action": _OVERWRITE}
               for name, value in error.head(len(body)) if name != b"content-length"]  # fmt: skip
    return ext_proc.Response(
        immediate_response={"status": {"code": error.status}, "headers": {"set_headers": headers}, "body": body,
                            "details": error.code}
    )  # fmt: skip


def _streamed(piece: dict[str, Any]) -> dict[str, Any]:
    return {"response": {"body_mutation": {"streamed_response": piece}}}


def _text(header: Any) -> str:
    return (header.raw_value or header.value.encode()).decode("latin-1")


def _texts(value: Any) -> list[str]:
    """A subset hint: a list of addresses, or one text of them with commas."""
    texts = [item.string_value for item in value.list_value.values] or value.string_value.split(",")
    return [text.strip() for text in texts if text.strip()]


async def _silence() -> Message:
    """A client that never leaves: Envoy ends the stream instead, which cancels whoever waits."""
    await asyncio.get_running_loop().create_future()
    raise AssertionError("unreachable")


class Picker:
    """The gRPC server."""

    def __init__(self, gateway: Gateway, host: str, port: int) -> None:
        grpc: Any = importlib.import_module("grpc")
        aio: Any = importlib.import_module("grpc.aio")
        self._gateway = gateway
        self._server: Any = aio.server()
        service, method = ext_proc.METHOD
        handler = grpc.stream_stream_rpc_method_handler(
            self._process,
            request_deserializer=ext_proc.Request.FromString,
            response_serializer=ext_proc.Response.SerializeToString,
        )
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
        self.port: int = self._server.add_insecure_port(f"{host}:{port}")

    async def _process(self, requests: AsyncIterator[Any], context: Any) -> AsyncGenerator[Any]:
        del context
        stream = Stream(self._gateway)
        try:
            async for message in requests:
                async for answer in stream.answers(message):
                    yield answer
        finally:
            await stream.close()

    async def start(self) -> None:
        await self._server.start()
        log.info("the endpoint picker listens on port %d", self.port)

    async def stop(self, grace_s: float) -> None:
        await self._server.stop(grace_s)
