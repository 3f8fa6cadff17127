"""Through scheduler and runner, on a tiny random model: parameters mean the same however the work is cut up.

Each test's reference is the request cold and alone, one step at a time. `depth=2` launches a step before the last one's
tokens were read, which the CPU can do as well as a GPU.
"""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import count, pairwise

import pytest
import torch
from tests.engine.one_place import logits_in_one_place

from mainsail_engine.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from mainsail_engine.core import EngineCore
from mainsail_engine.protocol import Add, TokenLogprobs
from mainsail_engine.request import Pooling, SamplingParams
from mainsail_engine.runner.model_runner import ModelRunner
from mainsail_engine.scheduler import Scheduler

VOCAB = 96
MAX_LEN = 512


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(runner, transformers model) with the same random weights, large enough for distinct logits."""
    import transformers

    torch.manual_seed(4)
    settings = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=MAX_LEN, eos_token_id=VOCAB - 1,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.4)
    folder = tmp_path_factory.mktemp("tiny")
    model.save_pretrained(folder)
    config = EngineConfig(
        model=ModelConfig(path=str(folder), max_model_len=MAX_LEN, dtype="float32"),
        cache=CacheConfig(num_blocks=1024),
        scheduler=SchedulerConfig(max_num_seqs=40, max_num_batched_tokens=512),
        device="cpu",
    )
    return ModelRunner(config), model


@dataclass
class Got:
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    embedding: bytes | None = None
    num_cached_tokens: int = 0


def run(
    runner, jobs, *, depth=1, budget=512, num_blocks=1024, watermark=0.01, one_by_one=False, caching=True,
    speculator=None,
):  # fmt: skip
    """What each (prompt, params) got, and the scheduler's counters."""
    config = EngineConfig(
        model=ModelConfig(path="-"),
        cache=CacheConfig(enable_prefix_caching=caching),
        scheduler=SchedulerConfig(max_num_seqs=40, max_num_batched_tokens=budget, watermark=watermark),
        device="cpu",
    )
    scheduler = Scheduler(config, num_blocks, MAX_LEN, runner.eos_token_ids, speculator=speculator)
    core, got, clock = EngineCore(scheduler, runner, depth=depth), defaultdict(Got), count(0.0, 0.01)
    for index, (prompt, params) in enumerate(jobs):
        core.handle(Add(str(index), prompt, params), next(clock))
        while core.has_work and (one_by_one or index == len(jobs) - 1):
            step = core.step(next(clock))
            scheduler.check_integrity()
            for output in step.outputs if step else ():
                assert output.error is None, output
                one = got[int(output.request_id)]
                one.token_ids += output.token_ids
                one.logprobs += output.logprobs or []
                one.prompt_logprobs += output.prompt_logprobs or []
                one.embedding = output.embedding or one.embedding
                one.num_cached_tokens = output.num_cached_tokens
    return [got[index] for index in range(len(jobs))], scheduler.stats()


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(VOCAB - 1) for _ in range(rng.randint(1, 60))] for _ in range(count)]


def mixed(count: int) -> list[tuple[list[int], SamplingParams]]:
    """All kinds of parameters, seeded."""
    kinds = [
        {"temperature": 0.0},
        {"temperature": 1.0, "top_p": 0.9},
        {"temperature": 0.7, "top_k": 8, "logprobs": 2},
        {"temperature": 1.0, "presence_penalty": 0.8, "frequency_penalty": 0.5},
        {"temperature": 0.0, "repetition_penalty": 1.7, "logprobs": 0},
        {"temperature": 1.0, "logit_bias": ((5, 3.0), (6, -100.0)), "min_p": 0.02},
        {"temperature": 1.2, "allowed_token_ids": tuple(range(10, 40)), "min_tokens": 6},
        {"temperature": 1.0, "bad_words": tuple((a, b) for a in range(20) for b in (1, 2)), "prompt_logprobs": 1},
    ]
    return [
        (prompt, SamplingParams(max_tokens=12, seed=index, **kinds[index % len(kinds)]))
        for index, prompt in enumerate(prompts(count))
    ]


def same(left: list[Got], right: list[Got]) -> None:
    for a, b in zip(left, right, strict=True):
        assert a.token_ids == b.token_ids
        for these, those in ((a.logprobs, b.logprobs), (a.prompt_logprobs, b.prompt_logprobs)):
            assert [entry.token_ids for entry in these] == [entry.token_ids for entry in those]
            for x, y in zip(these, those, strict=True):
                assert x.logprobs == pytest.approx(y.logprobs, abs=1e-4)


