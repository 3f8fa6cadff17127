"""The matrices of a model, plain or quantized, and the product with one.

torch.Tensor   [outputs, inputs], or [experts, outputs, inputs]
Panels         on the CPU, as compiled code reads it (cpu/decoder.c of the kernels)
Fp8Weight      e4m3 with scales (fp8.py of the kernels)
Codes          integers in groups (grouped.py of the kernels)
Fp4Experts     the matrices of experts in MXFP4 (moe.py of the kernels)
RowsOf         several of these, one below the other: parts of a fused matrix that are not quantized alike
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from mainsail_engine.model.architecture import Activation
from mainsail_kernels._triton import on_card
from mainsail_kernels.cpu import decoder
from mainsail_kernels.cpu.decoder import Panels
from mainsail_kernels.fp8 import (
    QuantizedRows,
    fp8_block_linear,
    fp8_gated_linear,
    fp8_linear,
    takes_quantized_rows,
)
from mainsail_kernels.grouped import Codes, grouped_gated_linear, grouped_linear
from mainsail_kernels.linear import gated_linear
from mainsail_kernels.linear import linear as skinny
from mainsail_kernels.silu_mul import gelu_tanh_mul, silu_mul, silu_mul_quantized

PACKED_FOR = 32
"""Rows that the layout is chosen for. A decode step's; prompts of 512 and single rows run as fast with it."""
_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(slots=True)
class Fp8Weight:
    codes: torch.Tensor
    """[outputs, inputs] e4m3; of experts [experts, outputs, inputs]."""
    scale: torch.Tensor
    """float32: [outputs], or [ceil(outputs / 128), ceil(inputs / 128)]; of experts with one more dimension."""

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape


@dataclass(slots=True)
class Fp4Experts:
    codes: torch.Tensor
    """[experts, outputs, inputs / 8] int32, as reference_quantized.pack_fp4 packs them, or fp4_tables.py."""
    scale: torch.Tensor
    """[experts, inputs / 32, outputs] bfloat16, as reference_quantized.pack_fp4_scales packs them; or of tables."""
    factor: torch.Tensor | None = None
    """[experts, outputs] float32, of tables."""


@dataclass(slots=True)
class RowsOf:
    parts: list[Weight]

    @property
    def shape(self) -> tuple[int, int]:
        return sum(part.shape[0] for part in self.parts), self.parts[0].shape[1]


Plain = torch.Tensor | Panels
Weight = Plain | Fp8Weight | Codes | RowsOf
Rows = torch.Tensor | QuantizedRows
"""Activations [n, inputs]; quantized where whoever made them knew that an FP8 matrix, which would do that, takes them
(`quantizes`)."""


def packed(weight: Weight) -> Weight:
    """weight [outputs, inputs] as `linear` takes it: see packed_plain, a quantized one itself."""
    return packed_plain(weight) if isinstance(weight, torch.Tensor) else weight


def packed_plain(weight: torch.Tensor) -> Plain:
    """On the CPU for the compiled kernels where they are there, else as oneDNN reads it: opaque, of the same shape."""
    if weight.device.type != "cpu" or weight.dtype not in _DTYPES:
        return weight
    if (panels := decoder.pack(weight)) is not None:
        return panels
    if not torch.backends.mkldnn.is_available():
        return weight
    return torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_FOR)


def quantizes(weight: Weight, num_rows: int) -> bool:
    """Whether `linear` quantizes so many rows before it multiplies them with this matrix."""
    return isinstance(weight, Fp8Weight) and takes_quantized_rows(num_rows, weight.scale)


def linear(x: Rows, weight: Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [n, inputs] times weight [outputs, inputs] transposed, plus bias [outputs]: [n, outputs]."""
    if isinstance(x, QuantizedRows):
        if not isinstance(weight, Fp8Weight):
            raise TypeError("rows in FP8 are for matrices in FP8")
        return fp8_linear(x, weight.codes, weight.scale, bias)
    if isinstance(weight, torch.Tensor):
        if weight.is_mkldnn:
            return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return skinny(x, weight, bias) if on_card(x) else F.linear(x, weight, bias)
    if isinstance(weight, Panels):
        return decoder.linear(x, weight, bias)
    if isinstance(weight, Fp8Weight):
        product = fp8_block_linear if weight.scale.dim() == 2 else fp8_linear
        return product(x, weight.codes, weight.scale, bias)
    if isinstance(weight, Codes):
        return grouped_linear(x, weight, bias)
    outs = [linear(x, part) for part in weight.parts]
    return torch.cat(outs, dim=1) if bias is None else torch.cat(outs, dim=1) + bias


def gated_packed(x: torch.Tensor, gate: Plain, up: Plain, activation: Activation) -> torch.Tensor:
    """activation(x @ gate.T) * (x @ up.T) for two packed matrices [d, inputs]: [n, d]. Each product's sums are
    activated, or multiplied, before they are rounded."""
    if isinstance(gate, Panels) and isinstance(up, Panels) and activation == "silu":
        return decoder.gated(x, gate, up)
    if isinstance(gate, Panels) or isinstance(up, Panels):
        return gelu_tanh_mul(torch.cat((linear(x, gate), linear(x, up)), dim=1))
    name, algorithm = ("swish", "") if activation == "silu" else ("gelu", "tanh")
    gated = torch.ops.mkldnn._linear_pointwise(x, gate, None, name, [], algorithm)
    return torch.ops.mkldnn._linear_pointwise.binary(x, gated, up, None, "mul")


def silu_gated(x: Rows, gate_up: Weight, down: Weight) -> Rows:
    """silu(x @ gate.T) * (x @ up.T) for gate_up [2 * d, inputs], the gate first: [n, d], for `down` to multiply."""
    mixed: torch.Tensor | None = None
    if isinstance(gate_up, Fp8Weight):
        mixed = fp8_gated_linear(x, gate_up.codes, gate_up.scale)
    elif isinstance(x, torch.Tensor) and on_card(x) and isinstance(gate_up, torch.Tensor):
        mixed = gated_linear(x, gate_up)
    elif isinstance(x, torch.Tensor) and isinstance(gate_up, Codes):
        mixed = grouped_gated_linear(x, gate_up)
    if mixed is not None:
        return mixed
    product = linear(x, gate_up)
    return silu_mul_quantized(product) if quantizes(down, product.shape[0]) else silu_mul(product)


def scaled(weight: Weight, factor: float) -> Weight:
    """The matrix times a number; may overwrite it."""
    if factor == 1.0:
        return weight
    if isinstance(weight, torch.Tensor):
        return weight.mul_(factor)
    if isinstance(weight, Fp8Weight):
        weight.scale.mul_(factor)
        return weight
    if isinstance(weight, Panels):
        raise TypeError("a matrix is scaled before it is packed")
    if isinstance(weight, RowsOf):
        return RowsOf([scaled(part, factor) for part in weight.parts])
    if weight.super_scale is not None:
        offsets = None if weight.super_offset is None else weight.super_offset.float() * factor
        return replace(weight, super_scale=weight.super_scale.float() * factor, super_offset=offsets)
    offset = weight.offset if weight.offset is None or weight.zeros else weight.offset.float() * factor
    return replace(weight, scale=weight.scale.float() * factor, offset=offset)
