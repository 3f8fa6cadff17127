"""Attention of long chunks on Hopper, over a KV cache in FP8 (e4m3), by its FP8 matrix units.

attention_hopper's kernel (tiles, roles, turns: see there) with operands of one byte, which are multiplied at twice the
rate. Keys are taken as they lie in the cache. The unit wants the numbers that are summed over next to one another,
which the values' tokens are not: kv_transpose has turned them, once for all of a layer's tiles. What is not in FP8 yet
becomes so here:

    queries   by one scale a row (of a token and a head), its largest number over 448
    weights   by one of 256 for all: they are 0 to 1, and e4m3 ends at 448. What they are divided by is summed before.

These units add up in fewer bits than float32 has, so that long sums lose their small terms: products of weights and
values go into a sum of their own for every tile of 128 tokens, and are added to the others in float32, as DeepSeek-V3
does for its linears (arXiv 2412.19437, 3.3.2). That sum takes no more time than the fading of the older ones.

A row's weights come out of one product and go into the other in registers, where the two count columns differently.
The values' tokens are in the order of the second (kv_transpose.token_at), so that no number changes its thread.
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
    tiled,
    wait_for_inputs,
    wait_for_kernel_before,
)
from mainsail_kernels._triton import dependent_launch, next_power_of_2
from mainsail_kernels.attention_hopper import (
    BLOCK_M,
    PAGE,
    fetch_pages,
    fits,
    ring_barriers,
    tile_of_program,
    turn_barriers,
    wait_turn,
)
from mainsail_kernels.reference_quantized import FP8

STAGES = 4


@gluon.jit
def _produce(
    k_desc, v_desc, table, first_tile, tiles, last, kv_head, num_rows, k_ring, v_tiles, k_full, v_full, k_free, v_free,
    KV_HEADS: gl.constexpr, DIM: gl.constexpr, STAGES: gl.constexpr, DEPENDENT: gl.constexpr,
):  # fmt: skip
    wait_for_kernel_before(DEPENDENT)
    block_rows: gl.constexpr = 2 * KV_HEADS * 16
    for i in range(tiles):
        stage = i % STAGES
        free = (i // STAGES & 1) ^ 1
        tile = tiles - 1 - i
        mbarrier.wait(k_free.index(stage), free)
        fetch_pages(
            k_desc, table, tile, last, kv_head * 16, block_rows, num_rows, k_ring, stage, k_full.index(stage), DIM, DIM,
            1,
        )  # fmt: skip
        mbarrier.wait(v_free.index(stage), free)
        mbarrier.expect(v_full.index(stage), 128 * DIM)
        load_tile(
            v_desc, [((first_tile + tile) * KV_HEADS + kv_head) * DIM, 0], v_full.index(stage), v_tiles.index(stage)
        )


@gluon.jit
def _softmax(scores, top, total, factor, position, first, MASKED: gl.constexpr, MMA: gl.constexpr):
    """(weights times 256 in float32, new maxima, new sums, what older sums fade by); factor is each row's."""
    if MASKED:
        at = first + gl.arange(0, 128, gl.SliceLayout(0, MMA))
        scores = gl.where(at[None, :] <= position[:, None], scores, float("-inf"))
    new_top = gl.maximum(top, gl.max(scores, axis=1) * factor)
    base = new_top
    if MASKED:  # a row that has seen nothing yet keeps -inf: subtract 0 from it instead
        base = gl.where(new_top == float("-inf"), 0.0, new_top)
    fade = gl.exp2(top - base)
    weights = gl.exp2(scores * factor[:, None] - (base - 8.0)[:, None])
    return weights, new_top, total * fade + gl.sum(weights, axis=1), fade


@gluon.jit
def _as_operand(weights, dtype: gl.constexpr, P: gl.constexpr):
    """Weights [64, 128] in FP8, their columns in kv_transpose's order: each stays in the thread that computed it."""
    eighths = weights.to(dtype).reshape([64, 4, 2, 2, 4, 2])
    return gl.convert_layout(eighths.permute((0, 1, 2, 4, 3, 5)).reshape([64, 128]), P)


