"""Chunks follow the latency target, on simulated devices of which the controller knows nothing."""

from __future__ import annotations

import random

import pytest
from benchmarks.simulated import SimulatedEngine
from hypothesis import given
from hypothesis import strategies as st

from mainsail_engine.chunking import MIN_CHUNK, STEP_ROWS, ChunkController, StepWork, attention_pairs, filled, spread
from mainsail_engine.config import CacheConfig, EngineConfig, ModelConfig
from mainsail_engine.request import Request, SamplingParams
from mainsail_engine.scheduler import Scheduler
from mainsail_engine.step import StepResult

# (per step, per decode, per token of context, per prefill token, per attention pair), in seconds
H200_8B = (4.5e-3, 1.5e-5, 2.4e-8, 2.2e-5, 5e-10)
SMALL_CARD = (12e-3, 6e-5, 2e-7, 2e-4, 8e-9)
CPU = (30e-3, 4e-3, 1e-6, 3e-3, 1e-7)


def seconds(device, work: StepWork) -> float:
    parts = (1, work.decodes, work.decode_context, work.prefill_tokens, work.prefill_attention)
    return sum(cost * part for cost, part in zip(device, parts, strict=True))


class Run:
    """Streams that decode while prompts are prefilled in the controller's chunks."""

    def __init__(self, target_s: float, *, decodes: int, noise: float = 0.0, seed: int = 0) -> None:
        self.controller = ChunkController(target_s)
        self.decodes, self.noise, self.random = decodes, noise, random.Random(seed)
        self.steps: list[tuple[int, float]] = []
        """(prefill tokens, seconds)."""

    def prefill(self, device, length: int, context: int = 2000) -> None:
        start = 0
        while start < length:
            decoding = StepWork(self.decodes, self.decodes * context)
            tokens = min(length - start, self.controller.budget(decoding, start), 8192)
            work = StepWork(self.decodes, self.decodes * context, tokens, attention_pairs(start, tokens))
            took = seconds(device, work) * self.random.uniform(1 - self.noise, 1 + self.noise)
            self.controller.observe(work, took)
            self.steps.append((tokens, took))
            start += tokens

    def decode(self, device, steps: int, context: int = 2000) -> None:
        for _ in range(steps):
            work = StepWork(self.decodes, self.decodes * context)
            self.controller.observe(work, seconds(device, work) * self.random.uniform(1 - self.noise, 1 + self.noise))


