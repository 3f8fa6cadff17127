"""Llama, and the families that differ from it by what `Architecture` says.

A bias (Qwen2), a norm on queries and keys (Qwen3), a window (Mistral), layers without rotation (SmolLM3), scales
(Granite), matrices that the checkpoint has in one piece (Phi-3), a mixture of experts (Mixtral, Qwen3-MoE).

The model is flat: a list of layers, each a bag of parameters, and one function that takes a ragged batch through them.
Query, key and value projections are one matrix, gate and up another. Attention is paged and told by the batch's
`Attention` what each row may see; the model knows nothing of requests. Families whose layers are put together in
another way (norms elsewhere) are subclasses in files of their own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import cast

import torch
import torch.nn.functional as F

from mainsail_engine.model.architecture import Architecture
from mainsail_engine.model.attention import Attention, KVScales
from mainsail_engine.model.linear import Rows, Weight, linear, packed, quantizes, scaled
from mainsail_engine.model.loader import Part, Weights
from mainsail_engine.model.lora import AdapterSlots, Site
from mainsail_engine.model.mlp import DenseMlp, Mlp, PackedMlp, dense_mlp, expert_mlp
from mainsail_engine.model.parallel import SINGLE, Parallel
from mainsail_engine.model.rotary import cos_sin_table, no_rotation
from mainsail_engine.model.whole_layers import whole_layers
from mainsail_kernels._triton import on_card
from mainsail_kernels.rms_norm import rms_norm, rms_norm_quantized


@dataclass(slots=True)
class Layer:
    """One decoder layer's parameters; matrices are [outputs, inputs]."""

    input_norm: torch.Tensor
    qkv: Weight
    qkv_bias: torch.Tensor | None
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    output: Weight
    output_bias: torch.Tensor | None
    """On the first rank alone: outputs are summed over the ranks."""
    sinks: torch.Tensor | None
    """[num_heads] float32, where attention has them (gpt-oss)."""
    post_norm: torch.Tensor
    mlp: Mlp
    window: int
    """How many of the newest tokens are seen; 0: all."""
    cos_sin: torch.Tensor
    """The rotation of this kind of layer."""
    kv_scales: KVScales
    """Used where the KV cache is in FP8."""
    more: dict[str, torch.Tensor]
    """Norms that only some families have."""
    sites: dict[str, Site] = field(default_factory=dict[str, Site])
    """Where LoRA adapters add to the matrices above; empty without adapters."""


