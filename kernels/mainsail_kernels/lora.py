"""Low-rank adapters of many kinds in one batch (Hu et al., "LoRA", 2021): y += up @ (down @ x), each row with its own.

Rows are grouped by adapter into tiles, so that a tile's weights are read once and multiplied as matrices, decodes and
prompts alike (the idea of grouping is Punica's, Chen et al., 2023). Two kernels: the first takes a tile's rows down to
the rank, the second up again and adds. A matrix of several parts (query, key, value) has a `down` for each part:

    down[slot]   | rank rows of part 0 | rank rows of part 1 | …      up[slot]   | outputs of part 0 | of part 1 | …

Which row goes through which adapter is data on the device, and a tile may be empty (slot -1: its programs end at once).
So a captured CUDA graph, whose grid is fixed, serves any mixture of adapters that has no more tiles (`most_tiles`).

Few tiles would leave the card idle: programs share a tile's inputs, and the second kernel adds their sums in order.
Both kernels start while the one before runs, y = linear(x) and the first of the two: they may read what was there
before that one began, x and the adapter's weights in the first, the weights and y in the second.
"""

from collections.abc import Sequence

import numpy as np
import torch

from mainsail_kernels import reference
from mainsail_kernels._triton import (
    dependent_launch,
    next_power_of_2,
    require,
    runs_kernels,
    tl,
    triton,
    wait_for_inputs,
)

TILE = 16
"""Rows of a tile: the least that a matrix unit takes."""
MAX_PARTS = 3
_DOWN_INPUTS = 128
_UP_OUTPUTS = 128
"""Half as many of ranks above 64: a tile of both must fit into shared memory."""
_SHARE = 256
"""Inputs of a program at least, in the first kernel."""
_PROGRAMS = 512
"""So many programs fill the card: with more tiles, fewer share one's inputs."""


