"""Attention of long chunks on Hopper, over the paged KV cache: one warp fetches, two groups of four compute.

The same function as attention_prefill's kernel, for the GPU whose matrix units read shared memory by themselves (wgmma)
and whose copy engine (TMA) writes it. A program has one tile: 128 rows of one KV head (GQA packing, as there), and

    producer, 1 warp       block tables ─▶ one copy for each page and 64 channels ─▶ a ring of KV tiles
    consumers, 2 × 4 warps 64 rows each: scores of the next tile are computed while the weights of this one are taken
                           from shared memory, and one group's softmax runs beside the other's products

as in FlashAttention 3 (Shah et al., 2024). KV tiles go from the last to the first, so that only the first one or two
need the causal mask. Pages past what a row sees are never read: the copy engine fills them with zeros, and of a page
that the sequence ends in the producer clears the rest, because a weight of 0 times a stale NaN is NaN.

Written in Gluon, Triton's language below Triton, which names layouts and barriers. It has neither interpreter nor AMD
back end here: where this kernel does not apply, attention_prefill runs its own.
"""

# A kernel's constants are annotated with a name that Gluon may lack (_gluon.py): no type form to a checker.
# pyright: reportInvalidTypeForm=false

from __future__ import annotations

import torch

from mainsail_kernels._attention import LOG2_E
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
    wait_for_inputs,
    wait_for_kernel_before,
)
from mainsail_kernels._triton import dependent_launch, next_power_of_2

BLOCK_M = 128
PAGE = 16
STAGES = 2


@gluon.jit
def fetch_pages(
    desc, table, tile, last, head_row, block_rows, num_rows, ring, stage, barrier,
    DIM: gl.constexpr, COLUMNS: gl.constexpr, SIZE: gl.constexpr,
):  # fmt: skip
    """Queue the copies of one tile's pages into the ring, each of so many columns of so many bytes; the barrier tells
    when they have landed."""
    PARTS: gl.constexpr = DIM // COLUMNS
    PAGES: gl.constexpr = 128 // 16
    mbarrier.expect(barrier, 128 * DIM * SIZE)
    for page in gl.static_range(PAGES):
        at = tile * PAGES + page
        row = num_rows  # behind the end: zeros
        if at * 16 < last:
            row = gl.load(table + at) * block_rows + head_row
        for part in gl.static_range(PARTS):
            target = ring.index((stage * PARTS + part) * PAGES + page)
            load_tile(desc, [row, part * COLUMNS], barrier, target)