@pytest.mark.parametrize(
    ("device", "target_s", "decodes"), [(H200_8B, 0.05, 64), (H200_8B, 0.02, 16), (SMALL_CARD, 0.1, 16), (CPU, 1.0, 8)]
)
def test_steps_come_close_to_the_target_and_stay_below(device, target_s, decodes):
    run = Run(target_s, decodes=decodes, noise=0.05)
    for _ in range(8):
        run.decode(device, 20)
        run.prefill(device, 32_000)
    settled = run.steps[len(run.steps) // 4 :]
    assert all(took < target_s * 1.02 for _, took in settled)
    full = [took for tokens, took in settled if tokens > MIN_CHUNK]
    assert sum(full) / len(full) > 0.7 * target_s


def test_the_first_chunks_are_careful():
    run = Run(0.05, decodes=16)
    run.prefill(H200_8B, 32_000)
    assert max(took for _, took in run.steps) < 0.05
    assert [tokens for tokens, _ in run.steps[:2]] == [256, 512]


def test_deep_in_a_long_prompt_chunks_are_smaller():
    run = Run(0.05, decodes=16)
    run.prefill(H200_8B, 128_000)
    run.prefill(H200_8B, 128_000)
    tokens = [t for t, _ in run.steps]
    last = tokens[len(tokens) // 2 + 4 :]
    assert last[-2] < last[0] / 2


def test_it_follows_a_device_that_becomes_slower():
    run = Run(0.05, decodes=32, noise=0.03)
    for _ in range(10):
        run.prefill(H200_8B, 32_000)
    slower = tuple(2 * cost for cost in H200_8B)
    for _ in range(10):
        run.prefill(slower, 32_000)
    assert sum(took > 0.05 for _, took in run.steps[-100:]) <= 2


def test_many_steps_without_prefill_spoil_nothing():
    run = Run(0.05, decodes=32, noise=0.05)
    for _ in range(4):
        run.prefill(H200_8B, 32_000)
    run.decode(H200_8B, 20_000)
    before = len(run.steps)
    run.prefill(H200_8B, 32_000)
    assert all(took < 0.055 for _, took in run.steps[before:])


WORKS = st.builds(
    lambda decodes, context, tokens, start: StepWork(
        decodes, decodes * context, tokens, attention_pairs(start, tokens) if tokens else 0
    ),
    st.integers(0, 64), st.integers(100, 2000), st.sampled_from([0, 0, 256, 448, 1000, 2000, 6000]),
    st.integers(0, 1024),
).filter(lambda work: work.decodes + work.prefill_tokens > 0)  # fmt: skip


@given(st.lists(st.tuples(WORKS, st.floats(0, 0.03)), min_size=60, max_size=120))
def test_steps_whose_end_nobody_saw_spoil_nothing(steps):
    """A host that is late now and then (it launches a large step) sees one step too long and the next too short."""
    controller = ChunkController(0.04)
    usual = StepWork(32, 32_000, 448, attention_pairs(0, 448))
    end_s = seen_s = 0.0
    for number, (work, delay_s) in enumerate([*steps, *[(usual, 0.0)] * 12]):
        end_s += seconds(H200_8B, work)
        is_late = delay_s > 0.001 and number % 12 < 4
        before_s, seen_s = seen_s, max(seen_s, end_s + delay_s if is_late else end_s)
        controller.observe(work, seen_s - before_s, ended_unseen=seen_s > end_s)
    for _ in range(8):
        controller.cost.fit()
    assert controller.cost.predict(usual) == pytest.approx(seconds(H200_8B, usual), rel=0.05)


def test_no_chunk_grows_by_steps_that_were_not_measured():
    controller = ChunkController(0.04)
    controller.observe(StepWork(0, 0, 1000, attention_pairs(0, 1000)), 0.025)
    for tokens in (2000, 4000):
        controller.observe(StepWork(1, 1000, tokens, attention_pairs(0, tokens)), 0.001, ended_unseen=True)
        assert controller.budget(StepWork(1, 1000), 0) <= 2000


def test_the_scheduler_measures_steps_that_ended_unseen_with_the_next():
    config = EngineConfig(model=ModelConfig(path="-"), cache=CacheConfig(num_blocks=64))
    scheduler = Scheduler(config, 64, 512, [], max_inter_token_latency_s=0.04)
    scheduler.add(Request("a", [1] * 100, SamplingParams(max_tokens=8, ignore_eos=True), 0.0))
    assert scheduler.chunking is not None
    cost, now = scheduler.chunking.cost, 0.0
    for took_s, ended_unseen in ((0.05, True), (0.001, False), (0.005, False)):
        plan = scheduler.schedule(now)
        assert plan is not None
        now += took_s
        scheduler.commit(plan, StepResult([3], ended_unseen=ended_unseen), now)
        cost.fit()
        assert (cost.predict(StepWork(1, 100)) > 0) == (not ended_unseen)
    assert cost.per_prefill_token_s * 100 + cost.predict(StepWork()) > 0.02, "the prompt's step was the long one"


def test_a_host_that_is_always_late_is_measured_by_its_pace():
    controller = ChunkController(0.04)
    for _ in range(100):
        controller.observe(StepWork(8, 8000), 0.02, ended_unseen=True)
    controller.cost.fit()
    assert controller.cost.predict(StepWork(8, 8000)) == pytest.approx(0.02, rel=0.05)


def test_prefill_never_starves():
    run = Run(0.001, decodes=64)
    run.prefill(H200_8B, 4000)
    assert {tokens for tokens, _ in run.steps[30:-1]} == {MIN_CHUNK}


@given(
    st.lists(
        st.tuples(st.integers(0, 512), st.integers(0, 10**7), st.integers(0, 8192), st.integers(0, 10**9),
                  st.floats(0, 100)),
        max_size=40,
    ),
    st.integers(0, 10**6),
)  # fmt: skip
def test_whatever_was_measured_the_budget_makes_sense(measurements, start):
    controller = ChunkController(0.05)
    for decodes, context, tokens, pairs, took in measurements:
        controller.observe(StepWork(decodes, context, tokens, pairs), took)
    largest = max((m[2] for m in measurements), default=0)
    assert MIN_CHUNK <= controller.budget(StepWork(8, 8000), start) <= max(256, 2 * largest)


def test_streams_go_on_while_long_prompts_are_prefilled():
    """The real scheduler on a simulated device: no stream waits longer than the target, and the prompts get done."""
    engine = SimulatedEngine(num_blocks=20_000, latency_s=0.03)
    params = SamplingParams(max_tokens=600, ignore_eos=True)
    for i in range(16):
        engine.add(Request(f"stream {i}", [i] * 500, params, 0.0))
    gaps, last = [], {}

    def token(output, now):
        if output.request_id.startswith("stream") and output.request_id in last and now > 3.0:
            gaps.append(now - last[output.request_id])
        last[output.request_id] = now

    engine.on_output = token
    for i in range(8):
        prompt = [100 + i] * 32_000
        request = Request(f"long {i}", prompt, SamplingParams(max_tokens=1), 0.0)
        engine.at(0.5 + 0.8 * i, lambda request=request: engine.add(request))
    engine.run()
    assert len(gaps) > 3000
    assert max(gaps) < 0.03
    assert engine.prefilled == 16 * 500 + 8 * 32_000


def test_without_a_target_a_step_takes_the_whole_budget():
    engine = SimulatedEngine(num_blocks=20_000, latency_s=0.0)
    engine.add(Request("stream", [1] * 50, SamplingParams(max_tokens=50, ignore_eos=True), 0.0))
    engine.step()
    engine.add(Request("long", [2] * 20_000, SamplingParams(max_tokens=1), 0.0))
    plans = []
    engine.on_step = plans.append
    engine.run()
    assert max(plan.num_tokens for plan in plans) == 8192


@pytest.mark.parametrize(
    ("backlog", "decodes", "expected"),
    [(0, 8, 504), (1000, 8, 504), (1000, 300, 256), (9000, 250, 282), (9000, 8, 504), (64_000, 64, 2000)],
)
def test_a_small_backlog_is_spread_and_a_long_one_is_not(backlog, decodes, expected):
    assert spread(backlog, decodes) == expected


@given(st.integers(MIN_CHUNK, 9000), st.integers(0, 1024), st.sampled_from([(), (1792, 2048), (3072,)]))
def test_a_filled_step_wastes_no_row_and_goes_on(budget, decodes, more):
    sizes = STEP_ROWS + more
    tokens = filled(budget, decodes, sizes)
    assert MIN_CHUNK <= tokens <= budget
    rows = decodes + tokens
    assert rows in sizes or tokens == budget
    assert rows in sizes or rows > sizes[-1] or budget + decodes < min(n for n in sizes if n >= decodes + MIN_CHUNK)
