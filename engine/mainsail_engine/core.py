"""The core process: scheduler and runner, in a loop; commands in, tokens out.

    commands ──PULL──▶ reader thread ──queue──▶ EngineCore.step ──queue──▶ writer thread ──PUSH──▶ outputs

The loop keeps up to `depth` steps in flight: with two, step N+1 is launched before N's tokens are on the CPU. With
pipeline stages there are as many as stages, of different requests, so that each stage has one to work on. It never
waits for a socket: two threads own those. With nothing to do it sleeps on the queue of commands.

A constrained row's mask for N+1 depends on its token of N. So that such rows keep the overlap, a step with any of them
is launched without its sampling, which is queued as soon as N is committed:

    device    │ forward N │ sample N │ forward N+1 ······················ │ sample N+1 │ forward N+2 …
    this loop                        │ read N, commit, fill masks, queue sample N+1, launch N+2 │ read N+1 …

The device idles only if all of that takes longer than a forward pass; masks take microseconds each. Grammars themselves
are compiled elsewhere (structured/compiler.py), and the reader thread answers for them: no step waits for one.

Promises: one `Ready` (after a token was generated) or one `Failed`; then a `StepOutputs` for every step, or a `Failed`
and a non-zero exit. It ends when its standard input does, which is when its parent dies, however that happens; signals
to the process group are the parent's to interpret. The idea of an API process and a core process of its own is vLLM's.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import logging
import os
import queue
import secrets
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

import msgspec
import zmq

from mainsail_engine import compile_kernels, cuda_driver
from mainsail_engine.child import take_orders
from mainsail_engine.collector import settle
from mainsail_engine.config import BLOCK_SIZE, EngineConfig
from mainsail_engine.errors import RequestError, StartupError
from mainsail_engine.protocol import (
    Abort,
    Add,
    BlockLife,
    Compile,
    Compiled,
    Control,
    Controlled,
    CoreStart,
    Failed,
    FirstScheduled,
    FromCore,
    LoadAdapter,
    Ready,
    RequestOutput,
    SchedulerStats,
    StepOutputs,
    UnloadAdapter,
    decode_to_core,
    encode,
    process_of,
)
from mainsail_engine.request import FinishReason, Request, SamplingParams
from mainsail_engine.step import PendingLogits, PendingStep, Runner, StepPlan, StepResult
from mainsail_engine.structured.grammar import TRY_AGAIN
from mainsail_engine.structured.masks import MaskFiller, Row, constrained_rows
from mainsail_engine.timeline import Mark, Timeline

if TYPE_CHECKING:
    from mainsail_engine.structured.compiler import Compiler
    from mainsail_engine.structured.constraint import Constraint
    from mainsail_engine.structured.grammar import Grammar

if TYPE_CHECKING:
    from mainsail_engine.adapters import AdapterDesk
    from mainsail_engine.host_slabs import HostSlabs
    from mainsail_engine.kv.events import KVEvents
    from mainsail_engine.model.lora import Adapter
    from mainsail_engine.runner.swap import HostMemory
    from mainsail_engine.scheduler import Scheduler
    from mainsail_engine.speculative.speculator import Speculator

log = logging.getLogger(__name__)
WARM_UP_ID = "warm-up"
ASLEEP = "the engine is asleep: POST /wake_up first"
IDLE_S = 0.005
"""How long to wait for a command while the scheduler holds everything back."""
CUDA_LATENCY_MS = 40.0
LINGER_MS = 2000
"""How long the last message may take to leave."""


Command = Add | Abort | Control | LoadAdapter | UnloadAdapter
"""What the loop does; grammars are compiled elsewhere."""


class SchedulerLike(Protocol):
    """What the core needs of a scheduler."""

    place_adapter: Callable[[Request], bool]

    def add(self, request: Request) -> None: ...
    def abort(self, request_ids: Iterable[str], reason: FinishReason) -> None: ...
    def schedule(self, now: float) -> StepPlan | None: ...
    def commit(self, plan: StepPlan, result: StepResult, now: float) -> list[RequestOutput]: ...
    def settle(self) -> None: ...
    def take_outputs(self) -> list[RequestOutput]: ...
    @property
    def wake_s(self) -> float | None: ...
    def set_host_blocks(self, num_blocks: int) -> None: ...
    def fail(self, request: Request, message: str) -> None: ...
    def stats(self) -> SchedulerStats: ...
    def take_block_lives(self) -> list[BlockLife]: ...
    @property
    def has_work(self) -> bool: ...


class Sleeper(Protocol):
    """What a core that can sleep needs: both are called with nothing running, and may raise anything."""

    def resting_runner(self) -> Runner:
        """What the core holds meanwhile: nothing of it may keep device memory alive. Raises where it cannot sleep."""
        ...

    def sleep(self) -> None:
        """Give the device's memory back: weights to the host, KV dropped."""
        ...

    def wake_up(self) -> tuple[SchedulerLike, Runner]:
        """Take the memory again. Returns a scheduler over the new, empty pool, and the runner to drive with it.

        Where it raises, it may be tried again.
        """
        ...


