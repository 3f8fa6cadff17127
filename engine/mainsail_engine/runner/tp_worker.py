"""A rank above 0: loads its share of the weights, then computes every plan that rank 0 tells it, and beats.

    plans ──▶ main thread: launch ──▶ finisher thread: wait for it, count it, tell the leader its tokens (last stage)

It ends when its standard input does, which is when its parent dies, however that happens: rank 0, or on another node
the process that was started there (server/node.py). There it ends as well when the leader is gone: its connection
ends, or its pulse stops.
"""

from __future__ import annotations

import logging
import os
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NoReturn, cast

import msgspec
import numpy as np
import zmq
from zmq.utils.monitor import recv_monitor_message

from mainsail_engine.awake import AwakeClock
from mainsail_engine.child import take_orders
from mainsail_engine.config import EngineConfig
from mainsail_engine.errors import StartupError
from mainsail_engine.runner.ranks import Alive, Ended, WorkerStart, encode_words
from mainsail_engine.runner.replicate import (
    AdapterMessage,
    MasksMessage,
    PlanMessage,
    PlanReceiver,
    SleepMessage,
    WakeUpMessage,
    decode,
)
from mainsail_engine.runner.swap import SwappingStep
from mainsail_engine.runner.workers import HELLO, NUMBER, Beat, ResultMessage, host_bytes
from mainsail_engine.step import PendingLogits, PendingStep, Runner, StepResult

if TYPE_CHECKING:
    from mainsail_engine.runner.model_runner import ModelRunner

log = logging.getLogger(__name__)
BEAT_S = 1.0
LEADER_SILENT_S = 7.0
LEADER_LOADING_SILENT_S = 60.0
LONGEST_TURN_S = 2.0
"""Of whoever listens to the leader; see awake.py."""


class Parent:
    """The process that started this one, which may want to hear how it goes."""

    def __init__(self, start: WorkerStart) -> None:
        self._listens = start.is_listened_to
        self._has_loaded = False
        self._speaking = threading.Lock()
        if self._listens:
            self.start_vital(self._beat, "parent-beats")

    def loaded(self) -> None:
        """The rank follows the leader from now on."""
        self._has_loaded = True
        self._tell(Alive(True))

    def _beat(self) -> None:
        while True:
            self._tell(Alive(self._has_loaded))
            time.sleep(BEAT_S)

    def _tell(self, words: Ended | Alive) -> None:
        with self._speaking:
            if self._listens:
                sys.stdout.buffer.write(encode_words(words) + b"\n")
                sys.stdout.buffer.flush()

    def end(self, why: Ended) -> NoReturn:
        """End this process, whatever its other threads wait for."""
        log.error("%s: %s", why.reason, why.message)
        self._tell(why)
        os._exit(1)

    def start_vital(self, work: Callable[[], None], name: str) -> None:
        """Run a thread without which the rank would only look alive: if it fails, the process ends."""

        def run() -> None:
            try:
                work()
            except BaseException as error:
                log.exception("the rank's %s thread failed", name)
                self.end(Ended("EngineFailed", f"{type(error).__name__}: {error}"))

        threading.Thread(target=run, name=name, daemon=True).start()


class Progress:
    """How far this rank has got, and the beats that say so: at once after a step, and every second."""

    def __init__(self, rank: int, context: zmq.Context[zmq.Socket[bytes]], address: str) -> None:
        self._rank, self._context, self._address = rank, context, address
        self._num_done = 0
        self._begun: tuple[int, Runner | None] = (0, None)
        """How often the rank woke up, and what it runs since."""
        self._changed = threading.Event()
        threading.Thread(target=self._beat, name="beats", daemon=True).start()

    @property
    def has_begun(self) -> bool:
        return self._begun[0] > 0

    def begin(self, runner: Runner) -> None:
        """It runs this from now on, for the first time or after a sleep."""
        self._begun = (self._begun[0] + 1, runner)
        self._changed.set()

    def done(self) -> int:
        """One more step. Returns its number."""
        self._num_done += 1
        self._changed.set()
        return self._num_done

    def _beat(self) -> None:
        socket = self._context.socket(zmq.PUSH)
        socket.connect(self._address)
        encode = msgspec.msgpack.Encoder().encode
        while True:
            times, runner = self._begun
            socket.send(encode(Beat(self._rank, self._num_done, times, runner.num_host_blocks if runner else 0)))
            self._changed.wait(BEAT_S)
            self._changed.clear()


