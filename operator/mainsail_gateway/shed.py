"""Who runs, who waits, who is refused when a service has more requests than it can serve. Pure: no I/O, no clock.

One `Shedder` for each service. A request is offered once and gets a verdict at once: start, wait, or refused with the
time after which another try makes sense. What waits is ordered by

1. **priority**, the higher first (`spec.admission.priorities`; batch work waits and is refused first), and in it by
2. **fair shares**: start-time fair queueing (Goyal et al., 1996) over the API keys, in tokens. A key with a thousand
   requests delays its own, not others'. One key's requests keep their order.

**Refused** is who would wait in vain, at once, on arrival. The wait is predicted from what is ahead and the rate at
which requests were finished lately, or at which the queue itself moves where that is less (`Pace`), and compared with
the longest wait allowed and with the request's own deadline. Rates change while somebody waits, and those with more
claim come in between; so those ahead are reckoned to take longer than predicted (`HEADROOM`). Then hardly anybody waits
to be told no, and what is started is wanted still; a shorter queue serves as many while more comes than can be served.
With the queue full, a request of a higher priority, or of a key with less in the queue, takes the place of the newest
one that has least claim.

While a service has no replica (scaled to zero) requests wait under the bounds of hold.py; nothing is estimated then,
and their clocks start when a replica serves.
"""

import heapq
import itertools
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal, TypeVar

from mainsail_gateway.balance import Load
from mainsail_gateway.gradient import Gradient, class_of
from mainsail_gateway.room import Room

RATE_WINDOW_S = 30
LONGEST_RETRY_S = 60.0
HEADROOM = 2.5
"""Who waits is granted this many times what those ahead are predicted to take. In simulated overload (1.2 to 4 times
the load; tests/gateway/test_shed.py) one in ten of the refused had waited with 1, and one in two hundred with this."""
PACE_S = 10.0
"""The queue's own pace is measured over so long."""
PACE_LEAST_S = 1.0
PACE_LEAST = 8
"""And not before it has stood so long and so many have left it, or it has stood for all that time."""
KEEPING_UP = 0.1
"""A service has as many silent streams at most, of all that run, while its replicas begin what they are sent."""
MEAN_PART = 0.05
"""What a request's tokens count for in the mean of those that came lately."""
FIRST_RETRY_S = 5.0
"""Retry-After before any request was finished."""

DEFAULT_PRIORITIES: Mapping[str, int] = MappingProxyType({"high": 100, "normal": 0, "batch": -100})

Reason = Literal["queue_full", "queue_time", "deadline", "displaced", "no_replica", "hold_full", "hold_time"]


