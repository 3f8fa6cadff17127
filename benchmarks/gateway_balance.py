"""Agents' conversations over a simulated fleet: the gateway's balancing against the usual ones, in one table.

    python -m benchmarks.gateway_balance [--replicas 8] [--output benchmarks/results/gateway_balance.json]

A few minutes. The policy is the gateway's own code (`fleet.Pool`, `sessions.Sessions`, `kv_index.KVIndex`), in two
gateways that do not talk, each with its own memory, scraping the engines' load every two seconds, with and without the
engines' events about their KV. These go through the code that follows real engines (`kv_events.Feed`, from the wire's
bytes; heads of answers by the engine's `told_blocks`); the clock and the engines are simulated. An engine does what its
kind does: continuous batching under a token budget, prompts in chunks, a prefix cache by blocks with least-recently-
used eviction, and times of steps as of an 8B model on an H200. Each session belongs to one of a few applications with a
long system prompt, then repeats: a turn (its prompt so far, and a tool's result), an answer, a pause while the tool
runs (86 % under 1 s, 95 % under 10 s), as traces of coding agents have it. No client names its session. Every policy
meets the same trace.
"""

from __future__ import annotations

import argparse
import hashlib
import heapq
import json
import random
import statistics
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import count
from pathlib import Path

import msgspec

from mainsail_engine.server.told_blocks import packed
from mainsail_gateway import balance, sessions
from mainsail_gateway.fleet import Pool
from mainsail_gateway.kv_events import Feed, apply
from mainsail_gateway.kv_index import SAMPLE, Blocks
from mainsail_gateway.request import Chain
from mainsail_gateway.routes import Endpoint

BLOCK = 64
"""Tokens: coarser than an engine's, which changes nothing at these lengths."""
BUDGET = 4096
MAX_RUNNING = 256
SCRAPE_S = 2.0
BYTES = 4
"""Of text for a token."""


@dataclass
class Conversation:
    """One conversation, decided beforehand."""

    app: int
    name: int
    start_s: float
    inputs: list[int]
    answers: list[int]
    pauses_s: list[float]
    blocks: list[int] = field(default_factory=list)
    """Of the prompt so far; a block's number stands for its content and all before it."""
    tokens: int = 0
    turn: int = 0
    text: list[bytes] = field(default_factory=list)
    """What the gateway sees: one entry a message."""


@dataclass
class Turn:
    session: Conversation
    blocks: list[int]
    prompt_tokens: int
    answer: int
    arrived: float
    on_first: Callable[[], None]
    on_end: Callable[[float], None]
    left_to_prefill: int = 0
    cached: int = 0
    produced: int = 0
    first_s: float | None = None


