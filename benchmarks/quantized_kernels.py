"""Quantized linears on a GPU, for the matrices of Llama-3-8B: every configuration tried, beside cuBLAS.

    python benchmarks/quantized_kernels.py [--rows 1,16,32,64,128] [--kinds fp8,int4,q4_k] [--out FILE]

Bytes of weights and scales a second, against the card's copy rate. Times are medians of CUDA graph replays over more
distinct weights than the cache holds. Processes compile all configurations first, side by side.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from mainsail_kernels import reference_quantized as reference
from mainsail_kernels.fp8 import fp8_linear
from mainsail_kernels.grouped import Codes, grouped_linear
from mainsail_kernels.tuned import QuantizedConfig, override

SHAPES = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]
CACHE_BYTES = 128 << 20
COMPILERS = 14
SPLITS = {6144: 1, 4096: 2, 28672: 1}


@dataclass
class Matrix:
    """One weight of a kind: what it multiplies with, and the bytes that must be read."""

    linear: Callable[[torch.Tensor], torch.Tensor]
    num_bytes: int


def fp8_matrix(out: int, num_in: int) -> Matrix:
    codes = torch.randn(out, num_in, device="cuda").to(reference.FP8)
    scale = torch.rand(out, device="cuda")
    return Matrix(lambda x: fp8_linear(x, codes, scale), codes.numel() + 4 * out)


def int4_matrix(out: int, num_in: int) -> Matrix:
    words = torch.randint(-(2**31), 2**31, (out, num_in // 8), dtype=torch.int32, device="cuda")
    codes = Codes(words, 4, 128, torch.rand(out, num_in // 128, device="cuda").half(), zero=8)
    return Matrix(lambda x: grouped_linear(x, codes), 4 * words.numel() + 2 * codes.scale.numel())


def q4_k_matrix(out: int, num_in: int) -> Matrix:
    words = torch.randint(-(2**31), 2**31, (out, num_in // 8), dtype=torch.int32, device="cuda")
    small = [torch.randint(0, 64, (out, num_in // 32), device="cuda").to(torch.uint8) for _ in range(2)]
    supers = [torch.rand(out, num_in // 256, device="cuda").half() for _ in range(2)]
    codes = Codes(words, 4, 32, small[0], small[1], supers[0], supers[1])
    return Matrix(lambda x: grouped_linear(x, codes), 4 * words.numel() + 2 * small[0].numel() + 4 * supers[0].numel())


def bf16_matrix(out: int, num_in: int) -> Matrix:
    weight = torch.randn(out, num_in, device="cuda", dtype=torch.bfloat16)
    return Matrix(lambda x: F.linear(x, weight), 2 * weight.numel())


KINDS = {"fp8": fp8_matrix, "int4": int4_matrix, "q4_k": q4_k_matrix}


def configurations(kind: str, rows: int) -> Iterator[QuantizedConfig]:
    """For the split that the shape asks for, put in later."""
    if rows == 1 and kind == "fp8":
        tiles = itertools.product((1, 2, 4, 8), (1024, 2048, 4096), (4,), (1, 2))
    elif rows == 1:
        wide = ((128, 1), (256, 2), (512, 4))
        tiles = ((out, words, warps, stages) for out in (2, 4, 8) for words, warps in wide for stages in (1, 2))
    elif kind == "fp8":
        tiles = itertools.product((64, 128), (128, 256), (4, 8), (3, 4))
    else:
        tiles = itertools.product((32, 64, 128), (16, 32, 64), (4,), (2, 4))
    for block_out, block_in, warps, stages in tiles:
        yield QuantizedConfig(block_out, block_in, warps, stages)


def jobs(kinds: list[str], rows: list[int]) -> list[tuple[str, int, QuantizedConfig | None]]:
    """None: the table's own choice."""
    found: list[tuple[str, int, QuantizedConfig | None]] = [(kind, n, None) for kind in kinds for n in rows]
    found += [(kind, n, config) for kind in kinds for n in rows for config in configurations(kind, n)]
    return found


def with_split(config: QuantizedConfig, rows: int, out: int) -> QuantizedConfig:
    split = 1 if rows == 1 else SPLITS[out] * max(config.block_out // 64, 1)
    return QuantizedConfig(**asdict(config) | {"split": split})


def graph_us(calls: list[Callable[[], object]]) -> float:
    calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(3):
        graph.replay()
    times: list[float] = []
    for _ in range(7):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times)


