"""Rotary position embedding: the table of cosines and sines that the kernel rotates by (Su et al., 2021).

Stretched for longer contexts as the architecture says: `linear` (Chen et al., 2023), `dynamic` NTK (bloc97, 2023),
`llama3` (low frequencies only), `yarn` (Peng et al., 2023), `longrope` (Ding et al., 2024). The last three depend on
the model alone; `dynamic` and `longrope` also on how long sequences may get, which is fixed when the engine starts: all
positions of a sequence are then rotated alike, whatever its length is now.
"""

from __future__ import annotations

import math

import torch

from mainsail_engine.model.architecture import Rope


def cos_sin_table(rope: Rope, rotary_dim: int, positions: int, device: torch.device) -> torch.Tensor:
    """[positions, rotary_dim] float32: cosines in the first half of a row, sines in the second."""
    angles = torch.arange(positions, dtype=torch.float64)[:, None] * frequencies(rope, rotary_dim, positions)
    table = torch.cat([angles.cos(), angles.sin()], dim=1) * rope.attention_factor
    return table.float().to(device)


def frequencies(rope: Rope, dim: int, positions: int) -> torch.Tensor:
    """Radians a position, [dim / 2] float64, fastest first, for sequences of up to `positions` tokens."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float64) / dim
    plain = rope.theta**-exponents
    if rope.kind == "linear":
        return plain / rope.factor
    if rope.kind == "llama3":
        return _llama3(plain, rope)
    if rope.kind == "yarn":
        return _yarn(plain, rope, dim)
    if rope.kind == "dynamic":
        original = rope.original_max_position_embeddings
        stretch = rope.factor * max(positions, original) / original - (rope.factor - 1)
        return (rope.theta * stretch ** (dim / (dim - 2))) ** -exponents
    if rope.kind == "longrope":
        long = positions > rope.original_max_position_embeddings
        return plain / torch.tensor(rope.long_factor if long else rope.short_factor, dtype=torch.float64)
    return plain


def _llama3(plain: torch.Tensor, rope: Rope) -> torch.Tensor:
    original = rope.original_max_position_embeddings
    wavelength = 2 * math.pi / plain
    low, high = rope.low_freq_factor, rope.high_freq_factor
    smooth = ((original / wavelength - low) / (high - low)).clamp(0.0, 1.0)
    return plain * (smooth + (1 - smooth) / rope.factor)


def _yarn(plain: torch.Tensor, rope: Rope, dim: int) -> torch.Tensor:
    """Channels that turn more than beta_fast times over the original context stay; fewer than beta_slow: stretched."""

    def channel(turns: float) -> float:
        return (
            dim * math.log(rope.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))
        )

    low, high = channel(rope.beta_fast), channel(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = ((torch.arange(dim // 2, dtype=torch.float64) - low) / max(high - low, 0.001)).clamp(0, 1)
    return plain * (1 - ramp) + plain / rope.factor * ramp


def no_rotation(positions: int, device: torch.device) -> torch.Tensor:
    """[positions, 2]: a table that turns two channels by nothing, for layers that are not rotated."""
    return torch.tensor([1.0, 0.0], device=device).expand(positions, 2).contiguous()
