"""Attention on the CPU: what the kernels do on a GPU, in few PyTorch operations, with nothing computed twice a step.

What all layers share (cosines and sines of the step's positions, where blocks lie, what is hidden from whom) is made
once. All decodes together gather their blocks of a layer with a single `index_select` into a buffer that is kept,
straight into the layout of attention, and are two batched products around a softmax:

    kv as rows [num_blocks * 2 * num_kv_heads, 16 * head_dim]        row = (block * 2 + side) * num_kv_heads + head
    buffer     [K/V, num_seqs, num_kv_heads, length, head_dim]

Chunks of prompts do the same one by one, with a fused kernel between. Rows of a buffer that belong to no token of their
sequence are set to zero, since whatever a block holds there, NaN included, would reach the sum as 0 * NaN.

Scores and weights are in the model's dtype, sums within an operation in float32: in bfloat16 a score has 8 bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from mainsail_engine.config import BLOCK_SIZE
from mainsail_engine.model.attention import UNSCALED, Attention, KVScales
from mainsail_kernels.reference import as_cached, softmax
from mainsail_kernels.reference_quantized import FP8


@dataclass(slots=True)
class Gather:
    """Where some sequences of one step find their context, for any layer."""

    rows: torch.Tensor
    """[2 * num_seqs * num_kv_heads * blocks] int64: rows of a layer's cache."""
    padding: torch.Tensor
    """int64: positions of the gathered buffer [2 * num_seqs * num_kv_heads * length] that no sequence owns."""
    buffer: torch.Tensor
    """[2 * num_seqs * num_kv_heads * blocks, 16 * head_dim], of a cache in FP8 the bytes."""

    def read(self, kv: torch.Tensor, num_seqs: int, dtype: torch.dtype) -> torch.Tensor:
        """Keys and values of a layer, [2, num_seqs * num_kv_heads, length, head_dim]. Valid until the next read.

        dtype: what a kv in FP8 is converted to; another has it already."""
        head_dim = kv.shape[4]
        cached = kv.view(torch.uint8) if kv.dtype == FP8 else kv
        torch.index_select(cached.view(-1, BLOCK_SIZE * head_dim), 0, self.rows, out=self.buffer)
        if self.padding.numel():
            self.buffer.view(-1, head_dim).index_fill_(0, self.padding, 0)
        found = self.buffer.view(FP8).to(dtype) if kv.dtype == FP8 else self.buffer
        return found.view(2, num_seqs * kv.shape[2], -1, head_dim)


