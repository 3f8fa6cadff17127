"""The matrix products of a layer. On CUDA the kernels' own where that is faster, torch's else; on the CPU oneDNN's.

On the CPU a matrix is kept in the layout that oneDNN's kernels read (`packed`): the plain product would rearrange it
at every call, or take the vendor's library, which on other vendors' processors does not use the widest instructions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from mainsail_engine.model.architecture import Activation
from mainsail_kernels.linear import gated_linear
from mainsail_kernels.linear import linear as skinny
from mainsail_kernels.silu_mul import silu_mul

PACKED_FOR = 32
"""Rows that the layout is chosen for. A decode step's; prompts of 512 and single rows run as fast with it."""
_DTYPES = (torch.float32, torch.bfloat16)


def packed(weight: torch.Tensor) -> torch.Tensor:
    """weight [outputs, inputs] as `linear` takes it: on the CPU an opaque tensor of the same shape, else itself."""
    if weight.device.type != "cpu" or weight.dtype not in _DTYPES or not torch.backends.mkldnn.is_available():
        return weight
    return torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_FOR)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [n, inputs] times weight [outputs, inputs] transposed, plus bias [outputs]: [n, outputs]."""
    if weight.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return skinny(x, weight, bias) if x.is_cuda else F.linear(x, weight, bias)


def gated_packed(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> torch.Tensor:
    """activation(x @ gate.T) * (x @ up.T) for two packed matrices [d, inputs]: [n, d]. Each product's sums are
    activated, or multiplied, before they are rounded."""
    name, algorithm = ("swish", "") if activation == "silu" else ("gelu", "tanh")
    gated = torch.ops.mkldnn._linear_pointwise(x, gate, None, name, [], algorithm)
    return torch.ops.mkldnn._linear_pointwise.binary(x, gated, up, None, "mul")


def silu_gated(x: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    """silu(x @ gate.T) * (x @ up.T) for gate_up [2 * d, inputs], the gate first: [n, d]."""
    mixed = gated_linear(x, gate_up) if x.is_cuda else None
    return silu_mul(linear(x, gate_up)) if mixed is None else mixed