class LlamaForCausalLM:
    captures_graphs = True
    """Nothing in a step waits for the device, so CUDA graphs may hold it."""

    @property
    def reads_transposed_values(self) -> bool:
        """Whether attention of any layer can (`mainsail_kernels.kv_transpose`): without a window, a cap or sinks."""
        a = self.architecture
        return not a.attention_soft_cap and not all(a.window(index) for index in range(a.num_layers))

    def __init__(
        self, architecture: Architecture, weights: Weights, *, max_positions: int, device: torch.device,
        parallel: Parallel = SINGLE,
    ) -> None:  # fmt: skip
        """Takes its parameters from `weights` and leaves none behind. Raises as Weights does."""
        a = architecture
        self.architecture, self.parallel = a, parallel
        self.num_heads = a.num_heads // parallel.size
        self.num_kv_heads = len(range(*parallel.kv_heads(a.num_kv_heads).indices(a.num_kv_heads)))
        rotary_dim = a.rotary_dim or a.head_dim
        self._global = cos_sin_table(a.rope, rotary_dim, max_positions, device)
        self._local = cos_sin_table(a.local_rope, rotary_dim, max_positions, device) if a.local_rope else self._global
        self._none = no_rotation(max_positions, device) if a.no_rope_layers else self._global
        vocabulary, shape = parallel.part(a.vocab_size), (a.vocab_size, a.hidden_size)
        self._first_token = vocabulary.start
        tied = a.tie_word_embeddings and not weights.has_matrix("lm_head")
        nothing = torch.empty(0, dtype=weights.dtype, device=device)
        reads_embedding = parallel.is_first or (parallel.is_last and tied)
        self.embedding = weights.get("model.embed_tokens.weight", shape, vocabulary) if reads_embedding else nothing
        self.layers = [self._layer(index, weights) for index in parallel.layers(a)]
        self.norm, self.head = nothing, cast(Weight, nothing)
        if parallel.is_last:
            self.norm = self._norm_weight(weights, "model.norm.weight", a.hidden_size)
            if a.logits_scale != 1.0:
                self.norm *= a.logits_scale
            self.head = packed(self.embedding if tied else weights.matrix([Part("lm_head.weight", shape, vocabulary)]))
        if not parallel.is_first:
            self.embedding = nothing
        ignored = _ignored(a, tied)
        weights.finish(lambda name: name in ignored or self._is_elsewhere(name, tied=tied))
        self._whole = whole_layers(self) if type(self) is LlamaForCausalLM else None

    # -- parameters ----------------------------------------------------------------------------------------------

    def _layer(self, index: int, weights: Weights) -> Layer:
        a, at = self.architecture, f"model.layers.{index}"
        hidden, heads = a.hidden_size, self.parallel.part(a.num_heads * a.head_dim)
        kv = self.parallel.kv_heads(a.num_kv_heads)
        kv_rows = slice(kv.start * a.head_dim, kv.stop * a.head_dim)
        q_out, kv_out = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
        wide = [("q", q_out, heads), ("k", kv_out, kv_rows), ("v", kv_out, kv_rows)]
        matrices = [Part(f"{at}.self_attn.{x}_proj.weight", (out, hidden), rows) for x, out, rows in wide]
        biases = [Part(f"{at}.self_attn.{x}_proj.bias", (out,), rows) for x, out, rows in wide]
        out = [Part(f"{at}.self_attn.o_proj.weight", (hidden, q_out), columns=heads)]
        output = weights.matrix(out, at_once=a.residual_scale != 1.0)
        mlp = self._mlp(index, weights)
        rotation = self._none if index in a.no_rope_layers else self._local if a.window(index) else self._global
        return Layer(
            input_norm=self._input_norm(weights, at),
            qkv=packed(weights.matrix(matrices)),
            qkv_bias=weights.fused(biases) if a.attention_bias else None,
            q_norm=self._head_norm(weights, f"{at}.self_attn.q_norm.weight", a.num_heads),
            k_norm=self._head_norm(weights, f"{at}.self_attn.k_norm.weight", a.num_kv_heads),
            output=packed(scaled(output, a.residual_scale)),
            output_bias=self._output_bias(weights, f"{at}.self_attn.o_proj.bias"),
            sinks=self._sinks(weights, at),
            post_norm=self._norm_weight(weights, f"{at}.post_attention_layernorm.weight", hidden),
            mlp=mlp.packed(),
            window=a.window(index),
            cos_sin=rotation,
            kv_scales=KVScales(*(weights.scalar(f"{at}.self_attn.{x}_scale") for x in "kv")),
            more=self._more_norms(weights, at),
        )

    def _output_bias(self, weights: Weights, name: str) -> torch.Tensor | None:
        a = self.architecture
        if not a.output_bias:
            return None
        bias = weights.get(name, (a.hidden_size,)) * a.residual_scale
        return bias if self.parallel.rank == 0 else None

    def _sinks(self, weights: Weights, at: str) -> torch.Tensor | None:
        del weights, at
        return None

    def _norm_weight(self, weights: Weights, name: str, size: int) -> torch.Tensor:
        return weights.get(name, (size,))

    def _input_norm(self, weights: Weights, at: str) -> torch.Tensor:
        return self._norm_weight(weights, f"{at}.input_layernorm.weight", self.architecture.hidden_size)

    def _head_norm(self, weights: Weights, name: str, heads: int) -> torch.Tensor | None:
        del heads
        return self._norm_weight(weights, name, self.architecture.head_dim) if self.architecture.qk_norm else None

    def _more_norms(self, weights: Weights, at: str) -> dict[str, torch.Tensor]:
        del weights, at
        return {}

    def _mlp(self, index: int, weights: Weights) -> Mlp:
        a = self.architecture
        if a.experts is None or index in a.experts.dense_layers:
            return dense_mlp(a, weights, f"model.layers.{index}.mlp", self.parallel)
        return expert_mlp(a, a.experts, weights, f"model.layers.{index}", self.parallel)

    def _is_elsewhere(self, name: str, *, tied: bool) -> bool:
        """Whether a checkpoint's tensor is another stage's."""
        layer = _LAYER.match(name)
        if layer is not None:
            index, a = int(layer[1]), self.architecture
            return index < a.num_layers and index not in self.parallel.layers(a)
        if name.startswith("model.embed_tokens."):
            return not self.parallel.is_first and not (self.parallel.is_last and tied)
        return name.startswith(("model.norm.", "lm_head.")) and not self.parallel.is_last

    # -- computation ---------------------------------------------------------------------------------------------

    def forward(self, inputs: torch.Tensor, attention: Attention, kv_cache: torch.Tensor) -> torch.Tensor:
        """Hidden states of the wanted rows after the last norm, or of a stage that is not the last, of all after its
        last layer: [num_wanted, hidden_size]. Writes the tokens' KV into kv_cache.

        Of the last layer, rows that nobody asks for have keys and values only: all that other tokens see of them.
        inputs: token ids [num_tokens] int64, or what the stage before passed on [num_tokens, hidden_size];
        kv_cache [num_layers, num_blocks, 2, num_kv_heads, 16, head_dim], of this stage's layers.
        """
        eps = self.architecture.rms_norm_eps
        x = self.enter(inputs)
        if self._whole is not None and self._whole.takes(attention, kv_cache):
            return attention.only_wanted(self._whole(x, attention, kv_cache))
        residual: torch.Tensor | None = None
        for layer, kv in zip(self.layers, kv_cache, strict=True):
            normed, residual = norm_for(layer.qkv, attention, x, layer.input_norm, eps, residual)
            seen = self.see(layer, normed, attention, kv)
            if layer is self.layers[-1] and attention.adapters is None:
                seen, residual = attention.only_wanted(seen), attention.only_wanted(residual)
                if not seen.shape[0]:
                    return residual
            x = self.project(layer, seen, attention)
            gate_up = layer.mlp.gate_up if isinstance(layer.mlp, DenseMlp) else None
            normed, residual = norm_for(gate_up, attention, x, layer.post_norm, eps, residual)
            x = self.feed(layer, normed, attention)
        hidden = self.leave(x, residual)
        return hidden if attention.adapters is None else attention.only_wanted(hidden)

    def enter(self, inputs: torch.Tensor) -> torch.Tensor:
        """What the first layer of this stage gets."""
        return self.embed(inputs) if self.parallel.is_first else inputs

    def leave(self, x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        """From the last layer of this stage to what `forward` gives."""
        if self.parallel.is_last:
            return norm(x, self.norm, self.architecture.rms_norm_eps, residual)[0]
        return x if residual is None else x + residual

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[num_tokens] to [num_tokens, hidden_size]."""
        if self.parallel.size == 1:
            x = self.embedding[token_ids]
        else:
            local = token_ids - self._first_token
            ours = (local >= 0) & (local < self.embedding.shape[0])
            x = self.parallel.sum(self.embedding[local.where(ours, 0)] * ours.unsqueeze(1))
        return x if self.architecture.embedding_scale == 1.0 else x * self.architecture.embedding_scale

    def attend(self, layer: Layer, x: Rows, attention: Attention, kv: torch.Tensor) -> torch.Tensor:
        """Attention with its projections, [num_tokens, hidden_size] to the same."""
        return self.project(layer, self.see(layer, x, attention, kv), attention)

    def see(self, layer: Layer, x: Rows, attention: Attention, kv: torch.Tensor) -> torch.Tensor:
        """What each token's heads see, [num_tokens, num_heads * head_dim]; writes the tokens' KV."""
        a = self.architecture
        query = attention.rotate_and_write(
            self._project(layer, x, attention), kv, layer.cos_sin,
            num_heads=self.num_heads, num_kv_heads=self.num_kv_heads,
            q_norm=layer.q_norm, k_norm=layer.k_norm, eps=a.rms_norm_eps, kv_scales=layer.kv_scales,
        )  # fmt: skip
        seen = attention.attend(
            query, kv, a.scale, window=layer.window, soft_cap=a.attention_soft_cap, sinks=layer.sinks,
            kv_scales=layer.kv_scales,
        )  # fmt: skip
        return seen.flatten(1)

    def project(self, layer: Layer, seen: torch.Tensor, attention: Attention) -> torch.Tensor:
        """What all heads saw to [n, hidden_size]."""
        out = linear(seen, layer.output, layer.output_bias)
        if attention.adapters is not None:
            attention.adapters.add(out, seen, layer.sites["output"])
        return self.parallel.sum(out)

    def feed(self, layer: Layer, x: Rows, attention: Attention) -> torch.Tensor:
        """The MLP, [num_tokens, hidden_size] to the same."""
        mlp, rows = layer.mlp, attention.adapters
        if not isinstance(x, torch.Tensor):
            if not isinstance(mlp, DenseMlp):
                raise TypeError("rows in FP8 are for an MLP whose matrices are")
            return self.parallel.sum(mlp(x))
        if rows is None or not isinstance(mlp, DenseMlp | PackedMlp) or "down" not in layer.sites:
            return self.parallel.sum(mlp(x))
        return self.parallel.sum(mlp.adapted(x, rows, layer.sites["gate_up"], layer.sites["down"]))

    def _project(self, layer: Layer, x: Rows, attention: Attention) -> torch.Tensor:
        """Queries, keys and values of all heads, side by side."""
        qkv = linear(x, layer.qkv, layer.qkv_bias)
        if attention.adapters is not None and isinstance(x, torch.Tensor):
            attention.adapters.add(qkv, x, layer.sites["qkv"])
        return qkv

    def take_adapters(self, slots: AdapterSlots) -> None:
        """From now on rows may go through the adapters in these slots."""
        for layer, sites in zip(self.layers, slots.layers, strict=True):
            layer.sites = sites

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, hidden_size] to [n, vocab_size], in the model's dtype."""
        a = self.architecture
        logits = linear(hidden, self.head)
        if self.parallel.size > 1:
            each = -(-a.vocab_size // self.parallel.size)
            logits = self.parallel.gather_columns(F.pad(logits, (0, each - logits.shape[1])))[:, : a.vocab_size]
        if a.logits_soft_cap:
            logits = a.logits_soft_cap * torch.tanh(logits / a.logits_soft_cap)
        return logits


def norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(normalized, new residual); the first layer's residual is the embedding itself."""
    if not on_card(x) and weight.dtype == x.dtype:
        total = x if residual is None else x + residual
        return F.rms_norm(total, weight.shape, weight, eps), total
    if residual is None:
        return cast(torch.Tensor, rms_norm(x, weight, eps)), x
    return cast(tuple[torch.Tensor, torch.Tensor], rms_norm(x, weight, eps, residual))


_LAYER = re.compile(r"model\.layers\.(\d+)\.")


def norm_for(
    matrix: Weight | None, attention: Attention, x: torch.Tensor, weight: torch.Tensor, eps: float,
    residual: torch.Tensor | None,
) -> tuple[Rows, torch.Tensor]:  # fmt: skip
    """`norm`, as this matrix takes its rows: quantized already if it would do that, and nobody else wants them."""
    if matrix is None or attention.adapters is not None or not quantizes(matrix, x.shape[0]):
        return norm(x, weight, eps, residual)
    return rms_norm_quantized(x, weight, eps, residual)


def _ignored(architecture: Architecture, tied: bool) -> frozenset[str]:
    """Tensors that checkpoints carry and that are derived: rotary tables of old files."""
    derived = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(architecture.num_layers)}
    derived |= {"rope_freqs.weight"} if architecture.rope.kind != "default" else set()
    return frozenset(derived | ({"lm_head.weight"} if tied else set()))
