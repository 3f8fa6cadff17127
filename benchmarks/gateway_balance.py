"""Agents' conversations over a simulated fleet: the gateway's balancing against the usual ones, in one table.

    python -m benchmarks.gateway_balance [--replicas 8] [--output benchmarks/results/gateway_balance.json]

The policy is the gateway's own code (`fleet.Pool`), in two gateways that do not talk, each with its own memory,
scraping the engines' load every two seconds; the clock and the engines are simulated. An engine does what its kind
does: continuous batching under a token budget, prompts in chunks, a prefix cache by blocks with least-recently-used
eviction, and times of steps as of an 8B model on an H200. Each session belongs to one of a few applications with a long
system prompt, then repeats: a turn (its prompt so far, and a tool's result), an answer, a pause while the tool runs
(86 % under 1 s, 95 % under 10 s), as traces of coding agents have it. No client names its session. Every policy meets
the same trace.
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
from itertools import count
from pathlib import Path

from mainsail_gateway import balance
from mainsail_gateway.fleet import Flight, Pool
from mainsail_gateway.routes import Endpoint

BLOCK = 64
"""Tokens: coarser than an engine's, which changes nothing at these lengths."""
BUDGET = 4096
MAX_RUNNING = 256
SCRAPE_S = 2.0
BYTES = 4
"""Of text for a token."""


@dataclass
class Session:
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
    session: Session
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
        for block in reversed(blocks):
            self.cache[block] = None
            self.cache.move_to_end(block)
        while len(self.cache) > self.capacity:
            self.cache.popitem(last=False)


Chosen = tuple[int, Callable[[], None], Callable[[], None]]
"""The engine's number, what to call at the first token, and at the end."""
Choose = Callable[[Session, int, float], Chosen]
"""Session, weight in tokens, now."""


def nothing() -> None:
    """For policies that do not look."""


def round_robin(engines: list[Engine], rng: random.Random) -> Choose:
    turns = count()
    return lambda session, weight, now: (next(turns) % len(engines), nothing, nothing)


def least_loaded(engines: list[Engine], rng: random.Random) -> Choose:
    """By requests that one gateway knows of, which sees them all."""
    running = [0] * len(engines)

    def choose(session: Session, weight: int, now: float) -> Chosen:
        best = min(range(len(engines)), key=lambda n: (running[n], rng.random()))
        running[best] += 1

        def end() -> None:
            running[best] -= 1

        return best, nothing, end

    return choose


def _hashed(key: bytes, size: int) -> int:
    return max(range(size), key=lambda n: hashlib.blake2b(b"%d" % n, key=key, digest_size=8).digest())


def hash_of_prefix(engines: list[Engine], rng: random.Random) -> Choose:
    """Plain consistent hashing of the prompt's first 2 KiB."""

    def choose(session: Session, weight: int, now: float) -> Chosen:
        key = hashlib.blake2b(b"".join(session.text)[:2048], digest_size=8).digest()
        return _hashed(key, len(engines)), nothing, nothing

    return choose


def hash_of_session(engines: list[Engine], rng: random.Random) -> Choose:
    """Plain consistent hashing of an id that every client would have to send."""
    return lambda session, weight, now: (_hashed(b"%d" % session.name, len(engines)), nothing, nothing)


def mainsail(engines: list[Engine], rng: random.Random, gateways: int = 2) -> Choose:
    pools = [Pool() for _ in range(gateways)]
    for pool in pools:
        pool.update([Endpoint(str(n), "", 0, str(n)) for n in range(len(engines))], 0.0)
    scraped = [-1.0] * gateways

    def choose(session: Session, weight: int, now: float) -> Chosen:
        which = rng.randrange(gateways)
        pool = pools[which]
        if now - scraped[which] >= SCRAPE_S:
            scraped[which] = now
            for n, engine in enumerate(engines):
                running = len(engine.prefilling) + len(engine.decoding)
                usage = engine.held / engine.capacity
                pool.observe(str(n), running=running, waiting=len(engine.waiting), kv_usage=usage, now=now)
        keys = balance.prefix_keys(b"".join(session.text), anchor=b"".join(session.text[:2]))
        found = pool.pick(weight, keys, set(), now)
        if found is None:
            raise RuntimeError("no endpoint")
        endpoint, load, cost = found
        pool.index.learn(keys, endpoint.key)
        flight = Flight(load, cost)
        return int(endpoint.key), flight.answering, flight.end

    return choose