class Engine:
    """One replica."""

    def __init__(self, capacity_blocks: int) -> None:
        self.capacity = capacity_blocks
        self.cache: OrderedDict[int, None] = OrderedDict()
        self.waiting: deque[Turn] = deque()
        self.prefilling: list[Turn] = []
        self.decoding: list[Turn] = []
        self.busy = False
        self.work_tokens = 0
        """Computed: what no cache held, and what was generated."""
        self.watchers: list[Callable[[int, bytes], None]] = []
        """Told what blocks come into the cache and which leave it: numbered batches as they are on the wire."""
        self.batches = 0

    @property
    def held(self) -> int:
        return sum(len(turn.blocks) for turn in (*self.prefilling, *self.decoding))

    def _admit(self) -> None:
        while self.waiting and len(self.prefilling) + len(self.decoding) < MAX_RUNNING:
            turn = self.waiting[0]
            running = self.prefilling or self.decoding
            if running and self.held + len(turn.blocks) + 4 > 0.98 * self.capacity:
                return
            self.waiting.popleft()
            hits = 0
            for block in turn.blocks:
                if block not in self.cache:
                    break
                hits += 1
            turn.cached = min(hits * BLOCK, turn.prompt_tokens - 1)
            turn.left_to_prefill = turn.prompt_tokens - turn.cached
            self.work_tokens += turn.left_to_prefill + turn.answer
            self.prefilling.append(turn)

    def step(self) -> tuple[float, Callable[[float], None]] | None:
        """The next step's seconds, and what to do at its end; None: nothing to do."""
        self._admit()
        if not self.prefilling and not self.decoding:
            return None
        decodes = list(self.decoding)
        seconds = 4.5e-3 + 1.5e-5 * len(decodes) + 2.7e-8 * sum(t.prompt_tokens + t.produced for t in decodes)
        budget, chunks = BUDGET - len(decodes), []
        for turn in self.prefilling:
            size = min(turn.left_to_prefill, budget)
            if size <= 0:
                break
            budget -= size
            start = turn.prompt_tokens - turn.left_to_prefill
            seconds += 2.0e-5 * size + 4.0e-10 * size * (start + size / 2)
            chunks.append((turn, size))
        return seconds, lambda now: self._end(decodes, chunks, now)

    def _end(self, decodes: list[Turn], chunks: list[tuple[Turn, int]], now: float) -> None:
        for turn, size in chunks:
            turn.left_to_prefill -= size
            if not turn.left_to_prefill:
                self.prefilling.remove(turn)
                self.decoding.append(turn)
                turn.first_s = now
                turn.on_first()
                self._keep(turn.blocks)
        for turn in (*decodes, *(turn for turn, _ in chunks if not turn.left_to_prefill)):
            turn.produced += 1
            if turn.produced >= turn.answer:
                self.decoding.remove(turn)
                turn.on_end(now)

    def _keep(self, blocks: list[int]) -> None:
        """The beginning last: it is what others share, and goes last."""
        new = [block for block in blocks if block not in self.cache]
        for block in reversed(blocks):
            self.cache[block] = None
            self.cache.move_to_end(block)
        old: list[int] = []
        while len(self.cache) > self.capacity:
            old.append(self.cache.popitem(last=False)[0])
        self.publish([["BlockStored", new, None, [], BLOCK, None, "GPU"], ["BlockRemoved", old, "GPU"]])

    def publish(self, events: list[list[object]]) -> None:
        if self.watchers:
            payload = msgspec.msgpack.encode([0.0, events, None])
            for tell in self.watchers:
                tell(self.batches, payload)
            self.batches += 1


Chosen = tuple[int, Callable[[], None], Callable[[float], None]]
"""The engine's number, what to call at the first token, and at the end (with the time)."""
Start = Callable[[Chosen, float], None]
Choose = Callable[[Conversation, int, float, Start], None]
"""Conversation, weight in tokens, now, and what to call when its turn may start."""


def at_once(pick: Callable[[Conversation, int, float], Chosen]) -> Choose:
    """A policy that holds nobody."""
    return lambda session, weight, now, start: start(pick(session, weight, now), now)


At = Callable[[float, Callable[[float], None]], None]
"""Calls back at that time, with it."""


def nothing() -> None:
    """For policies that do not look."""


def not_even_when(now: float) -> None:
    """For those that do not look at the end of turns either."""


def round_robin(engines: list[Engine], rng: random.Random, at: At) -> Choose:
    turns = count()
    return at_once(lambda session, weight, now: (next(turns) % len(engines), nothing, not_even_when))


def least_loaded(engines: list[Engine], rng: random.Random, at: At) -> Choose:
    """By requests that one gateway knows of, which sees them all."""
    running = [0] * len(engines)

    def choose(session: Conversation, weight: int, now: float) -> Chosen:
        best = min(range(len(engines)), key=lambda n: (running[n], rng.random()))
        running[best] += 1

        def end(now: float) -> None:
            running[best] -= 1

        return best, nothing, end

    return at_once(choose)


def _hashed(key: bytes, size: int) -> int:
    return max(range(size), key=lambda n: hashlib.blake2b(b"%d" % n, key=key, digest_size=8).digest())


