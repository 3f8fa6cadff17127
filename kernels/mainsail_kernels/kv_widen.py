"""Pages of an FP8 cache that prompts attend to, widened once for all of a layer's attention.

Matrix units take keys and values of 16 bits from shared memory, and a prompt's every tile of rows would widen the same
pages again. It is cheaper to do so once: a page is read and written at the rate of memory (3 bytes a number), and what
attends is attention_hopper's kernel as it is. What that saves grows with a chunk's tokens times its context, what it
costs with the context, and with what short chunks of the step wait for: whoever plans a step decides whether it pays
(PAYING_PAIRS). Which of its chunks are long is then seen on the device, where a captured graph reads their lengths:

    block_tables[s, j] ─▶ kv[block] e4m3 ─▶ room[page]        page: the pages of long chunks, one after another
                                            tables[s, j] = page, lens[s] = seq_lens[s]

and chunks that are short, or that the room has no place for, have a length of 0 there and are attended to as they are.
Few short ones are widened too: theirs is the time of one program that reads a whole context, which is longer as it is.
"""

from collections.abc import Sequence

import torch

from mainsail_kernels import attention_hopper
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

ROOM_BYTES = 1 << 30
"""That a room takes at most: contexts of 262,144 tokens together, of 8 KV heads of 128 channels."""
LONG_TOKENS = 128
"""Of a chunk whose pages are widened, at least …"""
FEW_SHORT = 2
"""… if more than so many chunks of the step have fewer."""
PAYING_PAIRS = 2_000_000
"""Of query and key in a step's long chunks, from which on widening pays: on an H200 1.6 million, most of them in short
chunks, lose 12 % of a layer's attention, 4.2 million gain 25 %."""


@triton.jit(
    do_not_specialize=["num_seqs", "table_stride", "wide_stride", "num_pages"],
    do_not_specialize_on_alignment=["tables_ptr", "starts_ptr", "lens_ptr"],
)
def _widen_pages_kernel(
    kv_ptr,
    tables_ptr,
    starts_ptr,
    lens_ptr,
    room_ptr,
    wide_tables_ptr,
    wide_lens_ptr,
    num_seqs,
    table_stride,
    wide_stride,
    num_pages,
    PAGE: tl.constexpr,
    SIZE: tl.constexpr,
    SEQS: tl.constexpr,
    BLOCK: tl.constexpr,
    LONG: tl.constexpr,
    FEW: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    wait_for_inputs(DEPENDENT)
    index = tl.arange(0, SEQS)
    real = index < num_seqs
    start = tl.load(starts_ptr + index, mask=real, other=0)
    lens = tl.load(lens_ptr + index, mask=real, other=0)
    tokens = tl.load(starts_ptr + index + 1, mask=real, other=0) - start
    short = (tokens > 0) & (tokens < LONG)
    long = (tokens >= LONG) | (short & (tl.sum(short.to(tl.int32), axis=0) <= FEW))
    pages = tl.where(long, (lens + PAGE - 1) // PAGE, 0)
    ends = tl.cumsum(pages, axis=0)
    widened = long & (ends <= num_pages)
    if tl.program_id(0) == 0:
        tl.store(wide_lens_ptr + index, tl.where(widened, lens, 0), mask=real)
    total = tl.max(tl.where(widened, ends, 0), axis=0)
    for page in tl.range(tl.program_id(0), total, tl.num_programs(0)):
        seq = tl.sum((ends <= page).to(tl.int32), axis=0)
        begin = tl.sum(tl.where(index == seq, ends - pages, 0), axis=0)
        at = page - begin
        block = tl.load(tables_ptr + seq.to(tl.int64) * table_stride + at).to(tl.int64)
        tl.store(wide_tables_ptr + seq.to(tl.int64) * wide_stride + at, page)
        place = tl.arange(0, BLOCK)
        for first in tl.static_range(0, SIZE, BLOCK):
            inside = first + place < SIZE
            numbers = tl.load(kv_ptr + block * SIZE + first + place, mask=inside, other=0.0)
            target = room_ptr + (begin + at).to(tl.int64) * SIZE + first + place
            tl.store(target, numbers.to(tl.float32).to(room_ptr.dtype.element_ty), mask=inside)


def are_widened(tokens: Sequence[int]) -> list[bool]:
    """Whether pages of chunks of so many tokens, which a step has together, are widened if it widens any."""
    few = sum(0 < count < LONG_TOKENS for count in tokens) <= FEW_SHORT
    return [count >= LONG_TOKENS or (few and count > 0) for count in tokens]


def room_shape(kv: torch.Tensor, most_pages: int, num_heads: int, dtype: torch.dtype) -> tuple[int, ...] | None:
    """The shape of a room of dtype beside kv [num_blocks, 2, num_kv_heads, page, head_dim], for most_pages or what
    ROOM_BYTES hold. None where prompts' attention would not use one: of caches that are not in FP8, on other cards."""
    query = kv.new_empty((0, num_heads, kv.shape[4]), dtype=dtype)
    one = kv.new_empty((1, *kv.shape[1:]), dtype=dtype)
    if kv.dtype != FP8 or not attention_hopper.applies(query, one, 0, 0.0, None):
        return None
    return (min(most_pages, ROOM_BYTES // (one.numel() * dtype.itemsize)), *kv.shape[1:])


def widen_pages(
    kv: torch.Tensor, block_tables: torch.Tensor, query_start: torch.Tensor, seq_lens: torch.Tensor,
    room: torch.Tensor, long_tokens: int = LONG_TOKENS, few_short: int = FEW_SHORT,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(tables [num_seqs, max_blocks] int32, lens [num_seqs] int32) of room's pages, into which goes what block_tables
    name of kv [num_blocks, 2, num_kv_heads, page, head_dim] in FP8, up to seq_lens, of chunks of long_tokens and
    more, and of shorter ones if these are few_short or fewer, in their order for as long as room [pages, 2,
    num_kv_heads, page, head_dim] holds them; what it held is gone. The lens of all other chunks are 0.
    query_start [num_seqs + 1] int32, as of paged_attention_prefill.
    Raises ValueError when shapes or types do not fit."""
    require(kv.dtype == FP8 and kv.is_contiguous(), f"a contiguous cache in FP8, not {kv.dtype}")
    require(room.shape[1:] == kv.shape[1:] and room.is_contiguous(), f"room for pages {tuple(kv.shape[1:])}")
    num_seqs, width = block_tables.shape
    tables = torch.empty((num_seqs, width), dtype=torch.int32, device=kv.device)
    lens = torch.empty(num_seqs, dtype=torch.int32, device=kv.device)
    size = kv.shape[1:].numel()
    programs = 4 if INTERPRETED else 4 * multiprocessors(kv.device)
    _widen_pages_kernel[(programs,)](
        kv, block_tables, query_start, seq_lens, room, tables, lens, num_seqs, block_tables.stride(0), width,
        room.shape[0],
        PAGE=kv.shape[3], SIZE=size, SEQS=max(next_power_of_2(num_seqs), 2), BLOCK=min(next_power_of_2(size), 4096),
        LONG=long_tokens, FEW=few_short, num_warps=8, **dependent_launch(kv.device),
    )  # fmt: skip
    return tables, lens
