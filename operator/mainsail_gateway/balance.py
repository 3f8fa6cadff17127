"""Which endpoint a request goes to. Pure: values in, a choice out; the clock is an argument; nothing here waits.

The rules, in order:

1. **Health.** An endpoint that fails several times in a row is ejected for a while, longer each time (passive outlier
   ejection, as in Envoy). Never more than half of a service: above that the failures are taken to be everybody's, and
   ejections are ignored (panic threshold) instead of burying the rest. Whoever comes back, and whoever is new, gets a
   share that grows over `SLOW_START_S`.
2. **Affinity.** A prompt whose beginning was served before goes where it was served, longest known prefix first, and
   else to where consistent hashing (rendezvous) puts its beginning: every gateway agrees without talking.
3. **Bounded load** (Mirrokni et al., "Consistent hashing with bounded loads", 2016): affinity holds only while the
   endpoint would stay under 1.25 times its fair share of the token-weighted load in flight. An endpoint with hardly
   anything to do is never called loaded, so that affinity is not lost to noise.
4. **Least loaded** otherwise, in tokens per share; ties go to the one picked least recently, then by key.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

LOAD_BOUND = 1.25
QUIET_TOKENS = 8192
"""Below this load in flight an endpoint is not called loaded, whatever the others do: two long prompts, or some
thirty short ones, fewer than a batch of an engine holds."""
SLOW_START_S = 10.0
SLOW_START_FLOOR = 0.1
EJECT_AFTER = 3
EJECT_S = 5.0
EJECT_LONGEST_S = 60.0
EJECT_MOST = 0.5
PREFIX_LENGTHS = (512, 2048, 8192, 32768)
"""Bytes of a prompt's text. Shorter prompts have too little to gain from a cache to be tied to an endpoint."""


@dataclass(slots=True)
class Load:
    """What a gateway knows of an endpoint, from its own requests. Written by fleet.py and the functions below."""

    key: str
    since: float
    """When the endpoint was first seen, or came back from an ejection: its share grows from here."""
    requests: int = 0
    tokens: int = 0
    """Expected cost of the requests in flight."""
    picked: int = 0
    """Sequence number of the last pick."""
    failures: int = 0
    """In a row."""
    ejections: int = 0
    """In a row: doubled pauses, forgotten at the first success."""
    ejected_until: float = 0.0


def share(load: Load, now: float) -> float:
    """The part of a full endpoint's load that this one should get now: 0.1 … 1, growing over the slow start."""
    return min(1.0, max(SLOW_START_FLOOR, (now - load.since) / SLOW_START_S))


def usable(loads: Sequence[Load], now: float) -> Sequence[Load]:
    """Those not ejected; all of them when more than half are (panic)."""
    healthy = [load for load in loads if load.ejected_until <= now]
    return loads if len(loads) - len(healthy) > EJECT_MOST * len(loads) else healthy


def failed(load: Load, now: float, *, at_once: bool = False) -> None:
    """Count a failure. `at_once` ejects without waiting for more: the endpoint itself said that it is going."""
    load.failures += 1
    if (load.failures < EJECT_AFTER and not at_once) or load.ejected_until > now:
        return
    pause = min(EJECT_LONGEST_S, EJECT_S * 2**load.ejections)
    load.ejections = min(load.ejections + 1, 16)
    load.ejected_until = now + pause
    load.since = load.ejected_until
    load.failures = 0


def succeeded(load: Load) -> None:
    load.failures = 0
    load.ejections = 0


def prefix_keys(prompt: bytes, session: str | None = None) -> list[bytes]:
    """Names of the prompt's prefixes, shortest first, then of the session if the client names one."""
    keys: list[bytes] = []
    digest = hashlib.blake2b(digest_size=8)
    start = 0
    for length in PREFIX_LENGTHS:
        if len(prompt) < length:
            break
        digest.update(memoryview(prompt)[start:length])
        start = length
        keys.append(digest.digest())
    if session:
        keys.append(hashlib.blake2b(session.encode(), digest_size=8, person=b"session").digest())
    return keys


class PrefixIndex:
    """Which endpoint last served a prefix: a bounded, least-recently-used map."""

    def __init__(self, capacity: int = 65536) -> None:
        self._capacity = capacity
        self._homes: OrderedDict[bytes, str] = OrderedDict()

    def __len__(self) -> int:
        return len(self._homes)

    def get(self, prefix: bytes) -> str | None:
        return self._homes.get(prefix)

    def learn(self, prefixes: Iterable[bytes], endpoint: str) -> None:
        for prefix in prefixes:
            self._homes[prefix] = endpoint
            self._homes.move_to_end(prefix)
        while len(self._homes) > self._capacity:
            self._homes.popitem(last=False)


def rendezvous(prefix: bytes, loads: Sequence[Load]) -> list[Load]:
    """The endpoints in the order in which `prefix` prefers them (highest random weight), stable as others change."""

    def weight(load: Load) -> tuple[bytes, str]:
        return hashlib.blake2b(load.key.encode(), key=prefix, digest_size=8).digest(), load.key

    return sorted(loads, key=weight, reverse=True)


def pick(loads: Sequence[Load], weight: int, prefixes: Sequence[bytes], index: PrefixIndex, now: float) -> Load | None:
    """The endpoint for a request of `weight` tokens; None only when there is none at all."""
    candidates = usable(loads, now)
    if len(candidates) <= 1:
        return candidates[0] if candidates else None
    if prefixes:
        fair = LOAD_BOUND * (sum(load.tokens for load in candidates) + weight) / sum(share(c, now) for c in candidates)
        by_key = {load.key: load for load in candidates}
        for prefix in reversed(prefixes):
            home = by_key.get(index.get(prefix) or "")
            if home is not None and _within(home, weight, fair, now):
                return home
        # Which prefix is everybody's and which the request's own cannot be known beforehand; the longest spreads best,
        # and the index brings later turns back.
        for load in rendezvous(prefixes[-1], candidates):
            if _within(load, weight, fair, now):
                return load
    return min(candidates, key=lambda load: ((load.tokens + weight) / share(load, now), load.picked, load.key))


def _within(load: Load, weight: int, fair: float, now: float) -> bool:
    return load.tokens + weight <= max(fair, QUIET_TOKENS) * share(load, now)
