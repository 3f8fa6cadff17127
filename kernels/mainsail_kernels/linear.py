"""Linear layers of a decode step: for a few rows the weight is read once at memory speed, and little else counts.

    1 row          a program sums BLOCK_OUT outputs over BLOCK_IN inputs at a time with plain multiply-adds;
    a few rows     tl.dot of a tile of the weight with all rows at once (out transposed: the weight is the long side),
                   the inputs split over several programs where the outputs alone do not fill the card; the last of
                   them to arrive (a counter per tile, which it sets back to zero) adds their sums in a fixed order;
    more, or a shape where the table says that cuBLAS is as good: torch's linear.

`gated_linear` is the first half of an MLP in one launch, silu(x @ gate) * (x @ up); many rows go to linear_hopper.
Which way runs is data (tuned.py), measured by `benchmarks/kernels.py`. Sums are float32; a row's result does not depend
on the other rows of its batch within one of the ways. While the kernel before still runs, a program of these kernels
fetches its first weights into the L2 cache; of one row's product only those that are there by then (_FETCHING).
"""

import torch

from mainsail_kernels import linear_hopper, reference
from mainsail_kernels._activation import silu
from mainsail_kernels._split import split_that_fits, workspace
from mainsail_kernels._triton import (
    dependent_launch,
    multiprocessors,
    next_power_of_2,
    on_card,
    prefetch_rows,
    require,
    runs_kernels,
    tl,
    triton,
    wait_for_inputs,
)
from mainsail_kernels.tuned import LinearConfig, linear_config, specialized_gate

_FETCHING = 8
"""Programs a multiprocessor of one row's product that fetch weights ahead; later ones start after the kernel before."""


@triton.jit
def _row_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    num_out,
    num_in,
    weight_stride,
    fetching,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    LINES: tl.constexpr,
    STAGES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """out [num_out] of one row x [num_in]: BLOCK_OUT outputs; GATED: of the gate and of up, num_out rows further."""
    output = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    inner = tl.minimum(output, num_out - 1).to(tl.int64)
    rows = weight_ptr + inner[:, None] * weight_stride
    up_rows = rows + tl.full((), num_out, tl.int64) * weight_stride
    if DEPENDENT:
        there = tl.program_id(0) < fetching
        if there:
            prefetch_rows(rows, 0, num_in, 64, LINES)
            if GATED:
                prefetch_rows(up_rows, 0, num_in, 64, LINES)
    wait_for_inputs(DEPENDENT)
    acc = tl.zeros((BLOCK_OUT, BLOCK_IN), tl.float32)
    acc_up = tl.zeros((BLOCK_OUT, BLOCK_IN), tl.float32)
    for start in tl.range(0, num_in, BLOCK_IN, num_stages=STAGES):
        channel = start + tl.arange(0, BLOCK_IN)
        if EVEN:
            x = tl.load(x_ptr + channel).to(tl.float32)
            weight = tl.load(rows + channel[None, :], eviction_policy="evict_first")
        else:
            inside = channel < num_in
            x = tl.load(x_ptr + channel, mask=inside, other=0.0).to(tl.float32)
            weight = tl.load(rows + channel[None, :], mask=inside[None, :], other=0.0, eviction_policy="evict_first")
        acc += weight.to(tl.float32) * x[None, :]
        if GATED:
            if EVEN:
                up = tl.load(up_rows + channel[None, :], eviction_policy="evict_first")
            else:
                up = tl.load(up_rows + channel[None, :], mask=inside[None, :], other=0.0, eviction_policy="evict_first")
            acc_up += up.to(tl.float32) * x[None, :]
    total = tl.sum(acc, axis=1)
    if HAS_BIAS:
        total += tl.load(bias_ptr + output, mask=output < num_out, other=0.0).to(tl.float32)
    if GATED:
        total = silu(total) * tl.sum(acc_up, axis=1)
    tl.store(out_ptr + output, total.to(out_ptr.dtype.element_ty), mask=output < num_out)


