"""Both attention kernels against the float64 reference over ragged batches with NaN in every unowned position."""

import random

import pytest
import torch

from mainsail_kernels import attention_decode_hopper, attention_hopper, reference
from mainsail_kernels.attention_decode import decode_workspace, paged_attention_decode
from mainsail_kernels.attention_prefill import paged_attention_prefill
from mainsail_kernels.tuned import PrefillConfig, override

SHAPES = [  # (query heads, KV heads, head_dim)
    (8, 2, 64),
    (9, 3, 64),
    (4, 4, 32),
    (8, 1, 96),
    (2, 1, 128),
]


def _naive(query, key, value, scale, window, soft_cap, sink=None):
    """One query head, float64, written out: what the reference itself is checked with."""
    scores = query @ key.T * scale
    if soft_cap:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    length = key.shape[0]
    at = torch.arange(length - query.shape[0], length)[:, None]
    seen = torch.arange(length)[None] <= at
    if window:
        seen &= torch.arange(length)[None] > at - window
    powers = scores.masked_fill(~seen, float("-inf")).exp()
    share = 0.0 if sink is None else sink.exp()
    return powers / (powers.sum(-1, keepdim=True) + share) @ value


@pytest.mark.parametrize("window", [0, 7, 40])
@pytest.mark.parametrize("soft_cap", [0.0, 3.0])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_reference_equals_attention_written_out(window, soft_cap, with_sinks, paged):
    batch = paged([45, 20], 2, 32, seed=1)
    kv, tables, lens = batch.kv.double().cpu(), batch.tables.cpu(), batch.lens.cpu()
    query = torch.randn(15, 4, 32, dtype=torch.float64)
    starts = torch.tensor([0, 10, 15], dtype=torch.int32)
    sinks = torch.randn(4, dtype=torch.float64) * 3 if with_sinks else None
    options = {"sliding_window": window, "soft_cap": soft_cap, "sinks": sinks}
    out = reference.paged_attention_prefill(query, kv, tables, starts, lens, 10, 0.2, **options)
    newest = reference.paged_attention_decode(query[[9, 14]], kv, tables, lens, 0.2, **options)
    torch.testing.assert_close(newest, out[[9, 14]])
    for row, (first, last) in enumerate([(0, 10), (10, 15)]):
        key, value = reference.gather_sequence(kv, tables[row], int(lens[row]))
        for head in range(4):
            sink = None if sinks is None else sinks[head]
            truth = _naive(query[first:last, head], key[head // 2], value[head // 2], 0.2, window, soft_cap, sink)
            torch.testing.assert_close(out[first:last, head], truth)


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), SHAPES)
@pytest.mark.parametrize(("window", "soft_cap"), [(0, 0.0), (50, 0.0), (5, 4.0)])
def test_decode(heads, kv_heads, dim, window, soft_cap, paged, close, device, dtype):
    draw = random.Random(f"{heads} {dim} {window}")
    lens = [draw.choice([0, 1, 15, 16, 17, 33, 200, 420]) for _ in range(draw.choice([1, 3, 5]))]
    batch = paged(lens, kv_heads, dim, seed=2)
    query = torch.randn(len(lens), heads, dim).to(device, dtype)
    out = torch.full_like(query, float("nan"))
    options = {"sliding_window": window, "soft_cap": soft_cap}
    paged_attention_decode(query, batch.kv, batch.tables, batch.lens, 0.1, out=out, **options)
    truth = reference.paged_attention_decode(query.double(), batch.wide(), batch.tables, batch.lens, 0.1, **options)
    close(out, truth)
    assert not out[batch.lens == 0].any()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "fp8"),
    [
        (32, 8, 128, False),
        (16, 2, 64, False),
        (5, 5, 128, False),
        (32, 8, 128, True),
        (32, 4, 128, True),
        (5, 5, 128, True),
    ],
)
def test_decode_by_programs_of_equal_shares(heads, kv_heads, dim, fp8, paged, close, device, dtype):
    """One program for all; more programs than tiles; pairs that many share; padding; a workspace used again; what no
    sequence owns is NaN, of e4m3 as well; a query of zeros, a large and a tiny one."""
    workspace = decode_workspace(300, heads, kv_heads, dim, device)
    for seed, lens in enumerate(
        [[1], [0, 0], [4000], [129, 0, 128, 127, 1, 16, 900], [300] * 41, [1, 5000] * 9, [70] * 300]
    ):
        batch = paged(lens, kv_heads, dim, seed=seed)
        batch.kv = batch.kv.to(torch.float8_e4m3fn) if fp8 else batch.kv
        query = torch.randn(len(lens), heads, dim)
        query[0, 0], query[0, 1], query[-1, -1] = 0.0, query[0, 1] * 5, query[-1, -1] * 1e-3
        query = query.to(device, dtype)
        if not attention_decode_hopper.applies(query, batch.kv, 0, 0.0, None):
            pytest.skip("for Hopper")
        truth = reference.paged_attention_decode(query.double(), batch.wide(), batch.tables, batch.lens, 0.1)
        for programs in (0, 1, 7):
            out = torch.full_like(query, float("nan"))
            attention_decode_hopper.launch(
                query, batch.kv, batch.tables, batch.lens, 0.1, workspace.partial, workspace.stats, workspace.counters,
                out, programs,
            )  # fmt: skip
            close(out, truth)
            assert not out[batch.lens == 0].any()
            assert not workspace.counters.any()