def copy_rate() -> float:
    """GB/s read and written by a copy of 1 GiB."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / graph_us([lambda: target.copy_(source)]) / 1e3


class Bench:
    """Matrices of every kind and shape, made when they are asked for."""

    def __init__(self) -> None:
        self._made: dict[tuple[str, int, int], list[Matrix]] = {}

    def matrices(self, kind: str, out: int, num_in: int) -> list[Matrix]:
        key = (kind, out, num_in)
        if key not in self._made:
            make = {**KINDS, "bf16": bf16_matrix}[kind]
            first = make(out, num_in)
            self._made[key] = [first, *(make(out, num_in) for _ in range(CACHE_BYTES // first.num_bytes))]
        return self._made[key]

    def time(self, kind: str, rows: int, out: int, num_in: int, config: QuantizedConfig | None) -> dict[str, Any]:
        x = torch.randn(rows, num_in, device="cuda", dtype=torch.bfloat16)
        found = self.matrices(kind, out, num_in)
        calls: list[Callable[[], object]] = [lambda m=m: m.linear(x) for m in found]
        if config is None:
            us = graph_us(calls)
        else:
            with override(with_split(config, rows, out)):
                us = graph_us(calls)
        return {
            "kind": kind, "rows": rows, "out": out, "in": num_in, "us": round(us, 2),
            "GB/s": round(found[0].num_bytes / us / 1e3), "config": None if config is None else asdict(config),
        }  # fmt: skip


def compile_share(kinds: list[str], rows: list[int], share: int) -> None:
    for kind, n, config in jobs(kinds, rows)[share::COMPILERS]:
        for out, num_in in SHAPES[1:3]:
            x = torch.randn(n, num_in, device="cuda", dtype=torch.bfloat16)
            matrix = KINDS[kind](out, num_in)
            try:
                if config is None:
                    matrix.linear(x)
                else:
                    with override(with_split(config, n, out)):
                        matrix.linear(x)
            except Exception as error:
                print(f"{kind} {n} {config}: {str(error).splitlines()[0][:100]}", flush=True)
    torch.cuda.synchronize()


def measure(kinds: list[str], rows: list[int]) -> list[dict[str, Any]]:
    bench, table = Bench(), []
    for kind, n, config in jobs(kinds, rows):
        for out, num_in in SHAPES:
            try:
                table.append(bench.time(kind, n, out, num_in, config))
            except Exception as error:
                print(f"{kind} {n} {out} x {num_in} {config}: {str(error).splitlines()[0][:100]}", flush=True)
                torch.cuda.synchronize()
                break
    for n in rows:
        table += [bench.time("bf16", n, out, num_in, None) for out, num_in in SHAPES]
    return table


def show(table: list[dict[str, Any]], rate: float) -> None:
    """The best of each shape, then the configuration that is best for all shapes together."""
    print(f"copy rate {rate:.0f} GB/s")
    for (kind, rows), lines in groupby(table, "kind", "rows"):
        totals = {config: sum(line["us"] for line in some) for (config,), some in groupby(lines, "config")
                  if len(some) == len(SHAPES)}  # fmt: skip
        if not totals:
            continue
        best = min(totals, key=totals.__getitem__)
        print(f"{kind} rows {rows}: best for all {totals[best]:.1f} us {best}; table's {totals.get('None', 0):.1f} us")
        for (out, num_in), some in groupby(lines, "out", "in"):
            line = min(some, key=lambda found: found["us"])
            share = line["GB/s"] / rate
            print(f"   {out:6} x {num_in:6} {line['us']:8.2f} us {line['GB/s']:6} GB/s {share:4.0%} {line['config']}")


def groupby(table: list[dict[str, Any]], *keys: str) -> list[tuple[tuple[Any, ...], list[dict[str, Any]]]]:
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for line in table:
        found.setdefault(tuple(str(line[k]) if k == "config" else line[k] for k in keys), []).append(line)
    return list(found.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--rows", default="1,16,64,128")
    parser.add_argument("--kinds", default="fp8,int4,q4_k")
    parser.add_argument("--share", type=int, help="only compile this share of the configurations")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    kinds, rows = args.kinds.split(","), [int(n) for n in args.rows.split(",")]
    if args.share is not None:
        compile_share(kinds, rows, args.share)
        return
    started = time.perf_counter()
    command = [sys.executable, __file__, "--rows", args.rows, "--kinds", args.kinds, "--share"]
    for process in [subprocess.Popen([*command, str(share)]) for share in range(COMPILERS)]:
        process.wait()
    print(f"compiled in {time.perf_counter() - started:.0f} s")
    rate = copy_rate()
    table = measure(kinds, rows)
    show(table, rate)
    if args.out:
        result = {"card": torch.cuda.get_device_name(), "torch": torch.__version__, "copy_GB_per_s": round(rate)}
        args.out.write_text(json.dumps(result | {"rows": table}) + "\n")


if __name__ == "__main__":
    main()
