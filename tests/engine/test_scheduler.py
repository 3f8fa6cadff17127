"""The scheduler against a device that remembers what it wrote.

`Device` keeps, for every position of every block, a hash of the whole prefix that was written there. A step checks
every position that it attends to, and the token that it samples is a function of the prefix. So a block shared with
the wrong request, copied too late, or freed too early shows at once, and whatever happens to a request (chunks,
sharing, preemption, overlap, guesses right and wrong) it must generate what it generates alone.
"""

from __future__ import annotations

import logging
import random
import re
from collections import deque
from collections.abc import Collection
from typing import Any

import pytest
from benchmarks.simulated import SimulatedEngine
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from mainsail_engine.config import (
    BLOCK_SIZE,
    CacheConfig,
    EngineConfig,
    ModelConfig,
    SchedulerConfig,
    SpeculativeConfig,
)
from mainsail_engine.errors import RequestError
from mainsail_engine.kv.cache import blocks_for
from mainsail_engine.request import FinishReason, Request, RequestStatus, SamplingParams
from mainsail_engine.scheduler import Scheduler
from mainsail_engine.speculative.speculator import Speculator
from mainsail_engine.step import FAILED_TOKEN, StepResult

EOS = 3
VOCAB = 40
MODULUS = (1 << 61) - 1


def extend(prefix: int, token: int) -> int:
    return (prefix * 1_000_003 + token + 1) % MODULUS


def sample(prefix: int, early_end: bool = True) -> int:
    token = (prefix >> 7) % VOCAB
    return token if early_end or token != EOS else EOS + 1


def alone(prompt: list[int], params: SamplingParams, max_model_len: int) -> list[int]:
    """What the model generates for this prompt if it is the only one."""
    prefix, output = 0, []
    for token in prompt:
        prefix = extend(prefix, token)
    while True:
        token = sample(prefix, len(output) + 1 >= params.min_tokens)
        output.append(token)
        prefix = extend(prefix, token)
        may_stop = len(output) >= params.min_tokens
        if may_stop and (token in params.stop_token_ids or (token == EOS and not params.ignore_eos)):
            return output
        if len(output) == params.max_tokens or len(prompt) + len(output) == max_model_len:
            return output


