"""Holding conversations' turns: sessions.py decides, here they wait. Before the door of admission.py, which they pass
like any other request once they are let in.

I/O around the policy, as there: a future for each that is held, heartbeats for streams, and an ear for clients that
leave. Whoever need not be held neither waits nor makes a task. As many are held as may be queued
(`spec.admission.maxQueuedRequests`); beyond that the last in the order is refused.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from mainsail_gateway import hold
from mainsail_gateway.admission import refusal
from mainsail_gateway.asgi import Receive
from mainsail_gateway.fleet import Pool
from mainsail_gateway.relay import Call
from mainsail_gateway.request import Chain
from mainsail_gateway.sessions import Known, Session
from mainsail_gateway.shed import FIRST_RETRY_S, Refused, Ticket
from mainsail_gateway.watch import Key

TICK_S = 0.25

Places = frozenset[str] | None
Beat = Callable[[], Awaitable[None]] | None


class Turns:
    """One service's conversations, and those who wait for their turn."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._waiting: dict[Session, asyncio.Future[Places | Refused]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._ticked = 0.0

    async def enter(self, call: Call, chain: Chain, ticket: Ticket, receive: Receive, beat: Beat) -> None:
        """Returns when the turn may begin; the caller then owes a `leave`. What was waited counts against the ticket.

        Raises GatewayError (429, with a Retry-After) and ClientGone."""
        pool, now = self._pool, time.monotonic()
        self.tick(now)
        session = call.session = pool.sessions.arrive(chain, now)
        session.prefixes = tuple(call.prefixes)
        call.places = pool.sessions.fits(session, pool.loads.values(), now, self._known(session))
        if call.places is None:
            return
        if not call.places:
            await self._held(call, session, ticket, receive, beat, now)
        self._reserve(session, call.places)

    def leave(self, call: Call, now: float) -> None:
        """The turn is over, or was never sent."""
        if call.session is not None:
            self._pool.sessions.end(call.session, call.answer_tokens, now)
            self._let_in(now)

    def tick(self, now: float) -> None:
        """Time passes. To be called every second or so; cheap when it was just called."""
        if now - self._ticked >= TICK_S:
            self._ticked = now
            self._pool.sessions.advance(self._pool.loads, now)
            self._let_in(now)

    def _known(self, session: Session) -> Known:
        return self._pool.kv.cached(session.prefixes)

    def _reserve(self, session: Session, places: Places) -> None:
        """Its room is taken from now on, wherever it will be sent in the end."""
        loads = [self._pool.loads[key] for key in places or () if key in self._pool.loads]
        if loads:
            now = time.monotonic()
            self._pool.sessions.begin(session, max(loads, key=lambda load: self._pool.sessions.room(load, now)).key)

    async def _held(
        self, call: Call, session: Session, ticket: Ticket, receive: Receive, beat: Beat, now: float
    ) -> None:
        pool = self._pool
        pool.sessions.hold(session, ticket.priority, now)
        future = self._waiting[session] = asyncio.get_running_loop().create_future()
        self._shed(call.service.policy.max_queued_requests)
        self._watch()
        deadline = None
        if ticket.timeout_s is not None:
            deadline = asyncio.get_running_loop().call_later(ticket.timeout_s, self._refuse, session, "deadline")
        try:
            found = await hold.until(future, receive, beat)
        except BaseException:
            if future.done() and not isinstance(future.result(), Refused):
                pool.sessions.end(session, 0, time.monotonic())  # it was let in at the moment when its client left
            raise
        finally:
            if deadline is not None:
                deadline.cancel()
            self._waiting.pop(session, None)
            pool.sessions.leave(session)
        if isinstance(found, Refused):
            raise refusal(found, call.model)
        call.places = found
        if ticket.timeout_s is not None:
            ticket.timeout_s = max(0.001, ticket.timeout_s - (time.monotonic() - now))

    def _shed(self, most: int) -> None:
        while len(self._pool.sessions.held) > max(1, most):
            self._refuse(self._pool.sessions.held[-1], "queue_full")

    def _refuse(self, session: Session, reason: hold.HoldReason) -> None:
        future = self._waiting.get(session)
        self._pool.sessions.leave(session)
        if future is not None and not future.done():
            future.set_result(Refused(reason, FIRST_RETRY_S))

    def _let_in(self, now: float) -> None:
        sessions = self._pool.sessions
        while sessions.held and (found := sessions.next(self._pool.loads.values(), now, self._known)) is not None:
            session, places = found
            sessions.leave(session)
            self._reserve(session, places)
            future = self._waiting.get(session)
            if future is not None and not future.done():
                future.set_result(places)
            elif session.held_since is None:
                sessions.end(session, 0, now)

    def _watch(self) -> None:
        """Looks after those who are held, until nobody is."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(TICK_S, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self.tick(time.monotonic())
        if not self._pool.loads:  # nobody is there to have room: the door knows what to do with them
            for future in self._waiting.values():
                if not future.done():
                    future.set_result(None)
        if self._waiting:
            self._watch()


class AllTurns(Collector):
    """Every service's."""

    def __init__(self) -> None:
        self._turns: dict[Key, Turns] = {}
        self._pools: Mapping[Key, Pool] = {}

    def update(self, pools: Mapping[Key, Pool]) -> None:
        self._pools = pools
        self._turns = {key: self._turns.get(key) or Turns(pool) for key, pool in pools.items()}

    def of(self, key: Key) -> Turns | None:
        """None: the service is gone."""
        return self._turns.get(key)

    def tick(self, now: float) -> None:
        for turns in self._turns.values():
            turns.tick(now)

    def describe(self) -> Iterator[Metric]:
        return iter(self._families())

    def collect(self) -> Iterator[Metric]:
        held, parked, tokens = families = self._families()
        for key, pool in list(self._pools.items()):
            held.add_metric(key, len(pool.sessions.held))
            parked.add_metric(key, pool.sessions.num_parked)
            for state, count in pool.sessions.kv_tokens().items():
                tokens.add_metric((*key, state), count)
        yield from families

    def _families(self) -> tuple[GaugeMetricFamily, GaugeMetricFamily, GaugeMetricFamily]:
        names, of = ("namespace", "service"), "mainsail:gateway_"
        return (
            GaugeMetricFamily(
                of + "held_sessions",
                "Conversations whose turn is held, because the replicas' KV is wanted by others.",
                labels=names,
            ),
            GaugeMetricFamily(
                of + "parked_sessions",
                "Conversations between turns that had to make room, and are expected back.",
                labels=names,
            ),
            GaugeMetricFamily(
                of + "sessions_kv_tokens",
                "Tokens of KV that conversations want: those that are live, parked and held.",
                labels=(*names, "state"),
            ),
        )
