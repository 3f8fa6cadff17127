"""The ranks of a tensor-parallel engine: their process group, and the sums and gathers that a model asks for.

NCCL between GPUs, gloo on the CPU (the same code above it). The ranks live in one Pod, so they meet on the loopback.
Small sums on GPUs go through symmetric memory where torch offers it: every rank reads the others' buffers in one
kernel, which for a decode step's few kilobytes takes a fraction of a ring's time.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from mainsail_engine.model.parallel import Parallel

RENDEZVOUS_S = 120
ONE_SHOT_BYTES = 512 << 10
"""Above this a ring's bandwidth counts for more than the one-shot kernel's latency."""


@dataclass(frozen=True, slots=True)
class RankParallel(Parallel):
    """One of several ranks. `join` makes it."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    _shared: list[torch.Tensor] = field(default_factory=list[torch.Tensor])
    """The symmetric buffer; empty where there is none."""

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' x; may overwrite x."""
        x = x.contiguous()
        if self._shared and x.nbytes <= self._shared[0].nbytes and x.numel() % 8 == 0:
            buffer = self._shared[0].view(x.dtype)[: x.numel()]
            buffer.copy_(x.view(-1))
            group = dist.group.WORLD.group_name  # pyright: ignore[reportOptionalMemberAccess]
            return torch.ops.symm_mem.one_shot_all_reduce(buffer, "sum", group).view_as(x)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        dist.all_reduce(x)  # pyright: ignore[reportUnknownMemberType]
        return x

    def gather_columns(self, x: torch.Tensor) -> torch.Tensor:
        """All ranks' [n, columns] side by side: [n, size * columns]."""
        n, columns = x.shape
        out = torch.empty((self.size * n, columns), dtype=x.dtype, device=x.device)
        dist.all_gather_into_tensor(out, x.contiguous())  # pyright: ignore[reportUnknownMemberType]
        return out.view(self.size, n, columns).transpose(0, 1).reshape(n, self.size * columns)

    def smallest(self, number: int) -> int:
        """The smallest of all ranks' numbers."""
        value = torch.tensor([number], device=self.device)
        dist.all_reduce(value, op=dist.ReduceOp.MIN)  # pyright: ignore[reportUnknownMemberType]
        return int(value.item())


def listen(size: int) -> TCPStore:
    """Where the ranks meet: a store on a free port of the loopback, kept by rank 0."""
    return TCPStore(
        "127.0.0.1", 0, size, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=RENDEZVOUS_S)
    )


def join(rank: int, size: int, device: torch.device, store: TCPStore | int) -> RankParallel:
    """Become rank `rank` of `size`; store: the listener itself (rank 0), or its port. Waits for the others."""
    if isinstance(store, int):
        store = TCPStore("127.0.0.1", store, size, is_master=False, timeout=timedelta(seconds=RENDEZVOUS_S))
    cuda = device.type == "cuda"
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(  # pyright: ignore[reportUnknownMemberType]
        "nccl" if cuda else "gloo",
        store=store,
        rank=rank,
        world_size=size,
        device_id=device if cuda else None,
    )
    return RankParallel(rank, size, device, _symmetric_buffer(device) if cuda else [])


def _symmetric_buffer(device: torch.device) -> list[torch.Tensor]:
    try:
        import torch.distributed._symmetric_memory as symmetric

        buffer = symmetric.empty(ONE_SHOT_BYTES, dtype=torch.uint8, device=device)
        symmetric.rendezvous(buffer, dist.group.WORLD)  # pyright: ignore[reportArgumentType]
    except (ImportError, RuntimeError):
        return []
    return [buffer]
