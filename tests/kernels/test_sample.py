"""Sampling: the kept set, the drawn token and the random numbers against float64 and against what they mean."""

import math

import pytest
import torch

from mainsail_kernels import reference
from mainsail_kernels.sample import argmax, sample


def _draw(logits, device, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, step=None):
    """Sample every row of logits with the same settings, at steps 0, 1, … unless given."""
    n = logits.shape[0]
    steps = torch.arange(n) if step is None else torch.full((n,), step)
    floats = [torch.full((n,), float(v)).to(device) for v in (temperature, top_p, min_p)]
    ks = torch.full((n,), top_k, dtype=torch.int32).to(device)
    seeds = torch.full((n,), seed).to(device)
    return sample(logits.to(device), floats[0], ks, floats[1], floats[2], seeds, steps.to(device)).cpu()


def test_random_numbers_are_philox():
    # The published vector of Philox 4x32-10 for a zero counter and key begins with 0x6627e8d5.
    zero = torch.zeros(1, dtype=torch.int64)
    assert reference.uniform(zero, zero).item() == (0x6627E8D5 >> 8) / 2**24


def test_argmax_takes_the_lowest_of_equals_and_reports_broken_rows(device):
    logits = torch.randn(5, 9000)
    logits[0, [8000, 100, 5000]] = 9.0
    logits[1, 8999] = math.nan
    logits[2] = -math.inf
    logits[3, 5] = math.inf
    logits[4, :8998] = -math.inf
    expected = [100, -1, -1, -1, 8998 + int(logits[4, 8998:].argmax())]
    assert argmax(logits.to(device)).tolist() == expected
    assert _draw(logits, device, temperature=0.0).tolist() == expected
    assert _draw(logits, device, top_k=1).tolist()[1:] == expected[1:]


SETTINGS = [
    {},
    {"temperature": 0.6},
    {"top_k": 5},
    {"top_p": 0.7},
    {"min_p": 0.1},
    {"top_k": 40, "top_p": 0.9, "min_p": 0.02, "temperature": 1.3},
    {"top_p": 0.99, "temperature": 2.0},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("vocab", [50, 9000])
def test_the_drawn_token_inverts_the_distribution(settings, vocab, device):
    logits = (torch.randn(2, vocab) * 2).to(torch.bfloat16).float()  # rounded: with ties
    drawn = _draw(logits, device, seed=7, **settings)
    n = len(drawn)
    numbers = reference.uniform(torch.full((n,), 7), torch.arange(n)).double()
    vectors = [torch.full((n,), float(settings.get(k, d))) for k, d in
               (("temperature", 1.0), ("top_k", 0), ("top_p", 1.0), ("min_p", 0.0))]  # fmt: skip
    kept = reference.kept_tokens(logits.double(), vectors[0], vectors[1].int(), vectors[2], vectors[3])
    weights = torch.softmax(logits.double() / vectors[0][:, None], -1) * kept
    running = (weights / weights.sum(-1, keepdim=True)).cumsum(-1)
    for row, token in enumerate(drawn.tolist()):
        assert kept[row, token]
        after, before = running[row, token], running[row, token - 1] if token else 0.0
        assert before - 1e-5 <= numbers[row] <= after + 1e-5


def test_a_row_draws_the_same_token_in_any_batch(device):
    logits = torch.randn(4, 5000)
    whole = _draw(logits, device, top_p=0.9, seed=3, step=11)
    for row in range(4):
        assert _draw(logits[row : row + 1], device, top_p=0.9, seed=3, step=11).tolist() == [whole[row]]


def test_frequencies_follow_the_probabilities(device):
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05])).expand(200, 4).contiguous()
    counts = torch.bincount(_draw(logits, device, seed=5), minlength=4) / 200
    assert (counts - torch.tensor([0.5, 0.3, 0.15, 0.05])).abs().max() < 0.12
    kept = _draw(logits, device, seed=5, top_p=0.75)
    assert set(kept.tolist()) == {0, 1}


def test_wrong_shapes_are_refused(device):
    one = torch.ones(1, device=device)
    with pytest.raises(ValueError, match="top_p must be"):
        sample(torch.ones(1, 8, device=device), one, one.int(), one.repeat(2), one, one.long(), one.long())