class EngineCore:
    """Scheduler and runner, one step at a time. The clock comes from outside."""

    def __init__(
        self,
        scheduler: SchedulerLike,
        runner: Runner,
        *,
        depth: int,
        micro_batches: bool = False,
        compiler: Compiler | None = None,
        sleeper: Sleeper | None = None,
        adapters: AdapterDesk | None = None,
    ) -> None:
        """compiler None: requests with a grammar are refused; adapters None: those with an adapter are.

        micro_batches: steps in flight are of different requests, so no mask waits for another step's token.
        """
        self._micro_batches = micro_batches
        self._scheduler = scheduler
        self._runner = runner
        self._sleeper = sleeper
        self._adapters = adapters
        self._place_adapters()
        self._controls: deque[Control] = deque()
        self._answers: list[FromCore] = []
        self._asleep, self._num_wakes = False, 0
        self._depth = depth
        self.compiler = compiler
        self._in_flight: deque[tuple[StepPlan, PendingStep | PendingLogits]] = deque()
        self._unsampled: tuple[StepPlan, PendingLogits] | None = None
        """The newest step in flight, if its masks have to wait for the one before."""
        self._filler: MaskFiller | None = None
        self._parked: dict[str, tuple[Add, float]] = {}
        """Requests whose grammar is being compiled, and when they came."""
        self._compiled: queue.SimpleQueue[tuple[str, str | None]] = queue.SimpleQueue()
        """From the compiler's thread: a parked request, and what is wrong with its grammar."""
        self._queued_since: dict[str, float] = {}
        self._first_scheduled: list[FirstScheduled] = []
        self._refused: list[RequestOutput] = []
        self._stats_due = False
        """An abort changed the gauges, and perhaps no step will follow to say so."""
        self.after_step: Callable[[], None] = lambda: None
        """Called by the loop between two steps: for what may be told outside then."""
        self._num_steps = 0
        self._last_step_end_s = 0.0
        self._launched_next = False
        """The last step launched the next one itself, right after its own tokens came."""

    @property
    def has_work(self) -> bool:
        busy = self._adapters is not None and self._adapters.is_busy
        waiting = self._in_flight or self._refused or self._parked or self._stats_due
        return busy or bool(waiting) or self._scheduler.has_work

    def idle_s(self, now: float) -> float | None:
        """How long there is nothing to do, if no command comes. None: for ever."""
        wake_s = None if self._asleep else self._scheduler.wake_s
        return None if wake_s is None else max(IDLE_S, wake_s - now)

    def handle(self, command: Command, now: float) -> None:
        if isinstance(command, Add):
            if self._asleep:
                self._refuse(command.request_id, ASLEEP, "asleep")
                return
            self._add(command, now)
        elif isinstance(command, Control):
            self._controls.append(command)
        elif isinstance(command, Abort):
            self._abort(command)
        elif self._adapters is None:
            self._answers.append(Controlled(command.control_id, "this engine takes no adapters: see --enable-lora"))
        elif self._asleep and isinstance(command, LoadAdapter):  # there is no memory to put it into
            self._answers.append(Controlled(command.control_id, ASLEEP))
        else:
            self._adapters.handle(command)

    def take_answers(self) -> list[FromCore]:
        """To controls, as far as they are done. Call it between two steps."""
        answers, self._answers = self._answers, []
        if self._adapters is not None:
            answers += self._adapters.take_answers()
        while (controlled := self.control()) is not None:
            answers.append(controlled)
        return answers

    def control(self) -> Controlled | None:
        """Do the next control once nothing runs. None: there is none, or something runs still.

        Raises what waking up raises where it could not sleep either.
        """
        if not self._controls or self.has_work:
            return None
        control, error, was_awake = self._controls.popleft(), None, not self._asleep
        try:
            self._control(control.action)
        except Exception as problem:
            log.exception("control %s failed", control.action)
            error = f"{type(problem).__name__}: {problem}"
        if error is not None and was_awake and self._asleep and self._sleeper is not None:
            self._wake_up(self._sleeper)  # a sleep that fails half-way leaves an engine that serves, or none
        return Controlled(control.control_id, error)

    def _control(self, action: str) -> None:
        if self._sleeper is None:
            raise RuntimeError("this engine cannot sleep")
        if action == "sleep" and not self._asleep:
            self._runner, self._asleep = self._sleeper.resting_runner(), True
            self._sleeper.sleep()
        elif action == "wake_up" and self._asleep:
            self._wake_up(self._sleeper)

    def _wake_up(self, sleeper: Sleeper) -> None:
        self._scheduler, self._runner = sleeper.wake_up()
        self._place_adapters()
        self._asleep = False
        self._num_wakes += 1

    def _add(self, add: Add, now: float) -> None:
        self._queued_since[add.request_id] = now
        request = Request(
            request_id=add.request_id,
            prompt_token_ids=add.prompt_token_ids,
            params=seeded(add.params),
            arrival_time_s=now,
            priority=add.priority,
            cache_salt=tenant(add.cache_salt),
            user=add.user,
            session_id=add.session_id,
            deadline_s=None if add.timeout_s is None else now + add.timeout_s,
            output_token_ids=list(add.output_token_ids),
        )
        if add.adapter and not self._adapt(request, add.adapter):
            return
        if add.grammar is not None:
            try:
                request.constraint = self._constraint(add, add.grammar, now)
            except Exception:
                log.exception("no place could be made in the grammar of request %s", add.request_id)
                self._refuse(add.request_id, "the grammar failed before it began", "grammar")
            if request.constraint is None:
                return
            if not all(map(request.constraint.accept, add.output_token_ids)):
                self._refuse(add.request_id, "what was delivered already does not conform to the grammar", "grammar")
                return
        try:
            self._scheduler.add(request)
        except RequestError as error:
            self._refuse(add.request_id, error.message)

    def _place_adapters(self) -> None:
        if self._adapters is not None:
            self._scheduler.place_adapter = self._adapters.place

    def _adapt(self, request: Request, name: str) -> bool:
        """Send the request through that adapter. False: it was refused, since there is none (any more)."""
        loaded = self._adapters.table.use(name, request) if self._adapters is not None else None
        if loaded is None:
            self._refuse(request.request_id, f"the model {name!r} does not exist here (any more)", "model_not_found")
            return False
        request.cache_salt += loaded.salt
        return True

    def _refuse(self, request_id: str, message: str, stop_reason: str | None = None) -> None:
        self._queued_since.pop(request_id, None)
        self._refused.append(RequestOutput(request_id, [], FinishReason.ERROR, stop_reason=stop_reason, error=message))

    def _abort(self, abort: Abort) -> None:
        for request_id in abort.request_ids:
            self._queued_since.pop(request_id, None)
            self._parked.pop(request_id, None)
        self._scheduler.abort(abort.request_ids, abort.reason)
        if self._adapters is not None:
            self._adapters.table.release(abort.request_ids)
        self._stats_due = True

    # -- grammars --------------------------------------------------------------------------------------------------

    def _constraint(self, add: Add, grammar: Grammar, now: float) -> Constraint | None:
        """The request's place in its grammar. None: it is not compiled (any more), and the request is parked."""
        if self.compiler is None:
            self._refuse(add.request_id, "this engine cannot constrain its output", "grammar")
            return None
        constraint = self.compiler.constraint(grammar, jump_forward=may_jump(add.params))
        if constraint is None:
            self._parked[add.request_id] = add, now
            self.compiler.submit(grammar, lambda error: self._compiled.put((add.request_id, error)))
        return constraint

    def _unpark(self, now: float) -> None:
        """Let in the requests whose grammar is ready, and end those that waited too long for it."""
        while not self._compiled.empty():
            request_id, error = self._compiled.get()
            add, arrived_s = self._parked.pop(request_id, (None, 0.0))
            if add is not None and error is None:
                self._add(add, arrived_s)
            elif add is not None:
                self._refuse(request_id, error or "", "grammar")
        for request_id, (add, arrived_s) in list(self._parked.items()):
            if add.timeout_s is not None and now >= arrived_s + add.timeout_s:
                del self._parked[request_id]
                message = f"deadline exceeded: its grammar was not compiled within {add.timeout_s:.1f} s"
                self._refuse(request_id, message, "deadline")

    def _sample_constrained(self) -> None:
        """Fill the newest step's masks and queue its sampling, as soon as its requests' tokens are known."""
        if self._unsampled is None or (len(self._in_flight) > 1 and not self._micro_batches):
            return
        (plan, pending), self._unsampled = self._unsampled, None
        rows, lost = constrained_rows(plan), list[tuple[Row, str]]()
        filler = self._filler = self._filler or MaskFiller()
        pending.sample([row.index for row in rows], lambda masks: lost.extend(filler.fill(rows, masks)))
        for row, why in lost:
            self._scheduler.fail(row.request, why)

    # -- steps -----------------------------------------------------------------------------------------------------

    def step(self, now: float) -> StepOutputs | None:
        """Fill the pipeline, then finish its oldest step. None: there was nothing to run."""
        started_s = self._last_step_end_s if self._launched_next else max(now, self._last_step_end_s)
        if not self._asleep:
            self._scheduler.set_host_blocks(self._runner.num_host_blocks)
        if self._parked:
            self._unpark(now)
        self._launch(now)
        if not self._in_flight:
            outside = self._scheduler.take_outputs()
            return self._outputs(outside, 0, 0.0, 0.0) if outside or self._refused or self._stats_due else None
        plan, pending = self._in_flight.popleft()
        waits_s = time.monotonic()
        result = pending.result()
        end_s = time.monotonic()
        outputs = self._scheduler.commit(plan, result, end_s)
        self._sample_constrained()
        idle = self._depth > 1 and not self._in_flight
        if idle:  # the device is: what was sampled is told while it computes the next step
            self._launch(end_s)
        self._scheduler.settle()
        self._launched_next = idle and bool(self._in_flight)
        self._num_steps += 1
        self._last_step_end_s = end_s
        host_s = max(0.0, waits_s - started_s)
        return self._outputs(outputs, plan.num_tokens, max(0.0, end_s - started_s), host_s)

    def _outputs(
        self, outputs: list[RequestOutput], num_tokens: int, step_time_s: float, host_time_s: float
    ) -> StepOutputs:
        """What this step brought, and the requests that were refused since the last one."""
        self._stats_due = False
        refused, self._refused = self._refused, []
        for output in outputs if self._queued_since else ():
            if output.finish_reason is not None:  # its deadline came first
                self._queued_since.pop(output.request_id, None)
        adapter_use = None
        if self._adapters is not None:
            ended = (output.request_id for output in (*outputs, *refused) if output.finish_reason is not None)
            self._adapters.table.release(ended)
            adapter_use = self._adapters.news_of_use()
        first_scheduled, self._first_scheduled = self._first_scheduled, []
        return StepOutputs(
            step=self._num_steps,
            outputs=[*outputs, *refused],
            stats=self._scheduler.stats(),
            num_step_tokens=num_tokens,
            step_time_s=step_time_s,
            host_time_s=host_time_s,
            first_scheduled=first_scheduled,
            block_lives=self._scheduler.take_block_lives(),
            adapter_use=adapter_use,
            num_wakes=self._num_wakes,
        )

    def _launch(self, now: float) -> None:
        if self._asleep:
            return  # the old scheduler may still want to fetch what it had on the host
        while len(self._in_flight) < self._depth:
            plan = self._scheduler.schedule(now)
            if plan is None:
                return
            self._note_first_scheduled(plan, now)
            pending = self._runner.launch(plan)
            self._in_flight.append((plan, pending))
            if plan.is_constrained:
                self._unsampled = plan, cast("PendingLogits", pending)
                self._sample_constrained()

    def _note_first_scheduled(self, plan: StepPlan, now: float) -> None:
        if not self._queued_since:
            return
        for chunk in plan.chunks:
            since = self._queued_since.pop(chunk.request.request_id, None)
            if since is not None:
                self._first_scheduled.append(FirstScheduled(chunk.request.request_id, now - since))


