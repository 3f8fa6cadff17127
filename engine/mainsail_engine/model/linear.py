"""The matrix product of a layer. On CUDA the kernels' own where that is faster, torch's else."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from mainsail_kernels.linear import gated_linear
from mainsail_kernels.linear import linear as skinny
from mainsail_kernels.silu_mul import silu_mul


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [n, inputs] times weight [outputs, inputs] transposed, plus bias [outputs]: [n, outputs]."""
    return skinny(x, weight, bias) if x.is_cuda else F.linear(x, weight, bias)


def silu_gated(x: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    """silu(x @ gate.T) * (x @ up.T) for gate_up [2 * d, inputs], the gate first: [n, d]."""
    mixed = gated_linear(x, gate_up) if x.is_cuda else None
    return silu_mul(linear(x, gate_up)) if mixed is None else mixed
