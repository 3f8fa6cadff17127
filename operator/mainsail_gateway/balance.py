"""Which endpoint a request goes to. Pure: values in, a choice out; the clock is an argument; nothing here waits.

The rules, in order:

1. **Health.** An endpoint that fails several times in a row is ejected for a while, longer each time (passive outlier
   ejection, as in Envoy). Never more than half of a service: above that the failures are taken to be everybody's, and
   ejections are ignored (panic threshold) instead of burying the rest. Whoever comes back, and whoever is new, gets a
   share that grows over `SLOW_START_S`.
2. **Affinity, for what it saves.** The endpoint is taken where the least is to be done for this request: the prompts
   that are still to be computed there, a fixed cost for each request that runs there (every step of this one takes
   longer for it, however short it is), and what of its own prompt is not in the cache. That saves its tokens once: the
   next one like it finds them in both places. Many requests that begin alike so spread as soon as their number weighs
   more than one more copy of their beginning.
3. **Next turns** of a conversation that is at rest stay where it was, for `STICKINESS` times what that saves: its KV
   would be in two places for nothing. It is known by its messages, or by the name that its client gives it.
4. **New conversations** go where consistent hashing (rendezvous) of their *anchor* puts them (the messages up to the
   first that is not the system's, with which all its turns begin), so that gateways agree without talking and do not
   all run to whom an old reading shows idle; as far as the load allows, which hashing alone would not bound (Mirrokni
   et al., "Consistent hashing with bounded loads", 2016). Not where a cache would be given up that has most of the
   prompt: questions about one long document go where the document is.
5. **Least loaded** otherwise, in tokens per share; ties go to the one picked least recently, then by key.

What is to be done at an endpoint is what this gateway sent, and what the engine says that it has besides (from other
gateways), while that is fresh. Who has more requests than it runs at once lets them wait, which costs more; an engine
whose KV pool is full and whose requests wait comes last.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from mainsail_gateway.request import BYTES_PER_TOKEN

SLOW_START_S = 10.0
SLOW_START_FLOOR = 0.1
EJECT_AFTER = 3
EJECT_S = 5.0
EJECT_LONGEST_S = 60.0
EJECT_MOST = 0.5
FRESH_S = 10.0
"""What an engine said of its load counts for this long."""
FULL_KV = 0.95
"""Share of an engine's KV blocks in use from which requests that wait there wait for memory."""
WAITING_TOKENS = 2048
"""What a request of others that waits at an engine is taken to cost."""
SLOT_TOKENS = 65536
"""What waiting for its turn is taken to cost at an engine that runs one request at a time: some 250 steps, an answer's.
Where several run, one of them is through so many times sooner."""
ANSWERING_TOKENS = 256
"""What a request costs others besides its prompt: one row of many in each step, whatever its length."""
STICKINESS = 8
"""How much more a cached token of a conversation at rest is worth than one computed: what moves is cached twice, and
gateways that do not talk look for it in two places. Measured: benchmarks/gateway_balance.py."""
LOSS = 2
"""A new conversation is not drawn to its home for which, somewhere else, so many times as much of its prompt is cached
as would be left to compute there."""
LEAST_TOKENS = 64
"""What a conversation that the client names is worth at least: its answers are cached too."""
HOMES = 16
"""Endpoints that are remembered for a prefix. With fewer than have it, the others look as if they had not."""
PREFIX_LENGTHS = tuple(512 << doubled for doubled in range(11))
"""Bytes of a prompt's text, to 512 KiB: at least half of what two prompts share is known. Shorter ones have too little
to gain from a cache to be tied to an endpoint."""


@dataclass(slots=True)
class Load:
    """What a gateway knows of an endpoint, from its own requests. Written by fleet.py and the functions below."""

    key: str
    since: float
    """When the endpoint was first seen, or came back from an ejection: its share grows from here."""
    requests: int = 0
    prefill: int = 0
    """Tokens of prompts that are to be computed for those of them that wait for their first token."""
    picked: int = 0
    """Sequence number of the last pick."""
    failures: int = 0
    """In a row."""
    ejections: int = 0
    """In a row: doubled pauses, forgotten at the first success."""
    ejected_until: float = 0.0
    kv_tokens: int = 0
    """What its KV pool holds; 0: not known."""
    max_running: int = 0
    """Requests that it runs at once; 0: not known."""
    running: int = 0
    waiting: int = 0
    """Requests that it had, ours among them, when it last said so."""
    others: int = 0
    """Requests at the endpoint that are not ours, when it last said what it has …"""
    others_cost: int = 0
    """… and what they cost, in tokens."""
    resident: int = 0
    """Tokens of KV that its requests hold and that it keeps for sessions between turns, when it last said so."""
    full: bool = False
    """Its requests wait for KV blocks, when it last said so."""
    observed: float = -FRESH_S
    """When that was."""


def observe(load: Load, *, running: int, waiting: int, kv_usage: float, now: float, kept_tokens: int = 0) -> None:
    """Note what an engine says of itself. kept_tokens: KV that it keeps for sessions between turns."""
    load.running, load.waiting = running, waiting
    load.others = max(0, running + waiting - load.requests)
    queued = min(waiting, load.others)
    load.others_cost = queued * WAITING_TOKENS + (load.others - queued) * ANSWERING_TOKENS
    load.full = waiting > 0 and kv_usage >= FULL_KV
    load.resident = int(kv_usage * load.kv_tokens) + kept_tokens
    load.observed = now


def backlog(load: Load, now: float) -> int:
    """Tokens that are still to be computed there before the next prompt is, others' requests among them."""
    return load.prefill + (load.others_cost if now - load.observed < FRESH_S else 0)


