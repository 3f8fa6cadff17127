"""The process that compiles grammars, so that nothing a client sends can hang or crash the engine.

    core ──Start, Job…──▶ this process ──fork──▶ one child for each grammar: compile, try, write, exit
         ◀────Done…──────      ▲─────────pipe────────┘

It holds the vocabulary and forks: a child costs milliseconds and shares its parent's memory. A child has limits on CPU
time and memory, so a grammar that loops, explodes or crashes the compiler takes its own child along, and its request
gets the reason. After compiling, the child walks a few dozen random tokens through the grammar: one that allows none,
or that needs too long to say which, is refused here rather than found out in the engine's step loop.

Started by module name with the messages on standard input and output. It ends when its input does. No torch in here.
"""

from __future__ import annotations

import contextlib
import os
import random
import resource
import selectors
import signal
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any, cast

import msgspec
import numpy as np

from mainsail_engine.structured import bindings, frames
from mainsail_engine.structured.grammar import Grammar, Kind

TRIED_TOKENS = 64
MAX_STEP_S = 0.05
"""CPU time that one token may take, its mask and its acceptance together. Typical is 0.00001."""
WALL_FACTOR = 12
"""A child on a busy machine may take this many times its CPU seconds, which bound whoever computes."""
MAX_COMPILED_BYTES = 64 << 20
INPUT = open(0, "rb", buffering=0, closefd=False)  # noqa: SIM115 - unbuffered: the selector sees what is left in it


class Refused(Exception):
    """The grammar is no good; the message is for the client."""


def compile_grammar(grammar: Grammar, info: bindings.TokenizerInfo) -> bindings.CompiledGrammar:
    """Raises RuntimeError with the compiler's reason."""
    compiler = bindings.library().GrammarCompiler(info, 1, False, -1)
    if grammar.kind is Kind.JSON_SCHEMA:
        return compiler.compile_json_schema(grammar.text, grammar.any_whitespace, None, None, False, None, False)
    if grammar.kind is Kind.REGEX:
        return compiler.compile_regex(grammar.text)
    if grammar.kind is Kind.EBNF:
        return compiler.compile_grammar_from_strings(grammar.text, "root")
    form = msgspec.json.decode(grammar.text)
    return compiler.compile_structural_tag(msgspec.json.encode(_with_schemas(form, grammar.any_whitespace)).decode())


def _with_schemas(node: Any, any_whitespace: bool) -> Any:
    """A structural tag has no word for the form of its JSON: put in each schema's grammar instead."""
    if isinstance(node, list):
        return [_with_schemas(item, any_whitespace) for item in cast("list[Any]", node)]
    if not isinstance(node, dict):
        return node
    form = cast("dict[str, Any]", node)
    if form.get("type") == "json_schema" and "json_schema" in form:
        schema = msgspec.json.encode(form["json_schema"]).decode()
        grammar = bindings.library().Grammar.from_json_schema(
            schema, any_whitespace, None, None, False, None, False, False
        )
        return {"type": "grammar", "grammar": str(grammar.to_string())}
    return {key: _with_schemas(value, any_whitespace) for key, value in form.items()}


def try_out(compiled: bindings.CompiledGrammar, vocab_size: int, stop_token_ids: list[int]) -> None:
    """Walk random tokens through the grammar. Raises Refused when there are none, or when it takes too long."""
    matcher = bindings.matcher(compiled)
    mask = np.zeros((1, bindings.mask_words(vocab_size)), np.int32)
    numbers = random.Random(0)
    for _ in range(TRIED_TOKENS):
        started = time.thread_time()
        matcher.fill_next_token_bitmask(mask, 0, False)
        spent = time.thread_time() - started
        allowed = bindings.allowed_tokens(mask[0], vocab_size)
        if not len(allowed):
            raise Refused("no text conforms to the grammar")
        going_on = allowed[~np.isin(allowed, stop_token_ids)]
        if not len(going_on):
            return
        started = time.thread_time()
        matcher.accept_token(int(numbers.choice(going_on)), False)
        if spent + time.thread_time() - started > MAX_STEP_S:
            raise Refused("the grammar is too ambiguous: it takes too long to tell which token may come next")


def reason(error: BaseException) -> str:
    """The compiler's message without its time stamps and source lines."""
    text = str(error)
    if isinstance(error, MemoryError) or "bad_alloc" in text:
        return "the grammar needs too much memory"
    lines = [line for line in text.splitlines() if line.strip()]
    text = lines[-1] if lines else type(error).__name__
    for mark in ("] /", ".cc:"):
        _, found, rest = text.partition(mark)
        text = rest if found else text
    return text.split(": ", 1)[-1].removeprefix("Check failed: ").strip()[:500]


