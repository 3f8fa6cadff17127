"""What is asked of CUDA's driver before torch is there, which takes seconds to import. Imports no torch."""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import msgspec

_NAME_BYTES = 100
_MULTIPROCESSORS, _MAJOR, _MINOR = 16, 75, 76
"""CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, …_COMPUTE_CAPABILITY_MAJOR, …_MINOR."""


class CardName(msgspec.Struct, frozen=True):
    """What kernels are chosen and compiled by (mainsail_kernels/_triton.py: Card)."""

    name: str
    multiprocessors: int
    capability: tuple[int, int]


def installed_card() -> CardName | None:
    """The first one, as the driver describes it; None where there is none. Makes no context."""
    cuda, device = _first_device()
    name = ctypes.create_string_buffer(_NAME_BYTES)
    if cuda is None or cuda.cuDeviceGetName(name, _NAME_BYTES, device):
        return None
    numbers: list[int] = []
    for attribute in (_MULTIPROCESSORS, _MAJOR, _MINOR):
        number = ctypes.c_int()
        if cuda.cuDeviceGetAttribute(ctypes.byref(number), attribute, device):
            return None
        numbers.append(number.value)
    return CardName(name.value.decode(), numbers[0], (numbers[1], numbers[2]))


def total_bytes() -> int:
    """Of the first card's memory; 0 where there is none."""
    cuda, device = _first_device()
    total = ctypes.c_size_t()
    return 0 if cuda is None or cuda.cuDeviceTotalMem_v2(ctypes.byref(total), device) else total.value


class Context:
    """The first card's primary context, made on a thread that holds no lock of Python's; torch finds it there."""

    def __init__(self) -> None:
        self._cuda: Any = None
        self._handle = ctypes.c_void_p()
        self._thread = threading.Thread(target=self._open, name="cuda-context", daemon=True)
        self._thread.start()

    def _open(self) -> None:
        cuda, device = _first_device()
        if cuda is not None and not cuda.cuDevicePrimaryCtxRetain(ctypes.byref(self._handle), device):
            self._cuda = cuda

    def pin(self, address: int, num_bytes: int) -> bool:
        """Have the driver keep that host memory in place, on whatever thread. False: it refuses, or there is none."""
        self._thread.join()
        if self._cuda is None or self._cuda.cuCtxSetCurrent(self._handle):
            return False
        return not self._cuda.cuMemHostRegister_v2(
            ctypes.c_void_p(address), ctypes.c_size_t(num_bytes), ctypes.c_uint(0)
        )


def _first_device() -> tuple[Any, ctypes.c_int]:
    """(the driver's library, the device); (None, …) where there is none."""
    device = ctypes.c_int()
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None, device
    return (None if cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), 0) else cuda), device
