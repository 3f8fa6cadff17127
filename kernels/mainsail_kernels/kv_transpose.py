"""Values of an FP8 cache that prompts attend to, transposed once for all of a layer's attention.

Hopper's units multiply bytes only where those that are summed are next to one another, and a sum over values is one
over tokens, while a cache holds a token's channels together, page by page. To transpose them again for every tile of
rows would cost more than the products; so it is done once, at the rate of memory, for whole tiles of 128 tokens:

    block_tables[s, j] ─▶ kv[block, 1] e4m3 ─▶ room[first_tiles[s] + j // 8, head, channel, token]

with tokens in the order in which attention_hopper_fp8 has their weights, and zeros behind a context's end. What that
saves grows with a chunk's tokens times its context, what it costs with the context, and with what short chunks of the
step wait for: whoever plans a step decides whether it pays (PAYING_PAIRS). Which of its chunks are long is then seen
on the device, where a captured graph reads their lengths. Chunks that are short, or that the room has no place for,
have a length of 0 then and are attended to by the general kernel. Few short ones are transposed too: theirs is the time
of one program that reads a whole context, which is longer there.
"""

from collections.abc import Sequence

import torch

from mainsail_kernels import attention_hopper_fp8
from mainsail_kernels._triton import (
    INTERPRETED,
    dependent_launch,
    multiprocessors,
    next_power_of_2,
    require,
    tl,
    triton,
    wait_for_inputs,
)
from mainsail_kernels.reference_quantized import FP8

TILE = 128
"""Tokens of a tile."""
ROOM_BYTES = 1 << 28
"""That a room takes at most: contexts of 262,144 tokens together, of 8 KV heads of 128 channels, a byte each."""
LONG_TOKENS = 128
"""Of a chunk whose values are transposed, at least …"""
FEW_SHORT = 2
"""… if more than so many chunks of the step have fewer."""
PAYING_PAIRS = 2_000_000
"""Of query and key in a step's long chunks, from which on it pays. Chosen when pages were converted to 16 bits instead,
which took three times as long: on an H200 1.6 million, most of them in short chunks, lost 12 % of a layer's attention,
4.2 million gained 25 %."""


@triton.jit
def token_at(place):
    """The token of a tile of 128 that lies in this place: of every 32 places' five bits, the order is 4 1 3 2 0.

    A thread has columns 8 j + 2 q + b of every 32 of a product's sums (q: the thread's number in its four, j = 0 … 3,
    b = 0, 1), and hands over columns 16 h + 4 q + c of what it multiplies with (h = 0, 1; c = 0 … 3)."""
    high = place & ~14
    return high | ((place & 2) << 2) | ((place & 12) >> 1)


