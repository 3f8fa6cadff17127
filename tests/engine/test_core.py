"""The loop and its messages, with the real scheduler and a runner that only names tokens."""

from __future__ import annotations

import pytest

from mainsail_engine.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig, SpeculativeConfig
from mainsail_engine.core import EngineCore, describe, pipeline_depth, warm_up
from mainsail_engine.errors import MissingTensorError, OutOfMemoryError
from mainsail_engine.protocol import (
    Abort,
    Add,
    Control,
    Controlled,
    Failed,
    FirstScheduled,
    Ready,
    RequestOutput,
    SchedulerStats,
    StepOutputs,
    decode_from_core,
    decode_to_core,
    encode,
)
from mainsail_engine.request import FinishReason, Request, SamplingParams
from mainsail_engine.scheduler import Scheduler
from mainsail_engine.speculative.ngram import NgramSource
from mainsail_engine.speculative.speculator import Speculator
from mainsail_engine.step import FAILED_TOKEN, StepPlan, StepResult

EOS = 7
CONFIG = EngineConfig(
    model=ModelConfig(path="none"),
    cache=CacheConfig(num_blocks=16),
    scheduler=SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=32),
    device="cpu",
)


class Pending:
    def __init__(self, tokens: list[int], log: list[str], number: int) -> None:
        self._tokens, self._log, self._number = tokens, log, number

    def result(self) -> StepResult:
        self._log.append(f"result {self._number}")
        return StepResult(self._tokens)


class NamingRunner:
    """Every sampled token is the next position modulo 5; slot-independent, so nothing has to be computed."""

    num_blocks, num_host_blocks = 16, 0
    max_model_len = 64
    eos_token_ids = frozenset({EOS})
    vocab_size = 8

    def __init__(self, token: int | None = None) -> None:
        self.log: list[str] = []
        self._token = token
        self._count = 0

    def launch(self, plan: StepPlan) -> Pending:
        self._count += 1
        self.log.append(f"launch {self._count}")
        ends = [
            end for chunk in plan.chunks if chunk.samples
            for end in range(chunk.start + chunk.num_tokens - len(chunk.guesses), chunk.start + chunk.num_tokens + 1)
        ]  # fmt: skip
        return Pending([end % 5 if self._token is None else self._token for end in ends], self.log, self._count)


def make(
    depth: int = 1, token: int | None = None, speculator: Speculator | None = None
) -> tuple[EngineCore, NamingRunner]:
    runner = NamingRunner(token)
    return EngineCore(Scheduler(CONFIG, 16, 64, {EOS}, speculator=speculator), runner, depth=depth), runner


def drive(core: EngineCore) -> list[StepOutputs]:
    steps, now = list[StepOutputs](), 0.0
    while core.has_work:
        step = core.step(now := now + 0.01)
        assert step is not None
        steps.append(step)
    return steps


def add(name: str, prompt: int = 3, max_tokens: int = 4) -> Add:
    return Add(name, [1] * prompt, SamplingParams(max_tokens=max_tokens, temperature=0.0))


@pytest.mark.parametrize("depth", [1, 2])
def test_tokens_are_the_same_at_any_depth(depth: int) -> None:
    core, _ = make(depth)
    core.handle(add("a"), 0.0)
    core.handle(add("b", prompt=5, max_tokens=2), 0.0)
    outputs = [output for step in drive(core) for output in step.outputs]
    tokens = {name: [t for o in outputs if o.request_id == name for t in o.token_ids] for name in "ab"}
    assert tokens == {"a": [3, 4, 0, 1], "b": [0, 1]}
    assert [o.finish_reason for o in outputs if o.finish_reason] == [FinishReason.LENGTH] * 2


def test_with_depth_two_the_next_step_is_launched_before_a_result_is_read() -> None:
    core, runner = make(depth=2)
    core.handle(add("a"), 0.0)
    drive(core)
    assert runner.log[:3] == ["launch 1", "launch 2", "result 1"]


