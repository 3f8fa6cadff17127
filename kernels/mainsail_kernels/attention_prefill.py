"""Causal attention of ragged chunks to their cached context and themselves, over the paged KV cache.

A tile is BLOCK_M rows of one KV head: BLOCK_M // group consecutive query tokens times the group of query heads that
share the head (GQA packing), so K and V are read once per group and rows of one token are not wasted on heads.

    tile bound: sequence i owns the tile numbers from query_start[i] // BLOCK_Q + i on. This is at least the number
    of tiles before it, so the grid, num_tokens // BLOCK_Q + num_seqs, needs no length on the host; surplus tiles
    exit at once (the idea is vLLM's unified Triton kernel's). Tiles run from the last to the first: the longest
    context first, which keeps the tail of the launch short.

On Hopper, chunks go to attention_hopper instead. Of a cache in FP8 the long ones go to attention_hopper_fp8, after
kv_transpose, where the caller gives it room, and the short ones of the same step stay here.

KV tiles that every row sees whole run without a mask; those at the diagonal, the window's edge and the sequence's
end run with one. Positions past the sequence are never read.
"""

import torch

from mainsail_kernels import attention_hopper, attention_hopper_fp8, reference
from mainsail_kernels._attention import beside_cache, check_attention, scaled_scores, sink_weight
from mainsail_kernels._triton import (
    INTERPRETED,
    dependent_launch,
    next_power_of_2,
    require,
    runs_kernels,
    tl,
    triton,
    wait_for_inputs,
)
from mainsail_kernels.kv_transpose import transpose_values
from mainsail_kernels.tuned import prefill_config