@gluon.jit
def _multiply(
    weights, i, tiles, q, k_tiles, v_tiles, k_full, v_full, turns,
    PART: gl.constexpr, DIM: gl.constexpr, MMA: gl.constexpr, SUMS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Queue tile i's weights times its values, and the scores of the tile after it: (sums, scores), not there yet.

    Behind the last tile the scores are of whatever is there, and nobody takes them. Whoever has waited for both gives
    the turn away, and not before: products of two groups at once would end at once, and leave both to their softmax
    with nobody at the matrix units."""
    stage, after = i % STAGES, (i + 1) % STAGES
    mbarrier.wait(v_full.index(stage), i // STAGES & 1)
    mbarrier.wait(k_full.index(after), (i + 1) // STAGES & 1, pred=i + 1 < tiles)
    wait_turn(turns, i + 1, PART)
    sums = hopper.warpgroup_mma(
        weights, v_tiles.index(stage).permute((1, 0)), gl.zeros([64, DIM], gl.float32, SUMS), use_acc=False,
        is_async=True,
    )  # fmt: skip
    scores = hopper.warpgroup_mma(
        q, k_tiles.index(after).permute((1, 0)), gl.zeros([64, 128], gl.float32, MMA), use_acc=False, is_async=True
    )
    return sums, scores


@gluon.jit
def _range(
    acc, sums, scores, top, total, fade, begin, end, tiles, q, k_tiles, v_tiles, k_full, v_full, k_free, v_free, turns,
    factor, position, PART: gl.constexpr, MASKED: gl.constexpr, DIM: gl.constexpr, MMA: gl.constexpr,
    SUMS: gl.constexpr, P: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Tiles begin to end of the order of processing. sums and scores are on their way: the sums of the tile before,
    and the scores of this one; fade is what the sums before those fade by."""
    for i in range(begin, end):
        sums, scores = hopper.warpgroup_mma_wait(0, deps=[sums, scores])
        group_barrier()
        mbarrier.arrive(turns.index(1 - PART), count=1)
        mbarrier.arrive(k_free.index(i % STAGES), count=1)
        mbarrier.arrive(v_free.index((i - 1) % STAGES), count=1)
        acc = acc * gl.convert_layout(fade, gl.SliceLayout(1, SUMS))[:, None] + sums
        raw, top, total, fade = _softmax(scores, top, total, factor, position, (tiles - 1 - i) * 128, MASKED, MMA)
        weights = _as_operand(raw, v_tiles.dtype, P)
        sums, scores = _multiply(
            weights, i, tiles, q, k_tiles, v_tiles, k_full, v_full, turns, PART, DIM, MMA, SUMS, STAGES
        )
    return acc, sums, scores, top, total, fade


@gluon.jit
def _consume(
    query_ptr, out_ptr, start, first, num_queries, offset, kv_head, query_stride, query_head_stride, out_stride, tiles,
    masked_tiles, factor, q_tiles, k_tiles, v_tiles, k_full, v_full, k_free, v_free, turns,
    PART: gl.constexpr, GROUP: gl.constexpr, DIM: gl.constexpr, STAGES: gl.constexpr, DEPENDENT: gl.constexpr,
):  # fmt: skip
    """Rows 64 * PART to 64 * PART + 64 of the tile."""
    wait_for_inputs(DEPENDENT)
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 32])
    P: gl.constexpr = gl.DotOperandLayout(0, SUMS, 4)
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [4, 1], [1, 0])
    row = PART * 64 + gl.arange(0, 64, gl.SliceLayout(1, ROWS))
    channel = gl.arange(0, DIM, gl.SliceLayout(0, ROWS))
    token = first + row // GROUP
    real = (token < num_queries) & (row < 128 // GROUP * GROUP)
    head = kv_head * GROUP + row % GROUP
    at = (start + token).to(gl.int64) * query_stride + head * query_head_stride
    q = q_tiles.index(PART)
    held = gl.load(query_ptr + at[:, None] + channel[None, :], mask=real[:, None], other=0.0).to(gl.float32)
    largest = gl.maximum(gl.max(gl.abs(held), axis=1), 1e-30)
    q.store((held * (448.0 / largest)[:, None]).to(q_tiles.dtype))
    factor = gl.convert_layout(largest * (factor / 448.0), gl.SliceLayout(1, MMA))
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
    scores = hopper.warpgroup_mma_wait(0, deps=[scores])
    group_barrier()
    mbarrier.arrive(turns.index(1 - PART), count=1)
    mbarrier.arrive(k_free.index(0), count=1)
    raw, top, total, fade = _softmax(scores, top, total, factor, position, (tiles - 1) * 128, True, MMA)
    weights = _as_operand(raw, v_tiles.dtype, P)
    sums, scores = _multiply(
        weights, 0, tiles, q, k_tiles, v_tiles, k_full, v_full, turns, PART, DIM, MMA, SUMS, STAGES
    )
    acc, sums, scores, top, total, fade = _range(
        acc, sums, scores, top, total, fade, 1, masked_tiles, tiles, q, k_tiles, v_tiles, k_full, v_full, k_free,
        v_free, turns, factor, position, PART, True, DIM, MMA, SUMS, P, STAGES,
    )  # fmt: skip
    acc, sums, scores, top, total, fade = _range(
        acc, sums, scores, top, total, fade, masked_tiles, tiles, tiles, q, k_tiles, v_tiles, k_full, v_full, k_free,
        v_free, turns, factor, position, PART, False, DIM, MMA, SUMS, P, STAGES,
    )  # fmt: skip
    sums, scores = hopper.warpgroup_mma_wait(0, deps=[sums, scores])
    group_barrier()
    mbarrier.arrive(turns.index(1 - PART), count=1)
    acc = acc * gl.convert_layout(fade, gl.SliceLayout(1, SUMS))[:, None] + sums
    total = gl.convert_layout(total, gl.SliceLayout(1, SUMS))
    acc = acc / gl.where(total > 0, total, 1.0)[:, None]
    result = gl.convert_layout(acc.to(out_ptr.dtype.element_ty), ROWS)
    out_at = (start + token).to(gl.int64) * out_stride + head * DIM
    gl.store(out_ptr + out_at[:, None] + channel[None, :], result, mask=real[:, None])


@gluon.jit(
    do_not_specialize=["num_seqs", "table_stride", "num_rows"],
    do_not_specialize_on_alignment=["tables_ptr", "starts_ptr", "first_tiles_ptr", "lens_ptr"],
)
def _hopper_fp8_kernel(
    k_desc, v_desc, query_ptr, tables_ptr, starts_ptr, first_tiles_ptr, lens_ptr, out_ptr, num_seqs, factor,
    query_stride, query_head_stride, out_stride, table_stride, num_rows,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, DIM: gl.constexpr, SEQS: gl.constexpr, STAGES: gl.constexpr,
    DEPENDENT: gl.constexpr,
):  # fmt: skip
    BLOCK_Q: gl.constexpr = 128 // GROUP
    kv_head = gl.program_id(0)
    seq, at, start, num_queries, first = tile_of_program(starts_ptr, num_seqs, BLOCK_Q, SEQS)
    context_end = gl.load(lens_ptr + at, cache_modifier=".cg")  # written in this step: past the L1
    if (seq < 0) | (first >= num_queries) | (context_end <= 0):  # rows before the first chunk, or behind one's last
        wait_for_inputs(DEPENDENT)
        return
    first_tile = gl.load(first_tiles_ptr + at, cache_modifier=".cg")
    offset = context_end - num_queries
    last = gl.minimum(first + BLOCK_Q, num_queries) + offset
    tiles = (last + 127) // 128
    masked_tiles = gl.maximum(tiles - (offset + first + 1) // 128, 1)
    table = tables_ptr + seq.to(gl.int64) * table_stride

    dtype: gl.constexpr = k_desc.dtype
    ROWS: gl.constexpr = gl.NVMMASharedLayout(DIM, 8, 2)
    TURNED: gl.constexpr = gl.NVMMASharedLayout(128, 8, 2)
    q_tiles = gl.allocate_shared_memory(dtype, [2, 64, DIM], ROWS)
    k_tiles = gl.allocate_shared_memory(dtype, [STAGES, 128, DIM], ROWS)
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES, DIM, 128], TURNED)
    k_ring = reshaped(k_tiles, [STAGES * 8, 16, DIM], ROWS)
    k_full, v_full, k_free, v_free = ring_barriers(STAGES)
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
                    k_desc, v_desc, table, first_tile, tiles, last, kv_head, num_rows, k_ring, v_tiles, k_full, v_full,
                    k_free, v_free, KV_HEADS, DIM, STAGES, DEPENDENT,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def applies(query: torch.Tensor, kv: torch.Tensor, window: int, soft_cap: float, sinks: torch.Tensor | None) -> bool:
    """Whether `launch` can serve this call of paged_attention_prefill, where it is given room for transposed values."""
    return kv.dtype == FP8 and fits(query, kv, window, soft_cap, sinks)


