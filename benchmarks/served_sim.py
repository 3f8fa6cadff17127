"""The rows of served_gpu.py on a simulated H200, beside what the card measured: the real scheduler and admission.

    python -m benchmarks.served_sim [--rows P7,P8,P9,P10,P11,P12] [--budget N] [--kv-bytes 1] [--output FILE]

A step costs what its parts cost on the card (`H200`: linears by rows, padded as the runner pads them; decode attention
by bytes; prefill attention by programs and the waves they make), two steps are in flight, and a request takes its time
to be parsed. Clients do what those of served_gpu.py do. It decides between policies in seconds; what it says is a
prediction until the card has said it too. Measured figures: benchmarks/results/served.json.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
from bisect import bisect_left
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from statistics import fmean

from benchmarks.served_gpu import GOALS, ROWS, Answer, Figures, Job
from benchmarks.simulated import SimulatedEngine

from mainsail_engine.chunking import STEP_ROWS, attention_pairs
from mainsail_engine.protocol import RequestOutput
from mainsail_engine.request import FinishReason, Request, SamplingParams
from mainsail_engine.runner.batch import TRANSPOSE_ROWS
from mainsail_engine.runner.cuda_graphs import LARGEST_DECODE, decode_sizes
from mainsail_engine.server.admission import Admission
from mainsail_engine.server.board import Board
from mainsail_engine.step import StepPlan, StepResult
from mainsail_kernels.kv_transpose import PAYING_PAIRS, are_transposed

RESULTS = Path(__file__).parent / "results"
MEASURED = {2: RESULTS / "served.json", 1: RESULTS / "served_fp8_kv.json"}
"""By bytes of a number in the KV cache."""
NUM_BLOCKS = 56_000
"""Of an H200 with an 8B model in bf16: 0.9 million tokens."""
HOST_BLOCKS = 14_000
"""A quarter of what a machine of 128 GiB has free."""
SMS = 132
"""Multiprocessors."""
PROGRAM_TOKENS, KV_HEADS = 32, 8
DECODE_SIZES = decode_sizes(LARGEST_DECODE)


def decode_rows(count: int) -> int:
    """Rows of a step of so many decodes, padded (runner/cuda_graphs.py)."""
    return DECODE_SIZES[bisect_left(DECODE_SIZES, count)]


def mixed_rows(count: int) -> int:
    return next((size for size in STEP_ROWS if size >= count), count)


@dataclass(frozen=True)
class H200:
    """Seconds. An 8B model in bf16; linears of all layers and the head by rows, measured alone."""

    linears: tuple[tuple[int, float], ...] = (
        (1, 3.9e-3), (32, 4.45e-3), (64, 4.6e-3), (128, 4.9e-3), (256, 6.85e-3), (320, 8.1e-3), (384, 8.7e-3),
        (447, 9.9e-3), (448, 13.9e-3), (449, 9.9e-3), (512, 10.9e-3), (640, 14.1e-3), (768, 16.8e-3), (1024, 21e-3),
        (1280, 25.5e-3), (2048, 40.5e-3), (8192, 160e-3),
    )  # fmt: skip
    step: float = 0.35e-3
    mixed: float = 0.5e-3
    """More, where prompts and decodes go together."""
    row: float = 1.6e-6
    """Norms, rotary, activation: a row."""
    context_token: float = 131_072 / 4.2e12
    fp8_kv: bool = False
    layers: int = 32
    program: float = 4e-6
    """Of prompts' attention, beside its tiles: a program has PROGRAM_TOKENS of a chunk and one KV head."""
    tile: float = 1.8e-6
    """128 positions of its context: 4 waves of 2,048 tokens on 32k take 1,850 us, 4 of 4 x 512 on 16k 881."""
    fp8_tile: float = 1.54e-6
    """The same in the FP8 kernel, of an FP8 cache whose values are transposed: 16 to 18 % faster, for 370 on 16k as for
    2,048 on 32k."""
    general_tile: float = 3.2e-6
    """The same in the general kernel, of an FP8 cache whose values are not. A full card takes 3.4 (2,048 on 32k) to 4.1
    (2 x 512 on 16k); this, for programs that have a multiprocessor nearly to themselves, is what explains P11."""
    transposed_token: float = 0.68e-9
    """Of context, a layer: 10.8 us for 16k, 22.3 for 32k."""
    transpose_rows: int = TRANSPOSE_ROWS
    split: bool = False
    """As if contexts could be cut at will: programs fill the card to the end. That decodes go beside prompts where
    these leave multiprocessors idle is not simulated: cutting takes that from them."""
    host: float = 1.2e-3
    """From the end of a step to the launch of the next but one: it delays what arrives meanwhile, not the device."""
    load_block: float = 4.2e-5
    launches: float = 30e-3
    """The host's, of a step that is too large for a graph: kernel by kernel, while the device computes the step before
    and this one."""

    def linear_s(self, rows: int) -> float:
        for (low, low_s), (high, high_s) in pairwise(self.linears):
            if rows <= high:
                return low_s + (high_s - low_s) * (rows - low) / (high - low)
        return self.linears[-1][1] * rows / self.linears[-1][0]

    def seconds(self, plan: StepPlan) -> float:
        decodes, prefills = plan.chunks[: plan.num_decodes], plan.chunks[plan.num_decodes :]
        rows = mixed_rows(plan.num_tokens) if prefills else decode_rows(len(decodes))
        context = sum(chunk.start for chunk in decodes)
        own = self.step + (self.mixed if prefills else 0.0)
        prompts = self.layers * self.prompts_s([(chunk.start, chunk.num_tokens) for chunk in prefills], plan.num_tokens)
        return own + self.linear_s(rows) + self.row * rows + self.context_token * context + prompts

    def prompts_s(self, chunks: list[tuple[int, int]], num_tokens: int) -> float:
        """A layer's attention of (start, tokens), in a step of so many tokens."""
        if not self.fp8_kv:
            return self.waves_s(chunks, self.tile, split=self.split)
        transposed = are_transposed([tokens for _, tokens in chunks])
        long = [chunk for chunk, is_long in zip(chunks, transposed, strict=True) if is_long]
        if num_tokens < self.transpose_rows or sum(attention_pairs(*chunk) for chunk in long) < PAYING_PAIRS:
            return self.waves_s(chunks, self.general_tile, split=False)
        short = [chunk for chunk, is_long in zip(chunks, transposed, strict=True) if not is_long]
        transposing = self.transposed_token * sum(start + tokens for start, tokens in long)
        few = self.waves_s(short, self.general_tile, split=False)
        return transposing + few + self.waves_s(long, self.fp8_tile, split=self.split)

    def waves_s(self, chunks: list[tuple[int, int]], tile_s: float, *, split: bool) -> float:
        return waves_s(tuple(chunks), self.program, tile_s, split)


