"""A mixture of gated MLPs for one token, or very few, in two launches from the router's scores to the weighted sum.

    scores ─▶ rank of each score, silu(gate) * up of each pair ─▶ sum over the token's experts · down

A program for each pair of token and expert finds its expert by itself; a token's experts have a row each of the second
kernel's tile. Where programs are few, several share a tile's inputs. Sums are float32. moe.py has what more tokens go
through, and uses `Product` as well.
"""

from dataclasses import dataclass

import torch

from mainsail_kernels._activation import activate
from mainsail_kernels._experts import FP4_REST, multiply
from mainsail_kernels._split import arrive, collect, split_that_fits, workspace
from mainsail_kernels._triton import (
    dependent_launch,
    next_power_of_2,
    require,
    tl,
    triton,
    wait_for_inputs,
)
from mainsail_kernels.fp4_tables import STEP
from mainsail_kernels.reference_quantized import BLOCK, FP4_GROUP, FP8
from mainsail_kernels.tuned import ExpertTile


@triton.jit
def _choice(scores_ptr, num_experts, slot, NORMALIZED: tl.constexpr, K: tl.constexpr, EXPERTS: tl.constexpr):
    """(expert, weight) of the score with this rank; ties go to the lower expert."""
    expert = tl.arange(0, EXPERTS)
    scores = tl.load(scores_ptr + expert, mask=expert < num_experts, other=-float("inf")).to(tl.float32)
    other = tl.arange(0, EXPERTS)
    others = tl.load(scores_ptr + other, mask=other < num_experts, other=-float("inf")).to(tl.float32)
    ahead = (others[:, None] > scores[None, :]) | (
        (others[:, None] == scores[None, :]) & (other[:, None] < expert[None, :])
    )
    rank = tl.sum(ahead.to(tl.int32), axis=0)
    powers = tl.exp(scores - tl.max(scores, axis=0))
    counted = tl.where(rank < K, powers, 0.0) if NORMALIZED else powers
    mine = rank == slot
    weight = tl.sum(tl.where(mine, powers, 0.0), axis=0) / tl.sum(counted, axis=0)
    return tl.minimum(tl.sum(tl.where(mine, expert, 0), axis=0), num_experts - 1), weight  # also where scores are NaN


