"""RMS norm, alone or fused with the residual addition before it (Zhang and Sennrich, 2019), or quantized for FP8.

One program normalizes one row held in registers, so a row is read once and written once; sums are float32.
Gemma's (1 + weight) is folded into the weight when a model is loaded, not here.
"""

import torch

from mainsail_kernels import reference
from mainsail_kernels._fp8 import QuantizedRows, row_scale, to_e4m3
from mainsail_kernels._triton import (
    INTERPRETED,
    dependent_launch,
    next_power_of_2,
    require,
    runs_kernels,
    tl,
    triton,
    wait_for_inputs,
)
from mainsail_kernels.reference_quantized import FP8, quantize_rows


@triton.jit
def _rms_norm_kernel(
    x_ptr,
    weight_ptr,
    residual_ptr,
    out_ptr,
    scale_ptr,
    sum_ptr,
    size,
    x_stride,
    residual_stride,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    QUANTIZED: tl.constexpr,
    ROUND: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < size
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    wait_for_inputs(DEPENDENT)
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        x += tl.load(residual_ptr + row * residual_stride + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(sum_ptr + row * size + column, x.to(sum_ptr.dtype.element_ty), mask=inside)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / size + eps)
    if QUANTIZED:  # what would have been stored, as quantize_rows would read it
        normed = (x * scale * weight).to(x_ptr.dtype.element_ty).to(tl.float32)
        step = row_scale(normed, 0)
        tl.store(out_ptr + row * size + column, to_e4m3(normed / step, ROUND), mask=inside)
        tl.store(scale_ptr + row, step)
    else:
        tl.store(out_ptr + row * size + column, (x * scale * weight).to(out_ptr.dtype.element_ty), mask=inside)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Normalize the rows of x [..., d]; with a residual, of x + residual, and return (out, x + residual).

    The last dimension must be contiguous; rows may be strided views (a slice of a wider matrix) when x is 2-D.
    Raises ValueError when weight is not [d] or the residual's shape differs from x's.
    """
    require(weight.shape == x.shape[-1:], f"rms_norm: weight is {tuple(weight.shape)} for x {tuple(x.shape)}")
    if residual is not None:
        require(residual.shape == x.shape, f"rms_norm: residual is {tuple(residual.shape)}, x {tuple(x.shape)}")
    if not runs_kernels(x):
        return reference.rms_norm(x, weight, eps, residual)
    out, total, _ = _launch(x, weight, eps, residual, quantized=False)
    return out if residual is None else (out, total)


def rms_norm_quantized(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> tuple[QuantizedRows, torch.Tensor]:
    """As `rms_norm` of x [n, d], its rows quantized to e4m3: (rows, x + residual, or x where there is none)."""
    require(
        weight.shape == x.shape[-1:] and x.dim() == 2, f"rms_norm: weight {tuple(weight.shape)}, x {tuple(x.shape)}"
    )
    if not runs_kernels(x):
        normed = reference.rms_norm(x, weight, eps, residual)
        out, total = normed if isinstance(normed, tuple) else (normed, x)
        return QuantizedRows(*quantize_rows(out), x.dtype), total
    out, total, scale = _launch(x, weight, eps, residual, quantized=True)
    return QuantizedRows(out, scale, x.dtype), x if residual is None else total


def _launch(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None, *, quantized: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(normed rows, x + residual where there is one, the rows' scales where they are quantized)."""
    rows = _rows(x)
    added = rows if residual is None else _rows(residual)
    out = torch.empty(x.shape, dtype=FP8 if quantized else x.dtype, device=x.device)
    total = out if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    scale = torch.empty(rows.shape[0], device=x.device) if quantized else out
    size = x.shape[-1]
    if rows.shape[0]:
        block = next_power_of_2(size)
        _rms_norm_kernel[(rows.shape[0],)](
            rows, weight, added, out, scale, total, size, rows.stride(0), added.stride(0), eps,
            HAS_RESIDUAL=residual is not None, QUANTIZED=quantized, ROUND=INTERPRETED, BLOCK=block,
            num_warps=min(max(block // 512, 1), 16), **dependent_launch(rows.device, rows=rows.shape[0]),
        )  # fmt: skip
    return out, total, scale


def _rows(x: torch.Tensor) -> torch.Tensor:
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()