def hash_of_prefix(engines: list[Engine], rng: random.Random, at: At) -> Choose:
    """Plain consistent hashing of the prompt's first 2 KiB."""

    def choose(session: Conversation, weight: int, now: float) -> Chosen:
        key = hashlib.blake2b(b"".join(session.text)[:2048], digest_size=8).digest()
        return _hashed(key, len(engines)), nothing, not_even_when

    return at_once(choose)


def hash_of_session(engines: list[Engine], rng: random.Random, at: At) -> Choose:
    """Plain consistent hashing of an id that every client would have to send."""
    return at_once(lambda session, weight, now: (_hashed(b"%d" % session.name, len(engines)), nothing, not_even_when))


class Gateway:
    """One of several that do not talk: the gateway's own policies, on the simulated clock."""

    def __init__(self, engines: list[Engine], at: At, *, holds: bool, events: bool) -> None:
        self._engines, self._at, self._holds, self._events = engines, at, holds, events
        self._pool = Pool()
        self._pool.update([Endpoint(str(n), "", 0, str(n)) for n in range(len(engines))], 0.0)
        self._starts: dict[sessions.Session, Callable[[frozenset[str] | None, float], None]] = {}
        self._ticking = False
        self._scraped = -SCRAPE_S
        for n, engine in enumerate(engines if events else ()):
            engine.watchers.append(partial(self._on_batch, str(n), Feed()))

    def _on_batch(self, endpoint: str, feed: Feed, number: int, payload: bytes) -> None:
        for change in feed.live(number, payload):
            apply(self._pool.kv, endpoint, change)

    def _scrape(self, now: float) -> None:
        if now - self._scraped < SCRAPE_S:
            return
        self._scraped = now
        for n, engine in enumerate(self._engines):
            running = len(engine.prefilling) + len(engine.decoding)
            usage = engine.held / engine.capacity
            self._pool.observe(
                str(n), running=running, waiting=len(engine.waiting), kv_usage=usage, now=now,
                kv_tokens=engine.capacity * BLOCK,
            )  # fmt: skip

    def _known(self, session: sessions.Session) -> sessions.Known:
        return self._pool.kv.cached(session.prefixes)

    def choose(self, talk: Conversation, weight: int, now: float, start: Start) -> None:
        self._scrape(now)
        policy = self._pool.sessions
        session = policy.arrive(chain(talk), now)
        session.prefixes = tuple(balance.prefix_keys(b"".join(talk.text), anchor=b"".join(talk.text[:2])))
        begin = partial(self._begin, session, talk, list(talk.blocks), talk.tokens, weight, start)
        places = policy.fits(session, self._pool.loads.values(), now, self._known(session)) if self._holds else None
        if places is None or places:
            begin(places, now)
            return
        policy.hold(session, 0, now)
        self._starts[session] = begin
        self._watch(now)

    def _begin(
        self, session: sessions.Session, talk: Conversation, blocks: list[int], tokens: int, weight: int, start: Start,
        places: frozenset[str] | None, now: float,
    ) -> None:  # fmt: skip
        found = self._pool.pick(tokens, session.prefixes, set(), now, places=places)
        if found is None:
            raise RuntimeError("no endpoint")
        endpoint = found.endpoint
        self._pool.index.learn(session.prefixes, endpoint.key)
        self._pool.sessions.begin(session, endpoint.key)
        running = self._pool.in_flight(found, session.prefixes)
        flight = running.__enter__()

        def answering() -> None:
            flight.answering()
            if self._events and (told := Blocks.told(head_of(blocks, tokens))) is not None:
                self._pool.kv.learn(session.prefixes, told, tokens)

        def end(then: float) -> None:
            running.__exit__(None, None, None)
            self._pool.sessions.end(session, weight - tokens, then)
            self._let_in(then)

        start((int(endpoint.key), answering, end), now)

    def _let_in(self, now: float) -> None:
        self._scrape(now)
        loads = self._pool.loads
        self._pool.sessions.advance(loads, now)
        while (found := self._pool.sessions.next(loads.values(), now, self._known)) is not None:
            self._starts.pop(found[0])(found[1], now)

    def _watch(self, now: float) -> None:
        """While somebody is held, four times a second."""
        if not self._ticking:
            self._ticking = True
            self._at(now + 0.25, self._tick)

    def _tick(self, now: float) -> None:
        self._ticking = False
        self._let_in(now)
        if self._starts:
            self._watch(now)


