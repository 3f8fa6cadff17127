"""Ordinary host memory, pinned where it lies: the driver keeps its pages in place, and the bus copies from and to them.

`torch.empty(pin_memory=True)` takes pages and pins them in one call of the driver, during which no other thread can
launch a step, and rounds sizes up to a power of two. Here the pages can be taken beforehand.
"""

from __future__ import annotations

from typing import Any, cast

import torch


def pin(tensor: torch.Tensor) -> None:
    """Pin the memory of a contiguous CPU tensor until `unpin`. Raises RuntimeError where the driver refuses."""
    _check(_runtime().cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0), f"pinning {tensor.nbytes} bytes")


def unpin(tensor: torch.Tensor) -> None:
    """Undo `pin`, before the memory is freed and with no copy under way. Raises RuntimeError."""
    _check(_runtime().cudaHostUnregister(tensor.data_ptr()), "unpinning")


def _runtime() -> Any:
    return cast(Any, torch.cuda.cudart)()


def _check(status: Any, what: str) -> None:
    if int(status) != 0:
        raise RuntimeError(f"{what}: CUDA error {int(status)}")
