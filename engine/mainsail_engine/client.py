"""EngineClient: what the API process holds of the core process.

Hands requests to the core, and each output to its request's sink, synchronously: all of a step's tokens are dealt
with in one turn of the event loop. When the core dies, every sink gets an `EngineDeadError` and `died`
is set: the owner then ends the process, for a pod to be replaced.

Everything runs on one event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

import zmq
import zmq.asyncio

from mainsail_engine.core_process import CoreProcess, address
from mainsail_engine.errors import RequestError, StartupError
from mainsail_engine.protocol import (
    Abort,
    Adapters,
    AdapterUse,
    Add,
    Compile,
    Compiled,
    Control,
    Controlled,
    Failed,
    FirstScheduled,
    FromCore,
    LoadAdapter,
    Ready,
    RequestOutput,
    StepOutputs,
    UnloadAdapter,
    decode_from_core,
    encode,
    request_id_prefix,
)
from mainsail_engine.request import FinishReason
from mainsail_engine.structured.grammar import Grammar

LAST_WORDS_S = 2.0
"""How long after the core's end its last message may still arrive."""


class EngineDeadError(RequestError):
    """The core process ended under a running request."""

    def __init__(self, message: str) -> None:
        super().__init__(f"the engine failed: {message}", status=503, code="engine_failed", retry_after_s=1.0)


class Sink(Protocol):
    """Where one request's outputs go. Must not wait, and must not raise."""

    def on_output(self, output: RequestOutput, now: float) -> None:
        """now: monotonic time at which the step's outputs arrived."""
        ...

    def on_error(self, error: RequestError) -> None:
        """The end, without a finish reason."""
        ...