def in_child(job: frames.Job, start: frames.Start, info: bindings.TokenizerInfo, output: int) -> None:
    """Compile, try out, write the answer to the pipe. Never returns."""
    try:
        resource.setrlimit(resource.RLIMIT_CPU, (start.cpu_s, start.cpu_s + 1))
        memory_bytes = _data_bytes() + start.memory_bytes
        resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        try:
            compiled = compile_grammar(job.grammar, info)
            try_out(compiled, len(start.tokens), start.stop_token_ids)
            text = str(compiled.serialize_json())
            if len(text) > MAX_COMPILED_BYTES:
                raise Refused("the compiled grammar is too large")
            answer = frames.Done(job.number, text, None)
        except Refused as error:
            answer = frames.Done(job.number, None, str(error))
        except (RuntimeError, MemoryError, ValueError) as error:
            answer = frames.Done(job.number, None, reason(error))
        with os.fdopen(output, "wb") as stream:
            stream.write(msgspec.msgpack.encode(answer))
    finally:
        os._exit(0)


def _data_bytes() -> int:
    """What this process has allocated (its VmData)."""
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmData:"))


def _first_to_go() -> None:
    """Where memory runs out, the kernel is to end this process and its children rather than the engine."""
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as score:
        score.write("1000")


@dataclass
class Child:
    job: frames.Job
    pid: int
    pipe: int
    ends_at_s: float
    received: list[bytes] = field(default_factory=list[bytes])


class Worker:
    """Takes jobs, keeps a bounded number of children, and collects what they say."""

    def __init__(self, start: frames.Start) -> None:
        self._start = start
        self._info = bindings.tokenizer_info(start.tokens, start.stop_token_ids)
        self._selector = selectors.DefaultSelector()
        self._selector.register(INPUT, selectors.EVENT_READ)
        self._waiting: deque[frames.Job] = deque()
        self._children: dict[int, Child] = {}

    def run(self) -> None:
        """Until standard input ends."""
        while True:
            for key, _ in self._selector.select(self._patience()):
                if key.fd in self._children:
                    self._collect(self._children[key.fd])
                elif not self._take():
                    return
            now = time.monotonic()
            for child in [child for child in self._children.values() if child.ends_at_s <= now]:
                self._end(child, "the grammar takes too long to compile")
            while self._waiting and len(self._children) < self._start.max_processes:
                self._fork(self._waiting.popleft())

    def _patience(self) -> float | None:
        ends = [child.ends_at_s for child in self._children.values()]
        return max(0.0, min(ends) - time.monotonic()) if ends else None

    def _take(self) -> bool:
        data = frames.read(INPUT)
        if data is None:
            return False
        self._waiting.append(msgspec.msgpack.decode(data, type=frames.Job))
        return True

    def _fork(self, job: frames.Job) -> None:
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reading)
            in_child(job, self._start, self._info, writing)
        os.close(writing)
        ends_at_s = time.monotonic() + WALL_FACTOR * self._start.cpu_s
        self._children[reading] = Child(job, pid, reading, ends_at_s)
        self._selector.register(reading, selectors.EVENT_READ)

    def _collect(self, child: Child) -> None:
        data = os.read(child.pipe, 1 << 20)
        if data:
            child.received.append(data)
        else:
            self._end(child, None)

    def _end(self, child: Child, error: str | None) -> None:
        """The child has written all it had, or must not go on."""
        if error is not None:
            os.kill(child.pid, signal.SIGKILL)
        _, status = os.waitpid(child.pid, 0)
        self._selector.unregister(child.pipe)
        os.close(child.pipe)
        del self._children[child.pipe]
        if error is None and child.received and os.WIFEXITED(status):
            data = b"".join(child.received)
            sys.stdout.buffer.write(frames.LENGTH.pack(len(data)) + data)
            sys.stdout.buffer.flush()
            return
        frames.write(sys.stdout.buffer, frames.Done(child.job.number, None, error or _cause(status)))


def _cause(status: int) -> str:
    """Why a child ended without a word."""
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    if number in (signal.SIGXCPU, signal.SIGKILL):
        return "the grammar takes too long to compile"
    return "the grammar cannot be compiled: it is nested too deeply or needs too much memory"


def main() -> None:
    # A second and 400 MB less: nothing here needs torch, and tvm_ffi imports it where it can.
    sys.modules["torch"] = None  # pyright: ignore[reportArgumentType]
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    _first_to_go()
    data = frames.read(INPUT)
    if data is None:
        return
    Worker(msgspec.msgpack.decode(data, type=frames.Start)).run()


if __name__ == "__main__":
    main()
