"""The ASGI application: which path, which body, which service; errors in OpenAI's form; the rest is relay.py's.

`GET /v1/models` and `GET /v1/models/{name}` are answered here, from the routing table. `POST /v1/…` with a JSON body
goes to the service whose served names hold the body's `model`. Paths are matched against a plain pattern and never
decoded or rewritten, so none can climb out of `/v1/`.
"""

import asyncio
import hashlib
import logging
import re
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Generator, Mapping
from contextlib import asynccontextmanager, contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import msgspec

from mainsail_gateway import admission, auth, balance, request, request_id
from mainsail_gateway.admission import Admission, Door
from mainsail_gateway.asgi import GONE, Headers, Message, OnGone, Receive, Scope, Send
from mainsail_gateway.attempt import Attempt, stopping
from mainsail_gateway.auth import CREDENTIALS, ApiKey
from mainsail_gateway.chain import SESSION_HEADERS, Asked, Chain, header
from mainsail_gateway.errors import (
    GatewayError,
    bad_request,
    no_capacity,
    send_error,
    too_large,
    too_many_clients,
    unknown_model,
)
from mainsail_gateway.external import Outside
from mainsail_gateway.fleet import Fleet, Pool
from mainsail_gateway.health import Health
from mainsail_gateway.hold import Reply
from mainsail_gateway.journal import NO_FAILOVER_HEADER
from mainsail_gateway.keys import Charge, Keys
from mainsail_gateway.metrics import Metrics
from mainsail_gateway.record import Record, Recorder
from mainsail_gateway.relay import CLIENT_GONE, BrokenOff, Call, ClientGone, Relay
from mainsail_gateway.routes import Endpoint, Service, Table, visible
from mainsail_gateway.settings import Settings
from mainsail_gateway.shed import Ticket
from mainsail_gateway.split import Sticky
from mainsail_gateway.turns import AllTurns
from mainsail_gateway.upstream import ConnectionPool
from mainsail_gateway.usage import Usage
from mainsail_gateway.virtual import Virtual

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

log = logging.getLogger(__name__)

_PATH = re.compile(rb"/v1(?:/(?!\.\.?(?:/|$))[A-Za-z0-9._~:-]+)+")
_MODEL_PATH = re.compile(r"/v1/models/(.+)")
_OF_ONE_ENGINE = frozenset({"/v1/load_lora_adapter", "/v1/unload_lora_adapter"})
"""What only an engine itself is asked: through the gateway one replica of several would change, at anybody's wish."""
_CLOSE: Headers = [(b"connection", b"close")]
_OPEN_PATHS = ("/health", "/health/ready", "/health/live")
STOPPING_S, STOPPING_TRIES = 0.25, 40
"""How often, and how many times, a service is asked again whose last replica stops."""
LINGER_S = 2.0
"""How long a refused body is still read, so that its sender sees the refusal instead of a reset."""
USER_HEADERS = (b"x-user-id",)
_NOTHING: Mapping[str, OnGone] = MappingProxyType({})
_NO_EXTENSIONS: Mapping[str, Mapping[str, OnGone]] = MappingProxyType({})


async def _unheard(message: Message) -> None:
    """Where the heartbeats for a client of another gateway go."""
    del message


_UNHEARD = Reply(_unheard)


