"""QK norm, rotary embedding and the KV cache write of one layer, fused: qkv is read once, nothing in between stored.

    qkv row:   | q heads ........ | k heads .. | v heads .. |
                 norm, rotate       norm, rotate   as it is
                      |                  |            |
                 returned        kv[block, 0, head, offset]   kv[block, 1, head, offset]

Rotation pairs channel i with i + rotary_dim/2 (neox style; Su et al., "RoFormer", 2021). Channels past rotary_dim,
the width of the cos|sin table, pass through. A slot of -1 writes nothing: padding rows.
"""

import torch

from mainsail_kernels import reference
from mainsail_kernels._fp8 import to_e4m3
from mainsail_kernels._triton import (
    INTERPRETED,
    dependent_launch,
    next_power_of_2,
    require,
    runs_kernels,
    tl,
    triton,
    wait_for_inputs,
)
from mainsail_kernels.reference_quantized import FP8

_HEADS_PER_PROGRAM = 16


@triton.jit
def _rope_write_kernel(
    qkv_ptr,
    positions_ptr,
    cos_sin_ptr,
    kv_ptr,
    slots_ptr,
    q_norm_ptr,
    k_norm_ptr,
    query_ptr,
    qkv_stride,
    kv_block_stride,
    kv_side_stride,
    kv_head_stride,
    eps,
    k_scale,
    v_scale,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PADDED: tl.constexpr,
    REST_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HAS_Q_NORM: tl.constexpr,
    HAS_K_NORM: tl.constexpr,
    HEADS: tl.constexpr,
    FP8: tl.constexpr,
    ROUND: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """HEADS heads (queries, keys, then values) of one token: normed, rotated, and to query_ptr or the cache."""
    token = tl.program_id(0).to(tl.int64)
    position = tl.load(positions_ptr + token).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    channel = tl.arange(0, HALF_PADDED)[None, :]
    real = head < NUM_HEADS + 2 * NUM_KV_HEADS
    is_query = head < NUM_HEADS
    is_value = head >= NUM_HEADS + NUM_KV_HEADS
    fits = real & (channel < HALF)
    row = qkv_ptr + token * qkv_stride + head * HEAD_DIM
    wait_for_inputs(DEPENDENT)
    first = tl.load(row + channel, mask=fits, other=0.0).to(tl.float32)
    second = tl.load(row + HALF + channel, mask=fits, other=0.0).to(tl.float32)

    slot = tl.load(slots_ptr + token + tl.zeros_like(head)).to(tl.int64)  # one value, in every lane
    kv_head = tl.where(is_value, head - NUM_HEADS - NUM_KV_HEADS, head - NUM_HEADS)
    kv_offset = (slot // BLOCK_SIZE) * kv_block_stride + is_value.to(tl.int64) * kv_side_stride
    kv_offset += kv_head * kv_head_stride + (slot % BLOCK_SIZE) * HEAD_DIM
    writes = (head >= NUM_HEADS) & real & (slot >= 0)
    q_offset = (token * NUM_HEADS + head) * HEAD_DIM

    if REST_PADDED > 0:
        tail = tl.arange(0, REST_PADDED)[None, :]
        tail_fits = real & (tail < HEAD_DIM - 2 * HALF)
        rest = tl.load(row + 2 * HALF + tail, mask=tail_fits, other=0.0).to(tl.float32)
    if HAS_Q_NORM or HAS_K_NORM:
        squares = tl.sum(first * first + second * second, axis=1)
        if REST_PADDED > 0:
            squares += tl.sum(rest * rest, axis=1)
        scale = (1.0 / tl.sqrt(squares / HEAD_DIM + eps))[:, None]
        if HAS_Q_NORM:
            low = tl.load(q_norm_ptr + channel, mask=channel < HALF, other=0.0).to(tl.float32)
            high = tl.load(q_norm_ptr + HALF + channel, mask=channel < HALF, other=0.0).to(tl.float32)
            first = tl.where(is_query, first * scale * low, first)
            second = tl.where(is_query, second * scale * high, second)
        if HAS_K_NORM:
            is_key = (head >= NUM_HEADS) & (head < NUM_HEADS + NUM_KV_HEADS)
            low = tl.load(k_norm_ptr + channel, mask=channel < HALF, other=0.0).to(tl.float32)
            high = tl.load(k_norm_ptr + HALF + channel, mask=channel < HALF, other=0.0).to(tl.float32)
            first = tl.where(is_key, first * scale * low, first)
            second = tl.where(is_key, second * scale * high, second)
        if REST_PADDED > 0:
            in_tail = tail < HEAD_DIM - 2 * HALF
            if HAS_Q_NORM:
                weight = tl.load(q_norm_ptr + 2 * HALF + tail, mask=in_tail, other=0.0).to(tl.float32)
                rest = tl.where(is_query, rest * scale * weight, rest)
            if HAS_K_NORM:
                weight = tl.load(k_norm_ptr + 2 * HALF + tail, mask=in_tail, other=0.0).to(tl.float32)
                rest = tl.where(is_key, rest * scale * weight, rest)

    angles = cos_sin_ptr + position * (2 * HALF) + channel
    cos = tl.load(angles, mask=channel < HALF, other=0.0).to(tl.float32)
    sin = tl.load(angles + HALF, mask=channel < HALF, other=0.0).to(tl.float32)
    cos = tl.where(is_value, 1.0, cos)
    sin = tl.where(is_value, 0.0, sin)
    # Values skip the arithmetic: 0 * inf of a neighbouring channel must not reach them.
    turned_first = tl.where(is_value, first, first * cos - second * sin)
    turned_second = tl.where(is_value, second, second * cos + first * sin)
    query = query_ptr + q_offset + channel
    cached = kv_ptr + kv_offset + channel
    tl.store(query, turned_first.to(query_ptr.dtype.element_ty), mask=is_query & fits)
    tl.store(query + HALF, turned_second.to(query_ptr.dtype.element_ty), mask=is_query & fits)
    if FP8:
        scale = tl.where(is_value, v_scale, k_scale)
        tl.store(cached, to_e4m3(turned_first / scale, ROUND), mask=writes & fits)
        tl.store(cached + HALF, to_e4m3(turned_second / scale, ROUND), mask=writes & fits)
    else:
        tl.store(cached, turned_first.to(kv_ptr.dtype.element_ty), mask=writes & fits)
        tl.store(cached + HALF, turned_second.to(kv_ptr.dtype.element_ty), mask=writes & fits)
    if REST_PADDED > 0:
        query = query_ptr + q_offset + 2 * HALF + tail
        cached = kv_ptr + kv_offset + 2 * HALF + tail
        tl.store(query, rest.to(query_ptr.dtype.element_ty), mask=is_query & tail_fits)
        if FP8:
            tl.store(cached, to_e4m3(rest / scale, ROUND), mask=writes & tail_fits)
        else:
            tl.store(cached, rest.to(kv_ptr.dtype.element_ty), mask=writes & tail_fits)


def rope_and_write_kv(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    kv: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 1e-6,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> torch.Tensor:
    """Norm (when weights [head_dim] are given) and rotate q and k, write k and v to kv; returns the queries.

    qkv [num_tokens, (num_heads + 2*num_kv_heads) * head_dim]; positions [num_tokens]; cos_sin [max_pos, rotary_dim]
    (cosines, then sines); kv [num_blocks, 2, num_kv_heads, block_size, head_dim] of one layer; slot_mapping
    [num_tokens] int64, block * block_size + offset, or -1 to write nothing. Returns [num_tokens, num_heads, head_dim].
    kv of e4m3 gets keys over k_scale and values over v_scale, which otherwise do nothing.
    Raises ValueError when the shapes do not fit together. Slots must differ from one another.
    """
    num_tokens = _check(qkv, positions, cos_sin, kv, slot_mapping, num_heads, num_kv_heads)
    if not runs_kernels(qkv):
        return reference.rope_and_write_kv(
            qkv,
            positions,
            cos_sin,
            kv,
            slot_mapping,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            q_norm=q_norm,
            k_norm=k_norm,
            eps=eps,
            k_scale=k_scale,
            v_scale=v_scale,
        )
    head_dim, half = kv.shape[4], cos_sin.shape[1] // 2
    query = torch.empty((num_tokens, num_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    if num_tokens == 0:
        return query
    rest = head_dim - 2 * half
    grid = (num_tokens, -(-(num_heads + 2 * num_kv_heads) // _HEADS_PER_PROGRAM))
    _rope_write_kernel[grid](
        qkv,
        positions,
        cos_sin,
        kv,
        slot_mapping,
        q_norm if q_norm is not None else qkv,
        k_norm if k_norm is not None else qkv,
        query,
        qkv.stride(0),
        kv.stride(0),
        kv.stride(1),
        kv.stride(2),
        eps,
        k_scale,
        v_scale,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        HALF=half,
        HALF_PADDED=next_power_of_2(half),
        REST_PADDED=next_power_of_2(rest) if rest else 0,
        BLOCK_SIZE=kv.shape[3],
        HAS_Q_NORM=q_norm is not None,
        HAS_K_NORM=k_norm is not None,
        HEADS=_HEADS_PER_PROGRAM,
        FP8=kv.dtype == FP8,
        ROUND=INTERPRETED,
        num_warps=max(_HEADS_PER_PROGRAM // 4, 1),
        **dependent_launch(qkv.device, rows=num_tokens),
    )
    return query


def _check(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    kv: torch.Tensor,
    slot_mapping: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
) -> int:
    """The number of tokens, once every shape has been found to fit."""
    require(kv.dim() == 5 and kv.shape[1] == 2, f"kv must be [blocks, 2, heads, size, dim], got {tuple(kv.shape)}")
    require(kv.shape[2] == num_kv_heads, f"kv holds {kv.shape[2]} heads, num_kv_heads is {num_kv_heads}")
    require(kv[0, 0, 0].is_contiguous(), "kv: the (block_size, head_dim) tile of a head must be contiguous")
    head_dim = kv.shape[4]
    width = (num_heads + 2 * num_kv_heads) * head_dim
    require(qkv.dim() == 2 and qkv.shape[1] == width, f"qkv must be [num_tokens, {width}], got {tuple(qkv.shape)}")
    require(qkv.stride(1) == 1, "qkv: the last dimension must be contiguous")
    num_tokens = qkv.shape[0]
    require(positions.shape == (num_tokens,), f"positions must be [{num_tokens}], got {tuple(positions.shape)}")
    require(
        slot_mapping.shape == (num_tokens,), f"slot_mapping must be [{num_tokens}], got {tuple(slot_mapping.shape)}"
    )
    rotary = cos_sin.shape[-1]
    fits = cos_sin.dim() == 2 and rotary % 2 == 0 and 0 < rotary <= head_dim and cos_sin.is_contiguous()
    require(fits, f"cos_sin must be [max_pos, up to {head_dim}] and contiguous, got {tuple(cos_sin.shape)}")
    return num_tokens
