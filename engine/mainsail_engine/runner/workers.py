"""Rank 0's side of a tensor-parallel engine: starts the other ranks, tells them every plan, notices when one is lost.

    core process = rank 0 ──plan (PUB)──▶ ranks 1 … N-1, one process each (tp_worker.py)
                          ◀──beats (PULL)── every second, with the number of the last step that is done

A rank is lost when its process ends, when it is silent for SILENT_S (stopped, or starved), or when a step that was sent
is not done within the step limit (a collective that hangs). Nothing can go on without it: `on_lost` is told why, once.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import msgspec
import numpy as np
import zmq

from mainsail_engine.config import EngineConfig
from mainsail_engine.model.architecture import read_architecture
from mainsail_engine.model.parallel import SINGLE, Parallel, check_divides
from mainsail_engine.runner.replicate import (
    AdapterMessage,
    MasksMessage,
    PlanSender,
    SleepMessage,
    WakeUpMessage,
    encode,
)
from mainsail_engine.runner.swap import SwappingRunner
from mainsail_engine.step import PendingLogits, PendingStep, Runner, StepPlan, StepResult

SILENT_S = 5.0
"""Five beats missed."""
TICK_MS = 200
STEP_LIMIT_S = {"cuda": 8.0}
CPU_STEP_LIMIT_S = 60.0


class WorkerStart(msgspec.Struct, frozen=True, kw_only=True):
    """The one line of JSON on a worker's standard input."""

    config: EngineConfig
    rank: int
    store_port: int
    plans_address: str
    beats_address: str


class Beat(msgspec.Struct, frozen=True, array_like=True):
    rank: int
    num_done: int
    """Steps that have been computed."""
    times_begun: int
    """1, and one more for each time that it fell asleep or woke up."""
    num_host_blocks: int
    """Of host memory, by now."""


class Workers:
    def __init__(self, config: EngineConfig, store_port: int, device: str, on_lost: Callable[[str], None]) -> None:
        """Starts the processes; the caller then joins the group, which waits for them."""
        self._folder = tempfile.TemporaryDirectory(prefix="mainsail-ranks-")
        plans, beats = (f"ipc://{Path(self._folder.name, name)}" for name in ("plans", "beats"))
        self._context = zmq.Context()
        self._plans = self._context.socket(zmq.PUB)
        self._plans.set_hwm(0)
        self._plans.bind(plans)
        self._beats = self._context.socket(zmq.PULL)
        self._beats.bind(beats)
        self._on_lost = on_lost
        self._step_limit_s = STEP_LIMIT_S.get(device, CPU_STEP_LIMIT_S)
        self._sender = PlanSender()
        self._unfinished: deque[tuple[int, float]] = deque()
        """(number, when it was sent) of the steps that not every rank has done."""
        self._num_sent = 0
        ranks = range(1, config.tensor_parallel_size)
        self._num_done = dict.fromkeys(ranks, 0)
        self._last_beat = dict.fromkeys(ranks, float("inf"))
        """Silence counts from the first beat: before it a rank loads its weights."""
        self._host_blocks: dict[int, tuple[int, int]] = dict.fromkeys(ranks, (0, 0))
        """(how often it has begun, how many host blocks it has since)."""
        self._times_begun = 1
        self._processes = {
            rank: _spawn(
                WorkerStart(config=config, rank=rank, store_port=store_port, plans_address=plans, beats_address=beats)
            )
            for rank in ranks
        }
        self._watcher = threading.Thread(target=self._watch, name="ranks", daemon=True)
        self._watcher.start()

    def _wait_ready(self) -> None:
        """Until every rank listens for plans: a message to a subscriber who is not there yet would be lost."""
        while any(beat == float("inf") for beat in self._last_beat.values()):
            time.sleep(TICK_MS / 10_000)

    def all_ranks(self, runner: Runner) -> TensorParallelRunner:
        """What rank 0's own runner does, on every rank. Waits until all have loaded their weights."""
        self._wait_ready()
        return TensorParallelRunner(runner, self)

    @property
    def num_host_blocks(self) -> int:
        """How many host blocks every other rank has by now."""
        return min(blocks if begun == self._times_begun else 0 for begun, blocks in self._host_blocks.values())

    def sleep(self) -> None:
        """With nothing in flight."""
        self._begin_anew(SleepMessage())

    def wake_up(self) -> None:
        """Rank 0 must do so at the same time: it ends with a step of all."""
        self._begin_anew(WakeUpMessage())

    def _begin_anew(self, message: SleepMessage | WakeUpMessage) -> None:
        self._times_begun += 1
        self._plans.send(encode(message))

    def send(self, plan: StepPlan, num_loaded: int) -> None:
        """num_loaded: see step.StepPlan."""
        self._num_sent += 1
        self._unfinished.append((self._num_sent, time.monotonic()))
        self._plans.send(encode(self._sender.message(plan, num_loaded)))

    def send_adapter(self, slot: int, name: str, path: str) -> None:
        self._plans.send(encode(AdapterMessage(slot, name, path)))

    def send_masks(self, rows: Sequence[int], words: bytes) -> None:
        self._plans.send(encode(MasksMessage(list(rows), words)))

    def wait_lost(self) -> None:
        """Until `on_lost` was told, if a rank is lost: a collective may say so before the watcher sees it."""
        self._watcher.join(SILENT_S + 1.0)

    def _watch(self) -> None:
        decode = msgspec.msgpack.Decoder(Beat).decode
        while True:
            if self._beats.poll(TICK_MS):
                beat = decode(self._beats.recv())
                self._num_done[beat.rank] = beat.num_done
                self._host_blocks[beat.rank] = beat.times_begun, beat.num_host_blocks
                self._last_beat[beat.rank] = time.monotonic()
                while self._unfinished and self._unfinished[0][0] <= min(self._num_done.values()):
                    self._unfinished.popleft()
            if (trouble := self._trouble(time.monotonic())) is not None:
                self._on_lost(trouble)
                return

    def _trouble(self, now: float) -> str | None:
        for rank, process in self._processes.items():
            if (code := process.poll()) is not None:
                how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
                return f"tensor-parallel rank {rank} {how}; its log lines say why"
            if now - self._last_beat[rank] > SILENT_S:
                return f"tensor-parallel rank {rank} has been silent for {SILENT_S:g} s: stopped, or starved of CPU"
        if self._unfinished and now - self._unfinished[0][1] > self._step_limit_s:
            number = self._unfinished[0][0]
            late = ", ".join(str(rank) for rank, done in self._num_done.items() if done < number)
            return f"tensor-parallel rank {late} has not finished a step within {self._step_limit_s:g} s"
        return None


