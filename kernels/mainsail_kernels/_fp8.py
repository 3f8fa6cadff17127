"""Numbers of 8 bits in kernels: rounding to e4m3."""

from mainsail_kernels._triton import tl, triton


@triton.jit
def to_e4m3(x, ROUND: tl.constexpr):
    """float32 to e4m3, nearest even, out of range to the largest number.

    ROUND: round by hand to what e4m3 can hold first; the interpreter's own narrowing does not carry into the exponent.
    """
    x = tl.minimum(tl.maximum(x, -448.0), 448.0)
    if ROUND:
        bits = x.to(tl.int32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
        x = tl.where(tl.abs(x) < 0.015625, (x + 24576.0) - 24576.0, normal)
    return x.to(tl.float8e4nv)
