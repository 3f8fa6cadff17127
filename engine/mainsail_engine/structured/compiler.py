"""Grammars to compiled grammars: cached, in a process of its own (worker.py), bounded in time, memory and number.

    submit ──known──▶ answer at once
       └──new──▶ worker process ──▶ reader thread ──deserialize──▶ cache, answers to all who asked for it

The process and the vocabulary are made when the first grammar comes: an engine that constrains nothing pays nothing. If
the process itself ends, those who waited get an error and the next grammar starts another. `answer` is called from the
reader thread (or at once, from `submit`), and must not block.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, cast

import msgspec

from mainsail_engine.structured import bindings, frames
from mainsail_engine.structured.constraint import Constraint
from mainsail_engine.structured.grammar import TRY_AGAIN, Grammar
from mainsail_engine.structured.jump_forward import JumpForward
from mainsail_engine.structured.vocabulary import Vocabulary

log = logging.getLogger(__name__)
CPU_S = 5
"""CPU time for one grammar. Schemas of ordinary size take 0.005."""
MEMORY_BYTES = 768 << 20
CACHE_BYTES = 256 << 20
MAX_WAITING = 256

Answer = Callable[[str | None], None]
"""Called with None when the grammar is compiled, or with what is wrong with it."""


class Compiler:
    def __init__(
        self,
        vocabulary: Callable[[], Vocabulary | None],
        *,
        jump_forward: bool = True,
        cpu_s: int = CPU_S,
        memory_bytes: int = MEMORY_BYTES,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        """vocabulary: called once, in a thread, when the first grammar comes."""
        self._make_vocabulary = vocabulary
        self._wants_jumps = jump_forward
        self._limits = (cpu_s, memory_bytes)
        self._cache_bytes = cache_bytes
        self._lock = threading.Lock()
        self._cache: OrderedDict[Grammar, bindings.CompiledGrammar] = OrderedDict()
        self._sizes: dict[Grammar, int] = {}
        self._waiting: dict[int, tuple[Grammar, list[Answer]]] = {}
        self._unsent: list[frames.Job] = []
        self._count = 0
        self._running = False
        self._input: BinaryIO | None = None
        self._vocabulary: Vocabulary | None = None
        self._info: bindings.TokenizerInfo | None = None
        self._jump_forward: JumpForward | None = None

    def submit(self, grammar: Grammar, answer: Answer) -> None:
        """Compile the grammar, unless it is known or on its way."""
        with self._lock:
            if grammar in self._cache:
                self._cache.move_to_end(grammar)
                verdict = None
            elif len(self._waiting) >= MAX_WAITING:
                verdict = f"{len(self._waiting)} grammars wait to be compiled already; {TRY_AGAIN}"
            else:
                self._enqueue(grammar, answer)
                return
        answer(verdict)

    def constraint(self, grammar: Grammar, *, jump_forward: bool) -> Constraint | None:
        """A place at the grammar's beginning; None when the grammar is not in the cache (any more)."""
        with self._lock:
            compiled, vocabulary = self._cache.get(grammar), self._vocabulary
            if compiled is None or vocabulary is None:
                return None
            self._cache.move_to_end(grammar)
        return Constraint(compiled, vocabulary, self._jump_forward if jump_forward else None)

    # -- towards the worker -------------------------------------------------------------------------------------------

    def _enqueue(self, grammar: Grammar, answer: Answer) -> None:
        for known, answers in self._waiting.values():
            if known == grammar:
                answers.append(answer)
                return
        self._count += 1
        job = frames.Job(self._count, grammar)
        self._waiting[job.number] = (grammar, [answer])
        if self._input is None:
            self._unsent.append(job)
        else:
            self._send(self._input, job)
        if not self._running:
            self._running = True
            threading.Thread(target=self._run, name="grammars", daemon=True).start()

    def _send(self, stream: BinaryIO, job: frames.Job) -> None:
        try:
            frames.write(stream, job)
        except OSError:
            log.warning("the grammar compiler's process has ended")  # the reader notices too, and answers

    # -- the reader thread --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        """Start the worker and hand out what it says, until it ends."""
        error = f"the grammar compiler ended unexpectedly; {TRY_AGAIN}"
        try:
            if not self._prepare():
                error = "this model's tokenizer does not spell its tokens as bytes: its output cannot be constrained"
                return
            self._serve()
        except Exception:
            log.exception("the grammar compiler's thread failed")
        finally:
            self._fail_all(error)

    def _prepare(self) -> bool:
        """The vocabulary, as the worker and the masks need it."""
        if self._vocabulary is None:
            vocabulary = self._make_vocabulary()
            if vocabulary is None:
                return False
            self._info = bindings.tokenizer_info(vocabulary.tokens, vocabulary.stop_token_ids)
            self._jump_forward = JumpForward(vocabulary) if self._wants_jumps else None
            self._vocabulary = vocabulary
        return True

    def _serve(self) -> None:
        process = subprocess.Popen(
            [sys.executable, "-m", "mainsail_engine.structured.worker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=_environment(),
        )  # fmt: skip
        source, target = cast("BinaryIO", process.stdout), cast("BinaryIO", process.stdin)
        try:
            frames.write(target, self._start())
            with self._lock:
                unsent, self._unsent, self._input = self._unsent, [], target
                for job in unsent:
                    self._send(target, job)
            while (data := frames.read(source)) is not None:
                self._take(msgspec.msgpack.decode(data, type=frames.Done))
        finally:
            process.kill()
            process.wait()

    def _start(self) -> frames.Start:
        vocabulary = cast("Vocabulary", self._vocabulary)
        cpu_s, memory_bytes = self._limits
        processes = min(4, max(1, len(os.sched_getaffinity(0)) // 2))
        return frames.Start(vocabulary.tokens, list(vocabulary.stop_token_ids), cpu_s, memory_bytes, processes)

    def _take(self, done: frames.Done) -> None:
        compiled, error = None, done.error
        if done.compiled is not None:
            compiled = bindings.deserialize(done.compiled, cast("bindings.TokenizerInfo", self._info))
        with self._lock:
            grammar, answers = self._waiting.pop(done.number)
            if compiled is not None:
                self._remember(grammar, compiled)
        for answer in answers:
            answer(error)

    def _remember(self, grammar: Grammar, compiled: bindings.CompiledGrammar) -> None:
        """Keep the newest that fit; a grammar in use lives on with its requests."""
        self._cache[grammar] = compiled
        self._sizes[grammar] = int(compiled.memory_size_bytes()) + len(grammar.text)
        while sum(self._sizes.values()) > self._cache_bytes and len(self._cache) > 1:
            oldest, _ = self._cache.popitem(last=False)
            del self._sizes[oldest]

    def _fail_all(self, error: str) -> None:
        with self._lock:
            waiting, self._waiting = self._waiting, {}
            self._unsent, self._input, self._running = [], None, False
        for _, answers in waiting.values():
            for answer in answers:
                answer(error)


def _environment() -> dict[str, str]:
    """The worker must find this package, wherever it lies; and needs one thread."""
    root = str(Path(__file__).resolve().parents[2])
    inherited = os.environ.get("PYTHONPATH")
    path = f"{inherited}{os.pathsep}{root}" if inherited else root
    return {**os.environ, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
