"""A node above 0 of an engine over several: its ranks' processes, and health. It serves no API. Imports no torch.

The ranks follow the leader (runner/tp_worker.py) and end when it is gone. When one of them ends, or is silent, this
process ends the others and itself, non-zero, so that Kubernetes starts the pod again. Told to stop (SIGTERM), it
stays for as long as the leader drains, and ends well when the leader is gone.

live: the ranks' processes are there (whether they compute is the leader's to notice). ready, startup: all have loaded.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from types import FrameType

import msgspec

from mainsail_engine.awake import AwakeClock
from mainsail_engine.compile_kernels import link_shipped
from mainsail_engine.config import EngineConfig, ServerConfig
from mainsail_engine.errors import StartupError
from mainsail_engine.runner.ranks import Alive, Ended, WorkerStart, decode_words, spawn
from mainsail_engine.server.health import Verdict, Vitals, health_listener, judge

log = logging.getLogger(__name__)
GRACE_S = 10.0
"""After the leader should have drained, until this node ends by itself."""
LAST_WORDS_S = 2.0
SILENT_S, LOADING_SILENT_S = 7.0, 60.0
REAP_S = 5.0
TICK_S = 0.5
LONGEST_TURN_S = 2.0
"""Of the thread that judges silence; see awake.py."""


@dataclass(slots=True)
class _Rank:
    number: int
    process: subprocess.Popen[bytes]
    heard_s: float
    """When it last said something, on the node's clock."""
    has_loaded: bool = False
    ended: Ended | None = None
    listener: threading.Thread | None = field(default=None)

    def is_silent(self, now: float) -> bool:
        return now - self.heard_s > (SILENT_S if self.has_loaded else LOADING_SILENT_S)

    def last_words(self) -> Ended:
        """Why it ended: by its own words, if it had any."""
        code = self.process.wait()
        if self.listener is not None:
            self.listener.join(LAST_WORDS_S)
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        return self.ended or Ended("RankLost", f"rank {self.number} {how}; its log lines say why")


class Node:
    def __init__(self, engine: EngineConfig, server: ServerConfig) -> None:
        self._engine, self._server = engine, server
        self._ranks: list[_Rank] = []
        self._over: queue.SimpleQueue[_Rank] = queue.SimpleQueue()
        """Ranks that have ended, or are about to."""
        self._clock = AwakeClock(LONGEST_TURN_S)
        self._stop_s: float | None = None
        """When it was told to stop, on the monotonic clock."""

    def run(self) -> None:
        """Until the ranks have ended. Raises StartupError, unless it was told to stop."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_stop)
        nodes = self._engine.nodes
        with health_listener(self._server, self._look):
            try:
                self._start_ranks()
                print(
                    f"node {nodes.node_rank} of {nodes.nnodes}: ranks {', '.join(str(r.number) for r in self._ranks)} "
                    f"follow {nodes.master_addr}:{nodes.master_port}; no API here",
                    file=sys.stderr, flush=True,
                )  # fmt: skip
                self._wait()
            finally:
                self._end_ranks()

    def _end_ranks(self) -> None:
        for rank in self._ranks:
            rank.process.kill()  # also one that is stopped
        for rank in self._ranks:
            with contextlib.suppress(subprocess.TimeoutExpired):
                rank.process.wait(REAP_S)

    def _start_ranks(self) -> None:
        nodes = self._engine.nodes
        for number in self._engine.ranks_of(nodes.node_rank):
            start = WorkerStart(
                config=self._engine, rank=number, host=nodes.master_addr, port=nodes.master_port, is_listened_to=True
            )
            rank = _Rank(number, spawn(start), self._clock.now_s)
            rank.listener = threading.Thread(target=self._listen, args=(rank,), name=f"rank {number}", daemon=True)
            self._ranks.append(rank)
            rank.listener.start()

    def _listen(self, rank: _Rank) -> None:
        """Its words, until it ends; what else it or a library prints goes where our own log goes."""
        for line in rank.process.stdout or ():
            try:
                words = decode_words(line)
            except msgspec.DecodeError:
                sys.stderr.buffer.write(line)
                sys.stderr.buffer.flush()
                continue
            rank.heard_s = self._clock.now_s
            if isinstance(words, Alive):
                rank.has_loaded = words.has_loaded
            else:
                rank.ended = words
        self._over.put(rank)

    def _wait(self) -> None:
        while True:
            with contextlib.suppress(queue.Empty):
                ended = self._over.get(timeout=TICK_S)
                if self._stop_s is None:
                    raise _failure(ended.last_words())
                return
            listening_s = self._clock.tick()
            if silent := next((rank for rank in self._ranks if rank.is_silent(listening_s)), None):
                raise _failure(Ended("RankLost", f"rank {silent.number} is silent: stopped, or starved of CPU"))
            if self._stop_s is not None and time.monotonic() - self._stop_s > self._server.drain_timeout_s + GRACE_S:
                log.warning("the leader has not ended %.0f s after this node was told to", GRACE_S)
                return

    def _on_stop(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        if self._stop_s is None:
            self._stop_s = time.monotonic()

    def _look(self, path: str) -> Verdict | None:
        vitals = Vitals(
            core_alive=all(rank.process.poll() is None for rank in self._ranks),
            started=bool(self._ranks) and all(rank.has_loaded for rank in self._ranks),
            draining=False,
            num_requests=0,
            progress_at_s=0.0,
        )
        return judge(path, vitals, limit_s=0.0, now=0.0)


def _failure(ended: Ended) -> StartupError:
    error = StartupError(ended.message)
    error.reason = ended.reason
    return error


def run_node(engine: EngineConfig, server: ServerConfig) -> None:
    """Blocks until this node has ended. Raises StartupError."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    link_shipped()
    Node(engine, server).run()
