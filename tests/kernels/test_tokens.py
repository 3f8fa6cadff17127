"""Tokens that stay on the device: taken as inputs and noted as outputs, against the references."""

import pytest
import torch

from mainsail_kernels import reference
from mainsail_kernels.tokens import note, resolve


@pytest.mark.parametrize("count", [1, 7, 300])
@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_resolve_takes_the_newest_where_a_slot_is_named(count, kind, device):
    newest = torch.randint(0, 1000, (40,)).to(device)
    tokens = torch.randint(0, 1000, (count,)).to(device, kind)
    slots = torch.randint(-1, 40, (count,)).to(device, kind)
    out = resolve(tokens, slots, newest)
    assert out.dtype == torch.int64
    assert out.tolist() == reference.resolve(tokens, slots, newest).tolist()
    assert out.tolist() == [int(newest[s]) if s >= 0 else int(t) for t, s in zip(tokens, slots, strict=True)]


@pytest.mark.parametrize("count", [1, 7, 300])
def test_note_writes_named_slots_only_and_never_a_code(count, device):
    newest = torch.full((400,), 5).to(device)
    slots = torch.randperm(400)[:count].to(device, torch.int32)
    tokens = torch.randint(-2, 1000, (count,)).to(device)
    note(newest, slots, tokens)
    expected = [5] * 400
    for slot, token in zip(slots.tolist(), tokens.tolist(), strict=True):
        expected[slot] = max(token, 0)
    assert newest.tolist() == expected


def test_shapes_that_differ_are_refused(device):
    four, three = torch.zeros(4, dtype=torch.int64, device=device), torch.zeros(3, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match="from_slots"):
        resolve(four, three, four)
    with pytest.raises(ValueError, match="note"):
        note(four, three, four)
