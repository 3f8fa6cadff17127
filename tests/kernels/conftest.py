"""Ragged batches over a poisoned KV cache, and where the kernels run: a GPU, the interpreter, or the CPU path.

The same tests serve all three. test_through_interpreter.py runs them again in a process with TRITON_INTERPRET=1,
so that a machine without a GPU checks the kernels and not only their references.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

torch.set_num_threads(1)
DEVICE = torch.device("cuda" if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1" else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Random numbers are the same whichever tests ran before."""
    torch.manual_seed(0)


@dataclass
class Paged:
    """One layer's cache with some sequences in it; whatever they do not own is NaN."""

    kv: torch.Tensor
    tables: torch.Tensor
    lens: torch.Tensor

    def wide(self) -> torch.Tensor:
        return self.kv.double()


@pytest.fixture
def device() -> torch.device:
    return DEVICE


@pytest.fixture
def dtype() -> torch.dtype:
    return DTYPE


@pytest.fixture
def close() -> Callable[[torch.Tensor, torch.Tensor], None]:
    """Assert that a result is as near to the float64 truth as its type allows (relative to the whole tensor)."""

    def check(out: torch.Tensor, truth: torch.Tensor) -> None:
        assert out.shape == truth.shape
        assert not out.isnan().any(), "NaN: something read what it does not own"
        error = (out.double() - truth.double()).norm() / truth.double().norm().clamp(min=1e-30)
        assert error < (1e-2 if out.dtype == torch.bfloat16 else 1e-4), f"relative error {error:.2e}"

    return check


@pytest.fixture
def paged() -> Callable[..., Paged]:
    """Build a cache with sequences of the given lengths in shuffled blocks."""

    def build(lens: list[int], heads: int, dim: int, seed: int, block_size: int = 16) -> Paged:
        random = torch.Generator().manual_seed(seed)
        counts = [-(-length // block_size) for length in lens]
        total = sum(counts) + 3
        order = torch.randperm(total, generator=random)
        kv = torch.full((total, 2, heads, block_size, dim), float("nan"))
        tables = torch.full((len(lens), max([*counts, 1]) + 1), 2**30, dtype=torch.int32)
        used = 0
        for row, (length, count) in enumerate(zip(lens, counts, strict=True)):
            tables[row, :count] = order[used : used + count]
            used += count
            position = torch.arange(length)
            block, offset = tables[row, position // block_size].long(), position % block_size
            kv[block, :, :, offset] = torch.randn(length, 2, heads, dim, generator=random)
        lens32 = torch.tensor(lens, dtype=torch.int32)
        return Paged(kv.to(DEVICE, DTYPE), tables.to(DEVICE), lens32.to(DEVICE))

    return build