def may_jump(params: SamplingParams) -> bool:
    """Whether forced tokens may go past the sampler: not where it would count, forbid or describe them."""
    watched = (
        params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0
        or params.logit_bias or params.allowed_token_ids or params.bad_words
        or params.logprobs is not None or params.prompt_logprobs is not None
    )  # fmt: skip
    return not watched


def tenant(salt: str) -> str:
    """A client's salt as the prefix cache has it: none of the engine's own, which a lone NUL begins (`Loaded.salt`)."""
    return salt.replace("\0", "\0\0")


def seeded(params: SamplingParams) -> SamplingParams:
    """With a seed in any case: whoever computes this request, each rank among them, draws the same numbers."""
    return params if params.seed is not None else msgspec.structs.replace(params, seed=secrets.randbits(63))


def pipeline_depth(config: EngineConfig, device: str) -> int:
    """Steps in flight: one for each pipeline stage.

    On the CPU a step of one stage runs on this thread: a second one in flight would only delay the first's tokens.
    """
    if config.pipeline_parallel_size > 1:
        return config.pipeline_parallel_size if config.overlap else 1
    return 2 if config.overlap and device.startswith("cuda") else 1


def latency_target_s(config: EngineConfig, device: str) -> float:
    """What a step may take, where streams are to wait no longer for a token; 0: no bound. On the CPU a step's floor is
    often above any target in use. With micro-batches a stream's token takes one turn of all of them."""
    asked_ms = config.scheduler.max_inter_token_latency_ms
    if asked_ms is None:
        asked_ms = CUDA_LATENCY_MS if device.startswith("cuda") else 0.0
    return asked_ms / 1000 / micro_batches(config)


