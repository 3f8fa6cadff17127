"""A mixture of gated MLPs: every token through the experts chosen for it, all experts in two grouped products.

Pairs (token, expert) are sorted by expert, each expert's pairs padded to whole tiles, so that a tile of rows meets one
expert's weights only; the sorting is a handful of operations on the device that wait for nothing (CUDA graphs hold it):

    chosen [n, k] ─sort─▶ rows [tiles * TILE]: pair of each row, n * k where the row is padding
                          tile_expert [tiles]
    x[pair // k] · gate_up[expert]ᵀ ─▶ [n * k, 2d] ─silu·mul─▶ [n * k, d] · down[expert]ᵀ · weight ─▶ sum over k

Matrices may be e4m3 with scales, or MXFP4 (two e2m1 codes a byte, a power of two for 32 inputs each), whose tiles are
widened in registers. Weights of experts that no token chose are never read. The idea of the sorted, padded grouping is
MegaBlocks' (Gale et al., 2022) in the form that inference engines use.
"""

import torch

from mainsail_kernels import reference
from mainsail_kernels._triton import (
    dependent_launch,
    next_power_of_2,
    require,
    runs_kernels,
    tl,
    triton,
    wait_for_inputs,
)
from mainsail_kernels.silu_mul import clamped_swiglu, silu_mul

SMALL_PAIRS = 4096
"""Up to here one launch sorts all pairs; a decode step's hundred launches would cost more than its experts."""
_SUM_BLOCK = 512
TILE_SMALL, TILE_LARGE = 16, 64
"""Rows of a tile: for few rows an expert (decodes), and for many (prompts)."""


@triton.jit
def _route_kernel(
    scores_ptr,
    weights_ptr,
    chosen_ptr,
    num_experts,
    stride,
    NORMALIZED: tl.constexpr,
    K: tl.constexpr,
    EXPERTS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, EXPERTS)
    wait_for_inputs(DEPENDENT)
    scores = tl.load(scores_ptr + row * stride + expert, mask=expert < num_experts, other=-float("inf")).to(tl.float32)
    powers = tl.exp(scores - tl.max(scores, axis=0))
    total = tl.sum(powers, axis=0)
    if NORMALIZED:
        left, total = powers, 0.0
        for _ in tl.static_range(K):
            best = tl.argmax(left, axis=0, tie_break_left=True)
            total += tl.max(left, axis=0)
            left = tl.where(expert == best, -1.0, left)
    left = powers
    for rank in tl.static_range(K):
        best = tl.argmax(left, axis=0, tie_break_left=True)
        tl.store(weights_ptr + row * K + rank, tl.max(left, axis=0) / total)
        tl.store(chosen_ptr + row * K + rank, best.to(tl.int64))
        left = tl.where(expert == best, -1.0, left)


