"""Adapters of many kinds in one batch against float64: every row gets its own adapter's part, the others nothing."""

import numpy as np
import pytest
import torch

from mainsail_kernels import reference
from mainsail_kernels.lora import TILE, add_lora, most_tiles, tiles_of


def tiles(adapters, device):
    rows, slots = tiles_of(np.array(adapters))
    return torch.from_numpy(rows).to(device), torch.from_numpy(slots).to(device)


@pytest.mark.parametrize(("parts", "rank"), [((40,), 16), ((48, 16, 16), 8), ((130, 66), 24)])
@pytest.mark.parametrize("adapters", [[0], [-1, 2, -1, 0, 2], [1] * 35, [*range(3)] * 9 + [-1] * 5])
@pytest.mark.parametrize("inputs", [152, 700])
def test_each_row_gets_its_own_adapter(parts, rank, adapters, inputs, close, device, dtype):
    """Of 700 inputs each of three programs sums a part."""
    n, outputs = len(adapters), sum(parts)
    x, y = torch.randn(n, inputs).to(device, dtype), torch.randn(n, outputs).to(device, dtype)
    down = (torch.randn(3, len(parts) * rank, inputs) / 12).to(device, dtype)
    up = (torch.randn(3, outputs, rank) / 4).to(device, dtype)
    truth = y.double()
    for row, slot in enumerate(adapters):
        first = 0
        for part, size in enumerate(parts if slot >= 0 else ()):
            mid = down[slot, part * rank : (part + 1) * rank].double() @ x[row].double()
            truth[row, first : first + size] += up[slot, first : first + size].double() @ mid
            first += size
    untouched = y[torch.tensor(adapters) < 0].clone()
    expected = y.double()
    reference.add_lora(expected, x.double(), down.double(), up.double(), parts, *tiles(adapters, device))
    torch.testing.assert_close(expected, truth)
    add_lora(y, x, down, up, parts, *tiles(adapters, device))
    close(y, truth)
    assert torch.equal(y[torch.tensor(adapters) < 0], untouched)


def test_every_row_is_in_one_tile_of_its_adapter():
    adapters = np.random.default_rng(0).integers(-1, 4, 200)
    rows, slots = tiles_of(adapters)
    assert len(rows) == TILE * len(slots)
    real = rows >= 0
    assert sorted(rows[real]) == list(np.nonzero(adapters >= 0)[0])
    assert (adapters[rows[real]] == slots.repeat(TILE)[real]).all()


@pytest.mark.parametrize("num_slots", [1, 3, 40])
@pytest.mark.parametrize("rows", [1, 2, 16, 17, 100, 640])
def test_no_batch_makes_more_tiles_than_there_is_room_for(rows, num_slots):
    numbers = np.random.default_rng(rows)
    batches = [numbers.integers(-1, num_slots, rows) for _ in range(20)]
    ones = min(rows, num_slots) - 1  # one row of each adapter but the last: the most that are padded
    batches.append(np.concatenate((np.arange(ones), np.full(rows - ones, num_slots - 1))))
    tiles = [len(tiles_of(batch)[1]) for batch in batches]
    assert max(tiles) == most_tiles(rows, num_slots)


def test_empty_tiles_change_nothing(device, dtype):
    """As a captured step has them: room for more adapters than there are, whose places hold nothing."""
    y, x = torch.randn(5, 48).to(device, dtype), torch.randn(5, 300).to(device, dtype)
    down, up = torch.randn(2, 16, 300).to(device, dtype) / 9, torch.randn(2, 48, 16).to(device, dtype)
    rows, slots = tiles([1, -1, 0, 1, -1], device)
    expected = y.clone()
    add_lora(expected, x, down, up, (48,), rows, slots)
    none = torch.full((4,), -1, dtype=torch.int32, device=device)
    add_lora(y, x, down, up, (48,), torch.cat((rows, none.repeat(TILE))), torch.cat((slots, none)))
    assert torch.equal(y, expected)


def test_shapes_that_do_not_fit_are_refused(device, dtype):
    y, x = torch.ones(2, 8, device=device, dtype=dtype), torch.ones(2, 4, device=device, dtype=dtype)
    down, up = torch.ones(1, 16, 4, device=device, dtype=dtype), torch.ones(1, 8, 16, device=device, dtype=dtype)
    with pytest.raises(ValueError, match="add_lora"):
        add_lora(y, x, down, up, (4, 2), *tiles([0, 0], device))
