"""The leader's side of an engine of several ranks: starts those of its node, tells all of them every plan, notices when
one is lost.

    core process = rank 0 ──plans (PUB)──────▶ all other ranks, one process each (tp_worker.py), here and on other nodes
                          ◀──beats (PULL)───── every second, with the number of the last step that is done
                          ──pulse (PUB)──────▶ ranks on other nodes: the leader lives
                          ◀──results (PULL)─── the last stage's tokens, where there are several stages

A rank is lost when its process ends, when it is silent for SILENT_S (stopped, starved, or its node is gone), or when a
step is not done within the step limit of the one before it (a collective that hangs); the clock for that stands still
when the leader does (awake.py). Nothing can go on without it: `on_lost` is told why, once. Ranks of other nodes end
when the connection to the leader does, or its pulse (tp_worker.py).

Within a node the sockets are files; over nodes they listen on free ports, which the leader tells at the rendezvous.
"""

from __future__ import annotations

import struct
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import msgspec
import numpy as np
import zmq
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from mainsail_engine.awake import AwakeClock
from mainsail_engine.config import EngineConfig
from mainsail_engine.model.checkpoint_config import read_architecture
from mainsail_engine.model.parallel import SINGLE, Parallel, check_divides, check_stages
from mainsail_engine.runner.ranks import WorkerStart, spawn
from mainsail_engine.runner.rendezvous import Addresses, invite, wait_for_all
from mainsail_engine.runner.replicate import (
    AdapterMessage,
    MasksMessage,
    PlanMessage,
    PlanSender,
    SleepMessage,
    WakeUpMessage,
    encode,
)
from mainsail_engine.runner.swap import SwappingRunner
from mainsail_engine.step import PendingLogits, PendingStep, Runner, StepPlan, StepResult

SILENT_S = 5.0
"""Five beats missed."""
LOADING_SILENT_S = 60.0
"""While it loads, a rank may hold its interpreter for long."""
PULSE_S = 1.0
TICK_MS = 200
LONGEST_TURN_S = 1.0
"""Of whoever listens to beats: more is time in which the leader was stopped or starved itself."""
STEP_LIMIT_S = {"cuda": 8.0}
CPU_STEP_LIMIT_S = 60.0
NUMBER = struct.Struct("<q")
"""Before every message to the ranks: its number, since a connection that was lost and came back loses messages."""
HELLO = b""
"""Told until every rank has heard it: what is published before somebody listens is lost."""


class Beat(msgspec.Struct, frozen=True, array_like=True):
    rank: int
    num_done: int
    """Steps that have been computed."""
    times_begun: int
    """0 while it loads, then 1, and one more for each time that it fell asleep or woke up."""
    num_host_blocks: int
    """Of host memory, by now."""


class ResultMessage(msgspec.Struct, frozen=True, array_like=True):
    """From the last stage."""

    number: int
    """Of the step, from 1."""
    result: StepResult