@pytest.mark.parametrize("depth", [1, 2])
def test_a_device_that_waits_for_guesses_gets_its_next_step_before_the_tokens_are_told(depth: int) -> None:
    """On the CPU, where the next step would be computed at once, tokens are told first."""
    guessing = SpeculativeConfig(method="ngram", num_speculative_tokens=4, adaptive=False)
    core, runner = make(depth, speculator=Speculator(guessing, overlap=depth > 1))
    core.handle(add("a", max_tokens=40), 0.0)
    tokens, launched_next, now = list[int](), 0, 0.0
    while core.has_work:
        step = core.step(now := now + 0.01)
        assert step is not None
        tokens += step.outputs[0].token_ids
        launched_next += len(step.outputs[0].token_ids) == 5 and runner.log[-1].startswith("launch")
    assert tokens == [end % 5 for end in range(3, 43)]
    assert len(runner.log) < 2 * 25
    assert launched_next >= 4 if depth > 1 else launched_next == 0


class LoggingSource(NgramSource):
    def __init__(self, log: list[str]) -> None:
        super().__init__(2, 4)
        self._log = log

    def settle(self) -> None:
        self._log.append("settle")
        super().settle()


def guessing_core(depth: int) -> tuple[EngineCore, Scheduler, NamingRunner]:
    runner = NamingRunner()
    guessing = SpeculativeConfig(method="ngram", num_speculative_tokens=4, adaptive=False)
    speculator = Speculator(guessing, LoggingSource(runner.log), overlap=depth > 1)
    scheduler = Scheduler(CONFIG, 16, 64, {EOS}, speculator=speculator)
    return EngineCore(scheduler, runner, depth=depth), scheduler, runner


@pytest.mark.parametrize("depth", [1, 2])
def test_what_a_commit_puts_off_is_done_once_the_next_step_is_launched(depth: int) -> None:
    core, _, runner = guessing_core(depth)
    core.handle(add("a", max_tokens=40), 0.0)
    launched_next, now = 0, 0.0
    while core.has_work:
        assert core.step(now := now + 0.01) is not None
        assert runner.log[-1] == "settle"
        launched_next += runner.log[-2].startswith("launch")
    assert launched_next >= 4 if depth > 1 else launched_next == 0


def test_statistics_change_nothing() -> None:
    """Blocks that guesses filled enter the prefix tree when the scheduler settles, and not when somebody looks."""
    _, scheduler, runner = guessing_core(depth=1)
    request = Request("a", [1] * 3, SamplingParams(max_tokens=40, temperature=0.0), 0.0)
    scheduler.add(request)
    put_off, now = 0, 0.0
    while (plan := scheduler.schedule(now := now + 0.01)) is not None:
        scheduler.commit(plan, runner.launch(plan).result(), now)
        before = request.num_tree_blocks, len(runner.log)
        assert scheduler.stats() == scheduler.stats()
        assert (request.num_tree_blocks, len(runner.log)) == before
        scheduler.settle()
        put_off += request.num_tree_blocks > before[0]
    assert put_off == 2


def test_the_time_in_the_queue_is_told_once() -> None:
    core, _ = make()
    core.handle(add("a"), 0.0)
    first = [item for step in drive(core) for item in step.first_scheduled]
    assert [item.request_id for item in first] == ["a"]
    assert first[0].queue_time_s == pytest.approx(0.01)


def test_a_request_whose_deadline_comes_first_leaves_nothing_behind() -> None:
    core, _ = make()
    core.handle(Add("late", [1, 2], SamplingParams(max_tokens=2), timeout_s=0.5), 0.0)
    outputs = core.step(1.0)
    assert outputs is not None
    assert [(o.request_id, o.stop_reason) for o in outputs.outputs] == [("late", "deadline")]
    assert core._queued_since == {}


