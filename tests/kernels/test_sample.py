"""Sampling: the kept set, the drawn token and the random numbers against float64 and against what they mean."""

import math

import pytest
import torch

from mainsail_kernels import reference
from mainsail_kernels._triton import INTERPRETED
from mainsail_kernels.sample import argmax, sample


def _draw(logits, device, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, step=None):
    """Sample every row of logits with the same settings, at steps 0, 1, … unless given."""
    n = logits.shape[0]
    steps = torch.arange(n) if step is None else torch.full((n,), step)
    floats = [torch.full((n,), float(v)).to(device) for v in (temperature, top_p, min_p)]
    ks = torch.full((n,), top_k, dtype=torch.int32).to(device)
    seeds = torch.full((n,), seed).to(device)
    return sample(logits.to(device), floats[0], ks, floats[1], floats[2], seeds, steps.to(device)).cpu()


def test_noise_is_made_of_philox():
    # The published vector of Philox 4x32-10 for a zero counter and key.
    zero = torch.zeros(1, dtype=torch.int64)
    words = torch.tensor([0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8])
    u = ((words >> 9).double() + 0.5) / 2**23
    expected = -(-u.log()).log()
    torch.testing.assert_close(reference.gumbel(zero, zero, 0, zero, 4)[0].double(), expected, rtol=1e-5, atol=1e-5)


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


def _parts(logits, settings, seed):
    """The two draws of a row in float64: log(mass) + noise of the chunks, x / temperature + noise of all tokens."""
    n, vocab = logits.shape
    vectors = [torch.full((n,), float(settings.get(k, d))) for k, d in
               (("temperature", 1.0), ("top_k", 0), ("top_p", 1.0), ("min_p", 0.0))]  # fmt: skip
    kept = reference.kept_tokens(logits.double(), vectors[0], vectors[1].int(), vectors[2], vectors[3])
    x = (logits.double() / vectors[0][:, None]).masked_fill(~kept, -math.inf)
    padded = torch.nn.functional.pad(x, (0, -vocab % reference.SAMPLE_CHUNK), value=-math.inf)
    masses = padded.view(n, -1, reference.SAMPLE_CHUNK).logsumexp(-1)
    seeds, steps, first = torch.full((n,), seed), torch.arange(n), torch.zeros(n, dtype=torch.int64)
    chunk_noise = reference.gumbel(seeds, steps, reference.CHUNKS, first, 4 * -(-masses.shape[1] // 4))
    noise = reference.gumbel(seeds, steps, reference.TOKENS, first, padded.shape[1])
    return masses + chunk_noise[:, : masses.shape[1]], padded + noise


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("vocab", [50, 9001])
def test_the_drawn_token_is_the_noisiest_of_the_noisiest_chunk(settings, vocab, device):
    logits = (torch.randn(4, vocab) * 2).to(torch.bfloat16).float()  # rounded: with ties
    _check(logits, _draw(logits, device, seed=7, **settings), settings, seed=7)


def _check(logits, drawn, settings, seed):
    """Each token is kept, and the noisiest of the chunk that is the noisiest by what it keeps."""
    chunks, tokens = _parts(logits, settings, seed)
    for row, token in enumerate(drawn.tolist()):
        chunk = token // reference.SAMPLE_CHUNK
        assert chunks[row, chunk] >= chunks[row].max() - 1e-4
        own = tokens[row, chunk * reference.SAMPLE_CHUNK :][: reference.SAMPLE_CHUNK]
        assert tokens[row, token] >= own.max() - 1e-4
        assert tokens[row, token] > -math.inf


FLAT = [
    {"top_p": 0.9},
    {"top_p": 0.3, "temperature": 3.0},
    {"top_p": 1e-6, "temperature": 5.0},
    {"top_k": 40, "top_p": 0.8},
    {"top_k": 40, "min_p": 0.8},
    {"top_k": 300, "top_p": 0.3},
    {"top_k": 9000},
    {"min_p": 0.001},
    {"top_p": 0.9, "min_p": 0.0001},
    {"top_p": 0.99, "min_p": 0.3},
    {"top_k": 5000, "top_p": 0.9, "min_p": 0.01},
]


@pytest.mark.parametrize("settings", FLAT, ids=str)
def test_flat_rows_whose_search_ends_before_the_threshold_is_known_draw_as_by_it(settings, device):
    """More groups of logits matter than are held in registers; of some rows half the logits are the same."""
    logits = (torch.randn(3 if INTERPRETED else 60, 20_001) * 1.3).to(torch.bfloat16)
    logits[::3, ::2] = 0.5
    logits[1, :10_000] -= 4.0  # chunks that keep little beside such that keep much
    _check(logits.float(), _draw(logits, device, seed=3, **settings), settings, seed=3)


@pytest.mark.parametrize(
    "settings", [{"top_p": 0.5}, {"top_k": 3}, {"top_p": 0.5, "top_k": 500}, {"min_p": 0.9}], ids=str
)
def test_equal_logits_share_a_fate(settings, device):
    """All the same, and two kinds of them where the better ones alone are enough."""
    logits = torch.full((2, 12_000), -1.5)
    logits[1, 5000:11_000] = 20.0
    drawn = torch.cat([_draw(logits, device, seed=seed, **settings) for seed in range(4 if INTERPRETED else 40)])
    assert len(set(drawn[::2].tolist())) > 2
    assert ((drawn[1::2] >= 5000) & (drawn[1::2] < 11_000)).all()


def test_a_few_heavy_tokens_over_a_long_flat_tail(device):
    """What a sample of the row does not see: the threshold of top-p is among the heavy, or far down in the tail."""
    logits = torch.randn(2 if INTERPRETED else 20, 20_001) * 0.5
    logits[:, 777] = 9.5
    logits[:, 12_345] = 9.0
    for p in (0.2, 0.5, 0.9):
        _check(logits, _draw(logits, device, seed=2, top_p=p), {"top_p": p}, seed=2)


def test_small_changes_of_the_logits_change_few_draws(device):
    """As another order of sums makes them. Inverting the distribution function, a third of the draws would change."""
    rows = 30 if INTERPRETED else 300
    logits = (torch.randn(9001) * 1.5).expand(rows, -1)
    draws = [_draw(logits + 0.01 * torch.randn(9001), device, seed=5) for _ in range(2)]
    assert (draws[0] != draws[1]).sum() <= rows // 20
    assert len(set(draws[0].tolist())) > rows // 2


def test_what_is_kept_is_the_same_whether_or_not_a_few_best_tell():
    """Rows that a few best tokens decide beside rows that need them all, against the definition by a sort."""
    logits = torch.cat((torch.randn(20, 3000), torch.randn(20, 3000) * 6)).to(torch.bfloat16).double()
    n = len(logits)
    k, p = torch.randint(0, 600, (n,)), torch.rand(n).double()
    k[::3], p[1::3] = 0, 1.0
    kept = reference.kept_tokens(logits, torch.ones(n), k, p, torch.zeros(n))
    for row in range(n):
        ordered = logits[row].sort(descending=True).values
        floor = ordered[k[row] - 1] if k[row] else ordered[-1]
        among = logits[row].masked_fill(logits[row] < floor, -math.inf)
        weights = torch.softmax(among, -1)
        if p[row] < 1:
            above = torch.stack([weights[logits[row] > value].sum() for value in ordered[:, None]])
            floor = torch.maximum(floor, ordered[above < p[row]][-1])
        assert kept[row].equal(logits[row] >= floor)


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