class Workers:
    def __init__(self, config: EngineConfig, store: TCPStore, device: str, on_lost: Callable[[str], None]) -> None:
        """Starts the processes of this node; the caller then joins the group, which waits for them."""
        self._folder = tempfile.TemporaryDirectory(prefix="mainsail-ranks-")
        self._context = zmq.Context()
        self._plans, plans = self._bind(config, zmq.PUB, "plans")
        self._pulse, pulse = self._bind(config, zmq.PUB, "pulse")
        self._beats, beats = self._bind(config, zmq.PULL, "beats")
        self._results, results = self._bind(config, zmq.PULL, "results")
        invite(store, config, Addresses(plans, pulse, beats, results))
        self._on_lost = on_lost
        self._clock = AwakeClock(LONGEST_TURN_S)
        """For all that follows; it ticks on the watcher's thread."""
        self._step_limit_s = STEP_LIMIT_S.get(device, CPU_STEP_LIMIT_S)
        self._sender = PlanSender()
        self._decode_result = msgspec.msgpack.Decoder(ResultMessage).decode
        self._unfinished: deque[tuple[int, float]] = deque()
        """(number, when it was sent) of the steps that not every rank has done."""
        self._last_done_s = 0.0
        """When every rank had done the step before those: they may wait for one another, each for a whole limit."""
        self._num_sent = self._num_told = 0
        ranks = range(1, config.num_ranks)
        self._num_done = dict.fromkeys(ranks, 0)
        self._last_beat = dict.fromkeys(ranks, float("inf"))
        """Silence counts from the first beat: before it a rank is being started."""
        self._begun = dict.fromkeys(ranks, 0)
        self._host_blocks = dict.fromkeys(ranks, 0)
        """By now, since the rank has begun last."""
        self._times_begun = 1
        self._processes = {
            rank: spawn(WorkerStart(config=config, rank=rank, host="127.0.0.1", port=store.port))
            for rank in ranks
            if rank in config.ranks_of(0)
        }
        self._watcher = threading.Thread(target=self._watch, name="ranks", daemon=True)
        self._watcher.start()
        wait_for_all(store, ranks)

    def _bind(self, config: EngineConfig, kind: int, name: str) -> tuple[zmq.Socket[bytes], str]:
        """(the socket, where ranks find it)."""
        found = self._context.socket(kind)
        found.set_hwm(0)
        if config.nodes.nnodes == 1:
            address = f"ipc://{Path(self._folder.name, name)}"
            found.bind(address)
            return found, address
        return found, f"tcp://*:{found.bind_to_random_port('tcp://*')}"

    def _wait_ready(self) -> None:
        """Until every rank has loaded and listens."""
        while any(begun == 0 for begun in self._begun.values()):
            self._plans.send(HELLO)
            time.sleep(TICK_MS / 10_000)

    def all_ranks(self, runner: Runner, *, staged: bool) -> Runner:
        """What rank 0's own runner does, on every rank. Waits until all have loaded their weights."""
        self._wait_ready()
        return PipelineRunner(runner, self) if staged else TensorParallelRunner(runner, self)

    @property
    def num_host_blocks(self) -> int:
        """How many host blocks every other rank has by now."""
        begun = all(times == self._times_begun for times in self._begun.values())
        return min(self._host_blocks.values()) if begun else 0

    def sleep(self) -> None:
        """With nothing in flight."""
        self._begin_anew(SleepMessage())

    def wake_up(self) -> None:
        """Rank 0 must do so at the same time: it ends with a step of all."""
        self._begin_anew(WakeUpMessage())

    def _begin_anew(self, message: SleepMessage | WakeUpMessage) -> None:
        self._times_begun += 1
        self._tell(message)

    def _tell(self, message: PlanMessage | MasksMessage | AdapterMessage | SleepMessage | WakeUpMessage) -> None:
        self._plans.send(NUMBER.pack(self._num_told) + encode(message))
        self._num_told += 1

    def send(self, plan: StepPlan, num_loaded: int) -> int:
        """num_loaded: see step.StepPlan. Returns the step's number."""
        self._num_sent += 1
        self._unfinished.append((self._num_sent, self._clock.now_s))
        self._tell(self._sender.message(plan, num_loaded))
        return self._num_sent

    def take_result(self, number: int) -> StepResult:
        """Wait for what the last stage says of that step. In the order of their numbers."""
        has_come = bool(self._results.poll(0))
        message = self._decode_result(self._results.recv())
        if message.number != number:
            raise RuntimeError(f"the last stage's result is of step {message.number}, not {number}")
        return replace(message.result, ended_unseen=has_come)

    def send_adapter(self, slot: int, name: str, path: str) -> None:
        self._tell(AdapterMessage(slot, name, path))

    def send_masks(self, rows: Sequence[int], words: bytes) -> None:
        self._tell(MasksMessage(list(rows), words))

    def wait_lost(self) -> None:
        """Until `on_lost` was told, if a rank is lost: a collective may say so before the watcher sees it."""
        self._watcher.join(SILENT_S + 1.0)

    def _watch(self) -> None:
        decode = msgspec.msgpack.Decoder(Beat).decode
        pulse_s = 0.0
        while True:
            if (now := time.monotonic()) >= pulse_s + PULSE_S:
                pulse_s = now
                self._pulse.send(b"")
            if self._beats.poll(TICK_MS):
                self._note(decode(self._beats.recv()))
            if (trouble := self._trouble(self._clock.tick())) is not None:
                self._on_lost(trouble)
                return

    def _note(self, beat: Beat) -> None:
        self._num_done[beat.rank] = beat.num_done
        self._host_blocks[beat.rank] = beat.num_host_blocks
        self._begun[beat.rank] = beat.times_begun
        self._last_beat[beat.rank] = self._clock.now_s
        while self._unfinished and self._unfinished[0][0] <= min(self._num_done.values()):
            self._unfinished.popleft()
            self._last_done_s = self._clock.now_s

    def _trouble(self, now: float) -> str | None:
        for rank, last_s in self._last_beat.items():
            process = self._processes.get(rank)
            if process is not None and (code := process.poll()) is not None:
                how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
                return f"rank {rank} {how}; its log lines say why"
            limit_s = SILENT_S if self._begun[rank] else LOADING_SILENT_S
            if now - last_s > limit_s:
                return f"rank {rank} has been silent for {limit_s:g} s: stopped, gone, or starved of CPU"
        if self._unfinished and now - max(self._unfinished[0][1], self._last_done_s) > self._step_limit_s:
            number = self._unfinished[0][0]
            late = ", ".join(str(rank) for rank, done in self._num_done.items() if done < number)
            return f"rank {late} has not finished a step within {self._step_limit_s:g} s"
        return None