@triton.jit
def _group_kernel(
    chosen_ptr,
    rows_ptr,
    tile_expert_ptr,
    num_pairs,
    num_experts,
    num_tiles,
    TILE: tl.constexpr,
    PAIRS: tl.constexpr,
    EXPERTS: tl.constexpr,
    TILES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """A program for each expert: all count everybody's pairs, which is cheap, and each writes down its own."""
    mine = tl.program_id(0)
    pair = tl.arange(0, PAIRS)
    wait_for_inputs(DEPENDENT)
    of_pair = tl.load(chosen_ptr + pair, mask=pair < num_pairs, other=EXPERTS).to(tl.int32)
    expert = tl.arange(0, 2 * EXPERTS)  # those of padding are counted beyond the last expert
    counts = tl.where(expert < EXPERTS, tl.histogram(of_pair, 2 * EXPERTS), 0)
    padded = (counts + TILE - 1) // TILE * TILE
    first = tl.sum(tl.where(expert < mine, padded, 0), axis=0)
    count = tl.sum(tl.where(expert == mine, counts, 0), axis=0)
    end = first + (count + TILE - 1) // TILE * TILE
    own = of_pair == mine
    tl.store(rows_ptr + first + tl.cumsum(own.to(tl.int32), axis=0) - 1, pair, mask=own)
    place = first + count + tl.arange(0, TILE)
    tl.store(rows_ptr + place, tl.full((TILE,), 0, tl.int32) + num_pairs, mask=place < end)
    tile = tl.arange(0, TILES)
    tl.store(tile_expert_ptr + tile, tile * 0 + mine, mask=(tile >= first // TILE) & (tile < end // TILE))
    if mine == num_experts - 1:
        tl.store(tile_expert_ptr + tile, tile * 0 - 1, mask=(tile >= end // TILE) & (tile < num_tiles))
        for start in range(end, num_tiles * TILE, 1024):
            unused = start + tl.arange(0, 1024)
            tl.store(rows_ptr + unused, tl.full((1024,), 0, tl.int32) + num_pairs, mask=unused < num_tiles * TILE)


@triton.jit
def _sum_kernel(
    parts_ptr, out_ptr, size, PER_TOKEN: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """out [n, size]: the sum of the PER_TOKEN rows of each token in parts [n * PER_TOKEN, size]."""
    row = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    part = tl.arange(0, PADDED)
    at = (row * PER_TOKEN + part)[:, None] * size + column[None, :]
    wait_for_inputs(DEPENDENT)
    parts = tl.load(parts_ptr + at, mask=(part < PER_TOKEN)[:, None] & (column < size)[None, :], other=0.0)
    total = tl.sum(parts.to(tl.float32), axis=0)
    tl.store(out_ptr + row * size + column, total.to(out_ptr.dtype.element_ty), mask=column < size)


@triton.jit
def _fp4(code):
    """2 ** -14 of the number that the low half of a byte means: its bits are the highest but three of a float16's."""
    bits = ((code & 7).to(tl.uint16) << 9) | ((code & 8).to(tl.uint16) << 12)
    return bits.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _power(scale):
    """2 ** 14 times what an e8m0 scale means: its bits are a float's exponent. Above 2 ** 113 it is that."""
    return ((tl.minimum(scale.to(tl.int32), 240) + 14) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _grouped_kernel(
    x_ptr,
    weight_ptr,
    rows_ptr,
    tile_expert_ptr,
    scale_ptr,
    weight_scale_ptr,
    bias_ptr,
    out_ptr,
    num_pairs,
    num_out,
    num_in,
    x_stride,
    expert_stride,
    weight_stride,
    expert_scale_stride,
    weight_scale_stride,
    PER_TOKEN: tl.constexpr,
    SCALED: tl.constexpr,
    BIAS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCKS: tl.constexpr,
    FP4: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    STAGES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    tile = tl.program_id(1)
    wait_for_inputs(DEPENDENT)
    expert = tl.load(tile_expert_ptr + tile).to(tl.int64)
    if expert < 0:
        return
    pair = tl.load(rows_ptr + tile * TILE + tl.arange(0, TILE)).to(tl.int64)
    real = pair < num_pairs
    output = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    in_range = output < num_out
    x_rows = x_ptr + (pair // PER_TOKEN)[:, None] * x_stride
    weight_rows = weight_ptr + expert * expert_stride + output.to(tl.int64)[None, :] * weight_stride
    scales = weight_scale_ptr + expert * expert_scale_stride
    acc = tl.zeros((TILE, BLOCK_OUT), tl.float32)
    # A step is BLOCK_IN inputs; of FP4 as many bytes, each with one of the first 16 inputs of 32 and one of the others
    for start in tl.range(0, num_in // 2 if FP4 else num_in, BLOCK_IN, num_stages=STAGES):
        place = start + tl.arange(0, BLOCK_IN)
        channel = place // 16 * 32 + place % 16 if FP4 else place
        inside = channel < num_in
        x = tl.load(x_rows + channel[None, :], mask=real[:, None] & inside[None, :], other=0.0)
        fits = inside[:, None] & in_range[None, :]
        weight = tl.load(weight_rows + place[:, None], mask=fits, other=0.0)
        if FP4:
            beyond = tl.load(x_rows + channel[None, :] + 16, mask=real[:, None] & inside[None, :], other=0.0)
            of_group = scales + output[None, :] * weight_scale_stride + (place // 16)[:, None]
            power = _power(tl.load(of_group, mask=fits, other=0))
            low, high = _fp4(weight) * power, _fp4(weight >> 4) * power
            acc = tl.dot(x, low.to(x.dtype), acc, input_precision="ieee")
            acc = tl.dot(beyond, high.to(x.dtype), acc, input_precision="ieee")
        elif BLOCKS:
            factor = tl.load(scales + output // 128 * weight_scale_stride + start // 128, mask=in_range, other=0.0)
            acc += tl.dot(x, weight.to(x.dtype), input_precision="ieee") * factor[None, :]
        else:
            acc = tl.dot(x, weight.to(x.dtype), acc, input_precision="ieee")
    if CHANNELS:
        acc *= tl.load(scales + output, mask=in_range, other=0.0)[None, :]
    if BIAS:
        acc += tl.load(bias_ptr + expert * num_out + output, mask=in_range, other=0.0).to(tl.float32)[None, :]
    if SCALED:
        acc *= tl.load(scale_ptr + pair, mask=real, other=0.0)[:, None]
    where = out_ptr + pair[:, None] * num_out + output[None, :]
    tl.store(where, acc.to(out_ptr.dtype.element_ty), mask=real[:, None] & in_range[None, :])


def grouped_mlp(
    x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor,
    gate_up_scale: torch.Tensor | None = None, down_scale: torch.Tensor | None = None,
    gate_up_bias: torch.Tensor | None = None, down_bias: torch.Tensor | None = None,
    swiglu: tuple[float, float] | None = None,
) -> torch.Tensor:  # fmt: skip
    """The weighted sum of the chosen experts' gated MLPs, [n, hidden] in x's type.

    x [n, hidden]; weights [n, k] float32 and chosen [n, k] integer: each token's experts; gate_up
    [experts, 2*d, hidden] with the gate first; down [experts, hidden, d]. Matrices may be e4m3: then with scales,
    [experts, outputs] or one for each 128 x 128 block; or uint8: FP4 as reference_quantized.pack_fp4 packs it, with
    scales [experts, outputs, inputs / 32] uint8; x stays as it is. Biases are [experts, outputs]; swiglu: alpha and
    limit of silu_mul.clamped_swiglu, in place of silu(gate) * up. Raises ValueError when shapes do not fit.
    """
    n, hidden = x.shape
    num_experts, wide, _ = gate_up.shape
    ins = [_inputs(matrix, scale) for matrix, scale in ((gate_up, gate_up_scale), (down, down_scale))]
    fits = ins == [hidden, wide // 2] and down.shape[:2] == (num_experts, hidden) and wide % 2 == 0
    require(fits, f"grouped_mlp: x {tuple(x.shape)}, gate_up {tuple(gate_up.shape)}, down {tuple(down.shape)}")
    require(weights.shape == chosen.shape and chosen.shape[0] == n, "grouped_mlp: weights and chosen must be [n, k]")
    if not runs_kernels(x):
        return reference.grouped_mlp(
            x, weights, chosen, gate_up, down, gate_up_scale, down_scale, gate_up_bias, down_bias, swiglu
        )
    per_token = chosen.shape[1]
    tile = TILE_SMALL if n * per_token <= 8 * num_experts else TILE_LARGE
    rows, tile_expert = group(chosen, num_experts, tile)
    inner = torch.empty((n * per_token, wide), dtype=x.dtype, device=x.device)
    _launch(x, gate_up, gate_up_scale, gate_up_bias, rows, tile_expert, None, inner, per_token, tile)
    outer = torch.empty((n * per_token, hidden), dtype=x.dtype, device=x.device)
    active = silu_mul(inner) if swiglu is None else clamped_swiglu(inner, *swiglu)
    _launch(active, down, down_scale, down_bias, rows, tile_expert, weights.reshape(-1), outer, 1, tile)
    out = torch.empty((n, hidden), dtype=x.dtype, device=x.device)
    if n:
        _sum_kernel[(-(-hidden // _SUM_BLOCK), n)](
            outer, out, hidden, PER_TOKEN=per_token, PADDED=next_power_of_2(per_token), BLOCK=_SUM_BLOCK,
            num_warps=4, **dependent_launch(x.device),
        )  # fmt: skip
    return out


def _inputs(matrix: torch.Tensor, scale: torch.Tensor | None) -> int:
    """Of stacked matrices; -1 where FP4's scales do not fit them."""
    if matrix.dtype != torch.uint8:
        return matrix.shape[2]
    if scale is None or scale.dtype != torch.uint8 or not scale.is_contiguous():
        return -1
    return matrix.shape[2] * 2 if scale.shape == (*matrix.shape[:2], matrix.shape[2] // 16) else -1


def route(scores: torch.Tensor, per_token: int, *, normalized: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The `per_token` best experts of each token: weights [n, k] float32 and experts [n, k] int64, the best first.

    scores [n, experts] are the router's; weights are their softmax over all experts, made to add up to 1 over the
    chosen ones where `normalized`. Ties go to the lower expert.
    """
    if not runs_kernels(scores):
        return reference.route(scores, per_token, normalized=normalized)
    n, num_experts = scores.shape
    weights = torch.empty((n, per_token), dtype=torch.float32, device=scores.device)
    chosen = torch.empty((n, per_token), dtype=torch.int64, device=scores.device)
    if n:
        _route_kernel[(n,)](
            scores, weights, chosen, num_experts, scores.stride(0),
            NORMALIZED=normalized, K=per_token, EXPERTS=next_power_of_2(num_experts), num_warps=1,
            **dependent_launch(scores.device),
        )  # fmt: skip
    return weights, chosen


def group(chosen: torch.Tensor, num_experts: int, tile: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows [tiles * tile] int32: pairs sorted by expert and padded, tile_expert [tiles] int32: -1 for a tile unused).

    The number of tiles is what could be needed, so that nothing waits for the counts.
    """
    flat = chosen.reshape(-1)
    num_pairs, device = flat.numel(), chosen.device
    tiles = num_pairs // tile + min(num_experts, num_pairs)
    if num_pairs <= SMALL_PAIRS and runs_kernels(chosen):
        rows = torch.empty(tiles * tile, dtype=torch.int32, device=device)
        tile_expert = torch.empty(tiles, dtype=torch.int32, device=device)
        _group_kernel[(num_experts,)](
            flat, rows, tile_expert, num_pairs, num_experts, tiles, TILE=tile,
            PAIRS=max(next_power_of_2(num_pairs), 128), EXPERTS=next_power_of_2(num_experts),
            TILES=next_power_of_2(tiles), num_warps=4, **dependent_launch(device),
        )  # fmt: skip
        return rows, tile_expert
    order = flat.argsort(stable=True)
    by_expert = flat[order]
    counts = torch.zeros(num_experts, dtype=torch.int64, device=device).scatter_add_(0, flat, torch.ones_like(flat))
    padded = (counts + tile - 1) // tile * tile
    ends = padded.cumsum(0)
    first_pair = counts.cumsum(0) - counts
    place = (ends - padded)[by_expert] + torch.arange(num_pairs, device=device) - first_pair[by_expert]
    rows = torch.full((tiles * tile,), num_pairs, dtype=torch.int32, device=device)
    rows[place] = order.int()
    expert = torch.searchsorted(ends, torch.arange(tiles, device=device) * tile, right=True)
    return rows, torch.where(expert < num_experts, expert, -1).int()


def _launch(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor | None, bias: torch.Tensor | None,
    rows: torch.Tensor, tile_expert: torch.Tensor, scale: torch.Tensor | None, out: torch.Tensor, per_token: int,
    tile: int,
) -> None:  # fmt: skip
    num_out, num_in = weight.shape[1], x.shape[1]
    block_out, block_in = (64, 128) if tile == TILE_SMALL else (128, 64)
    grid = (-(-num_out // block_out), tile_expert.shape[0])
    fp4 = weight.dtype == torch.uint8
    dims = 0 if weight_scale is None or fp4 else weight_scale.dim()
    strides = (0, 0) if weight_scale is None else (weight_scale.stride(0), weight_scale.stride(1))
    _grouped_kernel[grid](
        x, weight, rows, tile_expert, out if scale is None else scale, x if weight_scale is None else weight_scale,
        x if bias is None else bias, out, out.shape[0], num_out, num_in, x.stride(0), weight.stride(0),
        weight.stride(1), *strides,
        PER_TOKEN=per_token, SCALED=scale is not None, BIAS=bias is not None, TILE=tile, CHANNELS=dims == 2,
        BLOCKS=dims == 3, FP4=fp4,
        BLOCK_OUT=block_out, BLOCK_IN=block_in, STAGES=4 if tile == TILE_SMALL else 3,
        num_warps=4, **dependent_launch(x.device),
    )  # fmt: skip
