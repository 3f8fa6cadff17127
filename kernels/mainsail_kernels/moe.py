"""A mixture of gated MLPs: every token through the experts chosen for it, all experts in two grouped products.

Pairs (token, expert) are sorted by expert, each expert's pairs padded to whole tiles, so that a tile of rows meets one
expert's weights only; the sorting is a handful of operations on the device that wait for nothing (CUDA graphs hold it):

    chosen [n, k] ─sort─▶ rows [tiles * TILE]: pair of each row, n * k where the row is padding
                          tile_expert [tiles]
    x[pair // k] · gate_up[expert]ᵀ ─▶ [n * k, 2d] ─silu·mul─▶ [n * k, d] · down[expert]ᵀ · weight ─▶ sum over k

Matrices may be e4m3 with scales, or MXFP4 (e2m1 codes, a power of two for 32 inputs each), whose tiles are widened in
registers (_experts.py); for many rows MXFP4 is widened into a buffer. A single token is not sorted: experts.py has its
kernels. Nor are rows of quantized experts which Hopper's FP8 tensor cores take faster (experts_halves.py).
Weights of experts that no token chose are not read, except into that buffer. The idea of the sorted, padded grouping is
MegaBlocks' (Gale et al., 2022) in the form that inference engines use.
"""

import torch

from mainsail_kernels import reference
from mainsail_kernels._experts import FP4_REST, fp4_tile, multiply, table_runs, table_value
from mainsail_kernels._triton import (
    dependent_launch,
    next_power_of_2,
    require,
    runs_kernels,
    tl,
    triton,
    wait_for_inputs,
)
from mainsail_kernels.experts import Mixture, Product, by_pairs, check, kind_of, product
from mainsail_kernels.experts_halves import applies, by_halves
from mainsail_kernels.silu_mul import clamped_swiglu, silu_mul
from mainsail_kernels.tuned import SortedTile, pair_tiles, sorted_tile

SMALL_PAIRS = 4096
"""Up to here one launch sorts all pairs; a decode step's hundred launches would cost more than its experts."""
_SUM_BLOCK = 512
FP4_ROWS = 64
"""Experts with more rows than this on average have their packed FP4 widened once for all, to bfloat16 in a buffer."""


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
    """A row's K best scores: weights [n, K] float32 and chosen [n, K] int64, the best first."""
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
        chosen = tl.minimum(best, num_experts - 1)  # scores of padding may be no numbers
        tl.store(chosen_ptr + row * K + rank, chosen.to(tl.int64))
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


