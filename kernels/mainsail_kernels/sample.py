"""Choosing tokens from logits on the GPU: argmax, and temperature / top-k / top-p / min-p without a sort.

    1. per chunk of 4096 logits   best logit and where, and the sum of exp((x - best) / temperature)
    2. per row                    the threshold that top-k, top-p and min-p ask for; the mass of each chunk above
                                  it; the chunk with the largest log(mass) + noise; its token with the largest
                                  logit / temperature + noise

The kept set of every filter is "logits at or above a threshold". The threshold is the largest value at which enough
tokens (top-k) or enough probability (top-p) lie at or above; both only grow as the value falls, so three pivots a pass
quarter the interval until one distinct logit is left in it, and passes skip chunks whose best lies below. The noise is
Gumbel's, a pure function (Philox) of seed, step and token, so the same seed draws the same token in whatever batch it
runs, and a logit that another order of sums has moved by a bit changes hardly any draw. The meaning of every parameter
is in reference.py.
"""

import torch

from mainsail_kernels import reference
from mainsail_kernels._triton import INTERPRETED, next_power_of_2, require, runs_kernels, tl, triton

_CHUNK = reference.SAMPLE_CHUNK


@triton.jit
def _chunk_kernel(
    logits_ptr,
    temperature_ptr,
    best_ptr,
    where_ptr,
    mass_ptr,
    vocab,
    stride,
    num_chunks,
    WITH_MASS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits_ptr + row * stride + token, mask=token < vocab, other=float("-inf")).to(tl.float32)
    # +inf stands for every kind of broken row: no comparison with NaN survives a maximum
    broken = tl.max(tl.where((x != x) | (x == float("inf")), 1, 0), axis=0)
    x = tl.where(x != x, float("-inf"), x)
    best = tl.max(x, axis=0)
    where = tl.min(tl.where(x == best, token, 2147483647), axis=0)
    at = row * num_chunks + chunk
    tl.store(best_ptr + at, tl.where(broken > 0, float("inf"), best))
    tl.store(where_ptr + at, where)
    if WITH_MASS:
        heat = tl.load(temperature_ptr + row)
        heat = tl.where(heat > 0, heat, 1.0)
        base = tl.where(best == float("-inf"), 0.0, best)
        tl.store(mass_ptr + at, tl.sum(tl.exp((x - base) / heat), axis=0))


@triton.jit
def _argmax_kernel(best_ptr, where_ptr, out_ptr, num_chunks, CHUNKS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, CHUNKS)
    inside = index < num_chunks
    best = tl.load(best_ptr + row * num_chunks + index, mask=inside, other=float("-inf"))
    where = tl.load(where_ptr + row * num_chunks + index, mask=inside, other=2147483647)
    top = tl.max(best, axis=0)
    token = tl.min(tl.where(best == top, where, 2147483647), axis=0).to(tl.int64)
    bad = (top == float("inf")) | (top == float("-inf"))
    tl.store(out_ptr + row, tl.where(bad, -1, token))


