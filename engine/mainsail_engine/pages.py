"""Large host memory: zeros that the system gives page by page when they are touched, in large pages if it has some.

`torch.zeros` writes all of it at once, which for a KV pool of several GiB takes seconds of a start and makes the
process as large as it may ever become. Here a page costs its time when it is first used, and nothing if it never is.
"""

from __future__ import annotations

import ctypes
import mmap
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def untouched_pages(num_bytes: int) -> mmap.mmap:
    """Zeros, page-aligned. Raises OSError where the system refuses."""
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    return pages


def touched_pages(num_bytes: int) -> mmap.mmap:
    """The same, all taken: 2 to 6 GB/s for each thread that does this. Holds no lock of Python's."""
    pages = untouched_pages(num_bytes)
    ctypes.memset(address_of(pages), 0, num_bytes)
    return pages


def address_of(pages: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(pages))


def untouched_zeros(num_bytes: int) -> torch.Tensor:
    """[num_bytes] uint8 on the CPU. Raises OSError."""
    return as_tensor(untouched_pages(num_bytes)) if num_bytes else as_tensor(bytearray())


def touched_zeros(num_bytes: int) -> torch.Tensor:
    """[num_bytes] uint8 on the CPU. Raises OSError."""
    return as_tensor(touched_pages(num_bytes)) if num_bytes else as_tensor(bytearray())


def as_tensor(pages: mmap.mmap | bytearray) -> torch.Tensor:
    """[n] uint8, the same memory, which lasts as long as the tensor does."""
    import torch

    return torch.frombuffer(pages, dtype=torch.uint8) if len(pages) else torch.empty(0, dtype=torch.uint8)
