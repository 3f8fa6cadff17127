"""Device memory that can be given back and taken again at the same addresses: what /sleep and /wake_up are about.

    reserve ──▶ addresses, for good        create, map ──▶ memory behind them        unmap, release ──▶ addresses only

With CUDA's virtual memory management an allocation is two things, addresses and memory. A sleep copies what must last
(weights) to the host and gives the memory back, but keeps the addresses; waking up puts memory behind them again. So
every tensor, every captured graph and every kernel's argument stays valid, and nothing is built anew. The idea is that
of vLLM's sleep mode; here torch's allocator of a memory pool is served by two functions of this module.

Copies go as fast as the bus does if the host's memory is pinned, and pinning takes longer than copying. But there is
pinned memory: that for KV blocks (swap.py), which hold nothing while the engine sleeps. It is lent for that time.

Where the driver lacks these functions (`available` says so), runner/sleep.py moves tensor by tensor instead.
"""

from __future__ import annotations

import ctypes
import logging
import time
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, cast

import torch

from mainsail_engine.errors import OutOfMemoryError
from mainsail_engine.pages import untouched_zeros
from mainsail_engine.transfers import Transfers

log = logging.getLogger(__name__)
_PINNED, _ON_DEVICE, _READ_WRITE = 1, 1, 3
"""CU_MEM_ALLOCATION_TYPE_PINNED, CU_MEM_LOCATION_TYPE_DEVICE, CU_MEM_ACCESS_FLAGS_PROT_READWRITE."""
_OUT_OF_MEMORY = 2


class _Location(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int), ("id", ctypes.c_int)]


class _Flags(ctypes.Structure):
    _fields_ = [
        ("compression", ctypes.c_ubyte), ("rdma", ctypes.c_ubyte), ("usage", ctypes.c_ushort),
        ("reserved", ctypes.c_ubyte * 4),
    ]  # fmt: skip


class _Properties(ctypes.Structure):
    """CUmemAllocationProp."""

    _fields_ = [
        ("type", ctypes.c_int), ("handle_types", ctypes.c_int), ("location", _Location),
        ("win32", ctypes.c_void_p), ("flags", _Flags),
    ]  # fmt: skip


class _Access(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_ = [("location", _Location), ("flags", ctypes.c_int)]


_Allocate = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p)


@dataclass(slots=True)
class _Region:
    address: int
    size: int
    handle: int | None
    """None: there is no memory behind the addresses."""
    lasting: bool


class Part(NamedTuple):
    """Consecutive bytes of a region, and where they are kept over a sleep."""

    region: int
    """Which of the regions."""
    at: int
    size: int
    room: int
    """Which of the rooms."""
    room_at: int


def spread(sizes: Sequence[int], rooms: Sequence[int]) -> list[Part]:
    """Regions of these sizes over rooms of those, in order, as few parts as that takes; what is over gets no part."""
    parts: list[Part] = []
    room = room_at = 0
    for region, size in enumerate(sizes):
        at = 0
        while at < size and room < len(rooms):
            count = min(size - at, rooms[room] - room_at)
            if count:
                parts.append(Part(region, at, count, room, room_at))
            at, room_at = at + count, room_at + count
            if room_at == rooms[room]:
                room, room_at = room + 1, 0
    return parts


@dataclass(slots=True)
class _Saved:
    """What lasts, while there is no memory behind it."""

    regions: list[_Region]
    rooms: list[torch.Tensor]
    """The last one is ordinary memory, the others are lent and pinned."""
    parts: list[Part]


class _Bytes:
    """A region for torch.as_tensor."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,), "typestr": "|u1", "data": (address, False), "version": 3,
        }  # fmt: skip


@cache
def _driver() -> Any:
    """CUDA's driver library; None where it is not there, or too old."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
        return library if library.cuMemAddressReserve and library.cuMemCreate and library.cuMemMap else None
    except (OSError, AttributeError):
        return None


