"""Numbers of 8 bits in kernels: rounding to e4m3, and back to 16 bits two by two; rows that were quantized."""

from dataclasses import dataclass
from typing import Any

import torch

from mainsail_kernels._triton import tl, triton


@dataclass(frozen=True, slots=True)
class QuantizedRows:
    """A matrix [n, in] of activations as FP8 linears take it: each row's largest number is 448."""

    codes: torch.Tensor
    """[n, in] e4m3."""
    scale: torch.Tensor
    """[n] float32."""
    dtype: torch.dtype
    """Of the numbers that they stand for, and of what becomes of them."""

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def wide(self) -> torch.Tensor:
        """The numbers themselves, [n, in] float32."""
        return self.codes.float() * self.scale[:, None]


@triton.jit
def row_scale(x, AXIS: tl.constexpr):
    """What float32 numbers are divided by so that the largest along an axis becomes 448."""
    # A NaN or an infinity makes the scale NaN: broken rows are seen as such at the end, instead of looking sound.
    largest = tl.max(tl.abs(x), axis=AXIS) + tl.sum(x * 0.0, axis=AXIS)
    return tl.where(largest < 1e-12, 1e-12, largest) / 448.0


@triton.jit
def rounded_to_e4m3(x):
    """The e4m3 numbers nearest to float32 ones under 448, ties to even, still in float32."""
    bits = x.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
    return tl.where(tl.abs(x) < 0.015625, (x + 24576.0) - 24576.0, normal)


@triton.jit
def to_e4m3(x, ROUND: tl.constexpr):
    """float32 to e4m3, nearest even, out of range to the largest number.

    ROUND: round by hand to what e4m3 can hold first; the interpreter's own narrowing does not carry into the exponent.
    """
    x = tl.minimum(tl.maximum(x, -448.0), 448.0)
    if ROUND:
        x = rounded_to_e4m3(x)
    return x.to(tl.float8e4nv)


LOWER_E4M3: Any = tl.constexpr(
    "{ .reg .b32 a; shl.b32 a, $1, 7; and.b32 a, a, 0x3f803f80; "
    "shl.b32 $0, $1, 8; lop3.b32 $0, $0, 0x80008000, a, 0xea; }"
)
UPPER_E4M3: Any = tl.constexpr(
    "{ .reg .b32 a; shr.b32 a, $1, 1; and.b32 a, a, 0x3f803f80; lop3.b32 $0, $1, 0x80008000, a, 0xea; }"
)
"""What `e4m3_pairs` does, in PTX. Any: a kernel sees the text itself."""


@triton.jit
def e4m3_pairs(pairs, PTX: tl.constexpr):
    """Of int16 words that hold two e4m3 numbers each: the lower ones and the upper ones, in float16, over 256.

    Words of 16 bits take the ways through shared memory that matrix units' operands of 16 bits take, where those of 8
    would be moved one by one. Seven bits moved to where float16 has its exponent's lower four and its mantissa are the
    number over 256, small ones included. PTX: two words at a time, on NVIDIA's.
    """
    if PTX:
        lower = tl.inline_asm_elementwise(LOWER_E4M3, "=r,r", [pairs], dtype=tl.float16, is_pure=True, pack=2)
        upper = tl.inline_asm_elementwise(UPPER_E4M3, "=r,r", [pairs], dtype=tl.float16, is_pure=True, pack=2)
    else:
        word = pairs.to(tl.int32)
        lower = (((word << 7) & 0x3F80) | ((word << 8) & 0x8000)).to(tl.int16).to(tl.float16, bitcast=True)
        upper = (((word >> 1) & 0x3F80) | (word & 0x8000)).to(tl.int16).to(tl.float16, bitcast=True)
    return lower, upper


@triton.jit
def e4m3_words(words, PTX: tl.constexpr):
    """The four e4m3 numbers of each word as float32, the lowest first."""
    if PTX:
        a, b, c, d = tl.inline_asm_elementwise(
            """{ .reg .b16 l, h, p, q; .reg .b32 m; mov.b32 {l, h}, $4;
            cvt.rn.f16x2.e4m3x2 m, l; mov.b32 {p, q}, m; cvt.f32.f16 $0, p; cvt.f32.f16 $1, q;
            cvt.rn.f16x2.e4m3x2 m, h; mov.b32 {p, q}, m; cvt.f32.f16 $2, p; cvt.f32.f16 $3, q; }""",
            "=&f,=&f,=&f,=f,r", [words], dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        a = (words & 255).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32)
        b = ((words >> 8) & 255).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32)
        c = ((words >> 16) & 255).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32)
        d = ((words >> 24) & 255).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32)
    return a, b, c, d
