"""What glibc's allocator is told, so that memory which only a list of everything needed goes back to the system.

By default every large block that is freed raises the size from which blocks get a mapping of their own, up to 32 MiB:
after the first list such blocks lie in the heap, between small ones that stay, and their pages are never given back.
On another C library nothing happens.
"""

from __future__ import annotations

import contextlib
import ctypes

_M_MMAP_THRESHOLD = -3
_LARGE = 64 << 10
"""Bytes: below the pages of lists and of watches, far above what is kept of an object."""


def map_large_blocks() -> None:
    """A fixed threshold, before anything large is allocated."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE)


def give_back() -> None:
    """Free pages anywhere in the heap go back; some milliseconds."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
