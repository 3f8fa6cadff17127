"""What lasts over a sleep, spread over the host memory that is lent for it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mainsail_engine.runner import device_memory
from mainsail_engine.runner.device_memory import DeviceMemory, spread

SIZES = st.lists(st.integers(0, 50), max_size=6)


@given(SIZES, SIZES)
def test_regions_lie_in_rooms_one_after_the_other(sizes: list[int], rooms: list[int]) -> None:
    parts = spread(sizes, rooms)
    in_regions = [(part.region, byte) for part in parts for byte in range(part.at, part.at + part.size)]
    in_rooms = [(part.room, byte) for part in parts for byte in range(part.room_at, part.room_at + part.size)]
    room_for = min(sum(sizes), sum(rooms))
    assert in_regions == [(region, byte) for region, size in enumerate(sizes) for byte in range(size)][:room_for]
    assert in_rooms == [(room, byte) for room, size in enumerate(rooms) for byte in range(size)][:room_for]
    assert all(part.size for part in parts)


def test_no_more_parts_than_borders() -> None:
    assert [tuple(part) for part in spread([10, 4], [6, 100])] == [(0, 0, 6, 0, 0), (0, 6, 4, 1, 0), (1, 0, 4, 1, 4)]


@pytest.mark.gpu
@pytest.mark.parametrize("lent_mib", [(), (5, 5), (3, 64)])
def test_what_lasts_is_there_again_wherever_it_lay(lent_mib: tuple[int, ...]) -> None:
    device = torch.device("cuda", 0)
    if not device_memory.available(device):
        pytest.skip("the driver cannot give memory back")
    memory = DeviceMemory(device)
    with memory.lasting():
        kept = [torch.randn(1 << 20, device=device) for _ in range(5)]
    passing = memory.passing(8 << 20)
    passing.fill_(7)
    before = [tensor.clone() for tensor in kept]
    addresses = [tensor.data_ptr() for tensor in kept]
    lent = [torch.empty(mib << 20, dtype=torch.uint8, pin_memory=True) for mib in lent_mib]
    for _ in range(2):
        assert memory.release(lent) >= 20 << 20
        asleep, _ = torch.cuda.mem_get_info()
        memory.restore()
        awake, _ = torch.cuda.mem_get_info()
        assert asleep - awake >= 28 << 20, "not before and after: streams for the copies take some, too"
        assert [tensor.data_ptr() for tensor in kept] == addresses
        assert all(torch.equal(now, then) for now, then in zip(kept, before, strict=True))
        assert not passing.any()
        passing.fill_(7)
