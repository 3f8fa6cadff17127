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
        a, parallel = self.architecture, self.parallel
        q, k, kv = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim, parallel.kv_heads(a.num_kv_heads)
        key_share = slice(kv.start * a.head_dim, kv.stop * a.head_dim)
        return {
            "self_attn.q_norm": weights.get(f"{at}.self_attn.q_norm.weight", (q,), parallel.part(q)),
            "self_attn.k_norm": weights.get(f"{at}.self_attn.k_norm.weight", (k,), key_share),
            "post_feedforward_layernorm": self._norm_weight(
                weights, f"{at}.post_feedforward_layernorm.weight", a.hidden_size
            ),
        }

    def forward(self, inputs: torch.Tensor, attention: Attention, kv_cache: torch.Tensor) -> torch.Tensor:
        """As LlamaForCausalLM's."""
        eps = self.architecture.rms_norm_eps
        x = self.enter(inputs)
        for layer, kv in zip(self.layers, kv_cache, strict=True):
            x = x + norm(self.attend(layer, x, attention, kv), layer.post_norm, eps, None)[0]
            x = x + norm(self.feed(layer, x, attention), layer.more["post_feedforward_layernorm"], eps, None)[0]
        return attention.only_wanted(self.leave(x, None))

    def _project(self, layer: Layer, x: Rows, attention: Attention) -> torch.Tensor:
        qkv, dim = super()._project(layer, x, attention), self.architecture.head_dim
        q, k = self.num_heads * dim, self.num_kv_heads * dim
        query, key = self._norm_heads(layer, qkv[:, :q], qkv[:, q : q + k])
        return torch.cat((query, key, qkv[:, q + k :]), dim=1)

    def _norm_heads(self, layer: Layer, query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Over the heads of all ranks, whose squares are summed; a key head that several ranks have counts once."""
        a, size = self.architecture, self.parallel.size
        weights = layer.more["self_attn.q_norm"], layer.more["self_attn.k_norm"]
        if size == 1:
            eps = a.rms_norm_eps
            return norm(query, weights[0], eps, None)[0], norm(key, weights[1], eps, None)[0]
        wide, narrow = query.float(), key.float()
        copies = max(size // a.num_kv_heads, 1)
        squares = (
            wide.square().sum(1) / (a.num_heads * a.head_dim),
            narrow.square().sum(1) / (a.num_kv_heads * a.head_dim * copies),
        )
        factors = torch.rsqrt(self.parallel.sum(torch.stack(squares, dim=1)) + a.rms_norm_eps)
        wide, narrow = wide * factors[:, :1] * weights[0], narrow * factors[:, 1:] * weights[1]
        return wide.to(query.dtype), narrow.to(key.dtype)
