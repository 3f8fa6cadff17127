"""RMS norm, activations, rotary with the KV write, block copies and the token bitmask against their references."""

import math
from typing import Any

import pytest
import torch

from mainsail_kernels import blocks, reference
from mainsail_kernels.blocks import apply_token_bitmask, copy_blocks, gather_blocks, scatter_blocks
from mainsail_kernels.kv_write import rope_and_write_kv
from mainsail_kernels.rms_norm import rms_norm
from mainsail_kernels.silu_mul import clamped_swiglu, gelu_tanh_mul, silu_mul


@pytest.mark.parametrize("shape", [(1, 64), (5, 100), (3, 2, 48), (2, 576)])
def test_rms_norm(shape, close, device, dtype):
    x, residual = torch.randn(2, *shape).to(device, dtype)
    weight = torch.randn(shape[-1]).to(device, dtype)
    close(rms_norm(x, weight, 1e-5), reference.rms_norm(x.double(), weight.double(), 1e-5))
    out, total = rms_norm(x, weight, 1e-5, residual)
    wide_out, wide_total = reference.rms_norm(x.double(), weight.double(), 1e-5, residual.double())
    close(out, wide_out)
    close(total, wide_total)


def test_rms_norm_of_a_slice_of_wider_rows(close, device, dtype):
    x = torch.randn(4, 300).to(device, dtype)[:, 100:164]
    weight = torch.ones(64, device=device, dtype=dtype)
    close(rms_norm(x, weight, 1e-6), reference.rms_norm(x.double(), weight.double(), 1e-6))


@pytest.mark.parametrize("shape", [(1, 8), (3, 96), (2, 5000)])
def test_gated_activations(shape, close, device, dtype):
    x = (3 * torch.randn(shape)).to(device, dtype)
    x[0, 0], x[0, 1] = -200.0, 200.0
    close(silu_mul(x), reference.silu_mul(x.double()))
    close(gelu_tanh_mul(x), reference.gelu_tanh_mul(x.double()))
    far = x * 6
    close(clamped_swiglu(far, 1.702, 7.0), reference.clamped_swiglu(far.double(), 1.702, 7.0))


@pytest.mark.parametrize(("heads", "kv_heads", "dim", "rotary"), [(4, 2, 32, 32), (9, 3, 64, 64), (2, 1, 96, 72)])
@pytest.mark.parametrize("norms", ["", "q", "qk"])
def test_rope_and_write(heads, kv_heads, dim, rotary, norms, close, device, dtype):
    tokens, slots = 7, torch.tensor([3, 16, -1, 47, 0, -1, 31])
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * dim).to(device, dtype)
    angles = torch.rand(50, rotary // 2) * 6
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1).to(device)
    positions = torch.randint(50, (tokens,)).to(device)
    weights: dict[str, Any] = {f"{side}_norm": torch.rand(dim).to(device, dtype) for side in norms}
    kv = torch.full((3, 2, kv_heads, 16, dim), float("nan")).to(device, dtype)
    wide_kv, counts = kv.double(), {"num_heads": heads, "num_kv_heads": kv_heads}
    query = rope_and_write_kv(qkv, positions, cos_sin, kv, slots.to(device), **counts, **weights, eps=1e-6)
    wide: dict[str, Any] = {name: weight.double() for name, weight in weights.items()}
    args = (qkv.double(), positions, cos_sin.double(), wide_kv, slots.to(device))
    close(query, reference.rope_and_write_kv(*args, **counts, **wide, eps=1e-6))
    assert torch.equal(kv.isnan(), wide_kv.isnan()), "written where it must not be, or not where it must"
    close(kv.nan_to_num(), wide_kv.nan_to_num())


