"""What no schedule can beat: the least time in which steps of the simulated H200 (served_sim.py) make a row's tokens.

    python -m benchmarks.served_bound [--longest-ms 40]

A linear program over all mixes of decodes and prompt tokens in a step, one constraint for each of the two: its optimum
needs at most two kinds of steps, so all pairs are tried. Steps beside decodes take at most --longest-ms. Where a run
begins and ends, with few requests decoding, is not counted, nor is who waits for what: the order of steps is free.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
from benchmarks.served_sim import H200, decode_rows, mixed_rows

from mainsail_engine.chunking import STEP_ROWS

LARGE = (2048, 4096, 8192)


@dataclass(frozen=True)
class Work:
    """A row's tokens, and what they attend to on average."""

    output_tokens: int
    prompt_tokens: int
    most_decodes: int
    context: int
    """Of a decode."""
    pairs: int
    """Of a prompt token: what it attends to."""
    kv_bytes: int = 2


ROWS = {
    "P7": Work(768 * 256, 768 * 1024, 256, 1152, 512),
    "P8": Work(320 * 256, 320 * 1024, 64, 1152, 512),
    "P11 bf16": Work(400 * 150, 1_600_000, 28, 17_900, 16_000),
    "P11 FP8": Work(400 * 150, 1_600_000, 50, 17_900, 16_000, kv_bytes=1),
}


def chunks(work: Work, tokens: int) -> list[tuple[int, int]]:
    """(start, tokens) of chunks that attend to work.pairs on average."""
    whole, rest = divmod(tokens, 2 * work.pairs)
    sizes = [2 * work.pairs] * whole + [rest] * (rest > 0)
    return [(work.pairs - size // 2, size) for size in sizes]


def kinds(work: Work, cost: H200, longest_s: float) -> np.ndarray:
    """[num_kinds, 3] float64: decodes, prompt tokens and seconds of steps."""
    cost = replace(cost, fp8_kv=work.kv_bytes == 1)
    apart = max(1, work.most_decodes // 32)
    decodes = sorted({*range(0, work.most_decodes, apart), work.most_decodes})
    made: list[tuple[int, int, float]] = []
    for count, rows in product(decodes, (0, *STEP_ROWS, *LARGE)):
        tokens = rows - count if rows else 0
        if tokens < 0 or count + tokens == 0:
            continue
        padded = mixed_rows(rows) if tokens else decode_rows(count)
        took = cost.step + (cost.mixed if tokens else 0.0) + cost.linear_s(padded) + cost.row * padded
        took += count * work.context * 65_536 * work.kv_bytes / 4.2e12
        took += cost.layers * cost.prompts_s(chunks(work, tokens), rows)
        if took <= longest_s or not (count and tokens):
            made.append((count, tokens, took))
    return np.array(made)


def least_s(work: Work, cost: H200, longest_s: float) -> float:
    """Seconds. Two kinds of steps, as often as both kinds of tokens want it."""
    decodes, tokens, took = kinds(work, cost, longest_s).T
    least = np.inf
    for d, p, t in zip(decodes, tokens, took, strict=True):
        with np.errstate(divide="ignore", invalid="ignore"):
            determinant = d * tokens - decodes * p
            first = (work.output_tokens * tokens - decodes * work.prompt_tokens) / determinant
            second = (d * work.prompt_tokens - work.output_tokens * p) / determinant
            total = first * t + second * took
        possible = (determinant != 0) & (first >= -1e-9) & (second >= -1e-9)
        least = min(least, float(total[possible].min(initial=np.inf)))
    return least


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--longest-ms", type=float, default=40.0)
    args = parser.parse_args()
    for name, cost in {
        "as simulated": H200(),
        "prompts' attention fills the card": H200(split=True),
    }.items():
        print(name)
        for row, work in ROWS.items():
            seconds = least_s(work, cost, args.longest_ms / 1e3)
            print(f"  {row:10} {seconds:7.2f} s {work.output_tokens / seconds:8.0f} tokens/s", flush=True)


if __name__ == "__main__":
    main()