class EngineClient:
    """`on_step` sees every step's outputs before the sinks do (metrics). One for each API process.

    process: this API process's number. Number 0 owns the core, and ends it with `close`; the others join in its
    folder, where the sockets are.
    """

    def __init__(
        self,
        core: CoreProcess | Path,
        *,
        on_step: Callable[[StepOutputs], None] | None = None,
        on_first_scheduled: Callable[[FirstScheduled], None] | None = None,
        process: int = 0,
    ) -> None:
        """core: the process, or the folder of one that another owns."""
        self.core = core if isinstance(core, CoreProcess) else None
        self.folder = core.folder if isinstance(core, CoreProcess) else core
        self._on_step = on_step
        self._on_first_scheduled = on_first_scheduled
        self._number = process
        self._sinks: dict[str, Sink] = {}
        self._verdicts: dict[str, asyncio.Future[str | None]] = {}
        """On grammars that the core compiles."""
        self._context: zmq.asyncio.Context | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._ready: asyncio.Future[Ready] | None = None
        self._failed: Failed | None = None
        self._controls: dict[str, asyncio.Future[Controlled]] = {}
        self._ids = itertools.count()
        self._id_prefix = request_id_prefix(process) + uuid.uuid4().hex[:8]
        self._closing = False
        self._last_words = asyncio.Event()
        self.died = asyncio.Event()
        self.adapters: dict[str, str] = {}
        """LoRA adapters that the core has: served name → path."""
        self.adapter_use = AdapterUse()
        """… and which of them requests go through now."""
        self.num_steps = 0
        self.progress_at_s = time.monotonic()
        """Monotonic time of the last step, or of the moment since when there is work."""

    @property
    def num_requests(self) -> int:
        return len(self._sinks)

    @property
    def is_alive(self) -> bool:
        if self.died.is_set() or self._failed is not None:
            return False
        return self.core is None or self.core.process.returncode is None

    @property
    def failure(self) -> Failed:
        """Why the core ended."""
        return self._failed or Failed("EngineFailed", "the core process ended without a word")

    def new_request_id(self) -> str:
        """Unique, and says where its outputs belong."""
        return f"{self._id_prefix}{next(self._ids):x}"

    async def start(self) -> Ready:
        """Wait until the core has generated a token. Raises StartupError with its reason."""
        self._context = context = zmq.asyncio.Context()
        self._commands = _bind(context, zmq.PUSH, address(self.folder, "commands", self._number))
        outputs = _bind(context, zmq.PULL, address(self.folder, "outputs", self._number))
        self._ready = asyncio.get_running_loop().create_future()
        self._tasks = [asyncio.create_task(self._receive(outputs))]
        if self.core is not None:
            self._tasks.append(asyncio.create_task(self._watch(self.core.process)))
        return await self._ready

    async def close(self) -> None:
        """End the core and everything that still waits for it."""
        self._closing = True
        if self.core is not None:
            await asyncio.to_thread(self.core.end)
        self.fail_all(RequestError("the server is shutting down", status=503, code="shutting_down", retry_after_s=1.0))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._context is not None:  # left to the garbage collector, it would wait for its open sockets for ever
            self._context.destroy(linger=0)
            self._context = None

    async def control(self, action: str) -> None:
        """Have the core sleep or wake up, once nothing runs. Raises RequestError."""
        error = await self._controlled(Control(self.new_request_id(), action))
        if error is not None:
            raise RequestError(f"{action} failed: {error}", status=500, code="control_failed")

    async def load_adapter(self, name: str, path: str) -> None:
        """Have the core load a LoRA adapter beside what runs. Raises RequestError."""
        error = await self._controlled(LoadAdapter(self.new_request_id(), name, path))
        if error is not None:
            raise RequestError(error, code="invalid_adapter")

    async def unload_adapter(self, name: str) -> None:
        """Have the core forget a LoRA adapter; what goes through it finishes. Raises RequestError."""
        error = await self._controlled(UnloadAdapter(self.new_request_id(), name))
        if error is not None:
            raise RequestError(error, status=404, param="lora_name", code="model_not_found")

    async def _controlled(self, command: Control | LoadAdapter | UnloadAdapter) -> str | None:
        """What went wrong. Raises EngineDeadError."""
        if not self.is_alive:
            raise EngineDeadError(self.failure.message)
        control_id = command.control_id
        done = self._controls[control_id] = asyncio.get_running_loop().create_future()
        try:
            self._commands.send(encode(command))
            return (await done).error
        finally:
            del self._controls[control_id]

    def submit(self, add: Add, sink: Sink) -> None:
        """Hand a request to the core; its outputs go to the sink. Raises EngineDeadError."""
        if not self.is_alive:
            raise EngineDeadError(self.failure.message)
        if not self._sinks:
            self.progress_at_s = time.monotonic()
        self._sinks[add.request_id] = sink
        self._commands.send(encode(add))

    def abort(self, request_ids: Iterable[str], reason: FinishReason = FinishReason.ABORT) -> None:
        """Forget these requests, here at once and in the core before its next step. Unknown ids have ended."""
        known = [request_id for request_id in request_ids if self._sinks.pop(request_id, None) is not None]
        if known and self.is_alive:
            self._commands.send(encode(Abort(known, reason)))

    async def compile(self, grammar: Grammar) -> str | None:
        """Have the core compile a grammar. Returns what is wrong with it. Raises EngineDeadError."""
        if not self.is_alive:
            raise EngineDeadError(self.failure.message)
        number = self.new_request_id()
        verdict = self._verdicts[number] = asyncio.get_running_loop().create_future()
        try:
            self._commands.send(encode(Compile(number, grammar)))
            return await verdict
        finally:
            del self._verdicts[number]

    def fail_all(self, error: RequestError) -> None:
        """End every request with this error."""
        sinks, self._sinks = self._sinks, {}
        for sink in sinks.values():
            sink.on_error(error)
        for verdict in self._verdicts.values():
            if not verdict.done():
                verdict.set_exception(error)

    async def _receive(self, socket: zmq.asyncio.Socket) -> None:
        while True:
            self._handle(decode_from_core(await socket.recv()))

    def _handle(self, message: FromCore) -> None:
        if isinstance(message, StepOutputs):
            self._deliver(message)
        elif isinstance(message, Compiled):
            verdict = self._verdicts.get(message.compile_id)
            if verdict is not None and not verdict.done():
                verdict.set_result(message.error)
        elif isinstance(message, Adapters):
            self.adapters = message.paths
        elif isinstance(message, Ready):
            self.adapters = message.adapters
            if self._ready is not None and not self._ready.done():
                self._ready.set_result(message)
        elif isinstance(message, Controlled):
            waiting = self._controls.get(message.control_id)
            if waiting is not None and not waiting.done():
                waiting.set_result(message)
        else:
            self._failed = message
            self._last_words.set()
            if self._number > 0:
                self._core_died(message)

    def _deliver(self, step: StepOutputs) -> None:
        self.num_steps = step.step
        self.progress_at_s = time.monotonic()
        if step.adapter_use is not None:
            self.adapter_use = step.adapter_use
        if self._on_step is not None:
            self._on_step(step)
        if self._on_first_scheduled is not None:
            for first in step.first_scheduled:
                self._on_first_scheduled(first)
        for output in step.outputs:
            finished = output.finish_reason is not None
            sink = self._sinks.pop(output.request_id, None) if finished else self._sinks.get(output.request_id)
            if sink is not None:
                sink.on_output(output, self.progress_at_s)

    async def _watch(self, process: subprocess.Popen[bytes]) -> None:
        """Wait for the core's end; then let its last words arrive, and pass them on."""
        status = await _ended(process)
        if status > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._last_words.wait(), LAST_WORDS_S)
        if self._failed is None:
            how = f"was ended by signal {-status}" if status < 0 else f"exited with {status}"
            hint = " (9 is how the kernel ends a process that uses too much memory)" if status == -9 else ""
            self._failed = Failed("EngineFailed", f"the core process {how}{hint}")
        self._core_died(self._failed)

    def _core_died(self, failed: Failed) -> None:
        self.died.set()
        if self._ready is not None and not self._ready.done():
            self._ready.set_exception(startup_error(failed))
        if not self._closing:
            self.fail_all(EngineDeadError(failed.message))
        for waiting in self._controls.values():
            if not waiting.done():
                waiting.set_result(Controlled("", failed.message))


def startup_error(failed: Failed) -> StartupError:
    """The core's failure as an exception with its own reason."""
    error = StartupError(failed.message)
    error.reason = failed.reason
    return error


def _ended(process: subprocess.Popen[bytes]) -> asyncio.Future[int]:
    """Its exit status, once there is one."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[int] = loop.create_future()

    def tell(status: int) -> None:
        if not ended.done():
            ended.set_result(status)

    def wait() -> None:
        status = process.wait()
        with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
            loop.call_soon_threadsafe(tell, status)

    threading.Thread(target=wait, name="core-watch", daemon=True).start()
    return ended


def _bind(context: zmq.asyncio.Context, kind: int, address: str) -> zmq.asyncio.Socket:
    socket = context.socket(kind)
    socket.set_hwm(0)
    socket.setsockopt(zmq.LINGER, 0)
    socket.bind(address)
    return socket