class Finisher:
    """Waits for launched steps, in order, on a thread of its own."""

    def __init__(
        self, parent: Parent, progress: Progress, context: zmq.Context[zmq.Socket[bytes]], results: str | None,
        take_device: Callable[[], None],
    ) -> None:  # fmt: skip
        """results: where the leader wants to hear of them. None: it does not. take_device: for the calling thread."""
        self._progress, self._context, self._results = progress, context, results
        self._take_device = take_device
        self._launched: queue.Queue[PendingStep | None] = queue.Queue()
        parent.start_vital(self._finish, "finisher")

    def add(self, pending: PendingStep) -> None:
        """A launched step; a constrained one once its sampling is queued. What its copies did is the main thread's."""
        self._launched.put(pending.step if isinstance(pending, SwappingStep) else pending)

    def wait(self) -> None:
        """Until all of them are done."""
        self._launched.join()

    def _finish(self) -> None:
        self._take_device()
        socket = self._context.socket(zmq.PUSH) if self._results is not None else None
        if socket is not None and self._results is not None:
            socket.set_hwm(0)
            socket.connect(self._results)
        encode = msgspec.msgpack.Encoder().encode
        while True:
            pending = self._launched.get()
            result = pending.result() if pending is not None else StepResult([])
            number = self._progress.done()
            if socket is not None:
                socket.send(encode(ResultMessage(number, result)))
            self._launched.task_done()


class Orders:
    """What the leader tells all ranks, each message once."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str) -> None:
        self._plans = context.socket(zmq.SUB)
        self._plans.set_hwm(0)
        self._plans.setsockopt(zmq.SUBSCRIBE, b"")
        self._plans.connect(address)
        self._next = 0

    def wait_heard(self) -> None:
        """Until the leader's hello comes through: from then on nothing is missed."""
        if self._plans.recv() != HELLO:
            raise RuntimeError("the leader gave an order before this rank had begun")

    def take(self) -> PlanMessage | MasksMessage | AdapterMessage | SleepMessage | WakeUpMessage:
        """The next one. Raises RuntimeError when one was lost."""
        while (frame := self._plans.recv()) == HELLO:
            pass
        (number,) = NUMBER.unpack_from(frame)
        if number != self._next:
            raise RuntimeError(f"message {number} of the leader came after {self._next - 1}: the connection lost some")
        self._next += 1
        return decode(memoryview(frame)[NUMBER.size :])


class Rank:
    """The rank's own runner, which sleeps and wakes up when rank 0's does."""

    def __init__(self, config: EngineConfig, runner: ModelRunner, progress: Progress) -> None:
        self._config, self._model_runner, self._progress = config, runner, progress
        self.runner = self._begin()

    def _begin(self) -> Runner:
        from mainsail_engine.runner.swap import host_memory, with_host_memory

        kv_cache = self._model_runner.kv_cache
        runner = with_host_memory(self._model_runner, kv_cache, host_memory(kv_cache, host_bytes(self._config)))
        self._progress.begin(runner)
        return runner

    @property
    def samples(self) -> bool:
        """Whether constrained steps wait for masks here."""
        return self._model_runner.samples

    def obey(self, message: AdapterMessage | SleepMessage | WakeUpMessage) -> None:
        if isinstance(message, AdapterMessage):
            adapter = self._model_runner.read_adapter(message.name, message.path)
            self._model_runner.fill_adapter(message.slot, adapter)
        elif isinstance(message, SleepMessage):
            self.runner = self._model_runner  # the host tier's buffers on the device go too
            self._progress.begin(self.runner)
            self._model_runner.sleep()
        else:
            self._model_runner.wake_up(self._config)
            self.runner = self._begin()