@triton.jit(do_not_specialize=["num_pairs"])
def _grouped_kernel(
    x_ptr,
    weight_ptr,
    rows_ptr,
    tile_expert_ptr,
    weights_ptr,
    scale_ptr,
    bias_ptr,
    out_ptr,
    num_pairs,
    num_out,
    num_units,
    x_stride,
    expert_stride,
    row_units,
    expert_scale_stride,
    scale_stride,
    UNIT: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    WEIGHTED: tl.constexpr,
    KIND: tl.constexpr,
    PAIRED: tl.constexpr,
    BIAS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    STAGES: tl.constexpr,
    PTX: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """out [pairs, num_out]: TILE pairs of one expert, as _group_kernel sorted them, by BLOCK_OUT outputs.

    WEIGHTED: times the pair's weight. The other constants: experts.Product.
    """
    num_in = num_units * UNIT
    tile = tl.program_id(1)
    wait_for_inputs(DEPENDENT)
    expert = tl.load(tile_expert_ptr + tile).to(tl.int64)
    if expert < 0:
        return
    pair = tl.load(rows_ptr + tile * TILE + tl.arange(0, TILE)).to(tl.int64)
    real = pair < num_pairs
    output = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    in_range = output < num_out
    x_rows = x_ptr + (pair // PER_TOKEN * x_stride)[:, None]
    columns = weight_ptr + expert * expert_stride + (output.to(tl.int64) * (row_units * UNIT))[None, :]
    scales = scale_ptr + expert * expert_scale_stride
    of_out = (scales + (output if KIND == "fp4" else output // 128 * scale_stride))[None, :]
    acc = tl.zeros((TILE, BLOCK_OUT), tl.float32)
    for start in tl.range(0, num_in, BLOCK_IN, num_stages=STAGES):
        acc, _ = multiply(
            acc, acc, x_rows, real, columns, columns, of_out, of_out, start, num_in, in_range,
            num_out, False, KIND, PAIRED, BLOCK_IN, PTX,
        )  # fmt: skip
    if KIND == "fp4" and PTX:
        acc *= FP4_REST
    if KIND == "channels":
        acc *= tl.load(scales + output, mask=in_range, other=0.0)[None, :]
    if BIAS:
        acc += tl.load(bias_ptr + expert * num_out + output, mask=in_range, other=0.0).to(tl.float32)[None, :]
    if WEIGHTED:
        acc *= tl.load(weights_ptr + pair, mask=real, other=0.0)[:, None]
    where = out_ptr + pair[:, None] * num_out + output[None, :]
    tl.store(where, acc.to(out_ptr.dtype.element_ty), mask=real[:, None] & in_range[None, :])


@triton.jit
def _widen_kernel(
    words_ptr,
    scale_ptr,
    out_ptr,
    num_out,
    num_groups,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    PTX: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """out [experts, num_out, num_groups * 32]: what FP4 stands for."""
    num_words, num_channels = num_groups * 4, num_groups * 32
    output = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    start, expert = tl.program_id(1) * BLOCK_IN, tl.program_id(2).to(tl.int64)
    in_range = output < num_out
    columns = words_ptr + expert * num_out * num_words + (output * num_words)[None, :]
    scales = scale_ptr + expert * num_groups * num_out + output[None, :]
    wait_for_inputs(DEPENDENT)
    weights = fp4_tile(columns, scales, start, num_words, in_range, num_out, BLOCK_IN, PTX)
    word = tl.arange(0, BLOCK_IN)
    channel = start * 8 + (word // 4 * 32 + word % 4)
    rows = out_ptr + expert * num_out * num_channels + (output * num_channels)[None, :]
    for i in tl.static_range(8):
        fits = (start + word < num_words)[:, None] & in_range[None, :]
        weight = weights[i].to(tl.float32) * (FP4_REST if PTX else 1.0)
        tl.store(rows + (channel + 4 * i)[:, None], weight.to(out_ptr.dtype.element_ty), mask=fits)


@triton.jit
def _table_power(bytes_, factor):
    """What bytes of tables stand for in a row with this factor, float32."""
    return ((bytes_ << 20) + (122 << 23)).to(tl.float32, bitcast=True) * factor


@triton.jit
def _widen_tables_kernel(
    words_ptr, scale_ptr, factor_ptr, out_ptr, num_out, num_groups, BLOCK_OUT: tl.constexpr, PTX: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """As _widen_kernel, of one step of tables. A word is two runs of four inputs: PTX writes each at once (out: int64).

    Neighbouring threads have the words of one dot, and so write one stretch of memory.
    """
    step, expert = tl.program_id(1), tl.program_id(2).to(tl.int64)
    each = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    groups = tl.minimum(num_groups - step * 8, 8)  # of a dot: as many runs of four inputs
    two, run = tl.arange(0, 32) // 8, tl.arange(0, 32) % 8
    fits = (run < groups)[:, None] & (each < num_out)[None, :]
    of_words = (step * 32 + 4 * run + two)[:, None] + (each * (num_groups * 4))[None, :]
    of_scales = (two // 2)[:, None] + (each * 2)[None, :]
    first = (step * 64 + two * 2 * groups + run)[:, None] + (each * (num_groups * 8))[None, :]
    wait_for_inputs(DEPENDENT)
    word = tl.load(words_ptr + expert * num_out * (num_groups * 4) + of_words, mask=fits, other=0)
    factor = tl.load(factor_ptr + expert * num_out + each, mask=each < num_out, other=0.0)[None, :]
    scales = scale_ptr + (expert * tl.num_programs(1) + step) * (2 * num_out)
    bytes_ = tl.load(scales + of_scales, mask=fits, other=0) >> (two % 2 * 16)[:, None]
    lower, upper = _table_power(bytes_ & 255, factor), _table_power((bytes_ >> 8) & 255, factor)
    if PTX:
        first = tl.max_contiguous(first, [1, 1])  # or threads' words are exchanged for wider stores
        low, high = table_runs(word, lower, upper)
        out = out_ptr + expert * num_out * (num_groups * 8)
        tl.store(out + first, low, mask=fits)
        tl.store(out + groups + first, high, mask=fits)
    else:
        for i in tl.static_range(8):
            weight = table_value(word, i) * (lower if i < 4 else upper)
            where = out_ptr + expert * num_out * (num_groups * 32) + ((first + i // 4 * groups) * 4 + i % 4)
            tl.store(where, weight.to(out_ptr.dtype.element_ty), mask=fits)


def widened(matrix: torch.Tensor, scale: torch.Tensor, factor: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """[experts, outputs, inputs] of FP4 matrices, on the device."""
    num_experts, num_out, num_words = matrix.shape
    out = torch.empty((num_experts, num_out, num_words * 8), dtype=dtype, device=matrix.device)
    dependent = dependent_launch(matrix.device)
    grid, groups = (-(-num_out // 32), -(-num_words // 32), num_experts), num_words // 4
    if factor is None:
        _widen_kernel[grid](
            matrix, scale, out, num_out, groups, BLOCK_OUT=32, BLOCK_IN=32, PTX=dependent["DEPENDENT"],
            num_warps=4, **dependent,
        )  # fmt: skip
    else:
        ptx = bool(dependent["DEPENDENT"]) and dtype == torch.bfloat16
        _widen_tables_kernel[grid](
            matrix, scale, factor, out.view(torch.int64) if ptx else out, num_out, groups, BLOCK_OUT=32, PTX=ptx,
            num_warps=4, **dependent,
        )  # fmt: skip
    return out


def routed_mlp(x: torch.Tensor, scores: torch.Tensor, m: Mixture) -> torch.Tensor:
    """The weighted sum of the gated MLPs of each token's best experts, [n, hidden] in x's type.

    x [n, hidden]; scores [n, experts] are the router's, and what `route` makes of them are the weights. Raises
    ValueError when shapes do not fit.
    """
    require(scores.shape == (x.shape[0], m.gate_up.shape[0]), f"routed_mlp: scores {tuple(scores.shape)}")
    check(x, m)
    if runs_kernels(x) and x.shape[0]:
        tiles = pair_tiles(kind_of(m.gate_up, m.gate_up_scale), x.shape[0])
        if tiles is not None:
            return by_pairs(x, scores, m, tiles.up, tiles.down)
        if applies(x, m):
            return by_halves(x, scores, m)
    weights, chosen = route(scores, m.per_token, normalized=m.normalized)
    return grouped_mlp(x, weights, chosen, m)


def grouped_mlp(x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor, m: Mixture) -> torch.Tensor:
    """The same with weights [n, k] float32 of the experts chosen [n, k]: pairs sorted by expert.

    Rows stay as they are, whatever the matrices are. Raises ValueError when shapes do not fit.
    """
    n, hidden = x.shape
    check(x, m)
    require(weights.shape == chosen.shape and chosen.shape[0] == n, "grouped_mlp: weights and chosen must be [n, k]")
    if not runs_kernels(x):
        require(kind_of(m.gate_up, m.gate_up_scale) != "tables", "grouped_mlp: MXFP4 in tables is for GPUs")
        return reference.grouped_mlp(
            x, weights, chosen, m.gate_up, m.down, m.gate_up_scale, m.down_scale, m.gate_up_bias, m.down_bias, m.swiglu
        )
    per_token, num_experts = chosen.shape[1], m.gate_up.shape[0]
    each = n * per_token / num_experts
    tile = sorted_tile(_kind(m, each), each)
    rows, tile_expert = group(chosen, num_experts, tile.rows)
    inner = torch.empty((n * per_token, m.gate_up.shape[1]), dtype=x.dtype, device=x.device)
    matrix, scale = _read(m.gate_up, m.gate_up_scale, m.gate_up_factor, x, each)
    _launch(product(x, matrix, scale, m.gate_up_bias, tile.shape), rows, tile_expert, None, inner, per_token, tile)
    outer = torch.empty((n * per_token, hidden), dtype=x.dtype, device=x.device)
    active = silu_mul(inner) if m.swiglu is None else clamped_swiglu(inner, *m.swiglu)
    matrix, scale = _read(m.down, m.down_scale, m.down_factor, active, each)
    factors = weights.reshape(-1)
    _launch(product(active, matrix, scale, m.down_bias, tile.shape), rows, tile_expert, factors, outer, 1, tile)
    out = torch.empty((n, hidden), dtype=x.dtype, device=x.device)
    if n:
        _sum_kernel[(-(-hidden // _SUM_BLOCK), n)](
            outer, out, hidden, PER_TOKEN=per_token, PADDED=next_power_of_2(per_token), BLOCK=_SUM_BLOCK,
            num_warps=4, **dependent_launch(x.device),
        )  # fmt: skip
    return out


def _kind(m: Mixture, rows: float) -> str:
    """Of the matrices that products read for so many rows an expert."""
    kind = kind_of(m.gate_up, m.gate_up_scale)
    return "plain" if kind == "tables" or (kind == "fp4" and rows > FP4_ROWS) else kind


def _read(
    matrix: torch.Tensor, scale: torch.Tensor | None, factor: torch.Tensor | None, x: torch.Tensor, rows: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What a product reads for so many rows an expert."""
    kind = kind_of(matrix, scale)
    if scale is not None and (kind == "tables" or (kind == "fp4" and rows > FP4_ROWS)):
        return widened(matrix, scale, factor, x.dtype), None
    return matrix, scale


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
    p: Product, rows: torch.Tensor, tile_expert: torch.Tensor, weights: torch.Tensor | None, out: torch.Tensor,
    per_token: int, tile: SortedTile,
) -> None:  # fmt: skip
    num_out = out.shape[1]
    _grouped_kernel[(-(-num_out // tile.shape.block_out), tile_expert.shape[0])](
        p.x, p.matrix, rows, tile_expert, out if weights is None else weights, p.scale, p.bias, out, out.shape[0],
        num_out, *p.sizes, PER_TOKEN=per_token, WEIGHTED=weights is not None, TILE=tile.rows, **p.options,
    )  # fmt: skip
