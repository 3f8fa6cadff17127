"""Several programs that share one tile's inputs: their sums meet in a workspace, the last to arrive adds them up.

A counter for each tile says who is last; it is set back to zero by the last. Sums are added in a fixed order, so that a
result does not depend on who came when.
"""

from functools import cache

import torch

from mainsail_kernels._triton import tl, triton

WORKSPACE_FLOATS = 8 << 20
COUNTERS = 4096


@triton.jit
def arrive(acc, partial_ptr, counter_ptr, part, size, place, fits):
    """Leave a part's sums; returns how many parts were there before."""
    tl.store(partial_ptr + part * size + place, acc, mask=fits)
    tl.debug_barrier()  # every thread's sums are stored before one thread says so
    return tl.atomic_add(counter_ptr, 1, sem="acq_rel")


@triton.jit
def collect(acc, partial_ptr, counter_ptr, size, place, fits, SPLIT: tl.constexpr):
    """The last one's: all parts' sums, and the counter back at zero."""
    tl.debug_barrier()
    tl.store(counter_ptr, 0)
    total = tl.zeros_like(acc)
    for part in tl.static_range(SPLIT):
        total += tl.load(partial_ptr + part * size + place, mask=fits, other=0.0, cache_modifier=".cg")
    return total


@cache
def workspace(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(partial sums, counters that are zero between calls): one for the stream that runs the model."""
    with torch.inference_mode(False):
        partial = torch.empty(WORKSPACE_FLOATS, dtype=torch.float32, device=device)
        return partial, torch.zeros(COUNTERS, dtype=torch.int32, device=device)


def split_that_fits(split: int, rows: int, num_out: int, tiles: int) -> int:
    """split, or 1 where the workspace is too small for it."""
    return split if split * rows * num_out <= WORKSPACE_FLOATS and tiles <= COUNTERS else 1
