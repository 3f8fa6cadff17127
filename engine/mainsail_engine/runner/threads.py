"""What torch may use of the CPU: threads (the container's quota and the affinity mask count), and instructions."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch

_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_QUOTA_V1 = Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us")
_PERIOD_V1 = Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us")


def usable_cpus() -> int:
    """CPUs that this process may use, at least 1."""
    cpus = len(os.sched_getaffinity(0))
    quota = _quota()
    return max(1, min(cpus, math.ceil(quota))) if quota else cpus


def _quota() -> float | None:
    """The cgroup's limit in CPUs, None without one (cgroup v2, then v1)."""
    try:
        quota, period = _QUOTA.read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        pass
    try:
        quota_us, period_us = int(_QUOTA_V1.read_text()), int(_PERIOD_V1.read_text())
    except (OSError, ValueError):
        return None
    return quota_us / period_us if quota_us > 0 else None


def set_cpu_threads(ranks: int = 1) -> None:
    """This process's share of the CPUs, when it is one of several ranks."""
    torch.set_num_threads(max(1, usable_cpus() // ranks))


def multiplies_bfloat16() -> bool:
    """Whether this CPU has products of bfloat16: AVX512-BF16 or AMX. Elsewhere float32 is the faster."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()  # pyright: ignore[reportPrivateUsage]
