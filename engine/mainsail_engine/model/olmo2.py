"""OLMo 2: no norm before attention and MLP, one after each; queries and keys are normed over all heads together."""

from __future__ import annotations

import torch

from mainsail_engine.model.attention import Attention
from mainsail_engine.model.linear import Rows
from mainsail_engine.model.llama import Layer, LlamaForCausalLM, norm
from mainsail_engine.model.loader import Weights


class Olmo2ForCausalLM(LlamaForCausalLM):
    def _input_norm(self, weights: Weights, at: str) -> torch.Tensor:
        return torch.empty(0, device=weights.device)

    def _head_norm(self, weights: Weights, name: str, heads: int) -> torch.Tensor | None:
        del weights, name, heads
        return None

    def _more_norms(self, weights: Weights, at: str) -> dict[str, torch.Tensor]:
        a = self.architecture
        sizes = {
            "self_attn.q_norm": a.num_heads * a.head_dim,
            "self_attn.k_norm": a.num_kv_heads * a.head_dim,
            "post_feedforward_layernorm": a.hidden_size,
        }
        return {name: self._norm_weight(weights, f"{at}.{name}.weight", size) for name, size in sizes.items()}

    def forward(self, inputs: torch.Tensor, attention: Attention, kv_cache: torch.Tensor) -> torch.Tensor:
        """As LlamaForCausalLM's."""
        eps = self.architecture.rms_norm_eps
        x = self.enter(inputs)
        for layer, kv in zip(self.layers, kv_cache, strict=True):
            x = x + norm(self.attend(layer, x, attention, kv), layer.post_norm, eps, None)[0]
            x = x + norm(self.feed(layer, x, attention), layer.more["post_feedforward_layernorm"], eps, None)[0]
        return attention.only_wanted(self.leave(x, None))

    def _project(self, layer: Layer, x: Rows, attention: Attention) -> torch.Tensor:
        a, qkv = self.architecture, super()._project(layer, x, attention)
        q, k = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
        query, _ = norm(qkv[:, :q], layer.more["self_attn.q_norm"], a.rms_norm_eps, None)
        key, _ = norm(qkv[:, q : q + k], layer.more["self_attn.k_norm"], a.rms_norm_eps, None)
        return torch.cat((query, key, qkv[:, q + k :]), dim=1)
