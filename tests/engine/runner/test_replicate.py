"""Plans for other ranks: whatever a scheduler does, the receiver makes the very plan that was sent."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, cast

import msgspec
import pytest

from mainsail_engine.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from mainsail_engine.request import Request, SamplingParams
from mainsail_engine.runner.replicate import PlanReceiver, PlanSender, decode, encode
from mainsail_engine.scheduler import Scheduler
from mainsail_engine.step import Chunk, StepPlan, StepResult

if TYPE_CHECKING:
    from mainsail_engine.structured.constraint import Constraint


def seen(plan: StepPlan) -> list[object]:
    """All that a runner reads of a plan."""
    chunks = [
        (
            c.request.request_id, c.start, c.num_tokens, c.samples, c.slot, list(c.block_ids),
            c.request.token_ids(0, c.request.num_tokens), c.request.params, c.request.num_preemptions,
            c.request.num_prompt_logprobs,
        )
        for c in plan.chunks
    ]  # fmt: skip
    return [chunks, plan.copies, plan.stores, plan.loads, plan.num_decodes]


@pytest.mark.parametrize("seed", range(6))
def test_the_receiver_makes_the_plan_that_was_sent(seed: int) -> None:
    """A pool far too small: requests are preempted, share prefixes, end early, and two steps are in flight."""
    numbers = random.Random(seed)
    scheduler = Scheduler(
        EngineConfig(
            model=ModelConfig(path="none"), cache=CacheConfig(num_blocks=24),
            scheduler=SchedulerConfig(max_num_seqs=6, max_num_batched_tokens=48), device="cpu",
        ), 24, 256, [1],
    )  # fmt: skip
    sender, receiver = PlanSender(), PlanReceiver()
    in_flight: list[StepPlan] = []
    preempted = 0
    for step in range(3000):
        if step > 250 and not scheduler.has_work:
            break
        if step % 4 == 0 and step < 250:
            prompt = [2] * 40 + [numbers.randrange(2, 9) for _ in range(numbers.randrange(1, 60))]
            params = SamplingParams(max_tokens=numbers.randrange(1, 60), temperature=0.0, seed=step)
            scheduler.add(Request(f"r{step}", prompt, params, float(step)))
        if step % 17 == 0:
            scheduler.abort([f"r{step - 20}"])
        plan = scheduler.schedule(float(step))
        if plan is not None:
            preempted = max(preempted, *(c.request.num_preemptions for c in plan.chunks), 0)
            told = receiver.plan(decode(encode(sender.message(plan))))
            assert seen(told) == seen(plan)
            in_flight.append(plan)
        if in_flight and (len(in_flight) == 2 or plan is None):
            oldest = in_flight.pop(0)
            tokens = [numbers.randrange(2, 9) for c in oldest.chunks if c.samples]
            scheduler.commit(oldest, StepResult(tokens), float(step))
    assert preempted, "the pool was never too small"
    assert not scheduler.has_work


def test_min_tokens_of_a_constrained_request_are_its_masks_business() -> None:
    """Who knows of a grammar by its masks alone must not forbid the end that they leave as all there is."""
    settings = SamplingParams(max_tokens=9, min_tokens=5, frequency_penalty=0.5)
    sender, receiver = PlanSender(), PlanReceiver()
    for constraint, min_tokens in ((None, 5), (cast("Constraint", object()), 0)):
        request = Request("r", [2, 3], settings, 0.0, constraint=constraint)
        plan = StepPlan([Chunk(request, 0, 2, True, 0, [4])])
        (chunk,) = receiver.plan(decode(encode(sender.message(plan)))).chunks
        assert chunk.request.params == msgspec.structs.replace(settings, min_tokens=min_tokens)
