"""Linears whose weights are integer codes of 4 or 8 bits with a scale (and an offset) for each group of inputs.

    w[o, i] = scale[o, g] * (code[o, i] - ZERO) + offset[o, g]            g = i // group

which is AWQ (Lin et al., 2023), GPTQ (Frantar et al., 2022) and compressed-tensors in groups of 32 to 128, and GGUF's
types. Scales and offsets may be small integers times a number for each super-block of inputs, as in GGUF's K types:
they are kept in that form, so that nothing is rounded twice and Q4_K takes 4.6 bits. An offset is one of

    none        symmetric INT4, Q8_0, Q6_K
    zeros       an integer z for each group: -scale * z (AWQ, GPTQ, asymmetric compressed-tensors)
    offsets     a number for each group (Q4_1), or with super-blocks its negative (Q4_K: -dmin * m)

Codes are packed in 32-bit words so that a kernel never shuffles: word j of a group holds, from its lowest bits on,
inputs j, j + group/8, j + 2 * group/8, … (4 bits). So bits 4p of neighbouring words are neighbouring inputs, and one
word has one scale. An integer becomes a float by putting it, where it lies, under the exponent that makes its last bit
a one.

    1 row        codes meet the row in registers; a group's sum is scaled once a word
    2 to 8 rows  in groups of 128 on Hopper: codes go to the matrix unit as they are (grouped_few.py)
    a few rows   a tile is dequantized in registers, then tl.dot; inputs split over programs where outputs are few
    more         all weights are dequantized into a buffer, then cuBLAS: 16-bit products are what many rows cost anyway
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from mainsail_kernels import grouped_few
from mainsail_kernels import reference_quantized as reference
from mainsail_kernels._split import arrive, collect, split_that_fits, workspace
from mainsail_kernels._triton import (
    INTERPRETED,
    dependent_launch,
    next_power_of_2,
    prefetch_lines,
    prefetch_rows,
    require,
    runs_kernels,
    tl,
    triton,
    wait_for_inputs,
)
from mainsail_kernels.tuned import QuantizedConfig, grouped_config, nibbles_config, row_groups_config

EXPONENTS = 0x43004300
"""Of two bfloat16 of 128: a kernel's argument, so that an instruction has it in a register beside a mask."""


