"""The gated activations of an MLP: silu(gate) * up (Llama, Qwen, Mistral), gelu(gate) * up (Gemma), and a clamped one.

    clamped (gpt-oss)   g * sigmoid(alpha * g) * (u + 1),  g the gate up to a limit, u between that and its negative

gate_up is [n, 2*d], the gate first, as one merged linear gives it. Read once, written once; float32 inside.
`silu_mul_quantized` leaves rows as an FP8 linear takes them, so that they are not read again to be quantized.
"""

import torch

from mainsail_kernels import reference
from mainsail_kernels._activation import silu
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

_BLOCK = 2048


@triton.jit
def _gated_kernel(
    gate_up_ptr,
    out_ptr,
    size,
    stride,
    alpha,
    limit,
    GELU: tl.constexpr,
    CLAMPED: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    wait_for_inputs(DEPENDENT)
    gate = tl.load(gate_up_ptr + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * stride + size + column, mask=inside, other=0.0).to(tl.float32)
    # gelu: 0.5 * x * (1 + tanh(y)) is x * sigmoid(2y)
    exponent = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate) if GELU else gate
    if CLAMPED:
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit) + 1.0
        exponent = gate * alpha
    out = gate / (1.0 + tl.exp(-exponent)) * up
    tl.store(out_ptr + row * size + column, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _silu_quantized_kernel(
    gate_up_ptr, codes_ptr, scale_ptr, size, stride, ROUND: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)[None, :]
    inside = column < size
    wait_for_inputs(DEPENDENT)
    gate = tl.load(gate_up_ptr + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * stride + size + column, mask=inside, other=0.0).to(tl.float32)
    out = (silu(gate) * up).to(gate_up_ptr.dtype.element_ty).to(tl.float32)
    step = row_scale(out, 1)
    tl.store(codes_ptr + row * size + column, to_e4m3(out / step[:, None], ROUND), mask=inside)
    tl.store(scale_ptr + row + tl.arange(0, 1), step)


def silu_mul_quantized(gate_up: torch.Tensor) -> QuantizedRows:
    """silu_mul of gate_up [n, 2*d], its rows quantized to e4m3: [n, d]. ValueError as silu_mul."""
    even = gate_up.dim() == 2 and gate_up.shape[1] % 2 == 0 and gate_up.stride(1) == 1
    require(even, f"gated activation: gate_up must be [n, 2*d] of contiguous rows, got {tuple(gate_up.shape)}")
    if not runs_kernels(gate_up):
        return QuantizedRows(*quantize_rows(reference.silu_mul(gate_up)), gate_up.dtype)
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    codes = torch.empty((rows, size), dtype=FP8, device=gate_up.device)
    scale = torch.empty(rows, device=gate_up.device)
    if rows:
        block = next_power_of_2(size)
        _silu_quantized_kernel[(rows,)](
            gate_up, codes, scale, size, gate_up.stride(0), ROUND=INTERPRETED, BLOCK=block,
            num_warps=min(max(block // 512, 1), 32), **dependent_launch(codes.device, rows=rows),
        )  # fmt: skip
    return QuantizedRows(codes, scale, gate_up.dtype)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate_up[:, :d]) * gate_up[:, d:] for gate_up [n, 2*d]; returns [n, d]. ValueError on another shape."""
    return _gated(gate_up, gelu=False)


def gelu_tanh_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """gelu(gate_up[:, :d]) * gate_up[:, d:] with the tanh approximation; returns [n, d]. ValueError as silu_mul."""
    return _gated(gate_up, gelu=True)


def clamped_swiglu(gate_up: torch.Tensor, alpha: float, limit: float) -> torch.Tensor:
    """The clamped one, for gate_up [n, 2*d] and a positive limit; returns [n, d]. ValueError as silu_mul."""
    return _gated(gate_up, alpha=alpha, limit=limit)


def _gated(gate_up: torch.Tensor, *, gelu: bool = False, alpha: float = 1.0, limit: float = 0.0) -> torch.Tensor:
    even = gate_up.dim() == 2 and gate_up.shape[1] % 2 == 0
    require(even, f"gated activation: gate_up must be [n, 2*d], got {tuple(gate_up.shape)}")
    if not runs_kernels(gate_up):
        if limit:
            return reference.clamped_swiglu(gate_up, alpha, limit)
        return reference.gelu_tanh_mul(gate_up) if gelu else reference.silu_mul(gate_up)
    if gate_up.stride(1) != 1:
        gate_up = gate_up.contiguous()
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((rows, size), dtype=gate_up.dtype, device=gate_up.device)
    for first in range(0, rows, 65535):  # the second grid dimension ends there
        part = gate_up[first : first + 65535]
        grid = (-(-size // _BLOCK), part.shape[0])
        options = {
            "GELU": gelu, "CLAMPED": limit > 0, "BLOCK": _BLOCK, "num_warps": 8,
            **dependent_launch(out.device, rows=rows),
        }  # fmt: skip
        _gated_kernel[grid](part, out[first:], size, part.stride(0), alpha, limit, **options)
    return out
