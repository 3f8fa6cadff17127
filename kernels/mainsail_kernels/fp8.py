"""FP8 linears: e4m3 weights with a scale per output or per 128 x 128 block, activations quantized as they come.

    1 row           the weight streams through registers and the row stays as it is: memory is what counts, and the
                    instructions that a weight takes;
    a few rows      rows quantized by a kernel of their own, then tl.dot of FP8 with FP8, sums in float32, the inputs
                    split over several programs where the outputs alone do not fill the card;
    more            scales per output: cuBLASLt through torch._scaled_mm; per block: the same kernel on tiles of rows.

out[n, o] = x_scale[n] * w_scale[o] * sum(x_code * w_code); with blocks the two scales change every 128 inputs, and each
block's sum is scaled before it is added (DeepSeek-V3, 2024, section 3.3). A row's result does not depend on the others.
"""

import torch

from mainsail_kernels import reference_quantized as reference
from mainsail_kernels._activation import silu
from mainsail_kernels._fp8 import QuantizedRows, e4m3_words, row_scale, to_e4m3
from mainsail_kernels._split import arrive, collect, split_that_fits, workspace
from mainsail_kernels._triton import (
    INTERPRETED,
    dependent_launch,
    next_power_of_2,
    on_card,
    prefetch_rows,
    require,
    runs_kernels,
    tl,
    triton,
    wait_for_inputs,
)
from mainsail_kernels.reference_quantized import BLOCK, FP8
from mainsail_kernels.tuned import QuantizedConfig, fp8_config


