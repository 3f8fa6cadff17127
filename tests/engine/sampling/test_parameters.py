"""What each sampling parameter does to the distribution, against the definition written out in float64."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch

from mainsail_engine.request import Request, SamplingParams
from mainsail_engine.runner.uploads import Uploads
from mainsail_engine.sampling.logprobs import PIECE, logprob_rows, prompt_logprob_rows
from mainsail_engine.sampling.sampler import Sampler, greedy
from mainsail_engine.step import FAILED_TOKEN, FORBIDDEN_TOKEN

VOCAB, EOS = 40, 3
CPU = torch.device("cpu")
CHI_SQUARE_999 = 72.1
"""99.9 % quantile for 39 degrees of freedom."""
PROMPT, OUTPUT = [5, 6, 7, 5], [6, 8, 8, 8]


def base_logits() -> torch.Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(5)) * 1.2


def request(slot: int = 0, output: list[int] | None = None, **params) -> Request:
    settings = {"max_tokens": 64, "temperature": 1.0, "seed": slot} | params
    made = Request(str(slot), list(PROMPT), SamplingParams(**settings), 0.0, slot=slot)
    made.output_token_ids = list(OUTPUT if output is None else output)
    return made


def sampler(num_slots: int) -> Sampler:
    return Sampler(num_slots, VOCAB, frozenset({EOS}), CPU, Uploads(CPU).send)


def draw(params: dict, draws: int, slots: int = 500) -> np.ndarray:
    """How often each token comes next after PROMPT and OUTPUT."""
    made, counts = sampler(slots), np.zeros(VOCAB, np.int64)
    every = np.arange(slots)
    for turn in range(draws // slots):
        for slot in range(slots):
            settings: dict[str, Any] = {"seed": slot + turn * slots} | params
            made.move_in(slot, request(slot, **settings))
        position = np.full(slots, len(PROMPT) + len(OUTPUT))
        tokens = made.sample(base_logits().repeat(slots, 1), every, position).tokens
        counts += np.bincount(tokens.numpy(), minlength=VOCAB)
    return counts


def exact(params: dict) -> torch.Tensor:
    """The definition: bias, then repetition, frequency and presence penalties, then the temperature."""
    x = base_logits().double()
    if "allowed_token_ids" in params:
        keep = torch.full((VOCAB,), -math.inf, dtype=torch.float64)
        keep[list(params["allowed_token_ids"])] = 0
        x += keep
    for token, value in params.get("logit_bias", ()):
        x[token] += value
    for word in params.get("bad_words", ()):
        if OUTPUT[len(OUTPUT) - len(word) + 1 :] == list(word[:-1]):
            x[word[-1]] = -math.inf
    if len(OUTPUT) < params.get("min_tokens", 0):
        x[[EOS, *params.get("stop_token_ids", ())]] = -math.inf
    for token in set(PROMPT + OUTPUT):
        factor = params.get("repetition_penalty", 1.0)
        x[token] = x[token] / factor if x[token] > 0 else x[token] * factor
    for token in set(OUTPUT):
        x[token] -= params.get("frequency_penalty", 0.0) * OUTPUT.count(token) + params.get("presence_penalty", 0.0)
    return torch.softmax(x / params.get("temperature", 1.0), dim=-1)


CASES = [
    {"presence_penalty": 1.5},
    {"frequency_penalty": -0.7},
    {"repetition_penalty": 1.8},
    {"presence_penalty": 0.5, "frequency_penalty": 0.4, "repetition_penalty": 0.7, "temperature": 0.8},
    {"logit_bias": ((2, 2.0), (9, -1.5), (30, 100.0))},
    {"logit_bias": ((2, 2.0), (9, -1.5))},
    {"allowed_token_ids": (1, 8, 9, 20)},
    {"allowed_token_ids": (1, 8, 9, 20), "logit_bias": ((8, 1.0),), "frequency_penalty": 0.5},
    {"bad_words": ((8, 8, 12), (8, 9), (7, 11), (13,))},
    {"min_tokens": 5, "stop_token_ids": (10,)},
    {"min_tokens": 4, "stop_token_ids": (10,)},
]


@pytest.mark.parametrize("params", CASES, ids=[",".join(case) for case in CASES])
def test_the_distribution_is_the_exact_one(params: dict) -> None:
    draws = 10_000
    counts, expected = draw(params, draws), exact(params).numpy() * draws
    impossible = expected < 1e-9
    assert counts[impossible].sum() == 0
    possible = ~impossible
    assert ((counts[possible] - expected[possible]) ** 2 / expected[possible]).sum() < CHI_SQUARE_999


def test_penalties_in_pieces_are_as_one_row() -> None:
    made, rows = sampler(150), np.arange(150)
    rng = random.Random(1)
    outputs = [[rng.randrange(VOCAB) for _ in range(rng.randrange(12))] for _ in rows]
    for slot in range(150):
        made.move_in(slot, request(slot, outputs[slot], temperature=0.0, frequency_penalty=1.0, presence_penalty=0.3))
    logits = torch.randn(150, VOCAB, generator=torch.Generator().manual_seed(1))
    tokens = made.sample(logits, rows, np.full(150, 9)).tokens.tolist()
    for slot in rows:
        times = torch.bincount(torch.tensor(outputs[slot], dtype=torch.int64), minlength=VOCAB)
        alone = logits[slot] - times - 0.3 * (times > 0)
        assert int(alone.argmax()) == tokens[slot]


def test_the_newest_token_counts_before_the_cpu_knows_it() -> None:
    """The best token is penalized by more than its lead each time it is drawn; nothing tells the sampler about it."""
    made, logits = sampler(2), torch.zeros(1, VOCAB)
    logits[0, :4] = torch.tensor([4.0, 3.0, 2.0, 1.0])
    made.move_in(1, request(1, [], temperature=0.0, presence_penalty=2.0, frequency_penalty=2.0))
    slots = np.array([1])
    drawn = [int(made.sample(logits, slots, np.array([8 + i])).tokens) for i in range(4)]
    assert drawn == [0, 1, 2, 3]


def test_a_bad_word_that_only_the_device_knows_the_beginning_of() -> None:
    made, logits = sampler(2), torch.zeros(1, VOCAB)
    logits[0, [10, 11, 12]] = torch.tensor([3.0, 2.0, 1.0])
    made.move_in(0, request(0, [], temperature=0.0, bad_words=((10, 10), (11, 10, 11))))
    drawn = [int(made.sample(logits, np.array([0]), np.array([4 + i])).tokens) for i in range(6)]
    assert drawn == [10, 11, 10, 12, 10, 11]


def test_a_broken_row_fails_alone_and_is_told_from_a_forbidden_one() -> None:
    made, logits = sampler(4), base_logits().repeat(4, 1)
    logits[1, 5] = math.nan
    made.move_in(0, request(0, logit_bias=((2, 1.0),)))
    made.move_in(1, request(1, allowed_token_ids=(7,)))
    made.move_in(2, request(2, allowed_token_ids=(7,), bad_words=((8, 7),)))
    made.move_in(3, request(3))
    tokens = made.sample(logits, np.arange(4), np.full(4, 8)).tokens.tolist()
    assert tokens[1:3] == [FAILED_TOKEN, FORBIDDEN_TOKEN]
    assert tokens[0] >= 0
    assert tokens[3] >= 0


def test_a_slot_forgets_its_last_tenant() -> None:
    made = sampler(1)
    made.move_in(0, request(0, temperature=0.0, logit_bias=((2, 100.0),), presence_penalty=2.0))
    assert int(made.sample(base_logits()[None], np.array([0]), np.array([8])).tokens) == 2
    made.move_in(0, request(0, temperature=0.0))
    assert made.wants_best(np.array([0]))
    made.move_in(0, request(0, temperature=0.0, bad_words=((1, 2),)))
    assert int(made.sample(base_logits()[None], np.array([0]), np.array([8])).tokens) == int(base_logits().argmax())


@pytest.mark.parametrize("num_best", [0, 1, 5])
def test_log_probabilities(num_best: int) -> None:
    rows = PIECE + 30
    hidden = torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(2))
    tokens = torch.randint(VOCAB, (rows,), generator=torch.Generator().manual_seed(3))
    for got in (logprob_rows(hidden, tokens, num_best), prompt_logprob_rows(hidden, lambda h: h, tokens, num_best)):
        expected = hidden.double().log_softmax(-1)
        for row, entry in enumerate(got.read([num_best] * rows)):
            own = expected[row, tokens[row]]
            best = expected[row].topk(num_best)
            assert entry.token_ids == [int(tokens[row]), *best.indices.tolist()]
            assert entry.logprobs == pytest.approx([float(own), *best.values.tolist()], abs=1e-5)
            assert entry.rank == int((expected[row] > own).sum()) + 1


def test_log_probabilities_are_the_models_own_and_for_who_asked() -> None:
    made, logits = sampler(3), base_logits().repeat(3, 1)
    made.move_in(0, request(0, logprobs=2, temperature=0.0, logit_bias=((2, 100.0),)))
    made.move_in(1, request(1))
    made.move_in(2, request(2, logprobs=0, temperature=0.5))
    sampled = made.sample(logits, np.arange(3), np.full(3, 8))
    expected = base_logits().double().log_softmax(-1)
    assert sampled.logprobs is not None
    assert sampled.logprob_rows is not None
    assert sampled.num_logprobs is not None
    assert sampled.logprob_rows.tolist() == [0, 2]
    first, second = sampled.logprobs.read(sampled.num_logprobs.tolist())
    assert first.token_ids == [2, *expected.topk(2).indices.tolist()]
    assert first.logprobs[0] == pytest.approx(float(expected[2]), abs=1e-5)
    assert second.token_ids == [int(sampled.tokens[2])]


def test_what_several_parameters_add_to_one_token_adds_up() -> None:
    """A bias given twice; a bias on an end that min_tokens forbids, and on a bad word, whichever comes last."""
    made, logits = sampler(3), base_logits().repeat(3, 1)
    made.move_in(0, request(0, temperature=0.0, logit_bias=((2, 3.0), (9, 7.5), (2, 5.0))))
    made.move_in(1, request(1, temperature=0.0, logit_bias=((EOS, 90.0), (12, 80.0)), min_tokens=5))
    made.move_in(2, request(2, temperature=0.0, logit_bias=((12, 90.0), (9, 80.0)), bad_words=((12,), (12,))))
    tokens = made.sample(logits, np.arange(3), np.full(3, 8)).tokens
    biased = base_logits()
    biased[2] += 8.0
    biased[9] += 7.5
    assert tokens.tolist() == [int(biased.argmax()), 12, 9]


@pytest.mark.parametrize(
    "params", [{"logprobs": 2}, {"logit_bias": ((2, 1.0),)}, {"temperature": 1.0}, {"frequency_penalty": 0.5}], ids=str
)
def test_a_step_that_knows_the_best_tokens_samples_as_one_that_does_not(params: dict) -> None:
    """Among them a row that failed, which only the untouched logits tell where a parameter hides it."""
    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(6)).to(torch.bfloat16)
    logits[2, 5] = math.nan
    settings: dict[str, Any] = {"temperature": 0.0} | params
    drawn: list[list[int]] = []
    for best in (None, greedy(logits)):
        made = sampler(4)
        for slot in range(4):
            made.move_in(slot, request(slot, **settings))
        drawn.append(made.sample(logits.clone(), np.arange(4), np.full(4, 8), best=best).tokens.tolist())
    assert drawn[0] == drawn[1]
    assert drawn[0][2] == FAILED_TOKEN