def available(device: torch.device) -> bool:
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and _driver() is not None
        and hasattr(torch._C, "_cuda_customAllocator")  # pyright: ignore[reportPrivateUsage]
    )


_kept: list[object] = []
"""Pools and what serves them, for good: torch ends the process when a pool is collected before the last of its tensors,
as it may be with an engine that somebody made in a process of their own."""


class DeviceMemory:
    """The regions of one device. Only for the thread that launches steps, with nothing running."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._regions: dict[int, _Region] = {}
        self._saved: _Saved | None = None
        torch.zeros(1, device=device)  # the driver's functions need a context
        self._properties = _Properties(type=_PINNED, location=_Location(_ON_DEVICE, device.index or 0))
        granularity = ctypes.c_size_t()
        _call("cuMemGetAllocationGranularity", ctypes.byref(granularity), ctypes.byref(self._properties), 0)
        self._granularity = granularity.value
        # torch keeps their addresses only. It frees when it ends, and then no Python can be called any more: it gets a
        # function of C that does nothing. What lasts is freed with the process.
        self._functions = _Allocate(self._allocate_lasting), ctypes.CDLL(None).getpid
        addresses = [cast(int, ctypes.cast(function, ctypes.c_void_p).value) for function in self._functions]
        make: Any = torch._C._cuda_customAllocator  # pyright: ignore[reportPrivateUsage, reportUnknownMemberType, reportAttributeAccessIssue, reportUnknownVariableType]
        self._allocator: Any = make(*addresses)
        self._pool = torch.cuda.MemPool(self._allocator)
        _kept.append((self._functions, self._allocator, self._pool))

    @contextmanager
    def lasting(self) -> Generator[None]:
        """What is allocated within is kept over a sleep."""
        with torch.cuda.use_mem_pool(self._pool, self._device):
            yield

    def passing(self, num_bytes: int) -> torch.Tensor:
        """[num_bytes] uint8, zeros; after a sleep, zeros again. Raises OutOfMemoryError."""
        region = self._take(num_bytes, lasting=False)
        tensor = torch.as_tensor(_Bytes(region.address, num_bytes), device=self._device)
        return tensor.zero_()

    @property
    def num_lasting_bytes(self) -> int:
        """What a sleep saves."""
        return sum(region.size for region in self._regions.values() if region.lasting and region.handle is not None)

    def release(self, lent: Sequence[torch.Tensor] = ()) -> int:
        """Save what lasts, and give all memory back. Returns the number of bytes saved.

        lent: pinned host memory, each [n] uint8, to save into until `restore` is done with it. What it has no room for
        goes to ordinary memory, which the bus reaches through pinned pieces only: at a fifth of the speed.
        """
        began_s = time.monotonic()
        torch.cuda.synchronize(self._device)
        saved = self._save_into(lent)
        self._copy(saved, to_host=True)
        self._saved = saved  # not before: where it fails, what is in memory still is right
        saved_s, num_bytes = time.monotonic(), sum(part.size for part in saved.parts)
        for region in self._regions.values():
            self._unmap(region)
        log.info(
            "asleep: %.1f GB saved in %.2f s (%.1f GB of it through pieces), memory given back in %.2f s",
            num_bytes / 1e9, saved_s - began_s, len(saved.rooms[-1]) / 1e9, time.monotonic() - saved_s,
        )  # fmt: skip
        return num_bytes

    def restore(self) -> None:
        """Memory behind every address again, with what was saved. Raises OutOfMemoryError, and then holds none."""
        began_s = time.monotonic()
        self._map_all([region for region in self._regions.values() if region.handle is None])
        mapped_s = time.monotonic()
        for region in self._regions.values():
            if not region.lasting:
                self._tensor(region).zero_()
        if self._saved is not None:
            self._copy(self._saved, to_host=False)
            self._saved = None
        torch.cuda.synchronize(self._device)
        log.info("awake: memory taken in %.2f s, filled in %.2f s", mapped_s - began_s, time.monotonic() - mapped_s)

    def _save_into(self, lent: Sequence[torch.Tensor]) -> _Saved:
        lasting = [region for region in self._regions.values() if region.lasting and region.handle is not None]
        sizes = [region.size for region in lasting]
        over = max(0, sum(sizes) - sum(len(room) for room in lent))
        rooms = [*lent, untouched_zeros(over)]
        return _Saved(lasting, rooms, spread(sizes, [len(room) for room in rooms]))

    def _copy(self, saved: _Saved, *, to_host: bool) -> None:
        """All parts, from the device or back to it; returns when they are there."""
        tensors = [self._tensor(region) for region in saved.regions]
        through_pieces = [part for part in saved.parts if part.room == len(saved.rooms) - 1]
        with Transfers(self._device) if through_pieces else nullcontext() as transfers:
            for part in saved.parts:
                there = tensors[part.region][part.at : part.at + part.size]
                here = saved.rooms[part.room][part.room_at : part.room_at + part.size]
                if transfers is None or part.room < len(saved.rooms) - 1:
                    source, target = (there, here) if to_host else (here, there)
                    target.copy_(source, non_blocking=True)
                elif to_host:
                    transfers.to_host(there, here)
                else:
                    transfers.to_device(here, there)
            if transfers is not None:
                transfers.wait()
        torch.cuda.synchronize(self._device)

    def _tensor(self, region: _Region) -> torch.Tensor:
        return torch.as_tensor(_Bytes(region.address, region.size), device=self._device)

    def _take(self, num_bytes: int, *, lasting: bool) -> _Region:
        size = -(-num_bytes // self._granularity) * self._granularity
        address = ctypes.c_uint64()
        zero = ctypes.c_uint64(0)
        _call("cuMemAddressReserve", ctypes.byref(address), ctypes.c_size_t(size), ctypes.c_size_t(0), zero, zero)
        region = _Region(address.value, size, None, lasting)
        try:
            self._map(region)
        except OutOfMemoryError:
            _call("cuMemAddressFree", ctypes.c_uint64(region.address), ctypes.c_size_t(size))
            raise
        self._regions[region.address] = region
        return region

    def _map_all(self, regions: Sequence[_Region]) -> None:
        """All of them or none: others may need what would be taken for nothing."""
        with ExitStack() as undo:
            for region in regions:
                self._map(region)
                undo.callback(self._unmap, region)
            undo.pop_all()

    def _map(self, region: _Region) -> None:
        handle, size, zero = ctypes.c_uint64(), ctypes.c_size_t(region.size), ctypes.c_uint64(0)
        address, access = ctypes.c_uint64(region.address), _Access(self._properties.location, _READ_WRITE)
        with ExitStack() as undo:
            _call("cuMemCreate", ctypes.byref(handle), size, ctypes.byref(self._properties), zero)
            undo.callback(_call, "cuMemRelease", handle)
            _call("cuMemMap", address, size, ctypes.c_size_t(0), handle, zero)
            undo.callback(_call, "cuMemUnmap", address, size)
            _call("cuMemSetAccess", address, size, ctypes.byref(access), ctypes.c_size_t(1))
            undo.pop_all()
        region.handle = handle.value

    def _unmap(self, region: _Region) -> None:
        if region.handle is not None:
            _call("cuMemUnmap", ctypes.c_uint64(region.address), ctypes.c_size_t(region.size))
            _call("cuMemRelease", ctypes.c_uint64(region.handle))
            region.handle = None

    def _allocate_lasting(self, num_bytes: int, device: int, stream: int | None) -> int | None:
        """For torch's allocator, which frees what it can and tries again after a None."""
        del device, stream
        try:
            return self._take(num_bytes, lasting=True).address
        except OutOfMemoryError:
            return None


def _call(name: str, *arguments: object) -> None:
    status: int = getattr(_driver(), name)(*arguments)
    if status == _OUT_OF_MEMORY:
        raise OutOfMemoryError("the device has too little memory")
    if status != 0:
        raise RuntimeError(f"{name}: CUDA driver error {status}")
