"""Gemma 1, 2 and 3. Norms store w - 1 and are kept in float32; the embedding is scaled; GELU gates the MLP.

Gemma 2 and 3 norm what each half of a layer adds as well, before it is added:

    x + norm(attention(norm(x))), then the same with the MLP
"""

from __future__ import annotations

import torch

from mainsail_engine.model.attention import Attention
from mainsail_engine.model.llama import LlamaForCausalLM, norm
from mainsail_engine.model.loader import Weights


class GemmaForCausalLM(LlamaForCausalLM):
    def _norm_weight(self, weights: Weights, name: str, size: int) -> torch.Tensor:
        return weights.get(name, (size,), dtype=torch.float32) + self.architecture.norm_offset


class Gemma2ForCausalLM(GemmaForCausalLM):
    def _more_norms(self, weights: Weights, at: str) -> dict[str, torch.Tensor]:
        names = ("pre_feedforward", "post_feedforward")
        size = self.architecture.hidden_size
        return {name: self._norm_weight(weights, f"{at}.{name}_layernorm.weight", size) for name in names}

    def forward(self, inputs: torch.Tensor, attention: Attention, kv_cache: torch.Tensor) -> torch.Tensor:
        """As LlamaForCausalLM's."""
        eps = self.architecture.rms_norm_eps
        x = self.enter(inputs)
        residual: torch.Tensor | None = None
        for layer, kv in zip(self.layers, kv_cache, strict=True):
            x, residual = norm(x, layer.input_norm, eps, residual)
            x, _ = norm(self.attend(layer, x, attention, kv), layer.post_norm, eps, None)
            x, residual = norm(x, layer.more["pre_feedforward"], eps, residual)
            x, _ = norm(self.feed(layer, x, attention), layer.more["post_feedforward"], eps, None)
        return attention.only_wanted(self.leave(x, residual))