def chain(talk: Conversation) -> Chain:
    """As request.py makes it of the messages."""
    digest = hashlib.blake2b(talk.text[0], digest_size=8)
    shared, keys = digest.digest(), list[bytes]()
    for message in talk.text[1:]:
        digest.update(message)
        keys.append(digest.digest())
    return Chain(tuple(keys), talk.tokens, shared, len(talk.text[0]) // BYTES)


def head_of(blocks: list[int], tokens: int) -> bytes:
    """What an engine says of a prompt in the head of its answer."""
    return packed(tokens, [((number + 1) * BLOCK, block) for number, block in enumerate(blocks)]).encode()


def mainsail(
    engines: list[Engine], rng: random.Random, at: At, *, gateways: int = 2, holds: bool = True, events: bool = False
) -> Choose:
    """Turns come to either gateway by chance, which is the worst case."""
    fronts = [Gateway(engines, at, holds=holds, events=events) for _ in range(gateways)]
    for engine in engines:
        engine.publish([["AllBlocksCleared"]])
    return lambda talk, weight, now, start: rng.choice(fronts).choose(talk, weight, now, start)


POLICIES: dict[str, Callable[[list[Engine], random.Random, At], Choose]] = {
    "round-robin": round_robin,
    "least loaded": least_loaded,
    "consistent hashing, prefix": hash_of_prefix,
    "consistent hashing, session id": hash_of_session,
    "mainsail, holding nobody": partial(mainsail, holds=False),
    "mainsail": mainsail,
    "mainsail with KV events": partial(mainsail, events=True),
    "mainsail with KV events, one gateway": partial(mainsail, events=True, gateways=1),
}


def pause_s(rng: random.Random) -> float:
    which = rng.random()
    if which < 0.86:
        return rng.uniform(0.05, 1.0)
    return rng.uniform(1.0, 10.0) if which < 0.95 else rng.uniform(10.0, 60.0)


def trace(args: argparse.Namespace) -> list[Conversation]:
    rng = random.Random(args.seed)
    made: list[Conversation] = []
    for name in range(args.sessions):
        turns = rng.randint(4, 16)
        app = min(int(rng.expovariate(0.6)), args.apps - 1)  # a few are much used
        made.append(
            Conversation(
                app,
                name,
                rng.uniform(0, args.within_s),
                [rng.choice((150, 400, 900, 2500)) for _ in range(turns)],
                [rng.randint(40, 250) for _ in range(turns)],
                [pause_s(rng) for _ in range(turns)],
            )
        )
    return made


def _block(content: str) -> int:
    """A block's hash: of those that gateways keep, so that 64 tokens are as precise here as they are there."""
    return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest(), "big") // SAMPLE * SAMPLE


