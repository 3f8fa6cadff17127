"""Tokens that stay on the device between steps: each slot's newest, taken as an input and noted as an output.

    token ids   7  0  0  12        from_slots  -1  4  2  -1        newest[4] = 31, newest[2] = 8
    resolved    7 31  8  12

One small launch each, where plain indexing takes four.
"""

import torch

from mainsail_kernels import reference
from mainsail_kernels._triton import require, runs_kernels, tl, triton

_BLOCK = 256


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
