"""What a layer's attention needs to know of a ragged batch: built once a step, used by every layer.

Decodes (one query each) come first and go to the decode kernel; chunks of prompts follow and go to the prefill kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mainsail_kernels import reference
from mainsail_kernels.attention_prefill import paged_attention_prefill


@dataclass(slots=True)
class Attention:
    positions: torch.Tensor
    """[num_tokens] int64: each token's position in its sequence."""
    slot_mapping: torch.Tensor
    """[num_tokens] int64: block * 16 + offset where the token's KV goes."""
    block_tables: torch.Tensor
    """[num_seqs, max_blocks] int32."""
    query_start: torch.Tensor
    """[num_seqs + 1] int32: the first token of each sequence in the batch."""
    seq_lens: torch.Tensor
    """[num_seqs] int32: context including this step's tokens."""
    num_decodes: int
    """Sequences with one query each, which come first."""
    max_query_len: int

    def attend(self, query: torch.Tensor, kv: torch.Tensor, scale: float) -> torch.Tensor:
        """query [num_tokens, num_heads, head_dim] to its context in kv: the same shape."""
        n = self.num_decodes
        if n == 0:
            return self._prefill(query, kv, scale, 0)
        decoded = self._decode(query[:n], kv, scale)
        if n == query.shape[0]:
            return decoded
        return torch.cat([decoded, self._prefill(query[n:], kv, scale, n)])

    def _decode(self, query: torch.Tensor, kv: torch.Tensor, scale: float) -> torch.Tensor:
        n = self.num_decodes
        if query.is_cuda:
            return paged_attention_prefill(
                query, kv, self.block_tables[:n], self.query_start[: n + 1], self.seq_lens[:n], 1, scale
            )
        return reference.paged_attention_decode(query, kv, self.block_tables[:n], self.seq_lens[:n], scale)

    def _prefill(self, query: torch.Tensor, kv: torch.Tensor, scale: float, first: int) -> torch.Tensor:
        starts = self.query_start[first:] - first if first else self.query_start
        return paged_attention_prefill(
            query, kv, self.block_tables[first:], starts, self.seq_lens[first:], self.max_query_len, scale
        )
