"""Attention on the CPU: what the kernels do on a GPU, in few PyTorch operations, with nothing computed twice a step.

What all layers share (cosines and sines of the step's positions, where blocks lie, what is padding) is made once. One
decode gathers its batch's blocks of a layer with a single `index_select` into a buffer that is kept, straight into the
layout of attention, [K/V, num_seqs, num_kv_heads, length, head_dim]:

    kv as rows [num_blocks * 2 * num_kv_heads, 16 * head_dim]        row = (block * 2 + side) * num_kv_heads + head

Rows that belong to no token of their sequence are set to zero in the buffer, since whatever a block holds there, NaN
included, would reach the sum as 0 * NaN.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from mainsail_engine.config import BLOCK_SIZE
from mainsail_engine.model.attention import Attention


@dataclass(slots=True)
class Gather:
    """Where one step's decodes find their context, for any layer."""

    rows: torch.Tensor
    """[2 * num_seqs * num_kv_heads * blocks] int64: rows of a layer's cache."""
    padding: torch.Tensor
    """int64: positions of the gathered buffer [2 * num_seqs * num_kv_heads * length] that no sequence owns."""
    mask: torch.Tensor | None
    """[num_seqs, 1, 1, length] bool: what a sequence sees; None when all lengths are the buffer's."""
    buffer: torch.Tensor
    """[2 * num_seqs * num_kv_heads * blocks, 16 * head_dim]."""


def plan_gather(block_tables: torch.Tensor, seq_lens: torch.Tensor, kv: torch.Tensor) -> Gather:
    """block_tables [num_seqs, >= blocks] int32, seq_lens [num_seqs] int32, kv any layer's cache."""
    heads, head_dim, n = kv.shape[2], kv.shape[4], seq_lens.shape[0]
    blocks = -(-int(seq_lens.max()) // BLOCK_SIZE)
    side_head = torch.arange(2 * heads).view(2, 1, heads, 1)
    rows = block_tables[:, :blocks].long().view(1, n, 1, blocks) * (2 * heads) + side_head
    seen = torch.arange(blocks * BLOCK_SIZE) < seq_lens[:, None]
    hidden = (~seen)[None, :, None, :].expand(2, n, heads, blocks * BLOCK_SIZE).reshape(-1)
    padding = hidden.nonzero().squeeze(1)
    return Gather(
        rows=rows.reshape(-1),
        padding=padding,
        mask=seen[:, None, None, :] if padding.numel() else None,
        buffer=torch.empty(rows.numel(), BLOCK_SIZE * head_dim, dtype=kv.dtype),
    )


@dataclass(slots=True)
class CpuAttention(Attention):
    _rotations: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(
        default_factory=dict[int, tuple[torch.Tensor, torch.Tensor]], init=False
    )
    """By the identity of the table: some models rotate different layers differently."""
    _gather: Gather | None = field(default=None, init=False)
    _windows: dict[int, torch.Tensor | None] = field(default_factory=dict[int, torch.Tensor | None], init=False)
    """By window: what a sequence sees of the gathered buffer."""

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
    ) -> torch.Tensor:
        head_dim = kv.shape[-1]
        if cos_sin.shape[1] != head_dim or (q_norm is not None and q_norm.dtype != qkv.dtype):
            return Attention.rotate_and_write(
                self, qkv, kv, cos_sin, num_heads=num_heads, num_kv_heads=num_kv_heads,
                q_norm=q_norm, k_norm=k_norm, eps=eps,
            )  # fmt: skip
        heads = qkv.view(qkv.shape[0], num_heads + 2 * num_kv_heads, head_dim)
        moving = heads[:, : num_heads + num_kv_heads]
        if q_norm is not None and k_norm is not None:
            queries = F.rms_norm(moving[:, :num_heads], (head_dim,), q_norm, eps)
            moving = torch.cat((queries, F.rms_norm(moving[:, num_heads:], (head_dim,), k_norm, eps)), dim=1)
        if id(cos_sin) not in self._rotations:
            self._rotations[id(cos_sin)] = _rotation(cos_sin, self.positions, qkv.dtype)
        cos, sin = self._rotations[id(cos_sin)]
        rotated = torch.addcmul(moving * cos, moving.roll(head_dim // 2, -1), sin)
        places = kv.permute(0, 3, 1, 2, 4)  # [num_blocks, 16, 2, num_kv_heads, head_dim]
        blocks, offsets = self.slot_mapping // BLOCK_SIZE, self.slot_mapping % BLOCK_SIZE
        places[blocks, offsets] = torch.stack((rotated[:, num_heads:], heads[:, num_heads + num_kv_heads :]), dim=1)
        return rotated[:, :num_heads]

    def _decode(
        self, query: torch.Tensor, kv: torch.Tensor, scale: float, window: int, soft_cap: float, out: torch.Tensor
    ) -> None:
        if soft_cap:
            Attention._decode(self, query, kv, scale, window, soft_cap, out)
            return
        n, num_heads, head_dim = query.shape
        kv_heads = kv.shape[2]
        if self._gather is None:
            self._gather = plan_gather(self.block_tables[:n], self.seq_lens[:n], kv)
        gather = self._gather
        torch.index_select(kv.view(-1, BLOCK_SIZE * head_dim), 0, gather.rows, out=gather.buffer)
        if gather.mask is not None:
            gather.buffer.view(-1, head_dim).index_fill_(0, gather.padding, 0.0)
        key, value = gather.buffer.view(2, n, kv_heads, -1, head_dim)
        packed = query.reshape(n, kv_heads, num_heads // kv_heads, head_dim)
        mask = self._mask(gather, window, key.shape[2])
        mixed = F.scaled_dot_product_attention(packed, key, value, attn_mask=mask, scale=scale)
        out.copy_(mixed.reshape(n, num_heads, head_dim))

    def _mask(self, gather: Gather, window: int, length: int) -> torch.Tensor | None:
        """[num_seqs, 1, 1, length] bool: what the decodes see; None: everything."""
        if not window:
            return gather.mask
        if window not in self._windows:
            lens = self.seq_lens[: self.num_decodes, None]
            position = torch.arange(length)
            seen = (position < lens) & (position >= lens - window)
            self._windows[window] = seen[:, None, None, :]
        return self._windows[window]


def _rotation(cos_sin: torch.Tensor, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(cosines, signed sines), each [num_tokens, 1, head_dim]: x * cos + (x with its halves swapped) * sin rotates."""
    cos, sin = cos_sin[positions].to(dtype).unsqueeze(1).chunk(2, dim=-1)
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
