"""A mixture of experts alone, on one GPU: microseconds of a layer by design and tile, and bytes a second.

    python benchmarks/experts.py [--shapes gpt-oss-20b,qwen3-30b-a3b-fp8] [--tokens 1,8,32,128] [--output FILE]

sorted   route, group, two products, activation, sum (moe.py);  pairs   as experts.py has them
halves   as experts_halves.py has them

Layers of weights of their own, more than the L2 cache holds, in one CUDA graph; random scores, so that experts are hit
evenly. Bytes are those of the experts that so many tokens hit. Each design is compared with the reference first, on a
small mixture of the same kind.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mainsail_kernels import moe, reference
from mainsail_kernels import reference_quantized as quantized
from mainsail_kernels.experts import Mixture, by_pairs
from mainsail_kernels.experts_halves import by_halves
from mainsail_kernels.fp4_tables import fp4_tables
from mainsail_kernels.tuned import ExpertTile, HalvesTile, HalvesTiles, SortedTile, override

LAYERS = 6
Call = Callable[[torch.Tensor, torch.Tensor, Mixture], torch.Tensor]


@dataclass(frozen=True)
class Shape:
    kind: str
    experts: int
    per_token: int
    hidden: int
    size: int

    def bytes_of(self, tokens: int) -> float:
        """Of the experts that so many random choices hit."""
        hit = self.experts * (1 - (1 - self.per_token / self.experts) ** tokens)
        width = {"fp4": (4 + 8 / 32) / 8, "tables": (4 + 8 / 32) / 8, "fp8": 1.0, "blocks": 1.0, "bf16": 2.0}[self.kind]
        return 3 * self.hidden * self.size * hit * width


SHAPES = {
    "gpt-oss-20b": Shape("tables", 32, 4, 2880, 2880),
    "gpt-oss-20b-packed": Shape("fp4", 32, 4, 2880, 2880),
    "qwen3-30b-a3b-fp8": Shape("fp8", 128, 8, 2048, 768),
    "qwen3-30b-a3b-blocks": Shape("blocks", 128, 8, 2048, 768),
    "qwen3-30b-a3b": Shape("bf16", 128, 8, 2048, 768),
}


def layer(s: Shape) -> tuple[Mixture, Mixture]:
    """A mixture, and the same as the reference reads it."""
    shapes = ((s.experts, 2 * s.size, s.hidden), (s.experts, s.hidden, s.size))
    scales: list[Any] = [None, None]
    biases: list[Any] = [None, None]
    tables: dict[str, Any] = {}
    if s.kind in ("fp4", "tables"):
        numbers = [torch.randint(0, 16, shape, dtype=torch.uint8, device="cuda") for shape in shapes]
        exponents = [torch.randint(117, 121, (e, o, i // 32), dtype=torch.uint8, device="cuda") for e, o, i in shapes]
        codes = [quantized.pack_fp4(each) for each in numbers]
        scales = [quantized.pack_fp4_scales(each) for each in exponents]
        biases = [torch.randn(e, o, device="cuda", dtype=torch.bfloat16) for e, o, _ in shapes]
        for name, number, exponent in zip(("gate_up", "down"), numbers, exponents, strict=True):
            if s.kind == "tables" and (made := fp4_tables(number, exponent)) is not None:
                tables |= {name: made.words, f"{name}_scale": made.scales, f"{name}_factor": made.factor}
    elif s.kind in ("fp8", "blocks"):
        codes = [(torch.randn(shape, device="cuda") * 8).to(torch.float8_e4m3fn) for shape in shapes]
        sizes = [(e, o) if s.kind == "fp8" else (e, o // 128, i // 128) for e, o, i in shapes]
        scales = [torch.rand(size, device="cuda") / 400 for size in sizes]
    else:
        codes = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) / 50 for shape in shapes]
    swiglu = (1.702, 7.0) if s.kind in ("fp4", "tables") else None
    m = Mixture(*codes, *scales, *biases, per_token=s.per_token, normalized=True, swiglu=swiglu)
    return replace(m, **tables), m


def by_sorting(x: torch.Tensor, scores: torch.Tensor, m: Mixture, tile: SortedTile | None = None) -> torch.Tensor:
    with nullcontext() if tile is None else override(tile):
        return moe.grouped_mlp(x, *moe.route(scores, m.per_token, normalized=m.normalized), m)


def halved(x: torch.Tensor, scores: torch.Tensor, m: Mixture, tiles: HalvesTiles) -> torch.Tensor:
    with override(tiles):
        return by_halves(x, scores, m)


PAIRS: dict[str, list[tuple[Any, Any]]] = {
    "fp4": [
        ((32, 32, 4, 3), (32, 32, 4, 3, 2)), ((32, 32, 4, 3, 2), (32, 32, 4, 3, 4)),
        ((64, 32, 4, 3, 2), (64, 32, 4, 3, 4)),
    ],
    "other": [
        ((32, 256, 4, 3), (32, 256, 4, 3, 4)), ((32, 128, 4, 4, 2), (32, 128, 4, 4, 4)),
        ((32, 256, 4, 3, 2), (32, 256, 4, 3, 8)),
    ],
}  # fmt: skip
"""Tiles of gate and up, and of down."""
SORTED: dict[str, list[tuple[Any, ...]]] = {
    "fp4": [(64, 32, 4, 3), (64, 16, 4, 4), (128, 32, 4, 3), (128, 32, 8, 3)],
    "fp8": [(64, 128, 4, 4), (64, 256, 4, 3), (128, 128, 8, 3), (64, 128, 4, 3)],
    "bf16": [(64, 128, 4, 4), (128, 64, 4, 4)],
}
HALVES: dict[str, list[tuple[Any, Any]]] = {
    "tables": [
        ((128, 32, 4, 3, 256), (128, 32, 4, 3, 256)),
        ((128, 32, 4, 3, 256, True), (128, 32, 4, 3, 256, True)),
    ],
    "blocks": [((128, 128, 4, 3, 0), (64, 128, 4, 4, 0))],
    "fp8": [((128, 128, 4, 3, 0), (64, 128, 4, 4, 0)), ((64, 256, 4, 3, 0), (64, 256, 4, 3, 0))],
}


def designs(s: Shape, tokens: int) -> Iterator[tuple[str, Call]]:
    yield "as served", moe.routed_mlp
    if s.kind != "tables" or tokens > 128:
        yield "sorted", by_sorting
    pairs = PAIRS["fp4" if s.kind == "fp4" else "other"]
    for up, down in pairs if tokens <= 2 and s.kind != "tables" else ():
        yield f"pairs {up} {down}", partial(by_pairs, up=ExpertTile(*up), down=ExpertTile(*down))
    each = tokens * s.per_token / s.experts
    for rows in (8, 16, 32) if each > 4 else (8,):
        for up, down in HALVES.get(s.kind, []):
            tiles = HalvesTiles(rows, HalvesTile(*up), HalvesTile(*down))
            yield f"halves {rows} {up} {down}", partial(halved, tiles=tiles)
    for rows in () if each > 32 or tokens <= 2 else (16, 32) if each > 8 else (16,):
        for tile in SORTED.get(s.kind, []):
            yield f"sorted {rows} {tile}", partial(by_sorting, tile=SortedTile(rows, ExpertTile(*tile)))


def checked(call: Call, s: Shape) -> float:
    """The largest relative error on a small mixture of this kind, whose tiles are not whole."""
    hidden, size = {"fp4": (384, 352), "tables": (2880, 320), "fp8": (384, 384), "blocks": (384, 384)}.get(
        s.kind, (384, 336)
    )
    small = Shape(s.kind, s.experts, s.per_token, hidden, size)
    m, same = layer(small)
    worst = 0.0
    for tokens in (1, 5, 40):
        x = torch.randn(tokens, small.hidden, device="cuda", dtype=torch.bfloat16)
        scores = torch.randn(tokens, small.experts, device="cuda", dtype=torch.bfloat16)
        weights, chosen = reference.route(scores.double(), s.per_token, normalized=True)
        codes = [c.double() if c.dtype == torch.bfloat16 else c for c in (same.gate_up, same.down)]
        biases = [b if b is None else b.double() for b in (m.gate_up_bias, m.down_bias)]
        truth = reference.grouped_mlp(
            x.double(), weights, chosen, codes[0], codes[1], same.gate_up_scale, same.down_scale, biases[0],
            biases[1], m.swiglu,
        )  # fmt: skip
        found = call(x, scores, m).double()
        worst = max(worst, float((found - truth).norm() / truth.norm()))
    return worst


def microseconds(call: Call, layers: list[Mixture], x: torch.Tensor, scores: list[torch.Tensor]) -> float:
    def all_layers() -> None:
        for m, each in zip(layers, scores, strict=True):
            call(x, each, m)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        all_layers()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            all_layers()
        times: list[float] = []
        for _ in range(30):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3 / len(layers))
    return statistics.median(times[5:])


def warm(shapes: list[Shape], tokens: list[int], only: str, part: int, parts: int) -> None:
    """Kernels of every parts-th design into Triton's cache, so that several processes compile at once."""
    calls = {(s, design): call for s in shapes for count in tokens for design, call in designs(s, count)}
    calls = {key: call for key, call in calls.items() if key[1].startswith(tuple(only.split("|")))}
    for (s, design), call in list(calls.items())[part::parts]:
        try:
            print(f"{s.kind} {design}: error {checked(call, s):.1e}", flush=True)
        except Exception as error:
            print(f"{s.kind} {design}: {type(error).__name__}: {error}"[:400], flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--tokens", default="1,8,32,128")
    parser.add_argument("--only", default="", help="designs whose names begin so, or |so")
    parser.add_argument("--warm", help="i/n: only compile and check every n-th design, from the i-th on")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    tokens = [int(count) for count in args.tokens.split(",")]
    if args.warm:
        warm([SHAPES[name] for name in args.shapes.split(",")], tokens, args.only, *map(int, args.warm.split("/")))
        return
    found: list[dict[str, Any]] = []
    for name in args.shapes.split(","):
        s = SHAPES[name]
        started = time.perf_counter()
        layers = [layer(s)[0] for _ in range(LAYERS)]
        print(f"{name}: made in {time.perf_counter() - started:.1f} s", flush=True)
        for count in tokens:
            x = torch.randn(count, s.hidden, device="cuda", dtype=torch.bfloat16)
            scores = [torch.randn(count, s.experts, device="cuda", dtype=torch.bfloat16) for _ in layers]
            for design, call in designs(s, count):
                if not design.startswith(tuple(args.only.split("|"))):
                    continue
                row: dict[str, Any] = {"shape": name, "tokens": count, "design": design}
                try:
                    row |= {"error": checked(call, s), "us": microseconds(call, layers, x, scores)}
                    row["TB_per_s"] = s.bytes_of(count) / row["us"] / 1e6
                    print(f"{name} {count:4} {design:52} {row['us']:8.1f} us  {row['TB_per_s']:5.2f} TB/s "
                          f" error {row['error']:.1e}", flush=True)  # fmt: skip
                except Exception as error:
                    row["failed"] = f"{type(error).__name__}: {error}"[:300]
                    print(f"{name} {count:4} {design:52} {row['failed'][:150]}", flush=True)
                found.append(row)
                if args.output:
                    card = {"card": torch.cuda.get_device_name(), "torch": torch.__version__}
                    args.output.write_text(json.dumps({**card, "rows": found}, indent=1) + "\n")
        del layers
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
