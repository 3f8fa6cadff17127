"""Linear layers of a decode step: for a few rows the weight is read once at memory speed, and little else counts.

    1 row         a program sums BLOCK_OUT outputs over BLOCK_IN inputs at a time with plain multiply-adds;
    2 to 16 rows  one 16-row tile of tl.dot, the weight streamed through a pipeline of stages;
    more, or a shape where the table says that cuBLAS is as good: torch's linear.

Which of them runs is data (tuned.py), measured by `benchmarks/kernels.py`. Sums are float32; a row's result does not
depend on the other rows of its batch within one of the three ways.
"""

import torch

from mainsail_kernels import reference
from mainsail_kernels._triton import require, runs_kernels, tl, triton
from mainsail_kernels.tuned import LinearConfig, linear_config


@triton.jit
def _row_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    num_out,
    num_in,
    weight_stride,
    HAS_BIAS: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    STAGES: tl.constexpr,
):
    output = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    rows = weight_ptr + output.to(tl.int64)[:, None] * weight_stride
    acc = tl.zeros((BLOCK_OUT, BLOCK_IN), tl.float32)
    for start in tl.range(0, num_in, BLOCK_IN, num_stages=STAGES):
        channel = start + tl.arange(0, BLOCK_IN)
        if EVEN:
            x = tl.load(x_ptr + channel).to(tl.float32)
            weight = tl.load(rows + channel[None, :], eviction_policy="evict_first")
        else:
            inside = channel < num_in
            x = tl.load(x_ptr + channel, mask=inside, other=0.0).to(tl.float32)
            fits = (output < num_out)[:, None] & inside[None, :]
            weight = tl.load(rows + channel[None, :], mask=fits, other=0.0, eviction_policy="evict_first")
        acc += weight.to(tl.float32) * x[None, :]
    total = tl.sum(acc, axis=1)
    if HAS_BIAS:
        total += tl.load(bias_ptr + output, mask=output < num_out, other=0.0).to(tl.float32)
    tl.store(out_ptr + output, total.to(out_ptr.dtype.element_ty), mask=output < num_out)


@triton.jit
def _rows_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    num_rows,
    num_out,
    num_in,
    x_stride,
    weight_stride,
    HAS_BIAS: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.arange(0, 16)
    output = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    weight_rows = weight_ptr + output.to(tl.int64)[None, :] * weight_stride
    acc = tl.zeros((16, BLOCK_OUT), tl.float32)
    for start in tl.range(0, num_in, BLOCK_IN, num_stages=STAGES):
        channel = start + tl.arange(0, BLOCK_IN)
        inside = channel < num_in
        x_fits = (row < num_rows)[:, None] & inside[None, :]
        x = tl.load(x_ptr + row[:, None] * x_stride + channel[None, :], mask=x_fits, other=0.0)
        if EVEN:
            weight = tl.load(weight_rows + channel[:, None])
        else:
            fits = inside[:, None] & (output < num_out)[None, :]
            weight = tl.load(weight_rows + channel[:, None], mask=fits, other=0.0)
        acc = tl.dot(x, weight, acc)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + output, mask=output < num_out, other=0.0).to(tl.float32)[None, :]
    where = out_ptr + row[:, None] * num_out + output[None, :]
    tl.store(where, acc.to(out_ptr.dtype.element_ty), mask=(row < num_rows)[:, None] & (output < num_out)[None, :])


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [n, in] times weight [out, in] transposed, plus bias [out]; returns [n, out] in x's type.

    Raises ValueError when the shapes or types do not fit.
    """
    fits = x.dim() == 2 and weight.dim() == 2 and x.shape[1] == weight.shape[1] and x.dtype == weight.dtype
    require(fits, f"linear: x {tuple(x.shape)} {x.dtype}, weight {tuple(weight.shape)} {weight.dtype}")
    require(bias is None or bias.shape == weight.shape[:1], "linear: bias must be [out]")
    num_rows, num_out = x.shape[0], weight.shape[0]
    config = linear_config(x.device, num_rows, num_out, x.shape[1]) if runs_kernels(x) else None
    if config is None or weight.stride(1) != 1 or x.stride(1) != 1:
        return reference.linear(x, weight, bias)
    out = torch.empty((num_rows, num_out), dtype=x.dtype, device=x.device)
    _launch(x, weight, bias, out, config)
    return out


def _launch(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor, config: LinearConfig
) -> None:
    num_out, num_in = weight.shape
    grid = (-(-num_out // config.block_out),)
    even = num_out % config.block_out == 0 and num_in % config.block_in == 0
    shape = {"HAS_BIAS": bias is not None, "EVEN": even, "BLOCK_OUT": config.block_out, "BLOCK_IN": config.block_in}
    added = weight if bias is None else bias
    launch = {"STAGES": config.stages, "num_warps": config.warps}
    if x.shape[0] == 1:
        _row_kernel[grid](x, weight, added, out, num_out, num_in, weight.stride(0), **shape, **launch)
    else:
        _rows_kernel[grid](
            x, weight, added, out, x.shape[0], num_out, num_in, x.stride(0), weight.stride(0), **shape, **launch
        )
