from __future__ import annotations

import resource

import torch

from mainsail_engine.pages import untouched_zeros


def test_memory_is_zero_and_taken_as_it_is_touched() -> None:
    size, before = 1 << 30, resident()
    zeros = untouched_zeros(size)
    assert resident() - before < size // 16, "all of it was taken at once"
    assert zeros.shape == (size,)
    assert not zeros[:: 1 << 26].any()
    numbers = zeros.view(torch.bfloat16)
    numbers[12345] = 2.0
    assert zeros.view(torch.bfloat16)[12344:12347].tolist() == [0.0, 2.0, 0.0]


def test_nothing_is_no_memory() -> None:
    assert untouched_zeros(0).shape == (0,)


def resident() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()
