"""Whatever the scheduler does to a request on the way, the real model answers the same.

SmolLM2 in float32, greedy and seeded: cold and alone is the reference; then as a prompt instead of decoded, with
prefix hits and copied tails, in a batch of 32, in small chunks, with guesses to verify, and preempted again and again
in a pool that is too small, with and without host memory to go to. Between any two steps all free blocks are filled
with NaN, on the device and on the host.
"""

from __future__ import annotations

import itertools
import random

import pytest

from mainsail_engine.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig, SpeculativeConfig
from mainsail_engine.core import EngineCore
from mainsail_engine.protocol import Add
from mainsail_engine.request import SamplingParams
from mainsail_engine.runner.model_runner import ModelRunner
from mainsail_engine.runner.swap import HostMemory, HostSwap, SwappingRunner
from mainsail_engine.scheduler import Scheduler
from mainsail_engine.speculative.speculator import Speculator

pytestmark = pytest.mark.model
TOKENS = 8
GREEDY = {"temperature": 0.0}
SEEDED = {"temperature": 1.0, "top_p": 0.95, "seed": 20}


@pytest.fixture(scope="module")
def runner(smollm2):
    config = EngineConfig(
        model=ModelConfig(path=str(smollm2), max_model_len=128, dtype="float32"),
        cache=CacheConfig(num_blocks=64),
        scheduler=SchedulerConfig(max_num_seqs=32, max_num_batched_tokens=256),
        device="cpu",
    )
    return ModelRunner(config)


@pytest.fixture(scope="module", params=[GREEDY, SEEDED], ids=["greedy", "seeded"])
def settings(request):
    return request.param


@pytest.fixture(scope="module")
def prompts():
    """Three prompts that leave a common stem inside different blocks."""
    rng = random.Random(7)
    stem = rng.choices(range(1000, 20000), k=50)
    return [stem[:shared] + rng.choices(range(1000, 20000), k=8) for shared in (50, 23, 32)]


def generate(
    runner, prompts, *, num_blocks=64, budget=256, caching=True, one_by_one=False, watermark=0.01, host=0,
    depth=1, speculator=None, max_tokens=TOKENS, settings=GREEDY,
):  # fmt: skip
    """Tokens for each prompt, and the scheduler's counters."""
    layers, _, *rest = runner.kv_cache.shape
    memory = HostMemory((layers, *rest), runner.dtype, host * runner.kv_cache[:, 0].nbytes)
    swapping = SwappingRunner(runner, HostSwap(runner.kv_cache, memory))
    config = EngineConfig(
        model=ModelConfig(path="-"),
        cache=CacheConfig(enable_prefix_caching=caching),
        scheduler=SchedulerConfig(max_num_seqs=32, max_num_batched_tokens=budget, watermark=watermark),
        device="cpu",
    )
    scheduler = Scheduler(config, num_blocks, runner.max_model_len, runner.eos_token_ids, speculator=speculator)
    core, answers, clock = EngineCore(scheduler, swapping, depth=depth), {}, itertools.count(0.0, 0.01)
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, **settings)
    for index, prompt in enumerate(prompts):
        core.handle(Add(str(index), prompt, params), next(clock))
        if one_by_one or index == len(prompts) - 1:
            run(core, scheduler, answers, lambda: poison(runner, memory, scheduler), clock)
    return [answers[str(index)] for index in range(len(prompts))], scheduler.stats()


def poison(runner, memory, scheduler) -> None:
    """What nobody holds must not matter."""
    runner.kv_cache[:, scheduler.kv.pool._free] = float("nan")
    for block in scheduler.kv.host.pool._free:
        for _, _, piece in memory.runs((block,)):
            piece.fill_(float("nan"))


def run(core, scheduler, answers, poison, clock) -> None:
    while core.has_work:
        poison()
        step = core.step(next(clock))
        scheduler.check_integrity()
        for output in step.outputs if step else ():
            assert output.error is None
            answers.setdefault(output.request_id, []).extend(output.token_ids)


@pytest.fixture(scope="module")
def reference(runner, prompts, settings):
    answers, stats = generate(runner, prompts, caching=False, one_by_one=True, settings=settings)
    assert stats.prefix_cache_hits == 0
    assert all(len(answer) == TOKENS for answer in answers)
    return answers


