"""Decode attention on Hopper: programs that stay, each with an equal share of all tiles of all sequences.

    producer, 1 warp      tiles of 128 keys and values, page by page, by the copy engine ─▶ a ring in shared memory
    consumer, 4 warps     scores of a tile, their softmax, and what the values add

A KV head has as many programs as another, and the tiles of all sequences lie in one row: program p of P takes those
from T * p // P to T * (p + 1) // P. So whatever the lengths are, all end at the same time; the programs of one number
read the same blocks at the same time, each its head's part; and the producer runs ahead from one sequence to the next,
so that the ring is always being filled. A sequence that several programs share is combined by the last of them to
arrive; a program shares at most two, the one it begins with and the one it ends with, so its number says where it
leaves its part.

Products are transposed: keys and values are the long side of the matrix unit's tile straight from shared memory, and
the group's queries, at most 8, its short side:

    scores [128, 8] = keys [128, dim] @ queries.T          sums [dim, 8] += values.T @ weights [128, 8]

so no row of the unit is wasted on heads that are not there. A cache in FP8 lies in shared memory as words of two
numbers, which become float16 on their way to registers, from where the unit takes its long side as well: even channels
are one product, odd ones another.

Written in Gluon like attention_hopper; where it does not apply, attention_decode's own kernel serves.
"""

# A kernel's constants are annotated with a name that Gluon may lack (_gluon.py): no type form to a checker.
# pyright: reportInvalidTypeForm=false

from __future__ import annotations

import torch

from mainsail_kernels._attention import LOG2_E
from mainsail_kernels._fp8 import LOWER_E4M3, UPPER_E4M3
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
from mainsail_kernels._triton import dependent_launch, multiprocessors, next_power_of_2, require
from mainsail_kernels.reference_quantized import FP8

PAGE = 16
STAGES = 3
NEWEST = gl.constexpr(64)
"""Positions at the end of a sequence that the kernel before may be writing still. All others may be read at once."""
MOST_SEQUENCES = 512
"""Whose lengths a warp can hold."""


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _tiles(lens_ptr, num_seqs, SEQS: gl.constexpr, INDEX: gl.constexpr):
    """(lengths, tiles of each, running sums of these) of the sequences."""
    index = gl.arange(0, SEQS, INDEX)
    lens = gl.load(lens_ptr + index, mask=index < num_seqs, other=0)
    tiles = (lens + 127) // 128
    return lens, tiles, gl.associative_scan(tiles, 0, _add)


@gluon.jit
def _segment(at, stop, lens, tiles, ends, SEQS: gl.constexpr, INDEX: gl.constexpr):
    """What a program at tile `at` of all does next: (sequence, its tile there, the sequence's tiles, how many of them
    are this program's, the sequence's length)."""
    index = gl.arange(0, SEQS, INDEX)
    seq = gl.sum((ends <= at).to(gl.int32), axis=0)
    mine = index == seq
    count = gl.sum(gl.where(mine, tiles, 0), axis=0)
    tile = at - gl.sum(gl.where(mine, ends, 0), axis=0) + count
    return seq, tile, count, gl.minimum(count - tile, stop - at), gl.sum(gl.where(mine, lens, 0), axis=0)