@triton.jit(
    do_not_specialize=["num_seqs", "table_stride", "num_tiles"],
    do_not_specialize_on_alignment=["tables_ptr", "starts_ptr", "lens_ptr"],
)
def _transpose_values_kernel(
    kv_ptr,
    tables_ptr,
    starts_ptr,
    lens_ptr,
    room_ptr,
    first_tiles_ptr,
    taken_lens_ptr,
    num_seqs,
    table_stride,
    num_tiles,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    SEQS: tl.constexpr,
    LONG: tl.constexpr,
    FEW: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """kv and room are numbers of one byte: as integers, for nothing is computed with them."""
    wait_for_inputs(DEPENDENT)
    index = tl.arange(0, SEQS)
    real = index < num_seqs
    start = tl.load(starts_ptr + index, mask=real, other=0)
    lens = tl.load(lens_ptr + index, mask=real, other=0)
    tokens = tl.load(starts_ptr + index + 1, mask=real, other=0) - start
    short = (tokens > 0) & (tokens < LONG)
    long = (tokens >= LONG) | (short & (tl.sum(short.to(tl.int32), axis=0) <= FEW))
    tiles = tl.where(long, (lens + TILE - 1) // TILE, 0)
    ends = tl.cumsum(tiles, axis=0)
    taken = long & (ends <= num_tiles)
    if tl.program_id(0) == 0:
        tl.store(first_tiles_ptr + index, ends - tiles, mask=real)
        tl.store(taken_lens_ptr + index, tl.where(taken, lens, 0), mask=real)
    total = tl.max(tl.where(taken, ends, 0), axis=0) * KV_HEADS
    token = token_at(tl.arange(0, TILE))
    channel = tl.arange(0, DIM)
    for item in tl.range(tl.program_id(0), total, tl.num_programs(0)):
        tile, head = item // KV_HEADS, item % KV_HEADS
        seq = tl.sum((ends <= tile).to(tl.int32), axis=0)
        begin = tl.sum(tl.where(index == seq, ends - tiles, 0), axis=0)
        length = tl.sum(tl.where(index == seq, lens, 0), axis=0)
        own_tile = tile - begin  # of this sequence
        at = own_tile * TILE + token
        inside = at < length
        block = tl.load(tables_ptr + seq.to(tl.int64) * table_stride + at // PAGE, mask=inside, other=0).to(tl.int64)
        row = ((block * 2 + 1) * KV_HEADS + head) * PAGE + at % PAGE
        values = tl.load(kv_ptr + row[:, None] * DIM + channel[None, :], mask=inside[:, None], other=0)
        target = room_ptr + ((begin + own_tile).to(tl.int64) * KV_HEADS + head) * DIM * TILE
        tl.store(target + channel[:, None] * TILE + tl.arange(0, TILE)[None, :], tl.trans(values))


def are_transposed(tokens: Sequence[int]) -> list[bool]:
    """Whether values of chunks of so many tokens, which a step has together, are transposed if it transposes any."""
    few = sum(0 < count < LONG_TOKENS for count in tokens) <= FEW_SHORT
    return [count >= LONG_TOKENS or (few and count > 0) for count in tokens]


def room_shape(
    kv: torch.Tensor, num_seqs: int, max_blocks: int, num_heads: int, dtype: torch.dtype
) -> tuple[int, ...] | None:
    """The shape of a room, whose dtype is kv's, beside kv [num_blocks, 2, num_kv_heads, page, head_dim], for so many
    sequences of at most max_blocks each or what ROOM_BYTES hold, for queries of dtype. None where prompts' attention
    would not use one: of caches that are not in FP8, on other cards."""
    query = torch.empty((0, num_heads, kv.shape[4]), dtype=dtype, device=kv.device)
    if not attention_hopper_fp8.applies(query, kv, 0, 0.0, None):
        return None
    _, _, kv_heads, page, head_dim = kv.shape
    most_tiles = num_seqs * -(-max_blocks * page // TILE)
    return (min(most_tiles, ROOM_BYTES // (kv_heads * head_dim * TILE)), kv_heads, head_dim, TILE)


def transpose_values(
    kv: torch.Tensor, block_tables: torch.Tensor, query_start: torch.Tensor, seq_lens: torch.Tensor,
    room: torch.Tensor, long_tokens: int = LONG_TOKENS, few_short: int = FEW_SHORT,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(first_tiles [num_seqs] int32, lens [num_seqs] int32): where in room [tiles, num_kv_heads, head_dim, 128] a
    sequence's values begin, and up to which of its tokens they are there. Into room go those that block_tables name of
    kv [num_blocks, 2, num_kv_heads, page, head_dim] in FP8, up to seq_lens, of chunks of long_tokens and more, and of
    shorter ones if these are few_short or fewer, in their order for as long as room holds them; what it held is gone.
    The lens of all other chunks are 0. query_start [num_seqs + 1] int32, as of paged_attention_prefill.
    Raises ValueError when shapes or types do not fit."""
    require(kv.dtype == FP8 and kv.is_contiguous(), f"a contiguous cache in FP8, not {kv.dtype}")
    _, _, kv_heads, page, head_dim = kv.shape
    fits = room.dtype == FP8 and room.shape[1:] == (kv_heads, head_dim, TILE) and room.is_contiguous()
    require(fits, f"room for tiles [{kv_heads}, {head_dim}, {TILE}] in FP8, not {tuple(room.shape)} {room.dtype}")
    num_seqs = block_tables.shape[0]
    first_tiles = torch.empty(num_seqs, dtype=torch.int32, device=kv.device)
    lens = torch.empty(num_seqs, dtype=torch.int32, device=kv.device)
    programs = 4 if INTERPRETED else 4 * multiprocessors(kv.device)
    _transpose_values_kernel[(programs,)](
        kv.view(torch.uint8), block_tables, query_start, seq_lens, room.view(torch.uint8), first_tiles, lens, num_seqs,
        block_tables.stride(0), room.shape[0],
        KV_HEADS=kv_heads, DIM=head_dim, PAGE=page, TILE=TILE,
        SEQS=max(next_power_of_2(num_seqs), 256 if not INTERPRETED else 2), LONG=long_tokens, FEW=few_short,
        num_warps=8, **dependent_launch(kv.device),
    )  # fmt: skip
    return first_tiles, lens