@pytest.fixture(scope="module")
def reference(tiny):
    got, _ = run(tiny[0], mixed(32), one_by_one=True, caching=False)
    return got


def test_alone_is_as_in_a_batch_of_32_mixed(tiny, reference):
    same(run(tiny[0], mixed(32))[0], reference)


def test_overlapped_is_as_step_by_step(tiny, reference):
    same(run(tiny[0], mixed(32), depth=2)[0], reference)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_logits_are_read_before_the_next_step_begins(tiny, reference, depth, monkeypatch):
    """Where steps are captured all leave them in the same memory."""
    rows = logits_in_one_place(tiny[0], monkeypatch)
    same(run(tiny[0], mixed(32), depth=depth)[0], reference)
    assert len(rows) > 8
    assert max(rows) >= 8


def test_in_small_chunks_is_as_whole(tiny, reference):
    same(run(tiny[0], mixed(32), budget=45, depth=2)[0], reference)


def test_preempted_is_as_not(tiny, reference):
    got, stats = run(tiny[0], mixed(32), num_blocks=12, watermark=0.0, depth=2)
    assert stats.num_preemptions > 0
    same(got, reference)


def test_with_a_warm_cache_is_as_cold(tiny, reference):
    got, _ = run(tiny[0], mixed(32) * 2, one_by_one=True)
    same(got, reference * 2)
    for (prompt, params), one in zip(mixed(32), got[32:], strict=True):
        assert one.num_cached_tokens == (0 if params.prompt_logprobs is not None else len(prompt) - 1)


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "seeded"])
def test_n_answers_are_as_n_requests_and_share_the_prompt(tiny, temperature):
    prompt = prompts(1, seed=3)[0] * 3
    jobs = [(prompt, SamplingParams(max_tokens=8, temperature=temperature, seed=seed)) for seed in range(5)]
    cold, _ = run(tiny[0], jobs, one_by_one=True, caching=False)
    together, stats = run(tiny[0], jobs)
    same(together, cold)
    assert (len({tuple(one.token_ids) for one in together}) > 1) == (temperature > 0)
    assert stats.prefix_cache_hits >= 4 * (len(prompt) - 1)


def test_bad_words_never_come_and_their_parts_do(tiny):
    words = tuple((a, b) for a in range(VOCAB) for b in range(0, VOCAB, 2) if (a + b) % 3 == 0)[:400]
    params = SamplingParams(max_tokens=200, temperature=2.0, seed=1, ignore_eos=True, bad_words=words)
    for depth in (1, 2):
        tokens = run(tiny[0], [([7], params)], depth=depth)[0][0].token_ids
        pairs = set(pairwise(tokens))
        assert len(tokens) == 200
        assert not pairs & set(words)
        assert {b for _, b in words} & set(tokens)


@torch.inference_mode()
def test_log_probabilities_are_those_of_transformers(tiny):
    runner, model = tiny
    jobs = [
        (prompt, SamplingParams(max_tokens=20, temperature=1.0, seed=i, logprobs=3, prompt_logprobs=3, ignore_eos=True))
        for i, prompt in enumerate(prompts(6, seed=9))
    ]
    got, _ = run(runner, jobs, budget=64, depth=2)
    for (prompt, _), one in zip(jobs, got, strict=True):
        every = [*prompt, *one.token_ids]
        expected = model(torch.tensor([every])).logits[0].double().log_softmax(-1)
        entries = [*one.prompt_logprobs, *one.logprobs]
        assert len(entries) == len(every) - 1
        for position, entry in enumerate(entries):
            assert entry.token_ids[0] == every[position + 1]
            own = float(expected[position, every[position + 1]])
            best = expected[position].topk(3).values.tolist()
            assert entry.logprobs == pytest.approx([own, *best], abs=1e-3)


@torch.inference_mode()
@pytest.mark.parametrize("pooling", list(Pooling))
def test_embeddings_are_the_pooled_hidden_states(tiny, pooling):
    import numpy as np

    runner, model = tiny
    jobs = [(prompt, SamplingParams(max_tokens=1, temperature=0.0, pooling=pooling)) for prompt in prompts(12, seed=2)]
    got, _ = run(runner, jobs * 2, budget=40, one_by_one=False)
    for (prompt, _), one in zip(jobs * 2, got, strict=True):
        hidden = model.model(torch.tensor([prompt])).last_hidden_state[0]
        expected = {Pooling.MEAN: hidden.mean(0), Pooling.LAST: hidden[-1], Pooling.CLS: hidden[0]}[pooling]
        assert one.embedding is not None
        assert np.frombuffer(one.embedding, np.float32) == pytest.approx(expected.numpy(), abs=1e-3)
