"""A gated MLP's first half for many rows on Hopper: one warp fetches, two groups of four compute.

    producer, 1 warp       tiles of x [128, 64] and of gate and up [128, 64] each ─▶ a ring in shared memory
    consumers, 2 × 4 warps 64 rows × 128 outputs of the gate and the same 128 of up

Programs stay for the whole launch and take tile after tile, so the producer fetches the next one's while the last
one's results are stored. Tiles go through the rows in groups, so that a group's x stays in the L2 cache.
It saves a pass over [n, 2 * d]: the gate is applied to the sums in registers. See _gluon.py.
"""

# A kernel's constants are annotated with a name that Gluon may lack (_gluon.py): no type form to a checker.
# pyright: reportInvalidTypeForm=false

from __future__ import annotations

import torch

from mainsail_kernels._gluon import (
    gl,
    gluon,
    group_barrier,
    hopper,
    load_tile,
    mbarrier,
    reshaped,
    runs_gluon,
    tiled,
)
from mainsail_kernels._triton import multiprocessors

STAGES = 4
GROUP = 16
"""Tiles of rows whose products with one tile of the weight follow one another."""


@gluon.jit
def _place(tile, m_tiles, n_tiles, GROUP: gl.constexpr):
    """(row tile, output tile) of a number: by groups of rows, rows fastest."""
    span = GROUP * n_tiles
    first = tile // span * GROUP
    rows = gl.minimum(m_tiles - first, GROUP)
    inside = tile % span
    return first + inside % rows, inside // rows


@gluon.jit
def _produce(
    x_desc, weight_desc, x_ring, weight_ring, full, free, num_out, m_tiles, n_tiles, k_tiles,
    GROUP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    step = 0
    for tile in range(gl.program_id(0), m_tiles * n_tiles, gl.num_programs(0)):
        m, n = _place(tile, m_tiles, n_tiles, GROUP)
        for k in range(k_tiles):
            stage = step % STAGES
            mbarrier.wait(free.index(stage), (step // STAGES & 1) ^ 1)
            barrier = full.index(stage)
            mbarrier.expect(barrier, (128 + 256) * 64 * 2)
            load_tile(x_desc, [m * 128, k * 64], barrier, x_ring.index(stage))
            load_tile(weight_desc, [n * 128, k * 64], barrier, weight_ring.index(2 * stage))
            load_tile(weight_desc, [n * 128 + num_out, k * 64], barrier, weight_ring.index(2 * stage + 1))
            step += 1


@gluon.jit
def _consume(
    out_ptr, x_tiles, weight_tiles, full, free, num_rows, num_out, m_tiles, n_tiles, k_tiles,
    PART: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16])
    step = 0
    for tile in range(gl.program_id(0), m_tiles * n_tiles, gl.num_programs(0)):
        m, n = _place(tile, m_tiles, n_tiles, GROUP)
        acc = gl.zeros([64, 256], gl.float32, MMA)
        for k in range(k_tiles):
            stage = step % STAGES
            mbarrier.wait(full.index(stage), step // STAGES & 1)
            queued = hopper.warpgroup_mma(
                x_tiles.index(2 * stage + PART), weight_tiles.index(stage).permute((1, 0)), acc, is_async=True
            )
            acc = hopper.warpgroup_mma_wait(1, deps=[queued])
            if k > 0:  # the product before has ended: its tiles may be overwritten
                group_barrier()
                mbarrier.arrive(free.index((step + STAGES - 1) % STAGES), count=1)
            step += 1
        acc = hopper.warpgroup_mma_wait(0, deps=[acc])
        group_barrier()
        mbarrier.arrive(free.index((step + STAGES - 1) % STAGES), count=1)
        gate, up = acc.reshape([64, 2, 128]).permute([0, 2, 1]).split()
        result = gate / (1.0 + gl.exp(-gate)) * up
        row = m * 128 + PART * 64 + gl.arange(0, 64, gl.SliceLayout(1, result.type.layout))
        output = n * 128 + gl.arange(0, 128, gl.SliceLayout(0, result.type.layout))
        at = row.to(gl.int64)[:, None] * num_out + output[None, :]
        fits = (row < num_rows)[:, None] & (output < num_out)[None, :]
        gl.store(out_ptr + at, result.to(out_ptr.dtype.element_ty), mask=fits)


@gluon.jit(do_not_specialize=["num_rows"])
def _linear_kernel(x_desc, weight_desc, out_ptr, num_rows, num_out, num_in, GROUP: gl.constexpr, STAGES: gl.constexpr):
    """out [num_rows, num_out] of x [num_rows, num_in] and the weight [2 * num_out, num_in], the gate first."""
    m_tiles, n_tiles, k_tiles = (num_rows + 127) // 128, (num_out + 127) // 128, (num_in + 63) // 64
    dtype: gl.constexpr = x_desc.dtype
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    x_ring = gl.allocate_shared_memory(dtype, [STAGES, 128, 64], SHARED)
    weight_tiles = gl.allocate_shared_memory(dtype, [STAGES, 256, 64], SHARED)
    x_tiles = reshaped(x_ring, [2 * STAGES, 64, 64], SHARED)
    weight_ring = reshaped(weight_tiles, [2 * STAGES, 128, 64], SHARED)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(free.index(stage), count=2)
    hopper.fence_async_shared()
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    out_ptr, x_tiles, weight_tiles, full, free, num_rows, num_out, m_tiles, n_tiles, k_tiles,
                    gl.constexpr(0), GROUP, STAGES,
                ),
            ),
            (
                _consume,
                (
                    out_ptr, x_tiles, weight_tiles, full, free, num_rows, num_out, m_tiles, n_tiles, k_tiles,
                    gl.constexpr(1), GROUP, STAGES,
                ),
            ),
            (
                _produce,
                (
                    x_desc, weight_desc, x_ring, weight_ring, full, free, num_out, m_tiles, n_tiles, k_tiles,
                    GROUP, STAGES,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def applies(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `gated_linear` can serve this product."""
    return (
        runs_gluon(x.device)
        and x.dtype in (torch.bfloat16, torch.float16)
        and x.dtype == weight.dtype
        and x.stride(1) == weight.stride(1) == 1
        and x.stride(0) % 8 == weight.stride(0) % 8 == 0
        and x.data_ptr() % 16 == weight.data_ptr() % 16 == 0
        and x.shape[0] > 0
    )


def gated_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """silu(x @ gate.T) * (x @ up.T) for weight [2 * d, in], the gate first: [n, d]. Only where `applies`."""
    num_out = weight.shape[0] // 2
    out = torch.empty((x.shape[0], num_out), dtype=x.dtype, device=x.device)
    tiles = -(-x.shape[0] // 128) * -(-num_out // 128)
    grid = (min(multiprocessors(x.device), tiles),)
    _linear_kernel[grid](
        tiled(x, 128), tiled(weight, 128), out, x.shape[0], num_out, x.shape[1], GROUP=GROUP, STAGES=STAGES,
        num_warps=4,
    )  # fmt: skip
    return out
