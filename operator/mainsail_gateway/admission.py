"""The door of each service: requests go in when shed.py says so, wait meanwhile, or are refused with what to do.

I/O around the policy: futures for those who wait, heartbeats for their clients, and an ear for clients that leave, who
are forgotten at once. A request that may start at once (the usual one) neither waits nor makes a task.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from mainsail_gateway import hold
from mainsail_gateway.asgi import Receive
from mainsail_gateway.auth import ApiKey
from mainsail_gateway.balance import Load
from mainsail_gateway.errors import GatewayError, bad_request
from mainsail_gateway.pod_metrics import Buckets
from mainsail_gateway.relay import Call
from mainsail_gateway.routes import Table
from mainsail_gateway.shed import Policy, Reason, Refused, Shedder, Ticket
from mainsail_gateway.watch import Key

_SHOWN: dict[Reason, tuple[int, str, str]] = {
    "queue_full": (429, "overloaded", "too many requests wait already"),
    "queue_time": (429, "overloaded", "it would wait too long for its turn"),
    "displaced": (429, "overloaded", "requests with more claim came, and the queue is full"),
    "deadline": (429, "deadline_exceeded", "its turn would come after its timeout"),
    "no_replica": (503, "no_capacity", "no replica is ready to serve"),
    "hold_full": (503, "no_capacity", "no replica is ready, and too many requests wait for one already"),
    "hold_time": (503, "no_capacity", "no replica became ready in time"),
}


PRIORITY_HEADER = b"x-mainsail-priority"
"""The name of a class of `spec.admission.priorities`."""
TIMEOUT_HEADER = b"x-request-timeout"
"""Seconds; like the field `timeout` of the body, and the shorter of the two counts."""
NORMAL = "normal"
SWEEP_S = 0.25
REFUSAL_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
"""A refusal is to be told within 50 ms; those far above it had waited in vain."""


def ticket(call: Call, streamed: bool, timeout_s: float | None, key: ApiKey | None = None) -> Ticket:
    """A request's place in line. A key decides about the highest priority, and the usual one.

    Raises a 400 that names the header."""
    priorities = call.service.policy.priorities
    named = next((value.decode("latin-1") for name, value in call.headers if name == PRIORITY_HEADER), None)
    if named is not None and named not in priorities:
        message = f"The header `X-Mainsail-Priority` must be one of {', '.join(sorted(priorities))}."
        raise bad_request(message, param="X-Mainsail-Priority")
    priority = priorities.get(named or NORMAL, 0)
    if key is not None:
        most = priorities.get(key.priority or NORMAL, 0)
        priority = most if named is None else min(priority, most)
    limits = [limit for limit in (_timeout(call), timeout_s) if limit is not None]
    return Ticket("" if key is None else key.name, priority, call.weight, streamed, min(limits, default=None))


def _timeout(call: Call) -> float | None:
    text = next((value for name, value in call.headers if name == TIMEOUT_HEADER), None)
    if text is None:
        return None
    try:
        timeout_s = float(text)
    except ValueError:
        timeout_s = -1.0
    if not 0 < timeout_s < float("inf"):
        message = "The header `X-Request-Timeout` must be a number of seconds above 0."
        raise bad_request(message, param="X-Request-Timeout")
    return timeout_s


def refusal(refused: Refused, model: str) -> GatewayError:
    """The answer to a request that is not let in."""
    status, code, why = _SHOWN[refused.reason]
    message = f"The model `{model}` cannot take this request now: {why}. Try again later."
    return GatewayError(status, message, code=code, param="model", retry_after_s=refused.retry_after_s)


class Door:
    """One service's queue, and those who wait in it."""

    def __init__(self) -> None:
        self.shedder = Shedder()
        self.refusals: dict[Reason, int] = {}
        self.refusal_s = Buckets(REFUSAL_BUCKETS)
        self._waiting: dict[Ticket, asyncio.Future[Refused | None]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._wanted = float("-inf")

    def update(self, policy: Policy, replicas: int, now: float) -> None:
        self.shedder.update(policy, replicas, now)
        self._let_in(now)

    def hear(self, loads: Iterable[Load], now: float) -> None:
        """The service's engines were asked what they have."""
        self.shedder.hear(loads, now)
        self._let_in(asyncio.get_running_loop().time())

    def want(self) -> None:
        """A replica is wanted, though nobody waits for it here."""
        if self.shedder.policy.hold_requests:
            self._wanted = asyncio.get_running_loop().time()

    @property
    def asked_for(self) -> bool:
        """Whether a service without replicas should be woken."""
        recent = asyncio.get_running_loop().time() - self._wanted < hold.WAKE_EVERY_S
        return not self.shedder.replicas and (bool(self.shedder.waiting) or recent)

    @property
    def held(self) -> int:
        """Requests that wait because there is no replica."""
        return 0 if self.shedder.replicas else self.shedder.waiting

    async def enter(
        self,
        ticket: Ticket,
        model: str,
        receive: Receive,
        beat: Callable[[], Awaitable[None]] | None,
        *,
        arrived: float,
    ) -> None:
        """Returns when the request may start; the caller then owes a `leave`. beat: tells the client that it waits.
        arrived: when its head came (`time.monotonic()`).

        Raises GatewayError (429 or 503, with a Retry-After) and ClientGone."""
        now = asyncio.get_running_loop().time()
        verdict = self.shedder.offer(ticket, now)
        if verdict == "start":
            return
        refused = await self._wait(ticket, receive, beat, now) if verdict == "wait" else verdict
        if isinstance(refused, Refused):
            self.refusals[refused.reason] = self.refusals.get(refused.reason, 0) + 1
            self.refusal_s.observe(time.monotonic() - arrived)
            raise refusal(refused, model)

    async def _wait(
        self, ticket: Ticket, receive: Receive, beat: Callable[[], Awaitable[None]] | None, now: float
    ) -> Refused | None:
        if (out := self.shedder.displace(now)) is not None:
            self._tell(*out)
        if not ticket.waiting:
            return Refused("queue_full", out[1].retry_after_s if out else hold.BEAT_S)
        self._watch()
        future = self._waiting[ticket] = asyncio.get_running_loop().create_future()
        try:
            return await hold.until(future, receive, beat)
        except BaseException:
            self._forget(ticket, future)
            raise
        finally:
            self._waiting.pop(ticket, None)

    def _forget(self, ticket: Ticket, future: asyncio.Future[Refused | None]) -> None:
        if future.done() and not future.cancelled() and future.result() is None:
            self.abandon(ticket)  # it was let in at the moment when its client left
        else:
            self.shedder.leave(ticket)

    def answering(self, ticket: Ticket, latency_s: float) -> None:
        """A stream has got its first token."""
        now = asyncio.get_running_loop().time()
        self.shedder.answered(ticket, latency_s, now)
        self._let_in(now)

    def leave(self, ticket: Ticket, call: Call) -> None:
        """A request that had started has ended."""
        now = asyncio.get_running_loop().time()
        if call.code == 200 and not ticket.streamed:
            self.shedder.answered(ticket, time.monotonic() - call.sent, now)
        self.shedder.finish(ticket, now, served=call.code == 200, overloaded=call.code == 429)
        self._let_in(now)

    def abandon(self, ticket: Ticket) -> None:
        """A request that had started was never sent."""
        self.shedder.abandon(ticket)
        self._let_in(asyncio.get_running_loop().time())

    def _watch(self) -> None:
        """Looks after those who wait, until nobody does."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(SWEEP_S, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self.sweep(asyncio.get_running_loop().time())
        if self.shedder.waiting:
            self._watch()

    def sweep(self, now: float) -> None:
        """Refuse those who have waited too long."""
        for ticket, refused in self.shedder.sweep(now):
            self._tell(ticket, refused)
        self._let_in(now)

    def _let_in(self, now: float) -> None:
        if self.shedder.waiting:
            for ticket, refused in self.shedder.ready(now):
                self._tell(ticket, refused)

    def _tell(self, ticket: Ticket, refused: Refused | None) -> None:
        future = self._waiting.get(ticket)
        if future is not None and not future.done():
            future.set_result(refused)
        elif refused is None:
            self.shedder.abandon(ticket)


class Admission(Collector):
    """Every service's door."""

    def __init__(self, workers: int = 1) -> None:
        """workers: how many share what a service's policy bounds."""
        self.doors: dict[Key, Door] = {}
        self._workers = workers

    def update(self, table: Table, now: float) -> None:
        gone = [self.doors.pop(key) for key in self.doors.keys() - table.services.keys()]
        for key, service in table.services.items():
            door = self.doors.get(key)
            if door is None:
                door = self.doors[key] = Door()
            door.update(service.policy.part(self._workers), len(service.endpoints), now)
        for door in gone:
            door.update(Policy(), 0, now)
            door.sweep(float("inf"))

    def asked_for(self) -> set[Key]:
        """The services to wake."""
        return {key for key, door in self.doors.items() if door.asked_for}

    def describe(self) -> Iterator[Metric]:
        shed, took, gauges = self._families()
        return iter((shed, took, *gauges))

    def collect(self) -> Iterator[Metric]:
        shed, took, gauges = self._families()
        for key, door in list(self.doors.items()):
            shedder = door.shedder
            values = (door.held, shedder.waiting, shedder.running, shedder.limit)
            for gauge, value in zip(gauges, values, strict=True):
                gauge.add_metric(key, value)
            took.add_metric(key, door.refusal_s.cumulative(), door.refusal_s.sum)
            for reason, count in list(door.refusals.items()):
                shed.add_metric((*key, reason), count)
        yield from (shed, took, *gauges)

    def _families(self) -> tuple[CounterMetricFamily, HistogramMetricFamily, tuple[GaugeMetricFamily, ...]]:
        names, of = ("namespace", "service"), "mainsail:gateway_"
        shed = CounterMetricFamily(
            of + "shed", "Requests refused before any replica had them.", labels=(*names, "reason")
        )
        took = HistogramMetricFamily(
            of + "refusal_seconds", "From the arrival of a request that is refused to its refusal.", labels=names
        )
        gauges = (
            GaugeMetricFamily(of + "held_requests", "Requests that wait for a first replica.", labels=names),
            GaugeMetricFamily(of + "queued_requests", "Requests that wait, for whatever reason.", labels=names),
            GaugeMetricFamily(of + "admitted_requests", "Requests let in and not finished.", labels=names),
            GaugeMetricFamily(of + "concurrency_limit", "Requests that may run at once, as learned.", labels=names),
        )
        return shed, took, gauges