@triton.jit
def _down_kernel(
    x_ptr, down_ptr, mid_ptr, rows_ptr, slots_ptr, inputs, mid_width, share, num_places, x_stride,
    TILE: tl.constexpr, RANKS: tl.constexpr, INPUTS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    part, tile = tl.program_id(0), tl.program_id(2)
    slot = tl.load(slots_ptr + tile).to(tl.int64)
    if slot < 0:
        wait_for_inputs(DEPENDENT)
        return
    places = tile * TILE + tl.arange(0, TILE)
    rows = tl.load(rows_ptr + places).to(tl.int64)
    ranks = tl.program_id(1) * RANKS + tl.arange(0, RANKS)
    total = tl.zeros((TILE, RANKS), tl.float32)
    for first in range(part * share, tl.minimum(inputs, (part + 1) * share), INPUTS):
        channel = first + tl.arange(0, INPUTS)
        inside = channel < inputs
        x_at = x_ptr + rows[:, None] * x_stride + channel[None, :]
        x = tl.load(x_at, mask=(rows >= 0)[:, None] & inside[None, :], other=0.0)
        down_at = down_ptr + (slot * mid_width + ranks)[:, None] * inputs + channel[None, :]
        down = tl.load(down_at, mask=(ranks < mid_width)[:, None] & inside[None, :], other=0.0)
        total += tl.dot(x, tl.trans(down), input_precision="ieee")
    wait_for_inputs(DEPENDENT)  # before anything is written: the memory may have been the kernel's before
    mid_at = mid_ptr + (part * num_places + places).to(tl.int64)[:, None] * mid_width + ranks[None, :]
    tl.store(mid_at, total, mask=(rows >= 0)[:, None] & (ranks < mid_width)[None, :])


@triton.jit
def _up_kernel(
    y_ptr, up_ptr, mid_ptr, rows_ptr, slots_ptr, part0, part1, part2, num_shares, num_places, y_stride,
    TILE: tl.constexpr, PARTS: tl.constexpr, RANK: tl.constexpr, RANK_PADDED: tl.constexpr, OUTPUTS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    block, tile = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slots_ptr + tile).to(tl.int64)
    if slot < 0:
        wait_for_inputs(DEPENDENT)
        return
    blocks0, blocks1 = tl.cdiv(part0, OUTPUTS), tl.cdiv(part1, OUTPUTS)
    part = (block >= blocks0).to(tl.int32) + (block >= blocks0 + blocks1).to(tl.int32)
    before = tl.where(part == 0, 0, tl.where(part == 1, blocks0, blocks0 + blocks1))
    first = tl.where(part == 0, 0, tl.where(part == 1, part0, part0 + part1))
    size = tl.where(part == 0, part0, tl.where(part == 1, part1, part2))
    within = (block - before) * OUTPUTS + tl.arange(0, OUTPUTS)
    outputs, inside = first + within, within < size
    places = tile * TILE + tl.arange(0, TILE)
    rows = tl.load(rows_ptr + places).to(tl.int64)
    real = rows >= 0
    rank = tl.arange(0, RANK_PADDED)
    up_at = up_ptr + (slot * (part0 + part1 + part2) + outputs)[:, None] * RANK + rank[None, :]
    up = tl.load(up_at, mask=inside[:, None] & (rank < RANK)[None, :], other=0.0)
    y_at = y_ptr + rows[:, None] * y_stride + outputs[None, :]
    added_to = real[:, None] & inside[None, :]
    y = tl.load(y_at, mask=added_to, other=0.0).to(tl.float32)
    wait_for_inputs(DEPENDENT)
    mid_at = mid_ptr + places.to(tl.int64)[:, None] * (PARTS * RANK) + part * RANK + rank[None, :]
    known = real[:, None] & (rank < RANK)[None, :]
    mid = tl.zeros((TILE, RANK_PADDED), tl.float32)
    for _ in tl.range(0, num_shares, loop_unroll_factor=8):
        mid += tl.load(mid_at, mask=known, other=0.0)
        mid_at += num_places * (PARTS * RANK)
    added = tl.dot(mid.to(up.dtype), tl.trans(up), input_precision="ieee")
    tl.store(y_at, (y + added).to(y_ptr.dtype.element_ty), mask=added_to)


def add_lora(
    y: torch.Tensor, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor, parts: Sequence[int],
    rows: torch.Tensor, slots: torch.Tensor,
) -> None:  # fmt: skip
    """Add to rows of y [n, outputs], in place, what each one's adapter makes of the same row of x [n, inputs].

    down [num_slots, len(parts) * rank, inputs] and up [num_slots, outputs, rank] in x's dtype; parts: outputs of each
    part, at most three, together all; rows [tiles * TILE] int32, the rows of each tile (-1: none), no row twice;
    slots [tiles] int32, each tile's adapter (-1: the tile is empty). On a card x must not be what the launch right
    before this wrote: y, which comes of it, is. ValueError on shapes that do not fit.
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
    tiles, width, inputs = slots.shape[0], len(parts) * rank, x.shape[1]
    share = _share(inputs, tiles)
    shares = -(-inputs // share)
    mid = torch.empty((shares, tiles * TILE, width), dtype=torch.float32, device=x.device)
    ranks = min(64, max(16, next_power_of_2(width)))
    dependent = dependent_launch(x.device)
    _down_kernel[shares, -(-width // ranks), tiles](
        x, down, mid, rows, slots, inputs, width, share, tiles * TILE, x.stride(0),
        TILE=TILE, RANKS=ranks, INPUTS=_DOWN_INPUTS, **dependent,
    )  # fmt: skip
    sizes, outputs = (*parts, 0, 0)[:MAX_PARTS], _UP_OUTPUTS if rank <= 64 else _UP_OUTPUTS // 2
    _up_kernel[sum(-(-part // outputs) for part in parts), tiles](
        y, up, mid, rows, slots, *sizes, shares, tiles * TILE, y.stride(0),
        TILE=TILE, PARTS=len(parts), RANK=rank, RANK_PADDED=max(16, next_power_of_2(rank)), OUTPUTS=outputs,
        **dependent,
    )  # fmt: skip


def _share(inputs: int, tiles: int) -> int:
    """Inputs of each program that shares a tile's, so that there are enough programs; a multiple of _DOWN_INPUTS."""
    shares = max(1, min(-(-inputs // _SHARE), _PROGRAMS // tiles, 32))
    return -(-inputs // (shares * _DOWN_INPUTS)) * _DOWN_INPUTS


def most_tiles(rows: int, num_slots: int) -> int:
    """Tiles that so many rows make at most, whichever of num_slots adapters they go through."""
    return (rows + (TILE - 1) * min(rows, num_slots)) // TILE


def tiles_of(adapters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(rows [tiles * TILE] int32, slots [tiles] int32) for add_lora, of each row's adapter [n] (-1: none)."""
    order = np.argsort(adapters, kind="stable")
    order = order[adapters[order] >= 0]
    slots, counts = np.unique(adapters[order], return_counts=True)
    tiles: np.ndarray = -(-counts // TILE)
    rows = np.full(int(tiles.sum()) * TILE, -1, np.int32)
    first_places = TILE * (np.cumsum(tiles) - tiles)
    first_rows = np.cumsum(counts) - counts
    rows[np.repeat(first_places - first_rows, counts) + np.arange(len(order))] = order
    return rows, np.repeat(slots, tiles).astype(np.int32)
