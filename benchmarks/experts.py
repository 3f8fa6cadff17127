"""A mixture of experts alone, on one GPU: microseconds of a layer by design and tile, and bytes a second.

    python benchmarks/experts.py [--shapes gpt-oss-20b,qwen3-30b-a3b-fp8] [--tokens 1,8,32,128] [--output FILE]

sorted   route, group, two products, activation, sum (moe.py);  pairs   as experts.py has them

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
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mainsail_kernels import moe, reference
from mainsail_kernels import reference_quantized as quantized
from mainsail_kernels.experts import Mixture, by_pairs
from mainsail_kernels.tuned import ExpertTile, SortedTile, override

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
        width = {"fp4": (4 + 8 / 32) / 8, "fp8": 1.0, "bf16": 2.0}[self.kind]
        return 3 * self.hidden * self.size * hit * width


SHAPES = {
    "gpt-oss-20b": Shape("fp4", 32, 4, 2880, 2880),
    "qwen3-30b-a3b-fp8": Shape("fp8", 128, 8, 2048, 768),
    "qwen3-30b-a3b": Shape("bf16", 128, 8, 2048, 768),
}


def layer(s: Shape) -> Mixture:
    shapes = ((s.experts, 2 * s.size, s.hidden), (s.experts, s.hidden, s.size))
    scales: list[Any] = [None, None]
    biases: list[Any] = [None, None]
    if s.kind == "fp4":
        codes = [torch.randint(-(2**31), 2**31, (e, o, i // 8), device="cuda").int() for e, o, i in shapes]
        exponents = [torch.randint(117, 121, (e, o, i // 32), dtype=torch.uint8, device="cuda") for e, o, i in shapes]
        scales = [quantized.pack_fp4_scales(each) for each in exponents]
        biases = [torch.randn(e, o, device="cuda", dtype=torch.bfloat16) for e, o, _ in shapes]
    elif s.kind == "fp8":
        codes = [(torch.randn(shape, device="cuda") * 8).to(torch.float8_e4m3fn) for shape in shapes]
        scales = [torch.rand(e, o, device="cuda") / 400 for e, o, _ in shapes]
    else:
        codes = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) / 50 for shape in shapes]
    swiglu = (1.702, 7.0) if s.kind == "fp4" else None
    return Mixture(*codes, *scales, *biases, per_token=s.per_token, normalized=True, swiglu=swiglu)


def by_sorting(x: torch.Tensor, scores: torch.Tensor, m: Mixture, tile: SortedTile | None = None) -> torch.Tensor:
    with nullcontext() if tile is None else override(tile):
        return moe.grouped_mlp(x, *moe.route(scores, m.per_token, normalized=m.normalized), m)


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


def designs(s: Shape, tokens: int) -> Iterator[tuple[str, Call]]:
    yield "sorted", by_sorting
    kind = "fp4" if s.kind == "fp4" else "other"
    for up, down in PAIRS[kind] if tokens <= 2 else ():
        yield f"pairs {up} {down}", partial(by_pairs, up=ExpertTile(*up), down=ExpertTile(*down))
    each = tokens * s.per_token / s.experts
    for rows in () if each > 32 or tokens <= 2 else (16, 32) if each > 8 else (16,):
        for tile in SORTED[s.kind]:
            yield f"sorted {rows} {tile}", partial(by_sorting, tile=SortedTile(rows, ExpertTile(*tile)))


def checked(call: Call, s: Shape) -> float:
    """The largest relative error on a small mixture of this kind, whose tiles are not whole."""
    small = Shape(s.kind, s.experts, s.per_token, 384, 352 if s.kind == "fp4" else 336)
    m = layer(small)
    worst = 0.0
    for tokens in (1, 5, 40):
        x = torch.randn(tokens, small.hidden, device="cuda", dtype=torch.bfloat16)
        scores = torch.randn(tokens, small.experts, device="cuda", dtype=torch.bfloat16)
        weights, chosen = reference.route(scores.double(), s.per_token, normalized=True)
        codes = [c.double() if c.dtype == torch.bfloat16 else c for c in (m.gate_up, m.down)]
        biases = [b if b is None else b.double() for b in (m.gate_up_bias, m.down_bias)]
        truth = reference.grouped_mlp(
            x.double(), weights, chosen, codes[0], codes[1], m.gate_up_scale, m.down_scale, biases[0], biases[1],
            m.swiglu,
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


def warm(shapes: list[Shape], tokens: list[int], part: int, parts: int) -> None:
    """Kernels of every parts-th design into Triton's cache, so that several processes compile at once."""
    calls = {(s, design): call for s in shapes for count in tokens for design, call in designs(s, count)}
    for (s, design), call in list(calls.items())[part::parts]:
        try:
            print(f"{s.kind} {design}: error {checked(call, s):.1e}", flush=True)
        except Exception as error:
            print(f"{s.kind} {design}: {type(error).__name__}: {error}"[:400], flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--tokens", default="1,8,32,128")
    parser.add_argument("--only", default="", help="designs whose names begin so")
    parser.add_argument("--warm", help="i/n: only compile and check every n-th design, from the i-th on")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    tokens = [int(count) for count in args.tokens.split(",")]
    if args.warm:
        warm([SHAPES[name] for name in args.shapes.split(",")], tokens, *map(int, args.warm.split("/")))
        return
    found: list[dict[str, Any]] = []
    for name in args.shapes.split(","):
        s = SHAPES[name]
        started = time.perf_counter()
        layers = [layer(s) for _ in range(LAYERS)]
        print(f"{name}: made in {time.perf_counter() - started:.1f} s", flush=True)
        for count in tokens:
            x = torch.randn(count, s.hidden, device="cuda", dtype=torch.bfloat16)
            scores = [torch.randn(count, s.experts, device="cuda", dtype=torch.bfloat16) for _ in layers]
            for design, call in designs(s, count):
                if not design.startswith(args.only):
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
