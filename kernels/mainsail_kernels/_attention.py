"""What both attention kernels share: the checks of their arguments and the arithmetic of one score tile.

Scores are kept in base 2 (exp2 is one instruction): scale * log2(e) is folded into one factor, and a soft cap
c * tanh(s / c) is computed through exp2 as well. The softmax over tiles is online (Milakov and Gimelshein, 2018;
Dao et al., "FlashAttention", 2022).

A *sink* (Xiao et al., "Efficient Streaming Language Models with Attention Sinks", 2023; learned in gpt-oss) is a score
of each head, of no position: it takes part in the softmax, and its weight goes to nothing.
"""

import torch

from mainsail_kernels._triton import require, tl, triton
from mainsail_kernels.reference_quantized import FP8

LOG2_E = 1.4426950408889634


@triton.jit
def beside_cache(q, cache_type: tl.constexpr):
    """Queries in the type that they are multiplied in with keys of the cache's.

    e4m3 becomes float16 in one instruction for two numbers, and bfloat16 in four: with a cache in FP8 products of
    bfloat16 would take longer than the cache's bytes. Every e4m3 number is a float16 one. Queries past its range, which
    no trained model has, end at its largest.
    """
    beside = q
    if cache_type == tl.float8e4nv and q.dtype == tl.bfloat16:
        beside = tl.minimum(tl.maximum(q.to(tl.float32), -65504.0), 65504.0).to(tl.float16)
    return beside


@triton.jit
def scaled_scores(scores, scale, soft_cap, SOFT_CAP: tl.constexpr):
    """Raw dot products to base-2 scores."""
    if SOFT_CAP:
        # tanh(y) = 1 - 2 / (1 + exp(2y)): right at both ends, where exp gives 0 or inf
        doubled = tl.exp2(scores * (scale * 2.0 * 1.4426950408889634 / soft_cap))
        return (soft_cap * 1.4426950408889634) * (1.0 - 2.0 / (1.0 + doubled))
    return scores * (scale * 1.4426950408889634)


@triton.jit
def sink_weight(sinks_ptr, head, inside, top):
    """What the sinks of these heads add to sums of weights whose largest score (base 2) is top: to be summed, no more.

    A row that saw nothing (top -inf) gets infinity, and its sum of values, 0, over that is 0.
    """
    sink = tl.load(sinks_ptr + head, mask=inside, other=0.0).to(tl.float32)
    return tl.exp2(sink * 1.4426950408889634 - top)


def check_attention(
    query: torch.Tensor,
    kv: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    soft_cap: float,
    sinks: torch.Tensor | None = None,
) -> None:
    """Raise ValueError unless the tensors of an attention call fit together."""
    same = kv.dtype in (query.dtype, FP8)
    require(same, f"kv must be {query.dtype} as the queries, or float8_e4m3fn, not {kv.dtype}")
    require(query.dim() == 3 and query.stride(2) == 1, f"query must be [n, heads, dim], got {tuple(query.shape)}")
    require(kv.dim() == 5 and kv.shape[1] == 2, f"kv must be [blocks, 2, heads, size, dim], got {tuple(kv.shape)}")
    require(kv.stride(4) == 1 and kv.stride(3) == kv.shape[4], "kv: the (size, dim) tile must be contiguous")
    require(query.shape[2] == kv.shape[4], f"head_dim is {query.shape[2]} in query and {kv.shape[4]} in kv")
    grouped = query.shape[1] % kv.shape[2] == 0
    require(grouped, f"{query.shape[1]} query heads are no multiple of {kv.shape[2]} KV heads")
    require(seq_lens.dim() == 1 and seq_lens.dtype == torch.int32, "seq_lens must be [num_seqs] int32")
    tables = block_tables.dim() == 2 and block_tables.dtype == torch.int32 and block_tables.stride(1) == 1
    require(
        tables and block_tables.shape[0] == seq_lens.shape[0],
        f"block_tables must be [{seq_lens.shape[0]}, max_blocks] int32, got {tuple(block_tables.shape)}",
    )
    require(scale > 0, f"scale must be positive, got {scale}")
    fits = sinks is None or (sinks.shape == (query.shape[1],) and sinks.is_contiguous() and sinks.is_floating_point())
    require(fits, f"sinks must be contiguous floats [{query.shape[1]}], got {None if sinks is None else sinks.shape}")
    require(soft_cap >= 0, f"soft_cap must be 0 (off) or positive, got {soft_cap}")