class Gateway:
    """One gateway: the table, the balancer's memory, the connections, and the application over them."""

    def __init__(
        self, settings: Settings, traces: "TracerProvider | None" = None, *, most_clients: int = sys.maxsize
    ) -> None:
        """most_clients: connections that are served at the same time; others are refused."""
        self.settings = settings
        self.most_clients = most_clients
        self.num_clients: Callable[[], int] = int
        """How many are connected; the server says so."""
        self.health = Health()
        self.metrics = Metrics()
        self.table = Table()
        self.fleet = Fleet()
        self.connections = ConnectionPool(
            connect_timeout_s=settings.connect_timeout_s, idle_s=settings.upstream_idle_s, most=most_clients
        )
        self.admission = Admission(settings.workers)
        self.metrics.registry.register(self.admission)
        self.turns = AllTurns()
        self.metrics.registry.register(self.turns)
        self.wake: Callable[[], None] | None = None
        """Called when a request begins to wait for a replica."""
        self.scrape: Callable[[], None] | None = None
        """Called when there are endpoints that have not said anything yet."""
        self.keys = Keys() if settings.auth == "keys" else None
        if self.keys is not None:
            self.metrics.registry.register(self.keys)
        self.recorder = Recorder(access_log=settings.access_log, provider=traces)
        self.outside = Outside(response_timeout_s=settings.response_timeout_s, namespaces=settings.external_namespaces)
        self.chain = Chain(self.admission, self.outside, self._serve_virtual, self.metrics.registry)
        self.relay = Relay(self.connections, settings, self._extra_headers)

    def use(self, table: Table) -> None:
        """Route by `table` from now on."""
        now = time.monotonic()
        self.table = table
        known = {key for pool in self.fleet.pools.values() for key in pool.endpoints}
        self.fleet.update(table, now)
        if self.scrape is not None and any(pool.endpoints.keys() - known for pool in self.fleet.pools.values()):
            self.scrape()
        self.turns.update(self.fleet.pools)
        self.metrics.update(table, now)
        self.admission.update(table, now)
        self.chain.splits.retain({route.key for route in table.virtual.values()})
        self.connections.retain({e.key for service in table.services.values() for e in service.endpoints})
        self.health.synced = True

    def heard(self, now: float) -> None:
        """The engines have said what they have."""
        for key, pool in self.fleet.pools.items():
            if (door := self.admission.doors.get(key)) is not None:
                door.hear(pool.loads.values(), now)

    async def run(self) -> None:
        """Heartbeat and sweeps, until cancelled."""
        settings = self.settings
        pause = min(1.0, settings.idle_timeout_s / 4, settings.response_timeout_s / 4)
        while True:
            self.health.beat = time.monotonic()
            now = asyncio.get_running_loop().time()
            self.relay.sweep(now)
            self.turns.tick(self.health.beat)
            self.connections.sweep(now)
            await asyncio.sleep(pause)

    def _extra_headers(self) -> Headers:
        return _CLOSE if self.health.draining else []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        name = request_id.named(scope)
        send = request_id.telling(name, send)
        record = self.recorder.begin(scope, name)
        if record is None:
            await self._answer(scope, receive, send, None)
            return
        status = 500
        try:
            status = await self._answer(scope, receive, send, record)
        finally:
            self.recorder.end(record, status)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, record: Record | None) -> int:
        """Answer whatever comes; the status."""
        lingering = False
        status = 200
        reply = Reply(send)
        try:
            status = await self._dispatch(scope, receive, reply, record)
        except GatewayError as error:
            status = error.status
            lingering = error.status in (408, 413)
            extra = _CLOSE if lingering or self.health.draining else []
            await send_error(reply.send, error, extra, more=lingering)
        except ClientGone:
            return CLIENT_GONE
        except BrokenOff as error:
            log.info("a client's connection is cut: %s", error)
            return 502
        if lingering:
            await _linger(receive)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        return status

    async def _dispatch(self, scope: Scope, receive: Receive, reply: Reply, record: Record | None) -> int:
        method: str = scope["method"]
        path: str = scope["path"]
        key: ApiKey | None = None
        try:
            if self.num_clients() > self.most_clients and path not in _OPEN_PATHS:
                raise too_many_clients()
            if self.keys is not None and path not in _OPEN_PATHS:
                key = self.keys.check(scope["headers"])
            table = self._table(scope)
            if method in ("GET", "HEAD") and (answer := self._own(path, key, table)) is not None:
                await self._send_json(reply.send, answer)
                return 200
            if not _PATH.fullmatch(scope["raw_path"]) or path in _OF_ONE_ENGINE:
                raise GatewayError(404, f"Unknown path {path[:200]}. The API is under /v1/.", code="not_found")
            if method != "POST":
                allow: Headers = [(b"allow", b"POST")]
                raise GatewayError(405, f"{path[:200]} takes POST, not {method}.", code="bad_method", headers=allow)
            arrived = time.monotonic()
            body = await self._body(scope, receive)
            parsed = request.parse(body)
            _must_be_allowed(key, parsed.model)
            route = table.virtual.get(parsed.model)
            service = self._service(parsed.model, table) if route is None else None
        except GatewayError as error:
            self.metrics.refused(error.status)
            if self.keys is not None and key is not None:
                self.keys.count(key, error.status)
            raise
        asked = Asked(scope, body, parsed, key, arrived, _sticky(scope["headers"], parsed), receive, reply)
        if record is not None:
            record.asked = asked
            asked.record = record
        with self._charged(asked) as charge:
            if service is not None:
                charge.code = await self._relay(self._call(asked, service, body), asked, reply, charge)
            elif route is not None:
                asked.charge = charge
                charge.code = await self.chain.answer(route, asked, self.table)
        return charge.code

    async def _serve_virtual(self, asked: Asked, service: Service, body: bytes, attempt: Attempt) -> int:
        return await self._relay(self._call(asked, service, body), asked, attempt, asked.charge)

    def _table(self, scope: Scope) -> Table:
        if not self.settings.host_suffixes:
            return self.table
        host = next((value for name, value in scope["headers"] if name == b"host"), b"")
        return visible(self.table, host.decode("latin-1"), self.settings.host_suffixes)

    def _own(self, path: str, key: ApiKey | None, table: Table) -> object | None:
        """What the gateway itself answers to a GET; None when the path is not its own."""
        if path == "/v1/models":
            known: dict[str, Service | Virtual] = {**table.models, **table.virtual}
            names = [name for name in sorted(known) if key is None or key.may_use(name)]
            return {"object": "list", "data": [_model_object(name, known[name]) for name in names]}
        if match := _MODEL_PATH.fullmatch(path):
            service = table.models.get(match[1]) or table.virtual.get(match[1])
            if service is None or (key is not None and not key.may_use(match[1])):
                raise unknown_model(match[1])
            return _model_object(match[1], service)
        if path in _OPEN_PATHS:
            check = self.health.live if path == "/health/live" else self.health.ready
            good, text = check(time.monotonic())
            if not good:
                raise GatewayError(503, text, code="not_ready", retry_after_s=1.0)
            return {"status": text}
        return None

    async def _relay(self, call: Call, asked: Asked, reply: Reply | Attempt, charge: Charge) -> int:
        """Have the call's service answer; the status.

        A service that may be at zero is asked again while its last replica is on its way out and the table does not say
        so yet: the request is held then, like those that come after it."""
        for _ in range(STOPPING_TRIES if call.service.policy.hold_requests else 0):
            attempt = Attempt(reply, ("Down",), None, [], means=stopping)
            try:
                code = await self._once(call, asked, attempt, charge)
            except GatewayError as error:
                if error.code != "no_capacity" or not call.sent or call.started:
                    raise
            else:
                if attempt.dropped is None:
                    return code
            await asyncio.sleep(STOPPING_S)
            service = self.table.services.get(call.service.key)
            if service is None:
                raise unknown_model(call.model)
            call = self._call(asked, service, call.body)
        return await self._once(call, asked, reply, charge)

    async def _once(self, call: Call, asked: Asked, reply: Reply | Attempt, charge: Charge) -> int:
        metrics = self.metrics.of(call.service)
        if asked.record is not None:
            asked.record.call = call
        try:
            async with self._admitted(call, asked, reply) as pool:
                await self.relay.forward(call, pool, metrics, asked.receive, charge.meter(reply.send))
        except GatewayError as error:
            call.code = error.status
            raise
        except ClientGone:
            call.code = CLIENT_GONE
            raise
        except BrokenOff:
            call.code = 502
            raise
        finally:
            (call.pod or metrics).count(call.code)
            metrics.duration.observe(time.monotonic() - call.arrived)
        return call.code

    @contextmanager
    def _charged(self, asked: Asked) -> Generator[Charge]:
        """Inside, the request counts against its key's limits. Raises a 429."""
        key = asked.key
        if self.keys is None or key is None:
            yield Charge(None)
            return
        weight = asked.parsed.weight
        charge = Charge(Usage(asked.parsed.prompt_tokens))
        try:
            account = self.keys.take(key, weight)
        except GatewayError as error:
            self.keys.count(key, error.status)
            self.metrics.refused(error.status)
            raise
        try:
            yield charge
        except GatewayError as error:
            charge.code = error.status
            raise
        finally:
            self.keys.settle(key, account, weight, charge)

    @asynccontextmanager
    async def picked(
        self, scope: Scope, body: bytes, receive: Receive, subset: Collection[str]
    ) -> AsyncGenerator[tuple[Endpoint, Call]]:
        """Inside, a request runs at the endpoint that this gives, sent there by somebody else, who sets `call.code`.

        subset: the addresses that may be chosen; empty: all. Raises GatewayError."""
        key = self.keys.check(scope["headers"]) if self.keys is not None else None
        parsed = request.parse(body)
        _must_be_allowed(key, parsed.model)
        service = self._service(parsed.model, self._table(scope))
        asked = Asked(scope, body, parsed, key, time.monotonic(), _sticky(scope["headers"], parsed), receive, _UNHEARD)
        call = self._call(asked, service, body)
        metrics = self.metrics.of(service)
        with self._charged(asked) as charge:
            try:
                async with self._admitted(call, asked, asked.reply) as pool:
                    avoid = {e.key for e in pool.endpoints.values() if subset and f"{e.host}:{e.port}" not in subset}
                    found = pool.pick(
                        call.prompt_tokens, call.prefixes, avoid, time.monotonic(), call.sticky, places=call.places
                    )  # fmt: skip
                    if found is None:
                        raise no_capacity(call.model, self.settings.retry_after_s)
                    endpoint, load, _ = found
                    call.at(metrics.pod(endpoint))
                    pool.index.learn(call.prefixes, endpoint.key)
                    if call.session is not None:
                        pool.sessions.begin(call.session, endpoint.key)
                    with pool.in_flight(found, call.prefixes) as flight:
                        call.on_first = _both(flight.answering, call.on_first)
                        yield endpoint, call
                    (balance.succeeded(load) if call.code < 500 else balance.failed(load, time.monotonic()))
            except GatewayError as error:
                call.code = error.status
                raise
            finally:
                charge.code = call.code
                (call.pod or metrics).count(call.code)
                metrics.duration.observe(time.monotonic() - call.arrived)

    def _beat(self, reply: Reply | Attempt) -> Callable[[], Awaitable[None]]:
        return lambda: reply.beat(self._extra_headers())

    def _pool(self, call: Call) -> Pool:
        pool = self.fleet.pools.get(call.service.key)
        if pool is None:  # deleted while the request waited
            raise unknown_model(call.model)
        return pool

    @asynccontextmanager
    async def _admitted(self, call: Call, asked: Asked, reply: Reply | Attempt) -> AsyncGenerator[Pool]:
        """Inside, the request runs; before it, it may wait. Raises what `Door.enter` does.

        Gives the service's endpoints as they are then."""
        door = self.admission.doors[call.service.key]
        stream = asked.parsed.stream
        ticket = admission.ticket(call, stream, asked.parsed.timeout_s, asked.key)
        if not call.service.endpoints and self.wake is not None:
            self.wake()
        beat = self._beat(reply) if stream else None
        turns = self.turns.of(call.service.key)
        chain = asked.chain() if call.service.endpoints else None
        if turns is not None and chain is not None:
            await turns.enter(call, chain, ticket, asked.receive, beat)
        try:
            async with self._through(door, ticket, call, asked, beat) as pool:
                yield pool
        finally:
            if turns is not None:
                turns.leave(call, time.monotonic())

    @asynccontextmanager
    async def _through(
        self, door: Door, ticket: Ticket, call: Call, asked: Asked, beat: Callable[[], Awaitable[None]] | None
    ) -> AsyncGenerator[Pool]:
        """Inside, it has been let in at the door."""
        await door.enter(ticket, call.model, asked.receive, beat, arrived=asked.arrived)
        if ticket.timeout_s is not None:
            call.deadline = ticket.since + ticket.timeout_s
        record = asked.record
        if record is not None:
            record.admitted = time.monotonic()

        def on_first(latency_s: float) -> None:
            door.answering(ticket, latency_s)
            if record is not None and record.first_s is None:
                record.first_s = latency_s

        call.on_first = on_first
        try:
            yield self._pool(call)
        finally:
            door.leave(ticket, call)

    def _call(self, asked: Asked, service: Service, body: bytes) -> Call:
        scope, parsed = asked.scope, asked.parsed
        query: bytes = scope["query_string"]
        headers: Headers = scope["headers"]
        if self.keys is not None:
            headers = [header for header in headers if header[0] not in CREDENTIALS]
        if asked.record is not None:
            headers = asked.record.onto(headers)
        return Call(
            method=b"POST",
            target=scope["raw_path"] + (b"?" + query if query else b""),
            headers=headers,
            body=body,
            model=parsed.model,
            weight=parsed.weight,
            prefixes=balance.prefix_keys(
                parsed.prompt,
                header(headers, SESSION_HEADERS) or parsed.session,
                parsed.anchor,
                parsed.cache_salt + (f"\0{parsed.model}" if parsed.model in service.adapters else ""),
            ),
            prompt_tokens=parsed.prompt_tokens,
            arrived=asked.arrived,
            service=service,
            sticky=asked.sticky,
            stream=parsed.stream,
            on_gone=scope.get("extensions", _NO_EXTENSIONS).get(GONE, _NOTHING).get("tell"),
            once=any(name == NO_FAILOVER_HEADER for name, _ in headers),
        )

    def _service(self, model: str, table: Table) -> Service:
        if not self.health.synced:
            raise no_capacity(model, 1.0)
        service = table.models.get(model)
        if service is None:
            raise unknown_model(model)
        return service

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """The whole body, within its limits of size and time."""
        limit = self.settings.max_body_bytes
        headers: Headers = scope["headers"]
        if sum(len(name) + len(value) for name, value in headers) > self.settings.max_header_bytes:
            message = f"The request's headers are larger than {self.settings.max_header_bytes} bytes."
            raise GatewayError(431, message, code="headers_too_large")
        if any(name == b"content-encoding" and value.lower() != b"identity" for name, value in headers):
            raise bad_request("Compressed request bodies are not supported.", param=None, code="unsupported_encoding")
        length = next((value for name, value in headers if name == b"content-length"), b"0")
        if int(length) > limit:
            raise too_large(limit)
        try:
            async with asyncio.timeout(self.settings.body_timeout_s):
                return await _read_body(receive, limit)
        except TimeoutError:
            message = f"The request's body did not arrive within {self.settings.body_timeout_s:g} s."
            raise GatewayError(408, message, code="request_timeout") from None

    async def _send_json(self, send: Send, value: object) -> None:
        body = msgspec.json.encode(value)
        headers: Headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        start: Message = {"type": "http.response.start", "status": 200, "headers": headers + self._extra_headers()}
        await send(start)
        await send({"type": "http.response.body", "body": body, "more_body": False})
        self.metrics.refused(200)


