"""A mixture of quantized experts for few rows each: weights meet FP8 tensor cores as they are, and nothing is rounded.

A bfloat16 has 8 significant bits, an e4m3 has 4. So a row of activations over a power of two is the sum of two e4m3
rows, hi + lo / 32, exactly (numbers down to 2 ** -14 of the row's largest; smaller ones to 2 ** -22 of it). Both halves
are columns of the second operand, where there is room: an expert has a handful of rows, and the tensor cores' width is
free while memory is what counts. Weights are the first operand, the long side:

    e4m3     from shared memory as they came: no instruction for a weight but the copy's
    MXFP4    a table of eight e4m3 for each group of 32 (its scale is in them), and one permutation of bytes for four
             weights, in the registers that the tensor cores take their first operand from

    scores ─▶ lists of pairs by expert, halves of x ─▶ silu(gate) * up of each pair ─▶ its halves ─▶ · down
           ─▶ weighted sum over each token's pairs

A program has one expert and some of its outputs, whatever the routing is; so it may fetch its first weights before it
knows its rows. An expert with more rows than a tile reads its weights again (from L2, mostly).

MXFP4 is in the order that fp4_tables.py draws.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from mainsail_kernels._activation import activate
from mainsail_kernels._fp8 import rounded_to_e4m3, to_e4m3
from mainsail_kernels._triton import (
    INTERPRETED,
    card_of,
    dependent_launch,
    is_card,
    next_power_of_2,
    prefetch_lines,
    tl,
    triton,
    wait_for_inputs,
)
from mainsail_kernels.experts import Mixture, check, kind_of
from mainsail_kernels.fp4_tables import STEP
from mainsail_kernels.reference_quantized import FP8
from mainsail_kernels.tuned import HalvesTile, halves_tiles

_SUM_BLOCK = 512


# -- kernels -------------------------------------------------------------------------------------------------------


@triton.jit
def _split(x, AXIS: tl.constexpr, ROUND: tl.constexpr):
    """(hi, lo, scale) of rows of float32 along an axis: x is scale * (hi + lo / 32). NaN or infinity: scale is NaN."""
    largest = tl.max(tl.abs(x), axis=AXIS)
    bits = largest.to(tl.int32, bitcast=True)
    power = tl.minimum(tl.maximum((bits >> 23) - 7, 1), 247)  # x / scale lies under 256
    scale = (power << 23).to(tl.float32, bitcast=True)
    inverse = ((254 - power) << 23).to(tl.float32, bitcast=True)
    over = x * tl.expand_dims(inverse, AXIS)
    # Not by way of e4m3 and back: ptxas 12.8 takes what it unpacks from a register that nothing was packed into.
    hi = rounded_to_e4m3(over)
    lo = to_e4m3((over - hi) * 32.0, ROUND)
    return to_e4m3(hi, False), lo, scale + tl.sum(x * 0.0, axis=AXIS)


@triton.jit
def _split_row(x_ptr, codes_ptr, scale_ptr, row, num_in, padded, stride, FP4: tl.constexpr,
               WIDTH: tl.constexpr, ROUND: tl.constexpr):  # fmt: skip
    """Row `row` of x to its halves, [2, padded], each input where the products look for it."""
    place = tl.arange(0, WIDTH)
    channel, real = place, place < num_in
    if FP4:
        whole = num_in // 256 * 256
        each, beyond = (num_in - whole) // 8, place - whole
        channel = tl.where(place < whole, place, whole + beyond // 32 * each + beyond % 32)
        real = (place < whole) | ((place < padded) & (beyond % 32 < each))
    x = tl.load(x_ptr + row * stride + channel, mask=real, other=0.0).to(tl.float32)
    hi, lo, scale = _split(x, 0, ROUND)
    target = codes_ptr + row * (2 * padded) + place
    tl.store(target, hi, mask=place < padded)
    tl.store(target + padded, lo, mask=place < padded)
    tl.store(scale_ptr + row, scale)


@triton.jit(do_not_specialize=["num_rows"])
def _route_kernel(
    x_ptr, scores_ptr, codes_ptr, row_scale_ptr, weights_ptr, lists_ptr, counts_ptr, num_rows, num_experts, num_in,
    padded, x_stride, scores_stride,
    NORMALIZED: tl.constexpr, K: tl.constexpr, EXPERTS: tl.constexpr, FP4: tl.constexpr,
    WIDTH: tl.constexpr, ROUND: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Program (row, 0) puts the row's pairs into its experts' lists, program (row, 1) splits the row into halves."""
    row = tl.program_id(0).to(tl.int64)
    wait_for_inputs(DEPENDENT)
    if tl.program_id(1) == 1:
        _split_row(x_ptr, codes_ptr, row_scale_ptr, row, num_in, padded, x_stride, FP4, WIDTH, ROUND)
    else:
        expert = tl.arange(0, EXPERTS)
        there = expert < num_experts
        scores = tl.load(scores_ptr + row * scores_stride + expert, mask=there, other=-float("inf")).to(tl.float32)
        powers = tl.exp(scores - tl.max(scores, axis=0))
        left = tl.where(there & (powers == powers), powers, -1.0)  # experts are chosen where scores are NaN, too
        left = tl.where(there, tl.maximum(left, 0.0), -1.0)
        rank = tl.zeros((EXPERTS,), tl.int32) + K
        for each in tl.static_range(K):
            best = tl.argmax(left, axis=0, tie_break_left=True)
            rank = tl.where(expert == best, each, rank)
            left = tl.where(expert == best, -2.0, left)
        chosen = rank < K
        total = tl.sum(tl.where(chosen, powers, 0.0) if NORMALIZED else powers, axis=0)
        pair = (row * K + rank).to(tl.int32)
        place = tl.atomic_add(counts_ptr + expert, 1, mask=chosen, sem="relaxed")
        tl.store(lists_ptr + expert.to(tl.int64) * num_rows + place, pair, mask=chosen)
        tl.store(weights_ptr + pair, powers / total, mask=chosen)