def test_decode_workspace_serves_call_after_call(paged, close, device, dtype):
    workspace = decode_workspace(4, 8, 2, 64, device)
    for lens in ([700, 3, 150], [1], [260, 90, 31, 600], [513]):
        batch = paged(lens, 2, 64, seed=len(lens))
        query = torch.randn(len(lens), 8, 64).to(device, dtype)
        out = paged_attention_decode(query, batch.kv, batch.tables, batch.lens, 0.125, workspace=workspace)
        close(out, reference.paged_attention_decode(query.double(), batch.wide(), batch.tables, batch.lens, 0.125))
    assert not workspace.counters.any()


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), SHAPES)
@pytest.mark.parametrize(("window", "soft_cap"), [(0, 0.0), (50, 0.0), (5, 4.0)])
def test_prefill(heads, kv_heads, dim, window, soft_cap, paged, close, device, dtype):
    draw = random.Random(f"{heads} {dim} {window} prefill")
    lens, chunks = [], []
    for _ in range(draw.choice([1, 3, 4])):
        chunks.append(draw.choice([0, 1, 7, 16, 37, 70]))
        lens.append(chunks[-1] + draw.choice([0, 1, 16, 90]))
    batch = paged(lens, kv_heads, dim, seed=3)
    starts = torch.tensor([0, *torch.tensor(chunks).cumsum(0).tolist()], dtype=torch.int32, device=device)
    query = torch.randn(sum(chunks), heads, dim).to(device, dtype)
    options = {"sliding_window": window, "soft_cap": soft_cap}
    args = (batch.tables, starts, batch.lens, max(chunks), 0.1)
    out = paged_attention_prefill(query, batch.kv, *args, **options)
    close(out, reference.paged_attention_prefill(query.double(), batch.wide(), *args, **options))


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "longest"), [(32, 8, 128, 8), (32, 8, 128, 5), (9, 3, 64, 10)])
@pytest.mark.parametrize("fp8", [False, True])
def test_prefill_of_few_rows_a_chunk(heads, kv_heads, dim, longest, fp8, paged, close, device, dtype):
    """As guesses are verified, some of them past the first tiles of their context."""
    chunks = [1 + index % longest for index in range(40)]
    lens = [chunk + 61 * index % 700 for index, chunk in enumerate(chunks)]
    batch = paged(lens, kv_heads, dim, seed=longest)
    if fp8:
        batch.kv = batch.kv.to(torch.float8_e4m3fn)
    starts = torch.tensor([0, *torch.tensor(chunks).cumsum(0).tolist()], dtype=torch.int32, device=device)
    query = torch.randn(sum(chunks), heads, dim).to(device, dtype)
    args = (batch.tables, starts, batch.lens, longest, 0.1)
    out = paged_attention_prefill(query, batch.kv, *args)
    close(out, reference.paged_attention_prefill(query.double(), batch.wide(), *args))


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(32, 8, 128), (9, 3, 64), (2, 2, 128), (14, 2, 64)])
@pytest.mark.parametrize("seed", range(4))
def test_prefill_by_specialized_warps(heads, kv_heads, dim, seed, paged, close, device, dtype):
    draw = random.Random(f"{heads} {dim} {seed}")
    lens, chunks = [], []
    for _ in range(draw.choice([1, 3, 4])):
        chunks.append(draw.choice([1, 31, 32, 33, 128, 300, 700]))
        lens.append(chunks[-1] + draw.choice([0, 0, 1, 16, 95, 128, 400]))
    batch = paged(lens, kv_heads, dim, seed=seed)
    starts = torch.tensor([0, *torch.tensor(chunks).cumsum(0).tolist()], dtype=torch.int32, device=device)
    query = torch.randn(sum(chunks), heads, dim).to(device, dtype)
    if not attention_hopper.applies(query, batch.kv, 0, 0.0, None):
        pytest.skip("for Hopper")
    args = (batch.tables, starts, batch.lens, max(chunks), 0.1)
    with override(PrefillConfig(64, 64, 4, 2, specialized=True)):
        out = paged_attention_prefill(query, batch.kv, *args)
    close(out, reference.paged_attention_prefill(query.double(), batch.wide(), *args))


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(8, 1, 64), (9, 3, 64)])
@pytest.mark.parametrize("window", [0, 40])
def test_sinks_take_a_share_and_give_nothing(heads, kv_heads, dim, window, paged, close, device, dtype):
    """Weak ones and ones that outweigh every score; contexts of one chunk and of several, and a padding row."""
    sinks = torch.linspace(-8.0, 30.0, heads, device=device)
    options = {"sliding_window": window, "sinks": sinks}
    batch = paged([420, 0, 33, 700], kv_heads, dim, seed=9)
    query = torch.randn(4, heads, dim).to(device, dtype)
    out = paged_attention_decode(query, batch.kv, batch.tables, batch.lens, 0.1, **options)
    close(out, reference.paged_attention_decode(query.double(), batch.wide(), batch.tables, batch.lens, 0.1, **options))
    assert not out[1].any()
    starts = torch.tensor([0, 50, 50, 57, 90], dtype=torch.int32, device=device)
    query = torch.randn(90, heads, dim).to(device, dtype)
    args = (batch.tables, starts, batch.lens, 50, 0.1)
    out = paged_attention_prefill(query, batch.kv, *args, **options)
    close(out, reference.paged_attention_prefill(query.double(), batch.wide(), *args, **options))


