"""The sampler's distribution is the exact one, and a seeded row does not depend on its batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mainsail_engine.request import Request, SamplingParams
from mainsail_engine.sampling.sampler import SlotParameters, sample
from mainsail_engine.step import FAILED_TOKEN

VOCAB, DRAWS = 50, 20_000
CHI_SQUARE_999 = {9: 27.9, 19: 43.8, 49: 85.4}
"""99.9 % quantiles by degrees of freedom."""


def rows_of(params: list[SamplingParams], positions: list[int]):
    slots = SlotParameters(len(params))
    for slot, each in enumerate(params):
        slots.fill(slot, Request(str(slot), [1], each, 0.0, slot=slot))
    return slots.rows(np.arange(len(params)), np.array(positions), lambda arrays: [torch.from_numpy(a) for a in arrays])


def logits_of(vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn(vocab, generator=torch.Generator().manual_seed(3)) * 1.5


def exact(logits: torch.Tensor, temperature: float, keep: torch.Tensor) -> torch.Tensor:
    """Probabilities after the temperature, over the kept tokens only."""
    heated = torch.softmax(logits.double() / temperature, dim=-1)
    return torch.where(keep, heated, 0.0) / heated[keep].sum()


def nucleus(logits: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """The smallest set of best tokens whose probability reaches top_p."""
    p, order = torch.softmax(logits.double() / temperature, dim=-1).sort(descending=True)
    count = int((p.cumsum(0) < top_p).sum()) + 1
    keep = torch.zeros(len(logits), dtype=torch.bool)
    keep[order[:count]] = True
    return keep


def kept(name: str, logits: torch.Tensor) -> torch.Tensor:
    p = torch.softmax(logits.double() / 0.8, dim=-1)
    return {
        "temperature": torch.ones(VOCAB, dtype=torch.bool),
        "top_k": logits >= logits.sort(descending=True).values[9],
        "top_p": nucleus(logits, 0.8, 0.7),
        "min_p": p >= 0.05 * p.max(),
    }[name]


@pytest.mark.parametrize(
    ("name", "settings"),
    [("temperature", {}), ("top_k", {"top_k": 10}), ("top_p", {"top_p": 0.7}), ("min_p", {"min_p": 0.05})],
)
def test_the_distribution_is_the_exact_one(name: str, settings: dict[str, float]) -> None:
    logits = logits_of()
    params = SamplingParams(max_tokens=1, temperature=0.8, seed=11, **settings)
    drawn = sample(logits.expand(DRAWS, VOCAB), rows_of([params] * DRAWS, list(range(DRAWS))))
    counts = torch.bincount(drawn, minlength=VOCAB).double()
    expected = exact(logits, 0.8, kept(name, logits)) * DRAWS
    assert counts[expected == 0].sum() == 0
    likely = expected >= 5
    statistic = float(((counts - expected)[likely] ** 2 / expected[likely]).sum())
    freedom = int(likely.sum()) - 1
    bound = next(value for degrees, value in sorted(CHI_SQUARE_999.items()) if degrees >= freedom)
    assert statistic < bound


def test_a_seeded_row_does_not_depend_on_its_batch() -> None:
    logits = torch.randn(32, VOCAB, generator=torch.Generator().manual_seed(5))
    params = [SamplingParams(max_tokens=1, temperature=1.0, top_p=0.9, seed=i % 7) for i in range(32)]
    positions = [100 + i for i in range(32)]
    together = sample(logits, rows_of(params, positions)).tolist()
    alone = [int(sample(logits[i : i + 1], rows_of([params[i]], [positions[i]]))) for i in range(32)]
    assert together == alone
    assert together != sample(logits, rows_of(params, [p + 1 for p in positions])).tolist()


def test_greedy_rows_among_sampled_ones_take_the_best_token() -> None:
    logits = torch.randn(8, VOCAB, generator=torch.Generator().manual_seed(6))
    params = [SamplingParams(max_tokens=1, temperature=float(i % 2), seed=1) for i in range(8)]
    assert sample(logits, rows_of(params, [5] * 8))[::2].tolist() == logits.argmax(dim=-1)[::2].tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_broken_row_fails_alone(temperature: float, value: float) -> None:
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(7))
    logits[1] = value
    drawn = sample(logits, rows_of([SamplingParams(max_tokens=1, temperature=temperature, seed=2)] * 3, [1, 2, 3]))
    assert drawn[1] == FAILED_TOKEN
    assert drawn[0] >= 0
    assert drawn[2] >= 0