def micro_batches(config: EngineConfig) -> int:
    """Steps in flight that no two decodes of a request may be in. 1: they may."""
    return config.pipeline_parallel_size if config.overlap else 1


def warm_up(core: EngineCore) -> None:
    """Generate one token through the whole path: whatever fails lazily fails before Ready."""
    core.handle(Add(WARM_UP_ID, [0], SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)), time.monotonic())
    while core.has_work:
        outputs = core.step(time.monotonic())
        for output in outputs.outputs if outputs else ():
            if output.error:
                raise RuntimeError(f"the first token failed: {output.error}")


class Mailbox:
    """The two sockets, each owned by a thread of its own, behind two queues."""

    def __init__(self, start: CoreStart) -> None:
        self._context = zmq.Context()
        self.commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self.compiler: Compiler | None = None
        self._outgoing: queue.SimpleQueue[FromCore | None] = queue.SimpleQueue()
        reader = threading.Thread(
            target=_vital, args=(self._read, start.commands_addresses), name="commands", daemon=True
        )
        self._writer = threading.Thread(
            target=_vital, args=(self._write, start.outputs_addresses), name="outputs", daemon=True
        )
        reader.start()
        self._writer.start()

    def send(self, message: FromCore) -> None:
        self._outgoing.put(message)

    def close(self) -> None:
        """Flush what was sent."""
        self._outgoing.put(None)
        self._writer.join(timeout=LINGER_MS / 1000 + 1.0)

    def _read(self, addresses: list[str]) -> None:
        socket = self._context.socket(zmq.PULL)
        socket.set_hwm(0)
        for address in addresses:
            socket.connect(address)
        while True:
            command = decode_to_core(socket.recv())
            if isinstance(command, Compile):
                self._compile(command)
            else:
                self.commands.put(command)

    def _compile(self, command: Compile) -> None:
        """Right here: the loop has better things to do."""
        number, compiler = command.compile_id, self.compiler
        if compiler is None:
            self.send(Compiled(number, "this engine cannot constrain its output"))
            return
        try:
            compiler.submit(command.grammar, lambda error: self.send(Compiled(number, error)))
        except Exception as error:
            log.exception("a grammar could not be handed to the compiler")
            self.send(Compiled(number, f"the grammar compiler failed ({type(error).__name__}); {TRY_AGAIN}"))

    def _write(self, addresses: list[str]) -> None:
        context = zmq.Context()  # of its own: its end waits until everything has left
        sockets = [context.socket(zmq.PUSH) for _ in addresses]
        for socket, address in zip(sockets, addresses, strict=True):
            socket.set_hwm(0)
            socket.setsockopt(zmq.LINGER, LINGER_MS)
            socket.connect(address)
        while (message := self._outgoing.get()) is not None:
            for process, part in addressed(message, len(sockets)):
                sockets[process].send(encode(part))
        for socket in sockets:
            socket.close()
        context.term()


