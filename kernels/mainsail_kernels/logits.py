"""What is done to whole rows of logits beside choosing from them: penalties, and log-probabilities of the best.

    penalize        in place, and only where a token was seen: what it costs is reading the counts
    best_logprobs   1. per chunk of 4096 logits   its sum of exp, how many are better than the row's token, its k best
                    2. per row                    the chunks' sums together, and the k best of their best

The k best of a chunk are taken one after another out of registers: k is small (the API's limit is 20), and sorting or
selecting over the whole vocabulary reads it several times. Both are defined in reference.py.
"""

import torch

from mainsail_kernels import reference
from mainsail_kernels._triton import next_power_of_2, require, runs_kernels, tl, triton

_BLOCK = 4096
MOST = 32
"""Best tokens of a row that the kernel serves."""


@triton.jit
def _penalize_kernel(
    logits_ptr,
    counts_ptr,
    rows_ptr,
    slots_ptr,
    presence_ptr,
    frequency_ptr,
    repetition_ptr,
    vocab,
    logits_stride,
    counts_stride,
    IN_PROMPT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(1)
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(slots_ptr + index).to(tl.int64)
    count = tl.load(counts_ptr + slot * counts_stride + token, mask=token < vocab, other=0)
    seen = count > 0
    if tl.max(count, axis=0) > 0:
        place = logits_ptr + tl.load(rows_ptr + index).to(tl.int64) * logits_stride + token
        x = tl.load(place, mask=seen, other=0.0)
        repetition = tl.load(repetition_ptr + index)
        x = tl.where(x > 0, x / repetition, x * repetition)
        written = count & (IN_PROMPT - 1)
        x -= tl.load(frequency_ptr + index) * written.to(tl.float32)
        x -= tl.where(written > 0, tl.load(presence_ptr + index), 0.0)
        tl.store(place, x, mask=seen)


def penalize(
    logits: torch.Tensor,
    counts: torch.Tensor,
    rows: torch.Tensor,
    slots: torch.Tensor,
    presence: torch.Tensor,
    frequency: torch.Tensor,
    repetition: torch.Tensor,
) -> None:
    """In place, logits [n, vocab] float32 in rows [m] int64, by counts [num_slots, vocab] int32 in slots [m] int64.

    A count has bit 30 set where the prompt has the token, and how often the answer has it below. presence, frequency
    and repetition are [m] float32. ValueError when shapes or types do not fit.
    """
    fits = logits.dim() == counts.dim() == 2 and logits.shape[1] == counts.shape[1]
    require(fits and logits.dtype == torch.float32 and counts.dtype == torch.int32, "penalize: [n, vocab] and counts")
    for value in (slots, presence, frequency, repetition):
        require(value.shape == rows.shape, f"penalize: {tuple(value.shape)} values for {tuple(rows.shape)} rows")
    presence, frequency, repetition = presence.contiguous(), frequency.contiguous(), repetition.contiguous()
    if not runs_kernels(logits) or logits.stride(1) != 1:
        reference.penalize(logits, counts, rows, slots, presence, frequency, repetition)
    elif len(rows):
        vocab = logits.shape[1]
        _penalize_kernel[(-(-vocab // _BLOCK), len(rows))](
            logits, counts, rows, slots, presence, frequency, repetition, vocab, logits.stride(0), counts.stride(0),
            IN_PROMPT=reference.IN_PROMPT, BLOCK=_BLOCK, num_warps=8,
        )  # fmt: skip


@triton.jit
def _best_of_chunk_kernel(
    logits_ptr, tokens_ptr, top_ptr, sum_ptr, better_ptr, best_ptr, where_ptr, vocab, stride, num_chunks,
    K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    token = chunk * BLOCK + tl.arange(0, BLOCK)
    own = tl.load(logits_ptr + row * stride + tl.load(tokens_ptr + row)).to(tl.float32)
    x = tl.load(logits_ptr + row * stride + token, mask=token < vocab, other=float("-inf")).to(tl.float32)
    top = tl.max(x, axis=0)
    base = tl.where(top == float("-inf"), 0.0, top)
    at = row * num_chunks + chunk
    tl.store(top_ptr + at, base)
    tl.store(sum_ptr + at, tl.sum(tl.exp(x - base), axis=0))
    tl.store(better_ptr + at, tl.sum((x > own).to(tl.int32), axis=0))
    for k in range(K):
        best = tl.max(x, axis=0)
        where = tl.min(tl.where(x == best, token, 2147483647), axis=0)
        tl.store(best_ptr + at * K + k, best)
        tl.store(where_ptr + at * K + k, where)
        x = tl.where(token == where, float("-inf"), x)


@triton.jit
def _best_of_row_kernel(
    logits_ptr, tokens_ptr, top_ptr, sum_ptr, better_ptr, best_ptr, where_ptr, ids_ptr, logprobs_ptr, ranks_ptr, stride,
    num_chunks, K: tl.constexpr, CHUNKS: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, CHUNKS)
    inside = chunk < num_chunks
    tops = tl.load(top_ptr + row * num_chunks + chunk, mask=inside, other=float("-inf"))
    sums = tl.load(sum_ptr + row * num_chunks + chunk, mask=inside, other=0.0)
    top = tl.max(tops, axis=0)
    total = top + tl.log(tl.sum(sums * tl.exp(tops - top), axis=0))
    better = tl.load(better_ptr + row * num_chunks + chunk, mask=inside, other=0)
    tl.store(ranks_ptr + row, tl.sum(better, axis=0).to(tl.int64) + 1)
    token = tl.load(tokens_ptr + row)
    own = tl.load(logits_ptr + row * stride + token).to(tl.float32)
    out = row * (K + 1)
    tl.store(ids_ptr + out, token)
    tl.store(logprobs_ptr + out, own - total)
    candidate = tl.arange(0, CANDIDATES)
    there = candidate < num_chunks * K
    first = row * num_chunks * K
    x = tl.load(best_ptr + first + candidate, mask=there, other=float("-inf"))
    where = tl.load(where_ptr + first + candidate, mask=there, other=2147483647)
    for k in range(K):
        best = tl.max(x, axis=0)
        chosen = tl.min(tl.where(x == best, where, 2147483647), axis=0)
        tl.store(ids_ptr + out + 1 + k, chosen.to(tl.int64))
        tl.store(logprobs_ptr + out + 1 + k, best - total)
        taken = where == chosen
        x = tl.where(taken, float("-inf"), x)
        where = tl.where(taken, 2147483647, where)


def best_logprobs(
    logits: torch.Tensor, tokens: torch.Tensor, num_best: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each row of logits [n, vocab] its own token (tokens [n] int64) and the num_best best.

    Returns ids [n, 1 + num_best] int64, log-probabilities [n, 1 + num_best] float32, and the rank [n] int64 of the
    own token (1: none is better). ValueError when shapes do not fit.
    """
    rows, vocab = logits.shape
    require(tokens.shape == (rows,), f"best_logprobs: {tuple(tokens.shape)} tokens for {rows} rows")
    require(0 <= num_best <= vocab, f"best_logprobs: the {num_best} best of {vocab}")
    kernels = runs_kernels(logits) and logits.stride(1) == 1 and 0 < num_best <= MOST and rows
    return _launch(logits, tokens, num_best) if kernels else reference.best_logprobs(logits, tokens, num_best)


def _launch(logits: torch.Tensor, tokens: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    (rows, vocab), device = logits.shape, logits.device
    chunks = -(-vocab // _BLOCK)
    top, total = torch.empty((2, rows, chunks), dtype=torch.float32, device=device)
    better = torch.empty((rows, chunks), dtype=torch.int32, device=device)
    best = torch.empty((rows, chunks, k), dtype=torch.float32, device=device)
    where = torch.empty((rows, chunks, k), dtype=torch.int32, device=device)
    ids = torch.empty((rows, 1 + k), dtype=torch.int64, device=device)
    logprobs = torch.empty((rows, 1 + k), dtype=torch.float32, device=device)
    ranks = torch.empty(rows, dtype=torch.int64, device=device)
    stride = logits.stride(0)
    _best_of_chunk_kernel[(chunks, rows)](
        logits, tokens, top, total, better, best, where, vocab, stride, chunks, K=k, BLOCK=_BLOCK, num_warps=4
    )
    _best_of_row_kernel[(rows,)](
        logits, tokens, top, total, better, best, where, ids, logprobs, ranks, stride, chunks,
        K=k, CHUNKS=next_power_of_2(chunks), CANDIDATES=next_power_of_2(chunks * k), num_warps=4,
    )  # fmt: skip
    return ids, logprobs, ranks