@gluon.jit
def _programs(total, KV_HEADS: gl.constexpr):
    """How many of a head's programs take tiles: each at least one."""
    return gl.maximum(gl.minimum(gl.num_programs(0) // KV_HEADS, total), 1)


@gluon.jit
def _share(total, KV_HEADS: gl.constexpr):
    """The tiles of all that this program takes, from the first to the second; programs past the tiles take none."""
    program, programs = (gl.program_id(0) // KV_HEADS).to(gl.int64), _programs(total, KV_HEADS)
    first, stop = total * program // programs, total * (program + 1) // programs
    return gl.minimum(first, total).to(gl.int32), gl.minimum(stop, total).to(gl.int32)


@gluon.jit
def _owner(tile, total, KV_HEADS: gl.constexpr):
    """Which of a head's programs has this tile of all."""
    return (((tile + 1).to(gl.int64) * _programs(total, KV_HEADS) - 1) // total).to(gl.int32)


@gluon.jit
def _page(table, at, end, num_blocks):
    """The block of a page; past the end one behind the cache, whose rows the copy engine fills with zeros."""
    return gl.load(table + at, mask=at * 16 < end, other=num_blocks)


@gluon.jit
def _pages(table, at, end, num_blocks):
    """The blocks of a tile's eight pages."""
    return (
        _page(table, at, end, num_blocks),
        _page(table, at + 1, end, num_blocks),
        _page(table, at + 2, end, num_blocks),
        _page(table, at + 3, end, num_blocks),
        _page(table, at + 4, end, num_blocks),
        _page(table, at + 5, end, num_blocks),
        _page(table, at + 6, end, num_blocks),
        _page(table, at + 7, end, num_blocks),
    )


@gluon.jit
def _fetch_page(desc, row, barrier, ring, stage, PAGE_IN_TILE: gl.constexpr, WORDS: gl.constexpr):
    for half in gl.static_range(WORDS // 64):
        load_tile(desc, [row, half * 64], barrier, ring.index((stage * (WORDS // 64) + half) * 8 + PAGE_IN_TILE))


@gluon.jit
def _fetch(
    desc, p0, p1, p2, p3, p4, p5, p6, p7, side, ring, stage, full, free, phase,
    ROWS: gl.constexpr, WORDS: gl.constexpr,
):  # fmt: skip
    """Queue the copies of one tile's keys or values; `side` is where they begin in a block of ROWS rows."""
    barrier = full.index(stage)
    mbarrier.wait(free.index(stage), phase)
    mbarrier.expect(barrier, 128 * WORDS * 2)
    _fetch_page(desc, p0 * ROWS + side, barrier, ring, stage, 0, WORDS)
    _fetch_page(desc, p1 * ROWS + side, barrier, ring, stage, 1, WORDS)
    _fetch_page(desc, p2 * ROWS + side, barrier, ring, stage, 2, WORDS)
    _fetch_page(desc, p3 * ROWS + side, barrier, ring, stage, 3, WORDS)
    _fetch_page(desc, p4 * ROWS + side, barrier, ring, stage, 4, WORDS)
    _fetch_page(desc, p5 * ROWS + side, barrier, ring, stage, 5, WORDS)
    _fetch_page(desc, p6 * ROWS + side, barrier, ring, stage, 6, WORDS)
    _fetch_page(desc, p7 * ROWS + side, barrier, ring, stage, 7, WORDS)


@gluon.jit
def _produce(
    desc, tables_ptr, lens_ptr, num_seqs, table_stride, num_blocks, k_ring, v_ring, k_full, v_full, k_free, v_free,
    KV_HEADS: gl.constexpr, WORDS: gl.constexpr, SEQS: gl.constexpr, STAGES: gl.constexpr,
    BESIDE: gl.constexpr, DEPENDENT: gl.constexpr,
):  # fmt: skip
    """The warp that fetches: this program's tiles, one after the other, whatever sequence they are of."""
    INDEX: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    ROWS: gl.constexpr = 2 * KV_HEADS * 16
    lens, tiles, ends = _tiles(lens_ptr, num_seqs, SEQS, INDEX)
    kv_head = gl.program_id(0) % KV_HEADS
    current, stop = _share(gl.sum(tiles, axis=0), KV_HEADS)
    seq, tile, _count, mine, end = _segment(current, stop, lens, tiles, ends, SEQS, INDEX)
    table = seq.to(gl.int64) * table_stride
    at = tile * 8
    p0, p1, p2, p3, p4, p5, p6, p7 = _pages(tables_ptr + table, at, end, num_blocks)
    early = 1
    step = 0
    while current < stop:
        current += mine
        seq, tile_2, _count_2, mine_2, end_2 = _segment(current, stop, lens, tiles, ends, SEQS, INDEX)
        table_2 = seq.to(gl.int64) * table_stride
        for i in range(mine):
            stage = step % STAGES
            phase = (step // STAGES & 1) ^ 1
            at += 8
            final = i == mine - 1  # the next tile is of the next sequence
            near = tables_ptr + gl.where(final, table_2, table)
            place = gl.where(final, tile_2 * 8, at)
            limit = gl.where(final, end_2, end)
            # The next tile's, while this one's copies are queued.
            n0, n1, n2, n3, n4, n5, n6, n7 = _pages(near, place, limit, num_blocks)
            if not BESIDE:  # noqa: SIM102 - a constant, which `and` would not be
                if (early == 1) & (at * 16 + NEWEST > end):  # the first tile that the kernel before may have written to
                    wait_for_kernel_before(DEPENDENT)
                    early = 0
            _fetch(
                desc, p0, p1, p2, p3, p4, p5, p6, p7, kv_head * 16, k_ring, stage, k_full, k_free, phase,
                ROWS, WORDS,
            )  # fmt: skip
            _fetch(
                desc, p0, p1, p2, p3, p4, p5, p6, p7, (KV_HEADS + kv_head) * 16, v_ring, stage, v_full, v_free, phase,
                ROWS, WORDS,
            )  # fmt: skip
            p0, p1, p2, p3, p4, p5, p6, p7 = n0, n1, n2, n3, n4, n5, n6, n7
            step += 1
        table, at, mine, end = table_2, tile_2 * 8, mine_2, end_2


@gluon.jit
def _clear_behind(ring, stage, inside, WORDS: gl.constexpr):
    """Zeros in the rows of a tile's page behind the end of its sequence: a weight of 0 times a stale NaN is NaN."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    row = gl.arange(0, 16, gl.SliceLayout(1, LAYOUT))
    for half in gl.static_range(WORDS // 64):
        part = ring.index((stage * (WORDS // 64) + half) * 8 + inside // 16)
        held = part.load(LAYOUT)
        part.store(gl.where((row < inside % 16)[:, None], held, gl.zeros_like(held)))
    hopper.fence_async_shared()
    group_barrier()


@gluon.jit
def _slot(program, ends):
    """Where a program leaves the part of the sequence that it ends with, or begins with, of those it shares."""
    return 2 * program + ends.to(gl.int32)


@gluon.jit
def _combine(
    partial_ptr, stats_ptr, first, last, kv_head, KV_HEADS: gl.constexpr, DIM: gl.constexpr, GROUP: gl.constexpr,
    MMA: gl.constexpr,
):  # fmt: skip
    """The normalized result [dim, 8] of the parts that programs first to last left."""
    channel = gl.arange(0, DIM, gl.SliceLayout(1, MMA))
    head = gl.arange(0, 8, gl.SliceLayout(0, MMA))
    acc = gl.zeros([DIM, 8], gl.float32, MMA)
    top = gl.full([8], float("-inf"), gl.float32, gl.SliceLayout(0, MMA))
    total = gl.full([8], 0.0, gl.float32, gl.SliceLayout(0, MMA))
    for base in range(first, last + 1, 4):
        for i in gl.static_range(4):  # their loads are on the way together
            program = base + i
            inside = program <= last
            slot = _slot(program * KV_HEADS + kv_head, program == first) * GROUP + head
            real = (head < GROUP) & inside
            part_top = gl.load(stats_ptr + slot * 2, mask=real, other=float("-inf"), cache_modifier=".cg")
            part_total = gl.load(stats_ptr + slot * 2 + 1, mask=real, other=0.0, cache_modifier=".cg")
            at = partial_ptr + slot[None, :] * DIM + channel[:, None]
            part = gl.load(at, mask=real[None, :] & (channel < DIM)[:, None], other=0.0, cache_modifier=".cg")
            new_top = gl.maximum(top, part_top)
            base_top = gl.where(new_top == float("-inf"), 0.0, new_top)
            fade, gain = gl.exp2(top - base_top), gl.exp2(part_top - base_top)
            acc = acc * fade[None, :] + part * gain[None, :]
            total = total * fade + part_total * gain
            top = new_top
    return acc / gl.where(total > 0, total, 1.0)[None, :]


@gluon.jit
def _clear_padding(out_ptr, lens_ptr, num_seqs, WIDTH: gl.constexpr):
    """Zeros in the rows of sequences that are none."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([8], [32], [4], [0])
    column = gl.arange(0, 1024, LAYOUT)
    for row in range(gl.program_id(0), num_seqs, gl.num_programs(0)):
        if gl.load(lens_ptr + row) == 0:
            zeros = gl.full([1024], 0.0, out_ptr.dtype.element_ty, LAYOUT)
            for first in range(0, WIDTH, 1024):
                at = first + column
                gl.store(out_ptr + row.to(gl.int64) * WIDTH + at, zeros, mask=at < WIDTH)


@gluon.jit
def _queries(
    query_ptr, seq, kv_head, real, query_stride, query_head_stride, GROUP: gl.constexpr, DIM: gl.constexpr,
    ROWS: gl.constexpr,
):  # fmt: skip
    """[8, dim]: the group's queries, zeros behind them. Not by way of the first cache, which nobody empties when a
    program starts beside the kernel before."""
    row = gl.arange(0, 8, gl.SliceLayout(1, ROWS))
    column = gl.arange(0, DIM, gl.SliceLayout(0, ROWS))
    at = seq.to(gl.int64) * query_stride + (kv_head * GROUP + row) * query_head_stride
    return gl.load(
        query_ptr + at[:, None] + column[None, :], mask=((row < GROUP) & real)[:, None], other=0.0,
        cache_modifier=".cg",
    )  # fmt: skip


@gluon.jit
def _even_and_odd(queries, DIM: gl.constexpr):
    """(even, odd [8, dim // 2] float16, largest [8]): the channels of queries [8, dim], times 256 over largest."""
    HALF: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [4, 1], [1, 0])
    wide = queries.to(gl.float32)
    largest = gl.max(gl.abs(wide), axis=1)
    wide = wide * gl.where(largest > 0, 256.0 / largest, 0.0)[:, None]
    even, odd = gl.split(gl.reshape(wide, [8, DIM // 2, 2]))
    even, odd = gl.convert_layout(even, HALF), gl.convert_layout(odd, HALF)
    return even.to(gl.float16), odd.to(gl.float16), gl.where(largest > 0, largest, 1.0)


@gluon.jit
def _pairs_in_float16(words):
    """As _fp8.e4m3_pairs: of words that hold two e4m3 numbers each the lower ones and the upper ones, over 256."""
    lower = gl.inline_asm_elementwise(LOWER_E4M3, "=r,r", [words], dtype=gl.float16, is_pure=True, pack=2)
    upper = gl.inline_asm_elementwise(UPPER_E4M3, "=r,r", [words], dtype=gl.float16, is_pure=True, pack=2)
    return lower, upper


@gluon.jit
def _store_sums(
    row_at, acc, upper, gain, WORDS: gl.constexpr, GROUP: gl.constexpr, FP8: gl.constexpr, MMA: gl.constexpr
):
    """acc * gain, a column for each head, to where the heads' rows begin; FP8: every second channel is in `upper`."""
    word = gl.arange(0, WORDS, gl.SliceLayout(1, MMA))
    fits = (gl.arange(0, 8, gl.SliceLayout(0, MMA)) < GROUP)[None, :] & (word < WORDS)[:, None]
    kind: gl.constexpr = row_at.dtype.element_ty
    if FP8:
        at = row_at[None, :] + 2 * word[:, None]
        gl.store(at, (acc * gain[None, :]).to(kind), mask=fits)
        gl.store(at + 1, (upper * gain[None, :]).to(kind), mask=fits)
    else:
        gl.store(row_at[None, :] + word[:, None], (acc * gain[None, :]).to(kind), mask=fits)


@gluon.jit
def _scores(keys, q_tile, FP8: gl.constexpr, MMA: gl.constexpr):
    """[128, 8]: keys times queries, in FP8 the keys' over 256 and in registers."""
    zeros = gl.zeros([128, 8], gl.float32, MMA)
    if FP8:
        KEYS: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
        even, odd = _pairs_in_float16(keys.load(KEYS))
        queued = hopper.warpgroup_mma(even, q_tile.index(0).permute((1, 0)), zeros, use_acc=False, is_async=True)
        queued = hopper.warpgroup_mma(odd, q_tile.index(1).permute((1, 0)), queued, is_async=True)
    else:
        queued = hopper.warpgroup_mma(keys, q_tile.index(0).permute((1, 0)), zeros, use_acc=False, is_async=True)
    return hopper.warpgroup_mma_wait(0, deps=[queued])


@gluon.jit
def _attend(
    step, tile, mine, end, unit, q_tile, p_tile, k_tiles, v_tiles, v_ring, k_full, v_full, k_free, v_free,
    WORDS: gl.constexpr, STAGES: gl.constexpr, FP8: gl.constexpr, MMA: gl.constexpr,
):  # fmt: skip
    """(sums [WORDS, 8], in FP8 those of the odd channels, weights [128, 8], maxima [8], steps done) of `mine` tiles of
    a sequence from `tile` on; q_tile: its queries, whose scores are times unit [8]."""
    VALUES: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    acc = gl.zeros([WORDS, 8], gl.float32, MMA)
    upper = gl.zeros([WORDS, 8], gl.float32, MMA)
    sums = gl.zeros([128, 8], gl.float32, MMA)
    top = gl.full([8], float("-inf"), gl.float32, gl.SliceLayout(0, MMA))
    for i in range(tile, tile + mine):
        stage = step % STAGES
        phase = step // STAGES & 1
        mbarrier.wait(k_full.index(stage), phase)
        scores = _scores(k_tiles.index(stage), q_tile, FP8, MMA)
        group_barrier()
        mbarrier.arrive(k_free.index(stage), count=1)
        at = i * 128 + gl.arange(0, 128, gl.SliceLayout(1, MMA))
        scores = gl.where((at < end)[:, None], scores, float("-inf"))
        new_top = gl.maximum(top, gl.max(scores, axis=0) * unit)
        weights = gl.exp2(scores * unit[None, :] - new_top[None, :])
        fade = gl.exp2(top - new_top)
        sums = sums * fade[None, :] + weights
        acc = acc * fade[None, :]
        p_tile.permute((1, 0)).store(weights.to(p_tile.dtype))
        hopper.fence_async_shared()
        group_barrier()
        mbarrier.wait(v_full.index(stage), phase)
        if FP8:
            upper = upper * fade[None, :]
            words = v_tiles.index(stage).permute((1, 0)).load(VALUES)
            lower_v, upper_v = _pairs_in_float16(words)
            one = hopper.warpgroup_mma(lower_v, p_tile.permute((1, 0)), acc, is_async=True)
            two = hopper.warpgroup_mma(upper_v, p_tile.permute((1, 0)), upper, is_async=True)
            acc, upper = hopper.warpgroup_mma_wait(0, deps=[one, two])
        else:
            inside = end - i * 128
            if (inside < 128) & (inside % 16 != 0):
                _clear_behind(v_ring, stage, inside, WORDS)
            added = hopper.warpgroup_mma(
                v_tiles.index(stage).permute((1, 0)), p_tile.permute((1, 0)), acc, is_async=True
            )
            acc = hopper.warpgroup_mma_wait(0, deps=[added])
        group_barrier()
        mbarrier.arrive(v_free.index(stage), count=1)
        top = new_top
        step += 1
    return acc, upper, sums, top, step


@gluon.jit
def _leave(
    out_row, partial_ptr, stats_ptr, counters_ptr, seq, kv_head, head, current, tile, count, total_tiles, acc, upper,
    top, total, whole, KV_HEADS: gl.constexpr, GROUP: gl.constexpr, DIM: gl.constexpr, WORDS: gl.constexpr,
    FP8: gl.constexpr, MMA: gl.constexpr,
):  # fmt: skip
    """Leave this program's part of a sequence of which others have parts; the last to arrive combines them."""
    slot = _slot(gl.program_id(0), tile == 0) * GROUP + head
    _store_sums(partial_ptr + slot * DIM, acc, upper, gl.full_like(total, whole), WORDS, GROUP, FP8, MMA)
    gl.store(stats_ptr + slot * 2, top, mask=head < GROUP)
    gl.store(stats_ptr + slot * 2 + 1, total, mask=head < GROUP)
    first = _owner(current - tile, total_tiles, KV_HEADS)
    last = _owner(current - tile + count - 1, total_tiles, KV_HEADS)
    group_barrier()  # every thread's part is stored before one thread says so
    arrived = gl.atomic_add(counters_ptr + seq * KV_HEADS + kv_head, 1, sem="acq_rel")
    if arrived == last - first:
        group_barrier()
        gl.store(counters_ptr + seq * KV_HEADS + kv_head, 0)
        result = _combine(partial_ptr, stats_ptr, first, last, kv_head, KV_HEADS, DIM, GROUP, MMA)
        _store_sums(out_row, result, result, gl.full_like(total, 1.0), DIM, GROUP, False, MMA)


@gluon.jit
def _consume(
    query_ptr, out_ptr, partial_ptr, stats_ptr, counters_ptr, lens_ptr, num_seqs, factor, query_stride,
    query_head_stride, q_tile, p_tile, k_tiles, v_tiles, v_ring, k_full, v_full, k_free, v_free,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, DIM: gl.constexpr, WORDS: gl.constexpr,
    SEQS: gl.constexpr, STAGES: gl.constexpr, FP8: gl.constexpr, BESIDE: gl.constexpr, DEPENDENT: gl.constexpr,
):  # fmt: skip
    """The warps that compute: of each sequence that this program has tiles of, its part or the whole result."""
    # Each warp has all lengths: to find a sequence in them, none waits for another.
    INDEX: gl.constexpr = gl.SliceLayout(1, gl.BlockedLayout([1, 1], [32, 1], [1, 4], [0, 1]))
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 16])
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [4, 1], [1, 0])
    SCAN: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    lens, tiles, ends = _tiles(lens_ptr, num_seqs, SEQS, SCAN)
    lens, tiles, ends = gl.convert_layout(lens, INDEX), gl.convert_layout(tiles, INDEX), gl.convert_layout(ends, INDEX)
    total_tiles = gl.sum(tiles, axis=0)
    kv_head = gl.program_id(0) % KV_HEADS
    current, stop = _share(total_tiles, KV_HEADS)
    head = gl.arange(0, 8, gl.SliceLayout(0, MMA))
    padding = gl.sum((lens == 0).to(gl.int32), axis=0) - (SEQS - num_seqs)
    seq, tile, count, mine, end = _segment(current, stop, lens, tiles, ends, SEQS, INDEX)
    if not BESIDE:
        wait_for_inputs(DEPENDENT)
    queries = _queries(query_ptr, seq, kv_head, current < stop, query_stride, query_head_stride, GROUP, DIM, ROWS)
    if not BESIDE:  # noqa: SIM102
        if padding > 0:
            _clear_padding(out_ptr, lens_ptr, num_seqs, KV_HEADS * GROUP * DIM)
    step = 0
    while current < stop:
        unit = gl.full([8], factor, gl.float32, gl.SliceLayout(0, MMA))
        group_barrier()
        if FP8:
            even, odd, largest = _even_and_odd(queries, DIM)
            q_tile.index(0).store(even)
            q_tile.index(1).store(odd)
            unit = unit * gl.convert_layout(largest, gl.SliceLayout(0, MMA))
        else:
            q_tile.index(0).store(queries)
        hopper.fence_async_shared()
        group_barrier()
        # What comes next, while this one's tiles land.
        following = current + mine
        seq_2, tile_2, count_2, mine_2, end_2 = _segment(following, stop, lens, tiles, ends, SEQS, INDEX)
        queries = _queries(
            query_ptr, seq_2, kv_head, following < stop, query_stride, query_head_stride, GROUP, DIM, ROWS
        )
        acc, upper, sums, top, step = _attend(
            step, tile, mine, end, unit, q_tile, p_tile, k_tiles, v_tiles, v_ring, k_full, v_full, k_free, v_free,
            WORDS, STAGES, FP8, MMA,
        )  # fmt: skip
        total = gl.sum(sums, axis=0)
        whole = 256.0 if FP8 else 1.0  # values are over 256
        out_row = out_ptr + (seq.to(gl.int64) * (KV_HEADS * GROUP) + kv_head * GROUP + head) * DIM
        if mine == count:
            _store_sums(out_row, acc, upper, whole / total, WORDS, GROUP, FP8, MMA)
        else:
            _leave(
                out_row, partial_ptr, stats_ptr, counters_ptr, seq, kv_head, head, current, tile, count, total_tiles,
                acc, upper, top, total, whole, KV_HEADS, GROUP, DIM, WORDS, FP8, MMA,
            )  # fmt: skip
        current = following
        seq, tile, count, mine, end = seq_2, tile_2, count_2, mine_2, end_2
    if BESIDE:  # whoever waits for this kernel waits for the one before as well
        wait_for_inputs(DEPENDENT)


@gluon.jit(
    do_not_specialize=["num_seqs", "table_stride", "num_blocks"],
    do_not_specialize_on_alignment=["tables_ptr", "lens_ptr"],
)
def _hopper_decode_kernel(
    desc, query_ptr, tables_ptr, lens_ptr, out_ptr, partial_ptr, stats_ptr, counters_ptr, num_seqs, factor,
    query_stride, query_head_stride, table_stride, num_blocks,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, DIM: gl.constexpr, SEQS: gl.constexpr,
    STAGES: gl.constexpr, FP8: gl.constexpr, BESIDE: gl.constexpr, FETCHING: gl.constexpr, DEPENDENT: gl.constexpr,
):  # fmt: skip
    """out [num_seqs, KV_HEADS * GROUP, DIM]; desc: the cache's pages, [rows, WORDS]. See the module."""
    # A cache in FP8 is fetched as words of 16 bits, two numbers each.
    WORDS: gl.constexpr = DIM // 2 if FP8 else DIM
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    if FP8:
        q_tile = gl.allocate_shared_memory(gl.float16, [2, 8, WORDS], SHARED)
        p_tile = gl.allocate_shared_memory(gl.float16, [8, 128], SHARED)
    else:
        q_tile = gl.allocate_shared_memory(desc.dtype, [1, 8, DIM], SHARED)
        p_tile = gl.allocate_shared_memory(desc.dtype, [8, 128], SHARED)
    k_tiles = gl.allocate_shared_memory(desc.dtype, [STAGES, 128, WORDS], SHARED)
    v_tiles = gl.allocate_shared_memory(desc.dtype, [STAGES, 128, WORDS], SHARED)
    # A tile lies in memory as its columns' halves, one after the other, each as 8 pages of 16 rows of 128 bytes.
    k_ring = reshaped(k_tiles, [STAGES * WORDS // 64 * 8, 16, 64], SHARED)
    v_ring = reshaped(v_tiles, [STAGES * WORDS // 64 * 8, 16, 64], SHARED)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(k_free.index(stage), count=1)
        mbarrier.init(v_free.index(stage), count=1)
    hopper.fence_async_shared()
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    query_ptr, out_ptr, partial_ptr, stats_ptr, counters_ptr, lens_ptr, num_seqs, factor,
                    query_stride, query_head_stride, q_tile, p_tile, k_tiles, v_tiles, v_ring, k_full, v_full, k_free,
                    v_free, KV_HEADS, GROUP, DIM, WORDS, SEQS, STAGES, FP8, BESIDE, DEPENDENT,
                ),
            ),
            (
                _produce,
                (
                    desc, tables_ptr, lens_ptr, num_seqs, table_stride, num_blocks, k_ring, v_ring, k_full, v_full,
                    k_free, v_free, KV_HEADS, WORDS, SEQS, STAGES, BESIDE, DEPENDENT,
                ),
            ),
        ],
        [1],
        [FETCHING],
    )  # fmt: skip


def applies(query: torch.Tensor, kv: torch.Tensor, window: int, soft_cap: float, sinks: torch.Tensor | None) -> bool:
    """Whether `launch` can serve this call of paged_attention_decode."""
    fp8 = kv.dtype == FP8
    return (
        runs_gluon(query.device)
        and query.dtype in (torch.bfloat16, torch.float16)
        and (kv.dtype == query.dtype or fp8)
        and kv.shape[4] in ((128,) if fp8 else (64, 128))
        and kv.shape[3] == PAGE
        and query.shape[1] // kv.shape[2] <= 8
        and query.shape[0] <= MOST_SEQUENCES
        and kv.is_contiguous()
        and window == 0
        and soft_cap == 0
        and sinks is None
    )


def launch(
    query: torch.Tensor, kv: torch.Tensor, block_tables: torch.Tensor, seq_lens: torch.Tensor, scale: float,
    partial: torch.Tensor, stats: torch.Tensor, counters: torch.Tensor, out: torch.Tensor, programs: int = 0,
    *, beside: bool = False,
) -> None:  # fmt: skip
    """paged_attention_decode without window, soft cap and sinks; all arguments checked, and `applies`.

    programs: a multiple of the KV heads; 0: one for each multiprocessor, of a cache in FP8 two, whose tiles take half
    the shared memory. The workspace has room for two parts of each. beside: as paged_attention_decode has it.
    """
    num_seqs, num_heads, head_dim = query.shape
    kv_heads = kv.shape[2]
    fp8 = kv.dtype == FP8
    programs = programs or multiprocessors(query.device) * (2 if fp8 else 1)
    programs = max(programs // kv_heads, 1) * kv_heads
    enough = partial.numel() >= 2 * programs * num_heads // kv_heads * head_dim
    require(enough and counters.numel() >= num_seqs * kv_heads, f"the workspace is too small for {num_seqs} sequences")
    words = kv.view(torch.int16) if fp8 else kv
    pages = tiled(words.view(-1, words.shape[4]), PAGE)
    _hopper_decode_kernel[(programs,)](
        pages, query, block_tables, seq_lens, out, partial, stats, counters, num_seqs, scale * LOG2_E,
        query.stride(0), query.stride(1), block_tables.stride(0), kv.shape[0],
        KV_HEADS=kv_heads, GROUP=num_heads // kv_heads, DIM=head_dim,
        SEQS=max(next_power_of_2(num_seqs), 256), STAGES=STAGES, FP8=fp8, BESIDE=beside,
        FETCHING=72 if fp8 else 96, num_warps=4, maxnreg=128 if fp8 else 160, **dependent_launch(query.device),
    )  # fmt: skip
