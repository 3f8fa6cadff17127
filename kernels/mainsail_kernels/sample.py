"""Choosing tokens from logits on the GPU: argmax, and temperature / top-k / top-p / min-p without a sort.

    1. per chunk of 4096 logits   best logit and where, the sum of exp((x - best) / temperature), and the best logit of
                                  each group of 64
    2. per row                    the threshold that top-k, top-p and min-p ask for; the mass of each chunk above
                                  it; the chunk with the largest log(mass) + noise; its token with the largest
                                  logit / temperature + noise

The kept set of every filter is "logits at or above a threshold". The threshold is the largest value at which enough
tokens (top-k) or enough probability (top-p) lie at or above; both only grow as the value falls, so three pivots quarter
the interval that it is in until one distinct logit is left there. How a row is searched:

    few groups matter     The groups' best logits alone prove a bound: k of them at or above it are k tokens, and what
                          they weigh is a part of the mass. Groups with nothing at or above the bound are out. If at
                          most 128 are left, they are held in registers, and nothing else of the row is read again.
    many (flat rows)      A sample of 4096 logits tells about where top-p's threshold lies: the pivots of the first of
                          few passes over the row are set around it. A pass gives the mass of each chunk above each
                          pivot, so bounds of what a chunk keeps; as soon as these agree on the chunk, and its token is
                          above the interval that is left, the token is what the threshold itself would give, and the
                          search ends (as the rejections of FlashInfer's sampling do, but the same tokens are drawn).

The noise is Gumbel's, a pure function (Philox) of seed, step and token, so the same seed draws the same token in
whatever batch it runs, and a logit that another order of sums has moved by a bit changes hardly any draw. The meaning
of every parameter is in reference.py.
"""

import torch

from mainsail_kernels import reference
from mainsail_kernels._triton import INTERPRETED, next_power_of_2, require, runs_kernels, tl, triton

_CHUNK = reference.SAMPLE_CHUNK
_GROUP = 64
"""Logits whose best is noted: 128 bytes of bfloat16, a line."""
_FEW = 128
"""Groups that are held in registers."""
_ROUNDS = 40
"""After so many the interval is too small for float32."""
_TILE, _WARPS = 8192, 16
"""Logits of a row that are looked at at once, and by how many warps."""
_SAMPLED = 256
"""Of so many logits, eight beside each other are in the sample of a flat row."""


