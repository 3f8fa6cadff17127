"""GGUF's block types as codes in groups (kernels' grouped.py), number for number: nothing is rounded on the way.

    type         of a block of 32 or 256 inputs                                      bits here (in the file)
    Q4_0, Q4_1   scale; and an offset                                                 4.5, 5.0  (4.5, 5.0)
    Q4_K         6-bit scales and offsets for 32 inputs each, and one factor for each  4.6       (4.5)
    Q8_0         scale                                                                8.5       (8.5)
    Q5_0, Q5_1   scale; and an offset: their codes take 8 bits here                   8.5, 9.0  (5.5, 6.0)
    Q5_K, Q6_K   as Q4_K; 8-bit scales for 16 inputs each and a factor               8.6, 8.6  (5.5, 6.6)

Other types have no codes here: their tensors are dequantized when they are loaded. Layouts: ggml's `ggml-common.h`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from mainsail_kernels.grouped import Codes
from mainsail_kernels.reference_quantized import pack


class Blocks(NamedTuple):
    """A GGUF tensor as it is in the file."""

    type: str
    data: torch.Tensor
    """[rows, bytes] uint8."""


class Layout(NamedTuple):
    size: int
    """Inputs of a block."""
    num_bytes: int
    read: Callable[[torch.Tensor], Codes]
    """From the bytes [rows, blocks, num_bytes]."""


def codes_of(blocks: Blocks) -> Codes:
    """Of a type in LAYOUTS."""
    layout = LAYOUTS[blocks.type]
    return layout.read(blocks.data.view(blocks.data.shape[0], -1, layout.num_bytes))


def _half(data: torch.Tensor, at: int) -> torch.Tensor:
    """[rows, blocks] float16 at that byte of each block."""
    return data[..., at : at + 2].contiguous().view(torch.float16)[..., 0].contiguous()


def _nibbles(data: torch.Tensor, at: int, stop: int, run: int) -> torch.Tensor:
    """[rows, blocks, 2 * (stop - at)] int32: of every `run` bytes first the low halves, then the high ones."""
    packed = data[..., at:stop].to(torch.int32)
    packed = packed.view(*packed.shape[:2], -1, 1, run)
    return torch.cat((packed & 15, packed >> 4), dim=-2).flatten(2)


def _codes(
    values: torch.Tensor, bits: int, group: int, zero: int = 0, *, scale: torch.Tensor,
    offset: torch.Tensor | None = None, super_scale: torch.Tensor | None = None,
    super_offset: torch.Tensor | None = None,
) -> Codes:  # fmt: skip
    """values [rows, blocks, size] int32."""
    words = pack(values.flatten(1), bits, group)
    return Codes(words, bits, group, scale, offset, super_scale, super_offset, zero)


def _q4_0(data: torch.Tensor) -> Codes:
    return _codes(_nibbles(data, 2, 18, 16), 4, 32, 8, scale=_half(data, 0))


def _q4_1(data: torch.Tensor) -> Codes:
    return _codes(_nibbles(data, 4, 20, 16), 4, 32, scale=_half(data, 0), offset=_half(data, 2))


def _fifth_bits(data: torch.Tensor, at: int) -> torch.Tensor:
    """[rows, blocks, 32] int32, 0 or 16: the fifth bits of Q5_0 and Q5_1, one for each input."""
    word = data[..., at : at + 4].contiguous().view(torch.int32)
    return ((word >> torch.arange(32, dtype=torch.int32, device=data.device)) & 1) << 4


def _q5_0(data: torch.Tensor) -> Codes:
    return _codes(_nibbles(data, 6, 22, 16) | _fifth_bits(data, 2), 8, 32, 16, scale=_half(data, 0))


def _q5_1(data: torch.Tensor) -> Codes:
    values = _nibbles(data, 8, 24, 16) | _fifth_bits(data, 4)
    return _codes(values, 8, 32, scale=_half(data, 0), offset=_half(data, 2))


def _q8_0(data: torch.Tensor) -> Codes:
    values = data[..., 2:34].contiguous().view(torch.int8).to(torch.int32) + 128
    return _codes(values, 8, 32, 128, scale=_half(data, 0))


def _six_bits(data: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(scales, offsets) [rows, 8 * blocks] uint8 of 12 packed bytes [rows, blocks, 12] of the K types."""
    low, mid, high = data.view(*data.shape[:2], 3, 4).unbind(2)
    scales = torch.cat((low & 0x3F, (high & 0x0F) | ((low >> 2) & 0x30)), dim=-1)
    offsets = torch.cat((mid & 0x3F, (high >> 4) | ((mid >> 2) & 0x30)), dim=-1)
    return scales.flatten(1).contiguous(), offsets.flatten(1).contiguous()


def _k_codes(data: torch.Tensor, values: torch.Tensor, bits: int) -> Codes:
    scale, offset = _six_bits(data[..., 4:16].contiguous())
    factors = _half(data, 0), _half(data, 2)
    return _codes(values, bits, 32, scale=scale, offset=offset, super_scale=factors[0], super_offset=factors[1])


def _q4_k(data: torch.Tensor) -> Codes:
    return _k_codes(data, _nibbles(data, 16, 144, 32), 4)


def _q5_k(data: torch.Tensor) -> Codes:
    bit = torch.arange(8, dtype=torch.int32, device=data.device)[:, None]
    fifth = ((data[..., None, 16:48].to(torch.int32) >> bit) & 1) << 4
    return _k_codes(data, _nibbles(data, 48, 176, 32) | fifth.flatten(2), 8)


def _q6_k(data: torch.Tensor) -> Codes:
    low = _nibbles(data, 0, 128, 64)  # runs of 64 bytes: inputs 0-63 low, 64-127 high
    shift = torch.arange(0, 8, 2, dtype=torch.int32, device=data.device)[:, None]
    high = (data[..., 128:192].to(torch.int32).view(*data.shape[:2], 2, 1, 32) >> shift) & 3
    scale = data[..., 192:208].contiguous().view(torch.int8).flatten(1).contiguous()
    return _codes(low | (high.flatten(2) << 4), 8, 16, 32, scale=scale, super_scale=_half(data, 208))


LAYOUTS = {
    "Q4_0": Layout(32, 18, _q4_0),
    "Q4_1": Layout(32, 20, _q4_1),
    "Q5_0": Layout(32, 22, _q5_0),
    "Q5_1": Layout(32, 24, _q5_1),
    "Q8_0": Layout(32, 34, _q8_0),
    "Q4_K": Layout(256, 144, _q4_k),
    "Q5_K": Layout(256, 176, _q5_k),
    "Q6_K": Layout(256, 210, _q6_k),
}
