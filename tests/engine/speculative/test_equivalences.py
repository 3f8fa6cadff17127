"""Guesses, right and wrong, change no token and no log-probability, whatever the parameters and however work is cut."""

from __future__ import annotations

import pytest
import torch
from benchmarks.speculation import Replay, always
from tests.engine.test_sampling_equivalences import VOCAB, mixed, prompts, reference, run, same, tiny

from mainsail_engine.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig, SpeculativeConfig
from mainsail_engine.request import Request, SamplingParams
from mainsail_engine.runner import model_runner
from mainsail_engine.runner.model_runner import ModelRunner
from mainsail_engine.speculative.ngram import NgramSource
from mainsail_engine.speculative.speculator import Speculator
from mainsail_engine.step import Chunk, StepPlan
from mainsail_kernels.cpu import decoder

__all__ = ["reference", "tiny"]
"""Fixtures."""


def replay(reference, right: float, copies: int = 1) -> Speculator:
    answers = {str(index): one.token_ids for index, one in enumerate(list(reference) * copies)}
    return always(Replay(answers, right=right, vocab_size=VOCAB))


@pytest.fixture(params=["spread", "chunks"])
def path(request, monkeypatch):
    """Rows that verify are computed as decodes, or as chunks."""
    monkeypatch.setattr(model_runner, "SPREAD_HEADS", {"cpu": 1 << 30 if request.param == "spread" else 0})


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("right", [1.0, 0.6, 0.0])
@pytest.mark.parametrize(
    "limits", [{}, {"depth": 2}, {"budget": 45, "depth": 2}, {"num_blocks": 12, "watermark": 0.0, "depth": 2}]
)
def test_replayed_guesses_change_nothing(tiny, reference, right, limits):
    got, stats = run(tiny[0], mixed(32), speculator=replay(reference, right), **limits)
    same(got, reference)
    assert stats.num_draft_tokens > 100
    assert (stats.num_accepted_tokens > 100) == (right > 0)
    assert (stats.num_preemptions > 0) == ("watermark" in limits)


def test_nothing_that_was_rejected_is_in_the_prefix_cache(tiny, reference):
    got, _ = run(tiny[0], mixed(32) * 2, one_by_one=True, speculator=replay(reference, 0.5, copies=2))
    same(got, list(reference) * 2)


def test_right_guesses_save_steps_and_are_counted_by_position(tiny, reference):
    speculator = replay(reference, 1.0)
    _, stats = run(tiny[0], mixed(32), speculator=speculator)
    counts = speculator.counts
    assert stats.num_accepted_tokens == counts.num_draft_tokens == sum(counts.accepted_per_position)
    assert counts.accepted_per_position == sorted(counts.accepted_per_position, reverse=True)
    assert counts.num_drafts <= 2 * 32


def test_guesses_past_the_end_of_an_answer_are_of_no_consequence(tiny):
    """A stop token among the guesses, min_tokens before it, max_tokens behind."""
    prompt = prompts(1, seed=5)[0]
    params = SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True)
    (long,), _ = run(tiny[0], [(prompt, params)])
    stop = long.token_ids[7]
    first = long.token_ids.index(stop)
    for stops, most, length in (((stop,), 30, first + 1), ((), 5, 5), ((), 1, 1)):
        params = SamplingParams(max_tokens=most, temperature=0.0, ignore_eos=True, stop_token_ids=stops)
        (got,), _ = run(tiny[0], [(prompt, params)], speculator=replay([long], 1.0))
        assert got.token_ids == long.token_ids[:length]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_the_cpu_rows_that_verify_have_the_bits_of_decodes(smollm2, dtype):
    """Where compiled kernels compute: so greedy tokens are the same even where two are all but equally likely."""
    if decoder.pack(torch.zeros(64, 64, dtype=getattr(torch, dtype))) is None:
        pytest.skip(f"this CPU has no compiled kernels for {dtype}")
    config = EngineConfig(
        model=ModelConfig(path=str(smollm2), max_model_len=256, dtype=dtype), cache=CacheConfig(num_blocks=32),
        scheduler=SchedulerConfig(max_num_seqs=2), speculative=SpeculativeConfig(method="ngram"), device="cpu",
    )  # fmt: skip
    runner, logits = ModelRunner(config), list[torch.Tensor]()
    plain = runner._model.logits
    runner._model.logits = lambda hidden: (logits.append(plain(hidden)), logits[-1])[1]  # type: ignore[method-assign]
    requests = [
        Request(str(slot), list(range(100, 140)), SamplingParams(max_tokens=99, temperature=0.0), 0.0, slot=slot,
                block_ids=list(range(8 * slot, 8 * slot + 8)))
        for slot in range(2)
    ]  # fmt: skip
    one, other = requests

    def step(request, guesses=()):
        start = request.num_tokens - 1 if request.output_token_ids else 0
        chunk = Chunk(request, start, request.num_tokens - start + len(guesses), True, request.slot, request.block_ids,
                      guesses)  # fmt: skip
        single = chunk.num_tokens == 1
        plan = StepPlan(chunks=[chunk], num_decodes=int(single), num_verifying=int(bool(guesses)))
        return runner.launch(plan).result().token_ids

    for request in requests:
        request.output_token_ids += step(request)
    logits.clear()
    for _ in range(17):
        one.output_token_ids += step(one)
    alone = torch.cat(logits)
    logits.clear()
    assert step(other, one.output_token_ids[1:17]) == one.output_token_ids[1:]
    assert torch.equal(logits[0], alone)


