"""Attention of one new token per sequence over the paged KV cache, split over the context (flash-decoding).

The context of every (sequence, KV head) is cut in chunks of equal length, chosen *on the device* from the sum of the
lengths so that the chunks are about as many as the card runs at once. The grid is an upper bound known on the host,

    num_chunks <= target + num_seqs        (per KV head; sum of ceil(len / chunk) with chunk >= sum(len) / target)

so a captured CUDA graph stays right for any lengths, a long sequence among short ones spreads over the whole card,
and there are few idle programs. Program w finds its sequence from a running sum of the chunk counts.

A sequence of one chunk is written at once. Otherwise each program leaves its unnormalized sum, maximum and weight in
the workspace, and the last to arrive (a counter per sequence and head, which it sets back to zero) combines them: one
launch a layer. All query heads of a KV head ride in one tile (GQA packing). Rows of length 0 are padding: zeros.

On Hopper attention_decode_hopper computes the same with a kernel of its own, in the same workspace.
"""

from dataclasses import dataclass

import torch

from mainsail_kernels import attention_decode_hopper, reference
from mainsail_kernels._attention import beside_cache, check_attention, scaled_scores, sink_weight
from mainsail_kernels._fp8 import e4m3_pairs
from mainsail_kernels._triton import (
    INTERPRETED,
    dependent_launch,
    multiprocessors,
    next_power_of_2,
    on_card,
    prefetch_lines,
    require,
    runs_kernels,
    tl,
    triton,
    wait_for_inputs,
)
from mainsail_kernels.reference_quantized import FP8
from mainsail_kernels.tuned import decode_config


@triton.jit
def _combine(
    partial_ptr,
    stats_ptr,
    first_slot,
    num_chunks,
    num_kv_heads,
    kv_head,
    channel,
    row,
    sinks_ptr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    UNROLL: tl.constexpr,
    SINKS: tl.constexpr,
):
    """The normalized result of all chunks of one (sequence, KV head); few registers, for the main loop's sake."""
    acc = tl.zeros((ROWS, DIM), tl.float32)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    fits = (row < GROUP)[:, None] & (channel < HEAD_DIM)[None, :]
    for chunk in tl.range(0, num_chunks, loop_unroll_factor=UNROLL):
        item = ((first_slot + chunk) * num_kv_heads + kv_head).to(tl.int64) * GROUP + row
        part_top = tl.load(stats_ptr + item * 2, mask=row < GROUP, other=0.0, cache_modifier=".cg")
        part_total = tl.load(stats_ptr + item * 2 + 1, mask=row < GROUP, other=0.0, cache_modifier=".cg")
        where = partial_ptr + item[:, None] * HEAD_DIM + channel[None, :]
        part = tl.load(where, mask=fits, other=0.0, cache_modifier=".cg")
        new_top = tl.maximum(top, part_top)
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        fade, gain = tl.exp2(top - base), tl.exp2(part_top - base)
        acc = acc * fade[:, None] + part * gain[:, None]
        total = total * fade + part_total * gain
        top = new_top
    if SINKS:
        total += sink_weight(sinks_ptr, kv_head * GROUP + row, row < GROUP, top)
    return acc / tl.where(total > 0, total, 1.0)[:, None]


@triton.jit
def _chunks(
    lens_ptr, num_seqs, target, window, BLOCK_N: tl.constexpr, LEAST: tl.constexpr, SEQS: tl.constexpr,
    WINDOW: tl.constexpr,
):  # fmt: skip
    """(lengths, chunks of each sequence, running sums of these, positions of a chunk)."""
    index = tl.arange(0, SEQS)
    lens = tl.load(lens_ptr + index, mask=index < num_seqs, other=0)
    spans = lens
    if WINDOW:  # the part of the context that is read, with the tile that the window's edge cuts
        spans = tl.minimum(lens, window + BLOCK_N)
    # int64: the lengths of a full batch can add up to more than 2**31 only in theory, and theory is cheap here
    chunk = tl.cdiv(tl.cdiv(tl.sum(spans.to(tl.int64), axis=0), target), BLOCK_N).to(tl.int32) * BLOCK_N
    chunk = tl.maximum(chunk, LEAST * BLOCK_N)
    # Padding rows get one chunk too, so that somebody writes their zeros.
    counts = tl.where(index < num_seqs, tl.maximum(tl.cdiv(spans, chunk), 1), 0)
    return lens, counts, tl.cumsum(counts, axis=0), chunk


