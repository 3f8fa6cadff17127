"""Adapters of many kinds in one batch against float64: every row gets its own adapter's part, the others nothing."""

import numpy as np
import pytest
import torch

from mainsail_kernels import reference
from mainsail_kernels.lora import TILE, add_lora, tiles_of


def tiles(adapters, device):
    rows, slots = tiles_of(np.array(adapters))
    return torch.from_numpy(rows).to(device), torch.from_numpy(slots).to(device)


@pytest.mark.parametrize(("parts", "rank"), [((40,), 16), ((48, 16, 16), 8), ((130, 66), 24)])
@pytest.mark.parametrize("adapters", [[0], [-1, 2, -1, 0, 2], [1] * 35, [*range(3)] * 9 + [-1] * 5])
def test_each_row_gets_its_own_adapter(parts, rank, adapters, close, device, dtype):
    n, inputs, outputs = len(adapters), 152, sum(parts)
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


def test_shapes_that_do_not_fit_are_refused(device, dtype):
    y, x = torch.ones(2, 8, device=device, dtype=dtype), torch.ones(2, 4, device=device, dtype=dtype)
    down, up = torch.ones(1, 16, 4, device=device, dtype=dtype), torch.ones(1, 8, 16, device=device, dtype=dtype)
    with pytest.raises(ValueError, match="add_lora"):
        add_lora(y, x, down, up, (4, 2), *tiles([0, 0], device))
