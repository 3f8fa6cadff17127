"""How many requests of a service may run at once, learned from their latency. Pure.

A replica that has more than it can compute does not refuse: it lets everybody wait, until nobody is answered in time.
So the gateway keeps the rest in a queue of its own (shed.py), where it can be ordered and refused, and lets as many
run as the latency bears.

The rule is a gradient, as in Netflix's concurrency-limits (Gradient2) and Envoy's adaptive concurrency: after each
window the limit is multiplied by (latency that is fine / latency seen), between 0.25 and 1, and given the square root
of itself as headroom. What is fine is learned for each class of requests (streamed or not, by powers of two of
their tokens), because a long prompt is not a sign of load:

* a request that finds the service quiet teaches its class's baseline, upwards and downwards; under load a baseline only
  falls. A service that is always overloaded therefore does not come to take that for normal;
* fine is `TOLERANCE` times the baseline: batching makes every step somewhat slower and the whole faster. Whole answers
  are a sum of many steps, so they are granted more than first tokens. Below `GRACE_S` all is fine.

Before the first window that was too slow the limit grows by half each time (slow start). It is kept for one replica, so
that a replica more is capacity at once. It never exceeds what the engines run together (`spec.engine.maxNumSeqs`):
further requests would only wait there.
"""

from dataclasses import dataclass, field

TOLERANCE = {True: 2.0, False: 4.0}
"""Streamed (time to the first token), not streamed (time of the whole answer)."""
GRACE_S = 0.5
FIRST_LIMIT = 32.0
"""For one replica, before anything is known."""
LEAST_LIMIT = 2.0
"""For one replica: fewer would starve a batching engine whatever the latency says. As few or fewer running requests are
called quiet: their latency is their own."""
WINDOW_S = 0.25
WINDOW_SAMPLES = 8
SMOOTHING = 0.5
MOST_CLASSES = 64

Class = tuple[bool, int]
"""Streamed, and the power of two of the tokens."""


def class_of(streamed: bool, tokens: int) -> Class:
    return streamed, min(tokens, 1 << 20).bit_length()


@dataclass(slots=True)
class Window:
    since: float = 0.0
    samples: int = 0
    strain: float = 0.0
    """Sum of latency over fine latency."""
    busiest: float = 0.0
    """Most that ran at once."""


@dataclass(slots=True)
class Gradient:
    """The limit for one replica, and what it was learned from."""

    limit: float = FIRST_LIMIT
    ramping: bool = True
    baselines: dict[Class, float] = field(default_factory=dict[Class, float])
    window: Window = field(default_factory=Window)

    def sample(self, kind: Class, latency_s: float, running: float, most: float, now: float) -> None:
        """A request was answered. running: how many ran in one replica when it was sent, itself included; most: the
        highest limit."""
        window = self.window
        window.samples += 1
        window.strain += latency_s / self._fine(kind, latency_s, quiet=running <= LEAST_LIMIT)
        window.busiest = max(window.busiest, running)
        if window.samples >= WINDOW_SAMPLES and now - window.since >= WINDOW_S:
            self._adapt(window, most)
            self.window = Window(since=now)

    def tick(self, running: float, most: float, now: float, *, keeping_up: bool) -> None:
        """While requests wait: judge a window of few samples too. Where none came, all that run have their first token
        (keeping_up): nothing speaks against more of them. Long streams would otherwise hold the limit where it is."""
        window = self.window
        if now - window.since < WINDOW_S or (not window.samples and not keeping_up):
            return
        if not window.samples:
            window.samples, window.strain, window.busiest = 1, 0.5, running
        self._adapt(window, most)
        self.window = Window(since=now)

    def overloaded(self, most: float, now: float) -> None:
        """A replica refused a request: its own queue is full."""
        self.window.samples += 1
        self.window.strain += 2.0
        if now - self.window.since >= WINDOW_S:
            self._adapt(self.window, most)
            self.window = Window(since=now)

    def _fine(self, kind: Class, latency_s: float, *, quiet: bool) -> float:
        base = self.baselines.get(kind)
        if base is None:
            if len(self.baselines) >= MOST_CLASSES:
                self.baselines.clear()
            base = latency_s if quiet else self._like(kind, latency_s)
        elif latency_s < base:
            base += 0.5 * (latency_s - base)
        elif quiet:
            base += 0.1 * (latency_s - base)
        self.baselines[kind] = base
        return max(GRACE_S, TOLERANCE[kind[0]] * base)

    def _like(self, kind: Class, latency_s: float) -> float:
        """A class first seen under load begins with what its nearest smaller neighbour has, if that is less."""
        smaller = [known for known in self.baselines if known[0] == kind[0] and known[1] <= kind[1]]
        return min(latency_s, self.baselines[max(smaller)]) if smaller else latency_s

    def _adapt(self, window: Window, most: float) -> None:
        strain = window.strain / window.samples
        if strain > 1.0:
            self.ramping = False
        elif window.busiest < 0.8 * self.limit:
            return  # the limit was not what bounded the load: nothing is learned about a higher one
        if self.ramping:
            wanted = self.limit * 1.5
        else:
            target = self.limit * min(1.0, max(0.25, 1.0 / strain)) + self.limit**0.5
            wanted = self.limit + SMOOTHING * (target - self.limit)
        self.limit = max(LEAST_LIMIT, min(most, wanted))
