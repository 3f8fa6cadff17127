"""The balancer's memory: load, health and learned prefixes of the endpoints of each service. No I/O, no clock.

One `Pool` per service holds what `balance.pick` reads; it changes when the routing table does, when a request starts
or ends, and when an endpoint fails. An endpoint that leaves the table is forgotten; requests that still run there keep
their own `Load` and end quietly.
"""

from collections import Counter
from collections.abc import Collection, Generator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from mainsail_gateway import balance
from mainsail_gateway.balance import Load, Prefix, PrefixIndex
from mainsail_gateway.kv_index import KVIndex
from mainsail_gateway.retry import RetryBudget, failover_budget
from mainsail_gateway.routes import Endpoint, Table
from mainsail_gateway.sessions import Sessions
from mainsail_gateway.split import Split, Sticky, Weights, eligible
from mainsail_gateway.watch import Key


class Picked(NamedTuple):
    endpoint: Endpoint
    load: Load
    prefill: int
    """Tokens of the prompt that are to be computed there."""


class Flight:
    """A request at an endpoint, as it weighs on it."""

    def __init__(self, load: Load, prefill: int) -> None:
        """prefill: tokens of its prompt that are to be computed there."""
        self._load = load
        self._prefill = prefill
        load.requests += 1
        load.prefill += prefill

    def answering(self) -> None:
        """Its first token has come: the prompt is computed."""
        self._load.prefill -= self._prefill
        self._prefill = 0

    def end(self) -> None:
        self.answering()
        self._load.requests -= 1


class Pool:
    """The endpoints of one service, as the balancer sees them."""

    def __init__(self) -> None:
        self.endpoints: dict[str, Endpoint] = {}
        self.loads: dict[str, Load] = {}
        self.index = PrefixIndex()
        self.sessions = Sessions()
        """Its conversations."""
        self.kv = KVIndex()
        """What its endpoints say that they have cached."""
        self.budget = RetryBudget()
        self.weights: Weights = ()
        """Of the revisions, while more than one has endpoints."""
        self.split = Split()
        self.failovers = failover_budget()
        self._picks = 0
        self._in_flight: Counter[bytes] = Counter()
        """Requests, by the conversation that they are of: the last of their prefixes."""

    def update(self, endpoints: Sequence[Endpoint], now: float, weights: Weights = ()) -> None:
        several = len({endpoint.revision for endpoint in endpoints}) > 1
        self.weights = weights if several else ()
        # The first endpoints of a service have nobody to warm up behind.
        since = now if self.loads else now - balance.SLOW_START_S
        self.endpoints = {endpoint.key: endpoint for endpoint in endpoints}
        self.loads = {key: self.loads.get(key) or Load(key, since) for key in self.endpoints}

    def pick(
        self,
        prompt: int,
        prefixes: Sequence[Prefix],
        avoid: set[str],
        now: float,
        sticky: Sticky | None = None,
        revision: str | None = None,
        places: Collection[str] | None = None,
    ) -> Picked | None:
        """An endpoint for a prompt of so many tokens that is not in `avoid`; None when there is none left.

        First the revision, by its weight or by `sticky` (a session's or user's name), then the balance inside it. What
        one `revision` has begun another one finishes only where nobody else is left: it may be another model. places:
        where the conversation's turn belongs (sessions.py), as long as one of them is left; weights go before that."""
        loads = [load for load in self.loads.values() if load.key not in avoid]
        if places is not None and not self.weights:
            loads = [load for load in loads if load.key in places] or loads
        same = [load for load in loads if self.endpoints[load.key].revision == revision]
        several = same or self._of_one_revision(loads, now, sticky)
        known, alone = self.kv.cached(prefixes), not (prefixes and self._in_flight[prefixes[-1].key])
        found = balance.pick(several, prompt, prefixes, self.index, now, known, alone=alone)
        if found is None:
            return None
        load, remaining = found
        self._picks += 1
        load.picked = self._picks
        return Picked(self.endpoints[load.key], load, remaining)

    @contextmanager
    def in_flight(self, picked: Picked, prefixes: Sequence[Prefix]) -> Generator[Flight]:
        """Counts a request at the endpoint that was picked for it, while it runs."""
        flight = Flight(picked.load, picked.prefill)
        conversation = prefixes[-1].key if prefixes else b""
        self._in_flight[conversation] += 1
        try:
            yield flight
        finally:
            flight.end()
            self._in_flight[conversation] -= 1
            if not self._in_flight[conversation]:
                del self._in_flight[conversation]

    def sound(self, now: float) -> bool:
        """Most endpoints work: what one has lost is no more than the others can take over."""
        failing = sum(load.failures > 0 or load.ejected_until > now for load in self.loads.values())
        return failing <= balance.EJECT_MOST * len(self.loads)

    def observe(
        self, key: str, *, running: int, waiting: int, kv_usage: float, now: float, kv_tokens: int = 0,
        kept_tokens: int = 0, max_running: int = 0,
    ) -> None:  # fmt: skip
        """What an endpoint says of itself; nothing, once it has left."""
        load = self.loads.get(key)
        if load is not None:
            load.kv_tokens = kv_tokens
            load.max_running = max_running
            balance.observe(load, running=running, waiting=waiting, kv_usage=kv_usage, now=now, kept_tokens=kept_tokens)

    def _of_one_revision(self, loads: list[Load], now: float, sticky: Sticky | None) -> list[Load]:
        if not self.weights:
            return loads
        serving: dict[str, bool] = {}
        for load in loads:
            name = self.endpoints[load.key].revision
            serving[name] = serving.get(name, False) or load.ejected_until <= now
        weighted = eligible(self.weights, serving)
        if not weighted:
            return loads
        chosen = self.split.choose(weighted, sticky)
        return [load for load in loads if self.endpoints[load.key].revision == chosen]


class Fleet:
    """Every service's pool."""

    def __init__(self) -> None:
        self.pools: dict[Key, Pool] = {}

    def update(self, table: Table, now: float) -> None:
        self.pools = {key: self.pools.get(key) or Pool() for key in table.services}
        for key, service in table.services.items():
            self.pools[key].update(service.endpoints, now, service.weights)
