"""An engine on a simulated clock: the real scheduler, and a device that only takes time.

A step takes what its work costs on a device of known weights (`DeviceCost`); loads from the host come over a bus of
known speed while steps run. Tokens are made up. One step is in flight, and its tokens are committed when it ends: what
two in flight win on a real device is the host's time, which counts nothing here.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from mainsail_engine.chunking import attention_pairs
from mainsail_engine.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from mainsail_engine.protocol import RequestOutput
from mainsail_engine.request import Request
from mainsail_engine.scheduler import Scheduler
from mainsail_engine.step import StepPlan, StepResult

IDLE_S = 0.005
"""How long the core sleeps when nothing may run."""


class Cost(Protocol):
    """What a device takes."""

    @property
    def load_block(self) -> float: ...
    def seconds(self, plan: StepPlan) -> float: ...


@dataclass(frozen=True)
class DeviceCost:
    """Seconds."""

    step: float = 4.5e-3
    decode: float = 1.5e-5
    context_token: float = 2.7e-8
    prefill_token: float = 2.0e-5
    attention_pair: float = 4.0e-10
    load_block: float = 4.2e-5
    """One block over the bus: 2 MiB at 50 GB/s."""

    def seconds(self, plan: StepPlan) -> float:
        decodes, prefills = plan.chunks[: plan.num_decodes], plan.chunks[plan.num_decodes :]
        pairs = sum(attention_pairs(chunk.start, chunk.num_tokens) for chunk in prefills)
        return (
            self.step
            + self.decode * len(decodes)
            + self.context_token * sum(chunk.start for chunk in decodes)
            + self.prefill_token * sum(chunk.num_tokens for chunk in prefills)
            + self.attention_pair * pairs
        )


H200_8B = DeviceCost()
"""An 8B model in bf16 on an H200, roughly: 4.5 ms for the weights, 131 kB of KV for each token of context."""


class SimulatedEngine:
    """Add requests and timers; `run` until nothing is left."""

    def __init__(
        self,
        *,
        num_blocks: int,
        num_host_blocks: int = 0,
        max_model_len: int = 40_000,
        max_num_seqs: int = 256,
        budget: int = 8192,
        latency_s: float = 0.05,
        cost: Cost = H200_8B,
        on_output: Callable[[RequestOutput, float], None] = lambda output, now: None,
        watermark: float = 0.01,
        **scheduler_options: bool,
    ) -> None:
        config = EngineConfig(
            model=ModelConfig(path="-"),
            cache=CacheConfig(num_blocks=num_blocks),
            scheduler=SchedulerConfig(
                max_num_seqs=max_num_seqs, max_num_batched_tokens=budget, watermark=watermark, **scheduler_options
            ),
        )
        self.scheduler = Scheduler(
            config, num_blocks, max_model_len, [], num_host_blocks=num_host_blocks, max_inter_token_latency_s=latency_s
        )
        self.cost: Cost = cost
        self.now = self.busy_s = 0.0
        self.on_output = on_output
        self.on_step: Callable[[StepPlan], object] = lambda plan: None
        self.prefilled = self.decoded = 0
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._num_timers = 0
        self._loads: deque[float] = deque()
        """When each block that is on the bus arrives."""
        self._bus_free_s, self._num_loaded = 0.0, 0

    def at(self, when: float, call: Callable[[], None]) -> None:
        heapq.heappush(self._timers, (when, self._num_timers, call))
        self._num_timers += 1

    def add(self, request: Request) -> None:
        self.scheduler.add(request)

    def run(self, until: float = float("inf")) -> None:
        while self.now < until and (self._timers or self.scheduler.has_work):
            self._fire()
            if not self.step():
                self._sleep()

    def _fire(self) -> None:
        while self._timers and self._timers[0][0] <= self.now:
            heapq.heappop(self._timers)[2]()

    def _sleep(self) -> None:
        """Nothing may run: until the next timer, or for a moment while requests wait."""
        waits = [self.now + IDLE_S] if self.scheduler.has_work else []
        waits += [self._timers[0][0]] if self._timers else []
        wake_s = self.scheduler.wake_s
        if wake_s is not None and waits:
            waits.append(max(wake_s, self.now + IDLE_S))
        self.now = min(waits, default=self.now)

    def step(self) -> bool:
        plan = self.scheduler.schedule(self.now)
        if plan is None:
            return False
        for _ in plan.loads:
            self._bus_free_s = max(self._bus_free_s, self.now) + self.cost.load_block
            self._loads.append(self._bus_free_s)
        if plan.chunks:
            took = self.cost.seconds(plan)
            self.now, self.busy_s = self.now + took, self.busy_s + took
        elif self._loads:
            self.now = max(self.now, self._loads[-1])
        while self._loads and self._loads[0] <= self.now:
            self._loads.popleft()
            self._num_loaded += 1
        self.decoded += plan.num_decodes
        self.prefilled += plan.num_tokens - plan.num_decodes
        self.on_step(plan)
        tokens = [3 + (chunk.start * 31 + chunk.slot) % 1000 for chunk in plan.chunks if chunk.samples]
        for output in self.scheduler.commit(plan, StepResult(tokens, num_loaded=self._num_loaded), self.now):
            self.on_output(output, self.now)
        return True