class Device:
    """Executes plans in order, checks what they read. A load arrives `lag` plans after the one that began it."""

    def __init__(self, num_blocks: int, slots: int, num_host_blocks: int = 0, lag: int = 0) -> None:
        self.kv = [[-1] * 16 for _ in range(num_blocks)]
        self.host = [[-1] * 16 for _ in range(num_host_blocks)]
        self.newest = [-1] * slots
        self.computed = self.loaded = self.launched = 0
        self.lag = lag
        self.loading: deque = deque()

    def move(self, plan) -> None:
        """The copies between the tiers. What is on its way may not change at either end."""
        self.launched += 1
        busy = {host for _, _, host, _ in self.loading}
        for move in plan.stores:
            assert move.host not in busy
            self.host[move.host] = list(self.kv[move.device])
        for move in plan.loads:
            self.loading.append((self.launched, move.device, move.host, list(self.host[move.host])))
            self.kv[move.device] = [-2] * 16
        while self.loading and (self.loading[0][0] + self.lag <= self.launched or not plan.chunks):
            _, device, host, content = self.loading.popleft()
            assert self.host[host] == content
            assert self.kv[device] == [-2] * 16
            self.kv[device] = content
            self.loaded += 1

    def launch(self, plan, fail: Collection[str] = ()) -> StepResult:
        blocks = {c.src for c in plan.copies} | {c.dst for c in plan.copies}
        assert not blocks & {device for _, device, _, _ in self.loading}
        assert not blocks & {move.device for move in plan.loads}
        self.move(plan)
        sources, targets = {c.src for c in plan.copies}, [c.dst for c in plan.copies]
        assert not sources & set(targets)
        assert len(set(targets)) == len(targets)
        for copy in plan.copies:
            self.kv[copy.dst][: copy.num_tokens] = self.kv[copy.src][: copy.num_tokens]
        tokens, samples = [self.tokens(chunk) for chunk in plan.chunks], []
        for chunk, known in zip(plan.chunks, tokens, strict=True):
            prefixes = self.run(chunk, known)
            request = chunk.request
            for ahead, prefix in enumerate(prefixes[-1 - len(chunk.guesses) :] if chunk.samples else ()):
                num_outputs = len(request.output_token_ids) + request.num_in_flight + ahead
                token = sample(prefix, num_outputs >= request.params.min_tokens)
                samples.append(FAILED_TOKEN if request.request_id in fail else token)
                self.newest[chunk.slot] = samples[-1]
        assert not any(chunk.guesses for chunk in plan.chunks) or not plan.is_overlapped
        return StepResult(samples, num_loaded=self.loaded)

    def tokens(self, chunk) -> list[int]:
        """Token ids of positions [0, the chunk's end)."""
        request, stop = chunk.request, chunk.start + chunk.num_tokens
        assert request.slot == chunk.slot
        known = request.token_ids(0, min(stop, request.num_tokens))
        if chunk.guesses:
            assert chunk.start == request.num_tokens - 1
            return [*known, *chunk.guesses]
        if stop > request.num_tokens:
            assert stop == request.num_tokens + 1
            known = [*known, self.newest[chunk.slot]]
        return known

    def run(self, chunk, known: list[int]) -> list[int]:
        """The prefixes that the chunk's positions end."""
        assert len(chunk.block_ids) >= blocks_for(len(known))
        prefix, prefixes = 0, []
        for position, token in enumerate(known):
            prefix, block = extend(prefix, token), self.kv[chunk.block_ids[position // 16]]
            if position >= chunk.start:
                block[position % 16] = prefix
                self.computed += 1
                prefixes.append(prefix)
            else:
                assert block[position % 16] == prefix, f"position {position} of {chunk.request.request_id} is wrong"
        return prefixes


class Guesser:
    """See speculator.Source: what the device will say, or with some chance something else."""

    level_s = last_s = 0.0

    def __init__(self, chance_right: float) -> None:
        self.chance_right, self.rng = chance_right, random.Random(3)
        self.seen: dict[str, list[int]] = {}

    def saw(self, request, tokens) -> None:
        known = list(request.output_token_ids[: -len(tokens)])
        self.seen.setdefault(request.request_id, known).extend(tokens)

    def settle(self) -> None: ...

    def has_guesses(self, request, count) -> bool:
        return True

    def chances(self, request, most) -> list[float]:
        return [self.chance_right] * most

    def guess(self, wanted) -> list[list[int]]:
        assert all(request.num_in_flight <= 1 for request, _ in wanted)
        return [self.guesses(request, self.rng.randint(0, count)) for request, count in wanted]

    def guesses(self, request, count) -> list[int]:
        assert self.seen[request.request_id] == request.output_token_ids
        prefix, guesses = 0, []
        for token in request.token_ids(0, request.num_tokens):
            prefix = extend(prefix, token)
        for _ in range(count):
            right = self.rng.random() < self.chance_right
            guesses.append(sample(prefix) if right else self.rng.randrange(VOCAB))
            prefix = extend(prefix, guesses[-1])
        return guesses

    def verified(self, request, num_guesses, num_right) -> None:
        assert 0 <= num_right <= num_guesses

    def forget(self, request) -> None:
        self.seen.pop(request.request_id, None)


class Engine:
    """Scheduler and device together, up to `depth` steps in flight."""

    total_steps = 0
    """Of all engines."""

    def __init__(self, num_blocks=32, max_model_len=200, max_num_seqs=8, budget=48, depth=1, **options) -> None:
        sessions, guessing = options.pop("sessions", True), options.pop("guessing", None)
        self.micro_batches = options.pop("micro_batches", 1)
        speculator = None
        if guessing is not None:
            speculator = Speculator(SpeculativeConfig(method="ngram", adaptive=False), Guesser(guessing))
        watermark, host, lag = options.pop("watermark", 0.05), options.pop("host", 0), options.pop("lag", 0)
        config = EngineConfig(
            model=ModelConfig(path="none"),
            cache=CacheConfig(num_blocks=num_blocks, **options),
            scheduler=SchedulerConfig(
                max_num_seqs=max_num_seqs, max_num_batched_tokens=budget, watermark=watermark,
                agent_sessions=sessions,
            ),
        )  # fmt: skip
        self.scheduler = Scheduler(
            config, num_blocks, max_model_len, [EOS], num_host_blocks=host, speculator=speculator,
            micro_batches=self.micro_batches,
        )  # fmt: skip
        if sessions and self.scheduler._residency is not None:  # so small a pool would not be worth keeping anything
            self.scheduler._residency._threshold = lambda: 0.01
        self.device = Device(num_blocks, max_num_seqs, host, lag)
        self.budget, self.depth, self.now = budget, max(depth, self.micro_batches), 0.0
        self.in_flight = deque()
        self.requests: dict[str, Request] = {}
        self.outputs: dict[str, list[int]] = {}
        self.finished: dict[str, FinishReason] = {}
        self.fail: set[str] = set()

    def add(self, prompt, *, request_id=None, priority=0, salt="", user="", timeout=None, **params) -> Request:
        params = SamplingParams(**{"max_tokens": 8, **params})
        request_id = request_id or f"r{len(self.requests)}"
        deadline = None if timeout is None else self.now + timeout
        request = Request(
            request_id, list(prompt), params, self.now, priority, cache_salt=salt, user=user, deadline_s=deadline
        )  # fmt: skip
        self.scheduler.add(request)
        self.requests[request_id], self.outputs[request_id] = request, []
        return request

    def step(self) -> bool:
        """Launch one step and take in the oldest beyond depth. False when there was nothing to do."""
        self.now += 0.01
        decoding = list(self.scheduler._decoding)
        plan = self.scheduler.schedule(self.now)
        if plan is not None:
            Engine.total_steps += 1
            self.check_plan(plan, decoding)
            self.in_flight.append((plan, self.device.launch(plan, self.fail)))
        self.check()
        if plan is None and not self.in_flight and self.scheduler.has_work:
            if self.scheduler.stats().sessions_held:
                self.now += 1.0  # nothing may run before some time to live, or the age bound, is over
            self.take(self.scheduler.take_outputs())
            return True
        if self.in_flight and (plan is None or len(self.in_flight) >= self.depth):
            self.commit()
            return True
        return plan is not None

    def check_plan(self, plan, decoding) -> None:
        assert 0 <= plan.num_tokens <= self.budget
        assert plan.chunks or plan.stores or plan.loads or self.device.loading
        for index, chunk in enumerate(plan.chunks):
            assert chunk.num_tokens > 0
            if index < plan.num_decodes:
                assert chunk.num_tokens == 1
                assert chunk.samples
        planned = {chunk.request.request_id for chunk in plan.chunks}
        if self.micro_batches > 1:
            self.check_micro_batch(plan, len(decoding))
            return
        for request in decoding:  # no decode starves
            last_is_in_flight = request.num_tokens + request.num_in_flight >= request.max_num_tokens
            assert request.request_id in planned or last_is_in_flight or request.status is not RequestStatus.RUNNING

    def check_micro_batch(self, plan, num_decoding) -> None:
        """Every token is known when its step is planned, and nobody takes more than a share of the decodes."""
        for chunk in plan.chunks:
            assert chunk.start + chunk.num_tokens <= chunk.request.num_tokens
            assert chunk.request.num_in_flight <= 1
        assert plan.num_decodes <= -(-num_decoding // self.micro_batches)

    def commit(self) -> None:
        plan, result = self.in_flight.popleft()
        self.take(self.scheduler.commit(plan, result, self.now))
        self.check()

    def take(self, outputs) -> None:
        for output in outputs:
            assert output.request_id not in self.finished
            self.outputs[output.request_id] += output.token_ids
            if output.finish_reason is not None:
                self.finished[output.request_id] = output.finish_reason

    def check(self) -> None:
        self.scheduler.check_integrity()
        running = [r for r in self.requests.values() if r.status is RequestStatus.RUNNING]
        slots = [r.slot for r in running]
        assert len(set(slots)) == len(slots)
        assert -1 not in slots
        assert len(running) == self.scheduler.num_running
        preempted = [r for r in self.requests.values() if r.status is RequestStatus.WAITING and r.num_preemptions]
        assert len(preempted) == self.scheduler.stats().num_swapped

    def run(self, limit=5000) -> None:
        for _ in range(limit):
            if not self.scheduler.has_work:
                break
            assert self.step(), "the scheduler has work, and does nothing"
        assert not self.scheduler.has_work
        stats = self.scheduler.stats()
        assert (stats.num_running, stats.num_waiting, stats.kv_usage) == (0, 0, 0.0)

    def check_outputs(self) -> None:
        """Whoever finished by itself got what it gets alone."""
        for request_id, reason in self.finished.items():
            request = self.requests[request_id]
            expected = alone(request.prompt_token_ids, request.params, self.scheduler.max_model_len)
            if reason is FinishReason.ERROR:
                assert self.outputs[request_id] == expected[: len(self.outputs[request_id])]
            else:
                assert self.outputs[request_id] == expected, request_id


def prompt(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(4, VOCAB), k=length)


@pytest.mark.parametrize("depth", [1, 2])
def test_one_request(depth):
    engine = Engine(depth=depth)
    engine.add(prompt(0, 70), max_tokens=20, ignore_eos=True)
    engine.run()
    engine.check_outputs()
    assert engine.finished == {"r0": FinishReason.LENGTH}
    assert engine.device.computed == 70 + 19


@pytest.mark.parametrize("depth", [1, 2])
def test_prompts_are_chunked_and_decodes_go_on_meanwhile(depth):
    engine = Engine(budget=16, depth=depth, num_blocks=64)
    engine.add(prompt(0, 10), max_tokens=30, ignore_eos=True)
    for _ in range(3):
        engine.step()
    long = engine.add(prompt(1, 150), max_tokens=1, ignore_eos=True)
    before = len(engine.outputs["r0"])
    steps = 0
    while not long.is_finished:
        engine.step()
        steps += 1
    assert steps >= 10
    assert len(engine.outputs["r0"]) >= before + 10
    engine.run()
    engine.check_outputs()


def test_the_next_turn_computes_only_what_is_new():
    engine = Engine()
    engine.add(first := prompt(0, 37), max_tokens=11, ignore_eos=True)
    engine.run()
    computed = engine.device.computed
    turn = first + engine.outputs["r0"] + prompt(1, 9)
    request = engine.add(turn, max_tokens=1, ignore_eos=True)
    engine.run()
    assert request.num_cached_tokens == 37 + 10  # the last token was sampled, and never computed
    assert engine.device.computed - computed == 1 + 9
    engine.check_outputs()


def test_branching_agents_recompute_nothing_that_a_branch_computed():
    engine = Engine(num_blocks=256, max_model_len=400, max_num_seqs=8)
    root = engine.add(prompt(0, 50), max_tokens=7, ignore_eos=True)
    engine.run()
    stems = [root.prompt_token_ids + engine.outputs["r0"]] * 4
    known = {tuple(stems[0][:i]) for i in range(len(stems[0]))}
    for depth in range(3):
        prompts = [[*stem, 4 + 4 * depth + i, *prompt(10 * depth + i, 20)] for i, stem in enumerate(stems)]
        before = engine.device.computed
        fresh = {tuple(p[:i]) for p in prompts for i in range(1, len(p) + 1)} - known
        ids = []
        for p in prompts:  # one after another: what runs at once may compute a partly shared block twice
            ids.append(engine.add(p, max_tokens=6, ignore_eos=True).request_id)
            engine.run()
        answers = [engine.outputs[i] for i in ids]
        decoded = {tuple(p + a[:i]) for p, a in zip(prompts, answers, strict=True) for i in range(1, 6)}
        assert engine.device.computed - before == len(fresh) + len(decoded)
        known |= fresh | decoded
        stems = [p + a for p, a in zip(prompts, answers, strict=True)]
    engine.check_outputs()


def test_a_fully_cached_prompt_still_computes_its_last_token():
    engine = Engine()
    for length in (16, 32, 33):
        first = engine.add(prompt(length, length), max_tokens=1)
        engine.run()
        again = engine.add(first.prompt_token_ids, max_tokens=1)
        engine.run()
        assert again.num_cached_tokens == length - 1
    engine.check_outputs()


def test_the_same_prompt_at_once_is_computed_once():
    engine = Engine(num_blocks=128, budget=32, max_num_seqs=16)
    shared = prompt(0, 96)
    for i in range(10):
        engine.add([*shared, 4 + i, 5], max_tokens=1)
    engine.run()
    assert engine.device.computed == 96 + 10 * 2
    engine.check_outputs()


def test_without_prefix_caching_nothing_is_kept():
    engine = Engine(enable_prefix_caching=False, num_blocks=64)
    for _ in range(4):
        engine.add(prompt(0, 40), max_tokens=4, ignore_eos=True)
    engine.run()
    assert engine.device.computed == 4 * 43
    assert engine.scheduler.kv.pool.num_free == 64
    engine.check_outputs()


def test_salts_share_nothing():
    engine = Engine(num_blocks=64)
    for salt in ("a", "b", "a"):
        engine.add(prompt(0, 40), max_tokens=1, salt=salt)
        engine.run()
    assert [r.num_cached_tokens for r in engine.requests.values()] == [0, 0, 39]


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("caching", [True, False])
def test_preemption_changes_no_token(depth, caching):
    engine = Engine(num_blocks=12, max_model_len=160, depth=depth, watermark=0.0, enable_prefix_caching=caching)
    for i in range(6):
        engine.add(prompt(i, 20 + i), max_tokens=60, ignore_eos=True)
    engine.run()
    assert engine.scheduler.stats().num_preemptions > 0
    engine.check_outputs()


def test_a_preemption_is_logged_with_what_it_costs(caplog):
    caplog.set_level(logging.INFO)
    engine = Engine(num_blocks=8, watermark=0.0)
    for i in range(3):
        engine.add(prompt(i, 20), max_tokens=40, ignore_eos=True)
    engine.run()
    engine.check_outputs()
    count = engine.scheduler.stats().num_preemptions
    preempted = [
        m for m in caplog.messages if re.match(r"preempted \S+: \d+ tokens computed, \d+ blocks of its own", m)
    ]
    resumed = [m for m in caplog.messages if re.match(r"resumed \S+: .* from the host, \d+ to compute again", m)]
    assert len(preempted) == len(resumed) == count > 0


def test_the_lowest_priority_then_the_least_work_is_preempted():
    engine = Engine(num_blocks=12, max_model_len=160, watermark=0.0)
    high = engine.add(prompt(0, 20), max_tokens=70, ignore_eos=True, priority=1)
    much = engine.add(prompt(1, 60), max_tokens=50, ignore_eos=True)
    little = engine.add(prompt(2, 20), max_tokens=50, ignore_eos=True)
    engine.run()
    assert little.num_preemptions > 0
    assert (high.num_preemptions, much.num_preemptions) == (0, 0)
    engine.check_outputs()


@pytest.mark.parametrize("caching", [True, False])
def test_resuming_is_mostly_a_hit_and_with_a_host_tier_wholly(caching):
    once, extra = 4 * (60 + 39), {}
    for host in (0, 64):
        engine = Engine(num_blocks=20, watermark=0.0, budget=200, enable_prefix_caching=caching, host=host)
        for i in range(4):
            engine.add(prompt(i, 60), max_tokens=40, ignore_eos=True)
        engine.run()
        stats = engine.scheduler.stats()
        assert stats.num_preemptions > 0
        engine.check_outputs()
        extra[host] = engine.device.computed - once
        assert extra[host] == stats.num_recomputed_tokens
    assert (extra[64], 0 < extra[0] < 100) == (0, True)
    assert stats.num_swapped_out > 0
    assert stats.num_swapped_in > 0


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("lag", [0, 3])
def test_swapped_out_and_back_changes_no_token(depth, lag):
    engine = Engine(num_blocks=12, max_model_len=160, depth=depth, watermark=0.0, host=80, lag=lag)
    for i in range(8):
        engine.add(prompt(i, 20 + 5 * i), max_tokens=60, ignore_eos=True)
    engine.run()
    stats = engine.scheduler.stats()
    assert stats.num_preemptions > 3
    assert stats.num_swapped_in > 3
    assert stats.num_recomputed_tokens == 0
    engine.check_outputs()


def test_others_run_while_blocks_are_on_their_way():
    engine = Engine(num_blocks=24, max_model_len=320, budget=64, host=64, lag=6, max_num_seqs=4)
    first = engine.add(prompt(0, 200), max_tokens=2, ignore_eos=True)
    engine.run()
    engine.add(prompt(1, 300), max_tokens=2, ignore_eos=True)
    engine.run()  # the first one's blocks had to go
    engine.add(prompt(2, 20), max_tokens=30, ignore_eos=True, request_id="other")
    engine.step()
    again = engine.add(first.prompt_token_ids, max_tokens=2, ignore_eos=True)
    engine.step()
    assert (again.status, engine.scheduler.kv.is_loaded(again)) == (RequestStatus.RUNNING, False)
    before = len(engine.outputs["other"])
    while not engine.outputs[again.request_id]:
        engine.step()
    assert len(engine.outputs["other"]) - before >= 6
    assert again.num_cached_tokens == 199
    engine.run()
    engine.check_outputs()


@pytest.mark.parametrize("lag", [2, 9])
def test_leaving_while_blocks_are_on_their_way(lag):
    """The client goes, or a second request wants the same blocks: the copies end where they were begun."""
    engine = Engine(num_blocks=24, max_model_len=320, budget=64, host=64, lag=lag, max_num_seqs=4)
    first = engine.add(prompt(0, 200), max_tokens=2, ignore_eos=True)
    engine.run()
    engine.add(prompt(1, 300), max_tokens=2, ignore_eos=True)
    engine.run()
    engine.add(prompt(2, 20), max_tokens=30, ignore_eos=True)
    engine.step()
    for name in ("goes", "stays"):
        engine.add(first.prompt_token_ids, max_tokens=2, ignore_eos=True, request_id=name)
    engine.step()
    swapped_in = engine.scheduler.kv.host.num_queued
    engine.scheduler.abort(["goes"])
    engine.run()
    assert engine.scheduler.kv.host.num_queued == swapped_in
    assert engine.requests["stays"].num_cached_tokens == 199
    engine.check_outputs()


def test_a_full_host_tier_keeps_the_newest_and_the_rest_is_computed_again():
    engine = Engine(num_blocks=12, max_model_len=160, host=6)
    for i in range(6):
        engine.add(prompt(i, 80), max_tokens=1)
        engine.run()
    hits = [engine.add(prompt(i, 80), max_tokens=1) for i in (5, 4)]
    engine.run()
    assert [r.num_cached_tokens for r in hits] == [79, 79]
    stats = engine.scheduler.stats()
    assert stats.host_usage == 1.0
    assert stats.num_swapped_out > 6
    engine.check_outputs()


def test_branches_find_generated_tokens_on_the_host_too():
    engine = Engine(num_blocks=16, max_model_len=200, host=64)
    root = engine.add(prompt(0, 50), max_tokens=20, ignore_eos=True)
    engine.run()
    engine.add(prompt(1, 180), max_tokens=2, ignore_eos=True)
    engine.run()
    stem, before = root.prompt_token_ids + engine.outputs["r0"], engine.device.computed
    for i in range(4):
        branch = engine.add([*stem, 5 + i, *prompt(i, 10)], max_tokens=1)
        engine.run()
        assert branch.num_cached_tokens == 69 + (i > 0)  # the last token was sampled, and not computed until then
    assert engine.device.computed - before == 12 + 3 * 11
    engine.check_outputs()


def test_a_prompt_waits_until_the_whole_of_it_fits_and_then_runs_through():
    engine = Engine(num_blocks=12, max_model_len=160, budget=16)
    engine.add(prompt(0, 100), max_tokens=20, ignore_eos=True)
    engine.step()
    late = engine.add(prompt(1, 100), max_tokens=2, ignore_eos=True)
    while not engine.requests["r0"].is_finished:
        assert late.status is RequestStatus.WAITING
        engine.step()
    engine.run()
    assert engine.scheduler.stats().num_preemptions == 0
    engine.check_outputs()


def test_priority_goes_before_arrival():
    engine = Engine(max_num_seqs=1)
    low = engine.add(prompt(0, 20), priority=0)
    high = engine.add(prompt(1, 20), priority=5)
    engine.step()
    assert (low.status, high.status) == (RequestStatus.WAITING, RequestStatus.RUNNING)
    engine.run()


@pytest.mark.parametrize("depth", [1, 2])
def test_abort_gives_everything_back(depth):
    engine = Engine(depth=depth)
    for i in range(4):
        engine.add(prompt(i, 40), max_tokens=50, ignore_eos=True)
    for _ in range(4):
        engine.step()
    engine.scheduler.abort(["r0", "r1", "r2", "r3", "unknown"])
    engine.check()
    assert engine.scheduler.stats().kv_usage == 0
    engine.run()
    assert all(r.finish_reason is FinishReason.ABORT for r in engine.requests.values())
    assert not engine.finished


@pytest.mark.parametrize("depth", [1, 2])
def test_a_failed_row_fails_alone_and_its_kv_is_not_used_again(depth):
    engine = Engine(depth=depth)
    bad = engine.add(prompt(0, 40), max_tokens=30, ignore_eos=True)
    engine.add(prompt(1, 40), max_tokens=30, ignore_eos=True)
    for _ in range(6):
        engine.step()
    engine.fail.add(bad.request_id)
    engine.run()
    assert engine.finished == {"r0": FinishReason.ERROR, "r1": FinishReason.LENGTH}
    engine.check_outputs()
    assert engine.scheduler.kv.match(Request("x", bad.prompt_token_ids, bad.params, 0.0)).num_tokens == 0


def test_stopping():
    engine = Engine(num_blocks=64, max_model_len=100, max_num_seqs=40)
    free = [alone(prompt(i, 20), SamplingParams(max_tokens=60, ignore_eos=True), 100) for i in range(40)]
    for i in range(40):
        engine.add(prompt(i, 20), max_tokens=60, stop_token_ids=(5,), min_tokens=i % 20)
    engine.run()
    engine.check_outputs()
    requests = list(engine.requests.values())
    assert {r.stop_reason for r in requests} == {None, 5}
    assert any(engine.outputs[r.request_id][-1] == EOS for r in requests)
    assert all(len(engine.outputs[r.request_id]) >= r.params.min_tokens for r in requests)
    assert any(EOS in tokens[:-1] for tokens in free)


def test_the_answer_ends_with_the_models_length():
    engine = Engine(max_model_len=50)
    engine.add(prompt(0, 45), max_tokens=100, ignore_eos=True)
    engine.run()
    assert engine.finished == {"r0": FinishReason.LENGTH}
    assert len(engine.outputs["r0"]) == 5


@pytest.mark.parametrize(
    ("arguments", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [4] * 200}, "prompt"),
        ({"prompt": [4] * 64, "num_blocks": 4}, "prompt"),
        ({"prompt": [4], "max_tokens": 0}, "max_tokens"),
        ({"prompt": [4], "request_id": "taken"}, "request_id"),
    ],
)
def test_what_can_never_be_served_is_refused(arguments, param):
    engine = Engine(num_blocks=arguments.pop("num_blocks", 32))
    engine.add([5], request_id="taken")
    with pytest.raises(RequestError) as refused:
        engine.add(**arguments)
    assert (refused.value.param, refused.value.status) == (param, 400)
    engine.run()
    engine.check_outputs()


@pytest.mark.parametrize("depth", [1, 2])
def test_deadlines_end_running_and_waiting_requests(depth):
    engine = Engine(max_num_seqs=1, depth=depth)
    running = engine.add(prompt(0, 20), max_tokens=100, ignore_eos=True, timeout=0.2)
    waiting = engine.add(prompt(1, 20), max_tokens=2, ignore_eos=True, timeout=0.1)
    last = engine.add(prompt(2, 20), max_tokens=2, ignore_eos=True, timeout=60.0)
    engine.run()
    assert 0 < len(engine.outputs[running.request_id]) < 25
    assert engine.outputs[waiting.request_id] == []
    assert engine.finished == {
        running.request_id: FinishReason.ERROR,
        waiting.request_id: FinishReason.ERROR,
        last.request_id: FinishReason.LENGTH,
    }
    engine.check_outputs()


def test_a_deadline_is_told_even_when_nothing_runs():
    engine = Engine()
    engine.add(prompt(0, 20), timeout=0.0)
    engine.now += 1
    assert engine.step()
    assert engine.finished == {"r0": FinishReason.ERROR}
    assert not engine.scheduler.has_work


def test_a_user_with_many_requests_does_not_delay_one_with_few():
    engine = Engine(max_num_seqs=2)
    for i in range(20):
        engine.add(prompt(i, 30), user="many", max_tokens=10, ignore_eos=True)
    for _ in range(5):
        engine.step()
    for i in range(3):
        engine.add(prompt(100 + i, 30), user="few", max_tokens=10, ignore_eos=True)
    while not all(engine.requests[f"r{20 + i}"].is_finished for i in range(3)):
        engine.step()
    served = sum(r.is_finished for r in engine.requests.values() if r.user == "many")
    assert served <= 7
    engine.run()
    engine.check_outputs()


def test_equal_users_are_served_equally_whatever_they_ask():
    """One asks for long prompts, one for long answers; both always have requests waiting."""
    engine = Engine(max_num_seqs=4, num_blocks=64)
    for i in range(60):
        engine.add(prompt(i, 100), user="prompts", max_tokens=2, ignore_eos=True)
        engine.add(prompt(1000 + i, 5), user="answers", max_tokens=60, ignore_eos=True)
    for _ in range(400):
        engine.step()
    got = dict.fromkeys(["prompts", "answers"], 0)
    for r in engine.requests.values():
        if r.status is not RequestStatus.WAITING:
            got[r.user] += len(r.prompt_token_ids) + 2 * len(r.output_token_ids)
    assert any(r.status is RequestStatus.WAITING for r in engine.requests.values())
    assert 0.8 < got["prompts"] / got["answers"] < 1.25


def test_finished_requests_are_not_kept_for_their_deadlines():
    engine = Engine()
    for index in range(500):
        engine.add(prompt(index, 5), max_tokens=1, timeout=3600.0)
        engine.run()
    assert len(engine.scheduler._deadlines) < 100
    late = engine.add(prompt(7, 5), max_tokens=100, timeout=0.05, ignore_eos=True)
    for _ in range(10):
        engine.step()
    assert late.finish_reason is FinishReason.ERROR


def test_where_a_prompts_kv_came_from_and_how_long_it_stayed():
    engine = Engine(num_blocks=8, max_model_len=120, host=40, metrics_sample=1.0, sessions=False)
    lives = []
    for index, seed in enumerate((0, 1, 0, 0)):
        request = engine.add(prompt(seed, 100), max_tokens=1, ignore_eos=True)
        engine.run()
        lives += engine.scheduler.take_block_lives()
        engine.now += 10.0
        expected = [(0, 0), (0, 0), (99, 99 - 16), (99, 0)][index]  # the first block was not in the other's way
        assert (request.num_cached_tokens, request.num_host_tokens) == expected
    stats = engine.scheduler.stats()
    assert stats.host_cache_queries >= stats.host_cache_hits > 0
    assert len(lives) >= 6
    assert all(life.lifetime_s >= life.idle_s >= 0 for life in lives)
    assert max(life.lifetime_s for life in lives) > 9


def test_with_micro_batches_everybody_decodes_in_turn():
    """Seven requests in four micro-batches: at most two in each, and after 40 turns nobody is more than one behind."""
    engine = Engine(num_blocks=64, micro_batches=4)
    for index in range(7):
        engine.add(prompt(index, 5), max_tokens=100, ignore_eos=True)
    for _ in range(4 * 40):
        engine.step()
    counts = [len(tokens) for tokens in engine.outputs.values()]
    assert max(counts) - min(counts) <= 1
    assert min(counts) >= 35
    engine.run()
    engine.check_outputs()


def test_the_chunks_of_a_prompt_follow_one_another_through_the_stages():
    """A prompt of 600 tokens within the budget is halved for two micro-batches, and both are in flight at once."""
    engine = Engine(num_blocks=64, max_model_len=900, budget=800, micro_batches=2)
    engine.add(prompt(0, 600), max_tokens=2, ignore_eos=True)
    plans = [engine.scheduler.schedule(0.0) for _ in range(2)]
    assert [plan and plan.num_tokens for plan in plans] == [300, 300]
    assert engine.scheduler.schedule(0.0) is None


STEMS = [prompt(100 + i, 90) for i in range(3)]


class RandomTraffic(RuleBasedStateMachine):
    """Arrivals that share prefixes or continue answers, aborts, failures, stops; small pools; overlapping steps."""

    @initialize(
        num_blocks=st.integers(6, 28), depth=st.integers(1, 2), budget=st.integers(4, 64),
        seqs=st.integers(1, 8), caching=st.sampled_from([True, True, True, False]),
        watermark=st.sampled_from([0.0, 0.1]), host=st.sampled_from([0, 3, 10, 60]), lag=st.sampled_from([0, 1, 5]),
        sessions=st.sampled_from([True, True, False]), micro_batches=st.sampled_from([1, 1, 2, 4]),
    )  # fmt: skip
    def start(self, num_blocks, depth, budget, seqs, caching, watermark, host, lag, sessions, micro_batches):
        self.engine = Engine(
            num_blocks=num_blocks, max_model_len=min(150, num_blocks * 16), max_num_seqs=seqs, budget=budget,
            depth=depth, enable_prefix_caching=caching, watermark=watermark, host=host, lag=lag,
            sessions=sessions, micro_batches=micro_batches,
        )  # fmt: skip

    @rule(
        stem=st.sampled_from(STEMS), shared=st.integers(0, 90), own=st.integers(1, 30), seed=st.integers(0, 50),
        max_tokens=st.integers(1, 40), min_tokens=st.integers(0, 5), salt=st.sampled_from(["", "", "x"]),
        priority=st.integers(0, 1), ignore_eos=st.booleans(), user=st.sampled_from("abc"),
        timeout=st.sampled_from([None, None, None, 0.05, 1.0]),
    )  # fmt: skip
    def arrive(self, stem, shared, own, seed, **arguments):
        tokens = stem[:shared] + prompt(seed, own)
        if len(tokens) < self.engine.scheduler.max_model_len and len(self.engine.scheduler._waiting) < 12:
            self.engine.add(tokens, **arguments)

    @rule(pick=st.integers(0, 1 << 16), own=st.integers(1, 12), max_tokens=st.integers(1, 20))
    def continue_a_conversation(self, pick, own, max_tokens):
        done = list(self.engine.finished)
        if done:
            before = self.engine.requests[done[pick % len(done)]]
            tokens = before.prompt_token_ids + before.output_token_ids + prompt(pick, own)
            if len(tokens) < self.engine.scheduler.max_model_len:
                self.engine.add(tokens, max_tokens=max_tokens, salt=before.cache_salt)

    @rule(seconds=st.sampled_from([0.2, 1.0, 5.0, 40.0, 700.0]))
    def time_passes(self, seconds):
        self.engine.now += seconds

    @rule(pick=st.integers(0, 1 << 16))
    def client_goes(self, pick):
        live = [r for r in self.engine.requests.values() if not r.is_finished]
        if live:
            self.engine.scheduler.abort([live[pick % len(live)].request_id])

    @rule(pick=st.integers(0, 1 << 16), chance=st.integers(0, 9))
    def row_fails(self, pick, chance):
        live = [r for r in self.engine.requests.values() if not r.is_finished]
        if live and chance == 0:
            self.engine.fail.add(live[pick % len(live)].request_id)

    @rule(steps=st.integers(1, 12))
    def run_steps(self, steps):
        for _ in range(steps):
            self.engine.step()

    @invariant()
    def nothing_is_lost(self):
        if hasattr(self, "engine"):
            self.engine.check()

    def teardown(self):
        if hasattr(self, "engine"):
            self.engine.run()
            self.engine.check_outputs()


def random_steps(examples: int, rules: int) -> int:
    """Run the machine. Returns how many steps the schedulers made."""
    before = Engine.total_steps
    run_state_machine_as_test(
        RandomTraffic,
        settings=settings(
            max_examples=examples, stateful_step_count=rules, deadline=None, database=None,
            suppress_health_check=list[Any](HealthCheck),
        ),
    )  # fmt: skip
    return Engine.total_steps - before


def test_random_traffic():
    assert random_steps(60, 100) > 0


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_random_traffic_for_a_million_steps():
    """Some of them by hypothesis, the rest in long lives of one engine each, with random settings."""
    steps, seed = random_steps(400, 100), 0
    while steps < 1_000_000:
        before = Engine.total_steps
        live_randomly(seed, 4000, (None, 0.9, 0.4)[seed % 3])
        steps, seed = steps + Engine.total_steps - before, seed + 1
        if seed % 20 == 0:
            print(f"{steps:,} steps, {seed} lives", flush=True)


def test_nothing_is_fetched_over_the_source_of_a_copy():
    """A life that once loaded a returning session's block over the tail that the same plan was to copy."""
    live_randomly(88, 4000)


def live_randomly(seed: int, steps: int, guessing: float | None = None) -> None:
    """One engine, random settings: arrivals, next turns, aborts, failing rows, pauses; integrity after each step."""
    rng = random.Random(seed)
    num_blocks = rng.randrange(6, 40)
    engine = Engine(
        num_blocks=num_blocks, max_model_len=min(180, num_blocks * 16), max_num_seqs=rng.randrange(1, 9),
        budget=rng.randrange(4, 64), depth=rng.randrange(1, 3), enable_prefix_caching=rng.random() < 0.85,
        watermark=rng.choice((0.0, 0.1)), host=rng.choice((0, 3, 10, 60)), lag=rng.choice((0, 1, 5)),
        sessions=rng.random() < 0.7, guessing=guessing,
        micro_batches=(1, 2, 1, 4)[seed % 4] if guessing is None else 1,
    )  # fmt: skip
    longest = engine.scheduler.max_model_len
    recent: list[Request] = []
    for _ in range(steps):
        chance = rng.random()
        if chance < 0.1 and len(engine.scheduler._waiting) < 10:
            if recent and chance < 0.05:
                before = rng.choice(recent)
                tokens = before.prompt_token_ids + before.output_token_ids + prompt(rng.randrange(99), 9)
                salt = before.cache_salt
            else:
                tokens = rng.choice(STEMS)[: rng.randrange(90)] + prompt(rng.randrange(99), rng.randrange(1, 40))
                salt = rng.choice(("", "", "x"))
            if len(tokens) < longest:
                request = engine.add(
                    tokens, salt=salt, max_tokens=rng.randrange(1, 50), priority=rng.randrange(2),
                    user=rng.choice("abc"), ignore_eos=rng.random() < 0.5, timeout=rng.choice((None, None, None, 2.0)),
                )  # fmt: skip
                recent = [*recent[-7:], request]
        elif chance < 0.11:
            engine.now += rng.choice((0.2, 1.0, 5.0, 40.0, 700.0))
        elif chance < 0.12 and (live := [r for r in recent if not r.is_finished]):
            engine.scheduler.abort([rng.choice(live).request_id])
        elif chance < 0.121 and (live := [r for r in recent if not r.is_finished]):
            engine.fail.add(rng.choice(live).request_id)
        engine.step()
    engine.run()
    engine.check_outputs()


@pytest.mark.parametrize(("seed", "guessing"), [(20350, 0.9), (20377, 0.9)])
def test_turns_are_held_up_to_the_age_bound_and_no_longer(seed, guessing):
    """Lives that ended with turns held for sessions that never came back: nine in a pool of six blocks; and one that
    wanted what the others would grow by, and so stopped those behind it."""
    live_randomly(seed, 4000, guessing)


def test_what_is_fetched_ahead_arrives_though_nobody_asks_for_anything():
    """A life at whose end blocks for a session's return were on their way, and stayed so until the next request."""
    live_randomly(5141, 4000)


def test_a_random_life():
    for seed in range(4):
        live_randomly(1000 + seed, 1000)


@pytest.mark.parametrize("chance_right", [0.9, 0.4])
def test_a_random_life_of_guesses(chance_right):
    for seed in range(4):
        live_randomly(2000 + seed, 800, chance_right)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize(("chance_right", "most_steps"), [(1.0, 20), (0.0, 61)])
def test_guesses_change_no_token_and_right_ones_save_steps(depth, chance_right, most_steps):
    engine = Engine(depth=depth, guessing=chance_right, max_num_seqs=2, num_blocks=20)
    engine.add(first := prompt(0, 37), max_tokens=60, ignore_eos=True)
    steps = 0
    while engine.scheduler.has_work:
        steps += engine.step()
    engine.check_outputs()
    assert steps <= most_steps * (1 if depth == 1 else 2)
    stats = engine.scheduler.stats()
    assert stats.num_draft_tokens > 40
    assert stats.num_accepted_tokens == sum(stats.accepted_per_position)
    if chance_right == 1.0:
        assert stats.num_accepted_tokens > 30
    computed = engine.device.computed
    engine.add(first + engine.outputs["r0"], max_tokens=1)  # nothing that was rejected is in the prefix tree
    engine.run()
    assert engine.device.computed - computed <= 2
    engine.check_outputs()


def test_guesses_never_preempt_anybody():
    plain, guessing = (Engine(num_blocks=13, max_model_len=160, watermark=0.0, guessing=g) for g in (None, 0.5))
    for engine in (plain, guessing):
        for i in range(3):
            engine.add(prompt(i, 30), max_tokens=34, ignore_eos=True)
        engine.run()
        engine.check_outputs()
        assert engine.scheduler.stats().num_preemptions == 0


def test_a_step_with_guesses_runs_alone_and_others_overlap():
    engine = Engine(depth=2, guessing=0.7, num_blocks=64, max_model_len=300)
    for i in range(4):
        engine.add(prompt(i, 20), max_tokens=50, ignore_eos=True)
    while engine.scheduler.has_work:
        engine.step()
        assert not any(plan.num_verifying for plan, _ in engine.in_flight) or len(engine.in_flight) == 1
    engine.check_outputs()


@pytest.mark.parametrize(
    ("depth", "host", "sessions"), [(1, 0, False), (2, 0, True), (1, 30, True), (2, 30, False), (2, 30, True)]
)
def test_a_long_mixed_run(depth, host, sessions):
    """5,000 steps of random traffic in a pool far too small."""
    rng = random.Random(depth)
    engine = Engine(
        num_blocks=24, max_model_len=200, max_num_seqs=6, budget=40, depth=depth, watermark=0.02, host=host, lag=3,
        sessions=sessions,
    )  # fmt: skip
    most_kept = 0
    for _ in range(5000):
        if rng.random() < 0.12 and len(engine.scheduler._waiting) < 10:
            tokens = rng.choice(STEMS)[: rng.randrange(90)] + prompt(rng.randrange(99), rng.randrange(1, 40))
            engine.add(
                tokens, max_tokens=rng.randrange(1, 60), priority=rng.randrange(2), ignore_eos=rng.random() < 0.5
            )
        if rng.random() < 0.05 and engine.finished:
            before = engine.requests[rng.choice(list(engine.finished)[-8:])]
            tokens = before.prompt_token_ids + before.output_token_ids + prompt(rng.randrange(99), 9)
            if len(tokens) < 200:
                engine.add(tokens, max_tokens=rng.randrange(1, 20))
        most_kept = max(most_kept, engine.scheduler.kv.pool.num_kept)
        if rng.random() < 0.01 and (live := [r for r in engine.requests.values() if not r.is_finished]):
            engine.scheduler.abort([rng.choice(live).request_id])
        engine.step()
    engine.run()
    engine.check_outputs()
    stats = engine.scheduler.stats()
    assert stats.num_preemptions > (0 if sessions else 20)
    assert stats.prefix_cache_hits > 0.2 * stats.prefix_cache_queries
    assert (stats.num_swapped_in > 50) == bool(host)
    assert (most_kept > 0) == sessions


def test_little_of_the_allocated_room_is_unused_at_any_time():
    """A mixed workload: prompts of 20 to 4,000 tokens, shared prefixes, answers of up to 400; from its first request to
    its last, but for moments when less than 500 tokens are held at all (the last block of one short request)."""
    rng = random.Random(5)
    engine = SimulatedEngine(num_blocks=6000, num_host_blocks=6000, max_model_len=5000, max_num_seqs=64)
    stem, waste = [7] * 300, []

    def look(plan):
        if engine.scheduler.kv.pool.num_owned * BLOCK_SIZE >= 500:
            waste.append(engine.scheduler.kv_waste())

    engine.on_step = look
    for i in range(200):
        prompt = stem[: rng.choice((0, 300))] + [8 + i] * int(20 * 200 ** rng.random())
        request = Request(f"r{i}", prompt, SamplingParams(max_tokens=rng.randrange(1, 400), ignore_eos=True), 0.0)
        engine.at(rng.random() * 8, lambda request=request: engine.add(request))
    engine.run()
    assert len(waste) > 1000
    assert 0 < max(waste) < 0.04
