"""What a layer needs to know of a ragged batch: built once a step, used by every layer.

Decodes (one query each) come first and go to the decode kernel; chunks of prompts follow and go to the prefill kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from mainsail_engine.model.lora import AdapterRows
from mainsail_kernels.attention_decode import DecodeWorkspace, goes_beside, paged_attention_decode
from mainsail_kernels.attention_prefill import paged_attention_prefill
from mainsail_kernels.kv_write import rope_and_write_kv
from mainsail_kernels.reference_quantized import FP8


class KVScales(NamedTuple):
    """Of a layer whose KV cache is in FP8: what is stored is keys and values over these."""

    key: float = 1.0
    value: float = 1.0


UNSCALED = KVScales()


@dataclass(slots=True)
class Attention:
    positions: torch.Tensor
    """[num_tokens] int64: each token's position in its sequence."""
    slot_mapping: torch.Tensor
    """[num_tokens] int64: block * 16 + offset where the token's KV goes."""
    block_tables: torch.Tensor
    """[num_decodes + num_chunks, max_blocks] int32."""
    chunk_start: torch.Tensor
    """[num_chunks + 1] int32: the first row of each chunk of a prompt in the batch."""
    seq_lens: torch.Tensor
    """[num_decodes + num_chunks] int32: context including this step's tokens; 0 for a padding row."""
    num_decodes: int
    """Sequences with one query each, which come first. Padding rows may be among them: chunks overwrite theirs."""
    max_query_len: int
    """Of the chunks; an upper bound will do."""
    workspace: DecodeWorkspace | None = None
    """The decode kernel's scratch, one for all steps of a stream (CUDA)."""
    room: torch.Tensor | None = None
    """[tiles, num_kv_heads, head_dim, 128] FP8 (`mainsail_kernels.kv_transpose.room_shape`): where long chunks' values
    of a cache in FP8 are transposed, for attention to multiply bytes. None: they are not."""
    adapters: AdapterRows | None = None
    """Which rows go through which LoRA adapter. None: no row does."""
    wanted: torch.Tensor | None = None
    """[num_wanted] integer: the rows whose hidden states the forward pass is asked for. None: all."""

    def only_wanted(self, hidden: torch.Tensor) -> torch.Tensor:
        """[num_tokens, n] to [num_wanted, n]."""
        return hidden if self.wanted is None else hidden[self.wanted]

    def attend(
        self,
        query: torch.Tensor,
        kv: torch.Tensor,
        scale: float,
        *,
        window: int = 0,
        soft_cap: float = 0.0,
        sinks: torch.Tensor | None = None,
        kv_scales: KVScales = UNSCALED,
    ) -> torch.Tensor:
        """query [num_tokens, num_heads, head_dim] to its context in kv: the same shape.

        window: how many of the newest tokens are seen, its own among them (0: all); soft_cap bounds the scores (0: no);
        sinks [num_heads] are scores that take part in the softmax only.
        kv_scales: of a kv in FP8; keys and values are what it holds times these.
        """
        if kv.dtype == FP8:
            scale *= kv_scales.key
        n = self.num_decodes
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        chunks = len(self.seq_lens) > n and self.max_query_len > 0
        beside = bool(n) and chunks and goes_beside(query[:n], kv, window, soft_cap, sinks)
        if n and not beside:
            self._decode(query[:n], kv, scale, window, soft_cap, sinks, out[:n])
        if chunks:
            self._prefill(query, kv, scale, window, soft_cap, sinks, out)
        if beside:
            self._decode(query[:n], kv, scale, window, soft_cap, sinks, out[:n], beside=True)
        return out if kv.dtype != FP8 or kv_scales.value == 1.0 else out.mul_(kv_scales.value)

    def rotate_and_write(
        self,
        qkv: torch.Tensor,
        kv: torch.Tensor,
        cos_sin: torch.Tensor,
        *,
        num_heads: int,
        num_kv_heads: int,
        q_norm: torch.Tensor | None,
        k_norm: torch.Tensor | None,
        eps: float,
        kv_scales: KVScales = UNSCALED,
    ) -> torch.Tensor:
        """Norm and rotate qkv's heads, write keys and values to kv: queries [num_tokens, num_heads, head_dim]."""
        return rope_and_write_kv(
            qkv, self.positions, cos_sin, kv, self.slot_mapping,
            num_heads=num_heads, num_kv_heads=num_kv_heads, q_norm=q_norm, k_norm=k_norm, eps=eps,
            k_scale=kv_scales.key, v_scale=kv_scales.value,
        )  # fmt: skip

    def _decode(
        self, query: torch.Tensor, kv: torch.Tensor, scale: float, window: int, soft_cap: float,
        sinks: torch.Tensor | None, out: torch.Tensor, *, beside: bool = False,
    ) -> None:  # fmt: skip
        n = self.num_decodes
        paged_attention_decode(
            query, kv, self.block_tables[:n], self.seq_lens[:n], scale,
            sliding_window=window, soft_cap=soft_cap, sinks=sinks, workspace=self.workspace, out=out,
            padded=len(self.seq_lens) > n, beside=beside,
        )  # fmt: skip

    def _prefill(
        self, query: torch.Tensor, kv: torch.Tensor, scale: float, window: int, soft_cap: float,
        sinks: torch.Tensor | None, out: torch.Tensor,
    ) -> None:  # fmt: skip
        n = self.num_decodes
        paged_attention_prefill(
            query, kv, self.block_tables[n:], self.chunk_start, self.seq_lens[n:], self.max_query_len, scale,
            sliding_window=window, soft_cap=soft_cap, sinks=sinks, out=out, room=self.room,
        )  # fmt: skip