def test_prefill_leaves_rows_outside_its_chunks_alone(paged, close, device, dtype):
    """A padded step: decodes before the chunks, padding behind, and chunks of no tokens at the end."""
    batch = paged([40, 90, 1, 1], 2, 64, seed=6)
    starts = torch.tensor([37, 60, 131, 131, 131], dtype=torch.int32, device=device)
    query = torch.randn(150, 8, 64).to(device, dtype)
    out = torch.full_like(query, 7.0)
    paged_attention_prefill(query, batch.kv, batch.tables, starts, batch.lens, 150, 0.1, out=out)
    inner = query[37:131].double()
    truth = reference.paged_attention_prefill(
        inner, batch.wide(), batch.tables[:2], starts[:3] - 37, batch.lens[:2], 71, 0.1
    )
    close(out[37:131], truth)
    assert bool((out[:37] == 7.0).all())
    assert bool((out[131:] == 7.0).all())


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(8, 2, 64), (4, 4, 32), (4, 2, 96)])
def test_fp8_cache_is_read_as_what_it_holds(heads, kv_heads, dim, halves, paged, close, device, dtype):
    dtype = torch.bfloat16 if halves else dtype
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        pytest.skip("this card has no FP8")
    batch = paged([1, 33, 200, 60], kv_heads, dim, seed=8)
    kv = batch.kv.to(torch.float8_e4m3fn)
    query = torch.randn(4, heads, dim).to(device, dtype)
    out = paged_attention_decode(query, kv, batch.tables, batch.lens, 0.1)
    close(out, reference.paged_attention_decode(query.double(), kv.double(), batch.tables, batch.lens, 0.1))
    starts = torch.tensor([0, 1, 20, 70, 75], dtype=torch.int32, device=device)
    query = torch.randn(75, heads, dim).to(device, dtype)
    args = (batch.tables, starts, batch.lens, 50, 0.1)
    out = paged_attention_prefill(query, kv, *args)
    close(out, reference.paged_attention_prefill(query.double(), kv.double(), *args))


def test_wrong_shapes_are_refused_by_name(paged, device, dtype):
    batch = paged([20], 2, 64, seed=4)
    query = torch.randn(1, 8, 64).to(device, dtype)
    with pytest.raises(ValueError, match="head_dim is 32"):
        paged_attention_decode(query[..., :32].contiguous(), batch.kv, batch.tables, batch.lens, 1.0)
    with pytest.raises(ValueError, match="no multiple"):
        paged_attention_decode(query[:, :7], batch.kv, batch.tables, batch.lens, 1.0)
    with pytest.raises(ValueError, match="block_tables"):
        paged_attention_decode(query, batch.kv, batch.tables.long(), batch.lens, 1.0)
    with pytest.raises(ValueError, match="sinks must be contiguous floats"):
        paged_attention_decode(query, batch.kv, batch.tables, batch.lens, 1.0, sinks=torch.ones(3, device=device))
    with pytest.raises(ValueError, match="query_start"):
        paged_attention_prefill(query, batch.kv, batch.tables, batch.lens, batch.lens, 1, 1.0)
