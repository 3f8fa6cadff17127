"""Uploads: where the parts of one copy lie; on a card, that what arrives is what was sent, however many follow."""

from __future__ import annotations

from typing import cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mainsail_engine.runner.model_runner import PendingTokens
from mainsail_engine.runner.uploads import ALIGNMENT, FIRST_BUFFERS, Downloads, Uploads, offsets_of


@given(st.lists(st.integers(0, 5000), max_size=12))
def test_parts_are_aligned_and_do_not_overlap(sizes: list[int]) -> None:
    offsets, total = offsets_of(sizes)
    ends = [offset + size for offset, size in zip(offsets, sizes, strict=True)]
    assert all(offset % ALIGNMENT == 0 for offset in offsets)
    assert all(end <= following for end, following in zip(ends, [*offsets, total][1:], strict=True))
    assert total < sum(sizes) + ALIGNMENT * (len(sizes) + 1)


def test_on_the_cpu_the_arrays_are_the_tensors() -> None:
    array = np.arange(6, dtype=np.int32).reshape(2, 3)
    (tensor,) = Uploads(torch.device("cpu")).send([array])
    array[1, 2] = 77
    assert tensor.tolist() == [[0, 1, 2], [3, 4, 77]]


@pytest.mark.gpu
def test_every_upload_arrives_and_every_download_returns() -> None:
    device = torch.device("cuda")
    uploads, downloads = Uploads(device, num_bytes=256), Downloads(1000)
    random = np.random.default_rng(0)
    sent = [
        [random.integers(0, 99, (n, 3)), random.integers(0, 99, n, dtype=np.int32), random.random(n, np.float32)]
        for n in (1, 5, 200, 3, 1000)
    ]
    received = [uploads.send(arrays) for arrays in sent]
    for arrays, tensors in zip(sent, received, strict=True):
        for array, tensor in zip(arrays, tensors, strict=True):
            assert tensor.cpu().tolist() == array.tolist()
    back = [downloads.receive(torch.full((7,), i, device=device)) for i in range(3)]
    for i, (tokens, done) in enumerate(back):
        done.synchronize()
        assert tokens.tolist() == [i] * 7


@pytest.mark.gpu
def test_nothing_waits_for_the_steps_before() -> None:
    """However much a step sends: the copies queue up behind a busy device, and the host goes on."""
    uploads = Uploads(torch.device("cuda"))
    uploads.send([np.zeros(4, np.float32)])
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)
    busy = torch.cuda.Event()
    busy.record()
    sent = [uploads.send([np.full(300, i, np.int64)])[0] for i in range(FIRST_BUFFERS)]
    assert not busy.query()
    assert [int(tensor[-1]) for tensor in sent] == list(range(FIRST_BUFFERS))
    assert len(uploads._stagings) == FIRST_BUFFERS


class _Event:
    """Of a step that is over, or not yet."""

    def __init__(self, *, is_over: bool) -> None:
        self.is_over = is_over

    def query(self) -> bool:
        return self.is_over

    def synchronize(self) -> None:
        self.is_over = True


@pytest.mark.parametrize("is_over", [True, False])
def test_a_result_tells_whether_its_step_was_over_before_anybody_asked(is_over):
    event = cast("torch.cuda.Event", _Event(is_over=is_over))
    result = PendingTokens(torch.tensor([5, 6]), event).result()
    assert result.token_ids == [5, 6]
    assert result.ended_unseen == is_over
    assert event.query()
    assert not PendingTokens(torch.tensor([5]), None).result().ended_unseen, "on the CPU a launch is the step"
