"""Weights from files straight to the device: several threads read, and each sends what it has read (transfers.py).

Reading through a memory map copies on one thread, page by page, and the driver copies that once more before the bus
sees it. Here every byte of a file is copied once, into pinned memory, and many reads are on their way at a time,
which is also what local disks and network volumes need to be fast.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from pathlib import Path

import numpy as np
import torch

from mainsail_engine.model.sources import Span
from mainsail_engine.transfers import Transfers

log = logging.getLogger(__name__)
LEAST_BYTES = 1 << 20
"""Smaller parts are not worth a thread."""
EVERY_S = 2.0
"""Between two lines of progress."""


class Reader:
    """Belongs to the thread that loads."""

    def __init__(self, device: torch.device) -> None:
        self._transfers = Transfers(device)
        self._files: dict[Path, int] = {}
        self._lock = threading.Lock()
        self._num_bytes = 0
        """Read so far."""
        self._started_s = self._told_s = time.monotonic()

    def read(self, span: Span, out: torch.Tensor) -> bool:
        """Begin to fill out (on the device) with those bytes. False: it is not for this way, and nothing was done.

        Raises OSError where the sizes differ.
        """
        if span.num_bytes < LEAST_BYTES or span.dtype != out.dtype or not out.is_contiguous():
            return False
        if span.num_bytes != out.nbytes:
            raise OSError(f"{span.file}: {span.num_bytes} bytes for a tensor of {out.nbytes}")
        if span.file not in self._files:
            self._files[span.file] = os.open(span.file, os.O_RDONLY)
        file = self._files[span.file]

        def fill(buffer: np.ndarray, offset: int) -> None:
            view, done = buffer.data, 0
            while done < len(view):
                count = os.preadv(file, [view[done:]], span.offset + offset + done)
                if count == 0:
                    raise OSError(f"{span.file} ends at byte {span.offset + offset + done}")
                done += count
            self._tell(len(view))

        self._transfers.fill(out.view(-1).view(torch.uint8), fill)
        return True

    def wait(self) -> None:
        """Until what was begun may be used. Raises OSError, also where a file ended too early."""
        self._transfers.wait()

    def _tell(self, num_bytes: int) -> None:
        """So many more were read, by one of the threads."""
        with self._lock:
            self._num_bytes += num_bytes
            now = time.monotonic()
            if now >= self._told_s + EVERY_S:
                self._told_s = now
                log.info("weights: %s", self._progress(now))

    def _progress(self, now: float) -> str:
        seconds, gigabytes = max(now - self._started_s, 1e-9), self._num_bytes / 1e9
        return f"{gigabytes:.1f} GB in {seconds:.1f} s, {gigabytes / seconds:.1f} GB/s"

    def close(self) -> None:
        """Wait for the last copies, and say how fast it was."""
        self._transfers.__exit__(None, None, None)
        for file in self._files.values():
            os.close(file)
        log.info("weights read: %s", self._progress(time.monotonic()))
