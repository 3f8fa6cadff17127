"""Every kernel of this package in plain PyTorch: the definition that tests compare with, and the engine's CPU path.

Owns the meaning of each operation (what is masked, what a tie does, which random number a row draws); the
Triton kernels promise the same results up to rounding. Each function works in the precision it is given, at
least float32: float64 in, float64 arithmetic, which is how the tests use it; bfloat16 and float16 are computed
in float32 and rounded once at the end. There are no loops over tokens, so float32 models are served with it on
a CPU. Shapes are checked by the public functions beside the kernels, which call these for tensors on the CPU.

The KV cache of a layer is [num_blocks, 2 (K, V), num_kv_heads, block_size, head_dim]. Positions that a sequence
does not own may hold anything, NaN included: nothing here lets them reach a result.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F

from mainsail_kernels.reference_quantized import FP8, quantize_rows, to_fp8, widen_blocks, widen_fp4, widen_rows

BAD_ROW = -1
"""Token reported for a row of logits that holds NaN or +inf, or nothing but -inf."""
SAMPLE_CHUNK = 4096
"""A token is drawn in two moves, first its chunk of this many, then itself in it: a part of the definition."""
CHUNKS, TOKENS = 0, 1
"""What noise is for: the last word of its counter."""
FEW = 256
"""Best tokens among which top-k and top-p mostly find their threshold: finding so many is far cheaper than a sort."""
_LOW = 0xFFFFFFFF


def _wide(x: torch.Tensor) -> torch.Tensor:
    """The tensor in the precision to compute in: float64 stays, everything else becomes float32."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """RMS norm over the last dimension; with a residual, of their sum, and the sum comes back too."""
    if residual is None:
        return normalized(_wide(x), weight, eps).to(x.dtype)
    total = _wide(x) + _wide(residual)
    return normalized(total, weight, eps).to(x.dtype), total.to(x.dtype)


def normalized(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x over the root of its mean square, times weight, in x's own precision."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.to(x.dtype)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, where gate_up is [n, 2*d] with the gate first."""
    gate, up = _wide(gate_up).chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def gelu_tanh_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """gelu(gate) * up with the tanh approximation (Gemma), where gate_up is [n, 2*d] with the gate first."""
    gate, up = _wide(gate_up).chunk(2, dim=-1)
    return (F.gelu(gate, approximate="tanh") * up).to(gate_up.dtype)


def clamped_swiglu(gate_up: torch.Tensor, alpha: float, limit: float) -> torch.Tensor:
    """gpt-oss's activation: gate and up are clamped, and up is moved by 1; gate_up is [n, 2*d] with the gate first."""
    gate, up = _wide(gate_up).chunk(2, dim=-1)
    gate = gate.clamp(max=limit)
    return (gate * torch.sigmoid(gate * alpha) * (up.clamp(-limit, limit) + 1)).to(gate_up.dtype)