@triton.jit
def _chunk_kernel(
    logits_ptr,
    temperature_ptr,
    best_ptr,
    where_ptr,
    mass_ptr,
    groups_ptr,
    vocab,
    stride,
    num_chunks,
    WITH_MASS: tl.constexpr,
    CHUNK: tl.constexpr,
    GROUP: tl.constexpr,
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
        bests = tl.max(tl.reshape(x, (CHUNK // GROUP, GROUP)), axis=1)
        tl.store(groups_ptr + at * (CHUNK // GROUP) + tl.arange(0, CHUNK // GROUP), bests)


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


@triton.jit
def _all(a, b, c, d, other_a, other_b, other_c, other_d):
    return a + other_a, b + other_b, c + other_c, d + other_d


if INTERPRETED:  # which combines with a function of ours element by element, for minutes

    @triton.jit
    def _reduced(a, b, c, least, most):
        return tl.sum(a, axis=0), tl.sum(b, axis=0), tl.sum(c, axis=0), tl.min(least, axis=0), tl.max(most, axis=0)

    @triton.jit
    def _sums(a, b, c, d):
        return tl.sum(a, axis=0), tl.sum(b, axis=0), tl.sum(c, axis=0), tl.sum(d, axis=0)

else:

    @triton.jit
    def _reduced(a, b, c, least, most):
        """Three sums, a minimum and a maximum in one go: warps meet once and not five times."""
        return tl.reduce((a, b, c, least, most), 0, _both)

    @triton.jit
    def _sums(a, b, c, d):
        return tl.reduce((a, b, c, d), 0, _all)


@triton.jit
def _pivots(low, high):
    step = (high - low) * 0.25
    return low + step, low + 2 * step, low + 3 * step


@triton.jit
def _narrowed(low, high, a, b, c, enough_a, enough_b, enough_c, least):
    """The part of [low, high) that has the threshold: from the ends of what is there, so that ties and gaps cost
    nothing."""
    next_low = tl.where(enough_c, c, tl.where(enough_b, b, tl.where(enough_a, a, least)))
    next_high = tl.where(enough_c, high, tl.where(enough_b, c, tl.where(enough_a, b, a)))
    return next_low, next_high


@triton.jit
def _search(x, weight, wanted, low, high, ROUNDS: tl.constexpr):
    """The largest of the values x [n] at or above which lies `wanted` of weight [n]; enough does above low."""
    searching = 1
    rounds = 0
    while searching == 1:
        a, b, c = _pivots(low, high)
        within = (x >= low) & (x < high)
        at_a, at_b, at_c, least, most = _reduced(
            tl.where(x >= a, weight, 0.0),
            tl.where(x >= b, weight, 0.0),
            tl.where(x >= c, weight, 0.0),
            tl.where(within, x, float("inf")),
            tl.where(within, x, float("-inf")),
        )
        rounds += 1
        if least >= most:  # one distinct value left: it is the one
            low = least
            searching = 0
        elif rounds >= ROUNDS:
            searching = 0
        else:
            low, high = _narrowed(low, high, a, b, c, at_a >= wanted, at_b >= wanted, at_c >= wanted, least)
    return low


@triton.jit
def _counts(row_ptr, best_ptr, vocab, num_chunks, low, high, a, b, c, CHUNK: tl.constexpr):
    """How many logits lie at or above each of a, b and c, which are at least low; the range of those in [low, high)."""
    lane = tl.arange(0, CHUNK)
    zero = tl.zeros((CHUNK,), tl.float32)
    at_a, at_b, at_c = zero, zero, zero
    least = zero + float("inf")
    most = zero - float("inf")
    for chunk in range(num_chunks):
        if tl.load(best_ptr + chunk) >= low:
            token = chunk * CHUNK + lane
            x = tl.load(row_ptr + token, mask=token < vocab, other=float("-inf")).to(tl.float32)
            at_a += tl.where(x >= a, 1.0, 0.0)
            at_b += tl.where(x >= b, 1.0, 0.0)
            at_c += tl.where(x >= c, 1.0, 0.0)
            within = (x >= low) & (x < high)
            least = tl.minimum(least, tl.where(within, x, float("inf")))
            most = tl.maximum(most, tl.where(within, x, float("-inf")))
    return _reduced(at_a, at_b, at_c, least, most)


@triton.jit
def _kth(
    row_ptr, best_ptr, vocab, num_chunks, floor, top, over, least_best, k, CHUNK: tl.constexpr, ROUNDS: tl.constexpr
):
    """The k-th best logit, or floor if fewer than k are at or above it: by passes over the row.

    least_best: the least of the chunks' best logits. It is near the k-th best where logits lie about evenly, so that
    the search begins in the interval that it and its mirror image below make; over: a value just over the best logit.
    """
    b = tl.maximum(least_best, floor)
    a = tl.maximum(2.0 * b - top, floor)
    c = over
    low, high = floor, over
    searching = 1
    rounds = 0
    while searching == 1:
        at_a, at_b, at_c, least, most = _counts(row_ptr, best_ptr, vocab, num_chunks, low, high, a, b, c, CHUNK)
        rounds += 1
        if least >= most:
            low = tl.where(least == float("inf"), low, least)
            searching = 0
        elif rounds >= ROUNDS:
            searching = 0
        else:
            low, high = _narrowed(low, high, a, b, c, at_a >= k, at_b >= k, at_c >= k, least)
            a, b, c = _pivots(low, high)
    return low


@triton.jit
def _masses(
    row_ptr, vocab, low, high, a, b, c, top, rate, CHUNKS: tl.constexpr, CHUNK: tl.constexpr, LANES: tl.constexpr
):
    """exp2((x - top) * rate) of the logits x at or above a, b and c, summed for each chunk: three [CHUNKS]; and the
    range of those in [low, high). Every chunk is a row of the tile, so that no step waits for another warp."""
    first = (tl.arange(0, CHUNKS) * CHUNK)[:, None, None]
    lane = (tl.arange(0, LANES) * 8)[None, :, None]
    zero = tl.zeros((CHUNKS, LANES), tl.float32)
    at_a, at_b, at_c = zero, zero, zero
    least = zero + float("inf")
    most = zero - float("inf")
    for begin in range(0, CHUNK, LANES * 8):
        token = first + (begin + lane) + tl.arange(0, 8)[None, None, :]
        x = tl.load(row_ptr + token, mask=token < vocab, other=float("-inf")).to(tl.float32)
        weight = tl.exp2((x - top) * rate)
        at_a += tl.sum(tl.where(x >= a, weight, 0.0), axis=2)
        at_b += tl.sum(tl.where(x >= b, weight, 0.0), axis=2)
        at_c += tl.sum(tl.where(x >= c, weight, 0.0), axis=2)
        within = (x >= low) & (x < high)
        least = tl.minimum(least, tl.min(tl.where(within, x, float("inf")), axis=2))
        most = tl.maximum(most, tl.max(tl.where(within, x, float("-inf")), axis=2))
    least = tl.min(tl.min(least, axis=1), axis=0)
    most = tl.max(tl.max(most, axis=1), axis=0)
    return tl.sum(at_a, axis=1), tl.sum(at_b, axis=1), tl.sum(at_c, axis=1), least, most


@triton.jit
def _guess(row_ptr, vocab, low, top, rate, tail, CHUNKS: tl.constexpr, CHUNK: tl.constexpr, SAMPLED: tl.constexpr):
    """Values a <= c between which the logit likely lies under which, down to low, there is `tail` of mass.

    From the sums of a sample of the row and two and a half times their standard deviation; what is heavy is above, so
    that a few logits of much weight spoil nothing. Where it lies is found out by passes over the whole row.
    """
    place = tl.arange(0, CHUNKS * (CHUNK // SAMPLED))[:, None]
    token = place * SAMPLED + (place * 37) % (SAMPLED // 8) * 8 + tl.arange(0, 8)[None, :]
    inside = token < vocab
    x = tl.load(row_ptr + token, mask=inside, other=float("inf")).to(tl.float32)
    weight = tl.where(inside & (x >= low), tl.exp2((tl.minimum(x, top) - top) * rate), 0.0)
    share = tl.sum(tl.sum(inside.to(tl.float32), axis=1), axis=0) / vocab
    low_a, high_a, low_c, high_c = low, top, low, top
    for _ in range(12):
        a, c = 0.5 * (low_a + high_a), 0.5 * (low_c + high_c)
        below_a, below_c = tl.where(x < a, weight, 0.0), tl.where(x < c, weight, 0.0)
        sum_a, spread_a, sum_c, spread_c = _sums(
            tl.sum(below_a, axis=1),
            tl.sum(below_a * below_a, axis=1),
            tl.sum(below_c, axis=1),
            tl.sum(below_c * below_c, axis=1),
        )
        under = sum_a + 2.5 * tl.sqrt(spread_a) <= tail * share
        over = sum_c - 2.5 * tl.sqrt(spread_c) >= tail * share
        low_a, high_a = tl.where(under, a, low_a), tl.where(under, high_a, a)
        low_c, high_c = tl.where(over, low_c, c), tl.where(over, c, high_c)
    return low_a, tl.maximum(high_c, low_a)


@triton.jit
def _next(x):
    """The next larger float32."""
    bits = x.to(tl.int32, bitcast=True)
    following = tl.where(x > 0, bits + 1, tl.where(x < 0, bits - 1, 0x00800000))
    return following.to(tl.float32, bitcast=True)


@triton.jit
def _bounded(bests, low, over, top, heat, rate, vocab, limited, k, p, wanted, minimum, ROUNDS: tl.constexpr):
    """A value that no kept logit lies below (min_p apart, if the k best are asked for), as high as the groups' best
    logits prove: k of them are k tokens, and what they weigh is a part of the row's mass."""
    if limited:
        ones = tl.where(bests >= low, 1.0, 0.0)
        if tl.sum(ones, axis=0) >= k:
            low = _search(bests, ones, k.to(tl.float32), low, over, ROUNDS)
    else:
        if p < 1.0:
            # What lies below this is all together less than top-p leaves out.
            spare = tl.maximum(1.0 - p, 1e-7)
            low = tl.maximum(low, top + heat * (tl.log(spare) - tl.log(vocab.to(tl.float32))) - 1e-3)
            heavy = tl.where(bests >= low, tl.exp2((bests - top) * rate), 0.0)
            if tl.sum(heavy, axis=0) >= wanted:
                low = _search(bests, heavy, wanted, low, over, ROUNDS)
        low = tl.maximum(low, minimum)
    return low


@triton.jit
def _noted(active_ptr, bests, low, FEW: tl.constexpr, GROUPS: tl.constexpr):
    """The groups with something at or above low, the first FEW in order at active_ptr; how many there are."""
    matters = (bests >= low).to(tl.int32)
    place = tl.cumsum(matters, axis=0) - 1
    tl.store(active_ptr + place, tl.arange(0, GROUPS), mask=(matters > 0) & (place < FEW))
    tl.debug_barrier()  # other threads read them
    return tl.sum(matters, axis=0)


@triton.jit
def _of_groups(
    row_ptr, active_ptr, active, low, over, top, rate, vocab, limited, k, p, wanted, minimum,
    CHUNKS: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr, FEW: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """The threshold, and what each chunk keeps [CHUNKS], where nothing outside of the `active` groups is at or above
    low, which is `_bounded`."""
    index = tl.arange(0, FEW)
    group = tl.load(active_ptr + index, mask=index < active, other=0)
    token = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    there = (index < active)[:, None] & (token < vocab)
    tile = tl.load(row_ptr + token, mask=there, other=float("-inf")).to(tl.float32)
    x = tl.reshape(tile, (FEW * GROUP,))
    weight = tl.exp2((x - top) * rate)
    if limited:
        ones = tl.where(x >= low, 1.0, 0.0)
        if tl.sum(ones, axis=0) > k:
            low = _search(x, ones, k.to(tl.float32), low, over, ROUNDS)
    if p < 1.0:
        here = tl.sum(tl.where(x >= low, weight, 0.0), axis=0)
        wanted = tl.where(limited, _share(p) * here, wanted)
        if here >= wanted:
            low = _search(x, weight, wanted, low, over, ROUNDS)
    low = tl.maximum(low, minimum)
    kept = tl.sum(tl.reshape(tl.where(x >= low, weight, 0.0), (FEW, GROUP)), axis=1, keep_dims=True)
    chunk = group // (CHUNK // GROUP)
    return low, tl.sum(tl.where(chunk[:, None] == tl.arange(0, CHUNKS)[None, :], kept, 0.0), axis=0)


@triton.jit
def _share(p):
    # 1e-7 keeps a sum that rounding has taken just below the whole from asking for more than there is
    return tl.maximum(p * (1.0 - 1e-7), 1e-30)


@triton.jit
def _token(row_ptr, vocab, chunk, low, top, heat, seed, step, CHUNK: tl.constexpr):
    """The token of a chunk with the largest logit / temperature + noise of those at or above low, and its logit."""
    lane = tl.arange(0, CHUNK)
    token = chunk * CHUNK + lane
    x = tl.load(row_ptr + token, mask=token < vocab, other=float("-inf")).to(tl.float32)
    kept = (x >= low) & (x > float("-inf"))
    score = tl.where(kept, (x - top) / heat + _gumbel(seed, step, 1, token), float("-inf"))
    picked = tl.min(tl.where(score == tl.max(score, axis=0), lane, CHUNK), axis=0)
    return (chunk * CHUNK + picked).to(tl.int64), tl.max(tl.where(lane == picked, x, float("-inf")), axis=0)


@triton.jit
def _draw_kernel(
    logits_ptr,
    best_ptr,
    where_ptr,
    mass_ptr,
    groups_ptr,
    active_ptr,
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
    GROUP: tl.constexpr,
    FEW: tl.constexpr,
    LANES: tl.constexpr,
    SAMPLED: tl.constexpr,
    ROUNDS: tl.constexpr,
):
    """out [n]: the token of one row of logits [n, vocab], from its chunks' best logits and masses. See the module."""
    row = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, CHUNKS)
    inside = index < num_chunks
    best_row, row_ptr = best_ptr + row * num_chunks, logits_ptr + row * stride
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

    top_k, p, min_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row), tl.load(min_p_ptr + row)
    limited = (top_k > 0) & (top_k < vocab)
    k = top_k.to(tl.int32)
    mass = tl.load(mass_ptr + row * num_chunks + index, mask=inside, other=0.0)
    mass = tl.where(best == float("-inf"), 0.0, mass * tl.exp((best - top) / heat))
    rate = 1.4426950408889634 / heat
    over = top + tl.abs(top) * 1e-6 + 1e-30
    # The threshold is in [low, high). If it is low, chunks keep `most` (which may be a mere bound until it is `exact`),
    # and if it is just under high, `fewest`. Settled: it is low.
    low, high = top * 0.0 + float("-inf"), over
    most, fewest = mass, mass * 0.0
    total = tl.sum(mass, axis=0)
    wanted = _share(p) * total
    a, c = low, low
    settled, exact = 1, p >= 1.0
    if limited | (p < 1.0) | (min_p > 0.0):
        minimum = tl.where(min_p > 0.0, top + heat * tl.log(tl.maximum(min_p, 1e-37)), float("-inf"))
        group = tl.arange(0, CHUNKS * (CHUNK // GROUP))
        groups = num_chunks * (CHUNK // GROUP)
        bests = tl.load(groups_ptr + row * groups + group, mask=group < groups, other=float("-inf"))
        floor = top - 90.0 * heat  # what float32 cannot tell from probability zero
        low = _bounded(bests, floor, over, top, heat, rate, vocab, limited, k, p, wanted, minimum, ROUNDS)
        active_row = active_ptr + row * FEW
        active = _noted(active_row, bests, low, FEW, CHUNKS * (CHUNK // GROUP))
        if active <= FEW:
            low, most = _of_groups(
                row_ptr, active_row, active, low, over, top, rate, vocab, limited, k, p, wanted, minimum,
                CHUNKS, CHUNK, GROUP, FEW, ROUNDS,
            )  # fmt: skip
        else:
            if limited:
                least_best = tl.min(tl.where(inside, best, float("inf")), axis=0)
                low = _kth(row_ptr, best_row, vocab, num_chunks, floor, top, over, least_best, k, CHUNK, ROUNDS)
            if limited | (min_p > 0.0):
                kth, low = low, tl.maximum(low, minimum)
                of_top_k, most, _most, _least, _greatest = _masses(
                    row_ptr, vocab, kth, over, kth, low, low, top, rate, CHUNKS, CHUNK, LANES
                )
                if limited:
                    total = tl.sum(of_top_k, axis=0)
                    wanted = _share(p) * total
                exact = p <= 1.0
            if (p < 1.0) & (tl.sum(most, axis=0) >= wanted):
                settled = 0
                a, c = _guess(row_ptr, vocab, low, top, rate, total - wanted, CHUNKS, CHUNK, SAMPLED)

    seed, step = tl.load(seeds_ptr + row).to(tl.int64), tl.load(steps_ptr + row).to(tl.int64)
    noise = _gumbel(seed, step, 0, index)
    token = tl.full((), -1, tl.int64)
    b = 0.5 * (a + c)
    rounds, one = 0, 0
    searching = 1
    while searching == 1:
        if settled == 0:
            at_a, at_b, at_c, least, greatest = _masses(
                row_ptr, vocab, low, high, a, b, c, top, rate, CHUNKS, CHUNK, LANES
            )
            rounds += 1
            enough_a, enough_b = tl.sum(at_a, axis=0) >= wanted, tl.sum(at_b, axis=0) >= wanted
            enough_c = tl.sum(at_c, axis=0) >= wanted
            fewest = tl.where(enough_c, fewest, tl.where(enough_b, at_c, tl.where(enough_a, at_b, at_a)))
            most = tl.where(enough_c, at_c, tl.where(enough_b, at_b, tl.where(enough_a, at_a, most)))
            exact = exact | enough_a
            if (rounds >= ROUNDS) | (one == 1):
                settled = 1
            elif least >= greatest:  # one distinct logit left: it is the one
                low = tl.where(least == float("inf"), low, least)
                a, b, c = low, low, low
                one = 1
                settled = exact.to(tl.int32)  # else a pass for what is kept with it
            else:
                low, high = _narrowed(low, high, a, b, c, enough_a, enough_b, enough_c, least)
        score = tl.where(most > 0, tl.log(most) + noise, float("-inf"))
        chosen = tl.min(tl.where(score == tl.max(score, axis=0), index, CHUNKS), axis=0)
        rival = tl.max(tl.where(index == chosen, float("-inf"), score), axis=0)
        surely = tl.max(tl.where((index == chosen) & (fewest > 0), tl.log(fewest) + noise, float("-inf")), axis=0)
        token, logit = _token(row_ptr, vocab, chosen, low, top, heat, seed, step, CHUNK)
        if (settled == 1) | ((surely > rival) & (_next(logit) >= high)):
            searching = 0
        elif one == 0:
            a, b, c = _pivots(low, high)
            if surely > rival:  # is this token kept?
                a, b = logit, _next(logit)
                c = 0.5 * (b + high)
    tl.store(out_ptr + row, token)


def argmax(logits: torch.Tensor) -> torch.Tensor:
    """The best token of each row of logits [n, vocab], the lowest of equals; -1 for a broken row. [n] int64.

    A row is broken when it holds NaN or +inf, or nothing but -inf.
    """
    require(logits.dim() == 2, f"argmax: logits must be [n, vocab], got {tuple(logits.shape)}")
    if not runs_kernels(logits):
        return reference.argmax(logits)
    out = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
    if logits.shape[0]:
        best, where, _mass, _groups = _chunk_stats(logits, None)
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
    best, where, mass, groups = _chunk_stats(logits, temperature)
    active = torch.empty((logits.shape[0], _FEW), dtype=torch.int32, device=logits.device)
    chunks = best.shape[1]
    rows_of_tile = next_power_of_2(chunks)
    _draw_kernel[(logits.shape[0],)](
        logits, best, where, mass, groups, active, temperature, top_k, top_p, min_p, seeds, steps, out,
        logits.shape[1], logits.stride(0), chunks, CHUNKS=rows_of_tile, CHUNK=_CHUNK, GROUP=_GROUP, FEW=_FEW,
        LANES=max(1, min(_TILE // rows_of_tile, _CHUNK) // 8), SAMPLED=_SAMPLED, ROUNDS=_ROUNDS, num_warps=_WARPS,
    )  # fmt: skip
    return out


def _chunk_stats(
    logits: torch.Tensor, temperature: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Best logit, its token, and (with a temperature) the mass of each chunk of each row, all [n, chunks], and the best
    logits of groups [n, chunks * 64]."""
    rows, vocab = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    chunks = -(-vocab // _CHUNK)
    best = torch.empty((rows, chunks), dtype=torch.float32, device=logits.device)
    where = torch.empty((rows, chunks), dtype=torch.int32, device=logits.device)
    mass, heat, groups = best, best, best
    if temperature is not None:
        mass, heat = torch.empty_like(best), temperature
        groups = torch.empty((rows, chunks * (_CHUNK // _GROUP)), dtype=torch.float32, device=logits.device)
    _chunk_kernel[(chunks, rows)](
        logits, heat, best, where, mass, groups, vocab, logits.stride(0), chunks,
        WITH_MASS=temperature is not None, CHUNK=_CHUNK, GROUP=_GROUP, num_warps=8,
    )  # fmt: skip
    return best, where, mass, groups
