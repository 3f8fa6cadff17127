"""Llama, and the families that differ from it by a bias (Qwen2) or a norm on queries and keys (Qwen3).

The model is flat: a list of layers, each a bag of parameters, and one function that takes a ragged batch through them.
Query, key and value projections are one matrix, gate and up another. Attention is paged and told by the batch's
`Attention` what each row may see; the model knows nothing of requests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F

from mainsail_engine.model.architecture import Architecture
from mainsail_engine.model.attention import Attention
from mainsail_engine.model.linear import linear
from mainsail_engine.model.loader import Weights
from mainsail_engine.model.rotary import cos_sin_table
from mainsail_kernels.rms_norm import rms_norm
from mainsail_kernels.silu_mul import silu_mul


@dataclass(slots=True)
class Layer:
    """One decoder layer's parameters; matrices are [outputs, inputs]."""

    input_norm: torch.Tensor
    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    output: torch.Tensor
    post_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


class LlamaForCausalLM:
    def __init__(
        self, architecture: Architecture, weights: Weights, *, max_positions: int, device: torch.device
    ) -> None:
        """Takes its parameters from `weights` and leaves none behind. Raises as Weights does."""
        a = architecture
        self.architecture = a
        self.embedding = weights.get("model.embed_tokens.weight", (a.vocab_size, a.hidden_size))
        self.layers = [self._layer(index, weights) for index in range(a.num_layers)]
        self.norm = weights.get("model.norm.weight", (a.hidden_size,))
        tied = a.tie_word_embeddings and not weights.has("lm_head.weight")
        head_shape = (a.vocab_size, a.hidden_size)
        self.head = self.embedding if tied else weights.get("lm_head.weight", head_shape)
        weights.finish(_ignored(a))
        self.cos_sin = cos_sin_table(a, max_positions, device)
        self.scale = a.head_dim**-0.5

    def _layer(self, index: int, weights: Weights) -> Layer:
        a, at = self.architecture, f"model.layers.{index}"
        q, kv, hidden = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim, a.hidden_size
        rows = [q, kv, kv]
        parts = [f"{at}.self_attn.{x}_proj" for x in "qkv"]
        mlp = [f"{at}.mlp.gate_proj.weight", f"{at}.mlp.up_proj.weight"]
        norm = (a.head_dim,)
        return Layer(
            input_norm=weights.get(f"{at}.input_layernorm.weight", (hidden,)),
            qkv=weights.fused([f"{part}.weight" for part in parts], (q + 2 * kv, hidden), rows),
            qkv_bias=weights.fused([f"{x}.bias" for x in parts], (q + 2 * kv,), rows) if a.attention_bias else None,
            q_norm=weights.get(f"{at}.self_attn.q_norm.weight", norm) if a.qk_norm else None,
            k_norm=weights.get(f"{at}.self_attn.k_norm.weight", norm) if a.qk_norm else None,
            output=weights.get(f"{at}.self_attn.o_proj.weight", (hidden, q)),
            post_norm=weights.get(f"{at}.post_attention_layernorm.weight", (hidden,)),
            gate_up=weights.fused(mlp, (2 * a.intermediate_size, hidden), [a.intermediate_size] * 2),
            down=weights.get(f"{at}.mlp.down_proj.weight", (hidden, a.intermediate_size)),
        )

    def forward(self, token_ids: torch.Tensor, attention: Attention, kv_cache: torch.Tensor) -> torch.Tensor:
        """Hidden states after the last norm, [num_tokens, hidden_size]. Writes the tokens' KV into kv_cache.

        token_ids [num_tokens] int64; kv_cache [num_layers, num_blocks, 2, num_kv_heads, 16, head_dim].
        """
        a = self.architecture
        x = self.embedding[token_ids]
        residual: torch.Tensor | None = None
        for layer, kv in zip(self.layers, kv_cache, strict=True):
            x, residual = _norm(x, layer.input_norm, a.rms_norm_eps, residual)
            query = attention.rotate_and_write(
                linear(x, layer.qkv, layer.qkv_bias), kv, self.cos_sin,
                num_heads=a.num_heads, num_kv_heads=a.num_kv_heads,
                q_norm=layer.q_norm, k_norm=layer.k_norm, eps=a.rms_norm_eps,
            )  # fmt: skip
            x = linear(attention.attend(query, kv, self.scale).flatten(1), layer.output)
            x, residual = _norm(x, layer.post_norm, a.rms_norm_eps, residual)
            x = linear(silu_mul(linear(x, layer.gate_up)), layer.down)
        x, _ = _norm(x, self.norm, a.rms_norm_eps, residual)
        return x

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, hidden_size] to [n, vocab_size], in the model's dtype."""
        return linear(hidden, self.head)


def _norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(normalized, new residual); the first layer's residual is the embedding itself."""
    if not x.is_cuda:
        total = x if residual is None else x + residual
        return F.rms_norm(total, weight.shape, weight, eps), total
    if residual is None:
        return cast(torch.Tensor, rms_norm(x, weight, eps)), x
    return cast(tuple[torch.Tensor, torch.Tensor], rms_norm(x, weight, eps, residual))


def _ignored(architecture: Architecture) -> frozenset[str]:
    """Tensors that checkpoints carry and that are derived: rotary tables of old files, a head that is tied."""
    derived = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(architecture.num_layers)}
    derived |= {"rope_freqs.weight"} if architecture.rope_scaling.factor != 1.0 else set()
    return frozenset(derived)
