"""All layers of a plain Llama, or of a stage of it, in one compiled call, on CPUs with kernels (their cpu/decoder.c).

`LlamaForCausalLM.forward` is the definition, and computes whatever this does not: mixtures of experts, quantized
matrices, other activations, a bias after attention, scores with caps or sinks, an FP8 cache, matrices shared by several
ranks, steps in which a row has an adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from mainsail_engine.model.attention import Attention
from mainsail_engine.model.linear import Panels
from mainsail_engine.model.mlp import PackedMlp
from mainsail_kernels.cpu.decoder import HEAD_DIMS, Decoder, LayerParameters

if TYPE_CHECKING:
    from mainsail_engine.model.llama import Layer, LlamaForCausalLM


class WholeLayers:
    def __init__(self, decoder: Decoder, dtype: torch.dtype) -> None:
        self._decoder, self._dtype = decoder, dtype

    def takes(self, attention: Attention, kv_cache: torch.Tensor) -> bool:
        """Whether this computes such a step."""
        return attention.adapters is None and kv_cache.dtype == self._dtype

    def __call__(self, x: torch.Tensor, attention: Attention, kv_cache: torch.Tensor) -> torch.Tensor:
        """What the stage's first layer gets [num_tokens, hidden_size] to what `forward` gives; writes their KV."""
        return self._decoder(
            x, kv_cache, positions=attention.positions, slot_mapping=attention.slot_mapping,
            sequences=_sequences(attention), block_tables=attention.block_tables,
        )  # fmt: skip


def whole_layers(model: LlamaForCausalLM) -> WholeLayers | None:
    """None where something is in the model, or missing on the machine, that only its own forward pass computes."""
    a, heads = model.architecture, model.num_heads
    parameters = _parameters(model.layers)
    if parameters is None or a.attention_soft_cap or a.activation != "silu" or model.parallel.size > 1:
        return None
    dtype = parameters[0].qkv.dtype
    if a.head_dim not in HEAD_DIMS[dtype]:
        return None
    norm = model.norm if model.parallel.is_last else None
    decoder = Decoder(
        parameters, norm, num_heads=heads, num_kv_heads=model.num_kv_heads, head_dim=a.head_dim,
        eps=a.rms_norm_eps, scale=a.scale,
    )  # fmt: skip
    return WholeLayers(decoder, dtype)


def _parameters(layers: Sequence[Layer]) -> list[LayerParameters] | None:
    found: list[LayerParameters] = []
    for layer in layers:
        mlp, qkv, output = layer.mlp, layer.qkv, layer.output
        if layer.output_bias is not None or layer.sinks is not None:
            return None
        if not isinstance(mlp, PackedMlp) or not isinstance(qkv, Panels) or not isinstance(output, Panels):
            return None
        gate, up, down = mlp.gate, mlp.up, mlp.down
        if not isinstance(gate, Panels) or not isinstance(up, Panels) or not isinstance(down, Panels):
            return None
        parameters = LayerParameters(
            input_norm=layer.input_norm, qkv=qkv, qkv_bias=layer.qkv_bias, q_norm=layer.q_norm, k_norm=layer.k_norm,
            cos_sin=layer.cos_sin, output=output, post_norm=layer.post_norm, gate=gate, up=up, down=down,
            window=layer.window,
        )  # fmt: skip
        found.append(parameters)
    return found


def _sequences(attention: Attention) -> torch.Tensor:
    """[num_tokens] int32: the row of block_tables that a token's sequence has."""
    decodes = torch.arange(attention.num_decodes, dtype=torch.int32)
    lengths = attention.chunk_start.diff()
    if not len(lengths):
        return decodes
    chunks = torch.arange(attention.num_decodes, attention.num_decodes + len(lengths), dtype=torch.int32)
    return torch.cat((decodes, chunks.repeat_interleave(lengths)))