@triton.jit(do_not_specialize=["num_rows"])
def _rows_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    partial_ptr,
    counters_ptr,
    num_rows,
    num_out,
    num_in,
    x_stride,
    weight_stride,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    LINES: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """out [num_rows, num_out]: BLOCK_OUT outputs of all rows, of which SPLIT programs share the inputs."""
    tile, part = tl.program_id(0), tl.program_id(1)
    output = tile * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    inner = tl.minimum(output, num_out - 1).to(tl.int64)
    weight_rows = weight_ptr + inner[:, None] * weight_stride
    up_rows = weight_rows + tl.full((), num_out, tl.int64) * weight_stride
    span = tl.cdiv(tl.cdiv(num_in, BLOCK_IN), SPLIT) * BLOCK_IN
    first = part * span
    last = tl.minimum(first + span, num_in)
    if DEPENDENT:
        prefetch_rows(weight_rows, first, num_in, 64, LINES)
        if GATED:
            prefetch_rows(up_rows, first, num_in, 64, LINES)
    row = tl.arange(0, ROWS)
    real = row < num_rows
    wait_for_inputs(DEPENDENT)
    acc = tl.zeros((BLOCK_OUT, ROWS), tl.float32)
    acc_up = tl.zeros((BLOCK_OUT, ROWS), tl.float32)
    for start in tl.range(first, last, BLOCK_IN, num_stages=STAGES):
        channel = start + tl.arange(0, BLOCK_IN)
        if EVEN:
            x = tl.load(x_ptr + row[:, None] * x_stride + channel[None, :], mask=real[:, None], other=0.0)
            weight = tl.load(weight_rows + channel[None, :])
        else:
            inside = channel < num_in
            fits = real[:, None] & inside[None, :]
            x = tl.load(x_ptr + row[:, None] * x_stride + channel[None, :], mask=fits, other=0.0)
            weight = tl.load(weight_rows + channel[None, :], mask=inside[None, :], other=0.0)
        acc = tl.dot(weight, tl.trans(x), acc)
        if GATED:
            if EVEN:
                up = tl.load(up_rows + channel[None, :])
            else:
                up = tl.load(up_rows + channel[None, :], mask=inside[None, :], other=0.0)
            acc_up = tl.dot(up, tl.trans(x), acc_up)
    fits = (output < num_out)[:, None] & real[None, :]
    place = row[None, :] * num_out + output[:, None]
    if SPLIT > 1:
        tl.store(partial_ptr + part * (ROWS * num_out) + place, acc, mask=fits)
        tl.debug_barrier()  # every thread's sums are stored before one thread says so
        arrived = tl.atomic_add(counters_ptr + tile, 1, sem="acq_rel")
        if arrived != SPLIT - 1:
            return
        tl.debug_barrier()
        tl.store(counters_ptr + tile, 0)
        acc = tl.zeros((BLOCK_OUT, ROWS), tl.float32)
        for other in tl.static_range(SPLIT):
            acc += tl.load(partial_ptr + other * (ROWS * num_out) + place, mask=fits, other=0.0, cache_modifier=".cg")
    if HAS_BIAS:
        acc += tl.load(bias_ptr + output, mask=output < num_out, other=0.0).to(tl.float32)[:, None]
    if GATED:
        acc = silu(acc) * acc_up
    tl.store(out_ptr + place, acc.to(out_ptr.dtype.element_ty), mask=fits)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [n, in] times weight [out, in] transposed, plus bias [out]; returns [n, out] in x's type.

    Raises ValueError when the shapes or types do not fit. Calls of one process must run on one stream after another.
    """
    _check(x, weight)
    require(bias is None or bias.shape == weight.shape[:1], "linear: bias must be [out]")
    config = _config(x, weight, weight.shape[0], gated=False)
    if config is None:
        return reference.linear(x, weight, bias)
    return _launch(x, weight, bias, weight.shape[0], config, gated=False)


def gated_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor | None:
    """silu(x @ gate.T) * (x @ up.T) for x [n, in] and weight [2 * d, in], the gate first: [n, d] in x's type.

    None where one launch of this kind is no faster than `linear` and `silu_mul`. Raises ValueError as `linear`.
    """
    _check(x, weight)
    require(weight.shape[0] % 2 == 0, f"gated_linear: weight must be [2 * d, in], got {tuple(weight.shape)}")
    config = _config(x, weight, weight.shape[0] // 2, gated=True)
    wanted = config is None and specialized_gate(x.device, x.shape[0], weight.shape[0] // 2)
    if wanted and linear_hopper.applies(x, weight):
        return linear_hopper.gated_linear(x, weight)
    return None if config is None else _launch(x, weight, None, weight.shape[0] // 2, config, gated=True)


def _check(x: torch.Tensor, weight: torch.Tensor) -> None:
    fits = x.dim() == 2 and weight.dim() == 2 and x.shape[1] == weight.shape[1] and x.dtype == weight.dtype
    require(fits, f"linear: x {tuple(x.shape)} {x.dtype}, weight {tuple(weight.shape)} {weight.dtype}")


def _config(x: torch.Tensor, weight: torch.Tensor, num_out: int, *, gated: bool) -> LinearConfig | None:
    if not runs_kernels(x) or weight.stride(1) != 1 or x.stride(1) != 1:
        return None
    if on_card(x) and x.element_size() != 2:
        return None  # the table is for 16-bit numbers: tiles of wider ones would not fit into shared memory
    return linear_config(x.device, x.shape[0], num_out, gated=gated)


def _launch(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, num_out: int, config: LinearConfig, *, gated: bool
) -> torch.Tensor:
    num_rows, num_in = x.shape
    out = torch.empty((num_rows, num_out), dtype=x.dtype, device=x.device)
    tiles = -(-num_out // config.block_out)
    added = weight if bias is None else bias
    options = {
        "GATED": gated,
        "HAS_BIAS": bias is not None,
        "EVEN": num_in % config.block_in == 0,
        "BLOCK_OUT": config.block_out,
        "BLOCK_IN": config.block_in,
        "LINES": config.ahead // 64,
        "STAGES": config.stages,
        "num_warps": config.warps,
        **dependent_launch(x.device),
    }
    if num_rows == 1:
        fetching = _FETCHING * multiprocessors(x.device)
        _row_kernel[(tiles,)](x, weight, added, out, num_out, num_in, weight.stride(0), fetching, **options)
        return out
    rows = max(next_power_of_2(num_rows), 16)
    split = split_that_fits(config.split, rows, num_out, tiles)
    _rows_kernel[(tiles, split)](
        x, weight, added, out, *workspace(x.device), num_rows, num_out, num_in, x.stride(0), weight.stride(0),
        ROWS=rows, SPLIT=split, **options,
    )  # fmt: skip
    return out