def follow(rank: Rank, orders: Orders, finisher: Finisher) -> None:
    """Forever: do what comes."""
    receiver = PlanReceiver()
    unsampled: deque[PendingLogits] = deque()
    while True:
        message = orders.take()
        if isinstance(message, MasksMessage):
            if rank.samples:
                pending = unsampled.popleft()
                pending.sample(message.rows, partial(_copy_masks, message.words))
                finisher.add(pending)
            continue
        if not isinstance(message, PlanMessage):
            finisher.wait()
            rank.obey(message)
            continue
        plan = receiver.plan(message)
        step = rank.runner.launch(plan)
        if plan.is_constrained and rank.samples:
            unsampled.append(cast("PendingLogits", step))
        else:
            finisher.add(step)


def _copy_masks(words: bytes, out: np.ndarray) -> None:
    out[:] = np.frombuffer(words, np.int32).reshape(out.shape)


def watch_leader(
    context: zmq.Context[zmq.Socket[bytes]], address: str, progress: Progress, end: Callable[[Ended], None]
) -> None:
    """Until the leader is gone: then `end`. (Between nodes; within one, standard input ends.)"""
    pulse = context.socket(zmq.SUB)
    pulse.setsockopt(zmq.SUBSCRIBE, b"")
    events = pulse.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    pulse.connect(address)
    poller = zmq.Poller()
    poller.register(pulse, zmq.POLLIN)
    poller.register(events, zmq.POLLIN)
    clock = AwakeClock(LONGEST_TURN_S)
    heard_s = clock.now_s
    while True:
        ready = dict(poller.poll(1000))
        now = clock.tick()
        if pulse in ready:
            pulse.recv()
            heard_s = now
        limit_s = LEADER_SILENT_S if progress.has_begun else LEADER_LOADING_SILENT_S
        if events in ready and recv_monitor_message(events):
            end(Ended("LeaderLost", "the leader's node has closed the connection: the engine has ended there"))
        if now - heard_s > limit_s:
            end(Ended("LeaderLost", f"the leader's node has been silent for {limit_s:g} s"))


def run(start: WorkerStart, parent: Parent) -> None:
    from mainsail_engine.runner.distributed import join
    from mainsail_engine.runner.model_runner import ModelRunner, choose_device
    from mainsail_engine.runner.rendezvous import come

    config = start.config
    size, num_stages, nodes = config.tensor_parallel_size, config.pipeline_parallel_size, config.nodes
    store, addresses = come(start.host, start.port, start.rank, config)
    context = zmq.Context()
    progress = Progress(start.rank, context, addresses.beats)
    if nodes.node_rank > 0:
        parent.start_vital(partial(watch_leader, context, addresses.pulse, progress, parent.end), "leader")
    orders = Orders(context, addresses.plans)
    device = choose_device(config.device, start.rank - config.ranks_of(nodes.node_rank).start)
    parallel = join(start.rank, size, device, store, num_stages=num_stages, host=start.host)
    runner = ModelRunner(config, parallel)
    orders.wait_heard()
    tells = num_stages > 1 and parallel.is_last and parallel.rank == 0
    finisher = Finisher(parent, progress, context, addresses.results if tells else None, runner.take_device)
    rank = Rank(config, runner, progress)
    parent.loaded()
    follow(rank, orders, finisher)


def main() -> None:
    start = take_orders(WorkerStart)
    logging.basicConfig(
        level=logging.INFO, format=f"%(asctime)s %(levelname)s rank {start.rank}: %(message)s", stream=sys.stderr
    )
    parent = Parent(start)
    try:
        run(start, parent)
    except StartupError as error:
        parent.end(Ended(error.reason, error.message))
    except BaseException as error:
        log.exception("the rank failed")
        parent.end(Ended("EngineFailed", f"{type(error).__name__}: {error}"))


if __name__ == "__main__":
    main()