def add_lora(
    y: torch.Tensor, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor, parts: Sequence[int],
    rows: torch.Tensor, slots: torch.Tensor,
) -> None:  # fmt: skip
    """What each row's adapter makes of x is added to y in place; one product for each adapter of the batch."""
    rank, slot_of_row = up.shape[2], slots.repeat_interleave(rows.shape[0] // slots.shape[0])
    for slot in slots[slots >= 0].unique().tolist():
        own = rows[(slot_of_row == slot) & (rows >= 0)].long()
        mid = _wide(x[own]) @ _wide(down[slot]).T
        first = 0
        for part, size in enumerate(parts):
            ours = _wide(up[slot, first : first + size])
            added = mid[:, part * rank : (part + 1) * rank] @ ours.T
            y[own, first : first + size] = (_wide(y[own, first : first + size]) + added).to(y.dtype)
            first += size


def route(scores: torch.Tensor, per_token: int, *, normalized: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax over all experts, the best `per_token` of each row: (weights [n, k], experts [n, k])."""
    weights, chosen = _wide(scores).softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    weights, chosen = weights[:, :per_token], chosen[:, :per_token]
    return (weights / weights.sum(dim=-1, keepdim=True) if normalized else weights), chosen


def grouped_mlp(
    x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor,
    gate_up_scale: torch.Tensor | None = None, down_scale: torch.Tensor | None = None,
    gate_up_bias: torch.Tensor | None = None, down_bias: torch.Tensor | None = None,
    swiglu: tuple[float, float] | None = None,
) -> torch.Tensor:  # fmt: skip
    """The weighted sum of the chosen experts' gated MLPs: x [n, hidden], weights and chosen [n, k]."""
    out = torch.zeros_like(_wide(x))
    biases = (gate_up_bias, down_bias)
    first, second = ((gate_up, gate_up_scale), (down, down_scale))
    for expert in chosen.unique().tolist():
        token, rank = (chosen == expert).nonzero(as_tuple=True)
        of_first, of_second = (None if bias is None else bias[expert].to(x.dtype) for bias in biases)
        mixed = F.linear(x[token], _member(*first, expert, x.dtype), of_first)
        inner = silu_mul(mixed) if swiglu is None else clamped_swiglu(mixed, *swiglu)
        outer = _wide(F.linear(inner, _member(*second, expert, x.dtype), of_second))
        out.index_add_(0, token, outer * weights[token, rank, None].to(out.dtype))
    return out.to(x.dtype)


def _member(matrices: torch.Tensor, scales: torch.Tensor | None, index: int, dtype: torch.dtype) -> torch.Tensor:
    """One of the stacked matrices, widened where it has scales."""
    if scales is None:
        return matrices[index]
    if matrices.dtype == torch.int32:
        return widen_fp4(matrices[index], scales[index], dtype)
    widen = widen_blocks if scales.dim() == 3 else widen_rows
    return widen(matrices[index], scales[index], _wide(torch.empty(0, dtype=dtype)).dtype).to(dtype)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [n, in] times weight [out, in] transposed, plus bias [out]."""
    return F.linear(x, weight, bias)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of the first 2*cos.shape[-1] channels, halves apart (neox style); the rest passes through."""
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


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
    """Split qkv, norm and rotate queries and keys, write keys and values to their slots; returns the queries."""
    head_dim, block_size = kv.shape[-1], kv.shape[-2]
    heads = _wide(qkv).view(qkv.shape[0], num_heads + 2 * num_kv_heads, head_dim)
    query, key, value = heads.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    if q_norm is not None:
        query = normalized(query, q_norm, eps)
    if k_norm is not None:
        key = normalized(key, k_norm, eps)
    cos, sin = cos_sin[positions.long()].to(heads.dtype).unsqueeze(1).chunk(2, dim=-1)
    kept = (slot_mapping >= 0).nonzero().squeeze(1)
    slots = slot_mapping[kept]
    blocks, offsets = slots // block_size, slots % block_size
    kv[blocks, 0, :, offsets] = as_cached(rotate(key, cos, sin)[kept], kv.dtype, k_scale)
    kv[blocks, 1, :, offsets] = as_cached(value[kept], kv.dtype, v_scale)
    return rotate(query, cos, sin).to(qkv.dtype)


def as_cached(x: torch.Tensor, dtype: torch.dtype, scale: float) -> torch.Tensor:
    """Keys or values as a cache of that type holds them: of e4m3 over their scale."""
    return to_fp8(x, torch.tensor(scale)) if dtype == FP8 else x.to(dtype)


def softmax(scores: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """Over the last dimension; sinks [..., 1], which broadcast to the rest, take a share and are left out."""
    if sinks is None:
        return torch.softmax(scores, dim=-1)
    with_sinks = torch.cat((scores, sinks.to(scores.dtype).expand(*scores.shape[:-1], 1)), dim=-1)
    return torch.softmax(with_sinks, dim=-1)[..., :-1]


def _soft_capped(scores: torch.Tensor, soft_cap: float) -> torch.Tensor:
    return soft_cap * torch.tanh(scores / soft_cap) if soft_cap else scores


def paged_attention_decode(
    query: torch.Tensor,
    kv: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    *,
    sliding_window: int = 0,
    soft_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of one query per sequence to its seq_len newest-included tokens; rows of length 0 give zeros."""
    num_seqs, num_heads, head_dim = query.shape
    num_kv_heads, block_size = kv.shape[2], kv.shape[3]
    longest = int(seq_lens.max()) if num_seqs else 0
    if longest == 0:
        return torch.zeros_like(query)
    used = -(-longest // block_size)
    tables = block_tables[:, :used].long().clamp(0, kv.shape[0] - 1)
    pages = kv[tables]  # [num_seqs, used, 2, num_kv_heads, block_size, head_dim]
    key, value = (
        _wide(pages[:, :, side].transpose(1, 2).reshape(num_seqs, num_kv_heads, used * block_size, head_dim))
        for side in (0, 1)
    )
    position = torch.arange(used * block_size, device=query.device)
    visible = position < seq_lens[:, None]
    if sliding_window:
        visible &= position >= seq_lens[:, None] - sliding_window
    hidden = ~visible[:, None, :, None]
    value = value.masked_fill(hidden, 0.0)
    packed = _wide(query).view(num_seqs, num_kv_heads, num_heads // num_kv_heads, head_dim)
    scores = _soft_capped(packed @ key.transpose(-1, -2) * scale, soft_cap)
    scores = scores.masked_fill(~visible[:, None, None, :], -math.inf)
    weights = softmax(scores, None if sinks is None else sinks.view(1, num_kv_heads, -1, 1))
    weights = weights.masked_fill((seq_lens == 0)[:, None, None, None], 0.0)
    return (weights @ value).view(num_seqs, num_heads, head_dim).to(query.dtype)


def gather_sequence(kv: torch.Tensor, table: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of one sequence, each [num_kv_heads, length, head_dim], from its blocks."""
    num_kv_heads, block_size, head_dim = kv.shape[2:]
    pages = kv[table[: -(-length // block_size)].long()]
    both = pages.permute(1, 2, 0, 3, 4).reshape(2, num_kv_heads, -1, head_dim)[:, :, :length]
    return both[0], both[1]


def paged_attention_prefill(
    query: torch.Tensor,
    kv: torch.Tensor,
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    max_query_len: int,
    scale: float,
    *,
    sliding_window: int = 0,
    soft_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of each sequence's newest tokens to its whole context, sequence by sequence."""
    del max_query_len  # the launch of the kernel needs it, the meaning does not

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return _attend(query, key, value, scale, sliding_window, soft_cap, sinks)

    return _each_sequence(query, kv, block_tables, query_start, seq_lens, attend)


def _each_sequence(
    query: torch.Tensor, kv: torch.Tensor, block_tables: torch.Tensor, query_start: torch.Tensor,
    seq_lens: torch.Tensor, attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:  # fmt: skip
    """attend(query, key, value) of each sequence that has some, zeros elsewhere: like query."""
    out = torch.zeros_like(query)
    starts, lengths = query_start.tolist(), seq_lens.tolist()
    for index, length in enumerate(lengths):
        first, last = starts[index], starts[index + 1]
        if last > first and length > 0:
            out[first:last] = attend(query[first:last], *gather_sequence(kv, block_tables[index], length))
    return out


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, sliding_window: int, soft_cap: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """One sequence: query [q, num_heads, head_dim] are the last q of key/value [num_kv_heads, n, head_dim]."""
    num_queries, num_heads, head_dim = query.shape
    num_kv_heads, length = key.shape[0], key.shape[1]
    group = num_heads // num_kv_heads
    at = torch.arange(length - num_queries, length, device=query.device)[:, None]
    position = torch.arange(length, device=query.device)
    visible = position <= at
    if sliding_window:
        visible &= position > at - sliding_window
    packed = _wide(query).view(num_queries, num_kv_heads, group, head_dim).permute(1, 2, 0, 3)
    packed = packed.reshape(num_kv_heads, group * num_queries, head_dim)
    visible = visible.repeat(group, 1)
    if soft_cap or sinks is not None:
        scores = _soft_capped(packed @ _wide(key).transpose(-1, -2) * scale, soft_cap)
        of_rows = (
            None if sinks is None else sinks.view(num_kv_heads, group).repeat_interleave(num_queries, 1)[..., None]
        )
        mixed = softmax(scores.masked_fill(~visible, -math.inf), of_rows) @ _wide(value)
    else:
        mixed = F.scaled_dot_product_attention(
            packed[None], _wide(key)[None], _wide(value)[None], attn_mask=visible, scale=scale
        )[0]
    mixed = mixed.view(num_kv_heads, group, num_queries, head_dim).permute(2, 0, 1, 3)
    return mixed.reshape(num_queries, num_heads, head_dim).to(query.dtype)


def fp8_attention_prefill(
    query: torch.Tensor,
    kv: torch.Tensor,
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """paged_attention_prefill over kv in FP8, with what attention_hopper_fp8 rounds to FP8: queries by one scale a row,
    weights times 256 over the largest so far. So far: of tiles of 128 tokens, from the newest to the oldest, for which
    power of two a weight is rounded at depends on it. What weights are divided by is not rounded. Tokens of sequences
    with a length of 0 are 0."""
    attend = partial(_attend_fp8, scale=scale)
    return _each_sequence(query, kv, block_tables, query_start, seq_lens, attend)


def _attend_fp8(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """One sequence, as `_attend`."""
    num_queries, num_heads, head_dim = query.shape
    num_kv_heads, length = key.shape[0], key.shape[1]
    codes, factor = quantize_rows(query.reshape(-1, head_dim))
    seen = (num_queries, num_kv_heads, num_heads // num_kv_heads)
    dtype = _wide(query).dtype
    rows = codes.to(dtype).view(*seen, head_dim).transpose(0, 1).flatten(1, 2)  # [num_kv_heads, rows, head_dim]
    factor = factor.to(dtype).view(*seen, 1).transpose(0, 1).flatten(1, 2) * (scale / math.log(2))
    at = torch.arange(length - num_queries, length, device=query.device).repeat_interleave(seen[2])[:, None]
    top, total = torch.full_like(factor, -math.inf), torch.zeros_like(factor)
    mixed = torch.zeros_like(rows)
    for first in reversed(range(0, length, 128)):
        last = min(first + 128, length)
        scores = rows @ key[:, first:last].to(dtype).transpose(-1, -2) * factor
        scores = scores.masked_fill(torch.arange(first, last, device=query.device) > at, -math.inf)
        newest = torch.maximum(top, scores.amax(dim=-1, keepdim=True))
        base = newest.masked_fill(newest == -math.inf, 0.0)
        fade, weights = torch.exp2(top - base), torch.exp2(scores - base + 8)
        top, total = newest, total * fade + weights.sum(dim=-1, keepdim=True)
        mixed = mixed * fade + weights.float().to(FP8).to(dtype) @ value[:, first:last].to(dtype)
    mixed = (mixed / total).view(num_kv_heads, num_queries, seen[2], head_dim).transpose(0, 1)
    return mixed.reshape(num_queries, num_heads, head_dim).to(query.dtype)


def argmax(logits: torch.Tensor) -> torch.Tensor:
    """The best token of each row, the lowest of equals; BAD_ROW where the row is broken. [n] int64."""
    best, token = logits.max(dim=-1)  # NaN spreads through max, which takes a fraction of argmax's time
    return torch.where(best.isfinite(), token, BAD_ROW)


def gumbel(seeds: torch.Tensor, steps: torch.Tensor, what: int, first: torch.Tensor, count: int) -> torch.Tensor:
    """Gumbel noise, -log(-log(u)), of the indices from first[row] on: [n, count] float32; all multiples of four.

    u is 23 bits of Philox 4x32, 10 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): the key
    is the seed, the counter (step as two words, index // 4, what), and index % 4 picks one of the four words. A pure
    function of its arguments, so a row draws the same noise in whatever batch it runs. what: CHUNKS or TOKENS.
    """
    groups = first[:, None] // 4 + torch.arange(count // 4, device=first.device)
    words = torch.stack(_philox(seeds[:, None], steps[:, None], groups, what), dim=-1).flatten(1)
    u = ((words >> 9).float() + 0.5) * 2.0**-23
    return -torch.log(-torch.log(u))


def _philox(seeds: torch.Tensor, steps: torch.Tensor, index: torch.Tensor, what: int) -> tuple[torch.Tensor, ...]:
    """Four 32-bit words for each counter, as int64; all broadcast to the shape of index."""
    key0, key1 = seeds & _LOW, (seeds >> 32) & _LOW
    c0, c1 = (steps & _LOW).expand_as(index), ((steps >> 32) & _LOW).expand_as(index)
    c2, c3 = index, torch.full_like(index, what)
    for _ in range(10):
        # A product of two words overflows int64, whose bits are those of the unsigned product all the same.
        first, second = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = (second >> 32 & _LOW) ^ c1 ^ key0, second & _LOW
        c2, c3 = (first >> 32 & _LOW) ^ c3 ^ key1, first & _LOW
        key0, key1 = (key0 + 0x9E3779B9) & _LOW, (key1 + 0xBB67AE85) & _LOW
    return c0, c1, c2, c3


def kept_tokens(
    logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
) -> torch.Tensor:
    """Which tokens each row may draw, [n, vocab] bool; a threshold on the logit, so equal logits share a fate.

    top_k (0 or less: off) keeps the k best; top_p the smallest set of those whose probability, renormalized over
    the top_k, reaches p; min_p whatever has at least min_p times the best token's probability.
    """
    x = _wide(logits)
    heat = torch.where(temperature > 0, temperature, 1.0).to(x.dtype)[:, None]
    best = x.amax(dim=-1, keepdim=True)
    floor = best + heat * torch.log(min_p.to(x.dtype))[:, None]
    if bool(((top_k > 0) | (top_p < 1.0)).any()):
        found, enough = _threshold(x, heat, top_k, top_p, min(FEW, x.shape[-1]))
        rest = (~enough).nonzero().squeeze(1)
        if len(rest):
            found[rest], _ = _threshold(x[rest], heat[rest], top_k[rest], top_p[rest], x.shape[-1])
        floor = torch.maximum(floor, found)
    return (x >= floor) & (x > -math.inf)


def _threshold(
    x: torch.Tensor, heat: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The least logit that top_k and top_p keep, [n, 1], and whether the `count` best of a row could tell, [n]."""
    vocab = x.shape[-1]
    k = torch.where(top_k > 0, top_k, vocab).clamp(max=vocab).long()[:, None]
    ordered = x.topk(count, dim=-1).values if count < vocab else x.sort(dim=-1, descending=True).values
    best = ordered[:, :1]
    kth = torch.where(k < vocab, ordered.gather(1, k.clamp(max=count) - 1), -math.inf)
    total = torch.exp((x - best) / heat).masked_fill(x < kth, 0.0).sum(dim=-1, keepdim=True)
    wanted = top_p.to(x.dtype)[:, None] * total
    mass = torch.exp((ordered - best) / heat).masked_fill(ordered < kth, 0.0).cumsum(dim=-1)
    limited = (top_p < 1.0)[:, None]
    inside = torch.cat((torch.zeros_like(wanted), mass[:, :-1]), dim=1) < wanted
    last = torch.where(inside, torch.arange(count, device=x.device), 0).amax(dim=-1, keepdim=True)
    floor = torch.where(limited, torch.maximum(kth, ordered.gather(1, last)), kth)
    enough = ((k <= count) | (k >= vocab)) & (~limited | (mass[:, -1:] >= wanted))
    return floor, enough.squeeze(1) | (count == vocab)


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    steps: torch.Tensor,
) -> torch.Tensor:
    """One token per row by the Gumbel-max trick, in two draws; temperature 0 is argmax.

    First the chunk of SAMPLE_CHUNK tokens with the largest log(mass) + noise, then its token with the largest
    logit / temperature + noise: exactly the softmax's distribution. A small change of the logits moves the sums a
    little and the noise not at all, so it changes the token in few draws only, as inverting a distribution function
    does not promise.
    """
    greedy = argmax(logits)
    if bool((temperature <= 0).all()):
        return greedy
    x = _wide(logits)
    heat = torch.where(temperature > 0, temperature, 1.0).to(x.dtype)[:, None]
    x = (x - x.amax(dim=-1, keepdim=True)) / heat
    if bool(((top_k > 0) | (top_p < 1.0) | (min_p > 0.0)).any()):
        x = x.masked_fill(~kept_tokens(logits, temperature, top_k, top_p, min_p), -math.inf)
    width = min(SAMPLE_CHUNK, x.shape[1] + -x.shape[1] % 4)
    chunks = F.pad(x, (0, -x.shape[1] % width), value=-math.inf).view(len(x), -1, width)
    count, first = chunks.shape[1], torch.zeros_like(seeds)
    mass = chunks.exp().sum(-1).log() + gumbel(seeds, steps, CHUNKS, first, count + -count % 4)[:, :count]
    chosen = mass.argmax(-1)
    scores = chunks[torch.arange(len(x), device=x.device), chosen]
    scores = scores + gumbel(seeds, steps, TOKENS, chosen * width, width)
    drawn = chosen * width + scores.argmax(-1)
    return torch.where((temperature <= 0) | (greedy == BAD_ROW), greedy, drawn)


def apply_token_bitmask(logits: torch.Tensor, bitmask: torch.Tensor, rows: torch.Tensor) -> None:
    """Set to -inf, in place, each logit of row rows[i] whose bit in bitmask[i] is 0 (bit 0 of word 0 is token 0)."""
    bits = (bitmask[:, :, None] >> torch.arange(32, dtype=torch.int32, device=logits.device)) & 1
    allowed = bits.flatten(1)[:, : logits.shape[1]].bool()
    logits[rows] = logits[rows].masked_fill(~allowed, -math.inf)


def copy_blocks(kv_cache: torch.Tensor, src: torch.Tensor, dst: torch.Tensor, num_tokens: torch.Tensor) -> None:
    """Copy the first num_tokens[i] positions of block src[i] to block dst[i], in every layer, in place."""
    kept = torch.arange(kv_cache.shape[4], device=kv_cache.device) < num_tokens[:, None]
    mask = kept[None, :, None, None, :, None]
    source, target = src.long(), dst.long()
    kv_cache[:, target] = torch.where(mask, kv_cache[:, source], kv_cache[:, target])


def gather_blocks(kv_cache: torch.Tensor, blocks: torch.Tensor, staging: torch.Tensor) -> None:
    """Copy whole blocks of every layer to staging [n, num_layers, 2, num_kv_heads, block_size, head_dim]."""
    staging.copy_(kv_cache[:, blocks.long()].transpose(0, 1))


def scatter_blocks(kv_cache: torch.Tensor, blocks: torch.Tensor, staging: torch.Tensor) -> None:
    """The way back of gather_blocks: staging's blocks go to their places in every layer of the cache."""
    kv_cache[:, blocks.long()] = staging.transpose(0, 1)


def resolve(tokens: torch.Tensor, from_slots: torch.Tensor, newest: torch.Tensor) -> torch.Tensor:
    """tokens where from_slots is negative, else newest[from_slots]; [n] int64."""
    return torch.where(from_slots < 0, tokens.long(), newest[from_slots.clamp(min=0).long()])


def note(newest: torch.Tensor, slots: torch.Tensor, tokens: torch.Tensor) -> None:
    """newest[slots] = tokens, a failed row's code below 0 as 0."""
    newest[slots.long()] = tokens.clamp(min=0)


def unpack(
    source: torch.Tensor, packed: torch.Tensor, tables: torch.Tensor, width: int, decodes: int, gap: int
) -> None:
    """See tokens.unpack."""
    packed[:] = source[: packed.shape[0]]
    rows = source[packed.shape[0] :].view(-1, max(width, 1))
    tables[: min(decodes, len(rows)), :width] = rows[:decodes]
    tables[decodes + gap : len(rows) + gap, :width] = rows[decodes:]


IN_PROMPT = 1 << 30
"""Of a token's count: the prompt has it."""
_PIECE = 64
"""Rows at once: bounds the intermediate tensors."""


def penalize(
    logits: torch.Tensor,
    counts: torch.Tensor,
    rows: torch.Tensor,
    slots: torch.Tensor,
    presence: torch.Tensor,
    frequency: torch.Tensor,
    repetition: torch.Tensor,
) -> None:
    """See logits.penalize. OpenAI's presence and frequency penalties; repetition as in Keskar et al., "CTRL", 2019."""
    for first in range(0, len(rows), _PIECE):
        some = slice(first, first + _PIECE)
        count = counts[slots[some]]
        written = count & (IN_PROMPT - 1)
        x = logits[rows[some]]
        factor = torch.where(count > 0, repetition[some, None], 1.0)
        x = torch.where(x > 0, x / factor, x * factor)
        logits[rows[some]] = x - frequency[some, None] * written - presence[some, None] * (written > 0)


def best_logprobs(
    logits: torch.Tensor, tokens: torch.Tensor, num_best: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See logits.best_logprobs."""
    wide = logits.float() if logits.dtype != torch.float64 else logits
    total = wide.logsumexp(dim=-1, keepdim=True)
    own = wide.gather(1, tokens[:, None])
    ranks = (wide > own).sum(dim=-1) + 1
    best, where = wide.topk(num_best, dim=-1)
    return torch.cat((tokens[:, None], where), dim=1), torch.cat((own, best), dim=1) - total, ranks