def test_a_request_that_can_never_run_fails_alone() -> None:
    core, _ = make()
    core.handle(add("long", prompt=100), 0.0)
    core.handle(add("fine"), 0.0)
    outputs = [output for step in drive(core) for output in step.outputs]
    failed = [output for output in outputs if output.request_id == "long"]
    assert [output.finish_reason for output in failed] == [FinishReason.ERROR]
    assert "100 tokens" in (failed[0].error or "")
    assert sum(len(output.token_ids) for output in outputs) == 4


def test_an_abort_brings_the_gauges_up_to_date() -> None:
    core, _ = make()
    core.handle(add("a"), 0.0)
    core.step(0.0)
    core.handle(Abort(["a", "unknown"]), 0.0)
    assert drive(core)[-1].stats.num_running == 0
    assert not core.has_work


def test_a_client_may_name_the_session_that_goes_on() -> None:
    core, _ = make()
    params = SamplingParams(max_tokens=2, temperature=0.0)
    for name, token in (("a", 1), ("b", 2)):
        core.handle(Add(name, [token] * 20, params, session_id="run 7"), 0.0)
        if name == "a":
            drive(core)
    assert core._scheduler._requests["b"].session.num_turns == 2  # type: ignore[attr-defined]


def test_a_failing_first_token_stops_the_start() -> None:
    warm_up(make()[0])
    with pytest.raises(RuntimeError, match="first token"):
        warm_up(make(token=FAILED_TOKEN)[0])


def test_reasons() -> None:
    assert describe(MissingTensorError("no x.weight")) == Failed("MissingTensor", "no x.weight")
    assert describe(MemoryError()).reason == "OutOfMemory"
    assert describe(ValueError("odd")) == Failed("EngineFailed", "ValueError: odd")


def test_two_steps_in_flight_only_where_they_pay() -> None:
    assert pipeline_depth(CONFIG, "cuda:0") == 2
    assert pipeline_depth(CONFIG, "cpu") == 1


def test_messages_arrive_as_they_were_sent() -> None:
    stats = SchedulerStats(num_running=1, kv_usage=0.5)
    output = RequestOutput("a", [1], FinishReason.STOP, EOS, 3)
    for message in (
        Ready(64, 16, 16, 8, [EOS], "cpu", "float32"),
        StepOutputs(3, [output], stats, 4, 0.1, [FirstScheduled("a", 0.2)]),
        Failed("EngineFailed", "why"),
    ):
        assert decode_from_core(encode(message)) == message
    for command in (add("a"), Abort(["a"], FinishReason.STOP)):
        assert decode_to_core(encode(command)) == command


class Sleeper:
    """Its memory cannot be given back, and comes back a few times only."""

    def __init__(self, wakes: int = 9) -> None:
        self.runner, self.wakes = NamingRunner(), wakes

    def resting_runner(self) -> NamingRunner:
        return self.runner

    def sleep(self) -> None:
        raise OSError("no memory on the host")

    def wake_up(self) -> tuple[Scheduler, NamingRunner]:
        self.wakes -= 1
        if self.wakes < 0:
            raise OutOfMemoryError("the device has too little memory")
        return Scheduler(CONFIG, 16, 64, {EOS}), self.runner


def test_who_cannot_sleep_stays_awake() -> None:
    core = EngineCore(Scheduler(CONFIG, 16, 64, {EOS}), NamingRunner(), depth=1, sleeper=Sleeper())
    core.handle(Control("c", "sleep"), 0.0)
    assert core.take_answers() == [Controlled("c", "OSError: no memory on the host")]
    core.handle(add("a"), 0.0)
    outputs = [output for step in drive(core) for output in step.outputs]
    assert [output.finish_reason for output in outputs if output.finish_reason] == [FinishReason.LENGTH]


def test_who_can_neither_sleep_nor_be_awake_ends() -> None:
    core = EngineCore(Scheduler(CONFIG, 16, 64, {EOS}), NamingRunner(), depth=1, sleeper=Sleeper(wakes=0))
    core.handle(Control("c", "sleep"), 0.0)
    with pytest.raises(OutOfMemoryError):
        core.take_answers()
