"""Low-rank adapters of many kinds in one batch (Hu et al., "LoRA", 2021): y += up @ (down @ x), each row with its own.

Rows are grouped by adapter into tiles, so that a tile's weights are read once and multiplied as matrices, decodes and
prompts alike (the idea of grouping is Punica's, Chen et al., 2023). Two kernels: the first takes a tile's rows down to
the rank, the second up again and adds. A matrix of several parts (query, key, value) has a `down` for each part:

    down[slot]   | rank rows of part 0 | rank rows of part 1 | …      up[slot]   | outputs of part 0 | of part 1 | …
"""

from collections.abc import Sequence

import numpy as np
import torch

from mainsail_kernels import reference
from mainsail_kernels._triton import next_power_of_2, require, runs_kernels, tl, triton

TILE = 16
"""Rows of a tile: the least that a matrix unit takes."""
MAX_PARTS = 3
_DOWN_INPUTS = 128
_UP_OUTPUTS = 64


@triton.jit
def _down_kernel(
    x_ptr, down_ptr, mid_ptr, rows_ptr, slots_ptr, inputs, mid_width, x_stride,
    TILE: tl.constexpr, RANKS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    slot = tl.load(slots_ptr + tile).to(tl.int64)
    places = tile * TILE + tl.arange(0, TILE)
    rows = tl.load(rows_ptr + places).to(tl.int64)
    ranks = tl.program_id(1) * RANKS + tl.arange(0, RANKS)
    total = tl.zeros((TILE, RANKS), tl.float32)
    for first in range(0, inputs, INPUTS):
        channel = first + tl.arange(0, INPUTS)
        inside = channel < inputs
        x_at = x_ptr + rows[:, None] * x_stride + channel[None, :]
        x = tl.load(x_at, mask=(rows >= 0)[:, None] & inside[None, :], other=0.0)
        down_at = down_ptr + (slot * mid_width + ranks)[:, None] * inputs + channel[None, :]
        down = tl.load(down_at, mask=(ranks < mid_width)[:, None] & inside[None, :], other=0.0)
        total += tl.dot(x, tl.trans(down), input_precision="ieee")
    tl.store(mid_ptr + places[:, None] * mid_width + ranks[None, :], total, mask=(ranks < mid_width)[None, :])


@triton.jit
def _up_kernel(
    y_ptr, up_ptr, mid_ptr, rows_ptr, slots_ptr, part0, part1, part2, y_stride,
    TILE: tl.constexpr, PARTS: tl.constexpr, RANK: tl.constexpr, RANK_PADDED: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    tile, block = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slots_ptr + tile).to(tl.int64)
    blocks0, blocks1 = tl.cdiv(part0, OUTPUTS), tl.cdiv(part1, OUTPUTS)
    part = (block >= blocks0).to(tl.int32) + (block >= blocks0 + blocks1).to(tl.int32)
    before = tl.where(part == 0, 0, tl.where(part == 1, blocks0, blocks0 + blocks1))
    first = tl.where(part == 0, 0, tl.where(part == 1, part0, part0 + part1))
    size = tl.where(part == 0, part0, tl.where(part == 1, part1, part2))
    within = (block - before) * OUTPUTS + tl.arange(0, OUTPUTS)
    outputs, inside = first + within, within < size
    places = tile * TILE + tl.arange(0, TILE)
    rows = tl.load(rows_ptr + places).to(tl.int64)
    rank = tl.arange(0, RANK_PADDED)
    mid_at = mid_ptr + places[:, None] * (PARTS * RANK) + part * RANK + rank[None, :]
    mid = tl.load(mid_at, mask=(rank < RANK)[None, :], other=0.0)
    up_at = up_ptr + (slot * (part0 + part1 + part2) + outputs)[:, None] * RANK + rank[None, :]
    up = tl.load(up_at, mask=inside[:, None] & (rank < RANK)[None, :], other=0.0)
    added = tl.dot(mid.to(up.dtype), tl.trans(up), input_precision="ieee")
    y_at = y_ptr + rows[:, None] * y_stride + outputs[None, :]
    real = (rows >= 0)[:, None] & inside[None, :]
    y = tl.load(y_at, mask=real, other=0.0).to(tl.float32)
    tl.store(y_at, (y + added).to(y_ptr.dtype.element_ty), mask=real)


def add_lora(
    y: torch.Tensor, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor, parts: Sequence[int],
    rows: torch.Tensor, slots: torch.Tensor,
) -> None:  # fmt: skip
    """Add to rows of y [n, outputs], in place, what each one's adapter makes of the same row of x [n, inputs].

    down [num_slots, len(parts) * rank, inputs] and up [num_slots, outputs, rank] in x's dtype; parts: outputs of each
    part, at most three, together all; rows [tiles * TILE] int32, the rows of each tile (-1: none), no row twice;
    slots [tiles] int32, each tile's adapter. ValueError on shapes that do not fit.
    """
    rank = up.shape[2]
    fits = (
        1 <= len(parts) <= MAX_PARTS and sum(parts) == y.shape[1] == up.shape[1]
        and down.shape[1:] == (len(parts) * rank, x.shape[1]) and rows.shape[0] == TILE * slots.shape[0]
    )  # fmt: skip
    require(fits, f"add_lora: y {tuple(y.shape)}, x {tuple(x.shape)}, down {tuple(down.shape)}, up {tuple(up.shape)}")
    if not runs_kernels(x):
        reference.add_lora(y, x, down, up, parts, rows, slots)
        return
    require(y.stride(1) == 1 and x.stride(1) == 1, "add_lora: rows must be contiguous")
    tiles, width = slots.shape[0], len(parts) * rank
    mid = torch.empty((tiles * TILE, width), dtype=torch.float32, device=x.device)
    ranks = min(64, max(16, next_power_of_2(width)))
    _down_kernel[tiles, -(-width // ranks)](
        x, down, mid, rows, slots, x.shape[1], width, x.stride(0),
        TILE=TILE, RANKS=ranks, INPUTS=_DOWN_INPUTS,
    )  # fmt: skip
    sizes = (*parts, 0, 0)[:MAX_PARTS]
    _up_kernel[tiles, sum(-(-part // _UP_OUTPUTS) for part in parts)](
        y, up, mid, rows, slots, *sizes, y.stride(0),
        TILE=TILE, PARTS=len(parts), RANK=rank, RANK_PADDED=max(16, next_power_of_2(rank)), OUTPUTS=_UP_OUTPUTS,
    )  # fmt: skip


def tiles_of(adapters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(rows [tiles * TILE] int32, slots [tiles] int32) for add_lora, of each row's adapter [n] (-1: none)."""
    rows: list[np.ndarray] = []
    slots: list[int] = []
    for slot in np.unique(adapters[adapters >= 0]):
        own = np.nonzero(adapters == slot)[0]
        tiles = -(-len(own) // TILE)
        padded = np.full(tiles * TILE, -1, np.int32)
        padded[: len(own)] = own
        rows.append(padded)
        slots += [int(slot)] * tiles
    return np.concatenate(rows) if rows else np.empty(0, np.int32), np.array(slots, np.int32)
