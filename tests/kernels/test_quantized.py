"""Quantized linears against float64 over the numbers that the codes stand for, with sizes that no tile divides."""

import pytest
import torch

from mainsail_kernels import grouped_few, reference
from mainsail_kernels import reference_quantized as quantized
from mainsail_kernels.fp8 import (
    QuantizedRows,
    fp8_block_linear,
    fp8_gated_linear,
    fp8_linear,
    quantize_groups,
    quantize_rows,
)
from mainsail_kernels.grouped import Codes, dequantize, grouped_gated_linear, grouped_linear
from mainsail_kernels.rms_norm import rms_norm, rms_norm_quantized
from mainsail_kernels.silu_mul import silu_mul, silu_mul_quantized
from mainsail_kernels.tuned import QuantizedConfig, override

TIGHT = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
WORST = 2.0**-4
"""Half a step of e4m3 (three bits of mantissa), of the number itself."""


@pytest.fixture(autouse=True)
def can_hold_fp8(request, device):
    torch.manual_seed(0)
    if device.type == "cuda" and "fp8" in request.node.name and torch.cuda.get_device_capability(device) < (8, 9):
        pytest.skip("this card has no FP8")


def near(out, truth, limit):
    assert out.shape == truth.shape
    assert not out.isnan().any()
    error = (out.double() - truth.double()).norm() / truth.double().norm()
    assert error < limit, f"relative error {error:.2e}"


@pytest.mark.parametrize(("rows", "num_in"), [(1, 64), (5, 200), (3, 1000)])
@pytest.mark.parametrize("quantize", [quantize_rows, quantize_groups])
def test_fp8_activations_keep_their_size_to_half_a_step(rows, num_in, quantize, device, dtype):
    x = (torch.randn(rows, num_in) * torch.logspace(-3, 3, rows)[:, None]).to(device, dtype)
    codes, scale = quantize(x)
    widths = scale.double().view(rows, -1).repeat_interleave(128 if scale.dim() == 2 else num_in, 1)[:, :num_in]
    seen = codes.double() * widths
    small = widths * 2.0**-10  # below the smallest normal number steps no longer shrink
    assert ((seen - x.double()).abs() <= x.double().abs() * WORST + small).all()
    assert codes.double().abs().max() == 448


def test_fp8_rows_that_are_broken_stay_so(device, dtype):
    x = torch.ones(4, 96).to(device, dtype)
    x[1, 5], x[2, 7], x[3] = float("nan"), float("inf"), 0.0
    codes, scale = quantize_rows(x)
    seen = codes.float() * scale[:, None]
    assert not seen[[0, 3]].isnan().any()
    assert seen[1].isnan().any()
    assert not seen[2].isfinite().all()


def fp8_weight(num_out, num_in, device):
    codes, scale = quantized.quantize_rows(torch.randn(num_out, num_in))
    return codes.to(device), scale.to(device)


@pytest.mark.parametrize("rows", [1, 2, 33])
@pytest.mark.parametrize(("split", "with_bias"), [(1, True), (3, False)])
@pytest.mark.parametrize(("num_out", "num_in"), [(33, 80), (5, 128)])
def test_fp8_linear(rows, split, num_out, num_in, with_bias, device, dtype):
    dtype = torch.bfloat16 if rows == 1 and with_bias else dtype  # a row of bfloat16 is read by four
    x = torch.randn(rows, num_in).to(device, dtype)
    weight, scale = fp8_weight(num_out, num_in, device)
    bias = torch.randn(num_out).to(device, dtype) if with_bias else None
    with override(QuantizedConfig(16, 64, 4, 2, split=split, block_rows=16)):
        out = fp8_linear(x, weight, scale, bias)
        assert torch.equal(fp8_linear(x, weight, scale, bias), out)
        alone = fp8_linear(x[1:2], weight, scale, bias) if rows > 1 else out
    added = 0.0 if bias is None else bias.double()
    exact = x.double() @ quantized.widen_rows(weight, scale, torch.float64).T + added
    near(out, exact, 5e-2)
    if rows > 1:
        near(
            out, quantized.fp8_linear(x.double(), weight, scale, None) + added, 1e-2 if dtype != torch.float32 else 1e-4
        )
        near(alone, exact[1:2], 5e-2)


