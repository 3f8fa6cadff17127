"""How many KV blocks the device holds.

CUDA: what `memory_utilization` of the card leaves after weights and a forward pass of the largest step. CPU: enough
for every slot at full length, within a quarter of the memory that this process may still take (a container's
limit counts). Imports no torch until it asks a card.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from mainsail_engine.config import BLOCK_SIZE
from mainsail_engine.errors import OutOfMemoryError

if TYPE_CHECKING:
    import torch

_CPU_SHARE = _HOST_SHARE = 0.25
_LIMIT_FILES = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_USAGE_FILES = ("/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory/memory.usage_in_bytes")


def block_bytes(num_layers: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of one block of 16 tokens over all layers, for the heads that this device has."""
    return BLOCK_SIZE * 2 * num_layers * num_kv_heads * head_dim * dtype.itemsize


def _number(paths: tuple[str, ...]) -> int | None:
    for path in paths:
        try:
            return int(Path(path).read_text())
        except (OSError, ValueError):
            continue
    return None


def available_host_bytes() -> int:
    """Memory that this process may still take: the machine's available, or what its container's limit leaves."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    limit, usage = _number(_LIMIT_FILES), _number(_USAGE_FILES)
    return min(free, limit - (usage or 0)) if limit is not None else free


def cpu_blocks(per_block: int, *, max_num_seqs: int, max_model_len: int) -> int:
    """Blocks for a CPU pool. Raises OutOfMemoryError when not even one request of full length fits."""
    fits = int(available_host_bytes() * _CPU_SHARE) // per_block
    return _checked(min(fits, _full_length(max_model_len) * max_num_seqs), max_model_len, per_block)


def offloading_bytes(
    asked_gib: float | None, *, pool_bytes: int, cuda: bool, early_bytes: int | None = None
) -> int:  # fmt: skip
    """Host memory for KV: what is asked for, or on CUDA a quarter of what is free, at most as much as the pool.

    early_bytes: what a quarter was when nothing of it was taken.
    """
    if asked_gib is not None:
        return int(asked_gib * 2**30)
    if not cuda:
        return 0
    return min(int(available_host_bytes() * _HOST_SHARE) if early_bytes is None else early_bytes, pool_bytes)


def cuda_blocks(per_block: int, *, utilization: float, max_model_len: int, device: torch.device, set_aside: int) -> int:
    """Blocks for a CUDA pool, after the profiling pass has shown the peak of everything but `set_aside` bytes."""
    import torch

    free, total = torch.cuda.mem_get_info(device)
    peak = torch.cuda.max_memory_allocated(device)
    others = total - free - torch.cuda.memory_reserved(device)
    room = int(total * utilization) - peak - max(others, 0) - set_aside
    return _checked(room // per_block, max_model_len, per_block)


def _checked(blocks: int, max_model_len: int, per_block: int) -> int:
    """blocks, if one request of full length (and a block to copy a shared tail from) fits. Raises OutOfMemoryError."""
    needed = _full_length(max_model_len)
    if blocks < needed:
        fits = max(blocks - 1, 0) * BLOCK_SIZE
        raise OutOfMemoryError(
            f"a context of {max_model_len} tokens needs {needed * per_block >> 20} MiB of KV, and memory is left for "
            f"{fits} tokens: set --max-model-len to {fits} or less, raise --gpu-memory-utilization, or set "
            "--kv-cache-blocks"
        )
    return blocks


def _full_length(max_model_len: int) -> int:
    return -(-max_model_len // BLOCK_SIZE) + 1
