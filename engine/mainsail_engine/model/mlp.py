"""The second half of a decoder layer: a gated MLP, or a mixture of them of which a router chooses some for each token.

With several ranks every rank has a share of the channels of every MLP; what it returns is its share of the sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from mainsail_engine.model.architecture import Activation, Architecture, Experts
from mainsail_engine.model.linear import (
    Fp4Experts,
    Fp8Weight,
    Plain,
    Rows,
    Weight,
    gated_packed,
    linear,
    packed_plain,
    scaled,
    silu_gated,
)
from mainsail_engine.model.loader import Part, Weights
from mainsail_engine.model.lora import AdapterRows, Site
from mainsail_engine.model.parallel import Parallel
from mainsail_kernels.experts import Mixture
from mainsail_kernels.moe import routed_mlp
from mainsail_kernels.silu_mul import gelu_tanh_mul, silu_mul

ExpertMatrices = torch.Tensor | Fp8Weight | Fp4Experts


class Mlp(Protocol):
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[num_tokens, hidden_size] to the same."""
        ...

    def packed(self) -> Mlp:
        """The same as this device computes it best. Call once all parameters have their values."""
        ...


@dataclass(slots=True)
class DenseMlp:
    gate_up: Weight
    """[2 * channels, hidden_size], the gate first."""
    down: Weight
    """[hidden_size, channels]."""
    activation: Activation = "silu"

    def __call__(self, x: Rows) -> torch.Tensor:
        if self.activation == "silu":
            return linear(silu_gated(x, self.gate_up, self.down), self.down)
        return linear(gelu_tanh_mul(linear(x, self.gate_up)), self.down)

    def adapted(self, x: torch.Tensor, rows: AdapterRows, gate_up: Site, down: Site) -> torch.Tensor:
        """The same, with what each row's adapter adds to both matrices."""
        return _adapted(x, linear(x, self.gate_up), self.down, self.activation, rows, gate_up, down)

    def packed(self) -> Mlp:
        down, gate_up = self.down, self.gate_up
        if not isinstance(down, torch.Tensor) or not isinstance(gate_up, torch.Tensor):
            return self
        gate, up = (packed_plain(half.contiguous()) for half in gate_up.chunk(2))
        if isinstance(gate, torch.Tensor) and not gate.is_mkldnn:
            return self
        return PackedMlp(gate, up, packed_plain(down), self.activation)


@dataclass(slots=True)
class PackedMlp:
    """A DenseMlp on the CPU: matrices as its kernels read them, the activation inside the products."""

    gate: Plain
    """[channels, hidden_size]."""
    up: Plain
    """[channels, hidden_size]."""
    down: Plain
    """[hidden_size, channels]."""
    activation: Activation

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return linear(gated_packed(x, self.gate, self.up, self.activation), self.down)

    def adapted(self, x: torch.Tensor, rows: AdapterRows, gate_up: Site, down: Site) -> torch.Tensor:
        """As DenseMlp's."""
        mixed = torch.cat((linear(x, self.gate), linear(x, self.up)), dim=1)
        return _adapted(x, mixed, self.down, self.activation, rows, gate_up, down)

    def packed(self) -> Mlp:
        return self


def _adapted(
    x: torch.Tensor, mixed: torch.Tensor, down: Weight, activation: Activation,
    rows: AdapterRows, gate_up_site: Site, down_site: Site,
) -> torch.Tensor:  # fmt: skip
    """From gate and up, mixed [n, 2 * channels], to the MLP's output with what each row's adapter adds."""
    rows.add(mixed, x, gate_up_site)
    inner = silu_mul(mixed) if activation == "silu" else gelu_tanh_mul(mixed)
    out = linear(inner, down)
    rows.add(out, inner, down_site)
    return out


@dataclass(slots=True)
class ExpertMlp:
    router: torch.Tensor
    """[num_experts, hidden_size]."""
    gate_up: ExpertMatrices
    """[num_experts, 2 * channels, hidden_size]."""
    down: ExpertMatrices
    """[num_experts, hidden_size, channels]."""
    experts: Experts
    router_bias: torch.Tensor | None = None
    gate_up_bias: torch.Tensor | None = None
    """[num_experts, 2 * channels]."""
    down_bias: torch.Tensor | None = None
    """[num_experts, hidden_size], on one rank alone."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        e = self.experts
        scores = linear(x, self.router, self.router_bias)
        gate_up, gate_up_scale = _with_scale(self.gate_up)
        down, down_scale = _with_scale(self.down)
        return routed_mlp(x, scores, Mixture(
            gate_up, down, gate_up_scale, down_scale, self.gate_up_bias, self.down_bias,
            per_token=e.experts_per_token, normalized=e.normalized, swiglu=e.swiglu,
            gate_up_factor=_factor(self.gate_up), down_factor=_factor(self.down),
        ))  # fmt: skip

    def packed(self) -> Mlp:
        return self


def _with_scale(matrix: ExpertMatrices) -> tuple[torch.Tensor, torch.Tensor | None]:
    return (matrix, None) if isinstance(matrix, torch.Tensor) else (matrix.codes, matrix.scale)


def _factor(matrix: ExpertMatrices) -> torch.Tensor | None:
    return matrix.factor if isinstance(matrix, Fp4Experts) else None


def dense_mlp(a: Architecture, weights: Weights, at: str, parallel: Parallel) -> DenseMlp:
    size, hidden, ours = a.intermediate_size, a.hidden_size, parallel.part(a.intermediate_size)
    gate_up = [Part(f"{at}.{name}_proj.weight", (size, hidden), ours) for name in ("gate", "up")]
    down = weights.matrix([Part(f"{at}.down_proj.weight", (hidden, size), columns=ours)], at_once=a.residual_scale != 1)
    return DenseMlp(weights.matrix(gate_up), scaled(down, a.residual_scale), a.activation)


MIXTRAL_NAMES = ("block_sparse_moe", "w1", "w3", "w2")
QWEN_NAMES = ("mlp", "gate_proj", "up_proj", "down_proj")


def expert_mlp(a: Architecture, experts: Experts, weights: Weights, layer: str, parallel: Parallel) -> ExpertMlp:
    block, gate, up, down = MIXTRAL_NAMES if a.name == "MixtralForCausalLM" else QWEN_NAMES
    size, hidden, ours = experts.intermediate_size, a.hidden_size, parallel.part(experts.intermediate_size)
    at = [f"{layer}.{block}.experts.{i}" for i in range(experts.num_experts)]
    gate_up = [[Part(f"{name}.{x}.weight", (size, hidden), ours) for x in (gate, up)] for name in at]
    down_parts = [[Part(f"{name}.{down}.weight", (hidden, size), columns=ours)] for name in at]
    return ExpertMlp(
        router=weights.get(f"{layer}.{block}.gate.weight", (experts.num_experts, hidden)),
        gate_up=weights.experts(gate_up),
        down=weights.experts(down_parts),
        experts=experts,
    )
