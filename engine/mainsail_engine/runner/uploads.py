"""A step's inputs on their way to the device, and its tokens on their way back: out of pinned memory and into it.

    arrays ──pack──▶ pinned buffer ──one asynchronous copy──▶ device bytes ──views──▶ tensors

Pinning memory and starting a copy cost more host time than what is copied here costs the bus, so what is sent together
goes in one copy, out of buffers that are kept. A copy is queued behind the steps before it, so its buffer is taken for
the next only when an event says that it has been read: never waited for, since that would be waiting for those steps.
While steps are in flight there are as many buffers as they sent, a handful. On the CPU there is nothing to move: the
arrays themselves are the tensors.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
import torch

from mainsail_kernels.tokens import send

FIRST_BUFFERS = 12
"""Twice what two steps in flight send when their sampling is elaborate."""
ALIGNMENT = 16
"""Bytes. Kernels read their inputs in words of up to 16 bytes."""


def offsets_of(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Where parts of these sizes in bytes begin in one aligned buffer, and what they take together."""
    offsets: list[int] = []
    total = 0
    for size in sizes:
        offsets.append(total)
        total += -(-size // ALIGNMENT) * ALIGNMENT
    return offsets, total


class Staging:
    """One pinned buffer, as bytes that NumPy can write, and when its last copy has been read."""

    def __init__(self, num_bytes: int) -> None:
        self._pinned = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        self.bytes: np.ndarray = self._pinned.numpy()
        self.int32: np.ndarray = self.bytes.view(np.int32)
        self._numbers = self._pinned.view(torch.int32)
        self._read = torch.cuda.Event()

    @property
    def is_free(self) -> bool:
        """Whether the last copy has been read."""
        return self._read.query()

    def copy_to(self, target: torch.Tensor, num_bytes: int) -> None:
        """Queue the copy of the first num_bytes to target [at least num_bytes] uint8, on the device."""
        target[:num_bytes].copy_(self._pinned[:num_bytes], non_blocking=True)
        self.is_read()

    def numbers(self, count: int) -> torch.Tensor:
        """The first `count` int32 numbers, for a kernel that reads them where they are; `is_read` once it is queued."""
        return self._numbers[:count]

    def is_read(self) -> None:
        """Whatever reads this buffer is queued."""
        self._read.record()


class Uploads:
    """Belongs to the thread, and the stream, that launches steps."""

    def __init__(self, device: torch.device, num_bytes: int = 1 << 18) -> None:
        """num_bytes: the least size of a buffer."""
        self._device = device
        self._least = num_bytes
        first = FIRST_BUFFERS if device.type == "cuda" else 0
        self._stagings = deque(Staging(num_bytes) for _ in range(first))
        """The one used longest ago first. More are taken as needed; pinning them waits for the device."""

    def staging(self, num_bytes: int) -> Staging:
        """A buffer of at least num_bytes, free to be written. Copy from it before asking for the next."""
        free = bool(self._stagings) and self._stagings[0].is_free
        staging = self._stagings.popleft() if free else Staging(self._least)
        if len(staging.bytes) < num_bytes:
            staging = Staging(2 * num_bytes)
        self._stagings.append(staging)
        return staging

    def send(self, arrays: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """The arrays on the device, in one copy: same shapes, same types."""
        if self._device.type == "cpu":
            return [torch.from_numpy(array) for array in arrays]  # pyright: ignore[reportUnknownMemberType]
        offsets, total = offsets_of([array.nbytes for array in arrays])
        staging = self.staging(total)
        for array, offset in zip(arrays, offsets, strict=True):
            part = staging.bytes[offset : offset + array.nbytes].view(array.dtype)
            part.reshape(array.shape)[...] = array
        target = torch.empty(total, dtype=torch.uint8, device=self._device)
        staging.copy_to(target, total)
        return [
            target[offset : offset + array.nbytes].view(_TORCH[array.dtype.name]).view(array.shape)
            for array, offset in zip(arrays, offsets, strict=True)
        ]


_TORCH = {"int64": torch.int64, "int32": torch.int32, "float32": torch.float32, "uint8": torch.uint8}


class Downloads:
    """Pinned buffers for sampled tokens on their way back, in turn: as many as steps may be unread, and one more."""

    def __init__(self, rows: int, depth: int = 3) -> None:
        self._buffers = [torch.empty(rows, dtype=torch.int64, pin_memory=True) for _ in range(depth + 1)]
        self._done = [torch.cuda.Event() for _ in self._buffers]
        self._turn = 0

    def receive(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event]:
        """tokens [n] int64 of the device: where they will be on the host, and when."""
        self._turn = (self._turn + 1) % len(self._buffers)
        on_host, done = self._buffers[self._turn][: tokens.shape[0]], self._done[self._turn]
        send(tokens, on_host)
        done.record()
        return on_host, done