def launch(
    query: torch.Tensor,
    kv: torch.Tensor,
    room: torch.Tensor,
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    first_tiles: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    out: torch.Tensor,
) -> None:
    """paged_attention_prefill without window, soft cap and sinks, into out; all arguments checked, and `applies`.
    Values are taken from room, where `kv_transpose.transpose_values` put them (and said first_tiles and seq_lens)."""
    num_tokens, num_heads, head_dim = query.shape
    kv_heads, num_seqs = kv.shape[2], seq_lens.shape[0]
    group = num_heads // kv_heads
    rows = kv.view(-1, head_dim)
    grid = (kv_heads, num_tokens // (BLOCK_M // group) + num_seqs)
    _hopper_fp8_kernel[grid](
        tiled(rows, PAGE), tiled(room.view(-1, room.shape[3]), head_dim), query, block_tables, query_start, first_tiles,
        seq_lens, out, num_seqs, scale * LOG2_E, query.stride(0), query.stride(1), out.stride(0),
        block_tables.stride(0), rows.shape[0],
        KV_HEADS=kv_heads, GROUP=group, DIM=head_dim, SEQS=max(next_power_of_2(num_seqs), 256), STAGES=STAGES,
        num_warps=4, **dependent_launch(query.device),
    )  # fmt: skip