def plan_gather(block_tables: torch.Tensor, seq_lens: torch.Tensor, kv: torch.Tensor) -> Gather:
    """block_tables [num_seqs, >= blocks] int32, seq_lens [num_seqs] int32, kv any layer's cache."""
    heads, head_dim, n = kv.shape[2], kv.shape[4], seq_lens.shape[0]
    blocks = -(-int(seq_lens.max()) // BLOCK_SIZE)
    side_head = torch.arange(2 * heads).view(2, 1, heads, 1)
    rows = block_tables[:, :blocks].long().view(1, n, 1, blocks) * (2 * heads) + side_head
    foreign = torch.arange(blocks * BLOCK_SIZE) >= seq_lens[:, None]
    padding = foreign[None, :, None, :].expand(2, n, heads, blocks * BLOCK_SIZE).reshape(-1).nonzero().squeeze(1)
    held = torch.uint8 if kv.dtype == FP8 else kv.dtype
    buffer = torch.empty(rows.numel(), BLOCK_SIZE * head_dim, dtype=held)
    return Gather(rows.reshape(-1), padding, buffer)


@dataclass(slots=True)
class ChunkPlan:
    """One chunk of a prompt: its rows of the batch, its context, what each of its rows sees."""

    first: int
    last: int
    context: int
    """Tokens of its sequence, its own included."""
    gather: Gather
    masks: dict[int, torch.Tensor]
    """By window: [group * num_queries, length] bool."""


@dataclass(slots=True)
class CpuAttention(Attention):
    _rotations: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(
        default_factory=dict[int, tuple[torch.Tensor, torch.Tensor]], init=False
    )
    """By the identity of the table: some models rotate different layers differently."""
    _places: torch.Tensor | None = field(default=None, init=False)
    """[num_tokens * 2 * num_kv_heads] int64: rows of a layer's cache, as [.., head_dim], that the tokens write."""
    _gather: Gather | None = field(default=None, init=False)
    _hidden: dict[int, torch.Tensor] = field(default_factory=dict[int, torch.Tensor], init=False)
    """By window: 0 where a decode sees a position of its gathered buffer, -inf elsewhere."""
    _chunks: list[ChunkPlan] | None = field(default=None, init=False)

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
        head_dim = kv.shape[-1]
        if cos_sin.shape[1] != head_dim or (q_norm is not None and q_norm.dtype != qkv.dtype):
            return Attention.rotate_and_write(
                self, qkv, kv, cos_sin, num_heads=num_heads, num_kv_heads=num_kv_heads,
                q_norm=q_norm, k_norm=k_norm, eps=eps, kv_scales=kv_scales,
            )  # fmt: skip
        heads = qkv.view(qkv.shape[0], num_heads + 2 * num_kv_heads, head_dim)
        if q_norm is not None and k_norm is not None:
            query = F.rms_norm(heads[:, :num_heads], (head_dim,), q_norm, eps)
            key = F.rms_norm(heads[:, num_heads : num_heads + num_kv_heads], (head_dim,), k_norm, eps)
            heads = torch.cat((query, key, heads[:, num_heads + num_kv_heads :]), dim=1)
        if id(cos_sin) not in self._rotations:
            self._rotations[id(cos_sin)] = _rotation(cos_sin, self.positions, qkv.dtype)
        cos, sin = self._rotations[id(cos_sin)]
        moving = heads[:, : num_heads + num_kv_heads]
        rotated = torch.addcmul(moving * cos, moving.roll(head_dim // 2, -1), sin)
        if self._places is None:
            self._places = _places(self.slot_mapping, num_kv_heads)
        key, value = rotated[:, num_heads:], heads[:, num_heads + num_kv_heads :]
        if kv.dtype == FP8:
            halves = zip((key, value), kv_scales, strict=True)
            key, value = (as_cached(half, FP8, by).view(torch.uint8) for half, by in halves)
            kv = kv.view(torch.uint8)
        written = torch.cat((key, value), dim=1)
        kv.view(-1, head_dim).index_copy_(0, self._places, written.view(-1, head_dim))
        return rotated[:, :num_heads]

    def _decode(
        self, query: torch.Tensor, kv: torch.Tensor, scale: float, window: int, soft_cap: float,
        sinks: torch.Tensor | None, out: torch.Tensor, *, beside: bool = False,
    ) -> None:  # fmt: skip
        del beside  # of kernels
        if soft_cap:
            Attention._decode(self, query, kv, scale, window, soft_cap, sinks, out)
            return
        n, num_heads, head_dim = query.shape
        kv_heads = kv.shape[2]
        if self._gather is None:
            self._gather = plan_gather(self.block_tables[:n], self.seq_lens[:n], kv)
        key, value = self._gather.read(kv, n, query.dtype)
        packed = query.reshape(n * kv_heads, num_heads // kv_heads, head_dim)
        hidden = self._hidden_from(packed, key.shape[1], window)
        scores = torch.baddbmm(hidden, packed, key.transpose(1, 2), alpha=scale)
        of_rows = None if sinks is None else sinks.view(kv_heads, -1, 1).repeat(n, 1, 1)
        weights = softmax(scores, of_rows)
        torch.bmm(weights, value, out=out.view(packed.shape))

    def _hidden_from(self, packed: torch.Tensor, length: int, window: int) -> torch.Tensor:
        """[num_seqs * num_kv_heads, group, length] in packed's dtype: 0 for what a decode sees, else -inf."""
        if window not in self._hidden:
            n = self.num_decodes
            lens, position = self.seq_lens[:n, None], torch.arange(length)
            seen = position < lens
            if window:
                seen &= position >= lens - window
            bias = torch.zeros(n, 1, length, dtype=packed.dtype).masked_fill_(~seen[:, None], -math.inf)
            heads = packed.shape[0] // n
            self._hidden[window] = bias.repeat_interleave(heads, 0).repeat(1, packed.shape[1], 1)
        return self._hidden[window]

    def _prefill(
        self, query: torch.Tensor, kv: torch.Tensor, scale: float, window: int, soft_cap: float,
        sinks: torch.Tensor | None, out: torch.Tensor,
    ) -> None:  # fmt: skip
        if soft_cap or sinks is not None:
            Attention._prefill(self, query, kv, scale, window, soft_cap, sinks, out)
            return
        if self._chunks is None:
            self._chunks = self._plan_chunks(kv)
        for chunk in self._chunks:
            _attend(chunk, query[chunk.first : chunk.last], kv, scale, window, out[chunk.first : chunk.last])

    def _plan_chunks(self, kv: torch.Tensor) -> list[ChunkPlan]:
        tables, lens = self.block_tables[self.num_decodes :], self.seq_lens[self.num_decodes :]
        starts: list[int] = self.chunk_start.numpy().tolist()
        contexts: list[int] = lens.numpy().tolist()
        return [
            ChunkPlan(first, last, context, plan_gather(tables[row : row + 1], lens[row : row + 1], kv), {})
            for row, (first, last, context) in enumerate(zip(starts, starts[1:], contexts, strict=False))
            if last > first
        ]


def _attend(
    chunk: ChunkPlan, query: torch.Tensor, kv: torch.Tensor, scale: float, window: int, out: torch.Tensor
) -> None:
    """query and out [num_queries, num_heads, head_dim]: those of the chunk, the newest positions of its context."""
    num_queries, num_heads, head_dim = query.shape
    kv_heads = kv.shape[2]
    group = num_heads // kv_heads
    key, value = chunk.gather.read(kv, 1, query.dtype)
    if window not in chunk.masks:
        chunk.masks[window] = _causal(chunk, num_queries, key.shape[1], window).repeat(group, 1)
    packed = query.view(num_queries, kv_heads, group, head_dim).permute(1, 2, 0, 3)
    packed = packed.reshape(1, kv_heads, group * num_queries, head_dim)
    mixed = F.scaled_dot_product_attention(
        packed, key[None], value[None], attn_mask=chunk.masks[window], scale=scale
    )  # fmt: skip
    out.copy_(mixed.view(kv_heads, group, num_queries, head_dim).permute(2, 0, 1, 3).flatten(1, 2))


def _causal(chunk: ChunkPlan, num_queries: int, length: int, window: int) -> torch.Tensor:
    """[num_queries, length] bool: what each of the newest num_queries of the context's tokens sees."""
    at = torch.arange(chunk.context - num_queries, chunk.context)[:, None]
    position = torch.arange(length)
    seen = position <= at
    return seen & (position > at - window) if window else seen


def _places(slot_mapping: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """Rows of a layer's cache, as [num_blocks * 2 * num_kv_heads * 16, head_dim], in the order token, side, head."""
    blocks, offsets = slot_mapping // BLOCK_SIZE, slot_mapping % BLOCK_SIZE
    side_head = torch.arange(2 * num_kv_heads)
    return ((blocks[:, None] * (2 * num_kv_heads) + side_head) * BLOCK_SIZE + offsets[:, None]).reshape(-1)


def _rotation(cos_sin: torch.Tensor, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(cosines, signed sines), each [num_tokens, 1, head_dim]: x * cos + (x with its halves swapped) * sin rotates."""
    cos, sin = cos_sin[positions].to(dtype).unsqueeze(1).chunk(2, dim=-1)
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