def extend(session: Conversation, kind: str, tokens: int) -> None:
    """One more message of that many tokens."""
    owner = f"app {session.app}" if kind == "system" else f"session {session.name}"
    session.tokens += tokens
    last = session.blocks[-1] if session.blocks else 0
    while (len(session.blocks) + 1) * BLOCK <= session.tokens:
        last = _block(f"{owner} {last} {len(session.blocks)}")
        session.blocks.append(last)
    stamp = f"{kind} {owner} {len(session.text)} ".encode()
    session.text.append((stamp * (tokens * BYTES // len(stamp) + 1))[: tokens * BYTES])


@dataclass
class Outcome:
    policy: str
    hit_rate: float
    ttft_p50_s: float
    ttft_p95_s: float
    turn_p95_s: float
    imbalance: float
    """Work of the busiest replica over the mean."""
    makespan_s: float


def run(policy: str, args: argparse.Namespace) -> Outcome:
    engines = [Engine(args.pool_tokens // BLOCK) for _ in range(args.replicas)]
    events: list[tuple[float, int, Callable[[float], None]]] = []
    ids, done = count(), []

    def at(time_s: float, what: Callable[[float], None]) -> None:
        heapq.heappush(events, (time_s, next(ids), what))

    choose = POLICIES[policy](engines, random.Random(args.seed), at)

    def kick(engine: Engine, now: float) -> None:
        if engine.busy or (step := engine.step()) is None:
            return
        engine.busy = True

        def end(then: float) -> None:
            step[1](then)
            engine.busy = False
            kick(engine, then)

        at(now + step[0], end)

    def begin(session: Conversation, now: float) -> None:
        extend(session, "user", session.inputs[session.turn])
        answer = session.answers[session.turn]
        weight = session.tokens + answer

        def start(chosen: Chosen, then: float) -> None:
            number, answering, ended = chosen

            def on_end(when: float) -> None:
                ended(when)
                done.append((turn, when))
                extend(session, "answer", answer)
                pause = session.pauses_s[session.turn]
                session.turn += 1
                if session.turn < len(session.inputs):
                    at(when + pause, lambda later: begin(session, later))

            turn = Turn(session, blocks, tokens, answer, now, answering, on_end)
            engines[number].waiting.append(turn)
            kick(engines[number], then)

        blocks, tokens = list(session.blocks), session.tokens
        choose(session, weight, now, start)

    for session in trace(args):
        extend(session, "system", 800 + 700 * (session.app % 5))
        at(session.start_s, lambda now, session=session: begin(session, now))
    while events:
        now, _, what = heapq.heappop(events)
        what(now)
    return outcome(policy, engines, done)


def outcome(policy: str, engines: list[Engine], done: list[tuple[Turn, float]]) -> Outcome:
    first = sorted((turn.first_s or 0.0) - turn.arrived for turn, _ in done)
    whole = sorted(end - turn.arrived for turn, end in done)
    work = [engine.work_tokens for engine in engines]
    return Outcome(
        policy=policy,
        hit_rate=sum(turn.cached for turn, _ in done) / sum(turn.prompt_tokens for turn, _ in done),
        ttft_p50_s=first[len(first) // 2],
        ttft_p95_s=first[int(len(first) * 0.95)],
        turn_p95_s=whole[int(len(whole) * 0.95)],
        imbalance=max(work) / statistics.mean(work),
        makespan_s=max(end for _, end in done),
    )


def rows(outcomes: list[Outcome]) -> Iterator[str]:
    yield "| policy | hit rate | TTFT p50 | TTFT p95 | turn p95 | imbalance | all done after |"
    yield "|---|---|---|---|---|---|---|"
    for o in outcomes:
        yield (
            f"| {o.policy} | {o.hit_rate:.1%} | {o.ttft_p50_s * 1000:.0f} ms | {o.ttft_p95_s * 1000:.0f} ms "
            f"| {o.turn_p95_s:.2f} s | {o.imbalance:.2f} | {o.makespan_s:.0f} s |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sessions", type=int, nargs="+", default=[400, 800, 1600], help="one table for each")
    parser.add_argument("--replicas", type=int, default=8)
    parser.add_argument("--apps", type=int, default=6, help="system prompts")
    parser.add_argument("--pool-tokens", type=int, default=260_000, help="KV of a replica")
    parser.add_argument("--within-s", type=float, default=60.0, help="sessions begin within this time")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    tables: list[dict[str, object]] = []
    for number in args.sessions:
        setting = {name: value for name, value in vars(args).items() if name != "output"} | {"sessions": number}
        outcomes = [run(policy, argparse.Namespace(**setting)) for policy in POLICIES]
        print(f"{number} sessions of {args.apps} applications over {args.replicas} replicas\n")
        print("\n".join(rows(outcomes)) + "\n", flush=True)
        tables.append({"setting": setting, "outcomes": [asdict(o) for o in outcomes]})
    if args.output:
        args.output.write_text(json.dumps(tables, indent=1) + "\n")


if __name__ == "__main__":
    main()