@triton.jit
def _quantize_kernel(
    x_ptr,
    codes_ptr,
    scales_ptr,
    num_in,
    x_stride,
    num_groups,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    ROUND: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """codes [n, num_in] and scales [n, num_groups] of GROUPS groups of WIDTH inputs of one row."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    channel = group[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    inside = channel < num_in
    wait_for_inputs(DEPENDENT)
    x = tl.load(x_ptr + row * x_stride + channel, mask=inside, other=0.0).to(tl.float32)
    scale = row_scale(x, 1)
    tl.store(codes_ptr + row * num_in + channel, to_e4m3(x / scale[:, None], ROUND), mask=inside)
    tl.store(scales_ptr + row * num_groups + group, scale, mask=group < num_groups)


@triton.jit
def _row_kernel(
    x_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    out_ptr,
    num_out,
    num_in,
    weight_stride,
    scale_stride,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    LINES: tl.constexpr,
    STAGES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """out [num_out] of one row x [num_in], which stays as it is; BLOCKS: scales are of 128 x 128 weights."""
    output = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    inner = tl.minimum(output, num_out - 1).to(tl.int64)
    rows = weight_ptr + inner[:, None] * weight_stride
    up = inner + num_out
    up_rows = weight_ptr + up[:, None] * weight_stride
    if DEPENDENT:
        prefetch_rows(rows, 0, num_in, 128, LINES)
        if GATED:
            prefetch_rows(up_rows, 0, num_in, 128, LINES)
    wait_for_inputs(DEPENDENT)
    acc = tl.zeros((BLOCK_OUT, BLOCK_IN), tl.float32)
    acc_up = tl.zeros((BLOCK_OUT, BLOCK_IN), tl.float32)
    for start in tl.range(0, num_in, BLOCK_IN, num_stages=STAGES):
        channel = start + tl.arange(0, BLOCK_IN)
        inside = channel < num_in
        x = tl.load(x_ptr + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
        weight = tl.load(rows + channel[None, :], mask=inside[None, :], other=0.0).to(tl.float32)
        if BLOCKS:
            scales = scale_ptr + channel[None, :] // 128
            weight *= tl.load(scales + (inner // 128)[:, None] * scale_stride, mask=inside[None, :], other=0.0)
        acc += weight * x
        if GATED:
            weight = tl.load(up_rows + channel[None, :], mask=inside[None, :], other=0.0).to(tl.float32)
            if BLOCKS:
                weight *= tl.load(scales + (up // 128)[:, None] * scale_stride, mask=inside[None, :], other=0.0)
            acc_up += weight * x
    total = tl.sum(acc, axis=1)
    if not BLOCKS:
        total *= tl.load(scale_ptr + inner)
    if HAS_BIAS:
        total += tl.load(bias_ptr + inner).to(tl.float32)
    if GATED:
        total_up = tl.sum(acc_up, axis=1)
        if not BLOCKS:
            total_up *= tl.load(scale_ptr + up)
        total = silu(total) * total_up
    tl.store(out_ptr + output, total.to(out_ptr.dtype.element_ty), mask=output < num_out)


@triton.jit
def _add_words(acc, words, x, PTX: tl.constexpr):
    """Add four e4m3 numbers of each word [outputs, words] times their inputs; x [words]: four bfloat16 as an int64."""
    a, b, c, d = e4m3_words(words, PTX)
    low, high = x.to(tl.int32), (x >> 32).to(tl.int32)
    acc += a * (low << 16).to(tl.float32, bitcast=True)[None, :]
    acc += b * (low & -65536).to(tl.float32, bitcast=True)[None, :]
    acc += c * (high << 16).to(tl.float32, bitcast=True)[None, :]
    return acc + d * (high & -65536).to(tl.float32, bitcast=True)[None, :]


@triton.jit
def _row_words_kernel(
    x_ptr, words_ptr, scale_ptr, bias_ptr, out_ptr, num_out, num_words, weight_stride,
    GATED: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_WORDS: tl.constexpr,
    LINES: tl.constexpr, STAGES: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """As _row_kernel for a bfloat16 row, read as int64, and four weights a word: one takes about three instructions.

    Loaded as numbers of 8 bits it took eight, more than the multiprocessors have time for at the memory's rate.
    """
    output = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    inner = tl.minimum(output, num_out - 1).to(tl.int64)
    rows = words_ptr + inner[:, None] * weight_stride
    up_rows = rows + tl.full((), num_out, tl.int64) * weight_stride
    if DEPENDENT:
        prefetch_rows(rows, 0, num_words, 32, LINES)
        if GATED:
            prefetch_rows(up_rows, 0, num_words, 32, LINES)
    wait_for_inputs(DEPENDENT)
    acc = tl.zeros((BLOCK_OUT, BLOCK_WORDS), tl.float32)
    acc_up = tl.zeros((BLOCK_OUT, BLOCK_WORDS), tl.float32)
    for start in tl.range(0, num_words, BLOCK_WORDS, num_stages=STAGES):
        word = start + tl.arange(0, BLOCK_WORDS)
        inside = word < num_words
        words = tl.load(rows + word[None, :], mask=inside[None, :], other=0, eviction_policy="evict_first")
        x = tl.load(x_ptr + word, mask=inside, other=0)
        if GATED:
            up = tl.load(up_rows + word[None, :], mask=inside[None, :], other=0, eviction_policy="evict_first")
            acc_up = _add_words(acc_up, up, x, DEPENDENT)
        acc = _add_words(acc, words, x, DEPENDENT)
    total = tl.sum(acc, axis=1) * tl.load(scale_ptr + inner)
    if HAS_BIAS:
        total += tl.load(bias_ptr + inner).to(tl.float32)
    if GATED:
        total = silu(total) * (tl.sum(acc_up, axis=1) * tl.load(scale_ptr + num_out + inner))
    tl.store(out_ptr + output, total.to(out_ptr.dtype.element_ty), mask=output < num_out)


@triton.jit(do_not_specialize=["num_rows"])
def _rows_kernel(
    x_ptr,
    x_scale_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    out_ptr,
    partial_ptr,
    counters_ptr,
    num_rows,
    num_out,
    num_in,
    weight_stride,
    scale_stride,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCKS: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    SPLIT: tl.constexpr,
    LINES: tl.constexpr,
    STAGES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """out [num_rows, num_out] of quantized rows [num_rows, num_in]: BLOCK_OUT outputs of ROWS rows.

    SPLIT programs share a tile's inputs. BLOCKS: scales are of 128 x 128 weights, and of a row's 128 inputs.
    """
    tile, part = tl.program_id(0), tl.program_id(1)
    output = tile * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    inner = tl.minimum(output, num_out - 1).to(tl.int64)
    weight_rows = weight_ptr + inner[:, None] * weight_stride
    up_rows = weight_rows + tl.full((), num_out, tl.int64) * weight_stride
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    real = row < num_rows
    x_rows = x_ptr + row.to(tl.int64)[:, None] * num_in
    span = tl.cdiv(tl.cdiv(num_in, BLOCK_IN), SPLIT) * BLOCK_IN
    first = part * span
    last = tl.minimum(first + span, num_in)
    groups = tl.cdiv(num_in, 128)
    if DEPENDENT:
        prefetch_rows(weight_rows, first, num_in, 128, LINES)
        if GATED:
            prefetch_rows(up_rows, first, num_in, 128, LINES)
    wait_for_inputs(DEPENDENT)
    acc = tl.zeros((BLOCK_OUT, ROWS), tl.float32)
    acc_up = tl.zeros((BLOCK_OUT, ROWS), tl.float32)
    for start in tl.range(first, last, BLOCK_IN, num_stages=STAGES):
        channel = start + tl.arange(0, BLOCK_IN)
        inside = channel < num_in
        if EVEN:
            x = tl.load(x_rows + channel[None, :], mask=real[:, None], other=0.0)
            weight = tl.load(weight_rows + channel[None, :])
        else:
            x = tl.load(x_rows + channel[None, :], mask=real[:, None] & inside[None, :], other=0.0)
            weight = tl.load(weight_rows + channel[None, :], mask=inside[None, :], other=0.0)
        if GATED:
            if EVEN:
                up = tl.load(up_rows + channel[None, :])
            else:
                up = tl.load(up_rows + channel[None, :], mask=inside[None, :], other=0.0)
        if BLOCKS:
            x_scale = tl.load(x_scale_ptr + row * groups + start // 128, mask=real, other=0.0)[None, :]
            scale = tl.load(scale_ptr + (inner // 128) * scale_stride + start // 128)
            acc += tl.dot(weight, tl.trans(x)) * (scale[:, None] * x_scale)
            if GATED:
                scale = tl.load(scale_ptr + ((inner + num_out) // 128) * scale_stride + start // 128)
                acc_up += tl.dot(up, tl.trans(x)) * (scale[:, None] * x_scale)
        else:
            acc = tl.dot(weight, tl.trans(x), acc)
            if GATED:
                acc_up = tl.dot(up, tl.trans(x), acc_up)
    fits = (output < num_out)[:, None] & real[None, :]
    place = row.to(tl.int64)[None, :] * num_out + output[:, None]
    if SPLIT > 1:
        size = num_rows.to(tl.int64) * num_out
        if arrive(acc, partial_ptr, counters_ptr + tile, part, size, place, fits) != SPLIT - 1:
            return
        acc = collect(acc, partial_ptr, counters_ptr + tile, size, place, fits, SPLIT)
    if not BLOCKS:
        x_scale = tl.load(x_scale_ptr + row, mask=real, other=0.0)[None, :]
        acc *= tl.load(scale_ptr + inner)[:, None] * x_scale
    if HAS_BIAS:
        acc += tl.load(bias_ptr + inner).to(tl.float32)[:, None]
    if GATED:
        if not BLOCKS:
            acc_up *= tl.load(scale_ptr + num_out + inner)[:, None] * x_scale
        acc = silu(acc) * acc_up
    tl.store(out_ptr + place, acc.to(out_ptr.dtype.element_ty), mask=fits)


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(e4m3 codes [n, in], float32 scales [n]) of x [n, in]: each row's largest number becomes 448."""
    return _quantize(x, next_power_of_2(x.shape[1]), 1) if runs_kernels(x) else reference.quantize_rows(x)


def quantize_groups(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(e4m3 codes [n, in], float32 scales [n, ceil(in / 128)]) of x [n, in]: as quantize_rows, for every 128 inputs."""
    return _quantize(x, BLOCK, 16) if runs_kernels(x) else reference.quantize_groups(x)


def _quantize(x: torch.Tensor, width: int, per_program: int) -> tuple[torch.Tensor, torch.Tensor]:
    require(
        x.dim() == 2 and x.stride(1) == 1, f"quantize: x must be [n, in], its rows contiguous, not {tuple(x.shape)}"
    )
    n, num_in = x.shape
    groups = -(-num_in // width)
    codes = torch.empty((n, num_in), dtype=FP8, device=x.device)
    scales = torch.empty((n, groups) if width == BLOCK and per_program > 1 else (n,), device=x.device)
    if n:
        per_program = min(per_program, next_power_of_2(groups))
        _quantize_kernel[(n, -(-groups // per_program))](
            x, codes, scales, num_in, x.stride(0), groups, WIDTH=width, GROUPS=per_program,
            ROUND=INTERPRETED, num_warps=min(max(width * per_program // 512, 1), 16),
            **dependent_launch(x.device, rows=n),
        )  # fmt: skip
    return codes, scales


def fp8_linear(
    x: torch.Tensor | QuantizedRows, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x [n, in] times weight [out, in] e4m3 with scales [out] float32, plus bias [out]; returns [n, out] in x's type.

    Rows that are not quantized yet are on the way; a single row on CUDA stays as it is. Raises ValueError when shapes
    or types do not fit. Calls of one process must run on one stream after another.
    """
    _check(x, weight, bias)
    require(scale.shape == weight.shape[:1], f"fp8_linear: scale must be [{weight.shape[0]}], not {tuple(scale.shape)}")
    if not runs_kernels(weight):
        wide = x if isinstance(x, torch.Tensor) else x.wide().to(x.dtype)
        return reference.fp8_linear(wide, weight, scale, bias)
    config = fp8_config(x.device, x.shape[0], weight.shape[0], x.shape[1])
    if config is None:
        return _scaled_mm(x, weight, scale, bias)
    return _launch(x, weight, scale, bias, config, weight.shape[0], gated=False)


def fp8_block_linear(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """As fp8_linear, with a scale for each 128 x 128 block: [ceil(out / 128), ceil(in / 128)] float32."""
    _check(x, weight, bias)
    _check_blocks(weight, scale)
    if not runs_kernels(x):
        return reference.fp8_block_linear(x, weight, scale, bias)
    config = fp8_config(x.device, x.shape[0], weight.shape[0], x.shape[1], blocks=True)
    if config is None:
        raise ValueError("fp8_block_linear: there is no cuBLASLt for blocks, and no configuration either")
    return _launch(x, weight, scale, bias, config, weight.shape[0], gated=False)


def fp8_gated_linear(x: torch.Tensor | QuantizedRows, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor | None:
    """silu(x @ gate.T) * (x @ up.T) for weight [2 * d, in] e4m3, the gate first, scales of either kind: [n, d].

    None where one launch of this kind is no faster than a linear and `silu_mul`. Raises ValueError as fp8_linear.
    """
    _check(x, weight, None)
    require(weight.shape[0] % 2 == 0, f"fp8_gated_linear: weight must be [2 * d, in], not {tuple(weight.shape)}")
    if scale.dim() == 2:
        _check_blocks(weight, scale)
    if not runs_kernels(weight):
        return None
    config = fp8_config(
        x.device, x.shape[0], weight.shape[0] // 2, x.shape[1], gated=True, blocks=scale.dim() == 2
    )  # fmt: skip
    return None if config is None else _launch(x, weight, scale, None, config, weight.shape[0] // 2, gated=True)


def takes_quantized_rows(num_rows: int, scale: torch.Tensor) -> bool:
    """Whether whoever makes so many rows for fp8_linear with these scales had better quantize them.

    For fewer a kernel of their own, which starts beside the one before, takes no longer (measured at 32 rows; where no
    kernel starts early, at 64 to 511 rows, as on an H200 before its kernels did).
    """
    if not on_card(scale) or scale.dim() != 1:
        return False
    return num_rows >= (64 if dependent_launch(scale.device)["DEPENDENT"] else 512)


def _check(x: torch.Tensor | QuantizedRows, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    fits = len(x.shape) == 2 and weight.dim() == 2 and x.shape[1] == weight.shape[1] and weight.dtype == FP8
    require(fits, f"fp8_linear: x {tuple(x.shape)} {x.dtype}, weight {tuple(weight.shape)} {weight.dtype}")
    require(weight.stride(1) == 1, "fp8_linear: the rows of weight must be contiguous")
    require(bias is None or bias.shape == weight.shape[:1], "fp8_linear: bias must be [out]")


def _check_blocks(weight: torch.Tensor, scale: torch.Tensor) -> None:
    shape = tuple(-(-n // BLOCK) for n in weight.shape)
    fits = scale.shape == shape and scale.is_contiguous()
    require(fits, f"fp8_block_linear: scale must be contiguous {list(shape)}, not {list(scale.shape)}")


def _quantized(x: torch.Tensor | QuantizedRows) -> tuple[torch.Tensor, torch.Tensor]:
    return (x.codes, x.scale) if isinstance(x, QuantizedRows) else quantize_rows(x)


def _scaled_mm(
    x: torch.Tensor | QuantizedRows, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:  # fmt: skip
    """cuBLASLt, or CUTLASS where torch chooses so: bfloat16 out, whatever x is."""
    codes, x_scale = _quantized(x)
    out = torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
        codes, weight.t(), scale_a=x_scale[:, None], scale_b=scale[None, :], out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )  # fmt: skip
    return (out if bias is None else out + bias).to(x.dtype)


def _launch(
    x: torch.Tensor | QuantizedRows, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None,
    config: QuantizedConfig, num_out: int, *, gated: bool,
) -> torch.Tensor:  # fmt: skip
    num_rows, num_in = x.shape
    blocks = scale.dim() == 2
    out = torch.empty((num_rows, num_out), dtype=x.dtype, device=x.device)
    tiles = -(-num_out // config.block_out)
    options = {
        "GATED": gated, "HAS_BIAS": bias is not None, "BLOCKS": blocks, "BLOCK_OUT": config.block_out,
        "LINES": config.ahead // 128, "STAGES": config.stages, "num_warps": config.warps, **dependent_launch(x.device),
    }  # fmt: skip
    added = weight if bias is None else bias
    if isinstance(x, torch.Tensor) and _reads_words(x, weight, scale):
        del options["BLOCKS"]
        _row_words_kernel[(tiles,)](
            x.view(torch.int64), weight.view(torch.int32), scale, added, out, num_out, num_in // 4,
            weight.stride(0) // 4, BLOCK_WORDS=config.block_in // 4, **options,
        )  # fmt: skip
        return out
    if num_rows == 1 and isinstance(x, torch.Tensor):
        _row_kernel[(tiles,)](
            x, weight, scale, added, out, num_out, num_in, weight.stride(0), scale.stride(0),
            BLOCK_IN=config.block_in, **options,
        )  # fmt: skip
        return out
    codes, x_scale = quantize_groups(x) if blocks and isinstance(x, torch.Tensor) else _quantized(x)
    rows = min(max(next_power_of_2(num_rows), 16), config.block_rows)
    block_in = min(config.block_in, BLOCK) if blocks else config.block_in
    row_tiles = -(-num_rows // rows)
    split = 1 if gated or row_tiles > 1 else split_that_fits(config.split, num_rows, num_out, tiles)
    if num_rows:
        _rows_kernel[(tiles, split, row_tiles)](
            codes, x_scale, weight, scale, added, out, *workspace(x.device), num_rows, num_out, num_in,
            weight.stride(0), scale.stride(0), EVEN=num_in % block_in == 0, ROWS=rows, BLOCK_IN=block_in, SPLIT=split,
            **options,
        )  # fmt: skip
    return out


def _reads_words(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> bool:
    """Whether this is one row that can be read by four, as its weights."""
    one = x.shape[0] == 1 and x.dtype == torch.bfloat16 and scale.dim() == 1
    whole = weight.shape[1] % 16 == weight.stride(0) % 16 == weight.storage_offset() % 16 == 0
    return one and whole and x.stride(1) == 1 and x.stride(0) % 4 == x.storage_offset() % 4 == 0
