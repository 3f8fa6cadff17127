"""Tokens that stay on the device: taken as inputs and noted as outputs, against the references."""

import pytest
import torch

from mainsail_kernels import reference
from mainsail_kernels.tokens import note, resolve, send, unpack


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


@pytest.mark.parametrize(
    ("decodes", "chunks", "width", "room"), [(3, 0, 5, 8), (3, 2, 700, 8), (0, 4, 9, 8), (8, 1, 1, 8)]
)
def test_a_steps_inputs_go_where_they_belong(decodes, chunks, width, room, device):
    """Rows of decodes first, then those of chunks behind the room for decodes; nothing else is touched."""
    numbers = 1100
    source = torch.randint(1, 1000, (numbers + (decodes + chunks) * width,), dtype=torch.int32)
    source = source.pin_memory() if device.type == "cuda" else source
    packed = torch.zeros(numbers + 50, dtype=torch.int32, device=device)
    tables = torch.zeros((room + 5, width + 3), dtype=torch.int32, device=device)
    unpack(source, packed[:numbers], tables, width=width, decodes=decodes, gap=room - decodes)
    assert packed.tolist() == source[:numbers].tolist() + [0] * 50
    rows = source[numbers:].view(-1, width).tolist()
    expected = torch.zeros_like(tables).tolist()
    for index, row in enumerate(rows):
        expected[index if index < decodes else index + room - decodes][:width] = row
    assert tables.tolist() == expected


@pytest.mark.parametrize("count", [0, 1, 300])
def test_tokens_are_sent_to_the_host(count, device):
    tokens = torch.randint(-2, 1 << 40, (count,)).to(device)
    on_host = torch.zeros(count, dtype=torch.int64, pin_memory=device.type == "cuda")
    send(tokens, on_host)
    if device.type == "cuda":
        torch.cuda.synchronize()
    assert on_host.tolist() == tokens.tolist()


def test_inputs_that_do_not_fit_are_refused(device):
    numbers, tables = torch.zeros(20, dtype=torch.int32), torch.zeros((2, 4), dtype=torch.int32, device=device)
    packed = torch.zeros(10, dtype=torch.int32, device=device)
    for width, gap in ((3, 0), (5, 0), (2, 0)):
        with pytest.raises(ValueError, match="unpack"):
            unpack(numbers, packed, tables, width=width, decodes=1, gap=gap)


def test_shapes_that_differ_are_refused(device):
    four, three = torch.zeros(4, dtype=torch.int64, device=device), torch.zeros(3, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match="from_slots"):
        resolve(four, three, four)
    with pytest.raises(ValueError, match="note"):
        note(four, three, four)


@pytest.mark.parametrize("offset", [0, 1, 2])
def test_what_was_launched_before_is_launched_again_wherever_tensors_begin(offset, device):
    """A compiled variant may count on its tensors' alignment: others must not be launched through it."""
    tokens = torch.randint(0, 1 << 40, (40,)).to(device)
    for count in (30, 7, 30):
        on_host = torch.zeros(40, dtype=torch.int64, pin_memory=device.type == "cuda")
        send(tokens[offset:][:count], on_host[2 * offset :][:count])
        if device.type == "cuda":
            torch.cuda.synchronize()
        assert on_host[2 * offset :][:count].tolist() == tokens[offset:][:count].tolist()
        assert on_host.count_nonzero() <= count