def test_a_prompt_is_as_decoded(runner, prompts, settings, reference):
    """Every token of an answer once more, as the first after a prompt that holds those before it."""
    prompt, answer = prompts[0], reference[0]
    longer = [prompt + answer[:count] for count in range(TOKENS)]
    again, _ = generate(runner, longer, caching=False, one_by_one=True, max_tokens=1, settings=settings)
    assert [token for (token,) in again] == answer


def test_prefix_hits_and_copied_tails_are_as_cold(runner, prompts, settings, reference):
    answers, stats = generate(runner, [*prompts, *prompts], one_by_one=True, settings=settings)
    assert stats.prefix_cache_hits == 23 + 32 + sum(len(prompt) - 1 for prompt in prompts)
    assert answers == [*reference, *reference]


def test_small_chunks_are_as_whole(runner, prompts, settings, reference):
    answers, _ = generate(runner, prompts, budget=11, settings=settings)
    assert answers == reference


def test_in_a_batch_of_32_is_as_alone(runner, prompts, settings, reference):
    rng = random.Random(8)
    others = [rng.choices(range(1000, 20000), k=rng.randint(1, 12)) for _ in range(29)]
    crowd = [*others[:10], prompts[0], *others[10:20], prompts[1], *others[20:], prompts[2]]
    answers, _ = generate(runner, crowd, settings=settings)
    assert [answers[10], answers[21], answers[31]] == reference


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("host", [0, 32])
def test_preempted_is_as_not(runner, prompts, settings, caching, host):
    """Three prompts of one block each, which grow to two blocks each where there are only four."""
    short = [prompt[-8:] + prompt[:5] for prompt in prompts]
    reference, calm = generate(runner, short, caching=False, one_by_one=True, settings=settings)
    answers, pressed = generate(
        runner, short, num_blocks=4, caching=caching, watermark=0.0, host=host, settings=settings
    )
    assert (calm.num_preemptions, pressed.num_preemptions > 0) == (0, True)
    assert (pressed.num_swapped_in > 0, pressed.num_recomputed_tokens == 0) == (host > 0, host > 0)
    assert answers == reference


def test_prefixes_from_the_host_are_as_cold(runner, prompts, settings, reference):
    """A pool for one prompt: every prefix comes back from the host, full blocks and tails."""
    answers, stats = generate(runner, [*prompts, *prompts], num_blocks=5, host=64, one_by_one=True, settings=settings)
    assert stats.num_swapped_in >= 3
    assert stats.host_cache_hits >= 30
    assert answers == [*reference, *reference]


def test_the_next_turn_is_as_cold(runner, prompts, settings, reference):
    prompts, reference = prompts[1:2], reference[1:2]
    turns = [prompt + answer + [1500, 1600, 1700] for prompt, answer in zip(prompts, reference, strict=True)]
    cold, _ = generate(runner, turns, caching=False, one_by_one=True, settings=settings)
    warm, stats = generate(runner, [*prompts, *turns], one_by_one=True, settings=settings)
    assert warm[len(prompts) :] == cold
    assert stats.prefix_cache_hits >= sum(len(turn) - 4 for turn in turns)


@pytest.fixture(scope="module")
def repeating(runner, prompts):
    """Prompts whose greedy answers repeat themselves and the prompt, and those answers."""
    stems = [prompt[-8:] * 3 + prompt[:7] for prompt in prompts]
    answers, _ = generate(runner, stems, caching=False, one_by_one=True, max_tokens=30)
    return stems, answers


@pytest.mark.parametrize(
    "pressed", [{}, {"budget": 11}, {"num_blocks": 12, "watermark": 0.0, "host": 32}, {"one_by_one": True}]
)
def test_with_guesses_from_the_text_is_as_without(runner, repeating, pressed):
    stems, answers = repeating
    config = SpeculativeConfig(method="ngram", num_speculative_tokens=6, prompt_lookup_min=1, adaptive=False)
    speculator = Speculator(config)
    again, stats = generate(runner, stems * 2, speculator=speculator, max_tokens=30, depth=2, **pressed)
    assert again == answers * 2
    assert stats.num_draft_tokens > stats.num_accepted_tokens > 20
    assert (stats.num_preemptions > 0) == ("watermark" in pressed)