POLICIES: dict[str, Callable[[list[Engine], random.Random], Choose]] = {
    "round-robin": round_robin,
    "least loaded": least_loaded,
    "consistent hashing, prefix": hash_of_prefix,
    "consistent hashing, session id": hash_of_session,
    "mainsail, 2 gateways, no id": mainsail,
}


def pause_s(rng: random.Random) -> float:
    which = rng.random()
    if which < 0.86:
        return rng.uniform(0.05, 1.0)
    return rng.uniform(1.0, 10.0) if which < 0.95 else rng.uniform(10.0, 60.0)


def sessions(args: argparse.Namespace) -> list[Session]:
    rng = random.Random(args.seed)
    made: list[Session] = []
    for name in range(args.sessions):
        turns = rng.randint(4, 16)
        app = min(int(rng.expovariate(0.6)), args.apps - 1)  # a few are much used
        made.append(
            Session(
                app,
                name,
                rng.uniform(0, args.within_s),
                [rng.choice((150, 400, 900, 2500)) for _ in range(turns)],
                [rng.randint(40, 250) for _ in range(turns)],
                [pause_s(rng) for _ in range(turns)],
            )
        )
    return made


def extend(session: Session, kind: str, tokens: int) -> None:
    """One more message of that many tokens."""
    owner = f"app {session.app}" if kind == "system" else f"session {session.name}"
    session.tokens += tokens
    last = session.blocks[-1] if session.blocks else 0
    while (len(session.blocks) + 1) * BLOCK <= session.tokens:
        last = hash((owner, last, len(session.blocks)))
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
    choose = POLICIES[policy](engines, random.Random(args.seed))
    events: list[tuple[float, int, Callable[[float], None]]] = []
    ids, done = count(), []

    def at(time_s: float, what: Callable[[float], None]) -> None:
        heapq.heappush(events, (time_s, next(ids), what))

    def kick(engine: Engine, now: float) -> None:
        if engine.busy or (step := engine.step()) is None:
            return
        engine.busy = True

        def end(then: float) -> None:
            engine.busy = False
            step[1](then)
            kick(engine, then)

        at(now + step[0], end)

    def begin(session: Session, now: float) -> None:
        extend(session, "user", session.inputs[session.turn])
        answer = session.answers[session.turn]
        number, answering, ended = choose(session, session.tokens + answer, now)

        def on_end(then: float) -> None:
            ended()
            done.append((turn, then))
            extend(session, "answer", answer)
            pause = session.pauses_s[session.turn]
            session.turn += 1
            if session.turn < len(session.inputs):
                at(then + pause, lambda when: begin(session, when))

        turn = Turn(session, list(session.blocks), session.tokens, answer, now, answering, on_end)
        engines[number].waiting.append(turn)
        kick(engines[number], now)

    for session in sessions(args):
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
    parser.add_argument("--sessions", type=int, default=400)
    parser.add_argument("--replicas", type=int, default=8)
    parser.add_argument("--apps", type=int, default=6, help="system prompts")
    parser.add_argument("--pool-tokens", type=int, default=260_000, help="KV of a replica")
    parser.add_argument("--within-s", type=float, default=60.0, help="sessions begin within this time")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    outcomes = [run(policy, args) for policy in POLICIES]
    print(f"{args.sessions} sessions of {args.apps} applications over {args.replicas} replicas\n")
    print("\n".join(rows(outcomes)))
    if args.output:
        setting = {name: value for name, value in vars(args).items() if name != "output"}
        args.output.write_text(
            json.dumps({"setting": setting, "outcomes": [asdict(o) for o in outcomes]}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
