"""Token masks on their way to the device: filled by the CPU in pinned memory, uploaded once a step.

Two pinned buffers take turns, each with an event that says when its last upload has been read, so that the next step's
masks can be written while this one's are on the way. Made when the first constrained request comes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True, slots=True)
class TokenMasks:
    """On the device. bits [m, ceil(vocab / 32)] int32, a 1 for each token that is allowed; rows [m] int64: whose."""

    bits: torch.Tensor
    rows: torch.Tensor


class _Buffer:
    def __init__(self, rows: int, words: int, *, pinned: bool) -> None:
        self.bits = torch.zeros((rows, words), dtype=torch.int32, pin_memory=pinned)
        self.read = torch.cuda.Event() if pinned else None


class MaskStaging:
    def __init__(self, num_slots: int, vocab_size: int, device: torch.device) -> None:
        self._shape = num_slots, -(-vocab_size // 32)
        self._device = device
        self._buffers: list[_Buffer] = []
        self._turn = 0

    def take(self, num_rows: int) -> np.ndarray:
        """Room for so many masks, [num_rows, words] int32, to be filled and then uploaded."""
        pinned = self._device.type == "cuda"
        if num_rows > self._shape[0]:  # rows that verify guesses are more than there are slots
            if pinned:
                torch.cuda.synchronize()
            self._shape, self._buffers = (2 * num_rows, self._shape[1]), []
        if not self._buffers:
            self._buffers = [_Buffer(*self._shape, pinned=pinned) for _ in range(2 if pinned else 1)]
        self._turn = (self._turn + 1) % len(self._buffers)
        buffer = self._buffers[self._turn]
        if buffer.read is not None:
            buffer.read.synchronize()
        return buffer.bits[:num_rows].numpy()

    def upload(self, rows: Sequence[int]) -> TokenMasks:
        """The masks that were filled last, for these rows."""
        buffer, index = self._buffers[self._turn], torch.tensor(rows, dtype=torch.int64)
        bits = buffer.bits[: len(rows)]
        if buffer.read is None:
            return TokenMasks(bits, index)
        masks = TokenMasks(
            bits.to(self._device, non_blocking=True), index.pin_memory().to(self._device, non_blocking=True)
        )
        buffer.read.record()
        return masks