@pytest.mark.parametrize(("dim", "rotary"), [(32, 32), (96, 72)])
def test_rope_and_write_fp8(dim, rotary, close, device, dtype):
    """Keys and values over their scales, to the nearest number of e4m3; what is too large becomes the largest."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        pytest.skip("this card has no FP8")
    tokens, heads, kv_heads = 7, 4, 2
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * dim).to(device, dtype)
    qkv[0, -1] = 1e4
    angles = torch.rand(50, rotary // 2) * 6
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1).to(device)
    positions = torch.randint(50, (tokens,)).to(device)
    slots = torch.tensor([3, 16, -1, 47, 0, -1, 31]).to(device)
    kv = torch.full((3, 2, kv_heads, 16, dim), float("nan")).to(device, torch.float8_e4m3fn)
    truth = kv.clone()
    counts: dict[str, Any] = {"num_heads": heads, "num_kv_heads": kv_heads, "k_scale": 0.5, "v_scale": 0.02}
    query = rope_and_write_kv(qkv, positions, cos_sin, kv, slots, **counts)
    wide = reference.rope_and_write_kv(qkv.double(), positions, cos_sin.double(), truth, slots, **counts)
    close(query, wide)
    assert torch.equal(kv.float().isnan(), truth.float().isnan())
    off = (kv.float() - truth.float()).nan_to_num().abs()
    # Next to the middle of two numbers float32 and float64 may go to different ones.
    assert (off <= truth.float().nan_to_num().abs() / 7).all()
    assert (off > 0).float().mean() < 0.01
    assert kv.float()[0, 1, -1, 3, -1] == 448


def test_rotation_keeps_lengths_and_depends_on_distance_alone(device):
    angles = torch.arange(20.0)[:, None] / 10.0 ** torch.arange(8)
    first, second = torch.randn(2, 16)
    turned = [reference.rotate(torch.stack((first, second)), angles[p].cos(), angles[p].sin()) for p in (2, 5, 12, 15)]
    torch.testing.assert_close(turned[0][0] @ turned[1][1], turned[2][0] @ turned[3][1])
    torch.testing.assert_close(turned[0].norm(dim=-1), torch.stack((first, second)).norm(dim=-1))


def test_copy_blocks_copies_the_head_of_a_block_in_every_layer(device, dtype):
    cache = torch.randn(3, 6, 2, 2, 16, 24).to(device, dtype)
    before = cache.clone()
    src, dst, num = (torch.tensor(v, device=device) for v in ([0, 5], [3, 1], [16, 5]))
    copy_blocks(cache, src, dst, num)
    before[:, 3] = before[:, 0]
    before[:, 1, :, :, :5] = before[:, 5, :, :, :5]
    assert torch.equal(cache, before)


@pytest.mark.parametrize("kind", [None, torch.float8_e4m3fn])
def test_blocks_go_to_staging_and_back(kind, device, dtype):
    dtype = kind or dtype
    cache = torch.randn(3, 6, 2, 2, 16, 24).to(device, dtype)
    staging = torch.empty(2, 3, 2, 2, 16, 24, device=device, dtype=dtype)
    gather_blocks(cache, torch.tensor([4, 1], device=device), staging)
    assert torch.equal(staging[0].float(), cache[:, 4].float())
    assert torch.equal(staging[1].float(), cache[:, 1].float())
    scatter_blocks(cache, torch.tensor([0, 2], device=device), staging)
    assert torch.equal(cache[:, 0].float(), cache[:, 4].float())
    assert torch.equal(cache[:, 2].float(), cache[:, 1].float())


def _packed(allowed: torch.Tensor) -> torch.Tensor:
    """[m, words * 32] bool as [m, words] int32, the lowest bit for the lowest token."""
    bits = allowed.view(allowed.shape[0], -1, 32).long() * 2 ** torch.arange(32, dtype=torch.int64)
    words = bits.sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


@pytest.mark.parametrize("vocab", [32, 50, 5000])
def test_bitmask_reaches_its_rows_only(vocab, device, dtype):
    allowed = torch.rand(3, -(-vocab // 32) * 32) < 0.5
    allowed[2] = True
    rows = torch.tensor([4, 0, 2])
    logits = torch.randn(5, vocab).to(device, dtype)
    logits[1] = math.nan
    expected = logits.clone()
    expected[rows.to(device)] = expected[rows.to(device)].masked_fill(~allowed[:, :vocab].to(device), -math.inf)
    apply_token_bitmask(logits, _packed(allowed).to(device), rows.to(device))
    assert torch.equal(logits.nan_to_num(nan=7.0), expected.nan_to_num(nan=7.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [31, 50, 4100])
def test_masks_by_the_table_are_the_references(vocab, dtype):
    bits = torch.randint(-(2**31), 2**31 - 1, (3, -(-vocab // 32)), dtype=torch.int32)
    logits, rows = torch.randn(5, vocab).to(dtype), torch.tensor([4, 0, 2])
    logits[2, 3] = math.inf
    expected = logits.clone()
    blocks._mask_on_cpu(logits, bits, rows)
    reference.apply_token_bitmask(expected, bits, rows)
    assert torch.equal(logits, expected)


def test_bitmask_refuses_other_shapes(device, dtype):
    logits, rows = torch.randn(2, 64).to(device, dtype), torch.tensor([0], device=device)
    with pytest.raises(ValueError, match="bitmask must be"):
        apply_token_bitmask(logits, torch.zeros((1, 3), dtype=torch.int32, device=device), rows)
    with pytest.raises(ValueError, match="rows must be"):
        apply_token_bitmask(logits, torch.zeros((2, 2), dtype=torch.int32, device=device), rows)
