"""How many agent sessions run at once in the same memory, against reserving the full context for each.

    python benchmarks/concurrency_sim.py [--output results/concurrency_sim.json]

The real scheduler on a simulated H200 with an 8B model (simulated.py), its pool 56,000 blocks (897,000 tokens of KV).
400 turns of agent sessions wait from the beginning: a shared system prompt of 2,000 tokens, then 500 to 30,000 tokens
of the session's own (spread evenly over the decades), answers of 1,000 to 3,000, so that memory is what bounds them.
Measured over the middle half of the run: how many requests run at once. Reserving is the same scheduler with as many
requests as full contexts fit the pool: of 131,072 tokens, as Llama 3.1 has, and of 32,768.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from pathlib import Path

from benchmarks.simulated import SimulatedEngine

from mainsail_engine.request import Request, SamplingParams
from mainsail_engine.step import StepPlan

NUM_BLOCKS = 56_000
TURNS = 400
SYSTEM = [1] * 2000
CONTEXTS = (32_768, 131_072)


def run(max_num_seqs: int) -> dict[str, float]:
    """Mean number of running requests over the middle half, preemptions, tokens generated per second."""
    rng = random.Random(4)
    engine = SimulatedEngine(num_blocks=NUM_BLOCKS, max_model_len=CONTEXTS[0], max_num_seqs=max_num_seqs)
    running: list[int] = []

    def look(plan: StepPlan) -> None:
        running.append(engine.scheduler.num_running)

    engine.on_step = look
    for number in range(TURNS):
        own = rng.choices(range(2000, 30_000), k=int(500 * 60 ** rng.random()))
        params = SamplingParams(max_tokens=rng.randint(1000, 3000), ignore_eos=True)
        engine.add(Request(str(number), SYSTEM + own, params, 0.0))
    engine.run()
    engine.scheduler.check_integrity()
    middle = running[len(running) // 4 : -len(running) // 4]
    return {
        "running": statistics.mean(middle),
        "preemptions": engine.scheduler.stats().num_preemptions,
        "tokens_per_s": engine.decoded / engine.now,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    results = {"paged": run(512)}
    for context in CONTEXTS:
        results[f"reserving {context}"] = run(NUM_BLOCKS * 16 // context)
    print("memory               running at once   times fewer   preempted   tokens/s")
    for name, result in results.items():
        times = results["paged"]["running"] / result["running"]
        print(
            f"{name:<20} {result['running']:>15.1f} {times:>13.1f} {result['preemptions']:>11} "
            f"{result['tokens_per_s']:>10.0f}"
        )
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