def _vital(work: Callable[[list[str]], None], addresses: list[str]) -> None:
    """Run a thread without which the core would only look alive: if it fails, the process ends."""
    try:
        work(addresses)
    except BaseException:
        log.exception("the core's %s thread failed", threading.current_thread().name)
        os._exit(1)


def addressed(message: FromCore, num_processes: int) -> list[tuple[int, FromCore]]:
    """What goes to which API process: everybody gets what concerns everybody, outputs go where they belong."""
    if num_processes == 1:
        return [(0, message)]
    if isinstance(message, Controlled):
        return [(process_of(message.control_id), message)]
    if isinstance(message, Compiled):
        return [(process_of(message.compile_id), message)]
    if not isinstance(message, StepOutputs):
        return [(process, message) for process in range(num_processes)]
    outputs: list[list[RequestOutput]] = [[] for _ in range(num_processes)]
    first: list[list[FirstScheduled]] = [[] for _ in range(num_processes)]
    for output in message.outputs:
        outputs[process_of(output.request_id)].append(output)
    for scheduled in message.first_scheduled:
        first[process_of(scheduled.request_id)].append(scheduled)
    return [
        (process, msgspec.structs.replace(message, outputs=outputs[process], first_scheduled=first[process]))
        for process in range(num_processes)
        if process == 0 or outputs[process] or first[process] or message.adapter_use is not None
    ]


