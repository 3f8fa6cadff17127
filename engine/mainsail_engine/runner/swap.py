"""Host memory for KV blocks, and the copies between it and the device (kv/host_tier.py decides which).

    compute stream   … gather ▶ staging │ copies │ forward pass of the plan …      the step never waits for the bus,
    out stream                └────────▶ staging ▶ host                            unless both staging buffers are full
    in stream                  host ▶ staging ▶ scatter ▶ done (event)             … nor for what comes in

A block is spread over the layers, so it passes through a staging buffer, in which it is contiguous: one transfer then
carries whole runs of blocks. A store is read on the compute stream before anything of its plan is written, so its
device block may be written at once. A load waits for the compute stream as it was when the load began, and for the
stores before it; nothing waits for a load but the scheduler, which is told how many have arrived.

On CUDA host memory is pinned, piece by piece: most of it at the very start (host_slabs.py), what is missing on a
thread. That may be refused beyond a limit that nobody tells; then it goes on with what it got, and says so. While the
driver pins, no step can be launched, so pieces are small, their pages are there before, and between two pieces the
thread rests for longer than one took. On the CPU both ends are ordinary memory, copies are made at once, and the rest
is the same.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import cast
from weakref import finalize

import numpy as np
import torch

from mainsail_engine.host_slabs import SLAB_BYTES, HostSlabs
from mainsail_engine.kv.moves import BlockMove
from mainsail_engine.pages import as_tensor, touched_zeros, untouched_zeros
from mainsail_engine.pinned import pin, unpin
from mainsail_engine.step import PendingLogits, PendingStep, Runner, StepPlan, StepResult
from mainsail_kernels.blocks import gather_blocks, scatter_blocks

log = logging.getLogger(__name__)
PIECE_BYTES = SLAB_BYTES
"""Host memory is taken in pieces of this size, with as many blocks as fit."""
PINNING_SHARE = 0.2
"""Of the time that pinning goes on, the share in which it holds the driver."""
STAGING_BYTES = 64 << 20
"""Each of three staging buffers on the device (two for stores, one for loads)."""


class HostMemory:
    """Blocks of shape [num_layers, 2, num_kv_heads, block_size, head_dim] in pieces of host memory."""

    def __init__(
        self, shape: Sequence[int], dtype: torch.dtype, num_bytes: int, *, device: torch.device | None = None,
        early: HostSlabs | None = None,
    ) -> None:  # fmt: skip
        """device: the CUDA device to pin for; None: ordinary memory. early: what is pinned already."""
        self._shape, self._dtype, self._device = tuple(shape), dtype, device
        self._block_bytes = torch.Size(shape).numel() * dtype.itemsize
        self._per_piece = max(1, PIECE_BYTES // self._block_bytes)
        self._wanted = num_bytes // PIECE_BYTES * self._per_piece + num_bytes % PIECE_BYTES // self._block_bytes
        if self._block_bytes > PIECE_BYTES:
            self._wanted = num_bytes // self._block_bytes
        self._pieces: list[torch.Tensor] = []
        self.num_blocks = 0
        """Grows while memory is being pinned."""
        self._pinning = _Pinning()
        if device is not None:
            finalize(self, self._pinning.end)
            finalize(self, _give_back, self._pieces, device).atexit = False
            self._use(early, device)
        self._begin()

    def _use(self, early: HostSlabs | None, device: torch.device) -> None:
        """What was pinned before the pool's size was known; what is too much of it is given back."""
        if early is None:
            return
        fitting = self._wanted // self._per_piece if self._block_bytes <= SLAB_BYTES else 0
        for slab in early.take(fitting):
            self._add(as_tensor(slab)[: self._per_piece * self._block_bytes])
        give_back_early(early, device)

    def _add(self, piece: torch.Tensor) -> None:
        blocks = len(piece) // self._block_bytes
        self._pieces.append(piece.view(self._dtype).view(blocks, *self._shape))
        self.num_blocks += blocks

    def _begin(self) -> None:
        """Take what is not there yet."""
        if self._device is None:
            self._take_all(threading.Event())
        else:
            self._pinning.begin(self._take_all)

    def lend(self, num_bytes: int) -> list[torch.Tensor]:
        """The memory itself, each piece as [n] uint8, for a sleep; what is beyond num_bytes is given back.

        Whatever the blocks held is lost. `take_back` ends it.
        """
        self._pinning.end()
        per_piece = self._per_piece * self._block_bytes
        kept = -(-num_bytes // per_piece)
        beyond = self._pieces[kept:]
        del self._pieces[kept:]
        self.num_blocks = sum(len(piece) for piece in self._pieces)
        if beyond and self._device is not None:
            _give_back(beyond, self._device)
        return [piece.view(torch.uint8).view(-1) for piece in self._pieces]

    def take_back(self) -> None:
        """The lent memory is for blocks again; the rest is taken again as at the start."""
        self._begin()

    def _take_all(self, stop: threading.Event) -> None:
        """Piece by piece until there is enough, or no more to be had."""
        if self._device is not None:
            torch.cuda.set_device(self._device)  # this thread's
        while self.num_blocks < self._wanted and not stop.is_set():
            blocks = min(self._per_piece, self._wanted - self.num_blocks)
            try:
                piece = self._take(blocks * self._block_bytes, stop)
            except (RuntimeError, OSError) as error:
                log.warning(
                    "host memory for KV: got %.1f GiB of the %.1f GiB asked for, and go on with that (%s)",
                    self.num_blocks * self._block_bytes / 2**30,
                    self._wanted * self._block_bytes / 2**30,
                    str(error).splitlines()[0],
                )
                return
            self._add(piece)

    def _take(self, num_bytes: int, stop: threading.Event) -> torch.Tensor:
        """[num_bytes] uint8."""
        if self._device is None:
            return untouched_zeros(num_bytes)
        piece = touched_zeros(num_bytes)  # the pages are there before the driver is asked to keep them
        started_s = time.monotonic()
        pin(piece)
        stop.wait((time.monotonic() - started_s) * (1 / PINNING_SHARE - 1))
        return piece

    def runs(self, hosts: Sequence[int]) -> Iterator[tuple[int, int, torch.Tensor]]:
        """(first, stop, the host memory of hosts[first:stop]) for every run of neighbours."""
        first = 0
        for stop in range(1, len(hosts) + 1):
            together = stop < len(hosts) and hosts[stop] == hosts[stop - 1] + 1 and hosts[stop] % self._per_piece
            if not together:
                piece, at = divmod(hosts[first], self._per_piece)
                yield first, stop, self._pieces[piece][at : at + stop - first]
                first = stop


class _Pinning:
    """The thread that pins, if there is one."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self, work: Callable[[threading.Event], None]) -> None:
        self._stop = stop = threading.Event()
        self._thread = threading.Thread(target=work, args=(stop,), name="pin-host-memory", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """The memory is no longer wanted, or the process ends, which must find no thread in the driver."""
        self._stop.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()


def give_back_early(early: HostSlabs, device: torch.device) -> None:
    """Those that nobody took."""
    if left := early.left():
        _give_back([as_tensor(slab) for slab in left], device)


def _give_back(pieces: list[torch.Tensor], device: torch.device) -> None:
    """On a thread that the end of the process waits for: one still in the driver then takes it down with an abort."""
    if threading.main_thread().is_alive():
        threading.Thread(target=_unpin, args=(pieces, device), name="unpin-host-memory").start()


def _unpin(pieces: list[torch.Tensor], device: torch.device) -> None:
    """It takes about a second for 32 GiB: not on the thread that wants to sleep. The process's end does it faster."""
    torch.cuda.set_device(device)  # this thread's
    torch.cuda.synchronize(device)
    while pieces and threading.main_thread().is_alive():
        unpin(pieces.pop())


class HostSwap:
    """Copies on the CPU: made at once."""

    def __init__(self, kv_cache: torch.Tensor, memory: HostMemory) -> None:
        self._cache, self._memory = kv_cache, memory
        self._num_loaded = 0

    @property
    def num_blocks(self) -> int:
        return self._memory.num_blocks

    def store(self, moves: Sequence[BlockMove]) -> None:
        for move in moves:
            for _, _, memory in self._memory.runs((move.host,)):
                gather_blocks(self._cache, torch.tensor([move.device]), memory)

    def load(self, moves: Sequence[BlockMove]) -> None:
        for move in moves:
            for _, _, memory in self._memory.runs((move.host,)):
                scatter_blocks(self._cache, torch.tensor([move.device]), memory)
        self._num_loaded += len(moves)

    def num_loaded(self, *, wait: bool) -> int:
        """Blocks that have arrived since the start. wait: until all loads begun so far are done."""
        return self._num_loaded

    def order_after(self, num_loaded: int) -> None:
        """What is queued from now on may read the first num_loaded blocks that were loaded."""


class CudaHostSwap(HostSwap):
    """Copies on streams of their own."""

    def __init__(self, kv_cache: torch.Tensor, memory: HostMemory) -> None:
        super().__init__(kv_cache, memory)
        layers, _, *rest = kv_cache.shape
        shape = (layers, *rest)
        blocks = max(1, STAGING_BYTES // (torch.Size(shape).numel() * kv_cache.element_size()))

        def staging() -> torch.Tensor:
            return torch.empty((blocks, *shape), dtype=kv_cache.dtype, device=kv_cache.device)

        self._out = torch.cuda.Stream(kv_cache.device)
        self._in = torch.cuda.Stream(kv_cache.device)
        self._out_buffers = deque((staging(), torch.cuda.Event()) for _ in range(2))
        """Each with the event of its last transfer to the host."""
        self._in_buffer = staging()
        self._pending: deque[tuple[int, torch.cuda.Event]] = deque()
        """(number of the last block, done) of the loads begun."""
        self._num_begun = 0

    def store(self, moves: Sequence[BlockMove]) -> None:
        """Call on the compute stream, before anything of the plan is written."""
        ordered = sorted(moves, key=lambda move: move.host)
        size = self._in_buffer.shape[0]
        for start in range(0, len(ordered), size):
            self._store(ordered[start : start + size])

    def _store(self, moves: Sequence[BlockMove]) -> None:
        buffer, sent = self._out_buffers[0]
        self._out_buffers.rotate(-1)
        torch.cuda.current_stream().wait_event(sent)
        gather_blocks(self._cache, self._blocks(moves), buffer[: len(moves)])
        self._out.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._out):
            for first, stop, memory in self._memory.runs([move.host for move in moves]):
                memory.copy_(buffer[first:stop], non_blocking=True)
            sent.record()

    def load(self, moves: Sequence[BlockMove]) -> None:
        """Call on the compute stream, after `store` and before the forward pass."""
        self._in.wait_stream(torch.cuda.current_stream())
        self._in.wait_stream(self._out)
        size = self._in_buffer.shape[0]
        with torch.cuda.stream(self._in):
            for start in range(0, len(moves), size):
                self._load(moves[start : start + size])

    def _load(self, moves: Sequence[BlockMove]) -> None:
        for first, stop, memory in self._memory.runs([move.host for move in moves]):
            self._in_buffer[first:stop].copy_(memory, non_blocking=True)
        scatter_blocks(self._cache, self._blocks(moves), self._in_buffer[: len(moves)])
        self._num_begun += len(moves)
        done = torch.cuda.Event()
        done.record()
        self._pending.append((self._num_begun, done))

    def _blocks(self, moves: Sequence[BlockMove]) -> torch.Tensor:
        blocks = torch.tensor([move.device for move in moves], dtype=torch.int64, pin_memory=True)
        return blocks.to(self._cache.device, non_blocking=True)

    def order_after(self, num_loaded: int) -> None:
        for number, done in self._pending:
            torch.cuda.current_stream().wait_event(done)
            if number >= num_loaded:
                break

    def num_loaded(self, *, wait: bool) -> int:
        while self._pending:
            number, done = self._pending[0]
            if wait:
                done.synchronize()
            elif not done.query():
                break
            self._num_loaded = number
            self._pending.popleft()
        return self._num_loaded


@dataclass(slots=True)
class SwappingStep:
    """A launched plan and its copies."""

    swap: HostSwap
    step: PendingStep | PendingLogits | None
    """None: the plan had no chunk."""

    def sample(self, rows: Sequence[int], fill: Callable[[np.ndarray], None]) -> None:
        """See step.PendingLogits: of a constrained plan only."""
        cast("PendingLogits", self.step).sample(rows, fill)

    def result(self) -> StepResult:
        result = StepResult([]) if self.step is None else self.step.result()
        return replace(result, num_loaded=self.swap.num_loaded(wait=self.step is None))


class SwappingRunner:
    """A runner whose plans may store and load blocks."""

    def __init__(self, runner: Runner, swap: HostSwap) -> None:
        self._runner, self._swap = runner, swap
        self.num_blocks = runner.num_blocks
        self.max_model_len = runner.max_model_len
        self.eos_token_ids = runner.eos_token_ids
        self.vocab_size = runner.vocab_size

    @property
    def num_host_blocks(self) -> int:
        return self._swap.num_blocks

    @property
    def num_loaded(self) -> int:
        """Blocks that have arrived so far."""
        return self._swap.num_loaded(wait=False)

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> SwappingStep:
        """See step.Runner."""
        self._swap.num_loaded(wait=False)  # forgets the loads that are done
        if plan.num_loaded:
            self._swap.order_after(plan.num_loaded)
        if plan.stores:
            self._swap.store(plan.stores)
        if plan.loads:
            self._swap.load(plan.loads)
        return SwappingStep(self._swap, self._runner.launch(plan) if plan.chunks else None)


def host_memory(kv_cache: torch.Tensor, num_bytes: int, early: HostSlabs | None = None) -> HostMemory | None:
    """That much of it for blocks like those of kv_cache; None where not one fits. early: what is pinned already."""
    layers, _, *rest = kv_cache.shape
    shape = (layers, *rest)
    if num_bytes < max(torch.Size(shape).numel() * kv_cache.element_size(), 1):  # an encoder's blocks have no bytes
        if early is not None:
            give_back_early(early, kv_cache.device)
        return None
    cuda = kv_cache.device.type == "cuda"
    return HostMemory(shape, kv_cache.dtype, num_bytes, device=kv_cache.device if cuda else None, early=early)


def with_host_memory(runner: Runner, kv_cache: torch.Tensor, memory: HostMemory | None) -> Runner:
    """The runner with that host memory for KV; itself for none."""
    if memory is None:
        return runner
    cuda = kv_cache.device.type == "cuda"
    return SwappingRunner(runner, CudaHostSwap(kv_cache, memory) if cuda else HostSwap(kv_cache, memory))
