"""Large host memory: zeros that the system gives page by page when they are touched, in large pages if it has some.

`torch.zeros` writes all of it at once, which for a KV pool of several GiB takes seconds of a start and makes the
process as large as it may ever become. Here a page costs its time when it is first used, and nothing if it never is.
"""

from __future__ import annotations

import mmap
from contextlib import suppress

import torch


def untouched_zeros(num_bytes: int) -> torch.Tensor:
    """[num_bytes] uint8 on the CPU, page-aligned. Raises OSError where the system refuses."""
    if not num_bytes:
        return torch.empty(0, dtype=torch.uint8)
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)
