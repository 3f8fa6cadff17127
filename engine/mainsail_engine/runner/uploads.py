"""A step's inputs on their way to the device: one copy out of pinned memory, which two buffers take turns to hold.

    arrays ──pack──▶ pinned buffer A │ B ──one asynchronous copy──▶ device bytes ──views──▶ tensors

Pinning memory and starting a copy cost more host time than what is copied here costs the bus, so a step does each once.
The buffer of step N is written again for step N+2, after an event has said that its copy has been read: N+1 can be
packed while N is still to be copied. On the CPU there is nothing to move: the arrays themselves are the tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

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
        self._read = torch.cuda.Event()

    def wait(self) -> None:
        """Until the last copy has been read."""
        self._read.synchronize()

    def copy_to(self, target: torch.Tensor, num_bytes: int) -> None:
        """Queue the copy of the first num_bytes to target [at least num_bytes] uint8, on the device."""
        target[:num_bytes].copy_(self._pinned[:num_bytes], non_blocking=True)
        self._read.record()


class Uploads:
    """Two stagings in turn. Belongs to the thread, and the stream, that launches steps."""

    def __init__(self, device: torch.device, num_bytes: int = 1 << 20) -> None:
        """num_bytes: what is pinned at first; a larger step takes larger buffers."""
        self._device = device
        self._stagings = [Staging(num_bytes), Staging(num_bytes)] if device.type == "cuda" else []
        self._turn = 0

    def staging(self, num_bytes: int) -> Staging:
        """The next buffer, free to be written, of at least num_bytes."""
        self._turn ^= 1
        staging = self._stagings[self._turn]
        staging.wait()
        if len(staging.bytes) < num_bytes:
            staging = self._stagings[self._turn] = Staging(2 * num_bytes)
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
        self._turn = 0

    def receive(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event]:
        """tokens [n] int64 of the device: where they will be on the host, and when."""
        self._turn = (self._turn + 1) % len(self._buffers)
        on_host = self._buffers[self._turn][: tokens.shape[0]]
        on_host.copy_(tokens, non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        return on_host, done