def _both(first: Callable[[], None], then: Callable[[float], None] | None) -> Callable[[float], None]:
    def on_first(latency_s: float) -> None:
        first()
        if then is not None:
            then(latency_s)

    return on_first


def _must_be_allowed(key: ApiKey | None, model: str) -> None:
    """Raises a 403, whether there is such a model or not: a key learns nothing of names that are not for it."""
    if key is not None and not key.may_use(model):
        raise auth.forbidden(key, model)


def _sticky(headers: Headers, parsed: request.Parsed) -> Sticky | None:
    """The session or user, while several revisions or services have a weight; else the conversation, by its anchor."""
    name = header(headers, SESSION_HEADERS) or parsed.session or header(headers, USER_HEADERS)
    if name is not None:
        return Sticky(name)
    if parsed.continued or len(parsed.anchor) >= balance.PREFIX_LENGTHS[0]:
        return Sticky(hashlib.blake2b(parsed.anchor, digest_size=16).hexdigest(), firm=parsed.continued)
    return None


def _model_object(name: str, service: Service | Virtual) -> dict[str, Any]:
    model: dict[str, Any] = {"id": name, "object": "model", "created": service.created, "owned_by": "mainsail"}
    if isinstance(service, Service) and service.max_model_len is not None:
        model["max_model_len"] = service.max_model_len
    return model


async def _read_body(receive: Receive, limit: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        part: bytes = message.get("body", b"")
        size += len(part)
        if size > limit:
            raise too_large(limit)
        parts.append(part)
        if not message.get("more_body", False):
            return parts[0] if len(parts) == 1 else b"".join(parts)


async def _linger(receive: Receive) -> None:
    try:
        async with asyncio.timeout(LINGER_S):
            while (message := await receive())["type"] != "http.disconnect" and message.get("more_body", False):
                pass
    except TimeoutError:
        return
