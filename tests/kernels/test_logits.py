"""Penalties and log-probabilities of the best tokens, against what they mean, written out in float64."""

import math

import pytest
import torch

from mainsail_kernels.logits import best_logprobs, penalize
from mainsail_kernels.reference import IN_PROMPT


@pytest.mark.parametrize("apart", [False, True])
def test_penalties_change_seen_tokens_of_their_rows_only(apart, device):
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 9000, generator=random)
    counts = torch.zeros(4, 9000, dtype=torch.int32)
    counts[:, :40] = IN_PROMPT
    counts[1, 20:60] += 3
    counts[2, 8999] = 1
    rows, slots = torch.tensor([5, 0, 2]), torch.tensor([1, 2, 3])
    presence, frequency, repetition = torch.tensor([[0.5, 0.0, 0.3], [0.25, 1.0, 0.0], [1.0, 2.0, 1.5]])
    if apart:  # each value three numbers after the last, as NumPy lays out rows that it picks columns of
        presence, frequency, repetition = torch.stack((presence, frequency, repetition), dim=1).unbind(dim=1)
    out = logits.to(device, copy=True)
    penalize(out, *(x.to(device) for x in (counts, rows, slots, presence, frequency, repetition)))
    truth = logits.double()
    for row, slot, p, f, r in zip(rows, slots, presence, frequency, repetition, strict=True):
        for token in range(9000):
            count = int(counts[slot, token])
            times = count & (IN_PROMPT - 1)
            if count:
                x = truth[row, token]
                truth[row, token] = (x / r if x > 0 else x * r) - f * times - p * (times > 0)
    torch.testing.assert_close(out.cpu().double(), truth, atol=1e-5, rtol=1e-5)
    untouched = [1, 3, 4]
    assert torch.equal(out.cpu()[untouched], logits[untouched])


@pytest.mark.parametrize("vocab", [50, 5000, 12_345])
@pytest.mark.parametrize("num_best", [0, 1, 5, 20, 40])
def test_logprobs_of_the_best(vocab, num_best, device, dtype):
    random = torch.Generator().manual_seed(vocab)
    logits = (3 * torch.randn(7, vocab, generator=random)).to(dtype)
    logits[3, 7 : vocab // 2] = -math.inf
    tokens = torch.randint(0, vocab, (7,), generator=random)
    ids, logprobs, ranks = (x.cpu() for x in best_logprobs(logits.to(device), tokens.to(device), num_best))
    truth = logits.double().log_softmax(-1)
    assert torch.equal(ids[:, 0], tokens)
    assert ids.shape == logprobs.shape == (7, 1 + num_best)
    torch.testing.assert_close(logprobs.double(), truth.gather(1, ids), atol=2e-4, rtol=2e-5)
    assert torch.equal(ranks, (truth > truth.gather(1, tokens[:, None])).sum(-1) + 1)
    best = truth.topk(num_best, dim=-1).values if num_best else truth[:, :0]
    torch.testing.assert_close(logprobs[:, 1:].double(), best, atol=2e-4, rtol=2e-5)
    assert all(len(set(row)) == num_best for row in ids[:, 1:].tolist())