def chi_square_limit(freedom: int, deviations: float = 4.0) -> float:
    """Wilson and Hilferty's approximation: beyond it in one of 30,000 samples (4 deviations)."""
    return freedom * (1 - 2 / (9 * freedom) + deviations * (2 / (9 * freedom)) ** 0.5) ** 3


class One:
    """See speculator.Source: one token, for everybody and always."""

    level_s = last_s = 0.0

    def __init__(self, token: int) -> None:
        self._token = token

    def saw(self, request, tokens) -> None: ...

    def settle(self) -> None: ...

    def has_guesses(self, request, count) -> bool:
        return True

    def chances(self, request, most) -> list[float]:
        return [0.5] * min(most, 1)

    def guess(self, wanted):
        return [[self._token] for _ in wanted]

    def verified(self, request, num_guesses, num_right) -> None: ...

    def forget(self, request) -> None: ...


@torch.inference_mode()
def test_sampled_tokens_have_the_models_distribution(tiny):
    """3,000 third tokens, each verified against the same guess: their counts, by the model's own probabilities."""
    runner, model = tiny
    prompt, draws = [5, 6, 7], 3000

    def probabilities(tokens):
        return (model(torch.tensor(tokens)).logits[:, -1].double() / 0.7).softmax(-1)

    second = probabilities([prompt])[0]  # the prefill's token; the next one is verified
    third = second @ probabilities([[*prompt, token] for token in range(VOCAB)])
    guess = int(third.argmax())
    params = [SamplingParams(max_tokens=3, temperature=0.7, seed=seed, ignore_eos=True) for seed in range(draws)]
    got, stats = run(runner, [(prompt, each) for each in params], speculator=always(One(guess)))
    assert stats.num_drafts == draws
    assert stats.num_accepted_tokens == sum(one.token_ids[1] == guess for one in got) > 0.05 * draws
    seen = torch.bincount(torch.tensor([one.token_ids[1] for one in got]), minlength=VOCAB).double()
    many = third * draws >= 5
    cells = torch.cat((seen[many], seen[~many].sum()[None]))
    means = torch.cat((third[many], third[~many].sum()[None])) * draws
    assert float(((cells - means) ** 2 / means).sum()) < chi_square_limit(len(cells) - 1)


def test_guesses_from_the_text_change_nothing(tiny):
    jobs = [
        (prompt * 4, SamplingParams(max_tokens=40, temperature=0.6, seed=i, ignore_eos=True, top_k=3))
        for i, prompt in enumerate(prompts(12, seed=4))
    ]
    expected, _ = run(tiny[0], jobs, caching=False)
    config = SpeculativeConfig(method="ngram", prompt_lookup_min=1, num_speculative_tokens=5, adaptive=False)
    got, stats = run(tiny[0], jobs, depth=2, speculator=Speculator(config, NgramSource(*config.ngram_sizes)))
    same(got, expected)
    assert stats.num_draft_tokens > stats.num_accepted_tokens > 0
