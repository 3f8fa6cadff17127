"""Who may join the queue: bounded by requests, prompt tokens and the wait to come, with an honest Retry-After beyond.

Queued means: accepted, and no first token yet. The rate at which prompt tokens leave the queue, while there is one, is
measured; a refused client is told to come back when, at that rate, there is room for it. Where more comes than can be
served, a queue only makes everybody late, so that work is done of which nobody waits for the end any more: newcomers
whose first token would take over max_wait_s are refused at once, if they make the server fuller than it was. Who comes
as another leaves does not: a fixed number of clients, of whom each comes again when it is served, is no overload,
however long they wait; nor is a burst: the queue must have stood for BURST_S (the idea is CoDel's: Nichols and
Jacobson, 2012). And every newcomer that is turned away lowers what may be inside, until the wait is in bounds again.
FREE_REQUESTS at a time are always let in, so that a few clients with long prompts are served however long that takes.
Where several API processes serve one engine, what waits in all of them counts (`Board`). The clock is an argument.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from mainsail_engine.server.board import Board

RATE_HALF_LIVES_S = (1.0, 5.0)
"""The queue's pace is taken over both, and the lower one believed: it falls as what was let in begins to decode."""
MIN_RETRY_S, MAX_RETRY_S = 1.0, 60.0
BURST_S = 1.0
"""How long a queue may stand before its length counts as an overload."""
FULLEST_S = 2.0
"""How full the server was is remembered for so long, and at most twice as long."""
RESERVED_S = 1.0
"""A reservation that nobody has taken by then is void."""
FREE_REQUESTS = 64
"""As many queued requests as a wait alone never refuses."""


@dataclass(frozen=True, slots=True)
class Rejection:
    reason: str
    """max_num_queued_reqs, max_num_queued_tokens or max_queue_wait: the flag that says no."""
    retry_after_s: float
    message: str


class DrainRate:
    """Tokens per second that leave the queue, decaying with a half-life; unknown until something left."""

    def __init__(self, half_life_s: float = RATE_HALF_LIVES_S[-1]) -> None:
        self._half_life_s = half_life_s
        self._tokens = 0.0
        self._seconds = 0.0
        self._at_s: float | None = None

    def resume(self, now: float) -> None:
        """There is a queue again: the time without one says nothing."""
        self._at_s = now

    def add(self, tokens: int, now: float) -> None:
        if self._at_s is not None:
            elapsed = max(now - self._at_s, 0.0)
            kept = 0.5 ** (elapsed / self._half_life_s)
            self._tokens = self._tokens * kept + tokens
            self._seconds = self._seconds * kept + elapsed
        self._at_s = now

    @property
    def tokens_per_s(self) -> float | None:
        return self._tokens / self._seconds if self._seconds > 0 else None


class Fullest:
    """The most requests that were inside at once, of the last FULLEST_S seconds and up to as many before."""

    def __init__(self) -> None:
        self._now = self._before = 0
        self._since_s = 0.0

    def note(self, inside: int, now: float) -> int:
        """So many are inside. Returns the most."""
        if now - self._since_s >= FULLEST_S:
            is_next = now - self._since_s < 2 * FULLEST_S
            self._before, self._now, self._since_s = (self._now if is_next else 0), 0, now
        self._now = max(self._now, inside)
        return max(self._now, self._before)