def host_bytes(config: EngineConfig) -> int:
    """A rank's share of the host memory for KV. Only what is asked for: ranks would measure what is free each for
    itself, and all at once."""
    return int((config.cache.offloading_size_gib or 0.0) * 2**30) // config.tensor_parallel_size


def start_ranks(config: EngineConfig, on_lost: Callable[[str], None]) -> tuple[Parallel, Workers | None]:
    """This process's place among the ranks, and the others; a single rank has none. Waits for all to meet.

    Raises StartupError's kinds for a model that cannot be split so, before any process is started.
    """
    if config.tensor_parallel_size == 1:
        return SINGLE, None
    check_divides(read_architecture(Path(config.model.path)), config.tensor_parallel_size)
    from mainsail_engine.runner.distributed import join, listen
    from mainsail_engine.runner.model_runner import choose_device

    device = choose_device(config.device)
    store = listen(config.tensor_parallel_size)
    workers = Workers(config, store.port, device.type, on_lost)
    return join(0, config.tensor_parallel_size, device, store), workers


def _spawn(start: WorkerStart) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, "-m", "mainsail_engine.runner.tp_worker"], stdin=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.write(msgspec.json.encode(start) + b"\n")
    process.stdin.flush()
    return process


class TensorParallelRunner:
    """step.Runner over all ranks: what rank 0's own runner does, after the others were told."""

    def __init__(self, runner: Runner, workers: Workers) -> None:
        self._runner = runner
        self._workers = workers
        self.num_blocks = runner.num_blocks
        self.max_model_len = runner.max_model_len
        self.eos_token_ids = runner.eos_token_ids
        self.vocab_size = runner.vocab_size

    @property
    def num_host_blocks(self) -> int:
        own = self._runner.num_host_blocks
        return min(own, self._workers.num_host_blocks) if own else 0

    def launch(self, plan: StepPlan) -> PendingStep | PendingLogits:
        """Start one step on every rank; see step.Runner."""
        self._workers.send(plan, self._runner.num_loaded if isinstance(self._runner, SwappingRunner) else 0)
        try:
            pending = self._runner.launch(plan)
        except RuntimeError:
            self._workers.wait_lost()
            raise
        return EverywhereLogits(cast("PendingLogits", pending), self._workers) if plan.is_constrained else pending


class EverywhereLogits:
    """step.PendingLogits on every rank: the masks that are filled here go to the others too."""

    def __init__(self, pending: PendingLogits, workers: Workers) -> None:
        self._pending, self._workers = pending, workers

    def sample(self, rows: Sequence[int], fill: Callable[[np.ndarray], None]) -> None:
        def fill_everywhere(words: np.ndarray) -> None:
            fill(words)
            self._workers.send_masks(rows, words.tobytes())

        if not rows:
            self._workers.send_masks(rows, b"")
        self._pending.sample(rows, fill_everywhere)

    def result(self) -> StepResult:
        return self._pending.result()
