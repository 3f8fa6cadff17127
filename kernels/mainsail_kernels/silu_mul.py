"""The gated activations of an MLP: silu(gate) * up (Llama, Qwen, Mistral), gelu(gate) * up (Gemma), and a clamped one.

    clamped (gpt-oss)   g * sigmoid(alpha * g) * (u + 1),  g the gate up to a limit, u between that and its negative

gate_up is [n, 2*d], the gate first, as one merged linear gives it. Read once, written once; float32 inside.
"""

import torch

from mainsail_kernels import reference
from mainsail_kernels._triton import dependent_launch, require, runs_kernels, tl, triton, wait_for_inputs

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
        options = {"GELU": gelu, "CLAMPED": limit > 0, "BLOCK": _BLOCK, "num_warps": 8, **dependent_launch(out.device)}
        _gated_kernel[grid](part, out[first:], size, part.stride(0), alpha, limit, **options)
    return out
