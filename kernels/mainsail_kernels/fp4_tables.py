"""MXFP4 in the order that FP8 tensor cores are fed from (experts_halves.py), the same numbers in as many bits.

Matrices are in words of eight codes. A step is 256 inputs, eight dots of 32. Word 4a + j of the 32 of a step has

    bits 0-15, 16-31   four codes' magnitudes, a nibble each: dots 2j and 2j + 1, places 4a to 4a + 3
    bits 7, 15, 23, 31 signs of the lower four         bits 3, 11, 19, 27 signs of the upper four

Place k of dot p is input 32p + k of the step. What is left of a row at its end, G groups of 32 (1, 2 or 4), are 4G
words in the same order: place k < 4G of dot p is input 4Gp + k; places beyond are zeros in x.

A group's scale is a power of two, at most 2 ** 11 under its row's largest, kept as the byte that it adds to an e4m3's
bits: 8p means 2 ** (p - 5) times the row's factor. So eight e4m3 are a group's table, which magnitudes choose from.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mainsail_kernels.reference_quantized import FP4_GROUP

STEP = 256
"""Inputs of a step: eight dots of a group's width."""
SPREAD = 11
"""How many powers of two a row's scales may be apart: what e4m3 has beyond e2m1."""


@dataclass(frozen=True, slots=True)
class Fp4Tables:
    """The matrices of experts, as the docstring above draws them."""

    words: torch.Tensor
    """[experts, outputs, inputs / 8] int32."""
    scales: torch.Tensor
    """[experts, steps, outputs, 2] int32: eight bytes for the eight dots of each step."""
    factor: torch.Tensor
    """[experts, outputs] float32."""


def fp4_tables(codes: torch.Tensor, scale: torch.Tensor) -> Fp4Tables | None:
    """Of codes [experts, outputs, inputs] and scales [experts, outputs, inputs / 32], both uint8 as MXFP4 has them.

    None where no table can be exact: scales of a row further apart than e4m3 allows, or ends of rows that are no whole
    words of eight dots. On "meta" there are no scales, and none are too far apart.
    """
    num_in = codes.shape[2]
    groups, rest = num_in // FP4_GROUP, num_in % STEP
    if num_in % FP4_GROUP or rest // FP4_GROUP not in (0, 1, 2, 4):
        return None
    rest //= FP4_GROUP
    if codes.is_meta:
        n, outputs = codes.shape[:2]
        steps = codes.new_empty((n, -(-num_in // STEP), outputs, 2), dtype=torch.int32)
        words = codes.new_empty((n, outputs, num_in // 8), dtype=torch.int32)
        return Fp4Tables(words, steps, codes.new_empty((n, outputs), dtype=torch.float32))
    used = (codes & 7).bool().unflatten(2, (groups, FP4_GROUP)).any(dim=3)
    exponents = scale.int()
    largest = torch.where(used, exponents, 0).amax(dim=2, keepdim=True)
    power = exponents - (largest - SPREAD)
    if (used & (power < 0)).any():
        return None
    bytes_ = (power.clamp(0, SPREAD) * 8).to(torch.uint8)
    factor = torch.exp2((largest[:, :, 0] - (SPREAD + 127 - 5)).double()).float()
    return Fp4Tables(_words(codes), _step_scales(bytes_, rest), factor)


def _words(codes: torch.Tensor) -> torch.Tensor:
    """[experts, outputs, inputs / 8] int32."""
    whole = codes.shape[2] // STEP * STEP
    parts: list[torch.Tensor] = []
    for part, dot in ((codes[:, :, :whole], 32), (codes[:, :, whole:], (codes.shape[2] - whole) // 8)):
        if not part.shape[2]:
            continue
        steps = part.unflatten(2, (-1, 4, 2, dot // 4, 4))  # step, j, which of two dots, a, place
        words = torch.zeros((*steps.shape[:4], dot // 4), dtype=torch.int32, device=codes.device)
        for upper in (0, 1):
            for place in range(4):
                code = steps[:, :, :, :, upper, :, place].int()
                words |= ((code & 7) << (4 * place + 16 * upper)) | ((code >> 3) << (8 * place + (3 if upper else 7)))
        parts.append(words.transpose(3, 4).flatten(2))  # a, then j
    return torch.cat(parts, dim=2).contiguous()


def _step_scales(powers: torch.Tensor, left: int) -> torch.Tensor:
    """[experts, steps, outputs, 2] int32 of a byte for each group; left: groups in the last, shorter step."""
    if left:
        whole = powers.shape[2] - left
        last = powers[:, :, whole:].repeat_interleave(8 // left, dim=2)
        powers = torch.cat((powers[:, :, :whole], last), dim=2)
    steps = powers.unflatten(2, (-1, 8)).transpose(1, 2).contiguous()
    return steps.view(torch.int32)
