"""Moving whole KV blocks, and masking logits by a grammar: the small copies around a step.

A block here is one index of the cache's second dimension, [num_layers, num_blocks, 2, num_kv_heads, block_size,
head_dim]: it is strided over the layers. Copy-on-write copies the head of a shared tail block; swapping to the host
gathers blocks into a staging buffer whose blocks are contiguous, so that one transfer carries each.
"""

import math
from functools import cache

import torch

from mainsail_kernels import reference
from mainsail_kernels._triton import next_power_of_2, require, runs_kernels, tl, triton


@triton.jit
def _copy_blocks_kernel(
    cache_ptr, src_ptr, dst_ptr, tokens_ptr, layer_stride, block_stride, TILES, TILE, HEAD_DIM, BLOCK: tl.constexpr
):
    item, piece = tl.program_id(0), tl.program_id(1)
    src = tl.load(src_ptr + item).to(tl.int64)
    dst = tl.load(dst_ptr + item).to(tl.int64)
    layer, tile = (piece // TILES).to(tl.int64), piece % TILES
    base = cache_ptr + layer * layer_stride + tile * TILE
    offset = tl.arange(0, BLOCK)
    inside = (offset < TILE) & (offset < tl.load(tokens_ptr + item) * HEAD_DIM)
    tl.store(base + dst * block_stride + offset, tl.load(base + src * block_stride + offset, mask=inside), mask=inside)


@triton.jit
def _stage_blocks_kernel(
    cache_ptr,
    blocks_ptr,
    staging_ptr,
    layer_stride,
    block_stride,
    num_layers,
    size,
    TO_CACHE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    item, layer = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    block = tl.load(blocks_ptr + item).to(tl.int64)
    cached = cache_ptr + layer * layer_stride + block * block_stride
    staged = staging_ptr + (item * num_layers + layer) * size
    for start in range(0, size, BLOCK):
        offset = start + tl.arange(0, BLOCK)
        inside = offset < size
        if TO_CACHE:
            tl.store(cached + offset, tl.load(staged + offset, mask=inside), mask=inside)
        else:
            tl.store(staged + offset, tl.load(cached + offset, mask=inside), mask=inside)


@triton.jit
def _bitmask_kernel(logits_ptr, bitmask_ptr, rows_ptr, vocab, logits_stride, bitmask_stride, BLOCK: tl.constexpr):
    mask = tl.program_id(1).to(tl.int64)
    row = tl.load(rows_ptr + mask).to(tl.int64)
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = token < vocab
    words = tl.load(bitmask_ptr + mask * bitmask_stride + token // 32, mask=inside, other=0)
    banned = ((words >> (token % 32)) & 1) == 0
    tl.store(logits_ptr + row * logits_stride + token, -float("inf"), mask=inside & banned)


def copy_blocks(kv_cache: torch.Tensor, src: torch.Tensor, dst: torch.Tensor, num_tokens: torch.Tensor) -> None:
    """Copy the first num_tokens[i] positions of block src[i] to block dst[i] in every layer of kv_cache, in place.

    src, dst, num_tokens are integer [n]; no block may be both a source and a target of one call. ValueError else
    than for equal lengths and a contiguous cache.
    """
    _check_cache(kv_cache)
    kv_cache = _as_bytes(kv_cache)
    same = src.shape == dst.shape == num_tokens.shape and src.dim() == 1
    require(same, f"copy_blocks: src, dst, num_tokens are {[tuple(t.shape) for t in (src, dst, num_tokens)]}")
    if src.numel() == 0:
        return
    if not runs_kernels(kv_cache):
        reference.copy_blocks(kv_cache, src, dst, num_tokens)
        return
    layers, _, sides, heads, block_size, head_dim = kv_cache.shape
    tile = block_size * head_dim
    _copy_blocks_kernel[(src.numel(), layers * sides * heads)](
        kv_cache,
        src,
        dst,
        num_tokens,
        kv_cache.stride(0),
        kv_cache.stride(1),
        sides * heads,
        tile,
        head_dim,
        BLOCK=next_power_of_2(tile),
        num_warps=4,
    )


def gather_blocks(kv_cache: torch.Tensor, blocks: torch.Tensor, staging: torch.Tensor) -> None:
    """Copy blocks [n] of every layer to staging [n, num_layers, 2, num_kv_heads, block_size, head_dim] (swap out)."""
    _stage(kv_cache, blocks, staging, to_cache=False)


def scatter_blocks(kv_cache: torch.Tensor, blocks: torch.Tensor, staging: torch.Tensor) -> None:
    """Copy staging's blocks to blocks [n] of every layer: the way back of gather_blocks (swap in)."""
    _stage(kv_cache, blocks, staging, to_cache=True)


def apply_token_bitmask(logits: torch.Tensor, bitmask: torch.Tensor, rows: torch.Tensor) -> None:
    """Set to -inf, in place, the logits [n, vocab] that a bitmask [m, ceil(vocab/32)] int32 has a 0 for.

    rows [m] int64, all different: the row of the logits that each mask is for; other rows stay as they are. Bit 0 of
    word 0 is token 0, xgrammar's layout. ValueError on other shapes or types.
    """
    vocab = logits.shape[1]
    words = -(-vocab // 32)
    fits = bitmask.dim() == 2 and bitmask.shape[1] == words and bitmask.dtype == torch.int32
    require(fits, f"bitmask must be [m, {words}] int32, got {tuple(bitmask.shape)} {bitmask.dtype}")
    fits = rows.shape == bitmask.shape[:1] and rows.dtype == torch.int64
    require(fits, f"rows must be [{bitmask.shape[0]}] int64, got {tuple(rows.shape)} {rows.dtype}")
    if not runs_kernels(logits):
        _mask_on_cpu(logits, bitmask, rows)
    elif rows.numel():
        require(logits.stride(1) == 1 and bitmask.stride(1) == 1, "apply_token_bitmask: rows must be contiguous")
        grid = (-(-vocab // 4096), rows.numel())
        strides = logits.stride(0), bitmask.stride(0)
        _bitmask_kernel[grid](logits, bitmask, rows, vocab, *strides, BLOCK=4096, num_warps=8)


def _mask_on_cpu(logits: torch.Tensor, bitmask: torch.Tensor, rows: torch.Tensor) -> None:
    """Eight tokens of a mask at a time from a table, then a minimum: a thirtieth of the reference's time.

    NaN stays NaN, forbidden or not: a broken row shows (the reference hides one behind the mask).
    """
    octets = bitmask.contiguous().view(torch.uint8).flatten().int()
    caps = _caps(logits.dtype).index_select(0, octets).view(bitmask.shape[0], -1)[:, : logits.shape[1]]
    for index, row in enumerate(rows.tolist()):
        torch.minimum(logits[row], caps[index], out=logits[row])


@cache
def _caps(dtype: torch.dtype) -> torch.Tensor:
    """[256, 8]: what eight logits may be at most, by the octet of their bits."""
    allowed = (torch.arange(256)[:, None] >> torch.arange(8)) & 1
    return torch.where(allowed.bool(), math.inf, -math.inf).to(dtype)


def _stage(kv_cache: torch.Tensor, blocks: torch.Tensor, staging: torch.Tensor, *, to_cache: bool) -> None:
    _check_cache(kv_cache)
    shape = (blocks.numel(), kv_cache.shape[0], *kv_cache.shape[2:])
    fits = staging.shape == shape and staging.dtype == kv_cache.dtype and staging.is_contiguous()
    require(fits, f"staging must be contiguous {shape} {kv_cache.dtype}, got {tuple(staging.shape)} {staging.dtype}")
    kv_cache, staging = _as_bytes(kv_cache), _as_bytes(staging)
    if blocks.numel() == 0:
        return
    if not runs_kernels(kv_cache):
        move = reference.scatter_blocks if to_cache else reference.gather_blocks
        move(kv_cache, blocks, staging)
        return
    layers, size = kv_cache.shape[0], kv_cache[0, 0].numel()
    _stage_blocks_kernel[(blocks.numel(), layers)](
        kv_cache,
        blocks,
        staging,
        kv_cache.stride(0),
        kv_cache.stride(1),
        layers,
        size,
        TO_CACHE=to_cache,
        BLOCK=min(next_power_of_2(size), 4096),
        num_warps=4,
    )


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Numbers of 8 bits as bytes: a copy does not care what they mean, and not every operation takes FP8."""
    return tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor


def _check_cache(kv_cache: torch.Tensor) -> None:
    require(
        kv_cache.dim() == 6 and kv_cache.is_contiguous(),
        f"kv_cache must be contiguous [layers, blocks, 2, heads, size, dim], got {tuple(kv_cache.shape)}",
    )
