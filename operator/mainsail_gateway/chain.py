"""A request for a virtual model: one target after another until one answers.

`virtual.py` says whom to ask and in which order; here they are asked. Each try sees the client through an `Attempt`, so
a try that comes to nothing leaves no trace; the last one's answer is the answer, whatever it is. The body goes on with
the target's own name as its `model`, so the answer's `model` says who really answered, as does its header
`X-Mainsail-Answered-By`.
"""

import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter

from mainsail_gateway import request, schema
from mainsail_gateway.admission import PRIORITY_HEADER, Admission
from mainsail_gateway.asgi import Headers, Receive, Scope
from mainsail_gateway.attempt import Attempt
from mainsail_gateway.auth import ApiKey
from mainsail_gateway.errors import GatewayError, no_capacity
from mainsail_gateway.external import Outside
from mainsail_gateway.hold import Reply
from mainsail_gateway.keys import Charge
from mainsail_gateway.record import Record
from mainsail_gateway.routes import Service, Table
from mainsail_gateway.sessions import LEAST_TOKENS
from mainsail_gateway.shed import DEFAULT_PRIORITIES
from mainsail_gateway.split import Sticky
from mainsail_gateway.virtual import (
    Event,
    Facts,
    Rule,
    Splits,
    State,
    Target,
    Virtual,
    choose,
    event_of,
    matching,
    order,
)

log = logging.getLogger(__name__)

ANSWERED_BY = b"x-mainsail-answered-by"
SESSION_HEADERS = (b"x-session-id", b"x-conversation-id")


def header(headers: Headers, names: Sequence[bytes]) -> str | None:
    """The first of these headers that the request has, if it says anything."""
    return next((value.decode("latin-1") for name, value in headers if name in names and value), None)


@dataclass(slots=True)
class Asked:
    """A request, read and let in: what the client sent, and how to answer it."""

    scope: Scope
    body: bytes
    parsed: request.Parsed
    key: ApiKey | None
    arrived: float
    sticky: Sticky | None
    receive: Receive
    reply: Reply
    charge: Charge = field(default_factory=lambda: Charge(None))
    record: Record | None = None
    """What will be told of it."""

    def chain(self) -> request.Chain | None:
        """The conversation that it is a turn of; None where it has too little to lose to be held."""
        if self.parsed.prompt_tokens < LEAST_TOKENS:
            return None
        return self.parsed.chain(header(self.scope["headers"], SESSION_HEADERS))


Serve = Callable[[Asked, Service, bytes, Attempt], Awaitable[int]]
"""Have a service answer with this body through this attempt; the answer's status."""


class Chain:
    def __init__(self, admission: Admission, outside: Outside, serve: Serve, registry: CollectorRegistry) -> None:
        self.splits = Splits()
        self._admission = admission
        self._outside = outside
        self._serve = serve
        self._count = Counter(
            "mainsail:gateway_route_requests",
            "What a ModelRoute's targets were asked, by what came of it: answered, or the event that led to the next.",
            ("namespace", "route", "target", "outcome"),
            registry=registry,
        )

    def plan(self, route: Virtual, asked: Asked, table: Table) -> tuple[Rule, list[Target]]:
        """The rule that fits, and whom to ask in order. Raises a 404."""
        number = matching(route.rules, facts(asked))
        if number is None:
            message = f"No rule of the model `{asked.parsed.model}` fits this request."
            raise GatewayError(404, message, code="model_not_found", param="model")
        rule = route.rules[number]
        chosen = choose(rule, self.splits.of(route.key, number), asked.sticky)
        states: dict[str, State] = {target.name: self._state(route, target, table) for target in chosen}
        return rule, order(chosen, states, rule.fallbackOn)

    def _state(self, route: Virtual, target: Target, table: Table) -> State:
        if target.external is not None:
            return "ready" if self._outside.may(route.key[0], target.external) else "down"
        door = self._admission.doors.get((route.key[0], target.service or ""))
        if door is None or not door.shedder.replicas:
            if door is not None:
                door.want()
            return "down"
        return "busy" if door.shedder.busy else "ready"

    async def answer(self, route: Virtual, asked: Asked, table: Table) -> int:
        """Answer it; the status. Raises what the last one raised."""
        rule, targets = self.plan(route, asked, table)
        check = schema.check(asked.body) if "SchemaFailure" in rule.fallbackOn and not asked.parsed.stream else None
        for target in targets[:-1]:
            attempt = Attempt(asked.reply, rule.fallbackOn, check, _named(route, target))
            event, status = await self._try(route, target, asked, table, attempt, rule)
            self._counted(route, target, event or "answered")
            if event is None:
                return status
            log.info("%s/%s: %s: %s; the next is asked", *route.key, target.name, event)
        last = targets[-1]
        status = await self._ask(route, last, asked, table, Attempt(asked.reply, (), None, _named(route, last)))
        self._counted(route, last, "answered")
        return status

    async def _try(
        self, route: Virtual, target: Target, asked: Asked, table: Table, attempt: Attempt, rule: Rule
    ) -> tuple[Event | None, int]:
        """Why the next is to be asked, if it is; the status."""
        try:
            status = await self._ask(route, target, asked, table, attempt)
        except GatewayError as error:
            event = None if error.code == "deadline_exceeded" else event_of(error.status)
            if event is None or event not in rule.fallbackOn:
                raise
            return event, error.status
        return attempt.dropped, status

    def _counted(self, route: Virtual, target: Target, outcome: str) -> None:
        self._count.labels(*route.key, target.name, outcome).inc()

    async def _ask(self, route: Virtual, target: Target, asked: Asked, table: Table, attempt: Attempt) -> int:
        if target.external is not None:
            if not self._outside.may(route.key[0], target.external):
                raise no_capacity(asked.parsed.model, 5.0)
            body = request.renamed(asked.body, target.external.model)
            path: str = asked.scope["path"]
            return await self._outside.answer(
                route.key[0], target.external, path, body, asked.receive, asked.charge.meter(attempt.send)
            )  # fmt: skip
        service = table.services.get((route.key[0], target.service or ""))
        if service is None or service.key not in self._admission.doors:  # deleted while another was asked
            raise no_capacity(asked.parsed.model, 5.0)
        return await self._serve(asked, service, request.renamed(asked.body, service.served_names[0]), attempt)


def _named(route: Virtual, target: Target) -> Headers:
    place = "external" if target.external is not None else route.key[0]
    return [(ANSWERED_BY, f"{place}/{target.name}".encode("latin-1", "replace"))]


def facts(asked: Asked) -> Facts:
    """What rules may ask about a request."""
    headers: Headers = asked.scope["headers"]
    named = next((value.decode("latin-1") for name, value in headers if name == PRIORITY_HEADER), None)
    allowed = asked.key.priority if asked.key is not None else None
    bulk = any(DEFAULT_PRIORITIES.get(name or "", 0) < 0 for name in (named, allowed))
    parsed = asked.parsed
    return Facts(parsed.prompt_tokens, parsed.tools, parsed.structured, bulk, headers)
