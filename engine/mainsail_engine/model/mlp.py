"""The second half of a decoder layer: a gated MLP, or a mixture of them of which a router chooses some for each token.

With several ranks every rank has a share of the channels of every MLP; what it returns is its share of the sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from mainsail_engine.model.architecture import Activation, Architecture, Experts
from mainsail_engine.model.linear import gated_packed, linear, packed, silu_gated
from mainsail_engine.model.loader import Part, Weights
from mainsail_engine.model.parallel import Parallel
from mainsail_kernels.moe import grouped_mlp, route
from mainsail_kernels.silu_mul import gelu_tanh_mul


class Mlp(Protocol):
    down: torch.Tensor
    """The last matrix: what comes out is linear in it."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[num_tokens, hidden_size] to the same."""
        ...

    def packed(self) -> Mlp:
        """The same as this device computes it best. Call once all parameters have their values."""
        ...


@dataclass(slots=True)
class DenseMlp:
    gate_up: torch.Tensor
    """[2 * channels, hidden_size], the gate first."""
    down: torch.Tensor
    """[hidden_size, channels]."""
    activation: Activation = "silu"

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.activation == "silu":
            return linear(silu_gated(x, self.gate_up), self.down)
        return linear(gelu_tanh_mul(linear(x, self.gate_up)), self.down)

    def packed(self) -> Mlp:
        down = packed(self.down)
        if not down.is_mkldnn:
            return self
        gate, up = (packed(half.contiguous()) for half in self.gate_up.chunk(2))
        return PackedMlp(gate, up, down, self.activation)


@dataclass(slots=True)
class PackedMlp:
    """A DenseMlp on the CPU: matrices as oneDNN reads them, the activation inside the products."""

    gate: torch.Tensor
    """[channels, hidden_size]."""
    up: torch.Tensor
    """[channels, hidden_size]."""
    down: torch.Tensor
    """[hidden_size, channels]."""
    activation: Activation

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return linear(gated_packed(x, self.gate, self.up, self.activation), self.down)

    def packed(self) -> Mlp:
        return self


@dataclass(slots=True)
class ExpertMlp:
    router: torch.Tensor
    """[num_experts, hidden_size]."""
    gate_up: torch.Tensor
    """[num_experts, 2 * channels, hidden_size]."""
    down: torch.Tensor
    """[num_experts, hidden_size, channels]."""
    experts: Experts

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        e = self.experts
        weights, chosen = route(linear(x, self.router), e.experts_per_token, normalized=e.normalized)
        return grouped_mlp(x, weights, chosen, self.gate_up, self.down)

    def packed(self) -> Mlp:
        return self


def dense_mlp(a: Architecture, weights: Weights, at: str, parallel: Parallel) -> DenseMlp:
    size, hidden, ours = a.intermediate_size, a.hidden_size, parallel.part(a.intermediate_size)
    gate_up = [Part(f"{at}.{name}_proj.weight", (size, hidden), ours) for name in ("gate", "up")]
    down = weights.get(f"{at}.down_proj.weight", (hidden, size), columns=ours)
    return DenseMlp(weights.fused(gate_up), down, a.activation)


MIXTRAL_NAMES = ("block_sparse_moe", "w1", "w3", "w2")
QWEN_NAMES = ("mlp", "gate_proj", "up_proj", "down_proj")


def expert_mlp(a: Architecture, experts: Experts, weights: Weights, layer: str, parallel: Parallel) -> ExpertMlp:
    block, gate, up, down = MIXTRAL_NAMES if a.name == "MixtralForCausalLM" else QWEN_NAMES
    size, hidden, ours = experts.intermediate_size, a.hidden_size, parallel.part(experts.intermediate_size)
    at = [f"{layer}.{block}.experts.{i}" for i in range(experts.num_experts)]
    gate_up = [[Part(f"{name}.{x}.weight", (size, hidden), ours) for x in (gate, up)] for name in at]
    return ExpertMlp(
        router=weights.get(f"{layer}.{block}.gate.weight", (experts.num_experts, hidden)),
        gate_up=weights.stacked(gate_up),
        down=weights.stacked([[Part(f"{name}.{down}.weight", (hidden, size), columns=ours)] for name in at]),
        experts=experts,
    )