def host_bytes(config: EngineConfig) -> int:
    """A rank's share of its host's memory for KV. Only what is asked for: ranks would measure what is free each for
    itself, and all at once."""
    return int((config.cache.offloading_size_gib or 0.0) * 2**30) // config.ranks_per_node


def start_ranks(config: EngineConfig, on_lost: Callable[[str], None]) -> tuple[Parallel, Workers | None]:
    """This process's place among the ranks, and the others; a single rank has none. Waits for all to meet.

    Raises StartupError's kinds for a model that cannot be split so, before any process is started.
    """
    if config.num_ranks == 1:
        return SINGLE, None
    architecture = read_architecture(Path(config.model.path))
    check_stages(architecture, config.pipeline_parallel_size)
    check_divides(architecture, config.tensor_parallel_size)
    from mainsail_engine.runner.distributed import join, listen
    from mainsail_engine.runner.model_runner import choose_device

    choose_device(config.device, config.ranks_per_node - 1)  # raises where there are too few
    device = choose_device(config.device)
    nodes, size = config.nodes, config.tensor_parallel_size
    store = listen(config.num_ranks, nodes.master_port if nodes.nnodes > 1 else 0)
    workers = Workers(config, store, device.type, on_lost)
    host = nodes.master_addr if nodes.nnodes > 1 else "127.0.0.1"
    return join(0, size, device, store, num_stages=config.pipeline_parallel_size, host=host), workers


class TensorParallelRunner:
    """step.Runner over the ranks of one stage: what rank 0's own runner does, after the others were told."""

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
        _, pending = self._everywhere(plan)
        return EverywhereLogits(cast("PendingLogits", pending), self._workers) if plan.is_constrained else pending

    def _everywhere(self, plan: StepPlan) -> tuple[int, PendingStep | PendingLogits]:
        """(the step's number, what rank 0 makes of it)."""
        runner = self._runner
        number = self._workers.send(plan, runner.num_loaded if isinstance(runner, SwappingRunner) else 0)
        try:
            return number, runner.launch(plan)
        except RuntimeError:
            self._workers.wait_lost()
            raise


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


class PipelineRunner(TensorParallelRunner):
    """step.Runner over the ranks of several stages: rank 0 begins a step, the last stage says what came of it."""

    def launch(self, plan: StepPlan) -> PipelineStep:
        """See step.Runner."""
        number, pending = self._everywhere(plan)
        return PipelineStep(pending, self._workers, number, -(-self.vocab_size // 32))


class PipelineStep:
    """step.PendingLogits over several stages. Nobody but the last needs the masks."""

    def __init__(self, first: PendingStep, workers: Workers, number: int, num_words: int) -> None:
        """first: what the first stage has to do; num_words: of a mask."""
        self._first, self._workers, self._number, self._num_words = first, workers, number, num_words

    def sample(self, rows: Sequence[int], fill: Callable[[np.ndarray], None]) -> None:
        words = np.zeros((len(rows), self._num_words), np.int32)
        if rows:
            fill(words)
        self._workers.send_masks(rows, words.tobytes())

    def result(self) -> StepResult:
        own = self._first.result()
        return replace(self._workers.take_result(self._number), num_loaded=own.num_loaded)
