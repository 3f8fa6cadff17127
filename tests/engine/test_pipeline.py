"""How busy the stages of a pipeline are: the real loop and scheduler over stages that take a tick for each step.

Nothing here measures time. A stage begins a step when it is done with the one before and has been handed this one's
hidden states; the trace says which ticks each stage was idle for.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from mainsail_engine.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from mainsail_engine.core import EngineCore
from mainsail_engine.protocol import Add
from mainsail_engine.request import SamplingParams
from mainsail_engine.scheduler import Scheduler
from mainsail_engine.step import StepPlan, StepResult

TOKENS = 50


@dataclass
class Trace:
    """Ticks at which each stage begins a step, and how many steps were in flight at each launch."""

    begins: list[list[int]]
    in_flight: list[int] = field(default_factory=list)

    def idle(self) -> float:
        """The share of the stages' time between the first step's begin and the last one's end that nobody used."""
        span = self.begins[-1][-1] + 1 - self.begins[0][0]
        return 1 - sum(len(ticks) for ticks in self.begins) / (span * len(self.begins))


class TickingStages:
    """step.Runner: every stage takes one tick for a step, whatever is in it."""

    num_blocks, num_host_blocks, max_model_len, vocab_size = 512, 0, 256, 8
    eos_token_ids: frozenset[int] = frozenset()

    def __init__(self, num_stages: int) -> None:
        self.trace = Trace([[] for _ in range(num_stages)])
        self.now = self.num_in_flight = 0

    def launch(self, plan: StepPlan) -> TickingStep:
        self.num_in_flight += 1
        self.trace.in_flight.append(self.num_in_flight)
        ready = self.now
        for begins in self.trace.begins:
            begins.append(max(ready, begins[-1] + 1 if begins else 0))
            ready = begins[-1] + 1
        return TickingStep(self, ready, sum(chunk.samples for chunk in plan.chunks))


@dataclass
class TickingStep:
    stages: TickingStages
    done: int
    num_tokens: int

    def result(self) -> StepResult:
        """The driver waits for the last stage."""
        self.stages.now = max(self.stages.now, self.done)
        self.stages.num_in_flight -= 1
        return StepResult([1] * self.num_tokens)


def traced(num_stages: int, micro_batches: int, num_requests: int) -> Trace:
    config = EngineConfig(
        model=ModelConfig(path="none"), cache=CacheConfig(num_blocks=512),
        scheduler=SchedulerConfig(max_num_seqs=64), device="cpu",
    )  # fmt: skip
    stages = TickingStages(num_stages)
    scheduler = Scheduler(config, 512, 256, [], micro_batches=micro_batches)
    core = EngineCore(scheduler, stages, depth=micro_batches, micro_batches=micro_batches > 1)
    for index in range(num_requests):
        core.handle(Add(f"r{index}", [index, 2, 3], SamplingParams(max_tokens=TOKENS, ignore_eos=True)), 0.0)
    num_tokens = 0
    while core.has_work:
        step = core.step(0.0)
        num_tokens += sum(len(output.token_ids) for output in step.outputs) if step else 0
    assert num_tokens == num_requests * TOKENS
    return stages.trace


@pytest.mark.parametrize("num_stages", [2, 4])
def test_with_a_micro_batch_for_each_stage_all_of_them_are_busy(num_stages: int) -> None:
    trace = traced(num_stages, num_stages, num_requests=16)
    assert max(trace.in_flight) == num_stages
    assert trace.idle() < 0.1


@pytest.mark.parametrize("num_stages", [2, 4])
def test_one_step_at_a_time_leaves_all_stages_but_one_idle(num_stages: int) -> None:
    trace = traced(num_stages, 1, num_requests=16)
    assert max(trace.in_flight) == 1
    assert trace.idle() == pytest.approx(1 - 1 / num_stages)


def test_fewer_requests_than_stages_keep_as_many_stages_busy() -> None:
    assert traced(4, 4, num_requests=2).idle() == pytest.approx(0.5, abs=0.05)