@triton.jit
def _split_kernel(
    x_ptr, codes_ptr, scale_ptr, num_in, padded, stride, FP4: tl.constexpr, WIDTH: tl.constexpr,
    ROUND: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    _split_row(x_ptr, codes_ptr, scale_ptr, row, num_in, padded, stride, FP4, WIDTH, ROUND)


@triton.jit
def _table(scales, DOT: tl.constexpr):
    """The eight e4m3 that magnitudes 0 to 7 mean in a group whose scale is in byte DOT % 4, in two words."""
    power = (scales >> (8 * (DOT % 4))) & 255
    return power * 0x01010100 + 0x14100800, power * 0x01010101 + 0x24201C18


@triton.jit
def _quad(words, low, high, DOT: tl.constexpr):
    """e4m3 at each place of a dot, for the interpreter: the numbers themselves, by their bits."""
    by_four = words.reshape((words.shape[0], words.shape[1] // 4, 4))
    which = tl.arange(0, 4)[None, None, :]
    mine = tl.sum(tl.where(which == DOT // 2, by_four, 0), axis=2).expand_dims(2)
    magnitude = (mine >> (which * 4 + DOT % 2 * 16)) & 7
    sign = (mine >> (which * 8 + (7 if DOT % 2 == 0 else 3))) & 1
    shift = magnitude % 4 * 8
    bits = tl.where(magnitude < 4, low[:, :, None] >> shift, high[:, :, None] >> shift) & 255
    codes = (bits | (sign << 7)).to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    return codes.reshape((words.shape[0], words.shape[1]))


_TWO_DOTS = tl.constexpr(
    tuple(
        f"""{{ .reg .b32 m; and.b32 m, ${word}, 0x77777777; prmt.b32 $0, $6, $10, m;
        lop3.b32 $0, ${word}, 0x80808080, $0, 0xea; shr.u32 m, m, 16; prmt.b32 $1, $14, $18, m;
        shl.b32 m, ${word}, 4; lop3.b32 $1, m, 0x80808080, $1, 0xea; }}"""
        for word in range(2, 6)
    )
)
"""In PTX, of the first, second, … of four words. $0, $1: e4m3 of both dots; $6, $10, $14, $18: their tables."""


@triton.jit
def _two_dots(words, low, high, low2, high2, J: tl.constexpr, PTX: tl.constexpr):
    """e4m3 [outputs, 32] of dots 2J and 2J + 1; words [outputs, 32], tables [outputs, 1].

    PTX: four words at a time, neighbours among the inputs, of which word J has what these dots want.
    """
    if PTX:
        a, b, c, d, w = low, high, low2, high2, words
        a, w = tl.broadcast(a, w)
        b, w = tl.broadcast(b, w)
        c, w = tl.broadcast(c, w)
        d, w = tl.broadcast(d, w)
        first, second = tl.inline_asm_elementwise(
            _TWO_DOTS[J], "=&r,=&r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r", [w, a, b, c, d], is_pure=True, pack=4,
            dtype=(tl.float8e4nv, tl.float8e4nv),
        )  # fmt: skip
    else:
        first, second = _quad(words, low, high, 2 * J), _quad(words, low2, high2, 2 * J + 1)
    return first, second


@triton.jit
def _fp4_step(acc, near, real, words, scales, fits, LONG: tl.constexpr, PTX: tl.constexpr):
    """acc plus a step's eight dots; near [32, columns]: pointers to what the first dot's weights meet."""
    packed = tl.load(words, mask=fits, other=0)
    lower = tl.load(scales)
    upper = tl.load(scales + 1)
    part = acc if LONG else tl.zeros_like(acc)
    for j in tl.static_range(4):
        low, high = _table(lower if j < 2 else upper, 2 * j)
        low2, high2 = _table(lower if j < 2 else upper, 2 * j + 1)
        first, second = _two_dots(packed, low, high, low2, high2, j, PTX)
        part = tl.dot(first, tl.load(near + 64 * j, mask=real, other=0.0), part)
        part = tl.dot(second, tl.load(near + 64 * j + 32, mask=real, other=0.0), part)
    return part if LONG else acc + part


@triton.jit(do_not_specialize=["num_rows", "num_steps"])
def _product_kernel(
    codes_ptr, row_scale_ptr, lists_ptr, counts_ptr, weight_ptr, scale_ptr, factor_ptr, bias_ptr, out_ptr,
    num_rows, num_out, num_units, num_steps, padded, expert_stride, row_units, expert_scale_stride, scale_stride,
    alpha, limit,
    UNIT: tl.constexpr, PER_TOKEN: tl.constexpr, GATED: tl.constexpr, KIND: tl.constexpr, BIAS: tl.constexpr,
    CLAMPED: tl.constexpr, ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
    STAGES: tl.constexpr, LINES: tl.constexpr, LONG: tl.constexpr, PTX: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """out [pairs, num_out] of the pairs of one expert; GATED: the activation of two products.

    BLOCK_OUT: matrix rows of a tile; GATED: half of them are the gate's, the others the same outputs of up.
    Tensor cores keep about 14 bits of a sum, so theirs are a step's, but where LONG they are all of it.
    """
    OUTPUTS: tl.constexpr = BLOCK_OUT // 2 if GATED else BLOCK_OUT  # pyright: ignore[reportInvalidTypeForm]
    tile, expert = tl.program_id(0), tl.program_id(1).to(tl.int64)
    each = tl.arange(0, BLOCK_OUT)
    matrix_row = tl.minimum(tile * OUTPUTS + each % OUTPUTS, num_out - 1) + each // OUTPUTS * num_out
    rows = weight_ptr + expert * expert_stride + (matrix_row * (row_units * UNIT))[:, None]
    scales = rows
    if KIND == "blocks":
        scales = scale_ptr + expert * expert_scale_stride + (matrix_row // 128 * scale_stride)[:, None]
    if KIND == "tables":
        scales = scale_ptr + expert * expert_scale_stride + (matrix_row * 2)[:, None]
    if DEPENDENT and LINES > 0:
        line = tl.minimum(tl.arange(0, LINES) * (32 if KIND == "tables" else 128), num_units * UNIT - 1)[None, :]
        prefetch_lines(rows + line)
    wait_for_inputs(DEPENDENT)
    count = tl.load(counts_ptr + expert)
    column = tl.arange(0, 2 * ROWS)  # a row's hi, then its lo
    for first in range(0, count, ROWS):
        slot = first + column // 2
        real = (slot < count)[None, :]
        pair = tl.load(lists_ptr + expert * num_rows + slot, mask=slot < count, other=0)
        columns = codes_ptr + ((pair // PER_TOKEN).to(tl.int64) * 2 + column % 2) * padded
        acc = tl.zeros((BLOCK_OUT, 2 * ROWS), tl.float32)
        for step in tl.range(0, num_steps, num_stages=STAGES):
            place = step * BLOCK_IN + tl.arange(0, BLOCK_IN)
            fits = (place < num_units * UNIT)[None, :]
            if KIND == "tables":
                near = columns[None, :] + (step * 256 + tl.arange(0, 32))[:, None]
                acc = _fp4_step(acc, near, real, rows + place[None, :], scales + step * scale_stride, fits, LONG, PTX)
            else:
                x = tl.load(columns[None, :] + place[:, None], mask=real & (place < padded)[:, None], other=0.0)
                product = tl.dot(tl.load(rows + place[None, :], mask=fits, other=0.0), x)
                acc += product * tl.load(scales + step) if KIND == "blocks" else product
        slot = first + tl.arange(0, ROWS)
        pair = tl.load(lists_ptr + expert * num_rows + slot, mask=slot < count, other=0)
        hi, lo = tl.split(acc.reshape((BLOCK_OUT, ROWS, 2)))
        sums = (hi + lo * 0.03125) * tl.load(row_scale_ptr + pair // PER_TOKEN)[None, :]
        at = expert * (num_out * (2 if GATED else 1)) + matrix_row
        if KIND != "blocks":
            sums *= tl.load(factor_ptr + at)[:, None]
        if BIAS:
            sums += tl.load(bias_ptr + at).to(tl.float32)[:, None]
        if GATED:
            gate, up = tl.split(sums.reshape((2, OUTPUTS, ROWS)).permute(1, 2, 0))
            sums = activate(gate, up, alpha, limit, CLAMPED)
        output = tile * OUTPUTS + tl.arange(0, OUTPUTS)
        where = out_ptr + pair.to(tl.int64)[None, :] * num_out + output[:, None]
        fits = (output < num_out)[:, None] & (slot < count)[None, :]
        tl.store(where, sums.to(out_ptr.dtype.element_ty), mask=fits)


@triton.jit
def _sum_kernel(
    parts_ptr, weights_ptr, counts_ptr, out_ptr, size, num_experts, K: tl.constexpr, PADDED: tl.constexpr,
    EXPERTS: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """out [n, size]: the weighted sum of the K rows of each token in parts [n * K, size]; counts back to zero."""
    row = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    part = tl.arange(0, PADDED)
    at = (row * K + part)[:, None] * size + column[None, :]
    wait_for_inputs(DEPENDENT)
    parts = tl.load(parts_ptr + at, mask=(part < K)[:, None] & (column < size)[None, :], other=0.0).to(tl.float32)
    weight = tl.load(weights_ptr + row * K + part, mask=part < K, other=0.0)
    total = tl.sum(parts * weight[:, None], axis=0)
    tl.store(out_ptr + row * size + column, total.to(out_ptr.dtype.element_ty), mask=column < size)
    if (tl.program_id(0) == 0) & (row == 0):
        expert = tl.arange(0, EXPERTS)
        tl.store(counts_ptr + expert, expert * 0, mask=expert < num_experts)


# -- what calls them -------------------------------------------------------------------------------------------------


@cache
def _counts(device: torch.device, num_experts: int) -> torch.Tensor:
    """Zeros between calls: one for the stream that runs the model."""
    with torch.inference_mode(False):
        return torch.zeros(num_experts, dtype=torch.int32, device=device)


def padded_width(num_in: int, kind: str) -> int:
    """Of a row of halves."""
    return -(-num_in // STEP) * STEP if kind == "tables" else num_in


def has_fp8_cores(device: torch.device) -> bool:
    """Whether a device is a card whose tensor cores these kernels are for: Hopper."""
    return is_card(device) and torch.version.hip is None and card_of(device).capability[0] == 9


def applies(x: torch.Tensor, m: Mixture) -> bool:
    """Whether these kernels take such rows and matrices, and are faster with so many rows."""
    kind = _kind(m)
    if kind is None or x.dtype != torch.bfloat16 or not has_fp8_cores(x.device):
        return False
    return x.shape[0] > 0 and halves_tiles(kind, _rows(x, m)) is not None


def by_halves(x: torch.Tensor, scores: torch.Tensor, m: Mixture) -> torch.Tensor:
    """The mixture for x [n, hidden] with the router's scores [n, experts]: [n, hidden] in x's type.

    Calls of one process must run on one stream after another. Raises ValueError when shapes do not fit.
    """
    check(x, m)
    kind = _kind(m)
    tiles = None if kind is None else halves_tiles(kind, _rows(x, m))
    if kind is None or tiles is None:
        raise ValueError(f"mixture of experts: no halves for {tuple(m.gate_up.shape)} {m.gate_up.dtype}")
    n, hidden = x.shape
    num_experts, per_token, size, device = m.gate_up.shape[0], m.per_token, m.down_inputs, x.device
    dependent = dependent_launch(device)
    counts, lists = _counts(device, num_experts), torch.empty((num_experts, n), dtype=torch.int32, device=device)
    weights = torch.empty(n * per_token, dtype=torch.float32, device=device)
    out = torch.empty((n, hidden), dtype=x.dtype, device=device)
    if not n:
        return out
    codes, row_scale = _room(n, hidden, kind, device)
    inner = torch.empty((n * per_token, size), dtype=x.dtype, device=device)
    outer = torch.empty((n * per_token, hidden), dtype=x.dtype, device=device)
    inner_codes, inner_scale = _room(n * per_token, size, kind, device)  # all memory first: counts are set back last
    split = _split_options(codes, kind)
    _route_kernel[(n, 2)](
        x, scores, codes, row_scale, weights, lists, counts, n, num_experts, hidden, codes.shape[2], x.stride(0),
        scores.stride(0), NORMALIZED=m.normalized, K=per_token, EXPERTS=next_power_of_2(num_experts), **split,
    )  # fmt: skip
    up = Matrices(m.gate_up, m.gate_up_scale, m.gate_up_factor, m.gate_up_bias)
    _launch((codes, row_scale, lists, counts), up, inner, per_token, tiles.rows, tiles.up, m.swiglu, gated=True)
    _split_into(inner, inner_codes, inner_scale, kind)
    down = Matrices(m.down, m.down_scale, m.down_factor, m.down_bias)
    _launch((inner_codes, inner_scale, lists, counts), down, outer, 1, tiles.rows, tiles.down, None, gated=False)
    _sum_kernel[(-(-hidden // _SUM_BLOCK), n)](
        outer, weights, counts, out, hidden, num_experts, K=per_token, PADDED=next_power_of_2(per_token),
        EXPERTS=next_power_of_2(num_experts), BLOCK=_SUM_BLOCK, num_warps=4, **dependent,
    )  # fmt: skip
    return out


def split_rows(x: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes [n, 2, padded_width] e4m3: hi and lo, scale [n] float32) of x [n, in]: scale * (hi + lo / 32)."""
    n, num_in = x.shape
    codes, scale = _room(n, num_in, kind, x.device)
    if n:
        _split_into(x, codes, scale, kind)
    return codes, scale


def _split_into(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, kind: str) -> None:
    n, num_in = x.shape
    _split_kernel[(n,)](x, codes, scale, num_in, codes.shape[2], x.stride(0), **_split_options(codes, kind))


def _rows(x: torch.Tensor, m: Mixture) -> float:
    """Of an expert, on average."""
    return x.shape[0] * m.per_token / m.gate_up.shape[0]


def _kind(m: Mixture) -> str | None:
    """Of both matrices, if the kernels take them."""
    kind = kind_of(m.gate_up, m.gate_up_scale)
    if kind != kind_of(m.down, m.down_scale):
        return None
    whole = m.gate_up.shape[2] % 128 == 0 and m.down.shape[2] % 128 == 0
    return kind if kind == "tables" or (kind in ("channels", "blocks") and whole) else None


def _room(n: int, num_in: int, kind: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """For the halves of rows, and for their scales."""
    codes = torch.empty((n, 2, padded_width(num_in, kind)), dtype=FP8, device=device)
    return codes, torch.empty(n, dtype=torch.float32, device=device)


def _split_options(codes: torch.Tensor, kind: str) -> dict[str, object]:
    return {
        "FP4": kind == "tables", "WIDTH": next_power_of_2(codes.shape[2]), "ROUND": INTERPRETED, "num_warps": 4,
        **dependent_launch(codes.device),
    }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Matrices:
    """One of the two of every expert."""

    codes: torch.Tensor
    scale: torch.Tensor | None
    factor: torch.Tensor | None
    bias: torch.Tensor | None


def _launch(
    rows: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], m: Matrices, out: torch.Tensor,
    per_token: int, tile_rows: int, tile: HalvesTile, swiglu: tuple[float, float] | None, *, gated: bool,
) -> None:  # fmt: skip
    """rows: halves, their scales, lists and counts of pairs by expert."""
    codes, row_scale, lists, counts = rows
    kind, num_out, scale = kind_of(m.codes, m.scale), out.shape[1], m.scale
    assert scale is not None
    factor = m.factor if m.factor is not None else scale
    unit, block_in = (4, 32) if kind == "tables" else (1, 128 if kind == "blocks" else tile.block_in)
    num_experts, _, num_in = m.codes.shape
    outputs = tile.block_out // 2 if gated else tile.block_out
    _product_kernel[(-(-num_out // outputs), num_experts)](
        codes, row_scale, lists, counts, m.codes, scale, factor, factor if m.bias is None else m.bias, out,
        lists.shape[1], num_out, num_in // unit, -(-num_in // block_in), codes.shape[2], m.codes.stride(0),
        m.codes.stride(1) // unit, scale.stride(0), scale.stride(1), *(swiglu or (0.0, 0.0)), UNIT=unit,
        PER_TOKEN=per_token, GATED=gated, KIND=kind, BIAS=m.bias is not None, CLAMPED=swiglu is not None,
        ROWS=tile_rows, BLOCK_OUT=tile.block_out, BLOCK_IN=block_in, STAGES=tile.stages, LINES=tile.ahead // 128,
        LONG=tile.long_sums, PTX=is_card(out.device), num_warps=tile.warps, **dependent_launch(out.device),
    )  # fmt: skip
