"""A rank above 0: loads its share of the weights, then computes every plan that rank 0 tells it, and beats.

It ends when its standard input does, which is when rank 0 dies, however that happens.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, cast

import msgspec
import numpy as np
import zmq

from mainsail_engine.child import take_orders
from mainsail_engine.config import EngineConfig
from mainsail_engine.errors import StartupError
from mainsail_engine.runner.replicate import (
    AdapterMessage,
    MasksMessage,
    PlanReceiver,
    SleepMessage,
    WakeUpMessage,
    decode,
)
from mainsail_engine.runner.workers import Beat, WorkerStart, host_bytes
from mainsail_engine.step import PendingLogits, PendingStep, Runner

if TYPE_CHECKING:
    from mainsail_engine.runner.model_runner import ModelRunner

log = logging.getLogger(__name__)
BEAT_S = 1.0
IDLE_MS = 20
"""With no plan for this long, the steps in flight are waited for."""


class Progress:
    """How far this rank has got, and the beats that say so: at once after a step, and every second."""

    def __init__(self, rank: int, context: zmq.Context[zmq.Socket[bytes]], address: str) -> None:
        self._rank, self._context, self._address = rank, context, address
        self._num_done = 0
        self._begun: tuple[int, Runner | None] = (0, None)
        """How often the rank woke up, and what it runs since."""
        self._changed = threading.Event()
        threading.Thread(target=self._beat, name="beats", daemon=True).start()

    def begin(self, runner: Runner) -> None:
        """It runs this from now on, for the first time or after a sleep."""
        self._begun = (self._begun[0] + 1, runner)
        self._changed.set()

    def done(self) -> None:
        self._num_done += 1
        self._changed.set()

    def _beat(self) -> None:
        socket = self._context.socket(zmq.PUSH)
        socket.connect(self._address)
        encode = msgspec.msgpack.Encoder().encode
        while True:
            times, runner = self._begun
            socket.send(encode(Beat(self._rank, self._num_done, times, runner.num_host_blocks if runner else 0)))
            self._changed.wait(BEAT_S)
            self._changed.clear()


class Rank:
    """The rank's own runner, which sleeps and wakes up when rank 0's does."""

    def __init__(self, config: EngineConfig, runner: ModelRunner, progress: Progress) -> None:
        self._config, self._model_runner, self._progress = config, runner, progress
        self.runner = self._begin()

    def _begin(self) -> Runner:
        from mainsail_engine.runner.swap import with_host_memory

        runner = with_host_memory(self._model_runner, self._model_runner.kv_cache, host_bytes(self._config))
        self._progress.begin(runner)
        return runner

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


def follow(rank: Rank, plans: zmq.Socket[bytes], progress: Progress) -> None:
    """Forever: launch what comes, wait for the oldest step when two are in flight or nothing comes."""
    receiver = PlanReceiver()
    in_flight: deque[PendingStep] = deque()
    unsampled: deque[PendingLogits] = deque()
    while True:
        may_wait = in_flight and not (unsampled and unsampled[0] is in_flight[0])
        if may_wait and (len(in_flight) > 1 or not plans.poll(IDLE_MS)):
            in_flight.popleft().result()
            progress.done()
            continue
        message = decode(plans.recv())
        if isinstance(message, MasksMessage):
            unsampled.popleft().sample(message.rows, partial(_copy_masks, message.words))
            continue
        if isinstance(message, AdapterMessage):
            rank.obey(message)
            continue
        if isinstance(message, SleepMessage | WakeUpMessage):
            while in_flight:
                in_flight.popleft().result()
                progress.done()
            rank.obey(message)
            continue
        plan = receiver.plan(message)
        pending = rank.runner.launch(plan)
        in_flight.append(pending)
        if plan.is_constrained:
            unsampled.append(cast("PendingLogits", pending))


def _copy_masks(words: bytes, out: np.ndarray) -> None:
    out[:] = np.frombuffer(words, np.int32).reshape(out.shape)


def run(start: WorkerStart) -> None:
    from mainsail_engine.runner.distributed import join
    from mainsail_engine.runner.model_runner import ModelRunner, choose_device

    context = zmq.Context()
    plans = context.socket(zmq.SUB)
    plans.set_hwm(0)
    plans.setsockopt(zmq.SUBSCRIBE, b"")
    plans.connect(start.plans_address)
    parallel = join(start.rank, start.config.tensor_parallel_size, choose_device(start.config.device, start.rank),
                    start.store_port)  # fmt: skip
    runner = ModelRunner(start.config, parallel)
    progress = Progress(start.rank, context, start.beats_address)
    follow(Rank(start.config, runner, progress), plans, progress)


def main() -> None:
    start = take_orders(WorkerStart)
    logging.basicConfig(
        level=logging.INFO, format=f"%(asctime)s %(levelname)s rank {start.rank}: %(message)s", stream=sys.stderr
    )
    try:
        run(start)
    except StartupError as error:
        log.error("%s: %s", error.reason, error.message)
        os._exit(1)
    except BaseException:
        log.exception("the rank failed")
        os._exit(1)


if __name__ == "__main__":
    main()
