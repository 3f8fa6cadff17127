"""Rotary position embedding: the table of cosines and sines that the kernel rotates by (Su et al., 2021).

Low frequencies are stretched as Llama 3.1 does when the architecture says so (`rope_type: llama3`).
"""

from __future__ import annotations

import math

import torch

from mainsail_engine.model.architecture import Architecture, RopeScaling


def _stretched(frequencies: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    original = scaling.original_max_position_embeddings
    wavelength = 2 * math.pi / frequencies
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = ((original / wavelength - low) / (high - low)).clamp(0.0, 1.0)
    return frequencies * (smooth + (1 - smooth) / scaling.factor)


def cos_sin_table(architecture: Architecture, positions: int, device: torch.device) -> torch.Tensor:
    """[positions, head_dim] float32: cosines in the first half of a row, sines in the second."""
    dim = architecture.head_dim
    exponents = torch.arange(0, dim, 2, dtype=torch.float64) / dim
    frequencies = architecture.rope_theta**-exponents
    if architecture.rope_scaling.factor != 1.0:
        frequencies = _stretched(frequencies, architecture.rope_scaling)
    angles = torch.arange(positions, dtype=torch.float64)[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1).float().to(device)
