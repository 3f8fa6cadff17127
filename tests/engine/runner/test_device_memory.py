"""What lasts over a sleep, spread over the host memory that is lent for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mainsail_engine.errors import OutOfMemoryError
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


class OnTheHost(DeviceMemory):
    """The same over memory of the host, with a driver that only counts what it gives."""

    def __init__(self, sizes: dict[int, bool], monkeypatch: pytest.MonkeyPatch, room: int = 1 << 30) -> None:
        """sizes: of the regions, and whether they last."""
        self._device, self._granularity, self._saved = torch.device("cpu"), 16, None
        self._properties = device_memory._Properties()
        self._regions = {}
        self.room, self.given = room, 0
        """What the driver has, and has given away."""
        self.memory: list[torch.Tensor] = []
        monkeypatch.setattr(device_memory, "_call", self._driver)
        monkeypatch.setattr(torch.cuda, "synchronize", self.synchronize)
        for size, lasting in sizes.items():
            self.tensor_of(self._take(size, lasting=lasting)).fill_(size % 251)

    def synchronize(self, device: torch.device) -> None:
        pass

    def _driver(self, name: str, *arguments: Any) -> None:
        if name == "cuMemAddressReserve":
            self.memory.append(torch.zeros(arguments[1].value, dtype=torch.uint8))
            arguments[0]._obj.value = self.memory[-1].data_ptr()
        elif name == "cuMemCreate":
            size = arguments[1].value
            if self.given + size > self.room:
                raise OutOfMemoryError("the device has too little memory")
            self.given += size
            arguments[0]._obj.value = size
        elif name == "cuMemRelease":
            self.given -= arguments[0].value

    def tensor_of(self, region: Any) -> torch.Tensor:
        return next(memory for memory in self.memory if memory.data_ptr() == region.address)

    _tensor = tensor_of

    def contents(self) -> list[list[int]]:
        return [self.tensor_of(region).unique().tolist() for region in self._regions.values()]


def test_weights_stay_as_they_are_when_a_sleep_fails_before_they_are_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    memory, rooms = OnTheHost({32: True, 48: True, 64: False}, monkeypatch), [torch.zeros(128, dtype=torch.uint8)]
    asked: list[torch.device] = []

    def lose(device: torch.device) -> None:
        """The second time is after the copies."""
        asked.append(device)
        if len(asked) == 2:
            rooms[0].zero_()
            raise RuntimeError("CUDA error: the bus lost it")

    monkeypatch.setattr(torch.cuda, "synchronize", lose)
    with pytest.raises(RuntimeError, match="the bus lost it"):
        memory.release(rooms)
    memory.restore()
    assert memory.contents() == [[32], [48], [0]]


def test_waking_up_without_room_takes_nothing_and_may_be_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    memory, rooms = OnTheHost({32: True, 48: True, 64: False}, monkeypatch), [torch.zeros(128, dtype=torch.uint8)]
    memory.release(rooms)
    assert memory.given == 0
    for region in memory._regions.values():
        memory.tensor_of(region).fill_(255)
    memory.room = 100
    with pytest.raises(OutOfMemoryError):
        memory.restore()
    assert memory.given == 0, "who sleeps holds nothing"
    memory.room = 144
    memory.restore()
    assert (memory.given, memory.contents()) == (144, [[32], [48], [0]])


def test_memory_that_cannot_be_put_behind_its_addresses_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = OnTheHost({32: True}, monkeypatch)
    memory.release([torch.zeros(32, dtype=torch.uint8)])

    def refuse(name: str, *arguments: Any) -> None:
        if name == refused:
            raise OutOfMemoryError("the device has too little memory")
        memory._driver(name, *arguments)

    monkeypatch.setattr(device_memory, "_call", refuse)
    for refused in ("cuMemMap", "cuMemSetAccess"):
        with pytest.raises(OutOfMemoryError):
            memory.restore()
        assert memory.given == 0, refused
    refused = ""
    memory.restore()
    assert memory.contents() == [[32]]
