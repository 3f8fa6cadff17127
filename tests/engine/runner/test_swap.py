"""Blocks to host memory and back: the same bytes, whatever the order; on a card also while steps are running."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch

from mainsail_engine.kv.moves import BlockMove
from mainsail_engine.runner import swap as swap_module
from mainsail_engine.runner.memory import offloading_bytes
from mainsail_engine.runner.swap import HostMemory, HostSwap, SwappingRunner, host_memory, with_host_memory
from mainsail_engine.step import Chunk, StepPlan, StepResult

SHAPE = (3, 2, 2, 16, 8)
BLOCK_BYTES = 3 * 2 * 2 * 16 * 8 * 4
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class Runner:
    """Counts what it is given."""

    max_model_len, vocab_size, eos_token_ids, num_host_blocks = 64, 8, frozenset({1}), 0

    def __init__(self, kv_cache: torch.Tensor) -> None:
        self.num_blocks = kv_cache.shape[1]
        self.launched = 0

    def launch(self, plan: StepPlan) -> Runner:
        self.launched += 1
        return self

    def result(self) -> StepResult:
        return StepResult([7])


def make(device: str, num_blocks: int = 40, host_blocks: int = 50) -> tuple[torch.Tensor, SwappingRunner, Runner]:
    layers, *rest = SHAPE
    cache = torch.randn((layers, num_blocks, *rest), device=device)
    runner = Runner(cache)
    swapping = with_host_memory(runner, cache, host_memory(cache, host_blocks * BLOCK_BYTES))
    assert isinstance(swapping, SwappingRunner)
    while swapping.num_host_blocks < host_blocks:
        pass
    return cache, swapping, runner


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch) -> None:
    """A few blocks to a piece and to a staging buffer, so that borders are crossed."""
    monkeypatch.setattr(swap_module, "PIECE_BYTES", 8 * BLOCK_BYTES)
    monkeypatch.setattr(swap_module, "STAGING_BYTES", 5 * BLOCK_BYTES)


@pytest.mark.parametrize("device", DEVICES)
def test_what_went_out_comes_back_elsewhere(device: str) -> None:
    cache, runner, inner = make(device)
    before = cache.clone()
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1)).tolist()
    out = [BlockMove(block, order[block]) for block in range(20)]
    runner.launch(StepPlan(stores=out)).result()
    cache[:, :20] = float("nan")
    back = [BlockMove(20 + move.device, move.host) for move in reversed(out)]
    result = runner.launch(StepPlan(loads=back)).result()
    assert (result.num_loaded, result.token_ids, inner.launched) == (20, [], 0)
    assert torch.equal(cache[:, 20:], before[:, :20])


@pytest.mark.parametrize("device", DEVICES)
def test_a_stored_block_may_be_written_at_once_and_a_load_is_reported_once_it_is_there(device: str) -> None:
    cache, runner, inner = make(device)
    before = cache.clone()
    chunk = Chunk(None, 0, 1, True, 0, [])  # type: ignore[arg-type]
    for round_ in range(6):
        moves = [BlockMove(block, 8 * round_ + block) for block in range(8)]
        runner.launch(StepPlan(chunks=[chunk], stores=moves))
        cache[:, :8] += 1.0  # as a forward pass would, on the compute stream
    steps = []
    for round_ in range(6):
        moves = [BlockMove(32 + block, 8 * round_ + block) for block in range(8)]
        steps.append(runner.launch(StepPlan(chunks=[chunk], loads=moves)))
        result = steps[-1].result()
        assert result.token_ids == [7]
        assert result.num_loaded <= 8 * (round_ + 1)
        assert runner.launch(StepPlan(loads=[])).result().num_loaded == 8 * (round_ + 1)
        assert torch.allclose(cache[:, 32:], before[:, :8] + round_, atol=1e-5)
    assert inner.launched == 12


@pytest.mark.gpu
def test_copies_beside_heavy_steps_lose_nothing() -> None:
    cache, runner, _ = make("cuda", host_blocks=400, num_blocks=400)
    big = torch.randn(4096, 4096, device="cuda")
    chunk = Chunk(None, 0, 1, True, 0, [])  # type: ignore[arg-type]
    for round_ in range(10):
        values = torch.randn_like(cache[:, :200])
        cache[:, :200] = values
        big = big @ big / 64
        runner.launch(StepPlan(chunks=[chunk], stores=[BlockMove(b, (b * 7 + round_) % 400) for b in range(200)]))
        cache[:, :200] = float("nan")
        loads = [BlockMove(200 + b, (b * 7 + round_) % 400) for b in range(200)]
        assert runner.launch(StepPlan(loads=loads)).result().num_loaded == 200 * (round_ + 1)
        assert torch.equal(cache[:, 200:], values)


def test_neighbours_in_host_memory_are_one_run() -> None:
    memory = HostMemory(SHAPE, torch.float32, 20 * BLOCK_BYTES)
    assert memory.num_blocks == 20
    assert [(first, stop) for first, stop, _ in memory.runs([3, 4, 6, 7, 8, 9, 2])] == [
        (0, 2), (2, 4), (4, 6), (6, 7),  # a piece ends at 7
    ]  # fmt: skip


def test_when_memory_is_refused_it_goes_on_with_what_it_got(monkeypatch, caplog) -> None:
    class Refusing(HostMemory):
        def _take(self, num_bytes: int, stop: threading.Event) -> torch.Tensor:
            if self.num_blocks >= 16:
                raise RuntimeError("CUDA error: out of memory\nmore words")
            return super()._take(num_bytes, stop)

    memory = Refusing(SHAPE, torch.float32, 100 * BLOCK_BYTES)
    assert memory.num_blocks == 16
    assert "go on with that (CUDA error: out of memory)" in caplog.text
    cache = torch.randn((SHAPE[0], 4, *SHAPE[1:]))
    swap = HostSwap(cache, memory)
    swap.store([BlockMove(1, 15)])
    swap.load([BlockMove(2, 15)])
    assert torch.equal(cache[:, 1], cache[:, 2])


def test_a_process_that_ends_while_memory_is_given_back_ends_well_and_soon() -> None:
    """The main function's end frees the pool, whose memory a thread then unpins, in the driver most of the time."""
    script = """
import time, torch
from mainsail_engine.runner import swap
torch.cuda.set_device = torch.cuda.synchronize = lambda device: None
swap.unpin = lambda piece: time.sleep(0.05)
swap._give_back([torch.empty(1)] * 20_000, torch.device("cpu"))
print("the end", flush=True)
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=240, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "the end\n", "")


def test_how_much_host_memory() -> None:
    gib = 2**30
    assert offloading_bytes(1.5, pool_bytes=gib, cuda=False) == gib * 3 // 2
    assert offloading_bytes(0, pool_bytes=gib, cuda=True) == 0
    assert offloading_bytes(None, pool_bytes=gib, cuda=False) == 0
    assert offloading_bytes(None, pool_bytes=1000, cuda=True) == 1000
    assert 0 < offloading_bytes(None, pool_bytes=1 << 60, cuda=True) < 1 << 50
    early = 2 * gib
    assert offloading_bytes(None, pool_bytes=3 * gib, cuda=True, early_bytes=early) == early
    assert offloading_bytes(None, pool_bytes=gib, cuda=True, early_bytes=early) == gib, "no more than the pool"
    assert offloading_bytes(2, pool_bytes=gib, cuda=True, early_bytes=early) == early, "unless more is asked for"


def test_without_host_memory_the_runner_is_itself() -> None:
    cache = torch.zeros((SHAPE[0], 4, *SHAPE[1:]))
    runner = Runner(cache)
    assert with_host_memory(runner, cache, host_memory(cache, BLOCK_BYTES - 1)) is runner


@pytest.mark.parametrize("device", DEVICES)
def test_memory_that_was_lent_is_for_blocks_again(device: str) -> None:
    cache = torch.randn((SHAPE[0], 40, *SHAPE[1:]), device=device)
    memory = host_memory(cache, 50 * BLOCK_BYTES)
    assert memory is not None
    while memory.num_blocks < 50:
        pass
    lent = memory.lend(20 * BLOCK_BYTES)
    assert [len(piece) for piece in lent] == [8 * BLOCK_BYTES] * 3, "as many pieces as that takes"
    assert memory.num_blocks == 24
    for piece in lent:
        piece.fill_(255)
    memory.take_back()
    while memory.num_blocks < 50:
        pass
    runner = with_host_memory(Runner(cache), cache, memory)
    before = cache.clone()
    moves = [BlockMove(block, 49 - block) for block in range(20)]
    runner.launch(StepPlan(stores=moves)).result()
    cache[:, :20] = 0.0
    runner.launch(StepPlan(loads=moves)).result()
    assert torch.equal(cache, before)


def test_more_is_lent_than_there_is() -> None:
    memory = HostMemory(SHAPE, torch.float32, 20 * BLOCK_BYTES)
    assert sum(len(piece) for piece in memory.lend(100 * BLOCK_BYTES)) == 20 * BLOCK_BYTES
    memory.take_back()
    assert memory.num_blocks == 20