@lru_cache(1 << 14)
def waves_s(chunks: tuple[tuple[int, int], ...], program_s: float, tile_s: float, split: bool) -> float:
    """Until the last program of these (start, tokens) ends: each multiprocessor takes the next when done with one."""
    programs = [
        program_s + tile_s * -(-min(start + first + PROGRAM_TOKENS, start + tokens) // 128)
        for start, tokens in reversed(chunks)
        for first in reversed(range(0, tokens, PROGRAM_TOKENS))
        for _ in range(KV_HEADS)
    ]
    if split:
        return sum(programs) / SMS + (program_s if programs else 0.0)
    free = [0.0] * SMS
    for took_s in programs:
        heapq.heapreplace(free, free[0] + took_s)
    return max(free)


class OverlappedEngine(SimulatedEngine):
    """Two steps in flight: the next is planned while the device computes, as EngineCore does it."""

    def __init__(self, cost: H200, *, num_blocks: int, num_host_blocks: int, budget: int) -> None:
        super().__init__(
            cost=cost, latency_s=0.04, num_blocks=num_blocks, num_host_blocks=num_host_blocks, budget=budget
        )
        self._device = cost
        self._flying: deque[tuple[StepPlan, float]] = deque()
        """(plan, when the device is done with it)"""
        self._device_free_s = 0.0
        self.steps: list[tuple[int, int, float]] = []
        """(decodes, prompt tokens, seconds)"""

    def step(self) -> bool:
        while len(self._flying) < 2 and (plan := self.scheduler.schedule(self.now)) is not None:
            self._launch(plan)
        if not self._flying:
            return False
        plan, end_s = self._flying.popleft()
        ended_unseen, self.now = end_s < self.now, max(self.now, end_s)
        while self._loads and self._loads[0] <= self.now:
            self._loads.popleft()
            self._num_loaded += 1
        tokens = [3 + (chunk.start * 31 + chunk.slot) % 1000 for chunk in plan.chunks if chunk.samples]
        result = StepResult(tokens, num_loaded=self._num_loaded, ended_unseen=ended_unseen)
        self.on_step(plan)
        for output in self.scheduler.commit(plan, result, self.now):
            self.on_output(output, self.now)
        self.now += self._device.host
        return True

    def _launch(self, plan: StepPlan) -> None:
        for _ in plan.loads:
            self._bus_free_s = max(self._bus_free_s, self.now) + self._device.load_block
            self._loads.append(self._bus_free_s)
        began_s = max(self.now, self._device_free_s)
        took_s = self._device.seconds(plan) if plan.chunks else 0.0
        launches_s = self._device.launches if plan.num_tokens > STEP_ROWS[-1] else 0.0
        self.now += launches_s
        self._device_free_s = max(began_s + took_s, self.now)
        self.busy_s += took_s
        self.decoded += plan.num_decodes
        self.prefilled += plan.num_tokens - plan.num_decodes
        self.steps.append((plan.num_decodes, plan.num_tokens - plan.num_decodes, took_s))
        waits_for_loads = not plan.chunks and self._loads
        end_s = max(self._device_free_s, self._loads[-1]) if waits_for_loads else self._device_free_s
        self._flying.append((plan, end_s))


Done = Callable[[list[int]], None]
"""Called with an answer's tokens at its end."""


class Server:
    """An engine behind HTTP, simulated: requests are parsed one after another, tokens take a moment to arrive."""

    PARSE_S, PARSE_TOKEN_S = 0.3e-3, 0.4e-6
    WIRE_S = 1.5e-3

    def __init__(self, engine: OverlappedEngine, max_wait_s: float = 4.0) -> None:
        self.engine = engine
        self.board = Board()
        self.admission = Admission(max_requests=100_000, max_tokens=10_000_000, max_wait_s=max_wait_s, board=self.board)
        self._random = random.Random(0)
        self._parsed_s = 0.0
        self._count = 0
        self._live: dict[str, tuple[Answer, list[int], int, Done]] = {}
        """By request id: the answer, its tokens, the prompt's length, and whom to tell of its end."""
        engine.on_output = self._take

    def tokens(self, count: int) -> list[int]:
        return self._random.choices(range(1000, 128_000), k=count)

    def send(self, prompt: list[int], max_tokens: int, answer: Answer, done: Done) -> None:
        """A client's request, now."""
        answer.start_s = self.engine.now
        self._parsed_s = max(self._parsed_s, self.engine.now) + self.PARSE_S + self.PARSE_TOKEN_S * len(prompt)
        self.engine.at(self._parsed_s, lambda: self._arrive(prompt, max_tokens, answer, done))

    def _arrive(self, prompt: list[int], max_tokens: int, answer: Answer, done: Done) -> None:
        now = self.engine.now
        if self.admission.check(1, len(prompt), now) is not None:
            answer.status, answer.end_s = 429, now
            done([])
            return
        self.admission.reserve([len(prompt)], now)
        self.admission.enter(len(prompt), now)
        self._count += 1
        self._live[str(self._count)] = answer, [], len(prompt), done
        self.board.set("running", len(self._live))
        params = SamplingParams(max_tokens=max_tokens, min_tokens=max_tokens, ignore_eos=True)
        self.engine.add(Request(str(self._count), prompt, params, now))

    def _take(self, output: RequestOutput, now: float) -> None:
        answer, ids, prompt_len, done = self._live[output.request_id]
        if output.token_ids:
            if not answer.event_s:
                self.admission.leave(prompt_len, now, served=True)
            answer.event_s.append(now + self.WIRE_S)
            ids += output.token_ids
        if output.finish_reason is None:
            return
        assert output.finish_reason is FinishReason.LENGTH, output
        answer.status, answer.num_tokens, answer.end_s = 200, len(ids), now + self.WIRE_S
        self.admission.ended(now)
        del self._live[output.request_id]
        self.board.set("running", len(self._live))
        self.engine.at(answer.end_s, lambda: done(ids))

    def run(self, jobs: list[Job], places: int = 0) -> list[Answer]:
        """Until all are answered: so many at a time, or (0) each at its time."""
        answers: list[Answer] = []
        queue, start_s = iter(jobs), self.engine.now + 0.05

        def turn(job: Job, number: int, prompt: list[int], after: Callable[[], None]) -> None:
            prompt = prompt + job.turns[number]
            answer = Answer(job.tag, number, 0, 0.0)
            answers.append(answer)

            def done(ids: list[int]) -> None:
                if number + 1 < len(job.turns):
                    turn(job, number + 1, prompt + ids, after)
                else:
                    after()

            self.send(prompt, job.max_tokens, answer, done)

        def place() -> None:
            job = next(queue, None)
            if job is not None:
                turn(job, 0, [], place)

        for _ in range(places):
            self.engine.at(start_s, place)
        for job in jobs if not places else ():
            self.engine.at(start_s + job.at_s, lambda job=job: turn(job, 0, [], lambda: None))
        self.engine.run()
        return answers


def play(
    name: str, budget: int = 8192, kv_bytes: int = 2, host_blocks: int = HOST_BLOCKS, *, fresh: bool = False,
    card: H200 | None = None,
) -> Figures:  # fmt: skip
    """One row on an engine of its own, warmed up, or `fresh` from its start."""
    cost = replace(card or H200(), context_token=65_536 * kv_bytes / 4.2e12, fp8_kv=kv_bytes == 1)
    engine = OverlappedEngine(cost, num_blocks=NUM_BLOCKS * 2 // kv_bytes, num_host_blocks=host_blocks, budget=budget)
    server = Server(engine)
    if not fresh:
        server.run([Job([server.tokens(1024)], 32) for _ in range(64)], 64)
    engine.steps.clear()
    figures = ROWS[name](server)
    steps, stats = engine.steps, engine.scheduler.stats()
    figures |= {
        "steps": len(steps), "step_ms": 1e3 * fmean(s for _, _, s in steps), "preempted": stats.num_preemptions,
        "loaded_blocks": stats.num_swapped_in, "prefilled": sum(p for _, p, _ in steps),
    }  # fmt: skip
    engine.scheduler.check_integrity()
    return figures


def show(name: str, figures: Figures, measured: Figures) -> None:
    for figure, value in figures.items():
        goal, _ = GOALS[name].get(figure, (None, None))
        beside = f"   goal {goal:>7}" if goal is not None else ""
        was = f"   measured {measured[figure]:10.2f}" if figure in measured else ""
        print(f"{name:4} {figure:28} {value:10.2f}{was}{beside}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--budget", type=int, default=8192)
    parser.add_argument("--kv-bytes", type=int, default=2, choices=(1, 2))
    parser.add_argument("--host-blocks", type=int, default=HOST_BLOCKS)
    parser.add_argument("--fresh", action="store_true", help="a server that has not served anything before")
    parser.add_argument(
        "--transpose-rows", type=int, default=TRANSPOSE_ROWS, help="of a step that may transpose FP8 values"
    )
    parser.add_argument("--split", action="store_true", help="as if prompts' attention filled the card to the end")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    measured = json.loads(MEASURED[args.kv_bytes].read_text())["rows"]
    rows: dict[str, Figures] = {}
    for name in args.rows.split(","):
        card = H200(transpose_rows=args.transpose_rows, split=args.split)
        rows[name] = play(name, args.budget, args.kv_bytes, args.host_blocks, fresh=args.fresh, card=card)
        show(name, rows[name], measured.get(name, {}))
    if args.output:
        args.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