@triton.jit
def _gumbel(seed, step, what: tl.constexpr, index):
    """reference.gumbel of each index: every lane computes the four words of its group and takes its own."""
    key0, key1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    group = (index // 4).to(tl.uint32)
    c0, c1 = step.to(tl.uint32) + group * 0, (step >> 32).to(tl.uint32) + group * 0
    c2, c3 = group, group * 0 + what
    for _ in tl.static_range(10):
        first = c0.to(tl.uint64) * 0xD2511F53
        second = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (second >> 32).to(tl.uint32) ^ c1 ^ key0
        c2 = (first >> 32).to(tl.uint32) ^ c3 ^ key1
        c1, c3 = second.to(tl.uint32), first.to(tl.uint32)
        key0 = (key0.to(tl.uint64) + 0x9E3779B9).to(tl.uint32)
        key1 = (key1.to(tl.uint64) + 0xBB67AE85).to(tl.uint32)
    lane = index % 4
    word = tl.where(lane == 0, c0, tl.where(lane == 1, c1, tl.where(lane == 2, c2, c3)))
    u = ((word >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07
    return -tl.log(-tl.log(u))


@triton.jit
def _both(a, b, c, least, most, other_a, other_b, other_c, other_least, other_most):
    return a + other_a, b + other_b, c + other_c, tl.minimum(least, other_least), tl.maximum(most, other_most)


if INTERPRETED:  # which combines with a function of ours element by element, for minutes

    @triton.jit
    def _reduced(a, b, c, least, most):
        return tl.sum(a, axis=0), tl.sum(b, axis=0), tl.sum(c, axis=0), tl.min(least, axis=0), tl.max(most, axis=0)

else:

    @triton.jit
    def _reduced(a, b, c, least, most):
        """Three sums, a minimum and a maximum in one go: warps meet once and not five times."""
        return tl.reduce((a, b, c, least, most), 0, _both)


@triton.jit
def _above(
    row_ptr, best_ptr, vocab, num_chunks, low, high, a, b, c, top, rate, BY_MASS: tl.constexpr, CHUNK: tl.constexpr
):
    """How much lies at or above each of a, b and c, which are at least low: mass, exp2((x - top) * rate) for a logit
    x, or a count. And the range of the logits within [low, high)."""
    lane = tl.arange(0, CHUNK)
    zero = tl.zeros((CHUNK,), tl.float32)
    at_a, at_b, at_c = zero, zero, zero
    least = zero + float("inf")
    most = zero - float("inf")
    for chunk in range(num_chunks):
        if tl.load(best_ptr + chunk) >= low:
            token = chunk * CHUNK + lane
            x = tl.load(row_ptr + token, mask=token < vocab, other=float("-inf")).to(tl.float32)
            weight = tl.exp2((x - top) * rate) if BY_MASS else zero + 1.0
            at_a += tl.where(x >= a, weight, 0.0)
            at_b += tl.where(x >= b, weight, 0.0)
            at_c += tl.where(x >= c, weight, 0.0)
            within = (x >= low) & (x < high)
            least = tl.minimum(least, tl.where(within, x, float("inf")))
            most = tl.maximum(most, tl.where(within, x, float("-inf")))
    return _reduced(at_a, at_b, at_c, least, most)


@triton.jit
def _threshold(
    row_ptr, best_ptr, vocab, num_chunks, low, high, top, rate, wanted, BY_MASS: tl.constexpr, CHUNK: tl.constexpr
):
    """The largest logit, of those >= low, at or above which lie `wanted` tokens, or `wanted` of mass.

    Enough lies at or above low, and too little at or above high.
    """
    searching = 1
    rounds = 0
    while searching == 1:
        step = (high - low) * 0.25
        a, b, c = low + step, low + 2 * step, low + 3 * step
        at_a, at_b, at_c, least, most = _above(
            row_ptr, best_ptr, vocab, num_chunks, low, high, a, b, c, top, rate, BY_MASS, CHUNK
        )
        rounds += 1
        if least >= most:  # one distinct logit left: it is the one
            low = least
            searching = 0
        elif rounds >= 40:
            searching = 0
        else:
            # From the ends of what is there, not of the interval: ties and gaps cost nothing.
            enough_a, enough_b, enough_c = at_a >= wanted, at_b >= wanted, at_c >= wanted
            next_low = tl.where(enough_c, c, tl.where(enough_b, b, tl.where(enough_a, a, least)))
            high = tl.where(enough_c, high, tl.where(enough_b, c, tl.where(enough_a, b, a)))
            low = next_low
    return low


@triton.jit
def _draw_kernel(
    logits_ptr,
    best_ptr,
    where_ptr,
    mass_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seeds_ptr,
    steps_ptr,
    out_ptr,
    vocab,
    stride,
    num_chunks,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """out [n]: the token of one row of logits [n, vocab], from its chunks' best logits and masses. See the module."""
    row = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, CHUNKS)
    inside = index < num_chunks
    best_row, mass_row = best_ptr + row * num_chunks, mass_ptr + row * num_chunks
    best = tl.load(best_row + index, mask=inside, other=float("-inf"))
    where = tl.load(where_ptr + row * num_chunks + index, mask=inside, other=2147483647)
    top = tl.max(best, axis=0)
    heat = tl.load(temperature_ptr + row)
    if (top == float("inf")) | (top == float("-inf")):
        tl.store(out_ptr + row, tl.full((), -1, tl.int64))
        return
    if heat <= 0:
        tl.store(out_ptr + row, tl.min(tl.where(best == top, where, 2147483647), axis=0).to(tl.int64))
        return

    row_ptr = logits_ptr + row * stride
    lane = tl.arange(0, CHUNK)
    top_k, top_p, min_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row), tl.load(min_p_ptr + row)
    mass = tl.load(mass_row + index, mask=inside, other=0.0)
    mass = tl.where(best == float("-inf"), 0.0, mass * tl.exp((best - top) / heat))
    rate = 1.4426950408889634 / heat
    floor = top - 90.0 * heat  # what float32 cannot tell from probability zero
    over = top + tl.abs(top) * 1e-6 + 1e-30
    limited = (top_k > 0) & (top_k < vocab)
    if limited:
        least_best = tl.min(tl.where(inside, best, float("inf")), axis=0)
        floor = _kth(row_ptr, best_row, vocab, num_chunks, floor, top, over, least_best, top_k, CHUNK)
    if top_p < 1.0:
        total = tl.sum(mass, axis=0)
        if limited:
            total = _mass_above(row_ptr, best_row, vocab, num_chunks, floor, top, rate, CHUNK)
        # 1e-7 keeps a sum that rounding has taken just below the whole from asking for more than there is
        wanted = tl.maximum(top_p * (1.0 - 1e-7), 1e-30) * total
        nucleus = top + heat * (tl.log(tl.maximum(1.0 - top_p, 1e-7)) - tl.log(vocab.to(tl.float32))) - 1e-3
        low = tl.maximum(floor, nucleus)
        floor = tl.maximum(
            floor, _threshold(row_ptr, best_row, vocab, num_chunks, low, over, top, rate, wanted, True, CHUNK)
        )
    filtered = limited | (top_p < 1.0) | (min_p > 0.0)
    if min_p > 0.0:
        floor = tl.maximum(floor, top + heat * tl.log(min_p))
    if filtered:
        for chunk in range(num_chunks):
            kept_mass = 0.0
            if tl.load(best_row + chunk) >= floor:
                token = chunk * CHUNK + lane
                x = tl.load(row_ptr + token, mask=token < vocab, other=float("-inf")).to(tl.float32)
                kept_mass = tl.sum(tl.where(x >= floor, tl.exp2((x - top) * rate), 0.0), axis=0)
            mass = tl.where(index == chunk, kept_mass, mass)
    else:
        floor = float("-inf")

    seed, step = tl.load(seeds_ptr + row).to(tl.int64), tl.load(steps_ptr + row).to(tl.int64)
    score = tl.where(mass > 0, tl.log(mass) + _gumbel(seed, step, 0, index), float("-inf"))
    chosen = tl.min(tl.where(score == tl.max(score, axis=0), index, CHUNKS), axis=0)
    token = chosen * CHUNK + lane
    x = tl.load(row_ptr + token, mask=token < vocab, other=float("-inf")).to(tl.float32)
    kept = (x >= floor) & (x > float("-inf"))
    score = tl.where(kept, (x - top) / heat + _gumbel(seed, step, 1, token), float("-inf"))
    picked = tl.min(tl.where(score == tl.max(score, axis=0), lane, CHUNK), axis=0)
    tl.store(out_ptr + row, (chosen * CHUNK + picked).to(tl.int64))


@triton.jit
def _kth(row_ptr, best_ptr, vocab, num_chunks, floor, top, over, least_best, k, CHUNK: tl.constexpr):
    """The k-th best logit, or floor if fewer than k are at or above it.

    least_best: the least of the chunks' best logits. It is near the k-th best where logits lie about evenly, so that
    the search begins in the interval that it and its mirror image below make; over: a value just over the best logit.
    """
    near = tl.maximum(least_best, floor)
    far = tl.maximum(2.0 * near - top, floor)
    n, n_far, n_near, _l, _m = _above(
        row_ptr, best_ptr, vocab, num_chunks, floor, top, floor, far, near, top, 0.0, False, CHUNK
    )
    kth = floor
    if n > k:
        low = tl.where(n_near >= k, near, tl.where(n_far >= k, far, floor))
        high = tl.where(n_near >= k, over, tl.where(n_far >= k, near, far))
        kth = _threshold(row_ptr, best_ptr, vocab, num_chunks, low, high, top, 0.0, k.to(tl.float32), False, CHUNK)
    return kth


@triton.jit
def _mass_above(row_ptr, best_ptr, vocab, num_chunks, floor, top, rate, CHUNK: tl.constexpr):
    mass, _b, _c, _l, _m = _above(
        row_ptr, best_ptr, vocab, num_chunks, floor, top, floor, floor, floor, top, rate, True, CHUNK
    )
    return mass


def argmax(logits: torch.Tensor) -> torch.Tensor:
    """The best token of each row of logits [n, vocab], the lowest of equals; -1 for a broken row. [n] int64.

    A row is broken when it holds NaN or +inf, or nothing but -inf.
    """
    require(logits.dim() == 2, f"argmax: logits must be [n, vocab], got {tuple(logits.shape)}")
    if not runs_kernels(logits):
        return reference.argmax(logits)
    out = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
    if logits.shape[0]:
        best, where, _ = _chunk_stats(logits, None)
        chunks = best.shape[1]
        _argmax_kernel[(logits.shape[0],)](best, where, out, chunks, CHUNKS=next_power_of_2(chunks), num_warps=1)
    return out


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    steps: torch.Tensor,
) -> torch.Tensor:
    """One token for each row of logits [n, vocab]; [n] int64, -1 for a broken row (see argmax).

    Each other argument is [n]: temperature (0: argmax), top_k (0 or less: off), top_p (1: off), min_p (0: off),
    seeds and steps int64. The random number of a row depends on its seed and step alone. ValueError on other shapes.
    """
    arguments = {
        "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "seeds": seeds, "steps": steps,
    }  # fmt: skip
    require(logits.dim() == 2, f"sample: logits must be [n, vocab], got {tuple(logits.shape)}")
    for name, value in arguments.items():
        require(
            value.shape == logits.shape[:1], f"sample: {name} must be [{logits.shape[0]}], got {tuple(value.shape)}"
        )
    if not runs_kernels(logits):
        return reference.sample(logits, temperature, top_k, top_p, min_p, seeds, steps)
    out = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
    if logits.shape[0] == 0:
        return out
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    best, where, mass = _chunk_stats(logits, temperature)
    chunks = best.shape[1]
    _draw_kernel[(logits.shape[0],)](
        logits, best, where, mass, temperature, top_k, top_p, min_p, seeds, steps, out,
        logits.shape[1], logits.stride(0), chunks, CHUNKS=next_power_of_2(chunks), CHUNK=_CHUNK, num_warps=16,
    )  # fmt: skip
    return out


def _chunk_stats(
    logits: torch.Tensor, temperature: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Best logit, its token, and (with a temperature) the mass of each chunk of each row, all [n, chunks]."""
    rows, vocab = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    chunks = -(-vocab // _CHUNK)
    best = torch.empty((rows, chunks), dtype=torch.float32, device=logits.device)
    where = torch.empty((rows, chunks), dtype=torch.int32, device=logits.device)
    mass = torch.empty_like(best) if temperature is not None else best
    heat = best if temperature is None else temperature
    _chunk_kernel[(chunks, rows)](
        logits, heat, best, where, mass, vocab, logits.stride(0), chunks,
        WITH_MASS=temperature is not None, CHUNK=_CHUNK, num_warps=8,
    )  # fmt: skip
    return best, where, mass