@dataclass(frozen=True, slots=True)
class Codes:
    """A quantized matrix [out, in]."""

    words: torch.Tensor
    """[out, in * bits / 32] int32."""
    bits: int
    """4 or 8."""
    group: int
    """Inputs that share a scale; a multiple of 32 / bits."""
    scale: torch.Tensor
    """[out, in / group]: float16, bfloat16 or float32; int8 or uint8 where there are super-blocks."""
    offset: torch.Tensor | None = None
    """[out, in / group], of scale's kind; uint8 where `zeros`."""
    super_scale: torch.Tensor | None = None
    """[out, super-blocks] float16: what scales are multiplied by."""
    super_offset: torch.Tensor | None = None
    """[out, super-blocks] float16: what offsets are multiplied by, and then subtracted."""
    zero: int = 0
    """Subtracted from every code."""
    zeros: bool = False
    """Offsets are integers z that mean -scale * z."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.words.shape[0], self.words.shape[1] * 32 // self.bits

    def check(self) -> None:
        """Raises ValueError unless the parts fit together."""
        out, num_in = self.shape
        groups = num_in // self.group
        whole = self.bits in (4, 8) and num_in % self.group == 0 and self.group % (32 // self.bits) == 0
        require(whole, f"codes of {self.bits} bits [{out}, {num_in}] in groups of {self.group}")
        for name, part in (("scale", self.scale), ("offset", self.offset)):
            fits = part is None or (part.shape == (out, groups) and part.is_contiguous())
            require(fits, f"codes: {name} must be contiguous [{out}, {groups}]")
        for part in (self.super_scale, self.super_offset):
            fits = part is None or (part.dim() == 2 and part.shape[0] == out and groups % part.shape[1] == 0)
            require(fits, f"codes: super-blocks must divide the {groups} groups")
        require(self.words.dtype == torch.int32 and self.words.is_contiguous(), "codes: words must be contiguous int32")


@triton.jit
def _scale_and_offset(
    scale_ptr,
    offset_ptr,
    super_scale_ptr,
    super_offset_ptr,
    output,
    group,
    groups,
    inside,
    PER_SUPER: tl.constexpr,
    OFFSET: tl.constexpr,
    ZEROS: tl.constexpr,
):
    """float32 (scale, offset) of these groups; output [m, 1], group [1, n]. PER_SUPER: groups of one, or 0."""
    at = output * groups + group
    scale = tl.load(scale_ptr + at, mask=inside, other=0.0).to(tl.float32)
    offset = scale
    if PER_SUPER > 0:
        above = output * (groups // PER_SUPER) + group // PER_SUPER
        scale *= tl.load(super_scale_ptr + above, mask=inside, other=0.0).to(tl.float32)
    if OFFSET:
        offset = tl.load(offset_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if ZEROS:
            offset = -scale * offset
        if PER_SUPER > 0:
            offset = -offset * tl.load(super_offset_ptr + above, mask=inside, other=0.0).to(tl.float32)
    return scale, offset


@triton.jit
def _code(words, PLACE: tl.constexpr, BITS: tl.constexpr, ZERO: tl.constexpr):
    """The code at this place of each word, less ZERO, as float32."""
    # Where it lies, if its bits are all in a float's mantissa; else after one shift that the places beyond share.
    HERE: tl.constexpr = BITS * PLACE
    SHIFT: tl.constexpr = 0 if HERE + BITS <= 23 else (12 if BITS == 4 else 16)  # pyright: ignore[reportAssignmentType]
    AT: tl.constexpr = HERE - SHIFT
    EXPONENT: tl.constexpr = (150 - AT) << 23
    BASE: tl.constexpr = (1 << (23 - AT)) + ZERO
    bits = (words >> SHIFT) & (((1 << BITS) - 1) << AT)
    return (bits | EXPONENT).to(tl.float32, bitcast=True) - BASE


@triton.jit
def _row_kernel(
    x_ptr,
    words_ptr,
    scale_ptr,
    offset_ptr,
    super_scale_ptr,
    super_offset_ptr,
    bias_ptr,
    out_ptr,
    num_out,
    num_words,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    PER_SUPER: tl.constexpr,
    OFFSET: tl.constexpr,
    ZEROS: tl.constexpr,
    ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    LINES: tl.constexpr,
    STAGES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """out [num_out] of one row: a group's sum is scaled once a word. Parts and constants: Codes."""
    PER: tl.constexpr = 32 // BITS
    EACH: tl.constexpr = GROUP // PER
    output = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    inner = tl.minimum(output, num_out - 1).to(tl.int64)[:, None]
    rows = words_ptr + inner * num_words
    groups = num_words // EACH
    if DEPENDENT:
        prefetch_rows(rows, 0, num_words, 32, LINES)
    wait_for_inputs(DEPENDENT)
    acc = tl.zeros((BLOCK_OUT, BLOCK_WORDS), tl.float32)
    for start in tl.range(0, num_words, BLOCK_WORDS, num_stages=STAGES):
        word = start + tl.arange(0, BLOCK_WORDS)
        inside = word < num_words
        group = word // EACH
        words = tl.load(rows + word[None, :], mask=inside[None, :], other=0)
        scale, offset = _scale_and_offset(
            scale_ptr, offset_ptr, super_scale_ptr, super_offset_ptr, inner, group[None, :], groups, inside[None, :],
            PER_SUPER, OFFSET, ZEROS,
        )  # fmt: skip
        channel = group * GROUP + word % EACH
        total = tl.zeros((BLOCK_OUT, BLOCK_WORDS), tl.float32)
        x_total = tl.zeros((BLOCK_WORDS,), tl.float32)
        for place in tl.static_range(PER):
            x = tl.load(x_ptr + channel + place * EACH, mask=inside, other=0.0).to(tl.float32)
            total += _code(words, place, BITS, ZERO) * x[None, :]
            if OFFSET:
                x_total += x
        acc += total * scale
        if OFFSET:
            acc += offset * x_total[None, :]
    result = tl.sum(acc, axis=1)
    if HAS_BIAS:
        result += tl.load(bias_ptr + output, mask=output < num_out, other=0.0).to(tl.float32)
    tl.store(out_ptr + output, result.to(out_ptr.dtype.element_ty), mask=output < num_out)


