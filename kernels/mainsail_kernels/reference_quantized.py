"""Quantized linears in plain PyTorch: what the kernels of `fp8.py` and `grouped.py` mean, and the engine's CPU path.

As in `reference.py`: float64 in, float64 arithmetic (but for what the definition rounds), everything else in float32
and rounded once at the end. Shapes are checked by the public functions beside the kernels.
"""

import torch
import torch.nn.functional as F

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
"""The largest number of e4m3 (Micikevicius et al., "FP8 formats for deep learning", 2022)."""
BLOCK = 128
"""Width of a group of activations, and both sides of a block of weights, in block-quantized FP8."""
_LEAST = 1e-12


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def to_fp8(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x over scale as e4m3, out of range to the largest number."""
    return (_wide(x) / scale).clamp(-FP8_MAX, FP8_MAX).float().to(FP8)


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(e4m3 codes [n, in], float32 scales [n]) of x [n, in]: each row's largest number becomes 448."""
    scale = (_wide(x).abs().amax(dim=1).clamp(min=_LEAST) / FP8_MAX).float()
    return to_fp8(x, scale[:, None]), scale


def quantize_groups(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(e4m3 codes [n, in], float32 scales [n, ceil(in / 128)]): as quantize_rows, for every 128 inputs."""
    n, num_in = x.shape
    groups = -(-num_in // BLOCK)
    padded = F.pad(_wide(x), (0, groups * BLOCK - num_in)).view(n * groups, BLOCK)
    codes, scale = quantize_rows(padded)
    return codes.view(n, groups * BLOCK)[:, :num_in], scale.view(n, groups)


def widen_rows(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The numbers that codes [n, in] and scales [n] stand for."""
    return codes.to(dtype) * scale[:, None].to(dtype)


def widen_blocks(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, rows: int = BLOCK) -> torch.Tensor:
    """The numbers that codes [n, in] and scales [ceil(n / rows), ceil(in / 128)] stand for."""
    n, num_in = codes.shape
    wide = scale.to(dtype).repeat_interleave(rows, 0)[:n].repeat_interleave(BLOCK, 1)[:, :num_in]
    return codes.to(dtype) * wide


FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""What the codes of e2m1 mean."""
FP4_GROUP = 32
"""Inputs that share a scale, a power of two (e8m0): MXFP4 (Open Compute Project, "OCP Microscaling Formats", 2023)."""


FP4_EXCESS = 62
"""What is added to a scale's exponent in memory (_experts.py says why)."""
_FP4_BITS = ((6, 7, 8, 15), (3, 4, 5, 12), (0, 1, 2, 9), (10, 11, 13, 14))
"""Where half a word has the four bits of each of its codes, the lowest first."""


def pack_fp4(codes: torch.Tensor) -> torch.Tensor:
    """[..., in / 8] int32 of codes [..., in] uint8: the words that _experts.py draws."""
    places = codes.unflatten(-1, (-1, 8, FP4_GROUP // 8))  # [..., groups, places, words]
    words = torch.zeros(*places.shape[:-2], FP4_GROUP // 8, dtype=torch.int32, device=codes.device)
    for place in range(8):
        code = places[..., place, :].int()
        for bit, at in enumerate(_FP4_BITS[place % 4]):
            words |= (code >> bit & 1) << (at + place // 4 * 16)
    return words.flatten(-2)


def pack_fp4_scales(scale: torch.Tensor) -> torch.Tensor:
    """[experts, in / 32, outputs] bfloat16 of scale [experts, outputs, in / 32] uint8: 2 ** (scale - 65) each.

    At most 2 ** 127: a scale above 192 means 2 ** 65, as 192 does.
    """
    bits = (scale.int() + FP4_EXCESS).clamp(max=254) << 7
    return bits.to(torch.int16).transpose(-1, -2).contiguous().view(torch.bfloat16)


def unpack_fp4(words: torch.Tensor) -> torch.Tensor:
    """The codes [..., in] uint8 of words [..., in / 8]: the inverse of pack_fp4."""
    grouped = words.unflatten(-1, (-1, 1, FP4_GROUP // 8))
    codes: list[torch.Tensor] = []
    for place in range(8):
        bits = [(grouped >> (at + place // 4 * 16) & 1) << bit for bit, at in enumerate(_FP4_BITS[place % 4])]
        codes.append((bits[0] | bits[1] | bits[2] | bits[3]).to(torch.uint8))
    return torch.cat(codes, dim=-2).flatten(-3)


def widen_fp4(words: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The numbers that words [..., outputs, in / 8] and scales [..., in / 32, outputs] stand for."""
    values = torch.tensor(FP4_VALUES, dtype=dtype, device=words.device)[unpack_fp4(words).int()].unflatten(-1, (-1, 32))
    exponent = (scale.view(torch.int16).int() >> 7).transpose(-1, -2) - (127 + FP4_EXCESS)
    return torch.ldexp(values, exponent[..., None]).flatten(-2)


def fp8_linear(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x [n, in] quantized by rows, times weight [out, in] e4m3 with scales [out]; see fp8.fp8_linear."""
    dtype = _wide(x).dtype
    seen = widen_rows(*quantize_rows(x), dtype)
    out = F.linear(seen, weight.to(dtype)) * scale.to(dtype)
    return (out if bias is None else out + bias.to(dtype)).to(x.dtype)


def fp8_block_linear(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x [n, in] quantized by groups of 128, times weight [out, in] e4m3 with a scale for each 128 x 128 block."""
    dtype = _wide(x).dtype
    seen = widen_blocks(*quantize_groups(x), dtype, rows=1)
    out = F.linear(seen, widen_blocks(weight, scale, dtype))
    return (out if bias is None else out + bias.to(dtype)).to(x.dtype)


def unpack(words: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """Unsigned codes [out, in] int32 of words [out, in * bits / 32] int32; `grouped.py` draws the layout."""
    per_word = 32 // bits
    shifts = torch.arange(per_word, dtype=torch.int32, device=words.device) * bits
    codes = (words.view(words.shape[0], -1, 1, group // per_word) >> shifts[:, None]) & ((1 << bits) - 1)
    return codes.reshape(words.shape[0], -1)


def pack(codes: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """The words of unsigned integer codes [out, in]: the inverse of unpack."""
    per_word = 32 // bits
    shifts = torch.arange(per_word, dtype=torch.int64, device=codes.device) * bits
    parts = codes.long().view(codes.shape[0], -1, per_word, group // per_word) << shifts[:, None]
    words = parts.sum(2).view(codes.shape[0], -1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def group_values(values: torch.Tensor, supers: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """[out, groups]: values, times the number of their super-block in supers [out, supers] where there are any."""
    wide = values.to(dtype)
    if supers is None:
        return wide
    return wide * supers.to(dtype).repeat_interleave(values.shape[1] // supers.shape[1], dim=1)


def dequantize_groups(
    codes: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor | None, zero: int, dtype: torch.dtype
) -> torch.Tensor:
    """scale * (code - zero) + offset for codes [out, in], scale and offset [out, groups]."""
    out, num_in = codes.shape
    grouped = (codes.view(out, scale.shape[1], -1) - zero).to(dtype) * scale[:, :, None]
    return (grouped if offset is None else grouped + offset[:, :, None]).view(out, num_in)
