"""Attention that multiplies bytes of a cache in FP8: its reference, the values transposed for it, the kernel on a card.

The kernel rounds queries and weights to FP8: some percent from plain attention. So it is compared with the reference
that does the same, and from which what is left are weights that fell to the other side of a rounding."""

import math

import pytest
import torch

from mainsail_kernels import attention_hopper_fp8, reference
from mainsail_kernels._triton import runs_kernels
from mainsail_kernels.attention_prefill import paged_attention_prefill
from mainsail_kernels.kv_transpose import TILE, are_transposed, room_shape, transpose_values

FP8 = torch.float8_e4m3fn
NAN = 0x7F


def starts_of(chunks: list[int], device: torch.device) -> torch.Tensor:
    return torch.tensor([0, *torch.tensor(chunks).cumsum(0).tolist()], dtype=torch.int32, device=device)


def tiles_of(length: int) -> int:
    return -(-length // TILE)


def error(out: torch.Tensor, truth: torch.Tensor) -> float:
    """Relative, of the whole tensor."""
    assert out.shape == truth.shape
    assert not out.isnan().any(), "NaN: something read what it does not own"
    return float((out.double() - truth.double()).norm() / truth.double().norm())


def test_reference_is_exact_where_nothing_has_to_be_rounded(paged):
    """Weights that are powers of two, of queries of one magnitude."""
    batch = paged([300, 20], 2, 32, seed=2)
    signs = torch.randint(2, (2, 32)).double() * 2 - 1
    powers = torch.randint(-6, 7, (batch.kv.shape[0], 2, 16, 1)).double()
    kv = batch.kv.double().cpu()
    kv[:, 0] = torch.where(kv[:, 0].isnan(), kv[:, 0], signs[:, None] * powers)
    tables, lens, starts = batch.tables.cpu(), batch.lens.cpu(), torch.tensor([0, 200, 220], dtype=torch.int32)
    query = signs.repeat_interleave(2, 0).expand(220, 4, 32)
    kv = kv.to(FP8)
    out = reference.fp8_attention_prefill(query, kv, tables, starts, lens, math.log(2) / 32)
    truth = reference.paged_attention_prefill(query, kv.double(), tables, starts, lens, 200, math.log(2) / 32)
    torch.testing.assert_close(out, truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("peak", "least", "most"), [(1.0, 0.02, 0.045), (8.0, 0.04, 0.1)])
def test_reference_is_as_far_from_plain_attention_as_rounding_takes_it(peak, least, most, paged):
    """As the kernel was on an H200: 0.028 to 0.036, and 0.066 to 0.081 with queries 8 times as large."""
    batch = paged([700, 90], 2, 64, seed=3)
    kv, tables, lens = batch.kv.cpu().to(FP8), batch.tables.cpu(), batch.lens.cpu()
    starts = torch.tensor([0, 30, 120], dtype=torch.int32)
    query = torch.randn(120, 8, 64, dtype=torch.float64) * peak
    out = reference.fp8_attention_prefill(query, kv, tables, starts, lens, 0.125)
    truth = reference.paged_attention_prefill(query, kv.double(), tables, starts, lens, 90, 0.125)
    assert least < error(out, truth) < most


def order_of_places() -> list[int]:
    """Which token of a tile lies where: thread q of four has two neighbors of every 8 columns of a product's sums, and
    hands over 4 neighbors of every 16 of the next product's rows; its own stay in their order."""
    order = [0] * 128
    for step in range(0, 128, 32):
        for thread in range(4):
            for own in range(8):
                order[step + own // 4 * 16 + thread * 4 + own % 4] = step + own // 2 * 8 + thread * 2 + own % 2
    return order


@pytest.mark.parametrize("few", [0, 2])
@pytest.mark.parametrize(
    ("chunks", "lens"),
    [([12, 1, 0, 40], [33, 1, 0, 200]), ([8], [16]), ([0, 0, 9], [0, 0, 40]),
     ([7, 8, 2, 20, 9], [90, 128, 33, 129, 300]), ([1, 3, 0, 8, 2], [64, 90, 0, 140, 21])],
)  # fmt: skip
def test_values_of_long_chunks_are_transposed_in_the_order_of_weights(chunks, lens, few, paged, device):
    """Zeros behind a context's end; what does not fit into the room is written nowhere, and said not to be there."""
    if not runs_kernels(torch.empty(0, device=device)):
        pytest.skip("a kernel")
    least, short = 8, sum(0 < rows < 8 for rows in chunks)
    batch = paged(lens, 3, 64, seed=len(lens))
    kv, starts = batch.kv.to(FP8), starts_of(chunks, device)
    want = [length if rows >= least or short <= few else 0 for rows, length in zip(chunks, lens, strict=True)]
    tiles = [tiles_of(length) for length in want]
    memory = torch.full((sum(tiles) + 1, 3, 64, TILE), 0x33, device=device, dtype=torch.uint8)
    room = memory[:-1].view(FP8)
    first_tiles, taken = transpose_values(kv, batch.tables, starts, batch.lens, room, least, few)
    assert taken.tolist() == want
    for row, (length, count) in enumerate(zip(want, tiles, strict=True)):
        _, values = reference.gather_sequence(kv.view(torch.uint8), batch.tables[row], length)
        values = torch.nn.functional.pad(values, (0, 0, 0, count * TILE - length)).view(3, count, TILE, 64)
        first = int(first_tiles[row])
        assert torch.equal(memory[first : first + count], values[:, :, order_of_places()].permute(1, 0, 3, 2))
    assert torch.all(memory[-1] == 0x33)
    memory.fill_(0x33)
    _, taken = transpose_values(kv, batch.tables, starts, batch.lens, room[:-1], least, few)
    last = max(row for row, length in enumerate(want) if length)
    assert taken.tolist() == [length if row < last else 0 for row, length in enumerate(want)]
    assert torch.all(memory[sum(tiles[:last]) :] == 0x33)


def test_a_room_of_another_shape_or_type_is_refused(paged, device):
    batch = paged([20], 2, 64, seed=4)
    starts, kv = starts_of([20], device), batch.kv.to(FP8)
    room = torch.zeros((1, 2, 64, TILE), device=device, dtype=torch.uint8)
    for wrong in (room, room.view(FP8)[:, :1], room.view(FP8)[..., :64]):
        with pytest.raises(ValueError, match=r"room for tiles \[2, 64, 128\] in FP8"):
            transpose_values(kv, batch.tables, starts, batch.lens, wrong)
    with pytest.raises(ValueError, match="a contiguous cache in FP8"):
        transpose_values(batch.kv, batch.tables, starts, batch.lens, room.view(FP8))


def room_of_nan(kv: torch.Tensor, tiles: int, heads: int, dtype: torch.dtype) -> torch.Tensor:
    shape = room_shape(kv, tiles, TILE // kv.shape[3], heads, dtype)
    if shape is None:
        pytest.skip("for Hopper")
    return torch.full(shape, NAN, device=kv.device, dtype=torch.uint8).view(FP8)


def attend(query: torch.Tensor, kv: torch.Tensor, batch, starts: torch.Tensor, scale: float) -> torch.Tensor:
    """Of all chunks, however short, by the FP8 kernel."""
    tiles = sum(tiles_of(length) for length in batch.lens.tolist())
    room = room_of_nan(kv, tiles, query.shape[1], query.dtype)
    first_tiles, taken = transpose_values(kv, batch.tables, starts, batch.lens, room, 1)
    out = torch.zeros_like(query)
    attention_hopper_fp8.launch(query, kv, room, batch.tables, starts, first_tiles, taken, scale, out)
    return out


@pytest.mark.gpu
@pytest.mark.parametrize(("peak", "from_plain"), [(1.0, 0.05), (8.0, 0.11)])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (32, 8), (28, 4), (64, 8)])
def test_bytes_are_multiplied_as_the_reference_rounds_them(
    heads, kv_heads, dim, peak, from_plain, paged, device, dtype
):
    """Units that add in 13 bits, simulated, were 0.002 to 0.008 from the reference."""
    chunks, before = [0, 1, 127, 128, 129, 16, 0, 300], [40, 93, 1, 0, 128, 4_000, 0, 1_200]
    batch = paged([a + b for a, b in zip(chunks, before, strict=True)], kv_heads, dim, seed=heads)
    kv, starts = batch.kv.to(FP8), starts_of(chunks, device)
    query = (torch.randn(sum(chunks), heads, dim) * peak).to(device, dtype)
    out = attend(query, kv, batch, starts, dim**-0.5)
    args = (batch.tables, starts, batch.lens)
    rounded = reference.fp8_attention_prefill(query.double(), kv, *args, dim**-0.5)
    plain = reference.paged_attention_prefill(query.double(), kv.double(), *args, 300, dim**-0.5)
    for first, last in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        if last - first > 1:  # few numbers may be further away
            assert error(out[first:last], rounded[first:last]) < 0.02
    assert error(out, rounded) < 0.012
    assert error(out, plain) < from_plain


@pytest.mark.gpu
def test_long_sums_lose_nothing(paged, device, dtype):
    """Of values that do not cancel. Simulated: 0.002; 0.2 with a sum over the whole context in the unit's own bits."""
    batch = paged([32_768], 1, 128, seed=1)
    batch.kv[:, 1] += 0.5
    kv, starts = batch.kv.to(FP8), starts_of([129], device)
    query = torch.randn(129, 4, 128).to(device, dtype)
    out = attend(query, kv, batch, starts, 128**-0.5)
    args = (batch.tables, starts, batch.lens)
    plain = reference.paged_attention_prefill(query.double(), kv.double(), *args, 129, 128**-0.5)
    assert plain.mean() > 0.45
    assert error(out, plain) < 0.01
    assert error(out, reference.fp8_attention_prefill(query.double(), kv, *args, 128**-0.5)) < 0.01


@pytest.mark.gpu
@pytest.mark.parametrize("place", [0, 129, 10_000, 19_870])
def test_a_needle_is_found(place, paged, close, device, dtype):
    batch = paged([20_000], 2, 128, seed=5)
    kv, starts = batch.kv, starts_of([129], device)
    signs = torch.randint(2, (2, 128)).to(device, dtype) * 2 - 1
    block, offset = int(batch.tables[0, place // 16]), place % 16
    kv[block, 0, :, offset] = 4 * signs
    kv = kv.to(FP8)
    query = (signs.repeat_interleave(4, 0) + 0.25 * torch.randn(129, 8, 128).to(device, dtype)).contiguous()
    out = attend(query, kv, batch, starts, 128**-0.5)
    close(out, kv[block, 1, :, offset].to(dtype).repeat_interleave(4, 0).expand(129, 8, 128))


@pytest.mark.gpu
def test_prompts_go_to_the_kernel_that_a_step_has_for_them(paged, close, device, dtype):
    """Call after call in the same room, as layers do: long chunks in FP8, many short ones and those that the room has
    no place for in 16 bits."""
    steps = [
        ([300, 1, 130], [400, 95, 0]),
        ([700], [0]),
        ([31, 260, 60, 1, 0], [1, 33, 700, 50, 20]),
        ([400, 300], [3000, 2900]),
    ]
    ways = []
    room = None
    for seed, (chunks, before) in enumerate(steps):
        batch = paged([a + b for a, b in zip(chunks, before, strict=True)], 8, 128, seed=seed)
        kv, starts = batch.kv.to(FP8), starts_of(chunks, device)
        room = room_of_nan(kv, 30, 32, dtype) if room is None else room
        query = torch.randn(sum(chunks), 32, 128).to(device, dtype)
        args = (batch.tables, starts, batch.lens)
        out = paged_attention_prefill(query, kv, *args, max(chunks), 0.1, room=room)
        plain = reference.paged_attention_prefill(query.double(), kv.double(), *args, max(chunks), 0.1)
        rounded = reference.fp8_attention_prefill(query.double(), kv, *args, 0.1)
        used = 0
        for row, in_fp8 in enumerate(are_transposed(chunks)):
            rows = slice(int(starts[row]), int(starts[row + 1]))
            used += tiles_of(int(batch.lens[row])) if in_fp8 else 0
            if in_fp8 and used <= 30:
                assert error(out[rows], rounded[rows]) < 0.02
            elif chunks[row]:
                close(out[rows], plain[rows])
            ways.append(in_fp8 and used <= 30)
    assert ways == [True, True, True, True, False, True, False, False, False, True, False]
