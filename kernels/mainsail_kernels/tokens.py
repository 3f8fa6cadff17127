"""What goes into a step and comes out of it, and tokens that stay on the device between steps: each slot's newest.

    token ids   7  0  0  12        from_slots  -1  4  2  -1        newest[4] = 31, newest[2] = 8
    resolved    7 31  8  12

One small launch each, where plain indexing takes four. Inputs are read where the host wrote them, and tokens written
where it reads them: in pinned memory, over the bus, by ordinary kernels. The copy engine would do it no faster for so
few bytes, and the device stands still for some 10 µs each time that it waits for it or it for the device.
"""

import torch

from mainsail_kernels import reference
from mainsail_kernels._triton import Launcher, require, runs_kernels, tl, triton

_BLOCK = 256
_UNPACK_BLOCK = 1024


@triton.jit(do_not_specialize=["count"])
def _resolve_kernel(tokens_ptr, slots_ptr, newest_ptr, out_ptr, count, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    slot = tl.load(slots_ptr + index, mask=inside, other=-1).to(tl.int64)
    token = tl.load(tokens_ptr + index, mask=inside, other=0).to(tl.int64)
    newest = tl.load(newest_ptr + slot, mask=inside & (slot >= 0), other=0).to(tl.int64)
    tl.store(out_ptr + index, tl.where(slot >= 0, newest, token), mask=inside)


@triton.jit(do_not_specialize=["count"])
def _note_kernel(tokens_ptr, slots_ptr, newest_ptr, count, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    slot = tl.load(slots_ptr + index, mask=inside, other=0).to(tl.int64)
    token = tl.load(tokens_ptr + index, mask=inside, other=0)
    tl.store(newest_ptr + slot, tl.maximum(token, 0), mask=inside)


@triton.jit(do_not_specialize=["numbers", "total", "decodes", "gap", "width", "stride"])
def _unpack_kernel(
    source_ptr, packed_ptr, tables_ptr, numbers, total, decodes, gap, width, stride, BLOCK: tl.constexpr
):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    number = tl.load(source_ptr + index, mask=index < total, other=0)
    tl.store(packed_ptr + index, number, mask=index < numbers)
    cell = tl.maximum(index - numbers, 0)
    row = cell // width
    place = (row + tl.where(row >= decodes, gap, 0)) * stride + cell - row * width
    tl.store(tables_ptr + place, number, mask=(index >= numbers) & (index < total))


@triton.jit(do_not_specialize=["count"])
def _send_kernel(tokens_ptr, host_ptr, count, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(host_ptr + index, tl.load(tokens_ptr + index, mask=index < count, other=0), mask=index < count)


_launch_unpack = Launcher(_unpack_kernel, (_UNPACK_BLOCK,), num_warps=4)
_launch_send = Launcher(_send_kernel, (_BLOCK,), num_warps=2)


def unpack(
    source: torch.Tensor, packed: torch.Tensor, tables: torch.Tensor, *, width: int, decodes: int, gap: int
) -> None:
    """A step's inputs, source [n + rows * width] in pinned memory, to packed[:n] and the rest, by rows, to tables.

    Row i goes to tables[i], from i = decodes on to tables[i + gap]. All int32, contiguous; tables [num_rows, at least
    width]. n is what packed has room for or what is left beside whole rows: pass packed[:n]. ValueError when it does
    not fit.
    """
    numbers, total, rows = packed.shape[0], source.shape[0], 0
    if width > 0:
        rows = (total - numbers) // width
    fits = numbers + rows * width == total and width <= tables.shape[1] and rows + gap <= tables.shape[0]
    if not fits:
        raise ValueError(f"unpack: {total} numbers are not {numbers} and rows of {width} for {tuple(tables.shape)}")
    if not runs_kernels(packed):
        reference.unpack(source, packed, tables, width, decodes, gap)
    elif total:
        tensors, places = (source, packed, tables), (decodes, gap, max(width, 1), tables.stride(0))
        _launch_unpack(-(-total // _UNPACK_BLOCK), tensors, numbers, total, *places)


def send(tokens: torch.Tensor, on_host: torch.Tensor) -> None:
    """Write tokens [n] int64 of the device to on_host [n] int64 in pinned memory. ValueError on other shapes."""
    if tokens.shape != on_host.shape or tokens.dim() != 1:
        raise ValueError(f"send: {tuple(tokens.shape)}, {tuple(on_host.shape)}")
    if not runs_kernels(tokens) or tokens.stride(0) != 1 or tokens.dtype != on_host.dtype:
        on_host.copy_(tokens, non_blocking=True)
    elif count := tokens.shape[0]:
        _launch_send(-(-count // _BLOCK), (tokens, on_host), count)


def resolve(tokens: torch.Tensor, from_slots: torch.Tensor, newest: torch.Tensor) -> torch.Tensor:
    """[n] int64: tokens where from_slots is negative, else newest[from_slots].

    tokens and from_slots [n] of any integer type, newest [num_slots] int64. ValueError on other shapes.
    """
    same = tokens.dim() == 1 and tokens.shape == from_slots.shape
    require(same, f"resolve: tokens {tuple(tokens.shape)} and from_slots {tuple(from_slots.shape)} must be [n]")
    if not runs_kernels(tokens):
        return reference.resolve(tokens, from_slots, newest)
    count = tokens.shape[0]
    out = torch.empty(count, dtype=torch.int64, device=tokens.device)
    if count:
        _resolve_kernel[(-(-count // _BLOCK),)](tokens, from_slots, newest, out, count, BLOCK=_BLOCK, num_warps=2)
    return out


def note(newest: torch.Tensor, slots: torch.Tensor, tokens: torch.Tensor) -> None:
    """newest[slots] = tokens, a failed row's code below 0 as 0. slots and tokens [n]; equal slots: any one wins.

    ValueError on other shapes.
    """
    same = tokens.dim() == 1 and tokens.shape == slots.shape
    require(same, f"note: tokens {tuple(tokens.shape)} and slots {tuple(slots.shape)} must be [n]")
    if not runs_kernels(tokens):
        reference.note(newest, slots, tokens)
    elif count := tokens.shape[0]:
        _note_kernel[(-(-count // _BLOCK),)](tokens, slots, newest, count, BLOCK=_BLOCK, num_warps=2)