@triton.jit
def _attend_range(
    acc,
    top,
    total,
    q,
    kv_ptr,
    table_ptr,
    start,
    end,
    position,
    context_end,
    scale,
    soft_cap,
    window,
    block_stride,
    side_stride,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """(sums, maxima, weights) of a tile's rows q [BLOCK_M, DIM], with positions start to end of KV added.

    position [BLOCK_M]: each row's own. MASKED: not every row sees all of these positions.
    """
    channel = tl.arange(0, DIM)
    lane = tl.arange(0, BLOCK_N)
    for first in tl.range(start, end, BLOCK_N, num_stages=STAGES):
        at = first + lane
        owned = at < context_end
        if MASKED:
            block = tl.load(table_ptr + at // BLOCK_SIZE, mask=owned, other=0).to(tl.int64)
        else:
            block = tl.load(table_ptr + at // BLOCK_SIZE).to(tl.int64)
        rows = block * block_stride + (at % BLOCK_SIZE) * HEAD_DIM
        tile = rows[:, None] + channel[None, :]
        if MASKED or DIM != HEAD_DIM:
            readable = owned[:, None] & (channel < HEAD_DIM)[None, :]
            k = tl.load(kv_ptr + tile, mask=readable, other=0.0)
            v = tl.load(kv_ptr + side_stride + tile, mask=readable, other=0.0)
        else:
            k = tl.load(kv_ptr + tile)
            v = tl.load(kv_ptr + side_stride + tile)
        k = k.to(q.dtype)
        v = v.to(q.dtype)
        scores = tl.dot(q, tl.trans(k))
        # Without a cap the factor joins the subtraction below: one fused multiply-add a score.
        factor = scale * 1.4426950408889634
        if SOFT_CAP:
            scores = scaled_scores(scores, scale, soft_cap, SOFT_CAP)
            factor = 1.0
        if MASKED:
            visible = at[None, :] <= position[:, None]
            if WINDOW:
                visible = visible & (at[None, :] > position[:, None] - window)
            scores = tl.where(visible, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1) * factor)
        if MASKED:  # a row that has seen nothing yet keeps -inf: subtract 0 from it instead
            base = tl.where(new_top == float("-inf"), 0.0, new_top)
        else:
            base = new_top
        p = tl.exp2(scores * factor - base[:, None])
        fade = tl.exp2(top - base)
        total = total * fade + tl.sum(p, axis=1)
        acc = acc * fade[:, None]
        acc = tl.dot(p.to(v.dtype), v, acc)
        top = new_top
    return acc, top, total


# The number of sequences and the width of the tables change with every step, and so does where the chunks' part of the
# lengths begins: one compiled kernel for all.
@triton.jit(
    do_not_specialize=["num_seqs", "table_stride"],
    do_not_specialize_on_alignment=["tables_ptr", "starts_ptr", "lens_ptr"],
)
def _prefill_kernel(
    query_ptr,
    kv_ptr,
    tables_ptr,
    starts_ptr,
    lens_ptr,
    taken_ptr,
    out_ptr,
    sinks_ptr,
    num_seqs,
    scale,
    soft_cap,
    window,
    query_stride,
    query_head_stride,
    out_stride,
    table_stride,
    block_stride,
    side_stride,
    head_stride,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SEQS: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    SINKS: tl.constexpr,
    TAKEN: tl.constexpr,
    STAGES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """out [num_tokens, heads, HEAD_DIM] of BLOCK_Q tokens' rows of one KV head. See the module.

    TAKEN: sequences for which taken [num_seqs] is above 0 are another kernel's.
    """
    wait_for_inputs(DEPENDENT)
    kv_head = tl.program_id(0)
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    index = tl.arange(0, SEQS)
    bounds = tl.load(starts_ptr + index, mask=index < num_seqs, other=0) // BLOCK_Q + index
    seq = tl.sum(((bounds <= tile) & (index < num_seqs)).to(tl.int32), axis=0) - 1
    if seq < 0:  # rows before the first chunk
        return
    start = tl.load(starts_ptr + seq)
    num_queries = tl.load(starts_ptr + seq + 1) - start
    first = (tile - (start // BLOCK_Q + seq)) * BLOCK_Q
    context_end = tl.load(lens_ptr + seq)
    if (first >= num_queries) | (context_end <= 0):
        return
    if TAKEN:  # noqa: SIM102 - a constant, which `and` would not be
        if tl.load(taken_ptr + seq) > 0:
            return

    row = tl.arange(0, BLOCK_M)
    token = first + row // GROUP
    real = (token < num_queries) & (row < BLOCK_Q * GROUP)
    head = kv_head * GROUP + row % GROUP
    channel = tl.arange(0, DIM)
    fits = real[:, None] & (channel < HEAD_DIM)[None, :]
    q_row = (start + token).to(tl.int64) * query_stride + head * query_head_stride
    q = tl.load(query_ptr + q_row[:, None] + channel[None, :], mask=fits, other=0.0)
    q = beside_cache(q, kv_ptr.dtype.element_ty)

    offset = context_end - num_queries
    position = offset + token
    last = tl.minimum(first + BLOCK_Q, num_queries) + offset
    whole = offset + first + 1
    begin = 0
    left = 0
    if WINDOW:
        begin = tl.maximum(offset + first - window + 1, 0) // BLOCK_N * BLOCK_N
        left = tl.cdiv(tl.maximum(last - window, 0), BLOCK_N) * BLOCK_N
    middle = whole // BLOCK_N * BLOCK_N
    left = tl.minimum(left, middle)

    table = tables_ptr + seq.to(tl.int64) * table_stride
    kv = kv_ptr + kv_head.to(tl.int64) * head_stride
    acc = tl.zeros((BLOCK_M, DIM), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    if WINDOW:
        acc, top, total = _attend_range(
            acc, top, total, q, kv, table, begin, left, position, last, scale, soft_cap, window, block_stride,
            side_stride, HEAD_DIM, DIM, BLOCK_SIZE, BLOCK_N, True, WINDOW, SOFT_CAP, STAGES,
        )  # fmt: skip
        begin = tl.maximum(begin, left)
    acc, top, total = _attend_range(
        acc, top, total, q, kv, table, begin, middle, position, last, scale, soft_cap, window, block_stride,
        side_stride, HEAD_DIM, DIM, BLOCK_SIZE, BLOCK_N, False, WINDOW, SOFT_CAP, STAGES,
    )  # fmt: skip
    acc, top, total = _attend_range(
        acc, top, total, q, kv, table, tl.maximum(begin, middle), last, position, last, scale, soft_cap, window,
        block_stride, side_stride, HEAD_DIM, DIM, BLOCK_SIZE, BLOCK_N, True, WINDOW, SOFT_CAP, STAGES,
    )  # fmt: skip
    if SINKS:
        total += sink_weight(sinks_ptr, head, real, top)
    result = acc / tl.where(total > 0, total, 1.0)[:, None]
    out_row = (start + token).to(tl.int64) * out_stride + head * HEAD_DIM
    tl.store(out_ptr + out_row[:, None] + channel[None, :], result.to(out_ptr.dtype.element_ty), mask=fits)


def paged_attention_prefill(
    query: torch.Tensor,
    kv: torch.Tensor,
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    max_query_len: int,
    scale: float,
    *,
    sliding_window: int = 0,
    soft_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    room: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of ragged chunks: sequence i's queries are query[query_start[i]:query_start[i + 1]].

    Rows before the first chunk and behind the last are neither read nor written.

    query [num_tokens, num_heads, head_dim]; kv [num_blocks, 2, num_kv_heads, block_size, head_dim] already holding
    this chunk's keys and values; query_start [num_seqs + 1] int32; seq_lens [num_seqs] int32, the context with this
    chunk. A query at position p sees positions <= p, with a window w only those > p - w; sinks [num_heads] are scores
    that take part in the softmax only. room (kv_transpose.room_shape): where long chunks' values of a
    cache in FP8 are transposed, and their queries and weights rounded to FP8, too (reference.fp8_attention_prefill is
    what comes out then); None: neither. Returns out, like query.
    Needs no value on the host; max_query_len only has to be an upper bound (0 or less: nothing to do).
    Raises ValueError when shapes or types do not fit.
    """
    check_attention(query, kv, block_tables, seq_lens, scale, soft_cap, sinks)
    num_seqs = seq_lens.shape[0]
    starts = query_start.shape == (num_seqs + 1,) and query_start.dtype == torch.int32
    require(starts, f"query_start must be [{num_seqs + 1}] int32, got {tuple(query_start.shape)} {query_start.dtype}")
    out = torch.empty_like(query, memory_format=torch.contiguous_format) if out is None else out
    require(out.shape == query.shape and out.is_contiguous(), f"out must be contiguous {tuple(query.shape)}")
    if not runs_kernels(query):
        mixed = reference.paged_attention_prefill(
            query, kv, block_tables, query_start, seq_lens, max_query_len, scale,
            sliding_window=sliding_window, soft_cap=soft_cap, sinks=sinks,
        )  # fmt: skip
        rows = slice(int(query_start[0]), int(query_start[-1]))
        out[rows] = mixed[rows]
        return out
    if query.shape[0] and num_seqs and max_query_len > 0:
        _launch(
            query, kv, block_tables, query_start, seq_lens, max_query_len, scale, sliding_window, soft_cap, sinks, out,
            room,
        )  # fmt: skip
    return out


def _launch(
    query: torch.Tensor,
    kv: torch.Tensor,
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    max_query_len: int,
    scale: float,
    window: int,
    soft_cap: float,
    sinks: torch.Tensor | None,
    out: torch.Tensor,
    room: torch.Tensor | None,
) -> None:
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads = kv.shape[2]
    group, num_seqs = num_heads // num_kv_heads, seq_lens.shape[0]
    config = prefill_config(query.device, head_dim, max_query_len * group)
    if config.specialized and attention_hopper.applies(query, kv, window, soft_cap, sinks):
        attention_hopper.launch(query, kv, block_tables, query_start, seq_lens, scale, out)
        return
    first_tiles = taken = None
    if room is not None and config.specialized and attention_hopper_fp8.applies(query, kv, window, soft_cap, sinks):
        first_tiles, taken = transpose_values(kv, block_tables, query_start, seq_lens, room)
    block_m = max(config.block_m, next_power_of_2(group))
    block_q = block_m // group
    grid = (num_kv_heads, num_tokens // block_q + num_seqs)
    _prefill_kernel[grid](
        query,
        kv,
        block_tables,
        query_start,
        seq_lens,
        seq_lens if taken is None else taken,
        out,
        query if sinks is None else sinks,
        num_seqs,
        scale,
        soft_cap,
        window,
        query.stride(0),
        query.stride(1),
        out.stride(0),
        block_tables.stride(0),
        kv.stride(0),
        kv.stride(1),
        kv.stride(2),
        GROUP=group,
        HEAD_DIM=head_dim,
        DIM=max(next_power_of_2(head_dim), 16),
        BLOCK_SIZE=kv.shape[3],
        BLOCK_M=block_m,
        BLOCK_Q=block_q,
        BLOCK_N=config.block_n,
        SEQS=max(next_power_of_2(num_seqs), 256 if not INTERPRETED else 1),
        WINDOW=window > 0,
        SOFT_CAP=soft_cap > 0,
        SINKS=sinks is not None,
        TAKEN=taken is not None,
        STAGES=config.stages,
        num_warps=config.warps,
        **dependent_launch(query.device),
    )
    # Behind the others: decodes may run beside it.
    if room is not None and first_tiles is not None and taken is not None:
        attention_hopper_fp8.launch(query, kv, room, block_tables, query_start, first_tiles, taken, scale, out)