@pytest.mark.parametrize("rows", [1, 3, 20])
@pytest.mark.parametrize(("num_out", "num_in"), [(33, 80), (130, 200)])
def test_fp8_block_linear(rows, num_out, num_in, device, dtype):
    x = torch.randn(rows, num_in).to(device, dtype)
    codes = torch.randn(num_out, num_in).to(torch.float8_e4m3fn).to(device)
    scale = (0.1 + torch.rand(-(-num_out // 128), -(-num_in // 128))).to(device)
    with override(QuantizedConfig(16, 128, 4, 2, split=2, block_rows=16)):
        out = fp8_block_linear(x, codes, scale)
    near(out, x.double() @ quantized.widen_blocks(codes, scale, torch.float64).T, 5e-2)
    if rows > 1:
        near(out, quantized.fp8_block_linear(x.double(), codes, scale), TIGHT[dtype])


@pytest.mark.parametrize("rows", [1, 5, 20])
@pytest.mark.parametrize("blocks", [False, True])
def test_fp8_gated_linear(rows, blocks, device, dtype):
    x = torch.randn(rows, 200).to(device, dtype)
    weight, scale = fp8_weight(256, 200, device)
    if blocks:
        scale = (0.1 + torch.rand(2, 2)).to(device)
    with override(QuantizedConfig(16, 64, 4, 2, block_rows=16)):
        out = fp8_gated_linear(x, weight, scale)
    linear = quantized.fp8_block_linear if blocks else quantized.fp8_linear
    if out is not None:  # on the CPU path there is none
        near(out, reference.silu_mul(linear(x.double(), weight, scale)), 8e-2 if rows == 1 else 1e-2)


KINDS = ["symmetric", "zeros", "offsets", "super", "super offsets"]


def codes_of(kind, bits, group, num_out, num_in, device, scale_dtype=torch.float16):
    """Random codes of that kind."""
    # float32 holds 24 bits: 11 of a float16, 6 of a scale in a super-block, and the code's, 5 in the widest such type
    integers = torch.randint(0, min(1 << bits, 32) if kind.startswith("super") else 1 << bits, (num_out, num_in))
    groups = num_in // group
    scale, offset, super_scale, super_offset = torch.rand(num_out, groups).to(scale_dtype), None, None, None
    if kind == "zeros":
        offset = torch.randint(0, 1 << bits, (num_out, groups)).to(torch.uint8)
    elif kind == "offsets":
        offset = torch.randn(num_out, groups).to(scale_dtype)
    elif kind.startswith("super"):
        scale = torch.randint(-100 if kind == "super" else 0, 64, (num_out, groups)).to(
            torch.int8 if kind == "super" else torch.uint8
        )
        super_scale = torch.rand(num_out, groups // 2).to(torch.float16)
        if kind == "super offsets":
            offset = torch.randint(0, 64, (num_out, groups)).to(torch.uint8)
            super_offset = torch.rand(num_out, groups // 2).to(torch.float16)
    parts = [None if p is None else p.to(device) for p in (offset, super_scale, super_offset)]
    words = quantized.pack(integers, bits, group).to(device)
    zero = 1 << (bits - 1) if kind in ("symmetric", "super") else 0
    return integers, Codes(words, bits, group, scale.to(device), *parts, zero=zero, zeros=kind == "zeros")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [4, 8])
def test_dequantized_bit_for_bit(kind, bits, device):
    integers, codes = codes_of(kind, bits, 32, 7, 256, device)
    scale = codes.scale.cpu().double()
    offset = torch.zeros_like(scale) if codes.offset is None else codes.offset.cpu().double()
    if codes.super_scale is not None:
        scale = scale * codes.super_scale.cpu().double().repeat_interleave(2, 1)
    if codes.super_offset is not None:
        offset = -offset * codes.super_offset.cpu().double().repeat_interleave(2, 1)
    if kind == "zeros":
        offset = -offset * scale
    truth = scale.repeat_interleave(32, 1) * (integers - codes.zero) + offset.repeat_interleave(32, 1)
    assert torch.equal(dequantize(codes, torch.float32).cpu(), truth.float())


@pytest.mark.parametrize(("rows", "halves"), [(1, False), (20, False), (20, True), (33, False)])
@pytest.mark.parametrize(
    ("kind", "bits", "group", "num_out", "num_in"),
    [
        *((kind, 4, 32, 33, 192) for kind in KINDS), ("zeros", 4, 128, 5, 512), ("symmetric", 4, 64, 33, 192),
        ("symmetric", 8, 32, 20, 96), ("super", 8, 16, 20, 96),
    ],
)  # fmt: skip
def test_grouped_linear(rows, halves, kind, bits, group, num_out, num_in, close, device, dtype):
    dtype = torch.bfloat16 if halves and bits == 4 else dtype  # the interpreter multiplies no bfloat16
    _, codes = codes_of(kind, bits, group, num_out, num_in, device)
    x = torch.randn(rows, num_in).to(device, dtype)
    bias = torch.randn(num_out).to(device, dtype) if rows % 2 else None
    with override(QuantizedConfig(16, 16, 4, 2, split=1 if kind == "zeros" else 3)):
        out = grouped_linear(x, codes, bias)
        assert torch.equal(grouped_linear(x, codes, bias), out)
    truth = x.double() @ dequantize(codes, torch.float32).double().T + (0.0 if bias is None else bias.double())
    close(out, truth)
    close(grouped_linear(x, codes, bias), truth)


@pytest.mark.parametrize("kind", ["symmetric", "zeros"])
@pytest.mark.parametrize(("rows", "num_in"), [(2, 128), (5, 2304), (8, 14336)])
def test_grouped_linears_of_few_rows_through_the_matrix_unit(kind, rows, num_in, device):
    _, codes = codes_of(kind, 4, 128, 192, num_in, device)
    x, bias = torch.randn(rows, num_in).to(device, torch.bfloat16), torch.randn(192).to(device, torch.bfloat16)
    if not grouped_few.applies(x, codes.words, codes.group):
        assert grouped_gated_linear(x, codes) is None
        pytest.skip("for Hopper")
    truth = x.double() @ dequantize(codes, torch.float32).double().T
    near(grouped_linear(x, codes), truth, 1e-2)
    near(grouped_linear(x, codes, bias), truth + bias.double(), 1e-2)
    gated = grouped_gated_linear(x, codes)
    assert gated is not None
    near(gated, reference.silu_mul(truth), 1e-2)


def test_what_does_not_fit_is_refused(device, dtype):
    x = torch.ones(2, 64, device=device, dtype=dtype)
    weight, scale = fp8_weight(8, 64, device)
    with pytest.raises(ValueError, match="fp8_linear: x"):
        fp8_linear(x[:, :32], weight, scale)
    with pytest.raises(ValueError, match="scale must be"):
        fp8_linear(x, weight, scale[:4])
    with pytest.raises(ValueError, match="scale must be contiguous \\[1, 1\\]"):
        fp8_block_linear(x, weight, scale[:, None])
    _, codes = codes_of("symmetric", 4, 32, 8, 128, device)
    with pytest.raises(ValueError, match="grouped_linear: x"):
        grouped_linear(x, codes)
    with pytest.raises(ValueError, match="grouped_gated_linear: x"):
        grouped_gated_linear(x, codes)


@pytest.mark.parametrize(("rows", "size"), [(1, 64), (3, 200), (17, 576)])
@pytest.mark.parametrize("with_residual", [False, True])
def test_norm_and_activation_leave_rows_as_fp8_linears_quantize_them(rows, size, with_residual, device, dtype):
    x, weight = torch.randn(rows, size).to(device, dtype), (1 + torch.rand(size)).to(device, dtype)
    residual = torch.randn(rows, size).to(device, dtype) if with_residual else None
    quantized_rows, total = rms_norm_quantized(x, weight, 1e-6, residual)
    plain = rms_norm(x, weight, 1e-6, residual)
    normed, added = plain if isinstance(plain, tuple) else (plain, x)
    assert torch.equal(total, added)
    near(quantized_rows.wide(), normed.double(), 5e-2)
    codes, scale = quantize_rows(normed)
    near(quantized_rows.scale, scale.double(), 1e-6 if dtype == torch.float32 else 1e-3)
    same = (quantized_rows.codes.float() == codes.float()).double().mean()
    assert same > 0.99, "codes of a norm differ from those of its stored result"
    gate_up = torch.randn(rows, 2 * size).to(device, dtype)
    near(silu_mul_quantized(gate_up).wide(), silu_mul(gate_up).double(), 5e-2)


def test_rows_that_come_quantized_give_the_same_product(device, dtype):
    weight, scale = fp8_weight(96, 64, device)
    x = torch.randn(5, 64).to(device, dtype)
    rows = QuantizedRows(*quantize_rows(x), x.dtype)
    near(fp8_linear(rows, weight, scale), fp8_linear(x, weight, scale).double(), TIGHT[dtype])