def run_loop(core: EngineCore, mailbox: Mailbox) -> None:
    """Forever: take the commands that came, run a step, hand out its tokens."""
    outputs: StepOutputs | None = None
    while True:
        if not core.has_work:
            _wait_for_command(core, mailbox, core.idle_s(time.monotonic()))
        elif outputs is None:
            _wait_for_command(core, mailbox, IDLE_S)
        while not mailbox.commands.empty():
            core.handle(mailbox.commands.get(), time.monotonic())
        for answer in core.take_answers():
            mailbox.send(answer)
        outputs = core.step(time.monotonic())
        if outputs is not None:
            mailbox.send(outputs)
        core.after_step()


def _wait_for_command(core: EngineCore, mailbox: Mailbox, timeout_s: float | None) -> None:
    """Nothing may run now: do not spin."""
    with contextlib.suppress(queue.Empty):
        core.handle(mailbox.commands.get(timeout=timeout_s), time.monotonic())


class _Engine:
    """The parts of a core, made once at the start and again after a sleep."""

    def __init__(self, config: EngineConfig, on_lost: Callable[[str], None], mark: Mark) -> None:
        """Loads the model. Raises StartupError.

        What needs no torch begins before torch is imported: the context, pinning, compiling.
        """
        slabs = early_host_memory(config)
        kernels = compile_kernels.begin(config)
        import_engine()
        from mainsail_engine.runner.model_runner import ModelRunner
        from mainsail_engine.runner.workers import start_ranks
        from mainsail_engine.speculative.load import check_vocabularies, load_draft

        mark("imports")
        self.config, self._on_lost = config, on_lost
        self._slabs = slabs
        self._host: HostMemory | None = None
        """For KV blocks, on a device alone; weights lie there while it sleeps."""
        parallel, self._workers = start_ranks(config, on_lost)
        self.draft = load_draft(config) if config.speculative and config.speculative.is_draft_model else None
        self.model_runner = ModelRunner(config, parallel, mark, kernels.wait)
        if self.draft is not None:
            check_vocabularies(self.draft.runner.vocab_size, self.model_runner.vocab_size)
        self.events = kv_events(config)

    def parts(self) -> tuple[Scheduler, Runner]:
        """A scheduler over the pool as it is now, empty, and the runner to drive with it."""
        from mainsail_engine.runner.swap import host_memory, with_host_memory
        from mainsail_engine.runner.workers import host_bytes
        from mainsail_engine.scheduler import Scheduler

        runner, config = self.model_runner, self.config
        device = str(runner.device)
        scheduler = Scheduler(
            config,
            runner.num_blocks,
            runner.max_model_len,
            runner.eos_token_ids,
            max_num_batched_tokens=runner.budget,
            whole_prompts=runner.architecture.bidirectional,
            max_inter_token_latency_s=latency_target_s(config, device),
            speculator=self._speculator(device),
            micro_batches=micro_batches(config),
            step_rows=runner.step_rows,
        )
        if self.events is not None:
            self.events.cleared()
            scheduler.kv.tree.watchers += (self.events,)
        if self._workers:
            own = with_host_memory(runner, runner.kv_cache, host_memory(runner.kv_cache, host_bytes(config)))
            return scheduler, self._workers.all_ranks(own, staged=config.pipeline_parallel_size > 1)
        slabs, self._slabs = self._slabs, None
        self._host = self._host or host_memory(runner.kv_cache, self._host_bytes(slabs), slabs)
        return scheduler, with_host_memory(runner, runner.kv_cache, self._host)

    def _host_bytes(self, slabs: HostSlabs | None) -> int:
        """Of host memory for KV, on a device alone."""
        from mainsail_engine.runner.memory import offloading_bytes

        pool, asked = self.model_runner.kv_cache, self.config.cache.offloading_size_gib
        early = None if slabs is None else slabs.num_bytes
        return offloading_bytes(asked, pool_bytes=pool.nbytes, cuda=pool.device.type == "cuda", early_bytes=early)

    def _speculator(self, device: str) -> Speculator | None:
        """What guesses tokens, if anything does."""
        if self.config.speculative is None or self.model_runner.architecture.bidirectional:
            return None
        from mainsail_engine.speculative.speculator import Speculator

        return Speculator(
            self.config.speculative,
            self.draft.source() if self.draft is not None else None,
            cuda=device.startswith("cuda"),
            overlap=pipeline_depth(self.config, device) > 1,
        )

    def adapters(self) -> AdapterDesk | None:
        """The adapters, those of the start loaded. Raises InvalidAdapterError."""
        if self.config.lora is None:
            return None
        from mainsail_engine.adapters import AdapterDesk

        desk = AdapterDesk(self.config.lora.max_loras, self, self.config.lora.max_adapters)
        desk.load_now(self.config.lora.modules)
        return desk

    def read_adapter(self, name: str, path: str) -> Adapter:
        return self.model_runner.read_adapter(name, path)

    def fill_adapter(self, slot: int, adapter: Adapter, name: str, path: str) -> None:
        """On every rank: the others read it themselves, after this one has found it right."""
        if self._workers:
            self._workers.send_adapter(slot, name, path)
        self.model_runner.fill_adapter(slot, adapter)

    def resting_runner(self) -> Runner:
        return self.model_runner

    def sleep(self) -> None:
        if self._workers:
            self._workers.sleep()
        self.model_runner.sleep(self._host)
        if self.draft is not None:
            self.draft.runner.sleep()

    def wake_up(self) -> tuple[Scheduler, Runner]:
        if self._workers:
            self._workers.wake_up()
        try:
            self.model_runner.wake_up(self.config)
        except Exception as error:
            if self._workers:  # the others wait for it in the step that all begin with
                self._on_lost(f"rank 0 could not wake up: {error}")
            raise
        if self._host is not None:
            self._host.take_back()
        if self.draft is not None:
            self.draft.runner.wake_up(self.draft.config)
        return self.parts()