@triton.jit(do_not_specialize=["num_rows"])
def _rows_kernel(
    x_ptr,
    words_ptr,
    scale_ptr,
    offset_ptr,
    super_scale_ptr,
    super_offset_ptr,
    bias_ptr,
    out_ptr,
    partial_ptr,
    counters_ptr,
    num_rows,
    num_out,
    num_words,
    x_stride,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    PER_SUPER: tl.constexpr,
    OFFSET: tl.constexpr,
    ZEROS: tl.constexpr,
    ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    LINES: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """out [num_rows, num_out]: BLOCK_OUT outputs of all rows, of which SPLIT programs share the inputs."""
    PER: tl.constexpr = 32 // BITS
    EACH: tl.constexpr = GROUP // PER
    tile, part = tl.program_id(0), tl.program_id(1)
    output = tile * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    inner = tl.minimum(output, num_out - 1).to(tl.int64)[:, None]
    word_rows = words_ptr + inner * num_words
    groups = num_words // EACH
    span = tl.cdiv(tl.cdiv(num_words, BLOCK_WORDS), SPLIT) * BLOCK_WORDS
    first = part * span
    last = tl.minimum(first + span, num_words)
    if DEPENDENT:
        prefetch_rows(word_rows, first, num_words, 32, LINES)
    row = tl.arange(0, ROWS)
    real = row < num_rows
    x_rows = x_ptr + row[:, None] * x_stride
    wait_for_inputs(DEPENDENT)
    acc = tl.zeros((BLOCK_OUT, ROWS), tl.float32)
    for start in tl.range(first, last, BLOCK_WORDS, num_stages=STAGES):
        word = start + tl.arange(0, BLOCK_WORDS)
        inside = word < num_words
        group = word // EACH
        words = tl.load(word_rows + word[None, :], mask=inside[None, :], other=0)
        scale, offset = _scale_and_offset(
            scale_ptr, offset_ptr, super_scale_ptr, super_offset_ptr, inner, group[None, :], groups, inside[None, :],
            PER_SUPER, OFFSET, ZEROS,
        )  # fmt: skip
        channel = group * GROUP + word % EACH
        for place in tl.static_range(PER):
            x = tl.load(x_rows + (channel + place * EACH)[None, :], mask=real[:, None] & inside[None, :], other=0.0)
            weight = _code(words, place, BITS, ZERO) * scale
            if OFFSET:
                weight += offset
            acc = tl.dot(weight.to(x.dtype), tl.trans(x), acc, input_precision="ieee")
    fits = (output < num_out)[:, None] & real[None, :]
    where = row[None, :] * num_out + output[:, None]
    if SPLIT > 1:
        size = num_rows * num_out
        if arrive(acc, partial_ptr, counters_ptr + tile, part, size, where, fits) != SPLIT - 1:
            return
        acc = collect(acc, partial_ptr, counters_ptr + tile, size, where, fits, SPLIT)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + output, mask=output < num_out, other=0.0).to(tl.float32)[:, None]
    tl.store(out_ptr + where, acc.to(out_ptr.dtype.element_ty), mask=fits)


