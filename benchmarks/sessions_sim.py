"""Agent sessions in a pool that is too small: the session policy against first come, first served with LRU eviction.

    python benchmarks/sessions_sim.py [--sessions 50] [--output results/sessions_sim.json]

The real scheduler on a simulated H200 with an 8B model (simulated.py), once with sessions and once without; all else is
the same. Every session begins with a shared system prompt of 2,000 tokens, then repeats: a turn (its prompt so far, and
a tool's result), an answer of 50 to 250 tokens, a pause while the tool runs (86 % under 1 s, 95 % under 10 s, the rest
up to a minute), for 8 turns to between 16k and 32k tokens. Sessions begin within the first 2 s. The pool is a share of
what all of them hold together at their ends; the host tier is off, or as large as the pool.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.simulated import SimulatedEngine

from mainsail_engine.protocol import RequestOutput
from mainsail_engine.request import Request, SamplingParams

SYSTEM_TOKENS = 2000
TURNS = 8
STARTS_WITHIN_S = 2.0
POOLS = (0.3, 0.4, 0.5, 0.75, 1.0, 1.5)
HOSTS = (0.0, 1.0)


def pause_s(rng: random.Random) -> float:
    """How long a tool takes."""
    which = rng.random()
    if which < 0.86:
        return rng.uniform(0.05, 1.0)
    return rng.uniform(1.0, 10.0) if which < 0.95 else rng.uniform(10.0, 60.0)


@dataclass
class Script:
    """One session, decided beforehand, so that every policy meets the same."""

    start_s: float
    inputs: list[int]
    answers: list[int]
    pauses_s: list[float]

    @property
    def final_tokens(self) -> int:
        return SYSTEM_TOKENS + sum(self.inputs) + sum(self.answers)


def scripts(count: int, seed: int) -> list[Script]:
    rng = random.Random(seed)
    made: list[Script] = []
    for _ in range(count):
        answers = [rng.randint(50, 250) for _ in range(TURNS)]
        weights = [rng.uniform(0.5, 1.5) for _ in range(TURNS)]
        growth = rng.randint(16_000, 32_000) - SYSTEM_TOKENS - sum(answers)
        inputs = [int(growth * weight / sum(weights)) for weight in weights]
        made.append(Script(rng.uniform(0, STARTS_WITHIN_S), inputs, answers, [pause_s(rng) for _ in range(TURNS)]))
    return made


class Session:
    """Plays a script against the engine."""

    def __init__(self, engine: SimulatedEngine, script: Script, number: int) -> None:
        self.engine, self.script, self.number = engine, script, number
        self.tokens = [1] * SYSTEM_TOKENS
        self.turn = 0
        self.turn_began_s = self.began_s = self.ended_s = script.start_s
        self.turn_s: list[float] = []
        engine.at(script.start_s, self.begin_turn)

    def begin_turn(self) -> None:
        rng = random.Random(self.number * 1000 + self.turn)
        self.tokens += rng.choices(range(2000, 30_000), k=self.script.inputs[self.turn])
        self.turn_began_s = self.engine.now
        params = SamplingParams(max_tokens=self.script.answers[self.turn], ignore_eos=True)
        request_id = f"{self.number} {self.turn}"
        self.engine.add(Request(request_id, list(self.tokens), params, self.engine.now))

    def take(self, output: RequestOutput, now: float) -> None:
        self.tokens += output.token_ids
        if output.finish_reason is None:
            return
        self.turn_s.append(now - self.turn_began_s)
        self.ended_s = now
        self.turn += 1
        if self.turn < TURNS:
            self.engine.at(now + self.script.pauses_s[self.turn], self.begin_turn)


@dataclass
class Result:
    pool: float
    """Share of the sessions' demand."""
    host: float
    """Share of the pool."""
    sessions: bool
    total_s: float
    hit_rate: float
    """Of the prompt tokens that an earlier turn had computed, and the shared system prompt."""
    recomputed_tokens: int
    """Prompt tokens that had been computed before, and were computed again."""
    turn_p50_s: float
    turn_p95_s: float
    session_p50_s: float
    session_p95_s: float
    preemptions: int
    swapped_in: int
    swapped_out: int
    longest_wait_s: float


def reusable_tokens(made: list[Script]) -> int:
    """Prompt tokens that were prompt or answer before: the system prompt, and all earlier turns."""
    reusable = 0
    for script in made:
        length = SYSTEM_TOKENS
        for new, answer in zip(script.inputs, script.answers, strict=True):
            reusable += length
            length += new + answer
    return reusable


def needed_tokens(made: list[Script]) -> int:
    """Prompt tokens to compute once: the system prompt, every input, and each answer's last token (only sampled)."""
    return SYSTEM_TOKENS + sum(sum(script.inputs) + TURNS - 1 for script in made)


def play(made: list[Script], pool: float, host: float, sessions: bool) -> Result:
    demand = sum(script.final_tokens - SYSTEM_TOKENS for script in made) + SYSTEM_TOKENS
    num_blocks = int(pool * demand) // 16
    engine = SimulatedEngine(num_blocks=num_blocks, num_host_blocks=int(num_blocks * host), agent_sessions=sessions)
    players = [Session(engine, script, number) for number, script in enumerate(made)]
    engine.on_output = lambda output, now: players[int(output.request_id.split()[0])].take(output, now)
    engine.run()
    engine.scheduler.check_integrity()
    turns = sorted(turn for player in players for turn in player.turn_s)
    lives = sorted(player.ended_s - player.began_s for player in players)
    stats = engine.scheduler.stats()
    return Result(
        pool, host, sessions,
        total_s=max(player.ended_s for player in players),
        hit_rate=stats.prefix_cache_hits / reusable_tokens(made),
        recomputed_tokens=engine.prefilled - needed_tokens(made),
        turn_p50_s=statistics.median(turns), turn_p95_s=turns[int(len(turns) * 0.95)],
        session_p50_s=statistics.median(lives), session_p95_s=lives[int(len(lives) * 0.95)],
        preemptions=stats.num_preemptions, swapped_in=stats.num_swapped_in, swapped_out=stats.num_swapped_out,
        longest_wait_s=turns[-1],
    )  # fmt: skip


def row(result: Result) -> str:
    name = "sessions" if result.sessions else "LRU"
    return (
        f"{result.pool:>5.0%} {result.host:>5.0%}  {name:<8} {result.total_s:>7.0f} {result.hit_rate:>6.1%} "
        f"{result.recomputed_tokens:>10,} {result.turn_p50_s:>7.2f} {result.turn_p95_s:>7.1f} "
        f"{result.session_p50_s:>8.0f} {result.session_p95_s:>8.0f} {result.longest_wait_s:>8.0f} "
        f"{result.preemptions:>5} {result.swapped_out:>8} {result.swapped_in:>8}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--pools", type=float, nargs="+", default=POOLS)
    parser.add_argument("--hosts", type=float, nargs="+", default=HOSTS)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    made = scripts(arguments.sessions, arguments.seed)
    print(" pool  host  policy   total s   hits recomputed turn50s turn95s sess.50s sess.95s longest preem out      in")
    results: list[Result] = []
    for host in arguments.hosts:
        for pool in arguments.pools:
            for sessions in (False, True):
                results.append(play(made, pool, host, sessions))
                print(row(results[-1]), flush=True)
    if arguments.output:
        arguments.output.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")


if __name__ == "__main__":
    main()