def build(
    config: EngineConfig, on_lost: Callable[[str], None] = log.critical, timeline: Timeline | None = None
) -> tuple[EngineCore, Ready]:
    """Load the model and generate a token. Raises StartupError.

    on_lost: told, on another thread, that a rank of several is lost and nothing will ever come of the steps in flight.
    timeline: where the start's phases are noted.
    """
    from mainsail_engine.structured.compiler import Compiler
    from mainsail_engine.structured.vocabulary import vocabulary_of
    from mainsail_engine.text.tokenizer import load_tokenizer

    timeline = timeline or Timeline(time.monotonic())
    engine = _Engine(config, on_lost, timeline.mark)
    scheduler, runner = engine.parts()
    timeline.mark("host_memory")
    device = str(engine.model_runner.device)
    vocab_size, eos_token_ids = runner.vocab_size, sorted(runner.eos_token_ids)
    compiler = Compiler(  # its function must not hold the runner, whose memory a sleep gives back
        lambda: vocabulary_of(load_tokenizer(Path(config.model.path)), vocab_size, eos_token_ids),
        jump_forward=config.jump_forward,
    )
    adapters = engine.adapters()
    core = EngineCore(
        scheduler, runner, depth=pipeline_depth(config, device), micro_batches=micro_batches(config) > 1,
        compiler=compiler, sleeper=engine, adapters=adapters,
    )  # fmt: skip
    if engine.events is not None:
        core.after_step = engine.events.flush
    warm_up(core)
    core.after_step()  # an engine that nobody has asked yet says so, too
    timeline.mark("token")
    ready = Ready(
        max_model_len=scheduler.max_model_len,
        num_blocks=runner.num_blocks,
        block_size=BLOCK_SIZE,
        vocab_size=vocab_size,
        eos_token_ids=eos_token_ids,
        device=device,
        dtype=str(engine.model_runner.kv_dtype).removeprefix("torch."),
        adapters=adapters.table.paths if adapters is not None else {},
        embeds_only=engine.model_runner.architecture.embeds_only,
        hidden_size=engine.model_runner.architecture.hidden_size,
        start=timeline.phases,
    )
    return core, ready


