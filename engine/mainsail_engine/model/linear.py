"""The matrix product of a layer. On CUDA the kernels' own where that is faster, torch's else."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from mainsail_kernels.linear import linear as skinny


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [n, inputs] times weight [outputs, inputs] transposed, plus bias [outputs]: [n, outputs]."""
    return skinny(x, weight, bias) if x.is_cuda else F.linear(x, weight, bias)