@triton.jit(do_not_specialize=["num_pairs"])
def _pair_up_kernel(
    x_ptr,
    scores_ptr,
    weights_ptr,
    experts_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    out_ptr,
    partial_ptr,
    counters_ptr,
    num_pairs,
    num_experts,
    size,
    num_units,
    x_stride,
    expert_stride,
    row_units,
    expert_scale_stride,
    scale_stride,
    scores_stride,
    alpha,
    limit,
    UNIT: tl.constexpr,
    NORMALIZED: tl.constexpr,
    K: tl.constexpr,
    EXPERTS: tl.constexpr,
    KIND: tl.constexpr,
    PAIRED: tl.constexpr,
    BIAS: tl.constexpr,
    CLAMPED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    PTX: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """out [pairs, size]: silu(gate) * up; SPLIT programs share a pair's inputs. Tile 0 notes each pair's expert and
    weight."""
    num_in = num_units * UNIT
    tile, pair, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    output = tile * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    in_range = output < size
    wait_for_inputs(DEPENDENT)
    expert, weight = _choice(scores_ptr + pair // K * scores_stride, num_experts, pair % K, NORMALIZED, K, EXPERTS)
    if (tile == 0) & (part == 0):
        tl.store(experts_ptr + pair, expert)
        tl.store(weights_ptr + pair, weight)
    matrix = weight_ptr + expert.to(tl.int64) * expert_stride
    columns = matrix + (output * (row_units * UNIT))[None, :]
    up_columns = matrix + ((output + size) * (row_units * UNIT))[None, :]
    scales = scale_ptr + expert * expert_scale_stride
    if KIND == "fp4":
        of_gate, of_up = (scales + output)[None, :], (scales + size + output)[None, :]
    else:
        of_gate = (scales + output // 128 * scale_stride)[None, :]
        of_up = (scales + (output + size) // 128 * scale_stride)[None, :]
    row = tl.arange(0, ROWS)
    x_rows = x_ptr + pair // K * x_stride + (row * 0)[:, None]
    span = tl.cdiv(tl.cdiv(num_in, BLOCK_IN), SPLIT) * BLOCK_IN
    gates = tl.zeros((ROWS, BLOCK_OUT), tl.float32)
    ups = tl.zeros((ROWS, BLOCK_OUT), tl.float32)
    for start in tl.range(part * span, tl.minimum(part * span + span, num_in), BLOCK_IN, num_stages=STAGES):
        gates, ups = multiply(
            gates, ups, x_rows, row == 0, columns, up_columns, of_gate, of_up, start, num_in, in_range,
            2 * size, True, KIND, PAIRED, BLOCK_IN, PTX,
        )  # fmt: skip
    gate, up = tl.sum(gates, axis=0), tl.sum(ups, axis=0)  # one row is there
    place = pair * size + output
    if SPLIT > 1:
        total = num_pairs * size
        counter = counters_ptr + pair * tl.num_programs(0) + tile
        ups_ptr = partial_ptr + SPLIT * total
        tl.store(ups_ptr + part * total + place, up, mask=in_range)
        if arrive(gate, partial_ptr, counter, part, total, place, in_range) != SPLIT - 1:
            return
        gate = collect(gate, partial_ptr, counter, total, place, in_range, SPLIT)
        up = collect(up, ups_ptr, counter, total, place, in_range, SPLIT)
    if KIND == "fp4" and PTX:
        gate, up = gate * FP4_REST, up * FP4_REST
    if KIND == "channels":
        gate *= tl.load(scales + output, mask=in_range, other=0.0)
        up *= tl.load(scales + size + output, mask=in_range, other=0.0)
    if BIAS:
        bias = bias_ptr + expert * (2 * size) + output
        gate += tl.load(bias, mask=in_range, other=0.0).to(tl.float32)
        up += tl.load(bias + size, mask=in_range, other=0.0).to(tl.float32)
    active = activate(gate, up, alpha, limit, CLAMPED)
    tl.store(out_ptr + place, active.to(out_ptr.dtype.element_ty), mask=in_range)


@triton.jit(do_not_specialize=["num_rows"])
def _down_sum_kernel(
    x_ptr,
    weights_ptr,
    lists_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    out_ptr,
    partial_ptr,
    counters_ptr,
    num_rows,
    num_out,
    num_units,
    x_stride,
    expert_stride,
    row_units,
    expert_scale_stride,
    scale_stride,
    UNIT: tl.constexpr,
    K: tl.constexpr,
    KIND: tl.constexpr,
    PAIRED: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    PTX: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """out [rows, num_out]: the weighted sum over a token's K experts, each of which has a row of the tile to itself.
    SPLIT programs share the experts."""
    tile, row, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_in = num_units * UNIT
    output = tile * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    in_range = output < num_out
    slot = tl.arange(0, ROWS)
    each: tl.constexpr = (K + SPLIT - 1) // SPLIT  # pyright: ignore[reportAssignmentType]
    mine = (slot >= part * each) & (slot < part * each + each) & (slot < K)
    steps = tl.cdiv(num_in, BLOCK_IN)
    wait_for_inputs(DEPENDENT)
    experts = tl.load(lists_ptr + row * K + slot, mask=mine, other=0)
    x_rows = x_ptr + ((row * K + slot) * x_stride)[:, None]
    acc = tl.zeros((ROWS, BLOCK_OUT), tl.float32)
    for step in tl.range(0, tl.minimum(each, K - part * each) * steps, num_stages=STAGES):
        which = part * each + step // steps
        expert = tl.sum(tl.where(slot == which, experts, 0), axis=0)
        columns = weight_ptr + expert.to(tl.int64) * expert_stride + (output * (row_units * UNIT))[None, :]
        scales = scale_ptr + expert * expert_scale_stride
        of_out = (scales + (output if KIND == "fp4" else output // 128 * scale_stride))[None, :]
        acc, _ = multiply(
            acc, acc, x_rows, slot == which, columns, columns, of_out, of_out, step % steps * BLOCK_IN, num_in,
            in_range, num_out, False, KIND, PAIRED, BLOCK_IN, PTX,
        )  # fmt: skip
    if KIND == "fp4" and PTX:
        acc *= FP4_REST
    if KIND == "channels":
        of_channels = scale_ptr + (experts * expert_scale_stride)[:, None] + output[None, :]
        acc *= tl.load(of_channels, mask=mine[:, None] & in_range[None, :], other=0.0)
    if BIAS:
        of_experts = bias_ptr + (experts * num_out)[:, None] + output[None, :]
        acc += tl.load(of_experts, mask=mine[:, None] & in_range[None, :], other=0.0).to(tl.float32)
    acc *= tl.load(weights_ptr + row * K + slot, mask=mine, other=0.0)[:, None]
    total = tl.sum(acc, axis=0)
    place, fits = row * num_out + output, in_range
    if SPLIT > 1:
        counter = counters_ptr + row * tl.num_programs(0) + tile
        size = num_rows.to(tl.int64) * num_out
        if arrive(total, partial_ptr, counter, part, size, place, fits) != SPLIT - 1:
            return
        total = collect(total, partial_ptr, counter, size, place, fits, SPLIT)
    tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=fits)


@dataclass(frozen=True, slots=True)
class Mixture:
    """What all tokens share: the experts' matrices, and how tokens choose."""

    gate_up: torch.Tensor
    """[experts, 2 * d, hidden], the gate first; FP4: [experts, 2 * d, hidden / 8] int32."""
    down: torch.Tensor
    """[experts, hidden, d], likewise."""
    gate_up_scale: torch.Tensor | None
    """[experts, outputs] or [experts, outputs / 128, inputs / 128] float32; FP4: as pack_fp4_scales packs them, or as
    Fp4Tables has them."""
    down_scale: torch.Tensor | None
    gate_up_bias: torch.Tensor | None
    """[experts, outputs]."""
    down_bias: torch.Tensor | None
    per_token: int
    normalized: bool
    swiglu: tuple[float, float] | None
    gate_up_factor: torch.Tensor | None = None
    """[experts, outputs] float32, of FP4 in tables."""
    down_factor: torch.Tensor | None = None

    @property
    def down_inputs(self) -> int:
        return self.gate_up.shape[1] // 2


def kind_of(matrix: torch.Tensor, scale: torch.Tensor | None) -> str:
    """plain, channels, blocks, fp4 or tables."""
    if matrix.dtype == torch.int32:
        return "tables" if scale is not None and scale.dtype == torch.int32 else "fp4"
    return "plain" if scale is None else "channels" if scale.dim() == 2 else "blocks"


def check(x: torch.Tensor, m: Mixture) -> None:
    """Raises ValueError where matrices do not fit rows, each other or their scales."""
    num_experts, wide, _ = m.gate_up.shape
    fits = wide % 2 == 0 and m.down.shape[:2] == (num_experts, x.shape[1])
    fits = fits and _takes(m.gate_up, m.gate_up_scale, m.gate_up_factor, x.shape[1])
    fits = fits and _takes(m.down, m.down_scale, m.down_factor, wide // 2)
    require(fits, f"mixture of experts: x {tuple(x.shape)}, gate_up {tuple(m.gate_up.shape)}, "
                  f"down {tuple(m.down.shape)}")  # fmt: skip


def _takes(matrix: torch.Tensor, scale: torch.Tensor | None, factor: torch.Tensor | None, num_in: int) -> bool:
    """Whether stacked matrices have so many inputs, and FP4's scales fit them."""
    if matrix.dtype != torch.int32:
        return matrix.shape[2] == num_in
    if scale is None or not scale.is_contiguous() or matrix.shape[2] * 8 != num_in:
        return False
    num_experts, outputs, _ = matrix.shape
    if scale.dtype == torch.int32:
        fits = factor is not None and factor.shape == (num_experts, outputs) and factor.is_contiguous()
        return fits and scale.shape == (num_experts, -(-num_in // STEP), outputs, 2)
    return scale.dtype == torch.bfloat16 and scale.shape == (num_experts, num_in // FP4_GROUP, outputs)


@dataclass(frozen=True, slots=True)
class Product:
    """The arguments of a kernel that concern rows and the matrices that they meet."""

    x: torch.Tensor
    matrix: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor
    sizes: tuple[int, ...]
    """Inputs (of FP4 words); the strides of rows, experts, outputs, experts' scales and rows of blocks. FP4's words are
    counted in groups of four, so that the compiler sees that those are whole."""
    options: dict[str, object]


def product(
    x: torch.Tensor, matrix: torch.Tensor, scale: torch.Tensor | None, bias: torch.Tensor | None, tile: ExpertTile
) -> Product:
    """x [n, inputs]; the rest as Mixture has it."""
    dependent = dependent_launch(x.device)
    ptx, kind = dependent["DEPENDENT"] and x.dtype == torch.bfloat16, kind_of(matrix, scale)
    require(kind != "tables", "mixture of experts: MXFP4 in tables is for experts_halves.py, or to be widened")
    require(
        kind != "blocks" or BLOCK % tile.block_in == 0, "mixture of experts: a step must lie within a block of scales"
    )
    paired = ptx and matrix.dtype == FP8 and x.shape[1] % 2 == 0 and x.stride(0) % 2 == 0
    if paired:  # two weights at a time, and two inputs
        matrix, x = matrix.view(torch.int16), x.view(torch.int32)
    unit = FP4_GROUP // 8 if kind == "fp4" else 1
    of_scales = (0, 0) if scale is None else (scale.stride(0), scale.stride(1))
    options: dict[str, object] = {
        "UNIT": unit, "KIND": kind, "PAIRED": paired, "BIAS": bias is not None, "BLOCK_OUT": tile.block_out,
        "BLOCK_IN": tile.block_in // (2 if paired else 1), "STAGES": tile.stages, "PTX": ptx,
        "num_warps": tile.warps, **dependent,
    }  # fmt: skip
    sizes = (matrix.shape[2] // unit, x.stride(0), matrix.stride(0), matrix.stride(1) // unit, *of_scales)
    return Product(x, matrix, x if scale is None else scale, x if bias is None else bias, sizes, options)


def by_pairs(x: torch.Tensor, scores: torch.Tensor, m: Mixture, up: ExpertTile, down: ExpertTile) -> torch.Tensor:
    """The mixture for x [n, hidden] with the router's scores [n, experts]: a program's tile has one pair.

    Calls of one process must run on one stream after another.
    """
    n, hidden = x.shape
    pairs, size, num_experts, device = n * m.per_token, m.down_inputs, scores.shape[1], x.device
    weights = torch.empty(pairs, dtype=torch.float32, device=device)
    experts = torch.empty(pairs, dtype=torch.int32, device=device)
    inner = torch.empty((pairs, size), dtype=x.dtype, device=device)
    p = product(x, m.gate_up, m.gate_up_scale, m.gate_up_bias, up)
    tiles = -(-size // up.block_out)
    split = split_that_fits(up.split, 2 * pairs, size, tiles * pairs)
    _pair_up_kernel[(tiles, pairs, split)](
        p.x, scores, weights, experts, p.matrix, p.scale, p.bias, inner, *workspace(device), pairs, num_experts, size,
        *p.sizes, scores.stride(0), *(m.swiglu or (0.0, 0.0)), NORMALIZED=m.normalized, K=m.per_token,
        EXPERTS=next_power_of_2(num_experts), CLAMPED=m.swiglu is not None, ROWS=16, SPLIT=split, **p.options,
    )  # fmt: skip
    out = torch.empty((n, hidden), dtype=x.dtype, device=device)
    p = product(inner, m.down, m.down_scale, m.down_bias, down)
    tiles = -(-hidden // down.block_out)
    split = split_that_fits(down.split, n, hidden, tiles * n)
    _down_sum_kernel[(tiles, n, split)](
        p.x, weights, experts, p.matrix, p.scale, p.bias, out, *workspace(device), n, hidden, *p.sizes,
        K=m.per_token, ROWS=max(16, next_power_of_2(m.per_token)), SPLIT=split, **p.options,
    )  # fmt: skip
    return out
