"""Sums over the GPUs of a stage by a kernel that reads the others' memory, without NCCL.

    rank 0   x0 ──▶ symmetric memory ◀── read ──┐        each rank lays its own part down, waits until all have,
    rank 1   x1 ──▶ symmetric memory ◀── read ──┴─▶ sum  reads all, and is done when all have read

A ring passes 2 (n - 1) / n of a tensor's bytes in 2 (n - 1) turns, this n - 1 times the bytes in one. So it wins where
turns cost more than bytes: for a decode step's hidden states, and between two GPUs, where it moves no more than a ring.
The kernel is torch's (`symm_mem.one_shot_all_reduce_copy`); it needs GPUs that can read one another's memory, and no
NVLink multicast. CUDA graphs may hold it.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup  # pyright: ignore[reportPrivateImportUsage]

log = logging.getLogger(__name__)
LARGEST_BYTES = {2: 4 << 20, 3: 512 << 10, 4: 512 << 10}
"""By the number of ranks; above this NCCL is as fast. Two were measured (benchmarks/tensor_parallel_gpu.py)."""
LARGEST_BYTES_OF_MANY = 256 << 10
ALIGNMENT = 16
"""Bytes that the kernel loads at a time."""


@dataclass(frozen=True, slots=True)
class PeerSums:
    """For the thread, and the stream, that launches steps: one sum after the other, the same on all ranks."""

    buffer: torch.Tensor
    """[bytes] uint8, of symmetric memory."""
    group: str
    """Its name."""

    def takes(self, x: torch.Tensor) -> bool:
        """x: contiguous."""
        offset = x.storage_offset() * x.element_size()
        fits = 0 < x.nbytes <= self.buffer.nbytes and x.nbytes % ALIGNMENT == 0 and offset % ALIGNMENT == 0
        return bool(fits) and x.dtype in (torch.bfloat16, torch.float32)

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' x, for an x that it takes; leaves x as it is."""
        laid = self.buffer[: x.nbytes].view(x.dtype).view(x.shape)
        return torch.ops.symm_mem.one_shot_all_reduce_copy(laid, x, "sum", self.group)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


def peer_sums(device: torch.device, group: ProcessGroup, num_bytes: int | None = None) -> PeerSums | None:
    """Every rank of the group calls it, with its own device current. None on all of them where one cannot.

    num_bytes: the largest tensor that it is to sum; None: as many as pay.
    """
    wanted = num_bytes or LARGEST_BYTES.get(group.size(), LARGEST_BYTES_OF_MANY)
    trouble = "another rank cannot"
    buffer: torch.Tensor | None = None
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")  # unused here, and where it is missing torch fails
    try:
        import torch.distributed._symmetric_memory as symmetric

        buffer = symmetric.empty(wanted, dtype=torch.uint8, device=device)
        symmetric.rendezvous(buffer, group)
    except (ImportError, RuntimeError) as error:
        buffer, trouble = None, str(error).partition("\n")[0]
    able = torch.tensor([buffer is not None], dtype=torch.int32, device=device)
    dist.all_reduce(able, op=dist.ReduceOp.MIN, group=group)  # pyright: ignore[reportUnknownMemberType]
    if buffer is None or not able.item():
        log.warning("small sums go through NCCL, which takes longer: no symmetric memory (%s)", trouble)
        return None
    return PeerSums(buffer, group.group_name)