@triton.jit
def _spread_kernel(
    x_ptr,
    out_ptr,
    num_words,
    x_stride,
    PER: tl.constexpr,
    EACH: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """x [n, in] to [n, PER, words]: the inputs that meet place p of each word, side by side."""
    row = tl.program_id(1).to(tl.int64)
    word = tl.program_id(0) * BLOCK_WORDS + tl.arange(0, BLOCK_WORDS)
    inside = word < num_words
    wait_for_inputs(DEPENDENT)
    for place in tl.static_range(PER):
        channel = word // EACH * (EACH * PER) + place * EACH + word % EACH
        x = tl.load(x_ptr + row * x_stride + channel, mask=inside, other=0.0)
        tl.store(out_ptr + (row * PER + place) * num_words + word, x, mask=inside)


@triton.jit
def _bfloat16_bits(x):
    """The upper 16 bits of the nearest bfloat16s, as int32."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & 0xFFFF


@triton.jit
def _weights(words, factors, FUSED: tl.constexpr, PTX: tl.constexpr):
    """bfloat16 weights of the 4-bit codes in bits 0 to 3, and in bits 16 to 19, of each word.

    factors has the scale in its lower half and in its upper one, FUSED, the offset: code * scale + offset; else 128
    and the zero point: (code - zero) * scale. A code under the exponent of 128 is 128 + code, exactly. PTX: the words
    of two neighbouring inputs at a time, on Hopper; else float32, for the interpreter, which multiplies no bfloat16.
    """
    if PTX:
        if FUSED:
            lower, upper = tl.inline_asm_elementwise(
                """{ .reg .b32 a, b, s, o, h;
                lop3.b32 a, $2, 0x000f000f, 0x43004300, 0xea; lop3.b32 b, $3, 0x000f000f, 0x43004300, 0xea;
                prmt.b32 s, $4, $5, 0x5410; prmt.b32 o, $4, $5, 0x7632; mov.b32 h, 0x43004300;
                prmt.b32 $0, a, b, 0x5410; prmt.b32 $1, a, b, 0x7632;
                sub.bf16x2 $0, $0, h; sub.bf16x2 $1, $1, h;
                fma.rn.bf16x2 $0, $0, s, o; fma.rn.bf16x2 $1, $1, s, o; }""",
                "=&r,=&r,r,r,r,r", [words, factors], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=2,
            )  # fmt: skip
        else:
            lower, upper = tl.inline_asm_elementwise(
                """{ .reg .b32 a, b, s, o;
                lop3.b32 a, $2, 0x000f000f, 0x43004300, 0xea; lop3.b32 b, $3, 0x000f000f, 0x43004300, 0xea;
                prmt.b32 s, $4, $5, 0x5410; prmt.b32 o, $4, $5, 0x7632;
                prmt.b32 $0, a, b, 0x5410; prmt.b32 $1, a, b, 0x7632;
                sub.bf16x2 $0, $0, o; sub.bf16x2 $1, $1, o;
                mul.bf16x2 $0, $0, s; mul.bf16x2 $1, $1, s; }""",
                "=&r,=&r,r,r,r,r", [words, factors], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=2,
            )  # fmt: skip
    else:
        scale = (factors << 16).to(tl.float32, bitcast=True)
        other = (factors & -65536).to(tl.float32, bitcast=True)
        lower, upper = (words & 15).to(tl.float32), ((words >> 16) & 15).to(tl.float32)
        if FUSED:
            lower, upper = lower * scale + other, upper * scale + other
        else:
            lower, upper = (lower + 128.0 - other) * scale, (upper + 128.0 - other) * scale
    return lower, upper


@triton.jit(do_not_specialize=["num_rows"])
def _nibbles_kernel(
    x_ptr,
    words_ptr,
    scale_ptr,
    offset_ptr,
    super_scale_ptr,
    super_offset_ptr,
    bias_ptr,
    out_ptr,
    partial_ptr,
    counters_ptr,
    num_rows,
    num_out,
    num_words,
    GROUP: tl.constexpr,
    PER_SUPER: tl.constexpr,
    OFFSET: tl.constexpr,
    ZEROS: tl.constexpr,
    ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    LINES: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Codes of 4 bits, x [n, 8, words] as _spread_kernel leaves it: tiles of rows by outputs, so that words go straight
    to where the matrix unit takes its second operand from and become weights there."""
    EACH: tl.constexpr = GROUP // 8
    GROUPS: tl.constexpr = BLOCK_WORDS // EACH
    FUSED: tl.constexpr = OFFSET and not ZEROS  # pyright: ignore[reportAssignmentType]
    tile, part = tl.program_id(0), tl.program_id(1)
    output = tile * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    inner = tl.minimum(output, num_out - 1).to(tl.int64)
    columns = words_ptr + inner[None, :] * num_words
    groups = num_words // EACH
    span = tl.cdiv(tl.cdiv(num_words, BLOCK_WORDS), SPLIT) * BLOCK_WORDS
    first = part * span
    last = tl.minimum(first + span, num_words)
    if DEPENDENT:
        prefetch_lines(columns + tl.minimum(first + tl.arange(0, LINES) * 32, num_words - 1)[:, None])
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    real = row < num_rows
    x_rows = x_ptr + row.to(tl.int64)[:, None] * (8 * num_words)
    wait_for_inputs(DEPENDENT)
    acc = tl.zeros((ROWS, BLOCK_OUT), tl.float32)
    for start in tl.range(first, last, BLOCK_WORDS, num_stages=STAGES):
        word = start + tl.arange(0, BLOCK_WORDS)
        inside = word < num_words
        words = tl.load(columns + word[:, None], mask=inside[:, None], other=0)
        group = start // EACH + tl.arange(0, GROUPS)
        scale, offset = _scale_and_offset(
            scale_ptr, offset_ptr, super_scale_ptr, super_offset_ptr, inner[None, :], group[:, None], groups,
            (group < groups)[:, None], PER_SUPER, FUSED, False,
        )  # fmt: skip
        if ZEROS:
            at = inner[None, :] * groups + group[:, None]
            offset = 128.0 + tl.load(offset_ptr + at, mask=(group < groups)[:, None], other=0).to(tl.float32)
        elif not FUSED:
            offset = tl.zeros_like(scale) + (128.0 + ZERO)
        pair = _bfloat16_bits(scale) | (_bfloat16_bits(offset) << 16)
        factors = tl.broadcast_to(pair[:, None, :], (GROUPS, EACH, BLOCK_OUT)).reshape((BLOCK_WORDS, BLOCK_OUT))
        for place in tl.static_range(4):
            lower, upper = _weights(words >> (4 * place), factors, FUSED, DEPENDENT)
            near = x_rows + (place * num_words + word)[None, :]
            x = tl.load(near, mask=real[:, None] & inside[None, :], other=0.0)
            acc = tl.dot(x.to(lower.dtype), lower, acc)
            x = tl.load(near + 4 * num_words, mask=real[:, None] & inside[None, :], other=0.0)
            acc = tl.dot(x.to(upper.dtype), upper, acc)
    fits = real[:, None] & (output < num_out)[None, :]
    where = row.to(tl.int64)[:, None] * num_out + output[None, :]
    if SPLIT > 1:
        size = num_rows.to(tl.int64) * num_out
        counter = counters_ptr + tl.program_id(2) * tl.num_programs(0) + tile
        if arrive(acc, partial_ptr, counter, part, size, where, fits) != SPLIT - 1:
            return
        acc = collect(acc, partial_ptr, counter, size, where, fits, SPLIT)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + output, mask=output < num_out, other=0.0).to(tl.float32)[None, :]
    tl.store(out_ptr + where, acc.to(out_ptr.dtype.element_ty), mask=fits)


