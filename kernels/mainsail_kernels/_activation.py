"""The activations of gated MLPs in kernels, on float32."""

from mainsail_kernels._triton import tl, triton


@triton.jit
def silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def activate(gate, up, alpha, limit, CLAMPED: tl.constexpr):
    """silu(gate) * up; CLAMPED: as silu_mul.clamped_swiglu."""
    exponent = gate
    if CLAMPED:
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit) + 1.0
        exponent = gate * alpha
    return gate / (1.0 + tl.exp(-exponent)) * up
