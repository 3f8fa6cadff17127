"""Host time of the scheduler: `schedule` and `commit` of one step, by the number of running decodes.

    python benchmarks/scheduler.py [--steps 400] [--output results/scheduler.json]

Prompts of 1,000 tokens are prefilled, then every request decodes; medians of the CPU time of this thread, over pure
decode steps, with two steps in flight as on CUDA. It must hide behind a step (about 10 ms at 256 decodes of an 8B).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import deque
from pathlib import Path

from mainsail_engine.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from mainsail_engine.request import Request, SamplingParams
from mainsail_engine.scheduler import Scheduler
from mainsail_engine.step import StepPlan, StepResult

LENGTH = 1000
BATCHES = (1, 32, 256)


def measure(batch: int, steps: int) -> dict[str, float]:
    """Medians in microseconds."""
    num_blocks = batch * 160
    config = EngineConfig(
        model=ModelConfig(path="-"),
        cache=CacheConfig(num_blocks=num_blocks),
        scheduler=SchedulerConfig(max_num_seqs=batch, max_num_batched_tokens=8192),
    )
    scheduler = Scheduler(config, num_blocks, 4096, [2])
    params = SamplingParams(max_tokens=steps + 200, temperature=0.0, ignore_eos=True)
    for i in range(batch):
        scheduler.add(Request(str(i), [3 + (i + j) % 1000 for j in range(LENGTH)], params, 0.0))
    in_flight: deque[StepPlan] = deque()
    times: dict[str, list[int]] = {"schedule": [], "commit": []}
    while len(times["commit"]) < steps:
        begin = time.thread_time_ns()
        plan = scheduler.schedule(time.monotonic())
        middle = time.thread_time_ns()
        if plan is not None:
            in_flight.append(plan)
        if len(in_flight) < 2:
            continue
        oldest = in_flight.popleft()
        result = StepResult([7 for chunk in oldest.chunks if chunk.samples])
        start = time.thread_time_ns()
        scheduler.commit(oldest, result, time.monotonic())
        scheduler.settle()
        scheduler.stats()
        end = time.thread_time_ns()
        if plan is not None and plan.num_decodes == len(plan.chunks) == batch == oldest.num_decodes:
            times["schedule"].append(middle - begin)
            times["commit"].append(end - start)
    return {name: statistics.median(values) / 1000 for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    results = {str(batch): measure(batch, arguments.steps) for batch in BATCHES}
    print("decodes  schedule µs  commit µs")
    for batch, medians in results.items():
        print(f"{batch:>7}  {medians['schedule']:>11.0f}  {medians['commit']:>9.0f}")
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