@triton.jit
def _add_pair(total, words, PLACE: tl.constexpr, exponents, lower, upper):
    """Add the codes at PLACE and PLACE + 4 of words [groups, outputs, words] times their inputs [groups, words].

    Under the exponent of 128 a code in the seven bits below is 128 + code. Of the upper code the lower half of the
    word stays where it is: 0.26183 more for a lower code in the middle, give or take 1e-4, far below what 16 bits tell.
    """
    pair = ((words >> (4 * PLACE)) & 0x000F000F) | exponents
    total += (pair << 16).to(tl.float32, bitcast=True) * lower[:, None, :]
    return total + pair.to(tl.float32, bitcast=True) * upper[:, None, :]


@triton.jit
def _row_groups_kernel(
    x_ptr, words_ptr, scale_ptr, zero_ptr, bias_ptr, out_ptr, exponents, num_out, num_words,
    GROUP: tl.constexpr, ZEROS: tl.constexpr, ZERO: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_OUT: tl.constexpr,
    GROUPS: tl.constexpr, LINES: tl.constexpr, STAGES: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """As _row_kernel for codes of 4 bits with an integer for a zero point, less than four instructions a code."""
    EACH: tl.constexpr = GROUP // 8
    output = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    inner = tl.minimum(output, num_out - 1).to(tl.int64)
    groups = num_words // EACH
    if DEPENDENT:
        line = tl.minimum(tl.arange(0, LINES) * 32, num_words - 1)[None, :]
        prefetch_lines(words_ptr + inner[:, None] * num_words + line)
    lane = tl.arange(0, GROUPS)[:, None] * EACH + tl.arange(0, EACH)[None, :]
    words_at = words_ptr + inner[None, :, None] * num_words + lane[:, None, :]
    x_at = x_ptr + tl.arange(0, GROUPS)[:, None] * GROUP + tl.arange(0, EACH)[None, :]
    wait_for_inputs(DEPENDENT)
    acc = tl.zeros((GROUPS, BLOCK_OUT, EACH), tl.float32)
    for first in tl.range(0, groups, GROUPS, num_stages=STAGES):
        group = first + tl.arange(0, GROUPS)
        inside = (group < groups)[:, None]
        at = inner[None, :] * groups + group[:, None]
        words = tl.load(words_at + first * EACH, mask=inside[:, :, None], other=0, eviction_policy="evict_first")
        scale = tl.load(scale_ptr + at, mask=inside, other=0.0).to(tl.float32)
        zero = tl.full((GROUPS, BLOCK_OUT), ZERO, tl.float32)
        if ZEROS:
            zero = tl.load(zero_ptr + at, mask=inside, other=0).to(tl.float32)
        total = tl.zeros((GROUPS, BLOCK_OUT, EACH), tl.float32)
        sums = tl.zeros((GROUPS, EACH), tl.float32)
        uppers = tl.zeros((GROUPS, EACH), tl.float32)
        for place in tl.static_range(4):
            near = x_at + (first * GROUP + place * EACH)
            lower = tl.load(near, mask=inside, other=0.0).to(tl.float32)
            upper = tl.load(near + 4 * EACH, mask=inside, other=0.0).to(tl.float32)
            sums += lower + upper
            uppers += upper
            total = _add_pair(total, words, place, exponents, lower, upper)
        more = 128.0 * sums + 0.261833190918 * uppers  # what the exponents added
        total -= more[:, None, :] + zero[:, :, None] * sums[:, None, :]
        acc += total * scale[:, :, None]
    result = tl.sum(tl.sum(acc, axis=2), axis=0)
    if HAS_BIAS:
        result += tl.load(bias_ptr + output, mask=output < num_out, other=0.0).to(tl.float32)
    tl.store(out_ptr + output, result.to(out_ptr.dtype.element_ty), mask=output < num_out)


@triton.jit
def _dequantize_kernel(
    words_ptr,
    scale_ptr,
    offset_ptr,
    super_scale_ptr,
    super_offset_ptr,
    out_ptr,
    num_words,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    PER_SUPER: tl.constexpr,
    OFFSET: tl.constexpr,
    ZEROS: tl.constexpr,
    ZERO: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Neighbouring threads write neighbouring inputs, so that lines are written whole; words come from the cache."""
    EACH: tl.constexpr = GROUP * BITS // 32
    MASK: tl.constexpr = (1 << BITS) - 1
    output = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    group = channel // GROUP
    inside = group < num_words // EACH
    wait_for_inputs(DEPENDENT)
    at = channel % GROUP
    words = tl.load(words_ptr + output * num_words + group * EACH + at % EACH, mask=inside, other=0)
    scale, offset = _scale_and_offset(
        scale_ptr, offset_ptr, super_scale_ptr, super_offset_ptr, output, group, num_words // EACH, inside,
        PER_SUPER, OFFSET, ZEROS,
    )  # fmt: skip
    code = (words >> (at // EACH * BITS)) & MASK
    weight = ((code | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + ZERO)) * scale  # 2 ** 23 + code
    if OFFSET:
        weight += offset
    tl.store(out_ptr + output * (num_words // EACH * GROUP) + channel, weight.to(out_ptr.dtype.element_ty), mask=inside)


def dequantize(codes: Codes, dtype: torch.dtype) -> torch.Tensor:
    """The matrix [out, in] that codes stand for; in float32 bit for bit what the definition says."""
    codes.check()
    if not runs_kernels(codes.words):
        return _dequantize(codes, torch.float64 if dtype == torch.float64 else torch.float32).to(dtype)
    out = torch.empty(codes.shape, dtype=dtype, device=codes.words.device)
    rows, num_in = out.shape
    block = min(next_power_of_2(num_in), 2048)
    if out.numel():
        _dequantize_kernel[(rows, -(-num_in // block))](
            *_parts(codes), out, codes.words.shape[1], **_kind(codes), BLOCK=block,
            **dependent_launch(out.device),
        )  # fmt: skip
    return out


def _dequantize(codes: Codes, dtype: torch.dtype) -> torch.Tensor:
    scale = reference.group_values(codes.scale, codes.super_scale, dtype)
    offset = None
    if codes.offset is not None and codes.zeros:
        offset = -scale * codes.offset.to(dtype)
    elif codes.offset is not None:
        offset = reference.group_values(codes.offset, codes.super_offset, dtype)
        offset = offset if codes.super_offset is None else -offset
    unpacked = reference.unpack(codes.words, codes.bits, codes.group)
    return reference.dequantize_groups(unpacked, scale, offset, codes.zero, dtype)


def grouped_linear(x: torch.Tensor, codes: Codes, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [n, in] times the codes' matrix transposed, plus bias [out]; returns [n, out] in x's type.

    Raises ValueError when the shapes do not fit. Calls of one process must run on one stream after another.
    """
    codes.check()
    out, num_in = codes.shape
    require(x.dim() == 2 and x.shape[1] == num_in, f"grouped_linear: x {tuple(x.shape)}, codes [{out}, {num_in}]")
    require(bias is None or bias.shape == (out,), "grouped_linear: bias must be [out]")
    if not runs_kernels(x):
        # The reference: the codes as they are. Rounded to bfloat16 the product is right as far as 16 bits go; but then
        # logits differ by up to one of their steps of 1/8, and where two tokens are as near (0.08 nats at the start of
        # SmolLM2's answer on France) they tie, and the other one begins the text.
        wide = x if x.dtype == torch.float64 else x.float()
        product = F.linear(wide, dequantize(codes, wide.dtype), None if bias is None else bias.to(wide.dtype))
        return product.to(x.dtype)
    config = grouped_config(x.device, x.shape[0], out) if x.shape[0] else None
    if config is None or x.stride(1) != 1:
        return F.linear(x, dequantize(codes, x.dtype), bias)
    return _launch(x, codes, bias, config)


def _launch(x: torch.Tensor, codes: Codes, bias: torch.Tensor | None, config: QuantizedConfig) -> torch.Tensor:
    num_rows, (num_out, _) = x.shape[0], codes.shape
    out = torch.empty((num_rows, num_out), dtype=x.dtype, device=x.device)
    num_words = codes.words.shape[1]
    tiles = -(-num_out // config.block_out)
    added = x if bias is None else bias
    options = {
        **_kind(codes), "HAS_BIAS": bias is not None, "BLOCK_OUT": config.block_out, "BLOCK_WORDS": config.block_in,
        "LINES": config.ahead // 128, "STAGES": config.stages, "num_warps": config.warps,
        **dependent_launch(x.device),
    }  # fmt: skip
    if num_rows == 1 and _by_integers(codes) and codes.group in (32, 64, 128):
        return _launch_row_groups(x, codes, bias, out)
    if num_rows == 1:
        _row_kernel[(tiles,)](x, *_parts(codes), added, out, num_out, num_words, **options)
        return out
    if _by_integers(codes) and grouped_few.applies(x, codes.words, codes.group):
        return grouped_few.linear(x, codes.words, codes.scale, codes.offset, codes.zero, bias)
    if _as_nibbles(x, codes):
        return _launch_nibbles(x, codes, bias, out)
    split = split_that_fits(config.split, num_rows, num_out, tiles)
    _rows_kernel[(tiles, split)](
        x, *_parts(codes), added, out, *workspace(x.device), num_rows, num_out, num_words, x.stride(0),
        ROWS=max(next_power_of_2(num_rows), 16), SPLIT=split, **options,
    )  # fmt: skip
    return out


def grouped_gated_linear(x: torch.Tensor, codes: Codes) -> torch.Tensor | None:
    """silu(x @ gate.T) * (x @ up.T) for codes of [2 * d, in], the gate first: [n, d]; as fp8_gated_linear."""
    codes.check()
    out, num_in = codes.shape
    fits = x.dim() == 2 and x.shape[1] == num_in and out % 2 == 0
    require(fits, f"grouped_gated_linear: x {tuple(x.shape)}, codes [{out}, {num_in}]")
    if not _by_integers(codes) or not grouped_few.applies(x, codes.words, codes.group):
        return None
    return grouped_few.gated_linear(x, codes.words, codes.scale, codes.offset, codes.zero)


def _by_integers(codes: Codes) -> bool:
    """Whether codes are of 4 bits, and nothing but a scale and an integer for a zero point belongs to a group."""
    return codes.bits == 4 and codes.super_scale is None and (codes.offset is None or codes.zeros)


def _launch_row_groups(x: torch.Tensor, codes: Codes, bias: torch.Tensor | None, out: torch.Tensor) -> torch.Tensor:
    num_out, num_words = codes.words.shape
    config = row_groups_config()
    _row_groups_kernel[(-(-num_out // config.block_out),)](
        x, codes.words, codes.scale, codes.scale if codes.offset is None else codes.offset, x if bias is None else bias,
        out, EXPONENTS, num_out, num_words, GROUP=codes.group, ZEROS=codes.zeros, ZERO=codes.zero,
        HAS_BIAS=bias is not None, BLOCK_OUT=config.block_out, GROUPS=max(config.block_in * 8 // codes.group, 1),
        LINES=config.ahead // 128, STAGES=config.stages, num_warps=config.warps, **dependent_launch(x.device),
    )  # fmt: skip
    return out


def _as_nibbles(x: torch.Tensor, codes: Codes) -> bool:
    """Whether _nibbles_kernel can serve: its steps are whole groups."""
    built = INTERPRETED or bool(dependent_launch(x.device)["DEPENDENT"])
    return built and x.dtype == torch.bfloat16 and codes.bits == 4 and codes.group in (32, 64, 128)


def _launch_nibbles(x: torch.Tensor, codes: Codes, bias: torch.Tensor | None, out: torch.Tensor) -> torch.Tensor:
    num_rows, (num_out, num_in) = x.shape[0], codes.shape
    num_words, each = num_in // 8, codes.group // 8
    options = dependent_launch(x.device)
    spread = torch.empty_like(x, memory_format=torch.contiguous_format)
    block = min(next_power_of_2(num_words), 1024)
    _spread_kernel[(-(-num_words // block), num_rows)](
        x, spread, num_words, x.stride(0), PER=8, EACH=each, BLOCK_WORDS=block, num_warps=4,
        **dependent_launch(x.device, rows=num_rows),
    )  # fmt: skip
    config = nibbles_config(x.device, num_out)
    tiles, rows = -(-num_out // config.block_out), min(max(next_power_of_2(num_rows), 16), config.block_rows)
    row_tiles = -(-num_rows // rows)
    split = split_that_fits(config.split, num_rows, num_out, tiles * row_tiles)
    kind = {name: value for name, value in _kind(codes).items() if name != "BITS"}
    _nibbles_kernel[(tiles, split, row_tiles)](
        spread, *_parts(codes), x if bias is None else bias, out, *workspace(x.device), num_rows, num_out, num_words,
        **kind, HAS_BIAS=bias is not None, ROWS=rows, BLOCK_OUT=config.block_out, BLOCK_WORDS=config.block_in,
        LINES=config.ahead // 128, SPLIT=split, STAGES=config.stages, num_warps=config.warps, **options,
    )  # fmt: skip
    return out


def _parts(codes: Codes) -> tuple[torch.Tensor, ...]:
    """The kernels' pointers; one that is not there is never read."""
    none = codes.scale
    supers = codes.super_scale, codes.super_offset
    return codes.words, codes.scale, *(none if part is None else part for part in (codes.offset, *supers))


def _kind(codes: Codes) -> dict[str, int]:
    supers = codes.super_scale
    return {
        "BITS": codes.bits,
        "GROUP": codes.group,
        "PER_SUPER": 0 if supers is None else codes.scale.shape[1] // supers.shape[1],
        "OFFSET": codes.offset is not None,
        "ZEROS": codes.zeros,
        "ZERO": codes.zero,
    }