def burden(load: Load, now: float) -> int:
    """What is to be done at the endpoint, in tokens, as far as is known."""
    return backlog(load, now) + ANSWERING_TOKENS * load.requests


def turn(load: Load, now: float) -> float:
    """What it costs one more request to wait there until it runs; 0 where it is not known how many run at once."""
    there = load.requests + (load.others if now - load.observed < FRESH_S else 0)
    return max(0, there + 1 - load.max_running) * SLOT_TOKENS / load.max_running if load.max_running else 0.0


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


_NOTHING: Mapping[str, int] = MappingProxyType({})


class Prefix(NamedTuple):
    """A beginning that prompts may share."""

    key: bytes
    tokens: int
    """What of the prompt an endpoint has in its cache once it has served this, roughly."""


def prefix_keys(prompt: bytes, session: str | None = None, anchor: bytes = b"", apart: str = "") -> list[Prefix]:
    """The prompt's prefixes, shortest first, then its conversation: what the client calls it, or its anchor. Who has
    served a conversation's last turn has all of it. apart: what else has to be the same for KV to be shared."""
    prefixes: list[Prefix] = []
    salt = hashlib.blake2b(apart.encode("utf-8", "surrogatepass"), digest_size=16).digest() if apart else b""
    digest = hashlib.blake2b(digest_size=8, key=salt)
    start = 0
    for length in PREFIX_LENGTHS:
        if len(prompt) < length:
            break
        digest.update(memoryview(prompt)[start:length])
        start = length
        prefixes.append(Prefix(digest.digest(), length // BYTES_PER_TOKEN))
    whole = len(prompt) // BYTES_PER_TOKEN
    if session:
        key = hashlib.blake2b(session.encode(), digest_size=8, key=salt, person=b"session").digest()
        prefixes.append(Prefix(key, max(whole, LEAST_TOKENS)))
    elif len(anchor) >= PREFIX_LENGTHS[0]:
        key = hashlib.blake2b(anchor, digest_size=8, key=salt, person=b"anchor").digest()
        prefixes.append(Prefix(key, whole))
    return prefixes


class PrefixIndex:
    """Which endpoints served a prefix, the last one first, and how much of it: a bounded, least-recently-used map."""

    def __init__(self, capacity: int = 65536) -> None:
        self._capacity = capacity
        self._homes: OrderedDict[bytes, tuple[tuple[str, int], ...]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._homes)

    def get(self, key: bytes) -> tuple[tuple[str, int], ...]:
        return self._homes.get(key, ())

    def saved(self, prefixes: Iterable[Prefix]) -> dict[str, int]:
        """By endpoint: tokens of the prompt that need not be computed there."""
        found: dict[str, int] = {}
        for key, tokens in prefixes:
            for endpoint, served in self._homes.get(key, ()):
                found[endpoint] = max(found.get(endpoint, 0), min(tokens, served))
        return found

    def learn(self, prefixes: Iterable[Prefix], endpoint: str) -> None:
        for key, tokens in prefixes:
            homes = self._homes.get(key, ())
            if not homes or homes[0] != (endpoint, tokens):
                others = [home for home in homes if home[0] != endpoint]
                self._homes[key] = ((endpoint, tokens), *others[: HOMES - 1])
            self._homes.move_to_end(key)
        while len(self._homes) > self._capacity:
            self._homes.popitem(last=False)


def rendezvous(prefix: bytes, loads: Sequence[Load]) -> list[Load]:
    """The endpoints in the order in which `prefix` prefers them (highest random weight), stable as others change."""

    def weight(load: Load) -> tuple[bytes, str]:
        return hashlib.blake2b(load.key.encode(), key=prefix, digest_size=8).digest(), load.key

    return sorted(loads, key=weight, reverse=True)


def pick(
    loads: Sequence[Load],
    prompt: int,
    prefixes: Sequence[Prefix],
    index: PrefixIndex,
    now: float,
    known: Mapping[str, int] = _NOTHING,
    *,
    alone: bool = True,
) -> tuple[Load, int] | None:
    """The endpoint for a request with a prompt of so many tokens, and how many of those are to be computed there; None
    only when there is no endpoint at all. known: what endpoints themselves say that they have of it, in tokens.
    alone: no other request of its conversation is in flight: it is the next turn, not one of many that begin alike."""
    candidates = usable(loads, now)
    if not candidates:
        return None
    saved = {**index.saved(prefixes), **known} if prefixes else {}
    drawn: dict[str, int] = {}
    if prefixes and any(key in saved for key, _ in index.get(prefixes[-1].key)):
        drawn = {key: (STICKINESS - 1) * tokens for key, tokens in saved.items()} if alone else {}
    elif prefixes and (home := _home(candidates, prefixes[-1], saved)) is not None:
        drawn = {home.key: STICKINESS * prefixes[-1].tokens}

    def cost(load: Load) -> tuple[bool, float, int, str]:
        work = burden(load, now) + max(0, prompt - saved.get(load.key, 0)) + turn(load, now)
        return _full(load, now), work / share(load, now) - drawn.get(load.key, 0), load.picked, load.key

    best = min(candidates, key=cost)
    return best, max(1, prompt - saved.get(best.key, 0))


def _home(candidates: Sequence[Load], conversation: Prefix, saved: Mapping[str, int]) -> Load | None:
    """Where a conversation belongs that nobody has served yet, and where the next gateway will look for it."""
    home = rendezvous(conversation.key, candidates)[0]
    most = max(saved.values(), default=0)
    lost = most - saved.get(home.key, 0)
    return home if lost <= LOSS * (conversation.tokens - most) else None


def _full(load: Load, now: float) -> bool:
    return load.full and now - load.observed < FRESH_S
