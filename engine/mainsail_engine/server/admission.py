"""Who may join the queue: bounded by requests and by prompt tokens, with an honest Retry-After beyond.

Queued means: accepted, and no first token yet. The rate at which prompt tokens leave the queue is measured; a refused
client is told to come back when, at that rate, there is room for it. A pure value machine: the clock is an argument.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

RATE_HALF_LIFE_S = 5.0
MIN_RETRY_S, MAX_RETRY_S = 1.0, 60.0


@dataclass(frozen=True, slots=True)
class Rejection:
    reason: str
    """max_num_queued_reqs or max_num_queued_tokens: the flag that says no."""
    retry_after_s: float
    message: str


class DrainRate:
    """Tokens per second that leave the queue, decaying with a half-life; unknown until something left."""

    def __init__(self) -> None:
        self._tokens = 0.0
        self._seconds = 0.0
        self._at_s: float | None = None

    def add(self, tokens: int, now: float) -> None:
        if self._at_s is not None:
            elapsed = max(now - self._at_s, 0.0)
            kept = 0.5 ** (elapsed / RATE_HALF_LIFE_S)
            self._tokens = self._tokens * kept + tokens
            self._seconds = self._seconds * kept + elapsed
        self._at_s = now

    @property
    def tokens_per_s(self) -> float | None:
        return self._tokens / self._seconds if self._seconds > 0 else None


class Admission:
    """`check` before answering, `enter` when the request goes to the core, `leave` at its first token or its end."""

    def __init__(self, *, max_requests: int, max_tokens: int) -> None:
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self._rate = DrainRate()
        self.num_requests = 0
        self.num_tokens = 0

    def check(self, requests: int, tokens: int) -> Rejection | None:
        """May this many requests with this many prompt tokens together join? None: yes. An empty queue takes any."""
        if self.num_requests == 0:
            return None
        if self.num_requests + requests > self._max_requests:
            excess = self.num_requests + requests - self._max_requests
            mean = self.num_tokens / self.num_requests
            return self._reject("max_num_queued_reqs", f"{self.num_requests} requests wait already", excess * mean)
        if self.num_tokens + tokens > self._max_tokens:
            excess = self.num_tokens + tokens - self._max_tokens
            return self._reject("max_num_queued_tokens", f"{self.num_tokens} prompt tokens wait already", excess)
        return None

    def enter(self, tokens: int) -> None:
        self.num_requests += 1
        self.num_tokens += tokens

    def leave(self, tokens: int, now: float, *, served: bool) -> None:
        """served: it got its first token. Otherwise it gave up, which says nothing about the rate."""
        self.num_requests -= 1
        self.num_tokens -= tokens
        if served:
            self._rate.add(tokens, now)

    def retry_after_s(self, tokens: float) -> float:
        """Seconds until this many queued tokens will have left, in whole seconds within bounds."""
        rate = self._rate.tokens_per_s
        wanted = tokens / rate if rate else MIN_RETRY_S
        return float(min(max(math.ceil(wanted), MIN_RETRY_S), MAX_RETRY_S))

    def _reject(self, reason: str, why: str, excess: float) -> Rejection:
        return Rejection(reason, self.retry_after_s(excess), f"the engine is overloaded: {why}; try again later")