@gluon.jit
def _clear_behind(ring, page, first, DIM: gl.constexpr):
    """Zeros in rows first to 16 of a page of the ring's first tile."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [1, 1], [1, 0])
    row = gl.arange(0, 16, gl.SliceLayout(1, LAYOUT))
    for half in gl.static_range(DIM // 64):
        part = ring.index(half * 8 + page)
        held = part.load(LAYOUT)
        part.store(gl.where((row < first)[:, None], held, gl.zeros_like(held)))


@gluon.jit
def _produce(
    desc, table, tiles, last, context_end, kv_head, num_rows, k_ring, v_ring, k_full, v_full, k_free, v_free, landed,
    KV_HEADS: gl.constexpr, DIM: gl.constexpr, STAGES: gl.constexpr, DEPENDENT: gl.constexpr,
):  # fmt: skip
    wait_for_kernel_before(DEPENDENT)
    block_rows: gl.constexpr = 2 * KV_HEADS * 16
    k_row, v_row = kv_head * 16, (KV_HEADS + kv_head) * 16
    top = tiles - 1
    fetch_pages(desc, table, top, last, k_row, block_rows, num_rows, k_ring, 0, k_full.index(0), DIM, 64, 2)
    inside = last % 16
    if (inside != 0) & ((last // 16 + 1) * 16 > context_end):
        fetch_pages(desc, table, top, last, v_row, block_rows, num_rows, v_ring, 0, landed.index(0), DIM, 64, 2)
        mbarrier.wait(landed.index(0), 0)
        _clear_behind(v_ring, last // 16 % 8, inside, DIM)
        hopper.fence_async_shared()
        group_barrier()
        mbarrier.arrive(v_full.index(0), count=1)
    else:
        fetch_pages(desc, table, top, last, v_row, block_rows, num_rows, v_ring, 0, v_full.index(0), DIM, 64, 2)
    for i in range(1, tiles):
        stage = i % STAGES
        free = (i // STAGES & 1) ^ 1
        mbarrier.wait(k_free.index(stage), free)
        fetch_pages(
            desc, table, top - i, last, k_row, block_rows, num_rows, k_ring, stage, k_full.index(stage), DIM, 64, 2
        )
        mbarrier.wait(v_free.index(stage), free)
        fetch_pages(
            desc, table, top - i, last, v_row, block_rows, num_rows, v_ring, stage, v_full.index(stage), DIM, 64, 2
        )


@gluon.jit
def wait_turn(turns, i, PART: gl.constexpr):
    """The groups queue their products in turn, the first one first: one's softmax runs beside the other's products."""
    mbarrier.wait(turns.index(PART), (i & 1) ^ (1 - PART))


@gluon.jit
def _softmax(scores, top, total, factor, position, first, MASKED: gl.constexpr, MMA: gl.constexpr):
    """(weights in bfloat16 or what they are to be multiplied with, new maxima, new sums, what older sums fade by)."""
    if MASKED:
        at = first + gl.arange(0, 128, gl.SliceLayout(0, MMA))
        scores = gl.where(at[None, :] <= position[:, None], scores, float("-inf"))
    new_top = gl.maximum(top, gl.max(scores, axis=1) * factor)
    base = new_top
    if MASKED:  # a row that has seen nothing yet keeps -inf: subtract 0 from it instead
        base = gl.where(new_top == float("-inf"), 0.0, new_top)
    weights = gl.exp2(scores * factor - base[:, None])
    fade = gl.exp2(top - base)
    return weights, new_top, total * fade + gl.sum(weights, axis=1), fade


@gluon.jit
def _range(
    acc, weights, top, total, begin, end, tiles, q, k_tiles, v_tiles, k_full, v_full, k_free, v_free, turns, factor,
    position, PART: gl.constexpr, MASKED: gl.constexpr, MMA: gl.constexpr, P: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Tiles begin to end of the order of processing; weights are those of the tile before, not yet applied."""
    for i in range(begin, end):
        stage, before = i % STAGES, (i - 1) % STAGES
        mbarrier.wait(k_full.index(stage), i // STAGES & 1)
        wait_turn(turns, i, PART)
        scores = hopper.warpgroup_mma(
            q, k_tiles.index(stage).permute((1, 0)), gl.zeros([64, 128], gl.float32, MMA), use_acc=False, is_async=True
        )
        mbarrier.wait(v_full.index(before), (i - 1) // STAGES & 1)
        sums = hopper.warpgroup_mma(weights, v_tiles.index(before), acc, is_async=True)
        mbarrier.arrive(turns.index(1 - PART), count=1)
        scores = hopper.warpgroup_mma_wait(1, deps=[scores])
        group_barrier()
        mbarrier.arrive(k_free.index(stage), count=1)
        raw, top, total, fade = _softmax(scores, top, total, factor, position, (tiles - 1 - i) * 128, MASKED, MMA)
        acc = hopper.warpgroup_mma_wait(0, deps=[sums])
        group_barrier()
        mbarrier.arrive(v_free.index(before), count=1)
        acc = acc * gl.convert_layout(fade, gl.SliceLayout(1, P.parent))[:, None]
        weights = gl.convert_layout(raw.to(v_tiles.dtype), P)
    return acc, weights, top, total


@gluon.jit
def _consume(
    query_ptr, out_ptr, start, first, num_queries, offset, kv_head, query_stride, query_head_stride, out_stride, tiles,
    masked_tiles, factor, q_tiles, k_tiles, v_tiles, k_full, v_full, k_free, v_free, turns,
    PART: gl.constexpr, GROUP: gl.constexpr, DIM: gl.constexpr, STAGES: gl.constexpr, DEPENDENT: gl.constexpr,
):  # fmt: skip
    """Rows 64 * PART to 64 * PART + 64 of the tile."""
    wait_for_inputs(DEPENDENT)
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    P: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [4, 1], [1, 0])
    row = PART * 64 + gl.arange(0, 64, gl.SliceLayout(1, ROWS))
    channel = gl.arange(0, DIM, gl.SliceLayout(0, ROWS))
    token = first + row // GROUP
    real = (token < num_queries) & (row < 128 // GROUP * GROUP)
    head = kv_head * GROUP + row % GROUP
    at = (start + token).to(gl.int64) * query_stride + head * query_head_stride
    q = q_tiles.index(PART)
    q.store(gl.load(query_ptr + at[:, None] + channel[None, :], mask=real[:, None], other=0.0))
    hopper.fence_async_shared()
    group_barrier()

    position = offset + first + (PART * 64 + gl.arange(0, 64, gl.SliceLayout(1, MMA))) // GROUP
    acc = gl.zeros([64, DIM], gl.float32, SUMS)
    top = gl.full([64], float("-inf"), gl.float32, gl.SliceLayout(1, MMA))
    total = gl.full([64], 0.0, gl.float32, gl.SliceLayout(1, MMA))
    mbarrier.wait(k_full.index(0), 0)
    wait_turn(turns, 0, PART)
    scores = hopper.warpgroup_mma(
        q, k_tiles.index(0).permute((1, 0)), gl.zeros([64, 128], gl.float32, MMA), use_acc=False, is_async=True
    )
    mbarrier.arrive(turns.index(1 - PART), count=1)
    scores = hopper.warpgroup_mma_wait(0, deps=[scores])
    group_barrier()
    mbarrier.arrive(k_free.index(0), count=1)
    raw, top, total, _ = _softmax(scores, top, total, factor, position, (tiles - 1) * 128, True, MMA)
    weights = gl.convert_layout(raw.to(v_tiles.dtype), P)
    acc, weights, top, total = _range(
        acc, weights, top, total, 1, masked_tiles, tiles, q, k_tiles, v_tiles, k_full, v_full, k_free, v_free, turns,
        factor, position, PART, True, MMA, P, STAGES,
    )  # fmt: skip
    acc, weights, top, total = _range(
        acc, weights, top, total, masked_tiles, tiles, tiles, q, k_tiles, v_tiles, k_full, v_full, k_free, v_free,
        turns, factor, position, PART, False, MMA, P, STAGES,
    )  # fmt: skip
    final = (tiles - 1) % STAGES
    mbarrier.wait(v_full.index(final), (tiles - 1) // STAGES & 1)
    sums = hopper.warpgroup_mma(weights, v_tiles.index(final), acc, is_async=True)
    acc = hopper.warpgroup_mma_wait(0, deps=[sums])
    total = gl.convert_layout(total, gl.SliceLayout(1, SUMS))
    acc = acc / gl.where(total > 0, total, 1.0)[:, None]
    result = gl.convert_layout(acc.to(v_tiles.dtype), ROWS)
    out_at = (start + token).to(gl.int64) * out_stride + head * DIM
    gl.store(out_ptr + out_at[:, None] + channel[None, :], result, mask=real[:, None])


@gluon.jit
def ring_barriers(STAGES: gl.constexpr):
    """Of rings of keys and of values: full, and free again of both groups."""
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(k_free.index(stage), count=2)
        mbarrier.init(v_free.index(stage), count=2)
    return k_full, v_full, k_free, v_free


@gluon.jit
def turn_barriers():
    """Of the two groups' turns."""
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(turns.index(0), count=1)
    mbarrier.init(turns.index(1), count=1)
    return turns


@gluon.jit
def tile_of_program(starts_ptr, num_seqs, BLOCK_Q: gl.constexpr, SEQS: gl.constexpr):
    """(its sequence, -1 if it has none; the same, 0 if it has none; the sequence's first row, how many it has; which of
    these the tile begins with). The last tiles, of the longest contexts, are those of the first programs."""
    INDEX: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    tile = gl.num_programs(1) - 1 - gl.program_id(1)
    index = gl.arange(0, SEQS, INDEX)
    bounds = gl.load(starts_ptr + index, mask=index < num_seqs, other=0) // BLOCK_Q + index
    seq = gl.sum(((bounds <= tile) & (index < num_seqs)).to(gl.int32), axis=0) - 1
    at = gl.maximum(seq, 0)
    start = gl.load(starts_ptr + at)
    num_queries = gl.load(starts_ptr + at + 1) - start
    first = (tile - (start // BLOCK_Q + seq)) * BLOCK_Q
    return seq, at, start, num_queries, first


@gluon.jit(
    do_not_specialize=["num_seqs", "table_stride", "num_rows"],
    do_not_specialize_on_alignment=["tables_ptr", "starts_ptr", "lens_ptr"],
)
def _hopper_kernel(
    desc, query_ptr, tables_ptr, starts_ptr, lens_ptr, out_ptr, num_seqs, factor, query_stride, query_head_stride,
    out_stride, table_stride, num_rows,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, DIM: gl.constexpr, SEQS: gl.constexpr, STAGES: gl.constexpr,
    DEPENDENT: gl.constexpr,
):  # fmt: skip
    BLOCK_Q: gl.constexpr = 128 // GROUP
    kv_head = gl.program_id(0)
    seq, at, start, num_queries, first = tile_of_program(starts_ptr, num_seqs, BLOCK_Q, SEQS)
    context_end = gl.load(lens_ptr + at, cache_modifier=".cg")  # past the L1: steps before had others there
    if (seq < 0) | (first >= num_queries) | (context_end <= 0):  # rows before the first chunk, or behind one's last
        wait_for_inputs(DEPENDENT)
        return
    offset = context_end - num_queries
    last = gl.minimum(first + BLOCK_Q, num_queries) + offset
    tiles = (last + 127) // 128
    masked_tiles = gl.maximum(tiles - (offset + first + 1) // 128, 1)
    table = tables_ptr + seq.to(gl.int64) * table_stride

    dtype: gl.constexpr = desc.dtype
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    q_tiles = gl.allocate_shared_memory(dtype, [2, 64, DIM], SHARED)
    k_tiles = gl.allocate_shared_memory(dtype, [STAGES, 128, DIM], SHARED)
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES, 128, DIM], SHARED)
    # A tile lies in memory as its columns' halves, one after the other, each as 8 pages of 16 rows of 128 bytes.
    k_ring = reshaped(k_tiles, [STAGES * DIM // 64 * 8, 16, 64], SHARED)
    v_ring = reshaped(v_tiles, [STAGES * DIM // 64 * 8, 16, 64], SHARED)
    k_full, v_full, k_free, v_free = ring_barriers(STAGES)
    landed = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    mbarrier.init(landed.index(0), count=1)
    turns = turn_barriers()
    hopper.fence_async_shared()

    gl.warp_specialize(
        [
            (
                _consume,
                (
                    query_ptr, out_ptr, start, first, num_queries, offset, kv_head, query_stride, query_head_stride,
                    out_stride, tiles, masked_tiles, factor, q_tiles, k_tiles, v_tiles, k_full, v_full, k_free, v_free,
                    turns, gl.constexpr(0), GROUP, DIM, STAGES, DEPENDENT,
                ),
            ),
            (
                _consume,
                (
                    query_ptr, out_ptr, start, first, num_queries, offset, kv_head, query_stride, query_head_stride,
                    out_stride, tiles, masked_tiles, factor, q_tiles, k_tiles, v_tiles, k_full, v_full, k_free, v_free,
                    turns, gl.constexpr(1), GROUP, DIM, STAGES, DEPENDENT,
                ),
            ),
            (
                _produce,
                (
                    desc, table, tiles, last, context_end, kv_head, num_rows, k_ring, v_ring, k_full, v_full, k_free,
                    v_free, landed, KV_HEADS, DIM, STAGES, DEPENDENT,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def applies(query: torch.Tensor, kv: torch.Tensor, window: int, soft_cap: float, sinks: torch.Tensor | None) -> bool:
    """Whether `launch` can serve this call of paged_attention_prefill."""
    return query.dtype == kv.dtype and fits(query, kv, window, soft_cap, sinks)


def fits(query: torch.Tensor, kv: torch.Tensor, window: int, soft_cap: float, sinks: torch.Tensor | None) -> bool:
    """Whether such a kernel can, of a cache of the right dtype."""
    head_dim, page = kv.shape[4], kv.shape[3]
    return (
        runs_gluon(query.device)
        and query.dtype in (torch.bfloat16, torch.float16)
        and head_dim in (64, 128)
        and page == PAGE
        and query.shape[1] // kv.shape[2] <= 64
        and kv.is_contiguous()
        and window == 0
        and soft_cap == 0
        and sinks is None
    )


def launch(
    query: torch.Tensor,
    kv: torch.Tensor,
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    out: torch.Tensor,
) -> None:
    """paged_attention_prefill without window, soft cap and sinks, into out; all arguments checked, and `applies`."""
    num_tokens, num_heads, head_dim = query.shape
    kv_heads, num_seqs = kv.shape[2], seq_lens.shape[0]
    group = num_heads // kv_heads
    rows = kv.view(-1, head_dim)
    grid = (kv_heads, num_tokens // (BLOCK_M // group) + num_seqs)
    _hopper_kernel[grid](
        tiled(rows, PAGE), query, block_tables, query_start, seq_lens, out, num_seqs, scale * LOG2_E, query.stride(0),
        query.stride(1), out.stride(0), block_tables.stride(0), rows.shape[0],
        KV_HEADS=kv_heads, GROUP=group, DIM=head_dim, SEQS=max(next_power_of_2(num_seqs), 256), STAGES=STAGES,
        num_warps=4, **dependent_launch(query.device),
    )  # fmt: skip