@triton.jit
def _attend(
    q, kv, table, channel, lane, start, end, lowest, scale, soft_cap, block_stride, side_stride, HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr, PAIRS: tl.constexpr, STAGES: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """(sums, maxima, weights) of q [ROWS, DIM] over positions start to end; kv: the KV head's part of the first block.

    PAIRS: the cache is in FP8, and its values are read as words of two.
    """
    WIDE: tl.constexpr = DIM // 2 if PAIRS else DIM  # pyright: ignore[reportAssignmentType]
    acc = tl.zeros((ROWS, WIDE), tl.float32)
    upper_acc = tl.zeros((ROWS, WIDE), tl.float32)
    pair = tl.arange(0, DIM // 2)
    pairs = (kv + side_stride).to(tl.pointer_type(tl.int16), bitcast=True)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for first in tl.range(start, end, BLOCK_N, num_stages=STAGES):
        at = first + lane
        owned = at < end
        block = tl.load(table + at // BLOCK_SIZE, mask=owned, other=0).to(tl.int64)
        rows = block * block_stride + (at % BLOCK_SIZE) * HEAD_DIM
        tile = rows[:, None] + channel[None, :]
        readable = owned[:, None]
        if DIM != HEAD_DIM:
            readable = readable & (channel < HEAD_DIM)[None, :]
        k = tl.load(kv + tile, mask=readable, other=0.0).to(q.dtype)
        if PAIRS:
            half_rows = block * (block_stride // 2) + (at % BLOCK_SIZE) * (HEAD_DIM // 2)
            readable = owned[:, None]
            if DIM != HEAD_DIM:
                readable = readable & (pair < HEAD_DIM // 2)[None, :]
            v, upper_v = e4m3_pairs(tl.load(pairs + half_rows[:, None] + pair[None, :], mask=readable, other=0), PTX)
        else:
            v = tl.load(kv + side_stride + tile, mask=readable, other=0.0).to(q.dtype)
        scores = scaled_scores(tl.dot(q, tl.trans(k)), scale, soft_cap, SOFT_CAP)
        visible = owned
        if WINDOW:
            visible = owned & (at >= lowest)
        scores = tl.where(visible[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(scores - base[:, None])
        fade = tl.exp2(top - base)
        total = total * fade + tl.sum(p, axis=1)
        acc = acc * fade[:, None]
        acc = tl.dot(p.to(v.dtype), v, acc)
        if PAIRS:
            upper_acc = tl.dot(p.to(v.dtype), upper_v, upper_acc * fade[:, None])
        top = new_top
    if PAIRS:
        acc = tl.interleave(acc, upper_acc) * 256.0
    return acc, top, total


# The number of sequences and the width of the tables change with every step: few compiled kernels for all.
@triton.jit(do_not_specialize=["num_seqs", "table_stride"])
def _decode_kernel(
    query_ptr,
    kv_ptr,
    tables_ptr,
    lens_ptr,
    out_ptr,
    partial_ptr,
    stats_ptr,
    counters_ptr,
    sinks_ptr,
    num_seqs,
    target,
    scale,
    soft_cap,
    window,
    query_stride,
    query_head_stride,
    table_stride,
    block_stride,
    side_stride,
    head_stride,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    FEW: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LEAST: tl.constexpr,
    SEQS: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    SINKS: tl.constexpr,
    PAIRS: tl.constexpr,
    STAGES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """out [num_seqs, heads, HEAD_DIM]: program (KV head, work) takes one chunk of one sequence. See the module."""
    kv_head, work = tl.program_id(0), tl.program_id(1)
    num_kv_heads = tl.num_programs(0)
    lens, counts, ends, chunk = _chunks(lens_ptr, num_seqs, target, window, BLOCK_N, LEAST, SEQS, WINDOW)
    seq = tl.sum((ends <= work).to(tl.int32), axis=0)
    if seq >= num_seqs:
        wait_for_inputs(DEPENDENT)
        return
    mine = tl.arange(0, SEQS) == seq
    num_chunks = tl.sum(tl.where(mine, counts, 0), axis=0)
    first_slot = tl.sum(tl.where(mine, ends, 0), axis=0) - num_chunks
    length = tl.sum(tl.where(mine, lens, 0), axis=0)
    lowest = 0
    origin = 0
    if WINDOW:
        lowest = tl.maximum(length - window, 0)
        origin = lowest // BLOCK_N * BLOCK_N
    start = origin + (work - first_slot) * chunk
    end = tl.minimum(start + chunk, length)

    row = tl.arange(0, ROWS)
    channel = tl.arange(0, DIM)
    lane = tl.arange(0, BLOCK_N)
    fits = (row < GROUP)[:, None] & (channel < HEAD_DIM)[None, :]
    head = kv_head * GROUP + row
    q_row = seq.to(tl.int64) * query_stride + head * query_head_stride
    kv = kv_ptr + kv_head.to(tl.int64) * head_stride
    table = tables_ptr + seq.to(tl.int64) * table_stride
    if DEPENDENT:  # the first tiles of keys and values, while the kernel before writes the newest
        ahead = start + tl.arange(0, 2 * BLOCK_N)
        near = kv + tl.load(table + ahead // BLOCK_SIZE, mask=ahead < end, other=0).to(tl.int64) * block_stride
        near += (ahead % BLOCK_SIZE) * HEAD_DIM
        prefetch_lines(near)
        prefetch_lines(near + side_stride)
        if HEAD_DIM > 64:
            prefetch_lines(near + 64)
            prefetch_lines(near + side_stride + 64)
    wait_for_inputs(DEPENDENT)
    q = tl.load(query_ptr + q_row[:, None] + channel[None, :], mask=fits, other=0.0)
    q = beside_cache(q, kv_ptr.dtype.element_ty)

    acc, top, total = _attend(
        q, kv, table, channel, lane, start, end, lowest, scale, soft_cap, block_stride, side_stride, HEAD_DIM, DIM,
        ROWS, BLOCK_SIZE, BLOCK_N, WINDOW, SOFT_CAP, PAIRS, STAGES, DEPENDENT,
    )  # fmt: skip
    if num_chunks > 1:
        item = (work * num_kv_heads + kv_head).to(tl.int64) * GROUP + row
        tl.store(partial_ptr + item[:, None] * HEAD_DIM + channel[None, :], acc, mask=fits)
        tl.store(stats_ptr + item * 2, top, mask=row < GROUP)
        tl.store(stats_ptr + item * 2 + 1, total, mask=row < GROUP)
        counter = counters_ptr + seq * num_kv_heads + kv_head
        tl.debug_barrier()  # every thread's part is stored before one thread says so
        arrived = tl.atomic_add(counter, 1, sem="acq_rel")
        if arrived != num_chunks - 1:
            return
        tl.debug_barrier()
        tl.store(counter, 0)
        few = tl.arange(0, FEW)
        result = _combine(
            partial_ptr, stats_ptr, first_slot, num_chunks, num_kv_heads, kv_head, channel, few,
            sinks_ptr, GROUP, HEAD_DIM, DIM, FEW, UNROLL, SINKS,
        )  # fmt: skip
        few_row = (seq.to(tl.int64) * (num_kv_heads * GROUP) + kv_head * GROUP + few) * HEAD_DIM
        few_fits = (few < GROUP)[:, None] & (channel < HEAD_DIM)[None, :]
        few_out = out_ptr + few_row[:, None] + channel[None, :]
        tl.store(few_out, result.to(out_ptr.dtype.element_ty), mask=few_fits)
        return
    if SINKS:
        total += sink_weight(sinks_ptr, head, row < GROUP, top)
    result = acc / tl.where(total > 0, total, 1.0)[:, None]
    out_row = (seq.to(tl.int64) * (num_kv_heads * GROUP) + head) * HEAD_DIM
    tl.store(out_ptr + out_row[:, None] + channel[None, :], result.to(out_ptr.dtype.element_ty), mask=fits)


@dataclass(frozen=True, slots=True)
class DecodeWorkspace:
    """Scratch of paged_attention_decode. One per stream that runs it: two calls at once must not share one."""

    partial: torch.Tensor
    """[chunks, num_kv_heads, group, head_dim] float32: unnormalized sums."""
    stats: torch.Tensor
    """[chunks, num_kv_heads, group, 2] float32: maximum and weight of each sum."""
    counters: torch.Tensor
    """[num_seqs, num_kv_heads] int32, zero between calls."""


def decode_workspace(
    num_seqs: int, num_heads: int, num_kv_heads: int, head_dim: int, device: torch.device
) -> DecodeWorkspace:
    """A workspace for batches of up to num_seqs rows. Captured graphs keep its address: hold on to it."""
    chunks = max(_target(device, head_dim, num_kv_heads, rows) for rows in (1, num_seqs)) + num_seqs
    items = max(chunks * num_heads, 4 * multiprocessors(device) * (num_heads // num_kv_heads))
    return DecodeWorkspace(
        partial=torch.empty(items * head_dim, dtype=torch.float32, device=device),
        stats=torch.empty(items * 2, dtype=torch.float32, device=device),
        counters=torch.zeros(num_seqs * num_kv_heads, dtype=torch.int32, device=device),
    )


def _target(device: torch.device, head_dim: int, num_kv_heads: int, num_seqs: int, *, fp8: bool = False) -> int:
    """Chunks per KV head that fill the card; of a cache in FP8 no more than of others."""
    programs = multiprocessors(device) * decode_config(device, head_dim, num_seqs, fp8=fp8).programs_per_sm
    return max(programs // num_kv_heads, 1)


def paged_attention_decode(
    query: torch.Tensor,
    kv: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    *,
    sliding_window: int = 0,
    soft_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
    workspace: DecodeWorkspace | None = None,
    out: torch.Tensor | None = None,
    padded: bool = False,
    beside: bool = False,
) -> torch.Tensor:
    """Attention of one query per sequence to its whole context (with a window w: to its newest w tokens).

    query [num_seqs, num_heads, head_dim]; kv [num_blocks, 2, num_kv_heads, block_size, head_dim]; block_tables
    [num_seqs, max_blocks] int32; seq_lens [num_seqs] int32, the current token included, 0 for a padding row (which
    gets zeros); sinks [num_heads], a score of each head that takes part in the softmax only. Without a workspace one is
    allocated: pass one in a serving loop. padded: many rows may be padding, so choose a kernel that they cost nothing.
    Of positions that the kernel before may still be writing there are at most 64, at the end of a sequence.
    beside: the kernel before is the same step's paged_attention_prefill, into other rows of out's memory: nothing of it
    is waited for but its end, at the end, and padding rows are left as they are. Only where `goes_beside` says so.
    Returns out, like query.
    Raises ValueError when shapes or types do not fit.
    """
    check_attention(query, kv, block_tables, seq_lens, scale, soft_cap, sinks)
    require(query.shape[0] == seq_lens.shape[0], f"{query.shape[0]} queries for {seq_lens.shape[0]} sequences")
    out = torch.empty_like(query, memory_format=torch.contiguous_format) if out is None else out
    require(out.shape == query.shape and out.is_contiguous(), f"out must be contiguous {tuple(query.shape)}")
    if not runs_kernels(query):
        mixed = reference.paged_attention_decode(
            query, kv, block_tables, seq_lens, scale, sliding_window=sliding_window, soft_cap=soft_cap, sinks=sinks
        )
        return out.copy_(mixed)
    if query.shape[0]:
        if workspace is None:
            workspace = decode_workspace(query.shape[0], query.shape[1], kv.shape[2], query.shape[2], query.device)
        _launch(
            query, kv, block_tables, seq_lens, scale, sliding_window, soft_cap, sinks, workspace, out, padded, beside
        )
    return out


def goes_beside(
    query: torch.Tensor, kv: torch.Tensor, window: int, soft_cap: float, sinks: torch.Tensor | None
) -> bool:
    """Whether paged_attention_decode of these may run beside the prompts' attention, which is then launched first.

    A prompt's tiles are few and long, and a multiprocessor that has none of them reads twice as fast as its share of
    the card's rate: what those with a tile do not read meanwhile, the others do.
    """
    if not on_card(query):
        return False
    config = decode_config(query.device, query.shape[2], query.shape[0], fp8=kv.dtype == FP8, padded=True)
    return config.specialized and attention_decode_hopper.applies(query, kv, window, soft_cap, sinks)


def _launch(
    query: torch.Tensor,
    kv: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    window: int,
    soft_cap: float,
    sinks: torch.Tensor | None,
    workspace: DecodeWorkspace,
    out: torch.Tensor,
    padded: bool,
    beside: bool,
) -> None:
    num_seqs, num_heads, head_dim = query.shape
    num_kv_heads = kv.shape[2]
    group = num_heads // num_kv_heads
    fp8 = kv.dtype == FP8
    config = decode_config(query.device, head_dim, num_seqs, fp8=fp8, padded=padded)
    if config.specialized and attention_decode_hopper.applies(query, kv, window, soft_cap, sinks):
        attention_decode_hopper.launch(
            query, kv, block_tables, seq_lens, scale, workspace.partial, workspace.stats, workspace.counters, out,
            beside=beside,
        )  # fmt: skip
        return
    require(not beside, "beside the prompts' attention only what `goes_beside` says")
    target = _target(query.device, head_dim, num_kv_heads, num_seqs, fp8=fp8)
    items = (target + num_seqs) * num_heads
    enough = workspace.partial.numel() >= items * head_dim and workspace.counters.numel() >= num_seqs * num_kv_heads
    require(enough, f"the workspace is too small for {num_seqs} sequences of {num_heads} heads of {head_dim}")
    _decode_kernel[(num_kv_heads, target + num_seqs)](
        query,
        kv,
        block_tables,
        seq_lens,
        out,
        workspace.partial,
        workspace.stats,
        workspace.counters,
        query if sinks is None else sinks,
        num_seqs,
        target,
        scale,
        soft_cap,
        window,
        query.stride(0),
        query.stride(1),
        block_tables.stride(0),
        kv.stride(0),
        kv.stride(1),
        kv.stride(2),
        GROUP=group,
        HEAD_DIM=head_dim,
        DIM=max(next_power_of_2(head_dim), 16),
        ROWS=max(next_power_of_2(group), 16),
        FEW=next_power_of_2(group),
        UNROLL=4,
        BLOCK_SIZE=kv.shape[3],
        BLOCK_N=config.block_n,
        LEAST=config.least_tiles,
        SEQS=max(next_power_of_2(num_seqs), 256 if not INTERPRETED else 32),
        WINDOW=window > 0,
        SOFT_CAP=soft_cap > 0,
        SINKS=sinks is not None,
        PAIRS=fp8 and query.element_size() == 2,
        STAGES=config.stages,
        num_warps=config.warps,
        **dependent_launch(query.device, rows=num_seqs),
    )