class Admission:
    """`check` and `reserve` before answering, `enter` when the request goes to the core, `leave` at its first token or
    its end, `ended` at its end.

    Between the two a moment passes, in which others ask: a reservation counts until it is taken or too old (its client
    may have gone at once). Processes that ask in the very same moment may together let in one each too many.
    """

    def __init__(
        self, *, max_requests: int, max_tokens: int, max_wait_s: float = 0.0, board: Board | None = None
    ) -> None:
        """max_wait_s 0: no bound."""
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self._max_wait_s = max_wait_s
        self._stands_since_s = 0.0
        self._rates = [DrainRate(half_life_s) for half_life_s in RATE_HALF_LIVES_S]
        self._fullest = Fullest()
        self._num_turned_away = 0
        """Newcomers refused for their wait, since the wait was in bounds."""
        self._board = board or Board()
        self._reserved: deque[tuple[float, int]] = deque()
        """(when it is too old, prompt tokens), oldest first."""
        self.num_requests = 0
        """Queued through this process; `num_tokens` likewise."""
        self.num_tokens = 0

    def check(self, requests: int, tokens: int, now: float) -> Rejection | None:
        """May this many requests with this many prompt tokens together join? None: yes. An empty queue takes any."""
        self._forget_reserved(now)
        queued = self.num_requests + len(self._reserved) + int(self._board.others("queued_requests"))
        reserved = sum(tokens for _, tokens in self._reserved)
        waiting = self.num_tokens + reserved + int(self._board.others("queued_tokens"))
        inside = int(self._board.total("running")) + len(self._reserved)
        fullest = self._fullest.note(inside, now)
        if queued == 0:
            self._num_turned_away = 0
            return None
        if queued + requests > self._max_requests:
            excess = queued + requests - self._max_requests
            return self._reject("max_num_queued_reqs", f"{queued} requests wait already", excess * waiting / queued)
        if waiting + tokens > self._max_tokens:
            excess = waiting + tokens - self._max_tokens
            return self._reject("max_num_queued_tokens", f"{waiting} prompt tokens wait already", excess)
        rate = self.tokens_per_s
        if not rate or not self._max_wait_s or queued + requests <= FREE_REQUESTS:
            return None
        wait_s = (waiting + tokens) / rate
        if wait_s <= self._max_wait_s:
            self._num_turned_away = 0
            return None
        if now - self._stands_since_s <= BURST_S or inside + requests <= fullest - self._num_turned_away:
            return None
        self._num_turned_away += requests
        return self._reject(
            "max_queue_wait", f"the first token would take {wait_s:.1f} s", rate * (wait_s - self._max_wait_s)
        )

    def reserve(self, requests: Iterable[int], now: float) -> None:
        """These requests, given by their prompt tokens, were let in and will `enter` in a moment."""
        self._reserved.extend((now + RESERVED_S, tokens) for tokens in requests)
        self._publish()

    def _forget_reserved(self, now: float) -> None:
        """Those that are too old."""
        if self._reserved and self._reserved[0][0] <= now:
            while self._reserved and self._reserved[0][0] <= now:
                self._reserved.popleft()
            self._publish()

    def enter(self, tokens: int, now: float) -> None:
        if self._reserved:
            self._reserved.popleft()
        if self.num_requests == 0:
            self._stands_since_s = now
            for rate in self._rates:
                rate.resume(now)
        self.num_requests += 1
        self.num_tokens += tokens
        self._publish()

    def leave(self, tokens: int, now: float, *, served: bool) -> None:
        """served: it got its first token. Otherwise it gave up, which says nothing about the rate."""
        self.num_requests -= 1
        self.num_tokens -= tokens
        if served:
            for rate in self._rates:
                rate.add(tokens, now)
        self._publish()

    def ended(self, now: float) -> None:
        """A request that had entered is about to go, wherever it is."""
        self._fullest.note(int(self._board.total("running")) + len(self._reserved), now)

    def _publish(self) -> None:
        self._board.set("queued_requests", self.num_requests + len(self._reserved))
        self._board.set("queued_tokens", self.num_tokens + sum(tokens for _, tokens in self._reserved))
        self._board.set("drain_rate", self.own_tokens_per_s)

    @property
    def own_tokens_per_s(self) -> float:
        """The drain rate of this process's requests; 0 while unknown."""
        return min(rate.tokens_per_s or 0.0 for rate in self._rates)

    @property
    def tokens_per_s(self) -> float:
        """The measured drain rate of all processes; 0 while unknown."""
        return self._board.total("drain_rate")

    def retry_after_s(self, tokens: float) -> float:
        """Seconds until this many queued tokens will have left, in whole seconds within bounds."""
        rate = self.tokens_per_s
        wanted = tokens / rate if rate else MIN_RETRY_S
        return float(min(max(math.ceil(wanted - 1e-6), MIN_RETRY_S), MAX_RETRY_S))

    def _reject(self, reason: str, why: str, excess: float) -> Rejection:
        return Rejection(reason, self.retry_after_s(excess), f"the engine is overloaded: {why}; try again later")