def early_host_memory(config: EngineConfig) -> HostSlabs | None:
    """Host memory for KV, taken before torch is there, on a device alone: what is asked for, or a quarter of what is
    free, at most as much as the device itself has."""
    total = cuda_driver.total_bytes() if config.device != "cpu" and config.num_ranks == 1 else 0
    if not total:
        return None
    from mainsail_engine.host_slabs import HostSlabs
    from mainsail_engine.runner.memory import offloading_bytes

    context = cuda_driver.Context()
    num_bytes = offloading_bytes(config.cache.offloading_size_gib, pool_bytes=total, cuda=True)
    return HostSlabs(num_bytes, context.pin)


def import_engine() -> None:
    """torch, and what of the engine needs it: objects that stay, so that the garbage collector is to look through them
    neither now nor between two steps."""
    gc.disable()
    try:
        importlib.import_module("mainsail_engine.runner.model_runner")
    finally:
        gc.freeze()
        gc.enable()


def kv_events(config: EngineConfig) -> KVEvents | None:
    """The publisher, where one is wanted. Raises InvalidConfigurationError."""
    wanted = config.kv_events
    if wanted is None or not wanted.enable_kv_cache_events or wanted.publisher == "null":
        return None
    from mainsail_engine.kv.events import KVEvents

    return KVEvents(wanted)


def describe(error: BaseException) -> Failed:
    """The stable reason and a message for whatever ended the core."""
    if isinstance(error, StartupError):
        return Failed(error.reason, error.message)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        remedy = "lower --gpu-memory-utilization, --max-num-batched-tokens or --max-model-len"
        return Failed("OutOfMemory", f"out of memory: {error}; {remedy}")
    return Failed("EngineFailed", f"{type(error).__name__}: {error}")


def main() -> None:
    start = take_orders(CoreStart)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s core: %(message)s", stream=sys.stderr)
    timeline = Timeline(start.started_s or time.monotonic())
    timeline.mark("core")
    mailbox = Mailbox(start)
    try:
        core, ready = build(start.config, lambda message: _die(mailbox, Failed("RankLost", message)), timeline)
        mailbox.compiler = core.compiler
        settle()
        mailbox.send(ready)
        run_loop(core, mailbox)
    except BaseException as error:
        failed = describe(error)
        if not isinstance(error, StartupError):
            log.exception("the core failed")
        _die(mailbox, failed)


def _die(mailbox: Mailbox, failed: Failed) -> None:
    """Say so, and end at once, whatever the other threads wait for."""
    log.error("%s: %s", failed.reason, failed.message)
    mailbox.send(failed)
    mailbox.close()
    os._exit(1)


if __name__ == "__main__":
    main()
