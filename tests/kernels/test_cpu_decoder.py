"""The compiled kernels of the CPU against float64, over a cache whose other places hold NaN."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from mainsail_kernels import reference
from mainsail_kernels.cpu import build, decoder
from mainsail_kernels.cpu.decoder import Decoder, LayerParameters, Panels

DTYPES = [torch.float32, torch.bfloat16]


def packed(weight: torch.Tensor) -> Panels:
    panels = decoder.pack(weight)
    if panels is None:
        pytest.skip(f"no kernels for {weight.dtype} on this CPU, or no compiler")
    return panels


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("kernel_dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 7, 8, 9, 130])
@pytest.mark.parametrize(("outputs", "inputs"), [(33, 80), (48, 576), (100, 202)])
def test_linears(kernel_dtype, rows, outputs, inputs, close):
    x = random(rows, inputs, dtype=kernel_dtype)
    weight, up = (random(outputs, inputs, dtype=kernel_dtype, seed=seed) for seed in (1, 2))
    bias = random(outputs, dtype=kernel_dtype, seed=3)
    product = x.double() @ weight.double().T
    close(decoder.linear(x, packed(weight)), product)
    close(decoder.linear(x, packed(weight), bias), product + bias.double())
    close(decoder.gated(x, packed(weight), packed(up)), F.silu(product) * (x.double() @ up.double().T))


@pytest.mark.parametrize("kernel_dtype", DTYPES)
def test_a_row_does_not_depend_on_its_neighbours(kernel_dtype):
    x, weight = random(70, 96, dtype=kernel_dtype), packed(random(100, 96, dtype=kernel_dtype, seed=1))
    together = decoder.linear(x, weight)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert all(torch.equal(decoder.linear(x[row : row + 1], weight)[0], together[row]) for row in range(70))
    finally:
        torch.set_num_threads(threads)


def test_a_bad_row_is_bad_alone():
    x, weight = random(9, 64), packed(random(50, 64, seed=1))
    fine = decoder.linear(x, weight)
    x[3, 5] = math.nan
    out = decoder.linear(x, weight)
    assert out[3].isnan().all()
    assert torch.equal(out[[0, 1, 2, 4, 5, 6, 7, 8]], fine[[0, 1, 2, 4, 5, 6, 7, 8]])


def test_other_matrices_are_left_to_others():
    assert decoder.pack(random(8, 8).half()) is None
    assert decoder.pack(random(8, 3, dtype=torch.bfloat16)) is None
    assert decoder.pack(random(2, 8, 8)) is None


class Case:
    """One decoder layer of random weights with all that it may have, and what it means in float64."""

    def __init__(self, dtype: torch.dtype, dim: int, kv_heads: int, group: int, window: int, *, more: bool) -> None:
        self.dim, self.kv_heads, self.heads, self.window = dim, kv_heads, kv_heads * group, window
        hidden, channels = 80, 72
        sizes = {
            "qkv": ((self.heads + 2 * kv_heads) * dim, hidden), "output": (hidden, self.heads * dim),
            "gate": (channels, hidden), "up": (channels, hidden), "down": (hidden, channels),
        }  # fmt: skip
        self.matrices = {
            name: (random(*size, seed=seed) / size[1] ** 0.5).to(dtype)
            for seed, (name, size) in enumerate(sizes.items())
        }
        self.norms = [1 + 0.1 * random(hidden, seed=seed) for seed in (10, 11, 12)]
        self.bias = 0.1 * random(sizes["qkv"][0], seed=13) if more else None
        self.head_norms = [1 + 0.1 * random(dim, seed=seed) for seed in (14, 15)] if more else [None, None]
        angles = torch.arange(2000)[:, None] * 10000.0 ** -(torch.arange(0, dim // 2 if more else dim, 2) / dim)
        self.cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1).float()

    def decoder(self, *, is_last: bool = True) -> Decoder:
        layer = LayerParameters(
            input_norm=self.norms[0], post_norm=self.norms[1], qkv_bias=self.bias, q_norm=self.head_norms[0],
            k_norm=self.head_norms[1], cos_sin=self.cos_sin, window=self.window,
            **{name: packed(matrix) for name, matrix in self.matrices.items()},
        )  # fmt: skip
        return Decoder(
            [layer], self.norms[2] if is_last else None, num_heads=self.heads, num_kv_heads=self.kv_heads,
            head_dim=self.dim, eps=1e-5, scale=0.11,
        )  # fmt: skip

    def meaning(self, x, kv, positions, slots, starts, tables, lens) -> tuple[torch.Tensor, torch.Tensor]:
        """(the residual stream after the layer, what the last norm makes of it)."""
        m = {name: matrix.double() for name, matrix in self.matrices.items()}
        qkv = F.linear(
            reference.normalized(x, self.norms[0], 1e-5), m["qkv"], None if self.bias is None else self.bias.double()
        )
        query = reference.rope_and_write_kv(
            qkv, positions, self.cos_sin.double(), kv, slots, num_heads=self.heads, num_kv_heads=self.kv_heads,
            q_norm=self.head_norms[0], k_norm=self.head_norms[1], eps=1e-5,
        )  # fmt: skip
        seen = reference.paged_attention_prefill(
            query, kv, tables, starts, lens, 0, 0.11, sliding_window=self.window
        )  # fmt: skip
        x = x + seen.flatten(1) @ m["output"].T
        inner = reference.normalized(x, self.norms[1], 1e-5)
        x = x + (F.silu(inner @ m["gate"].T) * (inner @ m["up"].T)) @ m["down"].T
        return x, reference.normalized(x, self.norms[2], 1e-5)


@pytest.mark.parametrize("kernel_dtype", DTYPES)
@pytest.mark.parametrize(
    ("dim", "kv_heads", "group", "window", "more"),
    [(64, 3, 3, 0, False), (64, 1, 7, 0, True), (128, 2, 4, 0, False), (32, 2, 1, 20, False), (64, 1, 4, 150, True)],
)
def test_a_layer(kernel_dtype, dim, kv_heads, group, window, more, paged, close):
    """Decodes of short and long contexts beside chunks of prompts, from their start and later ones."""
    case = Case(kernel_dtype, dim, kv_heads, group, window, more=more)
    lens, new = [1, 17, 300, 40, 5, 280], [1, 1, 1, 13, 5, 20]
    cache = paged(lens, kv_heads, dim, seed=1)
    kv, starts = cache.kv.cpu().to(kernel_dtype), torch.tensor([0, *new]).cumsum(0).int()
    sequences = torch.arange(len(lens)).repeat_interleave(torch.tensor(new))
    positions = torch.cat([torch.arange(length - count, length) for length, count in zip(lens, new, strict=True)])
    tables = cache.tables.cpu()
    slots = tables[sequences, positions // 16].long() * 16 + positions % 16
    x = random(len(positions), 80, dtype=kernel_dtype, seed=5)
    wide = kv.double()
    stream, truth = case.meaning(x.double(), wide, positions, slots, starts, tables, cache.lens.cpu())
    out = case.decoder()(
        x, kv[None], positions=positions, slot_mapping=slots, sequences=sequences.int(), block_tables=tables
    )  # fmt: skip
    close(out, truth)
    passed_on = case.decoder(is_last=False)(
        x, kv[None], positions=positions, slot_mapping=slots, sequences=sequences.int(), block_tables=tables
    )  # fmt: skip
    close(passed_on, stream)
    written = kv.view(-1, 2, kv_heads, 16, dim)[slots // 16, :, :, slots % 16]
    close(written, wide.view(-1, 2, kv_heads, 16, dim)[slots // 16, :, :, slots % 16])


@pytest.mark.parametrize("kernel_dtype", ["float32", "bfloat16"])
def test_compiles_once_for_a_content(kernel_dtype, monkeypatch, tmp_path):
    monkeypatch.setattr(build, "SOURCE", tmp_path / "decoder.c")
    build.SOURCE.write_text("int decoder_forward(void) { return BF16; }\n")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first = build.library(kernel_dtype)
    assert first is not None
    assert first.parent == tmp_path / "cache/mainsail/kernels"
    assert list(first.parent.iterdir()) == [first]
    monkeypatch.setenv("PATH", "")
    assert build.library(kernel_dtype) == first
    build.SOURCE.write_text("int decoder_forward(void) { return BF16 + 1; }\n")
    assert build.library(kernel_dtype) is None


def test_a_source_that_does_not_compile_is_a_warning(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(build, "SOURCE", tmp_path / "decoder.c")
    build.SOURCE.write_text("#error wrong on purpose\n")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert build.library("float32") is None
    assert "wrong on purpose" in caplog.text


def test_compiled_ahead_beside_the_source(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(build, "SOURCE", tmp_path / "decoder.c")
    build.SOURCE.write_text("int decoder_forward(void) { return BF16; }\n")
    stale = tmp_path / "decoder-float32-0000000000000000.so"
    stale.touch()
    build.main()
    made = [Path(line) for line in capsys.readouterr().out.split()]
    assert [path.parent for path in made] == [tmp_path, tmp_path]
    assert not stale.exists()
    monkeypatch.setenv("PATH", "")
    assert [build.library(name) for name in build.DTYPES] == made