@dataclass(frozen=True, slots=True)
class Policy:
    """A service's `spec.admission`, and its `spec.scaling.toZero` as far as the gateway is concerned."""

    max_queued_requests: int = 512
    max_queue_time_s: float = 30.0
    priorities: Mapping[str, int] = field(default_factory=lambda: DEFAULT_PRIORITIES)
    max_running: int = 256
    """What one replica runs at once."""
    hold_requests: int = 0
    """How many may wait while there is no replica; 0: none, they are refused."""
    hold_for_s: float = 0.0

    def part(self, of: int) -> "Policy":
        """One of so many equal parts, rounded up: for gateways that know of one another."""
        if of == 1:
            return self
        numbers = self.max_queued_requests, self.max_running, self.hold_requests
        queued, running, held = (-(-number // of) for number in numbers)
        return replace(self, max_queued_requests=queued, max_running=running, hold_requests=held)


@dataclass(slots=True, eq=False)
class Ticket:
    """A request's place in line."""

    key: str
    """Whose fair share it is: the name of the API key, or nothing."""
    priority: int
    tokens: int
    streamed: bool
    timeout_s: float | None = None
    """How long the client wants to wait for the whole answer at most."""
    since: float = 0.0
    """When it began to wait; again when the first replica came."""
    held: bool = False
    """It came while there was no replica."""
    order: tuple[int, float, int] = (0, 0.0, 0)
    waiting: bool = False
    started: float = 0.0
    answered: bool = False
    running: float = 0.0
    """How many ran in each replica when it was started, itself included."""


@dataclass(frozen=True, slots=True)
class Refused:
    reason: Reason
    retry_after_s: float


Verdict = Literal["start", "wait"] | Refused


class Drain:
    """How fast a service gets through its requests, from those that ended in the last half minute.

    The plain count is what it did; while few asked, that says nothing about what it could do, so it is not less than
    the requests that may run by the time that one takes (Little's law)."""

    def __init__(self) -> None:
        self._seconds: deque[tuple[int, int, float]] = deque()
        """Second, requests that ended in it, the sum of their durations."""
        self._since = 0.0

    def count(self, duration_s: float, now: float) -> None:
        second = int(now)
        if not self._seconds:
            self._since = now
        if self._seconds and self._seconds[-1][0] == second:
            _, count, total = self._seconds.pop()
            self._seconds.append((second, count + 1, total + duration_s))
        else:
            self._seconds.append((second, 1, duration_s))
        self._trim(now)

    def _trim(self, now: float) -> None:
        while self._seconds and self._seconds[0][0] <= now - RATE_WINDOW_S:
            self._seconds.popleft()

    def per_second(self, limit: float, now: float) -> float | None:
        """None: too few to say."""
        self._trim(now)
        events = sum(count for _, count, _ in self._seconds)
        if events < 3:
            return None
        mean = sum(total for _, _, total in self._seconds) / events
        done = events / min(RATE_WINDOW_S, max(1.0, now - self._since))
        return max(done, limit / max(mean, 0.001))


class Pace:
    """How fast a queue moves: the requests that were started while others waited, in the last `PACE_S`.

    Nothing is assumed about how many run, or for how long: the learned limit swings, a queue moves at its mean."""

    def __init__(self) -> None:
        self._since: float | None = None
        """Since when somebody has been waiting; None: nobody is."""
        self._starts: deque[float] = deque()

    def stands(self, now: float) -> None:
        """Somebody waits."""
        if self._since is None:
            self._since = now

    def ends(self) -> None:
        """Nobody waits any more."""
        self._since = None
        self._starts.clear()

    def started(self, now: float) -> None:
        """One of those who waited was started."""
        if self._since is not None:
            self._starts.append(now)

    def per_second(self, now: float) -> float | None:
        """None: the queue has not stood long enough to say."""
        if self._since is None:
            return None
        while self._starts and self._starts[0] <= now - PACE_S:
            self._starts.popleft()
        stood = now - self._since
        if stood < PACE_S and (stood < PACE_LEAST_S or len(self._starts) < PACE_LEAST):
            return None
        return max(len(self._starts), 1) / min(PACE_S, stood)


Name = TypeVar("Name")


def _less(counter: Counter[Name], name: Name) -> None:
    counter[name] -= 1
    if not counter[name]:
        del counter[name]


class Shedder:
    """One service's requests: who runs, and who waits in which order."""

    def __init__(self, policy: Policy | None = None, replicas: int = 0) -> None:
        self.policy = policy or Policy()
        self.replicas = replicas
        self.gradient = Gradient()
        self.room = Room()
        self.running = 0
        self.tokens = 0
        """Of those that run: prompts and expected answers."""
        self._mean_tokens = 0.0
        """Of those that came lately."""
        self.silent = 0
        """Streams that run and have no first token yet."""
        self.waiting = 0
        self.drain = Drain()
        self.pace = Pace()
        self._heap: list[tuple[tuple[int, float, int], Ticket]] = []
        self._numbers = itertools.count()
        self._virtual: dict[int, float] = {}
        """By priority: the start tag of the request started last."""
        self._finish: dict[tuple[int, str], float] = {}
        """By priority and key: the finish tag of the key's last request."""
        self._by_priority: Counter[int] = Counter()
        self._by_key: Counter[tuple[int, str]] = Counter()

    # The state of the service.

    @property
    def limit(self) -> float:
        """How many may run at once: what the latency bears, or what the engines say that they have room for."""
        most = self.replicas * float(self.policy.max_running)
        return min(most, max(self.replicas * self.gradient.limit, self.room_limit))

    @property
    def room_limit(self) -> float:
        """How many the engines could run at once, by their own words; 0: they do not say."""
        return self.room.limit(self.replicas, self.running, self.tokens, self._mean_tokens)

    @property
    def busy(self) -> bool:
        """One more request would have to wait."""
        return bool(self.waiting) or self.running >= self.limit

    def update(self, policy: Policy, replicas: int, now: float) -> None:
        """The service's spec or its replicas changed. `ready` then says who may start."""
        if replicas and not self.replicas:
            for ticket in self._queue():
                ticket.since = now
                self.pace.stands(now)
        self.policy = policy
        self.replicas = replicas

    def hear(self, loads: Iterable[Load], now: float) -> None:
        """The engines were asked what they have. `ready` then says who may start."""
        self.room.hear(loads, self.running, now)

    def _rate(self, now: float) -> float | None:
        rates = self.pace.per_second(now), self.drain.per_second(self.limit, now)
        return min((rate for rate in rates if rate is not None), default=None)

    def _queue(self) -> Iterator[Ticket]:
        return (ticket for _, ticket in self._heap if ticket.waiting)

    # A request's way.

    def offer(self, ticket: Ticket, now: float) -> Verdict:
        """What becomes of a new request."""
        ticket.since = now
        self._mean_tokens += (ticket.tokens - self._mean_tokens) * (MEAN_PART if self._mean_tokens else 1.0)
        if not self.replicas:
            return self._hold(ticket)
        if not self.waiting and self.running < self.limit:
            self._start(ticket, now)
            return "start"
        refused = self._in_vain(ticket, now)
        if refused is None:
            self.pace.stands(now)
            self._enqueue(ticket)
            return "wait"
        return refused

    def _hold(self, ticket: Ticket) -> Verdict:
        policy = self.policy
        if not policy.hold_requests:
            return Refused("no_replica", FIRST_RETRY_S)
        if self.waiting >= policy.hold_requests:
            return Refused("hold_full", FIRST_RETRY_S)
        ticket.held = True
        self._enqueue(ticket)
        return "wait"

    def _in_vain(self, ticket: Ticket, now: float) -> Refused | None:
        rate = self._rate(now)
        ahead = self.ahead(ticket)
        wait = (ahead + 1) / rate if rate else 0.0
        retry = FIRST_RETRY_S if rate is None else min(LONGEST_RETRY_S, max(1.0, wait))
        needed = (HEADROOM * ahead + 1) / rate if rate else 0.0
        if ticket.timeout_s is not None and needed > ticket.timeout_s:
            return Refused("deadline", retry)
        if needed > self.policy.max_queue_time_s:
            return Refused("queue_time", retry)
        if self.waiting >= self.policy.max_queued_requests and self.weakest(ticket) is None:
            return Refused("queue_full", retry)
        return None

    def ahead(self, ticket: Ticket) -> int:
        """How many that wait would be started before this one, were it to wait now (an estimate in its own level)."""
        higher = sum(count for priority, count in self._by_priority.items() if priority > ticket.priority)
        level = self._by_priority[ticket.priority]
        keys = sum(1 for priority, _ in self._by_key if priority == ticket.priority)
        own = self._by_key.get((ticket.priority, ticket.key), 0)
        fair = (own + 1) * (keys if own else keys + 1) - 1
        return higher + min(level, fair)

    def weakest(self, than: Ticket) -> Ticket | None:
        """The one in the queue that has less claim than this one: of a lower priority, or in the same of a key that has
        more in the queue than this one's would have."""
        found = max(self._queue(), key=self._claim, default=None)
        if found is None or found.priority > than.priority or found.held:
            return None
        own = self._by_key.get((than.priority, than.key), 0)
        more = self._by_key[found.priority, found.key] > own + 1
        return found if found.priority < than.priority or more else None

    def _claim(self, ticket: Ticket) -> tuple[int, int, int]:
        return -ticket.priority, self._by_key[ticket.priority, ticket.key], ticket.order[2]

    def displace(self, now: float) -> tuple[Ticket, Refused] | None:
        """After an offer that waits: who has to leave for it, if the queue is over its bound."""
        if self.waiting <= self.policy.max_queued_requests or not self.replicas:
            return None
        ticket = max((t for t in self._queue() if not t.held), key=self._claim, default=None)
        if ticket is None:
            return None
        rate = self._rate(now)
        self.leave(ticket)
        return ticket, Refused("displaced", min(LONGEST_RETRY_S, self.waiting / rate) if rate else FIRST_RETRY_S)

    def _enqueue(self, ticket: Ticket) -> None:
        place = ticket.priority, ticket.key
        start = max(self._virtual.get(ticket.priority, 0.0), self._finish.get(place, 0.0))
        self._finish[place] = start + max(1, ticket.tokens)
        ticket.order = (-ticket.priority, start, next(self._numbers))
        ticket.waiting = True
        self.waiting += 1
        self._by_priority[ticket.priority] += 1
        self._by_key[place] += 1
        heapq.heappush(self._heap, (ticket.order, ticket))

    def leave(self, ticket: Ticket) -> None:
        """It waits no longer: started, refused, or its client has gone."""
        if not ticket.waiting:
            return
        ticket.waiting = False
        self.waiting -= 1
        place = ticket.priority, ticket.key
        _less(self._by_priority, ticket.priority)
        _less(self._by_key, place)
        if not self._by_priority:
            self.pace.ends()
            self._virtual.clear()
            self._finish.clear()
            self._heap.clear()
        elif len(self._heap) > 2 * self.waiting + 64:
            self._heap = [(t.order, t) for t in self._queue()]
            heapq.heapify(self._heap)

    def _start(self, ticket: Ticket, now: float) -> None:
        ticket.started = now
        self.running += 1
        self.tokens += ticket.tokens
        ticket.running = self.running / self.replicas
        self.silent += ticket.streamed

    def ready(self, now: float) -> list[tuple[Ticket, Refused | None]]:
        """Who may start now, in order; and who has just waited too long."""
        found: list[tuple[Ticket, Refused | None]] = []
        while self.waiting and self.running < self.limit:
            order, ticket = heapq.heappop(self._heap)
            if not ticket.waiting:
                continue
            refused = self.expired(ticket, now)
            self._virtual[ticket.priority] = max(self._virtual.get(ticket.priority, 0.0), order[1])
            self.leave(ticket)
            if refused is None:
                self.pace.started(now)
                self._start(ticket, now)
            found.append((ticket, refused))
        return found

    def sweep(self, now: float) -> list[tuple[Ticket, Refused]]:
        """Who has waited too long. To be called every fraction of a second while requests wait; `ready` after it."""
        if self.replicas and self.running >= self.limit - self.replicas:
            keeping_up = self.silent <= KEEPING_UP * self.running
            self.gradient.tick(self.running / self.replicas, float(self.policy.max_running), now, keeping_up=keeping_up)
        late = [(ticket, refused) for ticket in self._queue() if (refused := self.expired(ticket, now)) is not None]
        for ticket, _ in late:
            self.leave(ticket)
        return late

    def expired(self, ticket: Ticket, now: float) -> Refused | None:
        waited = now - ticket.since
        rate = self._rate(now)
        retry = min(LONGEST_RETRY_S, max(1.0, (self.waiting + 1) / rate)) if rate else FIRST_RETRY_S
        if ticket.held and waited > self.policy.hold_for_s:
            return Refused("hold_time", retry)
        if not self.replicas and ticket.held:
            return None
        if not ticket.held and waited > self.policy.max_queue_time_s:
            return Refused("queue_time", retry)
        if ticket.timeout_s is not None and waited > ticket.timeout_s:
            return Refused("deadline", retry)
        return None

    def abandon(self, ticket: Ticket) -> None:
        """A request that was started never reached a replica. `ready` then says who may start."""
        self._end(ticket)

    def _end(self, ticket: Ticket) -> None:
        self.running -= 1
        self.tokens -= ticket.tokens
        self._heard(ticket)

    def _heard(self, ticket: Ticket) -> None:
        if not ticket.answered:
            ticket.answered = True
            self.silent -= ticket.streamed

    def answered(self, ticket: Ticket, latency_s: float, now: float) -> None:
        """A stream got its first token, or another request its whole answer, so long after it was sent. `ready` then
        says who may start."""
        self._heard(ticket)
        kind = class_of(ticket.streamed, ticket.tokens)
        self.gradient.sample(kind, latency_s, ticket.running, float(self.policy.max_running), now)

    def finish(self, ticket: Ticket, now: float, *, served: bool = True, overloaded: bool = False) -> None:
        """A request that was started has ended. overloaded: its replica refused it. `ready` then says who may start."""
        self._end(ticket)
        if served:
            self.drain.count(now - ticket.started, now)
        elif overloaded:
            self.gradient.overloaded(float(self.policy.max_running), now)
